"""The rules of composition as the command line and configurations know them: a line for each, and what it reads.

Imports no library package, so that ``--help`` stays fast; a test compares it with ``flowra_compose.RULES``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["DATA_FREE_RULES", "MERGE_RULES", "OPTIONS", "RuleName", "RuleText", "rules_text"]

RuleName = Literal[
    "cat",
    "task_arithmetic",
    "truncated_svd",
    "magnitude_prune",
    "ties",
    "dare_linear",
    "dare_ties",
    "knots_ties",
    "knots_dare_linear",
    "knots_dare_ties",
    "core_task_arithmetic",
    "core_ties",
    "tsv_m",
    "orth",
    "iso_c",
    "iso_cts",
    "wudi",
    "fisher",
    "regmean",
    "flow",
]
OPTIONS = ("density", "trim", "seed", "common", "shrinkage")
"""Fields of ``flowra_compose.MergeOptions``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleText:
    """What a user must know of a rule."""

    line: str
    """What it does, in a line."""
    options: tuple[str, ...] = ()
    """Options that it takes."""
    needs: tuple[str, ...] = ()
    """Statistics that it needs of every task."""
    truncates: bool = False
    """Whether a rank, a share of energy or a budget must be given."""


_TRIM = ("density", "trim")
_CHANCE = ("density", "seed")
MERGE_RULES: Mapping[str, RuleText] = {
    "cat": RuleText(line="the weighted sum, exactly; ranks add up"),
    "task_arithmetic": RuleText(line="the weighted sum, under the name it has in the literature"),
    "truncated_svd": RuleText(line="the weighted sum, cut to a rank, an energy or a budget", truncates=True),
    "magnitude_prune": RuleText(line="keep each task's largest entries, and add up", options=_TRIM),
    "ties": RuleText(line="keep the largest, elect a sign, take the mean of those that agree", options=_TRIM),
    "dare_linear": RuleText(line="drop entries by chance, scale up the rest, and add up", options=_CHANCE),
    "dare_ties": RuleText(line="drop entries by chance, then elect a sign", options=_CHANCE),
    "knots_ties": RuleText(line="ties on coordinates that the tasks share (KnOTS)", options=_TRIM),
    "knots_dare_linear": RuleText(line="dare_linear on such coordinates", options=_CHANCE),
    "knots_dare_ties": RuleText(line="dare_ties on such coordinates", options=_CHANCE),
    "core_task_arithmetic": RuleText(line="the weighted sum, by the small core of the tasks (Core Space)"),
    "core_ties": RuleText(line="ties on that core", options=_TRIM),
    "tsv_m": RuleText(line="singular vectors of all tasks, made orthogonal to each other"),
    "orth": RuleText(line="the same, of equal loudness: the default without statistics"),
    "iso_c": RuleText(line="the sum with all singular values made equal"),
    "iso_cts": RuleText(line="the same, with room for directions of single tasks", options=("common",)),
    "wudi": RuleText(line="least interference guessed from the updates alone"),
    "fisher": RuleText(line="the mean weighted by the Fisher's diagonal", needs=("fisher",)),
    "regmean": RuleText(line="match every task's outputs on its inputs", options=("shrinkage",), needs=("inputs",)),
    "flow": RuleText(
        line="match every task's outputs where its loss is sensitive: the default with statistics",
        options=("shrinkage",),
        needs=("inputs",),
    ),
}
"""Rules by name."""
DATA_FREE_RULES = ("orth", "task_arithmetic")
"""Taken by default where there are no statistics: the first that there is."""


def rules_text() -> str:
    """Return the rules, one a line."""
    width = max(map(len, MERGE_RULES))
    return "\n".join(f"{name:<{width}}  {each.line}" for name, each in MERGE_RULES.items())
