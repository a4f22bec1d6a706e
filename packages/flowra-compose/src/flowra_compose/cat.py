"""``cat``: the exact weighted sum of low-rank updates.

The factors are stacked (``weighted_sum.py``). The rank is Σ rᵢ; where that exceeds min(m, n), the same product is
factorised again.

Source: the combination type of this name in PEFT's ``add_weighted_adapter``. Deviations: weights and scalings go into
B, so the scaling that comes out is 1; modules need not be shared by all inputs; the rank is capped by min(m, n).
"""

from collections.abc import Mapping, Sequence

import torch

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.product_svd import product_svd
from flowra_compose.weighted_sum import Term, common_dtype, fitted, stack, terms_by_module

__all__ = ["cat"]


@torch.no_grad()
def cat(updates: Sequence[Mapping[str, LowRankUpdate]], weights: Sequence[float]) -> dict[str, LowRankUpdate]:
    """Add weighted updates, module by module.

    Args:
        updates: one mapping from module name to update for each input. The shapes of a module agree in all of them,
            and all factors are on one device.
        weights: one finite number for each input, of any sign; an input of weight 0 takes no part.

    Returns:
        By name, for every module of an input of non-zero weight: an update of scaling 1 and rank
        ≤ min(m, n, Σ rᵢ), computed in at least float32 and returned in the promoted dtype of its inputs.

    Raises:
        ValueError: if a weighted factor does not fit its dtype.
    """
    return {name: _weighted_sum(name, terms) for name, terms in terms_by_module(updates, weights).items()}


def _weighted_sum(name: str, terms: Sequence[Term]) -> LowRankUpdate:
    dtype = common_dtype(terms)
    a, b = stack(terms, torch.promote_types(dtype, torch.float32))
    smaller_side = min(b.shape[0], a.shape[1])
    if a.shape[0] > smaller_side:
        a, b = product_svd(a, b).balanced_factors(smaller_side)
    return LowRankUpdate(*fitted(name, a, b, dtype))
