"""Put updates into the weights and take them out again. Written once, for every method and layer type."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter
from flowra_adapters.attach import AdapterDict, adapter_dicts

__all__ = ["merge", "merged", "unmerge"]


@torch.no_grad()
def merge(model: nn.Module, *, keep_weight: bool = True) -> None:
    """Add the update of every enabled adapter to the weight of its layer; a second call changes nothing.

    ΔW and the sum are computed in at least float32 and cast once. Either all layers are merged or none.

    Args:
        model: changed in place.
        keep_weight: keep a copy of each base weight, so that :func:`unmerge` restores it bit by bit. Without the copy
            unmerging subtracts ΔW, which is exact to within 2·eps·|W|.

    Raises:
        ValueError: if no adapter is attached, an update is not finite, or a weight is shared with another module,
            which would change too.
    """
    held_by_name = adapter_dicts(model)
    if not held_by_name:
        raise ValueError("model must carry adapters, got one without any. Attach or load an adapter first.")
    pending = {name: held for name, held in held_by_name.items() if held.active()}
    _refuse_shared_weights(model, pending)
    new_weights = {name: _weight_of(model, name) + _delta(held) for name, held in pending.items()}
    broken = [name for name, weight in new_weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"merged weights must be finite, got NaN or infinity in {broken[0]!r}. Nothing was merged.")
    for name, held in pending.items():
        weight = _weight_of(model, name)
        if keep_weight and held.kept_weight is None:
            held.kept_weight = weight.detach().clone()
        weight.copy_(new_weights[name])
        held.merged = (*held.merged, *held.active())


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the base weights; a second call changes nothing."""
    for name, held in adapter_dicts(model).items():
        if not held.merged:
            continue
        weight = _weight_of(model, name)
        merged_names, held.merged = held.merged, ()
        if held.kept_weight is not None:
            weight.copy_(held.kept_weight)
            held.kept_weight = None
        else:
            weight.copy_(weight - _delta(held, merged_names))


def merged(model: nn.Module) -> bool:
    """Tell whether any adapter is merged into the weights now."""
    return any(held.merged for held in adapter_dicts(model).values())


def _delta(held: AdapterDict, names: tuple[str, ...] | None = None) -> Tensor:
    chosen = held.active() if names is None else names
    total = torch.stack([_adapter(held, name).delta_weight() for name in chosen]).sum(0)
    return total.to(torch.promote_types(total.dtype, torch.float32))


def _adapter(held: AdapterDict, name: str) -> Adapter:
    one = held[name]
    assert isinstance(one, Adapter)
    return one


def _weight_of(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _refuse_shared_weights(model: nn.Module, pending: dict[str, AdapterDict]) -> None:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    for name in pending:
        shared = owners[id(_weight_of(model, name))]
        if len(shared) > 1:
            raise ValueError(
                f"weight must belong to one module only, got {' = '.join(shared)}."
                f" Untie it, or serve {name!r} unmerged."
            )
