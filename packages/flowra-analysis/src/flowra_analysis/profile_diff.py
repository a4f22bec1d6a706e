"""What differs between two profiles: where they came from, which modules they know, and what they say of them.

Two profiles of one base and one data set with other seeds show how steady the statistics are; two of one base and other
data, whether the flow depends on the task.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowra_analysis.flow_profile import FlowProfile, ModuleProfile

__all__ = ["Change", "ProfileDiff", "StatisticDiff", "diff_profiles", "rank_correlation", "spectral_distance"]

STDERR = "_stderr"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What one statistic of one module was and is."""

    module: str
    first: float
    second: float
    in_errors: float | None
    """|second - first| / √(e₁² + e₂²), both standard errors being known and not both 0; otherwise None. Finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatisticDiff:
    """One statistic that both profiles know, over the modules where both know it."""

    rank_correlation: float | None
    """Spearman's ρ over the modules; None where one of the profiles has the same value for all."""
    changes: tuple[Change, ...]
    """One for each module, the largest first: in standard errors if all have them, otherwise in absolute value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileDiff:
    """What differs between a first and a second profile."""

    same_base: bool | None
    """Whether the hashes of the base are equal; None if one of the profiles does not say."""
    same_data: bool | None
    """Whether the hashes of the data are equal; None if one of the profiles does not say."""
    provenance: Mapping[str, tuple[str | int | float | None, str | int | float | None]]
    """Name to both values where they differ; None where a profile does not say."""
    base_parameters: tuple[int, int]
    """Of the first and the second."""
    only_in_first: tuple[str, ...]
    """Modules that the second does not know."""
    only_in_second: tuple[str, ...]
    """Modules that the first does not know."""
    other_shapes: tuple[str, ...]
    """Modules of both whose shape or cost differs."""
    statistics: Mapping[str, StatisticDiff]
    """Name to difference; standard errors are not compared."""
    statistics_only_in_first: tuple[str, ...]
    statistics_only_in_second: tuple[str, ...]
    spectra: Mapping[str, Mapping[str, float]]
    """Kind to module to relative distance, the largest first; see :func:`spectral_distance`."""
    spectra_only_in_first: tuple[str, ...]
    spectra_only_in_second: tuple[str, ...]


def diff_profiles(first: FlowProfile, second: FlowProfile) -> ProfileDiff:
    """Compare two profiles.

    Args:
        first: the one that changes are counted from.
        second: of the same or another model.

    Returns:
        What differs. Everything is symmetric but for the order.
    """
    shared = [name for name in first.modules if name in second.modules]
    names, others = _statistics(first), _statistics(second)
    return ProfileDiff(
        same_base=_same(first, second, "base_hash"),
        same_data=_same(first, second, "data_hash"),
        provenance={
            key: (first.provenance.get(key), second.provenance.get(key))
            for key in sorted(first.provenance.keys() | second.provenance.keys())
            if first.provenance.get(key) != second.provenance.get(key)
        },
        base_parameters=(first.base_parameters, second.base_parameters),
        only_in_first=tuple(name for name in first.modules if name not in second.modules),
        only_in_second=tuple(name for name in second.modules if name not in first.modules),
        other_shapes=tuple(name for name in shared if _size(first.modules[name]) != _size(second.modules[name])),
        statistics={
            key: found
            for key in names
            if key in others and (found := _statistic(key, shared, first.modules, second.modules)) is not None
        },
        statistics_only_in_first=tuple(key for key in names if key not in others),
        statistics_only_in_second=tuple(key for key in others if key not in names),
        spectra={
            kind: _distances(first.spectra[kind], second.spectra[kind])
            for kind in sorted(first.spectra.keys() & second.spectra.keys())
        },
        spectra_only_in_first=tuple(sorted(first.spectra.keys() - second.spectra.keys())),
        spectra_only_in_second=tuple(sorted(second.spectra.keys() - first.spectra.keys())),
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Compute Spearman's rank correlation ρ; ties share their mean rank.

    Ranks are counted in halves, as whole numbers, so that ρ is exact before its last division: 1 is 1.

    Args:
        first: N finite values.
        second: N finite values, those of the same things.

    Returns:
        ρ in [-1, 1]; None if it is not defined, since all values of one are equal or N < 2.

    Raises:
        ValueError: if the lengths differ.

    Source: Spearman (1904); with ties, Pearson's correlation of the mean ranks.

    >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 1000.0, 1e9]), rank_correlation([1.0, 2.0], [3.0, 3.0])
    (1.0, None)
    """
    if len(first) != len(second):
        raise ValueError(f"second must hold as many values as first, got {len(second)} and {len(first)}")
    a, b = _centred_ranks(first), _centred_ranks(second)
    product = sum(x * y for x, y in zip(a, b, strict=True))
    squares = sum(x * x for x in a) * sum(y * y for y in b)
    if squares == 0:
        return None
    root = math.isqrt(squares)
    return product / root if root * root == squares else product / math.sqrt(squares)


