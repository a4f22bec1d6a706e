"""Put updates into the weights and take them out again. Written once, for every method and layer type."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from flowra_adapters.adapter import Adapter, AdapterDict
from flowra_adapters.applying import adapter_dicts
from flowra_adapters.weights import parameter_of, total_update

__all__ = ["merge", "merged", "unmerge"]


@torch.no_grad()
def merge(model: nn.Module, *, keep_weight: bool = True) -> None:
    """Add the update of every enabled adapter to the weight of its layer; a second call changes nothing.

    ΔW and the sum are computed in at least float32 and cast once. Either all layers are merged or none.

    Args:
        model: changed in place.
        keep_weight: keep a copy of each base weight, so that :func:`unmerge` restores it bit by bit. Without it the
            update itself is kept, and unmerging subtracts it, which is exact to within 2·eps·|W|. Decided at the first
            merge into a layer.

    Raises:
        ValueError: if no adapter is attached, an update is not finite, or a weight is shared with another module,
            which would change too.
    """
    held_by_name = adapter_dicts(model)
    if not held_by_name:
        raise ValueError("model must carry adapters, got one without any. Attach or load an adapter first.")
    pending = _pending(held_by_name)
    _refuse_shared_weights(model, pending)
    sums = {at: total_update(held_by_name[at[0]], at[1], group) for at, group in pending.items()}
    parameters = {at: parameter_of(model.get_submodule(at[0]), at[1]) for at in pending}
    values = {at: (parameters[at] + update).to(parameters[at].dtype) for at, update in sums.items()}
    broken = [at for at, value in values.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"merged weights must be finite, got NaN or infinity in {broken[0][0]!r}. Nothing was merged.")
    for at, update in sums.items():
        held, name = held_by_name[at[0]], at[1]
        if keep_weight and name not in held.kept and name not in held.added:
            held.kept[name] = parameters[at].detach().clone()
        if name not in held.kept:
            held.added[name] = held.added[name] + update if name in held.added else update
        parameters[at].copy_(values[at])
        held.merged = (*held.merged, *pending[at])


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the base weights; a second call changes nothing."""
    for name, held in adapter_dicts(model).items():
        owner = model.get_submodule(name)
        for parameter, value in held.kept.items():
            parameter_of(owner, parameter).copy_(value)
        for parameter, update in held.added.items():
            weight = parameter_of(owner, parameter)
            weight.copy_(weight - update)
        held.merged, held.kept, held.added = (), {}, {}


def merged(model: nn.Module) -> bool:
    """Tell whether any adapter is merged into the weights now."""
    return any(held.merged for held in adapter_dicts(model).values())


def _pending(held_by_name: dict[str, AdapterDict]) -> dict[tuple[str, str], dict[str, Adapter]]:
    """Group what must be merged by (module name, parameter)."""
    pending: dict[tuple[str, str], dict[str, Adapter]] = defaultdict(dict)
    for name, held in held_by_name.items():
        for key, adapter in held.active().items():
            pending[name, held.sites[key].parameter][key] = adapter
    return dict(pending)


def _refuse_shared_weights(model: nn.Module, pending: Iterable[tuple[str, str]]) -> None:
    """Refuse a weight whose memory another module reads, too; one module under two names is one module."""
    owners: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            place = parameter.untyped_storage().data_ptr()
            owners[place].setdefault((id(module), name), f"{module_name}.{name}" if module_name else name)
    for name, parameter_name in pending:
        weight = parameter_of(model.get_submodule(name), parameter_name)
        shared = list(owners[weight.untyped_storage().data_ptr()].values())
        if len(shared) > 1:
            raise ValueError(
                f"weight must belong to one module only, got {' = '.join(shared)}."
                f" Untie it, or serve {name!r} unmerged."
            )
