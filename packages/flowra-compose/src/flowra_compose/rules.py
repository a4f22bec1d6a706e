"""The rules of composition: how the task vectors of a module become one update. A rule is a row of a table."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

from flowra_compose.entries import (
    Combine,
    Keep,
    added_up,
    all_entries,
    dropped,
    elected_mean,
    merge_entries,
    trimmed,
)
from flowra_compose.fisher_merging import fisher
from flowra_compose.flow import flow
from flowra_compose.isotropic import iso_c, iso_cts
from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions
from flowra_compose.regmean import regmean
from flowra_compose.singular_vectors import orth, tsv_m
from flowra_compose.spaces import Space, aligned_space, core_space, weight_space
from flowra_compose.weighted_sum import weighted_sum
from flowra_compose.wudi import wudi

__all__ = ["RULES", "MergeRule", "rule_named"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeRule:
    """The mathematics of a merge, and what it needs."""

    merge: Callable[[ModuleUpdates, MergeOptions], LowRankUpdate]
    """Makes one update of a module's task vectors. Shapes, devices, weights and options have been checked. It works on
    products ΔW, does not depend on the order of the tasks, and answers in a dtype of its own, at least float32."""
    options: tuple[str, ...] = ()
    """The fields of :class:`MergeOptions` that it takes; any other is refused."""
    needs: tuple[Literal["inputs", "outputs", "fisher"], ...] = ()
    """The fields of :class:`ModuleStatistics` that it needs of every task that updates a module."""
    truncates: bool = False
    """Whether it is nothing without a truncation."""
    trims: Space | None = None
    """The space in which it trims entries: there thresholds over all modules are taken first, but for
    ``trim="tensor"``."""


def _by_entries(space: Space, keep: Keep, combine: Combine) -> MergeRule:
    takes: Mapping[Keep, tuple[str, ...]] = {
        all_entries: (),
        trimmed: ("density", "trim"),
        dropped: ("density", "seed"),
    }
    merge = partial(merge_entries, space=space, keep=keep, combine=combine)
    return MergeRule(merge=merge, options=takes[keep], trims=space if keep is trimmed else None)


RULES: Mapping[str, MergeRule] = MappingProxyType({
    "cat": MergeRule(merge=weighted_sum),
    "task_arithmetic": MergeRule(merge=weighted_sum),
    "truncated_svd": MergeRule(merge=weighted_sum, truncates=True),
    "magnitude_prune": _by_entries(weight_space, trimmed, added_up),
    "ties": _by_entries(weight_space, trimmed, elected_mean),
    "dare_linear": _by_entries(weight_space, dropped, added_up),
    "dare_ties": _by_entries(weight_space, dropped, elected_mean),
    "knots_ties": _by_entries(aligned_space, trimmed, elected_mean),
    "knots_dare_linear": _by_entries(aligned_space, dropped, added_up),
    "knots_dare_ties": _by_entries(aligned_space, dropped, elected_mean),
    "core_task_arithmetic": _by_entries(core_space, all_entries, added_up),
    "core_ties": _by_entries(core_space, trimmed, elected_mean),
    "tsv_m": MergeRule(merge=tsv_m),
    "orth": MergeRule(merge=orth),
    "iso_c": MergeRule(merge=iso_c),
    "iso_cts": MergeRule(merge=iso_cts, options=("common",)),
    "wudi": MergeRule(merge=wudi),
    "flow": MergeRule(merge=flow, options=("shrinkage",), needs=("inputs",)),
    "regmean": MergeRule(merge=regmean, options=("shrinkage",), needs=("inputs",)),
    "fisher": MergeRule(merge=fisher, needs=("fisher",)),
})
"""Rules by name."""


def rule_named(name: str) -> MergeRule:
    """Return a row of the table.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.0)
        raise ValueError(f"rule must be one of {sorted(RULES)}, got {name!r}. Nearest: {near[0]!r}.")
    return RULES[name]
