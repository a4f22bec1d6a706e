"""The greedy solver of the knapsack (docs/methods.md, section 6).

With equal costs the greedy answer is optimal (exchange argument); otherwise it falls short of the optimum by at most
the gain of one unit, and where ranks come in steps by that of one step of the envelope. The planned gain never falls
when the budget grows: where two budgets first part, the larger takes a unit worth more than all the smaller can still
buy.
"""

import heapq
import math
from collections.abc import Mapping, Sequence

from flowra_allocation.knapsack import Allocation, Cost, Ladder, check_gains, describe, ladders, parameters_at

__all__ = ["greedy"]


def greedy(
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, Cost],
    budget: int,
    *,
    caps: Mapping[str, int] | None = None,
    floors: Mapping[str, int] | None = None,
    rank_steps: Mapping[str, Sequence[int]] | None = None,
) -> Allocation:
    """Take the unit of rank with the largest gain per parameter until none fits.

    Args:
        gains: module name to the gains of its first, second, … unit of rank, non-increasing, ≥ 0. Their number is the
            module's largest possible rank. One gain makes an item: there or not.
        costs: module name to parameters per unit of rank, ≥ 1; or to the parameters at rank 1, 2, … in all, rising.
        budget: P ≥ 0, in parameters.
        caps: module name to the largest rank wanted; modules not named are limited by the number of gains.
        floors: module name to the least rank, 0 where not named. A module whose floor is its largest rank is frozen.
        rank_steps: module name to the ranks that it may have beside 0; all, where not named.

    Returns:
        The ranks. Ties are broken by module name, so the order of the input does not matter.

    Raises:
        ValueError: if the names differ, a cost is below 1 or does not rise, a cap or floor is out of range, the floors
            exceed the budget, or gains are negative, increasing or not finite.
    """
    check_gains(gains, costs, budget)
    rungs = ladders(gains, costs, caps=caps, floors=floors, rank_steps=rank_steps)
    ranks = climb(rungs, room_above(rungs, costs, budget))
    return describe(ranks, gains, costs, rungs)


def room_above(rungs: Mapping[str, Ladder], costs: Mapping[str, Cost], budget: int) -> int:
    """Return what the least ranks leave of the budget; raises ValueError if that is less than nothing."""
    least = sum(parameters_at(costs[name], each.ranks[0]) for name, each in rungs.items())
    if least > budget:
        raise ValueError(
            f"floors and frozen modules must fit the budget, {budget} parameters, got {least}. Lower them or raise it."
        )
    return budget - least


def climb(rungs: Mapping[str, Ladder], room: int) -> dict[str, int]:
    """Go up the ladders by the steps with the largest gain per parameter, until none fits into the room.

    Returns:
        Module name to rank.
    """
    places = dict.fromkeys(rungs, 0)
    queue = [entry for name, each in rungs.items() if (entry := _entry(name, each, 0)) is not None]
    heapq.heapify(queue)
    while queue:
        _, name, place, cost = heapq.heappop(queue)
        fits = cost <= room
        if fits:
            room -= cost
            places[name] = place
        following = _entry(name, rungs[name], places[name], math.inf if fits else room)  # some of the steps may fit
        if following is not None:
            heapq.heappush(queue, following)
    return {name: rungs[name].ranks[place] for name, place in places.items()}


def _entry(name: str, ladder: Ladder, place: int, room: float = math.inf) -> tuple[float, str, int, int] | None:
    found = ladder.ahead(place, room)
    return found and (-found[2] / found[1], name, found[0], found[1])
