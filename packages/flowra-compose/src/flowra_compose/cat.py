"""``cat``: the exact weighted sum of low-rank updates.

Σᵢ wᵢ sᵢ Bᵢ Aᵢ = [w₁s₁B₁ … w_k s_k B_k] [A₁; …; A_k], so stacking the factors along the rank adds the products and
nothing is averaged. The rank is Σ rᵢ; where that exceeds min(m, n), the same product is factorised again.

Source: the combination type of this name in PEFT's ``add_weighted_adapter``. Deviations: weights and scalings go into
B, so the scaling that comes out is 1; modules need not be shared by all inputs; the rank is capped by min(m, n).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate

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
    merged = {}
    for name in sorted({name for one in updates for name in one}):
        terms = [(w, one[name]) for w, one in zip(weights, updates, strict=True) if w != 0 and name in one]
        if terms:
            merged[name] = _weighted_sum(name, terms)
    return merged


def _weighted_sum(name: str, terms: Sequence[tuple[float, LowRankUpdate]]) -> LowRankUpdate:
    dtype = terms[0][1].dtype
    for _, one in terms:
        dtype = torch.promote_types(dtype, one.dtype)
    accumulator = torch.promote_types(dtype, torch.float32)
    a = torch.cat([one.lora_A.to(accumulator) for _, one in terms])
    b = torch.cat([(weight * one.scaling) * one.lora_B.to(accumulator) for weight, one in terms], dim=1)
    if a.shape[0] > min(b.shape[0], a.shape[1]):
        a, b = _refactor(a, b)
    a, b = a.to(dtype), b.to(dtype)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(
            f"weighted factors must fit {dtype}, got infinity for {name!r}."
            " Lower the weights, or merge float32 copies of the inputs."
        )
    return LowRankUpdate(a, b)


def _refactor(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Write B A with rank min(m, n) ≤ r, in float64: two thin QRs and the SVD of a core no larger than r × r.

    Returns:
        A′ ``(k, n)`` and B′ ``(m, k)``, k = min(m, n), each carrying the square roots of the singular values.
    """
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double())
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = sigma.sqrt()
    return (root[:, None] * vh) @ q_a.T, q_b @ (u * root)
