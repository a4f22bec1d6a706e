"""Where ranks must not change by new Parameters: in models that something else holds the Parameters of.

``DistributedDataParallel`` and ``fully_shard`` go on reducing the gradients of the old Parameters, so that the new ones
would train apart in each process, silently wrong; a compiled model would be compiled again at every event.
"""

from collections.abc import Iterable, Mapping

import torch.distributed as dist
from torch import nn

from flowra_allocation.forms import AnyLayer, factors, has_slots
from flowra_allocation.processes import several
from flowra_allocation.sharding import is_sharded

__all__ = ["is_compiled", "refuse_new_parameters", "refuse_wrapped", "reshard"]


def refuse_new_parameters(layer: AnyLayer) -> None:
    """Refuse to resize an update by new Parameters where its own are sharded.

    Raises:
        ValueError: if they are, and it has no slots.
    """
    if not has_slots(layer) and any(is_sharded(each) for each in factors(layer).values()):
        raise ValueError(f"layer must have slots to be resized, got {type(layer).__name__} that is sharded. {ADVICE}")


def refuse_wrapped(
    model: nn.Module,
    layers: Mapping[str, AnyLayer],
    *,
    compiled: bool = False,
    group: "dist.ProcessGroup | None" = None,
) -> None:
    """Refuse to move rank by new Parameters in a model that is wrapped, as far as that can be known.

    A model inside a wrapper does not know of it, so training in several processes counts as wrapped.

    Args:
        model: that carries the layers.
        layers: module name to update.
        compiled: whether the model is known to be compiled.
        group: of processes that train together; None for all.

    Raises:
        ValueError: if it is, and a layer has no slots.
    """
    resized = [name for name, layer in layers.items() if not has_slots(layer)]
    where = _wrapping(model.modules(), compiled=compiled, group=group) if resized else None
    if where is not None:
        raise ValueError(f"layers must have slots where the model is wrapped, got {resized[0]!r} {where}. {ADVICE}")


def reshard(model: nn.Module) -> None:
    """Let go of parameters that a pass without backward has left whole: what is written to them would be lost."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


ADVICE = "Attach with method 'svd_masked', whose Parameters stay the same, or train unwrapped in one process."


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``torch.compile(module)`` returned this module, or ``module.compile()`` was called."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _wrapping(modules: Iterable[nn.Module], *, compiled: bool, group: "dist.ProcessGroup | None") -> str | None:
    if several(group):
        return f"in {dist.get_world_size(group)} processes"
    if not (dist.is_available() and dist.is_initialized()):  # then nothing is sharded, nor in the other wrapper
        return "in a compiled model" if compiled or any(map(is_compiled, modules)) else None
    for module in modules:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return "under DistributedDataParallel"
        if any(is_sharded(each) for each in module.parameters(recurse=False)):
            return "among parameters that are sharded"
        compiled = compiled or is_compiled(module)
    return "in a compiled model" if compiled else None
