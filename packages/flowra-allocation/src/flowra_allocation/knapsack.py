"""Rank allocation as a knapsack: what every solver is given and gives back (docs/methods.md, section 6).

maximise Σ_l Σ_{i ≤ r_l} gain_{l,i}   subject to   Σ_l cost_l · r_l ≤ P,   0 ≤ r_l ≤ cap_l

The gains of a module do not increase, so a solver may choose among units of rank one by one: taking a module's second
unit without its first is never better.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Allocation", "check_gains", "describe", "rank_limits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """Ranks that fit a budget, and what the budget's edge looked like.

    The edge is read off the ranks, so it means the same whichever solver found them. Where a unit worth more per
    parameter was left out because it did not fit, ``first_out`` is above ``last_in``.
    """

    ranks: Mapping[str, int]
    """Module name to rank, for every module of the input, in its order."""
    parameters: int
    """Σ cost · rank."""
    gain: float
    """Σ of the gains taken, in units of the loss, rounded once."""
    last_in: tuple[str, float] | None
    """Module and gain per parameter of the unit taken that is worth least per parameter; of equals the last by name."""
    first_out: tuple[str, float] | None
    """Module and gain per parameter of the unit left out that is worth most per parameter, of modules below their
    limit; of equals the first by name."""


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
    if sum(sum(each) for each in gains.values()) == float("inf"):
        raise ValueError("gains must have a finite sum, got inf. Scale them all down.")


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


def describe(
    ranks: Mapping[str, int],
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    limits: Mapping[str, int],
) -> Allocation:
    """Count what ranks cost and gain, and find the two units at the edge.

    Args:
        ranks: module name to rank.
        gains: module name to the gains of its units of rank.
        costs: module name to parameters per unit of rank.
        limits: module name to its largest rank.

    Returns:
        The ranks with what follows from them.
    """
    taken = [(-gains[name][rank - 1] / costs[name], name) for name, rank in ranks.items() if rank > 0]
    left_out = [(-gains[name][rank] / costs[name], name) for name, rank in ranks.items() if rank < limits[name]]
    last_in, first_out = max(taken, default=None), min(left_out, default=None)
    return Allocation(
        ranks=dict(ranks),
        parameters=sum(costs[name] * rank for name, rank in ranks.items()),
        gain=math.fsum(gain for name, rank in ranks.items() for gain in gains[name][:rank]),
        last_in=last_in and (last_in[1], -last_in[0]),
        first_out=first_out and (first_out[1], -first_out[0]),
    )
