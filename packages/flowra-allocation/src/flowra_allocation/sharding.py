"""Tensors of which each process holds a part, as ``torch.distributed.fsdp.fully_shard`` makes them.

Every function here is called on all processes that share a tensor, in the same order. This file is the same in
flowra-adapters and flowra-allocation (docs/decisions, 0013).
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["is_sharded", "sharded_like", "whole", "write"]


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this process holds but a part of the tensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # here, since it takes about a second

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; itself where it is not sharded. Differentiable."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    full: Tensor = tensor.full_tensor()
    return full


def sharded_like(value: Tensor, other: Tensor) -> Tensor:
    """Return this process's part of a value that all processes have whole; all of it where ``other`` is not sharded."""
    if not is_sharded(other):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    # Nothing is sent: each process takes its part of its own copy.
    part: Tensor = distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)
    return part


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor a value that all processes have whole, in place."""
    tensor.copy_(sharded_like(value, tensor))
