"""The rules of composition: how the task vectors of a module become one update. A rule is a row of a table."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions
from flowra_compose.weighted_sum import weighted_sum

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
    """The fields of :class:`ModuleStatistics` that it needs of every task."""
    truncates: bool = False
    """Whether it is nothing without a truncation."""


RULES: Mapping[str, MergeRule] = MappingProxyType({
    "cat": MergeRule(merge=weighted_sum),
    "task_arithmetic": MergeRule(merge=weighted_sum),
    "truncated_svd": MergeRule(merge=weighted_sum, truncates=True),
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
