"""Many tests of one table."""

from collections.abc import Mapping

__all__ = ["holm"]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for their number (Holm 1979)."""
    corrected, worst = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda each: p_values[each])):
        worst = max(worst, min(1.0, p_values[name] * (len(p_values) - rank)))
        corrected[name] = worst
    return corrected
