"""The greedy solver of the knapsack (docs/methods.md, section 6).

With equal costs the greedy answer is optimal (exchange argument); otherwise it falls short of the optimum by at most
one gain. The planned gain never falls when the budget grows: where two budgets first part, the larger takes a unit
worth more than all the smaller can still buy.
"""

import heapq
from collections.abc import Mapping, Sequence

from flowra_allocation.knapsack import Allocation, check_gains, describe, rank_limits

__all__ = ["greedy"]


def greedy(
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    budget: int,
    *,
    caps: Mapping[str, int] | None = None,
) -> Allocation:
    """Take the unit of rank with the largest gain per parameter until none fits.

    Args:
        gains: module name to the gains of its first, second, … unit of rank, non-increasing, ≥ 0. Their number is the
            module's largest possible rank.
        costs: module name to parameters per unit of rank, ≥ 1.
        budget: P ≥ 0, in parameters.
        caps: module name to the largest rank wanted; modules not named are limited by the number of gains.

    Returns:
        The ranks. Ties are broken by module name, so the order of the input does not matter.

    Raises:
        ValueError: if the names differ, a cost is below 1, a cap is below 0, or gains are negative, increasing or not
            finite.
    """
    check_gains(gains, costs, budget)
    limits = rank_limits(gains, caps)
    ranks = dict.fromkeys(gains, 0)
    queue = [(-gains[name][0] / costs[name], name) for name in gains if limits[name] > 0]
    heapq.heapify(queue)
    left = budget
    while queue:
        _, name = heapq.heappop(queue)
        if costs[name] > left:  # so does every further unit of this module
            continue
        left -= costs[name]
        ranks[name] += 1
        if ranks[name] < limits[name]:
            heapq.heappush(queue, (-gains[name][ranks[name]] / costs[name], name))
    return describe(ranks, gains, costs, limits)
