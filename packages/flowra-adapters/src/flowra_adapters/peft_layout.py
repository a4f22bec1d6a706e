"""How PEFT lays out factors, and on which layers it computes what it says.

Measured on PEFT 0.21.2. Its convolutions forget ``dilation`` and ``padding_mode`` in their forward pass, but merge
rightly; its grouped convolutions compute rightly, with an A that is not grouped, but do not merge. It has no transposed
convolution. A stack of E matrices ``(E, m, n)`` has A ``(E · r, n)``, one matrix after the other, and B ``(m, r · E)``,
where the matrix counts fastest.
"""

from typing import Literal

import torch
from torch import Tensor

from flowra_adapters.operators import ConvOperator, Operator

__all__ = ["Consumer", "at_most_max_rank", "from_peft", "obstacle", "stack_from_peft", "stack_to_peft", "to_peft"]

Consumer = Literal["peft", "peft_merged", "vllm"]
"""Who reads an export: PEFT, which applies the adapter beside the layer; PEFT, which merges it first; vLLM."""


def obstacle(operator: Operator, *, consumer: Consumer, magnitude: bool = False) -> str | None:
    """Tell why PEFT would not compute a layer's update rightly, or None if it does.

    Args:
        operator: of the layer.
        consumer: who reads.
        magnitude: whether the update has one (DoRA).

    Returns:
        The reason, for a sentence that ends with it.
    """
    if not isinstance(operator, ConvOperator):
        return None
    kernel = operator.shape[2:]
    if operator.transposed:
        return "PEFT has no LoRA of transposed convolutions"
    if operator.groups > 1 and magnitude:
        return "PEFT's DoRA of a grouped convolution fails"
    if consumer == "peft_merged":
        if operator.groups > 1:
            return "PEFT does not merge into grouped convolutions"
        if operator.dimensions == 3 and kernel[:2] == (1, 1):
            return "PEFT's merge into such a 3-d convolution fails"
        return None
    if operator.padding_mode != "zeros" and any(operator.pads):
        return f"PEFT ignores padding_mode={operator.padding_mode!r}; a consumer that merges first does not"
    if any(step != 1 and size != 1 for step, size in zip(operator.dilation, kernel, strict=False)):
        return f"PEFT ignores dilation={operator.dilation}; a consumer that merges first does not"
    return None


def to_peft(operator: Operator, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Turn A ``(r, n·∏k)`` and B ``(m, r)`` into PEFT's: of a convolution ``(g·r, n, *k)`` and ``(m, r, 1, …)``.

    A start or several parts can give more directions than the weight has; these are written as one for each it has.

    Returns:
        A and B.
    """
    lora_A, lora_B = at_most_max_rank(operator, lora_A, lora_B)
    if not isinstance(operator, ConvOperator):
        return lora_A, lora_B
    groups, rank = operator.groups, len(lora_A)
    blocks = lora_A.new_zeros(groups, rank, groups, operator.in_size // groups)
    each = torch.arange(groups, device=lora_A.device)
    blocks[each, :, each] = lora_A.view(rank, groups, -1).transpose(0, 1)
    channels = groups * operator.shape[1]
    return (
        blocks.reshape(groups * rank, channels, *operator.shape[2:]),
        lora_B.reshape(*lora_B.shape, *(1,) * operator.dimensions),
    )


def at_most_max_rank(operator: Operator, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Write a product of more than ``max_rank`` directions, of each group, with its own singular ones; in float64."""
    rank, groups = len(lora_A), operator.groups
    if rank <= operator.max_rank or not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
        return lora_A, lora_B  # what is not finite is refused by name where it is written
    basis_A, inner_A = torch.linalg.qr(lora_A.double().view(rank, groups, -1).permute(1, 2, 0))
    basis_B, inner_B = torch.linalg.qr(lora_B.double().view(groups, -1, rank))
    left, values, right = torch.linalg.svd(inner_B @ inner_A.mT, full_matrices=False)
    root = values.sqrt()
    new_A = (root.unsqueeze(2) * (right @ basis_A.mT)).transpose(0, 1).reshape(-1, operator.in_size)
    new_B = (basis_B @ left * root.unsqueeze(1)).reshape(operator.out_size, -1)
    return new_A.to(lora_A), new_B.to(lora_B)


def from_peft(operator: Operator, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Turn PEFT's factors into A ``(r, n·∏k)`` and B ``(m, r)``; those of AdaLoRA's convolutions are flat already.

    Returns:
        A and B.

    Raises:
        ValueError: if the shapes are not those of the layer, or the update is none of its weight: PEFT's A sees the
            input of all groups.
    """
    shapes = f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
    groups = operator.groups
    if isinstance(operator, ConvOperator) and lora_A.ndim > 2:
        kernel = operator.shape[2:]
        expected = (len(lora_A), groups * operator.shape[1], *kernel)
        if tuple(lora_A.shape) != expected or tuple(lora_B.shape[2:]) != (1,) * len(kernel):
            raise ValueError(f"factors must fit a convolution {operator.shape} in {groups} groups, got {shapes}")
        lora_B = lora_B.flatten(1)
        if lora_B.shape[1] * groups != len(lora_A):
            raise ValueError(f"rank must be {groups} times that of B in {groups} groups, got {shapes}")
        blocks = lora_A.reshape(groups, lora_B.shape[1], groups, -1)
        each = torch.arange(groups)
        own = blocks[each, :, each]
        if groups > 1 and blocks.count_nonzero() != own.count_nonzero():
            raise ValueError("update must be one of the grouped weight, got an A that reads other groups, too")
        lora_A = own.transpose(0, 1).reshape(lora_B.shape[1], operator.in_size)
    if (
        lora_A.ndim != 2
        or lora_B.ndim != 2
        or (lora_B.shape[0], lora_A.shape[1])
        != (
            operator.out_size,
            operator.in_size,
        )
    ):
        raise ValueError(f"factors must fit a weight {operator.shape}, got {shapes}")
    return lora_A, lora_B


def stack_to_peft(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Turn A ``(E, r, n)`` and B ``(E, m, r)`` into ``(E · r, n)`` and ``(m, r · E)``."""
    return lora_A.flatten(0, 1), lora_B.permute(1, 2, 0).flatten(1)


def stack_from_peft(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Turn ``(E · r, n)`` and ``(m, r · E)`` into A ``(E, r, n)`` and B ``(E, m, r)``.

    Returns:
        A and B.

    Raises:
        ValueError: if there is no such E.
    """
    rows = len(lora_A) if lora_A.ndim == lora_B.ndim == 2 else 0
    if rows == 0 or rows != lora_B.shape[1] or rows % rank:
        raise ValueError(
            f"factors of a raw parameter must be (E · {rank}, n) and (m, {rank} · E), got {tuple(lora_A.shape)} and"
            f" {tuple(lora_B.shape)}"
        )
    count = rows // rank
    return lora_A.unflatten(0, (count, rank)), lora_B.unflatten(1, (rank, count)).permute(2, 0, 1)
