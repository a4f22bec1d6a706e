"""Updates of many adapters become one update for each module, one module at a time: what every rule shares."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates, modules_of
from flowra_compose.options import MergeOptions
from flowra_compose.product_svd import product_svd
from flowra_compose.rules import MergeRule, rule_named
from flowra_compose.statistics import ModuleStatistics
from flowra_compose.truncation import Truncation, truncated

__all__ = ["check_rule", "merge_updates", "merged_modules"]


@torch.no_grad()
def merge_updates(
    updates: Sequence[Mapping[str, LowRankUpdate]],
    weights: Sequence[float],
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
        weights: one finite number for each input, of any sign; an input of weight 0 takes no part.
        rule: a name in :data:`RULES`.
        options: of the rule.
        truncation: of what the rule gives.
        statistics: one mapping from module name to statistics for each input.

    Returns:
        By name, for every module of an input of non-zero weight: an update of scaling 1, in the promoted dtype of its
        inputs.

    Raises:
        ValueError: if the rule, an option or the truncation is refused, statistics are missing, or a factor does not
            fit its dtype.
    """
    made = merged_modules(updates, weights, rule=rule, options=options, truncation=truncation, statistics=statistics)
    return dict(made)


def merged_modules(
    updates: Sequence[Mapping[str, LowRankUpdate]],
    weights: Sequence[float],
    *,
    rule: str,
    options: MergeOptions | None = None,
    truncation: Truncation | None = None,
    statistics: Sequence[Mapping[str, ModuleStatistics]] | None = None,
) -> Iterator[tuple[str, LowRankUpdate]]:
    """Merge updates as :func:`merge_updates` does, in the order of the names, holding one module at a time.

    Yields:
        Module name and update.

    Raises:
        ValueError: as for :func:`merge_updates`.
    """
    row, options = rule_named(rule), options or MergeOptions()
    check_rule(rule, options, truncation)
    if truncation is not None:
        tasks = zip(weights, updates, strict=True)
        truncation.check_names({name for weight, one in tasks if weight != 0 for name in one})
    for module in modules_of(updates, weights, statistics):
        _check_statistics(rule, row, module)
        merged = row.merge(module, options)
        if truncation is not None:
            merged = truncated(merged, rank=truncation.of(module.name), energy=truncation.energy)
        elif merged.rank > min(merged.shape):
            svd = product_svd(merged.lora_A, merged.scaling * merged.lora_B)
            merged = module.of_factors(*svd.balanced_factors(min(merged.shape)))
        yield module.name, module.fitted(merged)


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
        raise ValueError(f"truncation must be given with the rule {name!r}, got none. Give rank or energy.")


def _check_statistics(rule: str, row: MergeRule, module: ModuleUpdates) -> None:
    """Refuse statistics that are missing or do not fit."""
    m, n = module.shape
    fits: dict[str, list[tuple[int, ...]]] = {"inputs": [(n, n), (n,)], "outputs": [(m, m), (m,)], "fisher": [(m, n)]}
    for need in row.needs:
        for task, known in enumerate(module.statistics):
            value: Tensor | None = None if known is None else getattr(known, need)
            if value is None or tuple(value.shape) not in fits[need]:
                got = "none" if value is None else f"one of shape {tuple(value.shape)}"
                raise ValueError(
                    f"statistics must hold the {need} of every task for the rule {rule!r}, of a shape in {fits[need]},"
                    f" got {got} of task {task} for {module.name!r}. Measure them, or choose a rule without."
                )
