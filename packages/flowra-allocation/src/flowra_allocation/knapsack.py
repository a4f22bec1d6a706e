"""Rank allocation as a knapsack: what every solver is given and gives back (docs/methods.md, section 6).

maximise Σ_l Σ_{i ≤ r_l} gain_{l,i}   subject to   Σ_l cost_l(r_l) ≤ P,   floor_l ≤ r_l ≤ cap_l,   r_l a permitted rank

The gains of a module do not increase. Where cost is in proportion to rank, a solver may choose among units of rank one
by one: taking a module's second unit without its first is never better. In general the ranks that a module may have are
a ladder. A step of it may gain more per parameter than the step before, as where only ranks 1, 8 and 16 are permitted
or the cost of a unit falls; such steps are taken together, along the upper concave envelope of (cost, gain).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Allocation", "Cost", "Ladder", "check_gains", "describe", "ladders", "parameters_at", "rank_limits"]

Cost = int | Sequence[int]
"""Parameters per unit of rank; or, where they are not in proportion (Tucker forms), those at rank 1, 2, … in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """Ranks that fit a budget, and what the budget's edge looked like.

    The edge is read off the ranks, so it means the same whichever solver found them. Where a unit worth more per
    parameter was left out because it did not fit, ``first_out`` is above ``last_in``. Where ranks come in steps, a unit
    is the step, or the steps together, to the next rank on the envelope.
    """

    ranks: Mapping[str, int]
    """Module name to rank, for every module of the input, in its order."""
    parameters: int
    """Σ cost · rank."""
    gain: float
    """Σ of the gains taken, in units of the loss, rounded once."""
    last_in: tuple[str, float] | None
    """Module and gain per parameter of the unit taken above the floors that is worth least per parameter; of equals
    the last by name."""
    first_out: tuple[str, float] | None
    """Module and gain per parameter of the unit left out that is worth most per parameter, of modules below their
    limit; of equals the first by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """The ranks that one module may have, and what the steps between them cost and gain."""

    ranks: tuple[int, ...]
    """At least one, rising."""
    costs: tuple[int, ...]
    """Parameters of each step, ≥ 1; one fewer than ranks."""
    gains: tuple[float, ...]
    """Gain of each step, ≥ 0; one fewer than ranks."""
    concave: bool
    """Whether no step gains more per parameter than the one before it."""

    def ahead(self, place: int, room: float = math.inf) -> tuple[int, int, float] | None:
        """Find the steps up that together gain the most per parameter; of equals the fewest.

        Args:
            place: index of the present rank.
            room: what they may cost together.

        Returns:
            Index of the rank they lead to, their cost and their gain; None if not one step fits.
        """
        best, cost, gain = None, 0, 0.0
        for index in range(place, len(self.costs)):
            cost, gain = cost + self.costs[index], gain + self.gains[index]
            if cost > room:
                break
            if best is None or gain * best[1] > best[2] * cost:
                best = (index + 1, cost, gain)
            if self.concave:
                break
        return best

    def behind(self, place: int) -> tuple[int, int, float] | None:
        """Find the steps down that together lose the least per parameter; of equals the fewest.

        Returns:
            Index of the rank they lead to, what they free and what they lose; None at the least rank.
        """
        best, cost, gain = None, 0, 0.0
        for index in range(place, 0, -1):
            cost, gain = cost + self.costs[index - 1], gain + self.gains[index - 1]
            if best is None or gain * best[1] < best[2] * cost:
                best = (index - 1, cost, gain)
            if self.concave:
                break
        return best


def parameters_at(cost: Cost, rank: int) -> int:
    """Count the parameters of a module at a rank."""
    if isinstance(cost, int):
        return cost * rank
    return cost[rank - 1] if rank else 0


def check_gains(gains: Mapping[str, Sequence[float]], costs: Mapping[str, Cost], budget: int) -> None:
    """Refuse a knapsack that is not one: raises ValueError."""
    if gains.keys() != costs.keys():
        raise ValueError(f"costs must name the modules of gains, got {sorted(gains.keys() ^ costs.keys())} in one only")
    if budget < 0:
        raise ValueError(f"budget must be ≥ 0, got {budget}")
    for name, each in gains.items():
        _check_cost(name, costs[name], len(each))
        falling = all(first >= second for first, second in pairwise(each))
        if not falling or not all(0 <= value < float("inf") for value in each):
            raise ValueError(f"gains must be finite, ≥ 0 and non-increasing, got {list(each)} for {name!r}")
    if sum(sum(each) for each in gains.values()) == float("inf"):
        raise ValueError("gains must have a finite sum, got inf. Scale them all down.")


def _check_cost(name: str, cost: Cost, units: int) -> None:
    if isinstance(cost, int):
        if cost < 1:
            raise ValueError(f"cost must be ≥ 1, got {cost} for {name!r}")
    elif len(cost) < max(units, 1) or any(first >= second for first, second in pairwise([0, *cost])):
        raise ValueError(
            f"cost at rank 1, 2, … must be ≥ 1, rise, and reach to the last gain, the {units}th, got {list(cost)} for"
            f" {name!r}"
        )


def rank_limits(gains: Mapping[str, Sequence[float]], caps: Mapping[str, int] | None) -> dict[str, int]:
    """Return each module's largest rank: the number of its gains, or its cap where that is lower.

    Args:
        gains: module name to the gains of its units of rank.
        caps: module name to cap, for any of the modules.

    Returns:
        Module name to limit, in the order of ``gains``.

    Raises:
        ValueError: if a cap is negative or of a module that has no gains.
    """
    caps = caps or {}
    wrong = {name: cap for name, cap in caps.items() if name not in gains or cap < 0}
    if wrong:
        raise ValueError(f"caps must be ≥ 0 and of modules with gains, got {wrong}")
    return {name: min(len(each), caps.get(name, len(each))) for name, each in gains.items()}


def ladders(
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, Cost],
    *,
    caps: Mapping[str, int] | None = None,
    floors: Mapping[str, int] | None = None,
    rank_steps: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Ladder]:
    """List the ranks that each module may have.

    Args:
        gains: module name to the gains of its units of rank.
        costs: module name to its cost.
        caps: module name to its largest rank, for any of the modules.
        floors: module name to its least rank, for any of the modules. A module whose floor is its largest rank has
            that rank, on a step or not.
        rank_steps: module name to the ranks it may have beside 0, for any of the modules.

    Returns:
        Module name to its ladder, in the order of ``gains``.

    Raises:
        ValueError: if a cap or floor is out of range, a step is below 1, or no rank is left to a module.
    """
    limits, floors, rank_steps = rank_limits(gains, caps), floors or {}, rank_steps or {}
    wrong = {name: floor for name, floor in floors.items() if name not in gains or not 0 <= floor <= limits[name]}
    if wrong:
        raise ValueError(f"floors must be of modules with gains, ≥ 0 and at most the largest rank, got {wrong}")
    strange = {
        name: list(steps) for name, steps in rank_steps.items() if name not in gains or min(steps, default=1) < 1
    }
    if strange:
        raise ValueError(f"rank_steps must be of modules with gains, and ≥ 1, got {strange}")
    found = {}
    for name, limit in limits.items():
        least = floors.get(name, 0)
        ranks: Sequence[int] = range(least, limit + 1)
        if name in rank_steps and least < limit:
            ranks = sorted({rank for rank in (0, *rank_steps[name]) if least <= rank <= limit})
        if not ranks:
            raise ValueError(
                f"rank_steps must have a step from {least}, the floor, to {limit}, the largest rank, of {name!r},"
                f" got {sorted(rank_steps[name])}. Lower the floor or add a step."
            )
        found[name] = _ladder(ranks, gains[name], costs[name])
    return found


def _ladder(ranks: Sequence[int], gains: Sequence[float], cost: Cost) -> Ladder:
    if isinstance(ranks, range) and isinstance(cost, int):  # every unit by itself, each as dear: nothing to compare
        own = tuple(gains[ranks[0] : ranks[-1]])
        return Ladder(ranks=tuple(ranks), costs=(cost,) * len(own), gains=own, concave=True)
    steps = tuple(parameters_at(cost, high) - parameters_at(cost, low) for low, high in pairwise(ranks))
    sums = tuple(math.fsum(gains[low:high]) for low, high in pairwise(ranks))
    concave = all(later * steps[index] <= sums[index] * steps[index + 1] for index, later in enumerate(sums[1:]))
    return Ladder(ranks=tuple(ranks), costs=steps, gains=sums, concave=concave)


def describe(
    ranks: Mapping[str, int],
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, Cost],
    ladders: Mapping[str, Ladder],
) -> Allocation:
    """Count what ranks cost and gain, and find the two units at the edge.

    Args:
        ranks: module name to rank.
        gains: module name to the gains of its units of rank.
        costs: module name to its cost.
        ladders: module name to the ranks it may have.

    Returns:
        The ranks with what follows from them.
    """
    taken, left_out = [], []
    for name, rank in ranks.items():
        place = ladders[name].ranks.index(rank)
        if (last := ladders[name].behind(place)) is not None:
            taken.append((-last[2] / last[1], name))
        if (following := ladders[name].ahead(place)) is not None:
            left_out.append((-following[2] / following[1], name))
    last_in, first_out = max(taken, default=None), min(left_out, default=None)
    return Allocation(
        ranks=dict(ranks),
        parameters=sum(parameters_at(costs[name], rank) for name, rank in ranks.items()),
        gain=math.fsum(gain for name, rank in ranks.items() for gain in gains[name][:rank]),
        last_in=last_in and (last_in[1], -last_in[0]),
        first_out=first_out and (first_out[1], -first_out[0]),
    )