def spectral_distance(first: Tensor, second: Tensor) -> float:
    """Compute ‖first - second‖ / max(‖first‖, ‖second‖), the shorter one filled up with zeros.

    Args:
        first: 1-D, finite.
        second: 1-D, finite, of any length and dtype.

    Returns:
        0 for equal spectra, in [0, √2] for non-negative ones, and independent of a common scale. In float64.
    """
    length = max(len(first), len(second))
    a, b = (torch.nn.functional.pad(each.double().cpu(), (0, length - len(each))) for each in (first, second))
    scale = max(float(each.abs().max()) if length else 0.0 for each in (a, b))
    if scale == 0:
        return 0.0
    a, b = a / scale, b / scale
    return float((a - b).norm() / torch.maximum(a.norm(), b.norm()))


def _same(first: FlowProfile, second: FlowProfile, key: str) -> bool | None:
    values = [each.provenance.get(key) for each in (first, second)]
    return None if None in values else values[0] == values[1]


def _statistics(profile: FlowProfile) -> list[str]:
    """List what a profile says of its modules, without standard errors."""
    found = sorted({key for module in profile.modules.values() for key in module.statistics})
    return [key for key in found if not (key.endswith(STDERR) and key.removesuffix(STDERR) in found)]


def _size(module: ModuleProfile) -> tuple[tuple[int, int], int]:
    return module.shape, module.cost_per_rank


def _statistic(
    key: str, shared: Sequence[str], first: Mapping[str, ModuleProfile], second: Mapping[str, ModuleProfile]
) -> StatisticDiff | None:
    """Compare one statistic; None if there is no module where both know it."""
    changes = []
    for name in shared:
        before, after = first[name].statistics, second[name].statistics
        if key in before and key in after:
            errors = [each.get(key + STDERR) for each in (before, after)]
            changes.append(_change(name, float(before[key]), float(after[key]), errors))
    if not changes:
        return None
    correlation = rank_correlation([each.first for each in changes], [each.second for each in changes])
    sizes = [each.in_errors for each in changes]
    if None not in sizes:
        changes.sort(key=lambda each: -(each.in_errors or 0.0))
    else:
        changes.sort(key=lambda each: -abs(each.second - each.first))
    return StatisticDiff(rank_correlation=correlation, changes=tuple(changes))


def _change(module: str, first: float, second: float, errors: Sequence[float | None]) -> Change:
    known = [float(error) for error in errors if error is not None]
    combined = math.hypot(*known) if len(known) == 2 else 0.0
    in_errors = min(abs(second - first) / combined, sys.float_info.max) if combined > 0 else None
    return Change(module=module, first=first, second=second, in_errors=in_errors)


def _distances(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    found = {name: spectral_distance(first[name], second[name]) for name in first if name in second}
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def _centred_ranks(values: Sequence[float]) -> list[int]:
    """Return twice the mean rank of each value, less its mean over all."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = start + end + 1 - (len(values) + 1)  # twice the mean of start + 1 … end, centred
        start = end
    return ranks
