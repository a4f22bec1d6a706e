"""Decide the ranks: sensitivity threshold and limits, then the knapsack (docs/methods.md, sections 5 and 6)."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from flowra_allocation.knapsack import Allocation, Cost, check_gains, parameters_at
from flowra_allocation.limits import Limits, limits_of
from flowra_allocation.rank_plan import ModulePlan, RankPlan
from flowra_allocation.sensitivity import sensitivity
from flowra_allocation.solvers import SOLVERS
from flowra_allocation.taken_together import joint_costs, joint_gains, joint_limits, sets_of

__all__ = ["ITEMS", "allocate", "as_plan"]

ITEMS = ("norm", "bitfit")
"""Kinds that have no rank: they are there or not, rank 1 or 0."""


def allocate(
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, Cost],
    *,
    budget: int,
    sensitivity_threshold: float = 0.05,
    scaling: float = 2.0,
    solver: Literal["greedy", "exact"] = "greedy",
    caps: int | Mapping[str, int] | None = None,
    floors: int | Mapping[str, int] | None = None,
    frozen: Mapping[str, int] | None = None,
    rank_steps: Sequence[int] | None = None,
    cap_steps: Sequence[int] | None = None,
    kinds: Mapping[str, str] | None = None,
    together: Iterable[Collection[str]] = (),
) -> RankPlan:
    """Spend a budget where it pays: rank 0 below the threshold, a knapsack above it.

    ψ is taken over the first unit of rank, so that which modules are eligible does not depend on the budget: a larger
    budget never plans less. (Over ⌈r̄⌉ units it would not; decision 0007.)

    Args:
        gains: module name to the flow gains of its units of rank, non-increasing (docs/methods.md, section 4). What is
            all or nothing, such as a norm's gain, has one (see :func:`offset_gain`).
        costs: module name to parameters per unit of rank; or, where they are not in proportion to rank, to the
            parameters at rank 1, 2, … in all: of a Tucker update ``[adapter.cost(rank) for rank in (1, 2, …)]``.
        budget: P, in parameters.
        sensitivity_threshold: η in [0, 1); 0 switches it off. 0.05 means a density below 1/19 of the median module's.
        scaling: s, written into the plan.
        solver: a name in :data:`SOLVERS`. ``greedy`` falls short of ``exact`` by at most one gain, and not at all
            where costs are equal.
        caps: largest rank, of all modules or by name.
        floors: least rank, of all modules or by name. It holds below the threshold, too. A floor for all does not ask
            for more than a module's cap, nor for more units than it has gains.
        frozen: module name to the rank that it has and keeps; nothing else that is said of ranks concerns it.
        rank_steps: the ranks that a module may have beside 0, such as ``(8, 16, 32)``. Items are not concerned.
        cap_steps: ranks that the largest rank of all should be one of, such as those that vLLM has buffers for: a
            server pays for the largest everywhere. All modules are capped at the largest of these steps that neither
            exceeds the largest rank without this cap, nor lies below a floor or a frozen module; where no step does,
            nothing changes. Items are not concerned.
        kinds: module name to adapter method, ``lora`` where not named.
        together: sets of modules that have the same rank, such as a norm's gain and shift: their costs and gains add
            up, and they are taken together.

    Returns:
        The plan, modules in the order of ``gains``. Of modules taken together, ψ and edges are those of the set, and
        the edges name the first of them.

    Raises:
        ValueError: if the threshold is out of range, the solver unknown, the budget below one unit of rank or the
            floors, gains or limits are malformed, or ``exact`` would take too long.

    Example:
        >>> gains, costs = {"query": [10.0, 1.0], "value": [6.0, 0.0]}, {"query": 10, "value": 5}
        >>> allocate(gains, costs, budget=10).ranks
        {'query': 0, 'value': 2}
        >>> allocate(gains, costs, budget=10, solver="exact").ranks
        {'query': 1, 'value': 0}
        >>> allocate(gains, costs, budget=10, floors=1, caps={"query": 1}, frozen={"value": 0}).ranks
        {'query': 1, 'value': 0}
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)}, got {solver!r}")
    if not 0 <= sensitivity_threshold < 1:
        raise ValueError(f"sensitivity_threshold must be in [0, 1), got {sensitivity_threshold}")
    if cap_steps is not None and min(cap_steps, default=0) < 1:
        raise ValueError(f"cap_steps must be at least one rank ≥ 1, got {list(cap_steps)}")
    check_gains(gains, costs, max(budget, 0))
    _check_names({"caps": caps, "floors": floors, "frozen": frozen, "kinds": kinds}, gains)
    kinds = kinds or {}

    sets = sets_of(together, gains)
    fixed = {name: _same(ranks, name) for name, ranks in joint_limits(frozen or {}, sets).items()}
    worth = joint_gains(gains, sets)
    for name, rank in fixed.items():  # what it may gain beyond what was measured is not known
        worth[name] = [*worth[name], *[0.0] * (rank - len(worth[name]))]
    prices = joint_costs(costs, sets, {name: len(each) for name, each in worth.items()})
    check_gains(worth, prices, max(budget, 0))
    ranked = [name for name, names in sets.items() if not any(kinds.get(each) in ITEMS for each in names)]
    limits = limits_of(
        {name: len(each) for name, each in worth.items()},
        caps=_joint(caps, sets, min),
        floors=_joint(floors, sets, max),
        frozen=fixed,
        rank_steps=rank_steps,
        items=[name for name in sets if name not in ranked],
    )
    _check_budget(budget, prices, limits, fixed)
    psi = sensitivity(worth, {name: parameters_at(cost, 1) for name, cost in prices.items()})
    limits = limits.without([name for name in sets if psi[name] < sensitivity_threshold])

    chosen = _solve(solver, worth, prices, budget, limits)
    if cap_steps is not None:
        largest = max((chosen.ranks[name] for name in ranked), default=0)
        least = max((limits.floors[name] for name in ranked), default=0)
        step = max((each for each in cap_steps if least <= each <= largest), default=largest)
        if step < largest:
            chosen = _solve(solver, worth, prices, budget, limits.capped(step, ranked))
    leader = {each: name for name, names in sets.items() for each in names}
    return as_plan(
        {name: chosen.ranks[leader[name]] for name in gains},
        gains,
        costs,
        budget=budget,
        scaling=scaling,
        psi={name: psi[leader[name]] for name in gains},
        sensitivity_threshold=sensitivity_threshold,
        kinds=kinds,
        edges=(chosen.last_in, chosen.first_out),
    )


