"""Put updates into the weights and take them out again. Written once, for every method and layer type."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from flowra_adapters.adapter import AdapterDict
from flowra_adapters.attach import adapter_dicts
from flowra_adapters.layers import in_layout_of

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
    pending = {name: held for name, held in held_by_name.items() if held.active()}
    _refuse_shared_weights(model, pending)
    deltas = {name: _delta(model.get_submodule(name), held) for name, held in pending.items()}
    weights = {name: _weight_of(model, name) for name in pending}
    new_weights = {name: (weights[name] + delta).to(weights[name]) for name, delta in deltas.items()}
    broken = [name for name, weight in new_weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"merged weights must be finite, got NaN or infinity in {broken[0]!r}. Nothing was merged.")
    for name, held in pending.items():
        if not held.merged and keep_weight:
            held.kept_weight = weights[name].detach().clone()
        if held.kept_weight is None:
            held.added = deltas[name] if held.added is None else held.added + deltas[name]
        weights[name].copy_(new_weights[name])
        held.merged = (*held.merged, *held.active())


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the base weights; a second call changes nothing."""
    for name, held in adapter_dicts(model).items():
        weight = _weight_of(model, name)
        if held.kept_weight is not None:
            weight.copy_(held.kept_weight)
        elif held.added is not None:
            weight.copy_(weight - held.added)
        held.merged, held.kept_weight, held.added = (), None, None


def merged(model: nn.Module) -> bool:
    """Tell whether any adapter is merged into the weights now."""
    return any(held.merged for held in adapter_dicts(model).values())


def _delta(layer: nn.Module, held: AdapterDict) -> Tensor:
    """Sum the updates that are not in the weight yet, in its layout."""
    total = torch.stack([adapter.delta_weight() for adapter in held.active().values()]).sum(0)
    return in_layout_of(layer, total)


def _weight_of(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _refuse_shared_weights(model: nn.Module, pending: dict[str, AdapterDict]) -> None:
    """Refuse a weight whose memory another module reads, too; one module under two names is one module."""
    owners: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            place = parameter.untyped_storage().data_ptr()
            owners[place].setdefault((id(module), name), f"{module_name}.{name}" if module_name else name)
    for name in pending:
        shared = list(owners[_weight_of(model, name).untyped_storage().data_ptr()].values())
        if len(shared) > 1:
            raise ValueError(
                f"weight must belong to one module only, got {' = '.join(shared)}."
                f" Untie it, or serve {name!r} unmerged."
            )
