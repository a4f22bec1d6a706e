"""Updates of many adapters become one update for each module, one module at a time: what every rule shares."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates, Weight, check_weights, modules_of, updated_modules
from flowra_compose.options import MergeOptions
from flowra_compose.product_svd import product_svd
from flowra_compose.rank_budget import ranks_within
from flowra_compose.rules import MergeRule, rule_named
from flowra_compose.statistics import ModuleStatistics
from flowra_compose.thresholds import TRIM_DENSITY, global_thresholds
from flowra_compose.truncation import Truncation, metric_svd

__all__ = ["budget_ranks", "check_rule", "merge_updates", "merged_modules"]


@torch.no_grad()
def merge_updates(
    updates: Sequence[Mapping[str, LowRankUpdate]],
    weights: Sequence[Weight],
    *,
    rule: str = "cat",
    options: MergeOptions | None = None,
    truncation: Truncation | None = None,
    statistics: Sequence[Mapping[str, ModuleStatistics]] | None = None,
) -> dict[str, LowRankUpdate]:
    """Merge updates, module by module. See :func:`merge_adapters`, which also looks after heads and names.

    Args:
        updates: one mapping from module name to update for each input. The shapes of a module agree in all of them,
            and all factors are on one device.
        weights: for each input one finite number of any sign, or one by the name of every module that it updates; an
            input of weight 0 takes no part.
        rule: a name in :data:`RULES`.
        options: of the rule.
        truncation: of what the rule gives.
        statistics: one mapping from module name to statistics for each input.

    Returns:
        By name, for every module that an input updates with a weight that is not 0: an update of scaling 1, in the
        promoted dtype of its inputs.

    Raises:
        ValueError: if the rule, an option or the truncation is refused, statistics are missing, weights by module do
            not name those of their input, or a factor does not fit its dtype.
    """
    made = merged_modules(updates, weights, rule=rule, options=options, truncation=truncation, statistics=statistics)
    return dict(made)


def merged_modules(
    updates: Sequence[Mapping[str, LowRankUpdate]],
    weights: Sequence[Weight],
    *,
    rule: str,
    options: MergeOptions | None = None,
    truncation: Truncation | None = None,
    statistics: Sequence[Mapping[str, ModuleStatistics]] | None = None,
    done: Collection[str] = (),
) -> Iterator[tuple[str, LowRankUpdate]]:
    """Merge updates as :func:`merge_updates` does, in the order of the names, holding one module at a time.

    Those of ``done`` are left out: what looks at all modules looks at them, too, but they are not merged again.

    Yields:
        Module name and update.

    Raises:
        ValueError: as for :func:`merge_updates`.
    """
    options = options or MergeOptions()
    check_rule(rule, options, truncation)
    modules = _prepared(updates, weights, rule, options, truncation, statistics)
    merge = rule_named(rule).merge
    ranks = None
    if truncation is not None and truncation.parameters is not None:
        ranks = _ranks_within_budget(modules(()), rule, options, truncation, truncation.parameters)
    for module in modules(done):
        if ranks is not None and not ranks[module.name]:
            continue
        merged = merge(module, options)
        if truncation is not None:
            svd = metric_svd(merged, truncation.statistics_of(module), where=repr(module.name))
            rank = truncation.of(module.name) if ranks is None else ranks[module.name]
            merged = svd.truncated(rank=rank, energy=truncation.energy)
        elif merged.rank > min(merged.shape):
            capped = product_svd(merged.lora_A, merged.scaling * merged.lora_B)
            merged = module.of_factors(*capped.balanced_factors(min(merged.shape)))
        yield module.name, module.fitted(merged)


@torch.no_grad()
def budget_ranks(
    updates: Sequence[Mapping[str, LowRankUpdate]],
    weights: Sequence[Weight],
    *,
    truncation: Truncation,
    rule: str = "cat",
    options: MergeOptions | None = None,
    statistics: Sequence[Mapping[str, ModuleStatistics]] | None = None,
) -> dict[str, int]:
    """Choose the ranks to which a merge is truncated within a number of parameters, losing least in all modules.

    This is the first pass of such a merge, which keeps singular values alone; modules of rank 0 are those that the
    merge leaves out.

    Args:
        updates: as for :func:`merge_updates`.
        weights: as for :func:`merge_updates`.
        truncation: with ``parameters``; its ``rank`` and ``energy`` bound every module.
        rule: as for :func:`merge_updates`.
        options: of the rule.
        statistics: as for :func:`merge_updates`.

    Returns:
        A rank ≥ 0 by name, for every merged module.

    Raises:
        ValueError: if no parameters are given, they are too few for one unit of rank, modules cannot be compared
            because moments are known at some of them only, all merged updates are 0, or as for :func:`merge_updates`.

    Source: docs/methods.md, section 26.
    """
    if truncation.parameters is None:
        raise ValueError("truncation must have parameters to choose ranks for, got None. Give parameters=<number>.")
    options = options or MergeOptions()
    check_rule(rule, options, truncation)
    modules = _prepared(updates, weights, rule, options, truncation, statistics)
    return _ranks_within_budget(modules(()), rule, options, truncation, truncation.parameters)


def _prepared(
    updates: Sequence[Mapping[str, LowRankUpdate]],
    weights: Sequence[Weight],
    rule: str,
    options: MergeOptions,
    truncation: Truncation | None,
    statistics: Sequence[Mapping[str, ModuleStatistics]] | None,
) -> Callable[[Collection[str]], Iterator[ModuleUpdates]]:
    """Check weights and names, and return what goes through the modules as a rule sees them, but for some names."""
    row = rule_named(rule)
    check_weights(updates, weights)
    if truncation is not None:
        truncation.check_names(set(updated_modules(updates, weights)))
    thresholds: tuple[float, ...] | None = None
    if row.trims is not None and options.trim != "tensor":
        plain = partial(modules_of, updates, weights)
        thresholds = global_thresholds(plain, space=row.trims, density=options.density or TRIM_DENSITY)

    def modules(done: Collection[str]) -> Iterator[ModuleUpdates]:
        for module in modules_of(updates, weights, statistics, done=done):
            _check_statistics(rule, row, module)
            yield replace(module, thresholds=thresholds)

    return modules


def _ranks_within_budget(
    modules: Iterator[ModuleUpdates], rule: str, options: MergeOptions, truncation: Truncation, parameters: int
) -> dict[str, int]:
    """Merge every module once for its singular values, and choose ranks."""
    merge = rule_named(rule).merge
    energies: dict[str, list[float]] = {}
    costs: dict[str, int] = {}
    metrics: dict[str, str] = {}
    for module in modules:
        svd = metric_svd(merge(module, options), truncation.statistics_of(module), where=repr(module.name))
        kept = svd.kept(rank=truncation.of(module.name), energy=truncation.energy)
        energies[module.name] = svd.sigma[:kept].square().tolist()
        costs[module.name] = sum(module.shape)
        metrics.setdefault(svd.metric, module.name)
    if len(metrics) > 1:
        raise ValueError(
            "metric must be the same for all modules that share parameters,"
            f" got {' and '.join(f'{metric!r} at {name!r}' for metric, name in metrics.items())}."
            " Measure the others, or truncate in the metric 'frobenius'."
        )
    if not any(energies.values()):
        raise ValueError("updates must not all merge to 0 where they share parameters, got no module that is not")
    return ranks_within(energies, costs, parameters=parameters)


def check_rule(name: str, options: MergeOptions, truncation: Truncation | None) -> None:
    """Refuse what a rule does not take.

    Raises:
        ValueError: if there is no such rule, it does not take an option, or it needs a truncation.
    """
    row = rule_named(name)
    for option, value in options.given().items():
        if option not in row.options:
            raise ValueError(
                f"{option} must be left out with the rule {name!r}, got {value}. It takes {list(row.options)}."
            )
    if row.truncates and truncation is None:
        raise ValueError(f"truncation must be given with the rule {name!r}, got none. Give rank, energy or parameters.")


def _check_statistics(rule: str, row: MergeRule, module: ModuleUpdates) -> None:
    """Refuse statistics that do not fit, or that a task lacks which updates the module."""
    m, n = module.shape
    fits: dict[str, list[tuple[int, ...]]] = {"inputs": [(n, n), (n,)], "outputs": [(m, m), (m,)], "fisher": [(m, n)]}
    for task, (update, known) in enumerate(zip(module.updates, module.statistics, strict=True)):
        for name, shapes in fits.items():
            value: Tensor | None = None if known is None else getattr(known, name)
            needed = name in row.needs and update is not None
            if needed if value is None else tuple(value.shape) not in shapes:
                got = "none" if value is None else f"one of shape {tuple(value.shape)}"
                raise ValueError(
                    f"statistics must hold the {name} of every task for the rule {rule!r}, of a shape in {shapes},"
                    f" got {got} of task {task} for {module.name!r}. Measure them, or choose a rule without."
                )
