"""What is not plain LoRA becomes it: factors of a low-rank update, and how far its product is from the update.

An update is judged by its product, never by its factors: the error is ‖ΔW - s · B A‖_F / ‖ΔW‖_F. The best factors of a
rank are those of the truncated singular value decomposition of ΔW (Eckart and Young 1936), in each group of a grouped
convolution.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowra_adapters.adapter import Adapter
from flowra_adapters.lora import LoRA
from flowra_adapters.svd import SVDForm

__all__ = ["Converted", "exact", "own_factors", "to_lora"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """A low-rank update ΔW ≈ scaling · B A."""

    lora_A: Tensor
    """``(r, n·∏k)``; of a grouped convolution rank r in each group."""
    lora_B: Tensor
    """``(m, r)``."""
    scaling: float
    """s."""
    error: float
    """‖ΔW - s · B A‖_F / ‖ΔW‖_F; 0 where the factors are the update's own."""


@runtime_checkable
class _HasLoRA(Protocol):
    """A method that is LoRA in other words, such as Tucker."""

    def to_lora(self) -> tuple[Tensor, Tensor]:
        """Return A ``(r, n·∏k)`` and B ``(m, r)`` with ΔW = s · B A."""
        ...


def exact(adapter: Adapter) -> bool:
    """Tell whether an update is plain LoRA in other words, so that nothing is lost by writing it as that."""
    return not adapter.reads_base and isinstance(adapter, LoRA | SVDForm | _HasLoRA)


def to_lora(
    adapter: Adapter, weight: Tensor | None = None, *, rank: int | None = None, energy: float | None = None
) -> Converted:
    """Write an update as LoRA.

    Without ``rank`` and ``energy`` nothing is cut. LoRA itself (with the start of a residual initialisation as r more
    directions), the SVD form (E is multiplied into B) and Tucker are then taken as they are; everything else is
    decomposed in full.

    Args:
        adapter: of any method, on a matrix or a stack of filters.
        weight: its base weight in the standard layout, where the method ``reads_base``.
        rank: at least 1; keep at most so many directions, in each group.
        energy: in (0, 1]; keep as few directions as have this share of ‖ΔW‖²_F.

    Returns:
        Factors in the adapter's dtype, detached, and the relative error of their product.

    Raises:
        ValueError: if the parameter is a vector or holds one number, or an argument is out of range.
    """
    operator = adapter.operator
    if len(operator.shape) < 2:
        raise ValueError(f"weight must be a matrix or a stack of filters to have a rank, got shape {operator.shape}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    if energy is None and exact(adapter):
        own = own_factors(adapter)
        if rank is None or own.lora_A.shape[0] <= rank:
            return own
    with torch.no_grad():
        delta = adapter.delta_weight(weight)
    return _decompose(adapter, delta, rank, energy)


def own_factors(adapter: Adapter) -> Converted:
    """Return the factors that an update has, detached; those of DoRA without its magnitude."""
    lora_A: Tensor
    lora_B: Tensor
    if isinstance(adapter, LoRA):
        lora_A, lora_B = adapter.lora_A, adapter.lora_B
        if adapter.offset_A is not None and adapter.offset_B is not None:
            lora_A = torch.cat([lora_A, adapter.offset_A])
            lora_B = torch.cat([lora_B, -adapter.offset_B], 1)
    elif isinstance(adapter, SVDForm):
        lora_A, lora_E, lora_B = adapter.triplets()
        lora_B = lora_B * lora_E
    else:
        assert isinstance(adapter, _HasLoRA)
        lora_A, lora_B = adapter.to_lora()
    return Converted(lora_A=lora_A.detach(), lora_B=lora_B.detach(), scaling=adapter.scaling, error=0.0)


def _decompose(adapter: Adapter, delta: Tensor, rank: int | None, energy: float | None) -> Converted:
    """Cut the singular value decomposition of an update, which is done in float64."""
    operator = adapter.operator
    dtype = next((each.dtype for each in adapter.parameters()), torch.float32)
    blocks = delta.double().reshape(operator.groups, operator.out_size // operator.groups, -1)
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    kept = _kept(values, rank, energy)
    root = values[:, :kept].sqrt()
    lora_A = (root.unsqueeze(2) * right[:, :kept]).transpose(0, 1).reshape(kept, operator.in_size)
    lora_B = (left[:, :, :kept] * root.unsqueeze(1)).reshape(operator.out_size, kept)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    left_over = delta.double() - operator.product(lora_B.double(), lora_A.double())
    size = delta.double().norm().item()
    return Converted(
        lora_A=lora_A, lora_B=lora_B, scaling=1.0, error=left_over.norm().item() / size if size > 0 else 0.0
    )


def _kept(values: Tensor, rank: int | None, energy: float | None) -> int:
    """Count the directions to keep: never one whose singular value is rounding, in no group."""
    threshold = (
        values.max().item() * math.sqrt(values.shape[1]) * torch.finfo(values.dtype).eps if values.numel() else 0
    )
    squares = values.square().sum(0)
    kept = int((values.amax(0) > threshold).sum()) if values.numel() else 0
    if energy is not None and kept:
        shares = squares.cumsum(0) / squares.sum()
        kept = min(kept, int((shares < energy * (1 - 1e-12)).sum()) + 1)
    return kept if rank is None else min(kept, rank)
