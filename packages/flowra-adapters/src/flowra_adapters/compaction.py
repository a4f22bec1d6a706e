"""From slots to tensors as large as the ranks, for when ranks move no more (docs/methods.md, section 15)."""

from torch import nn

from flowra_adapters.applying import adapter_dicts, take_off
from flowra_adapters.attach import adapters
from flowra_adapters.sharding import is_sharded
from flowra_adapters.svd import SVDForm
from flowra_adapters.svd_masked import MaskedSVDForm
from flowra_adapters.weights import BaseWeight

__all__ = ["compact"]


def compact(model: nn.Module, adapter: str = "default") -> dict[str, tuple[MaskedSVDForm, SVDForm]]:
    """Put :class:`SVDForm` of the same ranks in the places of all adapters of method ``svd_masked``.

    Updates stay what they are; outputs agree to rounding. Memory and time fall to what the ranks need. The Parameters
    are new: hand the optimiser over (``flowra_allocation.hand_over``), and wrap the model again.

    An update of rank 0 is taken off: wrappers do not know what to do with Parameters without elements.

    Args:
        model: changed in place; not wrapped. Where ``fully_shard`` has sharded it, which cannot be undone, load its
            full state dict into a model made like it, compact that, and shard it.
        adapter: name of the adapters.

    Returns:
        Site name to what was there and what takes its place, for updates of rank 0 also.

    Raises:
        ValueError: if there is nothing to compact, or the model is wrapped: the wrapper would go on with the old
            Parameters.
    """
    _refuse_wrapped(model)
    masked = {name: one for name, one in adapters(model, adapter).items() if isinstance(one, MaskedSVDForm)}
    if not masked:
        raise ValueError(f"adapter must be of method 'svd_masked' to be compacted, got {adapter!r}, which has no slots")
    compacted = {name: (one, one.compact()) for name, one in masked.items()}
    new = {id(one): other for one, other in compacted.values()}
    for name, held in adapter_dicts(model).items():
        for key, one in held.named(adapter).items():
            if id(one) in new and one.rank > 0:
                held[key] = new[id(one)]
                new[id(one)].placed(BaseWeight(held, key))
            elif id(one) in new:
                del held[key], held.sites[key]
        if not held:
            take_off(model.get_submodule(name), held)
    return compacted


def _refuse_wrapped(model: nn.Module) -> None:
    where = None
    if any(is_sharded(parameter) for parameter in model.parameters()):
        where = "one that is sharded over processes. Load its full state dict into a model made like it, compact that"
    elif any(isinstance(each, nn.parallel.DistributedDataParallel) for each in model.modules()):
        where = "one under DistributedDataParallel. Pass its module"
    if where is not None:
        raise ValueError(f"model must not be wrapped to be compacted, got {where}, and wrap it again.")
