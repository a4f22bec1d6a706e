"""Parameters of which each process holds a part, as ``torch.distributed.fsdp.fully_shard`` makes them.

Every function here is called on all processes that share a parameter, in the same order.
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["is_sharded", "refuse_sharded", "whole", "write"]


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


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter a value that all processes have whole, in place."""
    if is_sharded(parameter):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        # Nothing is sent: each process takes its part of its own copy.
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def refuse_sharded(parameter: Tensor) -> None:
    """Refuse to put a new Parameter in the place of a sharded one.

    Raises:
        ValueError: if it is sharded.
    """
    if is_sharded(parameter):
        raise ValueError(
            "factors must be whole to be replaced, got sharded ones, of which fully_shard would go on to use the old."
            " Use method 'svd_masked', whose Parameters stay."
        )
