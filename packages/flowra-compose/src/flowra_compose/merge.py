"""Many adapters become one. What every rule needs is checked here, once; a rule supplies its mathematics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real

import torch
from torch import Tensor

from flowra_compose.lazy_updates import outlines_of
from flowra_compose.low_rank import AdapterState, LowRankUpdate
from flowra_compose.merging import check_rule, merge_updates
from flowra_compose.module_updates import Weight, check_weights, updated_modules
from flowra_compose.options import MergeOptions
from flowra_compose.statistics import ModuleStatistics
from flowra_compose.truncation import Truncation

__all__ = ["merge_adapters", "merged_frame"]


def merge_adapters(
    adapters: Sequence[AdapterState],
    weights: Sequence[Weight],
    *,
    rule: str = "cat",
    options: MergeOptions | None = None,
    truncation: Truncation | None = None,
    statistics: Sequence[Mapping[str, ModuleStatistics]] | None = None,
    heads_from: int | None = None,
) -> AdapterState:
    """Merge adapters of one base into one adapter.

    Args:
        adapters: at least one. Ranks and target modules may differ; a module missing from one counts as ΔW = 0 there.
        weights: for each adapter one finite number of any sign for its ΔW, or one by the name of every module that it
            updates, as :func:`learn_coefficients` finds them. An adapter of weight 0 adds no update.
        rule: a name in :data:`RULES`. ``cat`` is the exact weighted sum.
        options: of the rule.
        truncation: gives the result another rank; its updates then say what was lost (:class:`TruncatedUpdate`).
        statistics: one mapping from module name to what is known of it for each adapter, for rules that need it.
        heads_from: index of the adapter whose ``modules_to_save`` are kept. Modules trained in full are never mixed and
            know no weight: without this, those of all adapters that carry any must be equal bit by bit.

    Returns:
        The merged adapter, on new tensors except for ``modules_to_save``. Its task type is that of the adapter whose
        ``modules_to_save`` are kept, else the one that the inputs agree on.

    Raises:
        ValueError: if the inputs disagree on the base, the shape of a module, the device, the trained heads or the task
            type, if weights, rule, an option or ``heads_from`` are out of range, if the rule does not take an option,
            or if a merged factor does not fit its dtype.
    """
    labels = [f"adapters[{index}]" for index in range(len(adapters))]
    frame = merged_frame(adapters, weights, labels, rule, options, truncation, heads_from)
    updates = merge_updates(
        [one.updates for one in adapters],
        weights,
        rule=rule,
        options=options,
        truncation=truncation,
        statistics=statistics,
    )
    return replace(frame, updates=updates)


def merged_frame(
    adapters: Sequence[AdapterState],
    weights: Sequence[Weight],
    labels: Sequence[str],
    rule: str,
    options: MergeOptions | None,
    truncation: Truncation | None,
    heads_from: int | None,
) -> AdapterState:
    """Check that adapters can be merged, and return what they become but for the updates.

    Args:
        adapters: as for :func:`merge_adapters`; of updates that lie in files only the outlines are looked at.
        weights: as for :func:`merge_adapters`.
        labels: what to call each adapter in an error.
        rule: as for :func:`merge_adapters`.
        options: as for :func:`merge_adapters`.
        truncation: as for :func:`merge_adapters`.
        heads_from: as for :func:`merge_adapters`.

    Returns:
        An adapter whose updates are of the right names and shapes, and of no meaning.

    Raises:
        ValueError: as for :func:`merge_adapters`.
    """
    check_rule(rule, options or MergeOptions(), truncation)
    if not adapters or len(weights) != len(adapters):
        raise ValueError(f"weights must be one for each adapter, at least one, got {len(weights)} for {len(adapters)}")
    infinite = [f"{weight} for {label}" for weight, label in zip(weights, labels, strict=True) if not _finite(weight)]
    if infinite:
        raise ValueError(f"weights must be finite numbers, got {', '.join(infinite)}")
    updates = [one.updates for one in adapters]
    check_weights(updates, weights)
    outlines = _checked_outlines(updates, labels)
    source = heads_source(adapters, labels, heads_from)
    bases = [one.base_model_name_or_path for one in adapters]
    task_types = [one.task_type for one in adapters]
    return AdapterState(
        updates={name: outlines[name] for name in updated_modules(updates, weights)},
        modules_to_save={} if source is None else adapters[source].modules_to_save,
        trained_modules=() if source is None else adapters[source].trained_modules,
        base_model_name_or_path=_agreed(bases, labels, "base_model_name_or_path"),
        task_type=_agreed(task_types, labels, "task_type") if source is None else task_types[source],
        fan_in_fan_out=any(one.fan_in_fan_out for one in adapters),
    )


def _finite(weight: Weight) -> bool:
    numbers = weight.values() if isinstance(weight, Mapping) else [weight]
    return all(isinstance(one, Real) and math.isfinite(one) for one in numbers)


def _checked_outlines(
    updates: Sequence[Mapping[str, LowRankUpdate]], labels: Sequence[str]
) -> dict[str, LowRankUpdate]:
    """Return an update of each name, for its shape, after a check that all of that name agree in it."""
    seen: dict[str, tuple[LowRankUpdate, str]] = {}
    problems, devices = [], set()
    for one, label in zip(updates, labels, strict=True):
        outlines = outlines_of(one)
        for name, update in outlines.items():
            known, first = seen.setdefault(name, (update, label))
            if (known.layout, known.parameter_shape) != (update.layout, update.parameter_shape):
                forms = [f"{each.layout} {each.parameter_shape}" for each in (known, update)]
                problems.append(f"{forms[0]} in {first} and {forms[1]} in {label} for {name!r}")
            factors = (update.lora_A, update.lora_B) if outlines is one else ()
            devices |= {str(factor.device) for factor in factors} or {"cpu"}
    if problems:
        raise ValueError(f"adapters must agree on the shape of a module, got {'; '.join(problems)}")
    if len(devices) > 1:
        raise ValueError(f"adapters must be on one device, got {sorted(devices)}. Move them first.")
    return {name: update for name, (update, _) in seen.items()}


def heads_source(adapters: Sequence[AdapterState], labels: Sequence[str], heads_from: int | None) -> int | None:
    """Return the index of the adapter whose trained modules are kept, or None if no adapter has any."""
    carriers = [index for index, one in enumerate(adapters) if one.modules_to_save]
    if heads_from is not None:
        if heads_from not in carriers:
            raise ValueError(f"heads_from must be an adapter with modules_to_save, of {carriers}, got {heads_from}")
        return heads_from
    if not carriers:
        return None
    first = adapters[carriers[0]].modules_to_save
    others = [index for index in carriers if not _bit_equal(first, adapters[index].modules_to_save)]
    if others:
        clash = ", ".join(f"{index} ({labels[index]})" for index in (carriers[0], *others))
        raise ValueError(
            f"modules_to_save must be equal in all adapters that carry them, got different {sorted(first)} in {clash}."
            " Give heads_from=<index> to keep those of one."
        )
    return carriers[0]


def _bit_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.shape == other[name].shape
        and tensor.dtype == other[name].dtype
        and torch.equal(_bytes(tensor), _bytes(other[name]))
        for name, tensor in one.items()
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)


def _agreed(values: Sequence[str | None], labels: Sequence[str], field: str) -> str | None:
    given: dict[str, str] = {}
    for value, label in zip(values, labels, strict=True):
        if value is not None:
            given.setdefault(value, label)
    if len(given) > 1:
        got = " and ".join(f"{value!r} in {label}" for value, label in given.items())
        raise ValueError(
            f"{field} must be the same in all adapters, got {got}."
            " If they do belong together, read them and set it with dataclasses.replace."
        )
    return next(iter(given), None)
