"""Reading and writing the parameters of a base model, whatever they are stored as."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter, AdapterDict
from flowra_adapters.fused import autocast
from flowra_adapters.quantised import QuantisedWeight, dequantised_weight, is_quantised
from flowra_adapters.sites import Site

__all__ = ["BaseWeight", "base_weight", "parameter_of", "total_update", "with_updates"]


@dataclass(frozen=True, eq=False)
class BaseWeight:
    """The base weight of a site, in the standard layout, whenever it is asked for."""

    held: AdapterDict
    """The adapters of its module."""
    key: str
    """Of the site among them."""

    def __call__(self) -> Tensor:
        """Return it as it is now; detached."""
        site = self.held.sites[self.key]
        return site.operator.to_standard(base_weight(self.held, site))

    def __deepcopy__(self, memo: dict[int, Any]) -> "BaseWeight":
        """Follow the copy of the module where it is copied, too; a copy of the adapter alone stays with the module."""
        return BaseWeight(memo.get(id(self.held), self.held), self.key)


def parameter_of(owner: nn.Module, name: str) -> nn.Parameter:
    """Return a module's own parameter, not what may stand in its place during a pass."""
    parameter = owner._parameters[name]
    assert parameter is not None
    return parameter


def base_weight(held: AdapterDict, site: Site) -> Tensor:
    """Return the site's parameter, or its part of it, without any update; in the layer's layout, detached.

    A quantised one is dequantised.
    """
    name = site.parameter
    kept = held.kept.get(name)
    if kept is None:
        weight = dequantised_weight(site.owner, name)
        if name in held.added:
            weight = (weight - held.added[name]).to(weight.dtype)
    else:
        weight = kept.dequantised() if isinstance(kept, QuantisedWeight) else kept
    if site.part is None:
        return weight
    whole = site.whole
    return site.operator.to_stored(site.part.of(whole.to_standard(weight)))


def total_update(held: AdapterDict, parameter: str, adapters: Mapping[str, Adapter]) -> Tensor:
    """Sum the updates of one parameter, in its layer's layout, in at least float32; differentiable."""
    whole = next(held.sites[key].whole for key in adapters)
    total: Tensor | None = None
    owned = False
    for key, adapter in adapters.items():
        site = held.sites[key]
        assert site.parameter == parameter
        base = site.operator.to_standard(base_weight(held, site)) if adapter.reads_base else None
        update = adapter.delta_weight(base)
        if site.part is None:
            total = update if total is None else total + update
        else:
            total = update.new_zeros(whole.shape) if total is None else total if owned else total.clone()
            total[site.part.index] += update.to(total.dtype)
        owned = site.part is not None
    assert total is not None
    return whole.to_stored(total)


def with_updates(held: AdapterDict, parameter: str, adapters: Mapping[str, Adapter]) -> Tensor:
    """Return W + ΔW as it stands now, dequantised, summed in at least float32 and cast once."""
    site = held.sites[next(iter(adapters))]
    weight = parameter_of(site.owner, parameter)
    full = dequantised_weight(site.owner, parameter) if is_quantised(weight) else weight
    with torch.autocast(weight.device.type, enabled=False) if autocast(weight.device.type) else nullcontext():
        return (full + total_update(held, parameter, adapters)).to(weight.dtype)
