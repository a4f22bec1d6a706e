"""Sensitivity ψ: how dense a module's gains are, relative to the median module (docs/methods.md, section 5)."""

import statistics
from collections.abc import Mapping, Sequence

__all__ = ["sensitivity"]


def sensitivity(
    gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], *, mean_rank: int = 1
) -> dict[str, float]:
    """Return ψ_l = γ_l / (γ_l + median γ), with the gain density γ_l = Σ_{i ≤ r̄} gain_{l,i} / (r̄ · cost_l).

    Scale-free: multiplying the loss by a constant changes nothing. The median module has 0.5, nine times its density
    0.9. If all gains are 0, every module has 0.5. If only the median is 0, modules with gains have 1 and the rest 0.

    Args:
        gains: module name to the gains of its units of rank, ≥ 0.
        costs: module name to parameters per unit of rank, ≥ 1.
        mean_rank: r̄ ≥ 1, number of units of rank the density is taken over.

    Returns:
        Module name to ψ in [0, 1].

    Raises:
        ValueError: if ``mean_rank`` is below 1.
    """
    if mean_rank < 1:
        raise ValueError(f"mean_rank must be ≥ 1, got {mean_rank}")
    density = {name: sum(each[:mean_rank]) / (mean_rank * costs[name]) for name, each in gains.items()}
    if not any(density.values()):
        return dict.fromkeys(density, 0.5)
    median = statistics.median(density.values())
    return {name: value / (value + median) if value else 0.0 for name, value in density.items()}
