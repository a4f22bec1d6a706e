"""``cat``, ``task_arithmetic``: the exact sum of low-rank updates.

The factors are stacked, and the rank is Σ rᵢ; where that exceeds min(m, n), the same product is factorised again.

Source: the combination type ``cat`` of PEFT's ``add_weighted_adapter``; Ilharco et al. 2023 (arXiv:2212.04089), whose
one coefficient λ is here the weight of every adapter. Deviations from PEFT: weights and scalings go into B, so the
scaling that comes out is 1; modules need not be shared by all inputs; the rank is capped by min(m, n).
"""

import torch

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions
from flowra_compose.product_svd import product_svd

__all__ = ["weighted_sum"]


def weighted_sum(module: ModuleUpdates, options: MergeOptions) -> LowRankUpdate:
    """Add the updates of one module.

    Returns:
        An update of rank ≤ min(m, n, Σ rᵢ), computed in at least float32.
    """
    a, b = module.stacked(torch.promote_types(module.dtype, torch.float32))
    smaller_side = min(module.shape)
    if a.shape[0] > smaller_side:
        a, b = product_svd(a, b).balanced_factors(smaller_side)
    return module.of_factors(a, b)
