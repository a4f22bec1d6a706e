"""Gains that were not measured on a learned update: spectra of gradients, and one number for each module.

What such a number promises is uncertain: it says what a module could do alone, and modules substitute for one another.
So allocation from it is kept near the uniform rank (docs/methods.md, section 6).
"""

import math
from collections.abc import Mapping, Sequence

from flowra_allocation.knapsack import Cost, parameters_at

__all__ = ["harmonic_gains", "one_shot_limits", "spectral_gains"]


def spectral_gains(spectra: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return ½ σᵢ²: what the i-th direction is worth where σ are singular values in the metric of the loss.

    That holds for those of a gradient in the K-FAC metric (docs/methods.md, section 4). Of a plain gradient, an update
    or a weight the squares are energies, and the order they put units in is all that is meant.

    Args:
        spectra: module name to singular values, non-increasing, ≥ 0.

    Returns:
        Module name to gains, non-increasing.

    Raises:
        ValueError: if a value is negative or not finite.
    """
    for name, each in spectra.items():
        if not all(0 <= value < math.inf for value in each):
            raise ValueError(f"spectra must be finite and ≥ 0, got {list(each)} for {name!r}")
    return {name: [value * value / 2 for value in each] for name, each in spectra.items()}


def harmonic_gains(scores: Mapping[str, float], units: Mapping[str, int]) -> dict[str, list[float]]:
    """Turn one number for each module into gains: the i-th unit of rank is worth score / i.

    Under these gains the optimum has ranks in proportion to score / cost, up to rounding: score / (i · cost) = λ for
    the last unit of every module.

    Args:
        scores: module name to what its first unit of rank is worth, ≥ 0; only ratios matter.
        units: module name to its largest rank.

    Returns:
        Module name to gains, non-increasing.

    Raises:
        ValueError: if the names differ, or a score is negative or not finite.

    Example:
        >>> from flowra_allocation import greedy
        >>> gains = harmonic_gains({"query": 1.0, "value": 3.0}, {"query": 8, "value": 8})
        >>> greedy(gains, {"query": 10, "value": 10}, 80).ranks
        {'query': 2, 'value': 6}
    """
    if scores.keys() != units.keys():
        raise ValueError(
            f"units must name the modules of scores, got {sorted(scores.keys() ^ units.keys())} in one only"
        )
    for name, score in scores.items():
        if not 0 <= score < math.inf:
            raise ValueError(f"scores must be finite and ≥ 0, got {score} for {name!r}")
    return {name: [score / unit for unit in range(1, units[name] + 1)] for name, score in scores.items()}


def one_shot_limits(costs: Mapping[str, Cost], *, budget: int) -> tuple[int, int]:
    """Return the floor and the cap that keep an allocation near the uniform rank: 1, and twice the mean rank.

    With r̄ = P / Σ cost, the floor is 1, or 0 where the budget does not pay for one unit everywhere; the cap is ⌈2 r̄⌉.

    Args:
        costs: module name to its cost; of costs that are not in proportion to rank, that of the first unit counts.
        budget: P ≥ 1.

    Returns:
        Floor and cap, as ``allocate(gains, costs, floors=…, caps=…)`` takes them.

    Raises:
        ValueError: if there is no module, or the budget is below 1.
    """
    if not costs or budget < 1:
        raise ValueError(f"budget must be ≥ 1 and there must be modules, got {budget} for {len(costs)} modules")
    everywhere = sum(parameters_at(cost, 1) for cost in costs.values())
    return min(1, budget // everywhere), -(-2 * budget // everywhere)
