"""The policy `breathe`: move rank inside the budget (docs/methods.md, section 7).

At each event the directions with the smallest flow gain per parameter leave until a share of the budget is free, and
the free share goes to new directions *on probation*: chosen by the gradient that their module cannot follow, but kept
only if, trained until a later event, they hold their own against everything else. A predicted gain decides who is
tried, never who stays. Parameters never exceed the budget, neither finally nor at the peak.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Moves", "breathe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moves:
    """What one event does."""

    keep: Mapping[str, int]
    """Module name to the number of leading directions that stay."""
    admit: tuple[str, ...]
    """Modules that gain one direction on probation, best prediction first."""
    kkt_gap: float
    """Smallest gain per parameter kept minus largest dropped; ≥ 0, infinite if nothing was dropped or kept."""


def breathe(
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    *,
    budget: int,
    share: float,
    predictions: Mapping[str, float],
    caps: Mapping[str, int],
) -> Moves:
    """Decide one event.

    Args:
        gains: module name to flow gains of its present directions, non-increasing; may be empty for a module.
        costs: module name to parameters per direction.
        budget: P, in parameters, for the state after the event.
        share: part of the budget to free for directions on probation, in [0, 1).
        predictions: module name to the predicted gain of one more direction, ≥ 0.
        caps: module name to its largest rank.

    Returns:
        The moves; ties are broken by module name.
    """
    keep = {name: len(each) for name, each in gains.items()}
    used = sum(costs[name] * rank for name, rank in keep.items())
    dropped: list[float] = []
    while used > budget * (1 - share):
        density, name = min((gains[name][rank - 1] / costs[name], name) for name, rank in keep.items() if rank > 0)
        keep[name] -= 1
        used -= costs[name]
        dropped.append(density)
    admit = []
    if share > 0:
        for name in sorted(predictions, key=lambda each: (-predictions[each] / costs[each], each)):
            if predictions[name] > 0 and keep[name] < caps[name] and used + costs[name] <= budget:
                admit.append(name)
                used += costs[name]
    kept = [gains[name][rank - 1] / costs[name] for name, rank in keep.items() if rank > 0]
    gap = min(kept) - max(dropped) if kept and dropped else float("inf")
    return Moves(keep=keep, admit=tuple(admit), kkt_gap=gap)
