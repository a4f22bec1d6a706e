"""Many adapters become one. What every rule needs is checked here, once; a rule supplies its mathematics."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from flowra_compose.cat import cat
from flowra_compose.low_rank import AdapterState, LowRankUpdate
from flowra_compose.peft_files import read_adapter, write_adapter
from flowra_compose.truncated_svd import truncated_svd

__all__ = ["RULES", "MergeRule", "merge_adapters", "merge_folders"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeRule:
    """The mathematics of a merge, and what it can be told beyond the weights."""

    merge: Callable[..., Mapping[str, LowRankUpdate]]
    """Takes one mapping from module name to update per input, the weights, and its options by keyword. It gets all
    modules at once, so that it may look across them, and works on products ΔW. Shapes, devices and weights have been
    checked."""
    options: tuple[str, ...] = ()
    """The options of :func:`merge_adapters` that it takes; any other is refused."""


RULES: Mapping[str, MergeRule] = MappingProxyType({
    "cat": MergeRule(merge=cat),
    "truncated_svd": MergeRule(merge=truncated_svd, options=("rank", "energy")),
})
"""Rules by name."""


def merge_adapters(
    adapters: Sequence[AdapterState],
    weights: Sequence[float],
    *,
    rule: str = "cat",
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    heads_from: int | None = None,
) -> AdapterState:
    """Merge adapters of one base into one adapter.

    Args:
        adapters: at least one. Ranks and target modules may differ; a module missing from one counts as ΔW = 0 there.
        weights: one finite number for each adapter, of any sign, for its ΔW. An adapter of weight 0 adds no update.
        rule: a name in :data:`RULES`. ``cat`` is the exact weighted sum, ``truncated_svd`` its best approximation of a
            lower rank, whose updates say what was lost (:class:`TruncatedUpdate`).
        rank: largest rank, of all modules or by module name; for ``truncated_svd``.
        energy: share of ‖ΔW‖_F² to keep, in (0, 1]; for ``truncated_svd``.
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
    return _merge(adapters, weights, labels, rule, {"rank": rank, "energy": energy}, heads_from)


def merge_folders(
    folders: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    *,
    rule: str = "cat",
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    heads_from: int | None = None,
) -> AdapterState:
    """Read adapters in PEFT's format, merge them, and write the result. See :func:`merge_adapters`.

    Args:
        folders: at least one folder.
        weights: one for each folder.
        out: folder to write, none of the inputs. Nothing is written unless the whole merge succeeds.
        rule: as for :func:`merge_adapters`.
        rank: as for :func:`merge_adapters`.
        energy: as for :func:`merge_adapters`.
        heads_from: as for :func:`merge_adapters`.

    Returns:
        What was written.

    Raises:
        ValueError: if a folder is refused by :func:`flowra_compose.read_adapter`, ``out`` is one of them, or the
            adapters cannot be merged.
    """
    if Path(out).resolve() in {Path(folder).resolve() for folder in folders}:
        raise ValueError(f"out must be a folder of its own, got {out}, which is an input. Choose another.")
    adapters = [read_adapter(folder) for folder in folders]
    labels = [str(folder) for folder in folders]
    merged = _merge(adapters, weights, labels, rule, {"rank": rank, "energy": energy}, heads_from)
    write_adapter(merged, out)
    return merged


def _merge(
    adapters: Sequence[AdapterState],
    weights: Sequence[float],
    labels: Sequence[str],
    rule: str,
    options: Mapping[str, object],
    heads_from: int | None,
) -> AdapterState:
    if rule not in RULES:
        near = difflib.get_close_matches(rule, RULES, n=1, cutoff=0.0)
        raise ValueError(f"rule must be one of {sorted(RULES)}, got {rule!r}. Nearest: {near[0]!r}.")
    given = {option: value for option, value in options.items() if value is not None}
    _check_options(rule, given)
    if not adapters or len(weights) != len(adapters):
        raise ValueError(f"weights must be one for each adapter, at least one, got {len(weights)} for {len(adapters)}")
    infinite = [f"{weight} for {label}" for weight, label in zip(weights, labels, strict=True) if not _finite(weight)]
    if infinite:
        raise ValueError(f"weights must be finite numbers, got {', '.join(infinite)}")
    _check_shapes(adapters, labels)
    source = _heads_source(adapters, labels, heads_from)
    bases = [one.base_model_name_or_path for one in adapters]
    task_types = [one.task_type for one in adapters]
    return AdapterState(
        updates=RULES[rule].merge([one.updates for one in adapters], weights, **given),
        modules_to_save={} if source is None else adapters[source].modules_to_save,
        trained_modules=() if source is None else adapters[source].trained_modules,
        base_model_name_or_path=_agreed(bases, labels, "base_model_name_or_path"),
        task_type=_agreed(task_types, labels, "task_type") if source is None else task_types[source],
        fan_in_fan_out=any(one.fan_in_fan_out for one in adapters),
    )


def _check_options(rule: str, given: Mapping[str, object]) -> None:
    for option, value in given.items():
        if option not in RULES[rule].options:
            takers = sorted(name for name, each in RULES.items() if option in each.options)
            raise ValueError(f"{option} must be left out with the rule {rule!r}, got {value}. It is for {takers}.")


def _finite(weight: float) -> bool:
    return isinstance(weight, int | float) and math.isfinite(weight)


def _check_shapes(adapters: Sequence[AdapterState], labels: Sequence[str]) -> None:
    seen: dict[str, tuple[tuple[int, int], str]] = {}
    problems = []
    for one, label in zip(adapters, labels, strict=True):
        for name, update in one.updates.items():
            shape, first = seen.setdefault(name, (update.shape, label))
            if update.shape != shape:
                problems.append(f"{shape} in {first} and {update.shape} in {label} for {name!r}")
    if problems:
        raise ValueError(f"adapters must agree on the shape of a module, got {'; '.join(problems)}")
    updates = [update for one in adapters for update in one.updates.values()]
    devices = sorted({str(factor.device) for update in updates for factor in (update.lora_A, update.lora_B)})
    if len(devices) > 1:
        raise ValueError(f"adapters must be on one device, got {devices}. Move them first.")


def _heads_source(adapters: Sequence[AdapterState], labels: Sequence[str], heads_from: int | None) -> int | None:
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
