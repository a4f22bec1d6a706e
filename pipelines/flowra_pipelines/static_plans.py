"""Plans that look at no data, by name: what an allocation has to beat."""

from collections.abc import Mapping, Sequence

from flowra_allocation import RankPlan, placement_plan, random_plan, uniform_plan
from flowra_pipelines.placements import PLACEMENTS, placed

__all__ = ["STATIC", "static_plan"]

STATIC = ("uniform", "random", *PLACEMENTS)


def static_plan(
    name: str,
    costs: Mapping[str, int],
    *,
    budget: int,
    seed: int,
    caps: Mapping[str, int],
    gains: Mapping[str, Sequence[float]] | None,
    scaling: float,
) -> RankPlan:
    """Plan without a look at gains.

    Args:
        name: one of :data:`STATIC`: ``uniform`` and ``random`` over all modules, or one rank on a placement.
        costs: module name to parameters per unit of rank.
        budget: P.
        seed: of ``uniform`` and ``random``.
        caps: module name to its largest rank.
        gains: what is noted in the plan of them; they decide nothing.
        scaling: s.

    Returns:
        The plan.

    Raises:
        ValueError: if the placement means no module, or the budget does not pay for a unit of rank.
    """
    if name == "uniform":
        return uniform_plan(costs, budget=budget, seed=seed, caps=caps, gains=gains, scaling=scaling)
    if name == "random":
        return random_plan(costs, budget=budget, seed=seed, caps=caps, gains=gains, scaling=scaling)
    return placement_plan(costs, placed(costs, name), budget=budget, caps=caps, gains=gains, scaling=scaling)
