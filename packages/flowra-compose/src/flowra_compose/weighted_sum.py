"""The weighted sum of low-rank updates as one pair of factors.

Σᵢ wᵢ sᵢ Bᵢ Aᵢ = [w₁s₁B₁ … w_k s_k B_k] [A₁; …; A_k]: stacking factors along the rank adds the products, and nothing is
averaged.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate

__all__ = ["Term", "common_dtype", "fitted", "stack", "terms_by_module"]

Term = tuple[float, LowRankUpdate]


def terms_by_module(updates: Sequence[Mapping[str, LowRankUpdate]], weights: Sequence[float]) -> dict[str, list[Term]]:
    """Gather the terms of each module's sum.

    Args:
        updates: one mapping from module name to update for each input.
        weights: one for each input; an input of weight 0 takes no part.

    Returns:
        Module name to weights and updates, at least one, modules sorted by name.
    """
    terms: dict[str, list[Term]] = {}
    for weight, one in zip(weights, updates, strict=True):
        if weight != 0:
            for name, update in one.items():
                terms.setdefault(name, []).append((weight, update))
    return dict(sorted(terms.items()))


def common_dtype(terms: Sequence[Term]) -> torch.dtype:
    """Return the promoted dtype of all factors."""
    dtype = terms[0][1].dtype
    for _, one in terms:
        dtype = torch.promote_types(dtype, one.dtype)
    return dtype


def stack(terms: Sequence[Term], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A ``(Σ rᵢ, n)`` and B ``(m, Σ rᵢ)`` with B A = Σᵢ wᵢ ΔWᵢ, computed in the dtype given."""
    a = torch.cat([one.lora_A.to(dtype) for _, one in terms])
    b = torch.cat([(weight * one.scaling) * one.lora_B.to(dtype) for weight, one in terms], dim=1)
    return a, b


def fitted(name: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast factors to the dtype they are given out in: raises ValueError if a value does not fit."""
    a, b = a.to(dtype), b.to(dtype)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(
            f"weighted factors must fit {dtype}, got infinity for {name!r}."
            " Lower the weights, or merge float32 copies of the inputs."
        )
    return a, b