def as_plan(
    ranks: Mapping[str, int],
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, Cost],
    *,
    budget: int,
    scaling: float,
    psi: Mapping[str, float],
    sensitivity_threshold: float = 0.0,
    kinds: Mapping[str, str] | None = None,
    edges: tuple[tuple[str, float] | None, tuple[str, float] | None] = (None, None),
) -> RankPlan:
    """Write ranks down as a plan.

    Args:
        ranks: module name to rank.
        gains: module name to the gains of its units of rank.
        costs: module name to its cost.
        budget: P.
        scaling: s.
        psi: module name to sensitivity.
        sensitivity_threshold: η; 0 if there was none.
        kinds: module name to adapter method, ``lora`` where not named.
        edges: the plan's ``last_in`` and ``first_out``.

    Returns:
        The plan, modules in the order of ``ranks``.
    """
    kinds = kinds or {}
    modules = {}
    for name, rank in ranks.items():
        used, unit = parameters_at(costs[name], rank), parameters_at(costs[name], 1)
        modules[name] = ModulePlan(
            kind=kinds.get(name, "lora"),
            rank=rank,
            alpha=scaling * rank,
            cost_per_rank=unit,
            psi=psi[name],
            gains=tuple(float(gain) for gain in gains[name]),
            parameters=None if used == rank * unit else used,
        )
    return RankPlan(
        modules=modules,
        budget=budget,
        parameters=sum(module.used for module in modules.values()),
        scaling=scaling,
        sensitivity_threshold=sensitivity_threshold,
        last_in=edges[0],
        first_out=edges[1],
    )


def _solve(
    solver: str, gains: Mapping[str, Sequence[float]], costs: Mapping[str, Cost], budget: int, limits: Limits
) -> Allocation:
    return SOLVERS[solver](gains, costs, budget, caps=limits.caps, floors=limits.floors, rank_steps=limits.rank_steps)


def _check_names(said: Mapping[str, int | Mapping[str, Any] | None], gains: Mapping[str, Sequence[float]]) -> None:
    for what, named in said.items():
        unknown = sorted(named.keys() - gains.keys()) if isinstance(named, Mapping) else []
        if unknown:
            raise ValueError(f"{what} must name modules with gains, got {unknown}")


def _joint(
    value: int | Mapping[str, int] | None, sets: Mapping[str, Sequence[str]], choose: Callable[[list[int]], int]
) -> int | dict[str, int] | None:
    """Choose of what is said of a set's modules what binds."""
    if not isinstance(value, Mapping):
        return value
    return {name: choose(ranks) for name, ranks in joint_limits(value, sets).items()}


def _same(ranks: Sequence[int], name: str) -> int:
    if len(set(ranks)) > 1:
        raise ValueError(f"frozen must be the same rank for all that are taken together, got {ranks} with {name!r}")
    return ranks[0]


def _check_budget(budget: int, costs: Mapping[str, Cost], limits: Limits, frozen: Mapping[str, int]) -> None:
    """Refuse a budget that does not pay for one unit of rank; what floors cost is the solver's to check."""
    free = [name for name in costs if name not in frozen]
    first = {name: min(limits.rank_steps.get(name, (1,))) for name in free}
    prices = [parameters_at(costs[name], rank) for name, rank in first.items() if _reaches(costs[name], rank)]
    cheapest = min(prices, default=0)
    if not costs or (free and budget < cheapest):
        raise ValueError(
            f"budget must be at least one unit of rank, {cheapest} parameters here, got {budget}. Raise it."
        )


def _reaches(cost: Cost, rank: int) -> bool:
    return isinstance(cost, int) or rank <= len(cost)
