"""The regulariser of AdaLoRA and FlexLoRA: how far A and B are from orthonormal directions.

    R = mean over all A and B of ‖M Mᵀ − I‖_F        M = A, and M = Bᵀ

Deviation: the paper squares the norm (Zhang et al. 2023, arXiv:2303.10512, eq. 4); its released code, PEFT's and that
of FlexLoRA do not, and the weights in use (0.1 to 0.5) are tuned for that.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from flowra_adapters.adapter import Adapter
from flowra_adapters.svd import SVDForm
from flowra_adapters.svd_masked import MaskedSVDForm

__all__ = ["orthogonality"]


def orthogonality(adapters: Iterable[Adapter]) -> Tensor:
    """Measure how far directions are from orthonormal; add a multiple of it to the loss.

    Only directions that are there count, and only adapters that have one. Factors of one shape are taken together, so
    that a model takes a few products, not two for each layer. The gradient of a factor that is exactly orthonormal is
    zero (the norm has a corner there).

    Args:
        adapters: of the SVD form, such as ``adapters(model).values()``.

    Returns:
        R, 0-d, in at least float32, on the device of the first adapter; 0 where no adapter has a direction.

    Raises:
        ValueError: if there is no adapter.
        TypeError: if an adapter is not of the SVD form.
    """
    batches: dict[tuple[object, ...], list[tuple[Tensor, Tensor | None]]] = defaultdict(list)
    for one in adapters:
        if not isinstance(one, SVDForm):
            raise TypeError(f"adapters must be of the SVD form, got {type(one).__name__}")
        mask = one.mask if isinstance(one, MaskedSVDForm) else None
        for side, factor in (("A", one.lora_A), ("B", one.lora_B)):
            batches[side, factor.shape, factor.dtype, factor.device, mask is None].append((factor, mask))
    if not batches:
        raise ValueError("adapters must hold at least one adapter, got none")
    sums, counts = zip(*(_distances(batch, str(key[0])) for key, batch in batches.items()), strict=True)
    device = sums[0].device
    total, count = (torch.stack([each.to(device) for each in parts]).sum() for parts in (sums, counts))
    return total / count.clamp(min=1)


def _distances(batch: list[tuple[Tensor, Tensor | None]], side: str) -> tuple[Tensor, Tensor]:
    """Sum ‖M Mᵀ − I‖_F over factors of one shape, and count those that have a direction."""
    factors = torch.stack([factor for factor, _ in batch])
    factors = factors.to(torch.promote_types(factors.dtype, torch.float32))
    grams = factors @ factors.mT if side == "A" else factors.mT @ factors
    size = grams.shape[-1]
    deviations = grams - torch.eye(size, dtype=grams.dtype, device=grams.device)
    masks = [mask for _, mask in batch if mask is not None]
    if not masks:
        return torch.linalg.matrix_norm(deviations).sum(), grams.new_full((), len(batch) if size else 0)
    live = torch.stack(masks)
    deviations = deviations * (live.unsqueeze(2) & live.unsqueeze(1))
    return torch.linalg.matrix_norm(deviations).sum(), live.any(1).sum().to(grams)
