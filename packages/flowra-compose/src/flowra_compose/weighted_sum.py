"""``cat``, ``task_arithmetic``: the exact sum of low-rank updates.

The factors are stacked, and the rank is Σ rᵢ, until it is capped by min(m, n) as that of all rules
(``merging.py``).

Source: the combination type ``cat`` of PEFT's ``add_weighted_adapter``; Ilharco et al. 2023 (arXiv:2212.04089), whose
one coefficient λ is here the weight of every adapter. Deviations from PEFT: weights and scalings go into B, so the
scaling that comes out is 1; modules need not be shared by all inputs; the rank is capped.
"""

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions

__all__ = ["weighted_sum"]


def weighted_sum(module: ModuleUpdates, options: MergeOptions) -> LowRankUpdate:
    """Add the updates of one module.

    Returns:
        An update of rank Σ rᵢ, in float64.
    """
    return module.of_factors(*module.stacked())
