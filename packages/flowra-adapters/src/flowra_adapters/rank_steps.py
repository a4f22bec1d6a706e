"""Ranks filled up with zeros to a ladder, for servers whose buffers and kernels come in steps."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flowra_adapters.checkpoint import AdapterCheckpoint

__all__ = ["pad_ranks"]


def pad_ranks(checkpoint: AdapterCheckpoint, step: int) -> AdapterCheckpoint:
    """Fill every rank up to a multiple of ``step`` with rows of A and columns of B that are zero.

    The products stay what they are. A rank may come to exceed the layer's largest: PEFT and vLLM read such files, while
    :func:`load_adapter` refuses them.

    Returns:
        The values with longer factors.

    Raises:
        ValueError: if ``step`` is below 1.
    """
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    factors = {name: _padded(checkpoint, name, a, b, step) for name, (a, b) in checkpoint.factors.items()}
    return replace(checkpoint, factors=factors)


def _padded(checkpoint: AdapterCheckpoint, name: str, a: Tensor, b: Tensor, step: int) -> tuple[Tensor, Tensor]:
    if checkpoint.kinds.get(name) == "parameter":  # (E, r, n), (E, m, r)
        more = -a.shape[1] % step
        return F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))
    groups = (
        len(a) // b.shape[1]
    )  # each group of a convolution has rows of its own in A: (g * r, n, *k), (m, r, 1, ...)
    more = -b.shape[1] % step
    rows = [torch.cat([each, each.new_zeros(more, *a.shape[1:])]) for each in a.chunk(groups)]
    return torch.cat(rows), torch.cat([b, b.new_zeros(len(b), more, *b.shape[2:])], 1)
