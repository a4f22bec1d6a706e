"""Rank allocation as a knapsack, solved greedily (docs/methods.md, section 6).

maximise Σ_l Σ_{i ≤ r_l} gain_{l,i}   subject to   Σ_l cost_l · r_l ≤ P,   min ≤ r_l ≤ cap_l

The gains of a module do not increase, so the problem is separable and concave. With equal costs the greedy answer is
optimal (exchange argument); otherwise it falls short of the optimum by at most one gain. The planned gain never falls
when the budget grows: where two budgets first part, the larger takes a unit worth more than all the smaller can
still buy.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Allocation", "greedy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """Ranks that fit a budget, and what the budget's edge looked like."""

    ranks: Mapping[str, int]
    """Module name to rank, for every module of the input, in its order."""
    parameters: int
    """Σ cost · rank."""
    gain: float
    """Σ of the gains taken, in units of the loss."""
    last_in: tuple[str, float] | None
    """Module and gain per parameter of the last unit taken."""
    first_out: tuple[str, float] | None
    """Module and gain per parameter of the best unit left out: the value of one more parameter."""


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
        ValueError: if the names differ, a cost is below 1, or gains are negative, increasing or not finite.
    """
    check_gains(gains, costs, budget)
    limits = {name: min(len(each), (caps or {}).get(name, len(each))) for name, each in gains.items()}
    ranks = dict.fromkeys(gains, 0)
    queue = [(-gains[name][0] / costs[name], name) for name in gains if limits[name] > 0]
    heapq.heapify(queue)
    left, gain, last_in, first_out = budget, 0.0, None, None
    while queue:
        density, name = heapq.heappop(queue)
        if costs[name] > left:  # so does every further unit of this module
            first_out = first_out or (name, -density)
            continue
        left -= costs[name]
        gain += gains[name][ranks[name]]
        ranks[name] += 1
        last_in = (name, -density)
        if ranks[name] < limits[name]:
            heapq.heappush(queue, (-gains[name][ranks[name]] / costs[name], name))
    return Allocation(ranks=ranks, parameters=budget - left, gain=gain, last_in=last_in, first_out=first_out)


def check_gains(gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> None:
    """Refuse a knapsack that is not one: raises ValueError."""
    if gains.keys() != costs.keys():
        raise ValueError(f"costs must name the modules of gains, got {sorted(gains.keys() ^ costs.keys())} in one only")
    if budget < 0:
        raise ValueError(f"budget must be ≥ 0, got {budget}")
    for name, each in gains.items():
        if costs[name] < 1:
            raise ValueError(f"cost must be ≥ 1, got {costs[name]} for {name!r}")
        falling = all(first >= second for first, second in pairwise(each))
        if not falling or not all(0 <= value < float("inf") for value in each):
            raise ValueError(f"gains must be finite, ≥ 0 and non-increasing, got {list(each)} for {name!r}")
