"""Which directions leave when parameters must go: those worth least per parameter (docs/methods.md, section 7)."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Shedding", "shed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shedding:
    """What is left."""

    keep: Mapping[str, int]
    """Module name to the number of best directions that stay."""
    kkt_gap: float | None
    """Smallest gain per parameter kept minus largest dropped, ≥ 0; None if nothing was dropped or kept."""


def shed(
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    *,
    budget: float,
    floors: Mapping[str, int] | None = None,
) -> Shedding:
    """Drop directions, the smallest gain per parameter first, until the rest fits.

    A module loses its worst directions first, so what it keeps is the best it could keep.

    Args:
        gains: module name to the gains of its present directions, non-increasing; may be empty for a module.
        costs: module name to parameters per direction.
        budget: parameters that may stay, ≥ 0.
        floors: module name to a rank it does not fall below; 0 for those not named.

    Returns:
        What is left. Of equal gains per parameter, those of the first module by name leave first.
    """
    keep = {name: len(each) for name, each in gains.items()}
    floors = floors or {}
    used = sum(costs[name] * rank for name, rank in keep.items())
    queue = [(gains[name][-1] / costs[name], name) for name in gains if keep[name] > floors.get(name, 0)]
    heapq.heapify(queue)
    dropped = -1.0
    while used > budget and queue:
        density, name = heapq.heappop(queue)
        dropped = max(dropped, density)
        keep[name] -= 1
        used -= costs[name]
        if keep[name] > floors.get(name, 0):
            heapq.heappush(queue, (gains[name][keep[name] - 1] / costs[name], name))
    kept = [gains[name][rank - 1] / costs[name] for name, rank in keep.items() if rank > floors.get(name, 0)]
    return Shedding(keep=keep, kkt_gap=min(kept) - dropped if kept and dropped >= 0 else None)
