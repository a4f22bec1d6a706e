"""Plans that look at no data: what an allocation has to beat (docs/methods.md, section 6).

They keep the same budget as an allocation, as nearly as it can be kept at ranks that are whole numbers.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence

from flowra_allocation.knapsack import Cost, check_gains, describe, ladders, parameters_at
from flowra_allocation.planning import as_plan
from flowra_allocation.rank_plan import RankPlan
from flowra_allocation.sensitivity import sensitivity

__all__ = ["placement_plan", "random_plan", "uniform_plan"]


def uniform_plan(
    costs: Mapping[str, Cost],
    *,
    budget: int,
    seed: int = 0,
    caps: Mapping[str, int] | None = None,
    gains: Mapping[str, Sequence[float]] | None = None,
    scaling: float = 2.0,
) -> RankPlan:
    """Give every module the same rank, and one unit more to modules drawn until the budget is filled.

    The rank is the largest that every module can have, ⌊r̄⌋ where no cap is in the way. Below one it is 0, and the plan
    is a random subset of the modules at rank 1.

    Args:
        costs: module name to parameters per unit of rank, or to the parameters at rank 1, 2, … in all.
        budget: P, at least the cheapest unit.
        seed: of the draw. The order of the modules does not matter.
        caps: module name to its largest rank, min(m, n) for a layer.
        gains: module name to gains of its units of rank, to be noted in the plan with their ψ; they decide nothing.
        scaling: s, written into the plan.

    Returns:
        The plan. No module below rank + 1 and its cap could still be given a unit.

    Raises:
        ValueError: if the budget does not pay for one unit, or a cost, cap or gain is malformed.

    Example:
        >>> sorted(uniform_plan({"query": 10, "key": 10, "value": 10}, budget=50, seed=1).ranks.values())
        [1, 2, 2]
    """
    limits = _limits(costs, caps, budget)
    rank = _largest(lambda each: _used(costs, {name: min(each, top) for name, top in limits.items()}), limits, budget)
    ranks = {name: min(rank, top) for name, top in limits.items()}
    left = budget - _used(costs, ranks)
    for name in _shuffled(limits, seed):
        more = _next_unit(costs[name], ranks[name]) if ranks[name] < limits[name] else left + 1
        if more <= left:
            ranks[name], left = ranks[name] + 1, left - more
    return _noted(ranks, costs, budget, gains, scaling, limits)


def placement_plan(
    costs: Mapping[str, Cost],
    names: Collection[str],
    *,
    budget: int,
    caps: Mapping[str, int] | None = None,
    gains: Mapping[str, Sequence[float]] | None = None,
    scaling: float = 2.0,
) -> RankPlan:
    """Give the named modules the largest rank that fits, the same for all, and the others none.

    Which modules are query and value, attention, or the feed-forward part is the application's to say.

    Args:
        costs: module name to parameters per unit of rank, or to the parameters at rank 1, 2, … in all.
        names: modules that get rank, at least one.
        budget: P.
        caps: module name to its largest rank; a module that reaches it stays there while the others go on.
        gains: module name to gains of its units of rank, to be noted in the plan with their ψ; they decide nothing.
        scaling: s, written into the plan.

    Returns:
        The plan; less than one unit of rank on all named modules is left of the budget, unless caps are reached.

    Raises:
        ValueError: if a name is unknown, the budget does not pay for rank 1, or a cost, cap or gain is malformed.

    Example:
        >>> placement_plan({"query": 10, "key": 10, "value": 10}, ["query", "value"], budget=50).ranks
        {'query': 2, 'key': 0, 'value': 2}
    """
    unknown = sorted(set(names) - costs.keys())
    if unknown or not names:
        raise ValueError(f"names must be at least one module with a cost, got {unknown or 'none'}")
    limits = _limits(costs, caps, budget)
    ranks = dict.fromkeys(costs, 0)
    rank = _largest(lambda each: _used(costs, {name: min(each, limits[name]) for name in names}), limits, budget)
    if rank == 0:
        needed = _used(costs, {name: min(1, limits[name]) for name in names})
        raise ValueError(
            f"budget must pay for rank 1 on the {len(names)} named modules, {needed} parameters, got {budget}. Raise it"
            " or name fewer."
        )
    ranks |= {name: min(rank, limits[name]) for name in names}
    return _noted(ranks, costs, budget, gains, scaling, limits)


def random_plan(
    costs: Mapping[str, Cost],
    *,
    budget: int,
    seed: int,
    caps: Mapping[str, int] | None = None,
    gains: Mapping[str, Sequence[float]] | None = None,
    scaling: float = 2.0,
) -> RankPlan:
    """Draw a module, give it a unit of rank, and so on until none fits.

    Args:
        costs: module name to parameters per unit of rank, or to the parameters at rank 1, 2, … in all.
        budget: P, at least the cheapest unit.
        seed: of the draws. The order of the modules does not matter.
        caps: module name to its largest rank, min(m, n) for a layer.
        gains: module name to gains of its units of rank, to be noted in the plan with their ψ; they decide nothing.
        scaling: s, written into the plan.

    Returns:
        The plan.

    Raises:
        ValueError: if the budget does not pay for one unit, or a cost, cap or gain is malformed.
    """
    limits = _limits(costs, caps, budget)
    ranks, left = dict.fromkeys(costs, 0), budget
    draw = random.Random(seed)
    able = sorted(costs)
    while able:
        index = draw.randrange(len(able))
        name = able[index]
        more = _next_unit(costs[name], ranks[name]) if ranks[name] < limits[name] else left + 1
        if more <= left:
            ranks[name], left = ranks[name] + 1, left - more
        else:
            del able[index]
    return _noted(ranks, costs, budget, gains, scaling, limits)


def _limits(costs: Mapping[str, Cost], caps: Mapping[str, int] | None, budget: int) -> dict[str, int]:
    """Return the largest rank of each module that its cap and its costs allow; where nothing does, one out of reach."""
    caps = caps or {}
    check_gains(dict.fromkeys(costs, ()), costs, max(budget, 0))
    wrong = {name: cap for name, cap in caps.items() if name not in costs or cap < 0}
    if wrong:
        raise ValueError(f"caps must be ≥ 0 and of modules with a cost, got {wrong}")
    cheapest = min((parameters_at(cost, 1) for cost in costs.values()), default=0)
    if not costs or budget < cheapest:
        raise ValueError(
            f"budget must be at least one unit of rank, {cheapest} parameters here, got {budget}. Raise it."
        )
    known = {name: budget if isinstance(cost, int) else len(cost) for name, cost in costs.items()}
    return {name: min(known[name], caps.get(name, known[name])) for name in costs}


def _used(costs: Mapping[str, Cost], ranks: Mapping[str, int]) -> int:
    return sum(parameters_at(costs[name], rank) for name, rank in ranks.items())


def _next_unit(cost: Cost, rank: int) -> int:
    return parameters_at(cost, rank + 1) - parameters_at(cost, rank)


def _largest(used: Callable[[int], int], limits: Mapping[str, int], budget: int) -> int:
    """Find the largest rank whose parameters, which do not fall with it, fit."""
    low, high = 0, max(limits.values())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if used(middle) <= budget else (low, middle - 1)
    return low


def _shuffled(names: Collection[str], seed: int) -> list[str]:
    found = sorted(names)
    random.Random(seed).shuffle(found)
    return found


def _noted(
    ranks: Mapping[str, int],
    costs: Mapping[str, Cost],
    budget: int,
    gains: Mapping[str, Sequence[float]] | None,
    scaling: float,
    limits: Mapping[str, int],
) -> RankPlan:
    """Write the plan with the gains that are known; those of units that are not are 0. ψ without gains is 0.5."""
    if gains is None:
        none: dict[str, Sequence[float]] = dict.fromkeys(costs, ())
        return as_plan(ranks, none, costs, budget=budget, scaling=scaling, psi=dict.fromkeys(costs, 0.5))
    check_gains(gains, costs, budget)
    known = {name: [*each, *[0.0] * (ranks[name] - len(each))] for name, each in gains.items()}
    tops = {name: max(ranks[name], min(len(gains[name]), limits[name])) for name in costs}
    edge = describe(ranks, known, costs, ladders(known, costs, caps=tops))
    psi = sensitivity(gains, {name: parameters_at(cost, 1) for name, cost in costs.items()})
    edges = (edge.last_in, edge.first_out)
    return as_plan(ranks, gains, costs, budget=budget, scaling=scaling, psi=psi, edges=edges)
