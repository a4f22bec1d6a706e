"""Put updates into the weights and take them out again. Written once, for every method and layer type."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flowra_adapters.adapter import Adapter, AdapterDict
from flowra_adapters.applying import adapter_dicts
from flowra_adapters.quantised import QuantisedWeight, dequantised_weight, quantised_weight
from flowra_adapters.weights import parameter_of, total_update

__all__ = ["MergeReport", "merge", "merged", "unmerge"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What quantising again lost, for each quantised parameter by the name of its site; empty for plain weights.

    E is the difference of what the layer now holds and W + ΔW. The output for an input x differs by x Eᵀ from the
    unmerged one, so by at most ‖x‖ ‖E‖.
    """

    error: Mapping[str, float] = field(default_factory=dict)
    """‖E‖ / ‖W + ΔW‖, Frobenius."""
    error_over_update: Mapping[str, float] = field(default_factory=dict)
    """‖E‖ / ‖ΔW‖; where it is not far below 1, the merged model is not the one that was trained."""


@torch.no_grad()
def merge(model: nn.Module, *, keep_weight: bool = True) -> MergeReport:
    """Add the update of every enabled adapter to the weight of its layer; a second call changes nothing.

    ΔW and the sum are computed in at least float32 and cast once. A quantised weight is dequantised for it, and the
    sum is quantised in the layer's own format and block size. Either all layers are merged or none.

    Args:
        model: changed in place.
        keep_weight: keep a copy of each base weight, so that :func:`unmerge` restores it bit by bit. Without it the
            update itself is kept, and unmerging subtracts it, which is exact to within 2·eps·|W|; a quantised weight
            does not come back that way, so there it must be True. Decided at the first merge into a layer.

    Returns:
        What this call lost by quantising.

    Raises:
        ValueError: if no adapter is attached, an update is not finite, a weight is shared with another module, which
            would change too, or a quantised one is in a format that cannot be written or must not be kept.
    """
    held_by_name = adapter_dicts(model)
    if not held_by_name:
        raise ValueError("model must carry adapters, got one without any. Attach or load an adapter first.")
    pending = _pending(held_by_name)
    _refuse_shared_weights(model, pending)
    owners = {at: model.get_submodule(at[0]) for at in pending}
    before = {at: quantised_weight(owners[at], at[1]) for at in pending}
    unkept = [at for at in pending if before[at] is not None and at[1] not in held_by_name[at[0]].kept]
    if unkept and not keep_weight:
        raise ValueError(
            f"keep_weight must be True where the weight is quantised, got False for {unkept[0][0]!r}: subtracting the"
            " update does not bring the codes back. The copy is as small as the weight."
        )
    sums = {at: total_update(held_by_name[at[0]], at[1], group) for at, group in pending.items()}
    values: dict[tuple[str, str], Tensor | QuantisedWeight] = {}
    error, error_over_update = {}, {}
    for at, update in sums.items():
        weight = dequantised_weight(owners[at], at[1])
        target, stored = weight + update, before[at]
        values[at] = target.to(weight.dtype) if stored is None else stored.requantised(target)
        full = _full(values[at])
        if not torch.isfinite(full).all():
            raise ValueError(f"merged weights must be finite, got NaN or infinity in {at[0]!r}. Nothing was merged.")
        if stored is not None:
            lost = torch.linalg.vector_norm(full - target).item()
            site = at[0] if at[1] == "weight" else ".".join(at).lstrip(".")
            error[site] = _ratio(lost, torch.linalg.vector_norm(target).item())
            error_over_update[site] = _ratio(lost, torch.linalg.vector_norm(update).item())
    for at, update in sums.items():
        held, name, value, stored = held_by_name[at[0]], at[1], values[at], before[at]
        parameter = parameter_of(owners[at], name)
        if keep_weight and name not in held.kept and name not in held.added:
            held.kept[name] = parameter.detach().clone() if stored is None else stored.clone()
        if name not in held.kept:
            held.added[name] = held.added[name] + update if name in held.added else update
        _write(value, owners[at], name)
        held.merged = (*held.merged, *pending[at])
    return MergeReport(error=error, error_over_update=error_over_update)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the base weights; a second call changes nothing."""
    for name, held in adapter_dicts(model).items():
        owner = model.get_submodule(name)
        for parameter, value in held.kept.items():
            _write(value, owner, parameter)
        for parameter, update in held.added.items():
            weight = parameter_of(owner, parameter)
            weight.copy_(weight - update)
        held.merged, held.kept, held.added = (), {}, {}


def merged(model: nn.Module) -> bool:
    """Tell whether any adapter is merged into the weights now."""
    return any(held.merged for held in adapter_dicts(model).values())


def _write(value: Tensor | QuantisedWeight, owner: nn.Module, name: str) -> None:
    if isinstance(value, QuantisedWeight):
        value.write(owner, name)
    else:
        parameter_of(owner, name).copy_(value)


def _full(value: Tensor | QuantisedWeight) -> Tensor:
    return value.dequantised() if isinstance(value, QuantisedWeight) else value


def _ratio(lost: float, size: float) -> float:
    return lost / size if size > 0 else math.inf if lost > 0 else 0.0


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
            place = _memory_of(parameter)
            owners[place].setdefault((id(module), name), f"{module_name}.{name}" if module_name else name)
    for name, parameter_name in pending:
        weight = parameter_of(model.get_submodule(name), parameter_name)
        shared = list(owners[_memory_of(weight)].values())
        if len(shared) > 1:
            raise ValueError(
                f"weight must belong to one module only, got {' = '.join(shared)}."
                f" Untie it, or serve {name!r} unmerged."
            )


def _memory_of(parameter: Tensor) -> int:
    """Return where a parameter lies; a tensor class that wraps others lies where the first of them does."""
    while is_traceable_wrapper_subclass(parameter):
        parameter = getattr(parameter, parameter.__tensor_flatten__()[0][0])
    return parameter.untyped_storage().data_ptr()
