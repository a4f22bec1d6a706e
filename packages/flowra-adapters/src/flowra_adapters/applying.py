"""How a layer comes to use its adapters: hooks, written once for every method.

An update is either added to the layer's output, or put into the place of its weight while the layer runs: W + ΔW
shadows the parameter as an attribute of the module, and the parameter itself is never touched. The first way is cheaper
where the operator is known; the second works for any parameter that a forward reads as an attribute.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from flowra_adapters.adapter import Adapter, AdapterDict, Base
from flowra_adapters.folded import folded_update, folded_weight, folds
from flowra_adapters.fused import can_fuse, fused_update
from flowra_adapters.fused_gain import fused_update_with_gain
from flowra_adapters.operators import ParameterOperator
from flowra_adapters.quantised import is_quantised
from flowra_adapters.sites import Site
from flowra_adapters.weights import BaseWeight, base_weight, parameter_of, with_updates

__all__ = ["adapter_dicts", "held_by", "put", "take_off"]


def held_by(module: nn.Module) -> AdapterDict | None:
    """Return the module's adapters, if it has any."""
    candidate = module._modules.get("adapters")
    return candidate if isinstance(candidate, AdapterDict) else None


def adapter_dicts(model: nn.Module) -> dict[str, AdapterDict]:
    """Return what hangs on each adapted module, by module name."""
    return {name: held for name, module in model.named_modules() if (held := held_by(module)) is not None}


def put(site: Site, key: str, adapter: Adapter) -> None:
    """Hang an adapter on its site; the first one of each kind on a module brings the hooks."""
    held = held_by(site.owner)
    if held is None:
        held = site.owner.adapters = AdapterDict().train(site.owner.training)
    held[key] = adapter
    held.sites[key] = site
    adapter.placed(BaseWeight(held, key))
    if not isinstance(site.operator, ParameterOperator) and "add" not in held.hooks:
        held.hooks["add"] = site.host.register_forward_hook(partial(_add_updates, held), with_kwargs=True)
        if type(site.host) is nn.Linear:
            held.hooks["fold"] = site.host.register_forward_pre_hook(partial(_fold, held))
    chooses = type(adapter).materialises is not Adapter.materialises or isinstance(site.operator, ParameterOperator)
    chooses = chooses or isinstance(site.host, _ConvTransposeNd)
    if chooses and "shadow" not in held.hooks:
        held.hooks["shadow"] = site.host.register_forward_pre_hook(partial(_shadow, held), with_kwargs=True)
    if "shadow" in held.hooks:  # after "add", which must still know what is shadowed
        if "unshadow" in held.hooks:
            held.hooks["unshadow"].remove()
        held.hooks["unshadow"] = site.host.register_forward_hook(partial(_unshadow, held), always_call=True)


def take_off(owner: nn.Module, held: AdapterDict) -> None:
    """Remove a module's adapters and hooks, and what a pass that broke off has left in its weight's place."""
    for hook in held.hooks.values():
        hook.remove()
    if held.folded is not None:
        owner.__dict__.pop("weight", None)
    del owner.adapters


def _add_updates(
    held: AdapterDict, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Add to the output what is neither merged nor in the weight's place."""
    x = args[0] if args else next(iter(kwargs.values()))
    if held.folded is not None:
        folded, lora_A, lora_B, scaling = held.folded
        held.folded = None
        del layer.__dict__["weight"]
        return folded_update(layer, x, output, folded, lora_A, lora_B, scaling)
    active = held.active()
    if len(active) == 1:  # the usual case, and the fast one
        ((key, adapter),) = active.items()
        factors = adapter.plain_factors()
        plain = factors is not None and key not in held.shadowed and held.sites[key].part is None
        plain = plain and x.dtype == output.dtype
        if factors is not None and plain and can_fuse(layer, x, factors[0]) and _is_first(held, layer):
            if not adapter.reads_base:
                return fused_update(layer, x, output, *factors, adapter.scaling, adapter.observer)
            with_gain = adapter.observer is None and not held.merged
            gain = adapter.plain_gain(BaseWeight(held, key)()) if with_gain else None
            if gain is not None and gain.dtype == output.dtype:
                return fused_update_with_gain(layer, x, output, *factors, adapter.scaling, gain)
    total, owned = output, False
    for key, adapter in active.items():
        if key in held.shadowed:
            continue
        site = held.sites[key]
        base = _base(held, site, x, output) if adapter.reads_base else None
        update = adapter(x, base).to(output.dtype)
        if site.part is None:
            total, owned = total + update, True
        else:
            total = total if owned else total.clone()
            owned = True
            site.part.add_to_output(total, update)
    return total


def _is_first(held: AdapterDict, layer: nn.Module) -> bool:
    """Tell whether nobody else's hook looks at the output before our updates are in it. Ask last: it is not traced."""
    return next(iter(layer._forward_hooks), None) == held.hooks["add"].id


def _fold(held: AdapterDict, layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Put W + s B A into the weight's place where that is the cheapest way to apply the one update there is."""
    held.folded = None
    layer.__dict__.pop("weight", None)  # a pass that broke off
    if len(args) != 1 or not folds(layer, args[0]) or len(layer._forward_pre_hooks) > 1:
        return
    active = held.active()
    if len(active) != 1:
        return
    ((key, adapter),) = active.items()
    if adapter.reads_base or adapter.observer is not None or held.sites[key].part is not None:
        return
    factors = adapter.plain_factors()
    if factors is not None and can_fuse(layer, args[0], factors[0]) and _is_first(held, layer):
        folded = layer.__dict__["weight"] = folded_weight(layer, *factors, adapter.scaling)
        held.folded = (folded, *factors, adapter.scaling)


def _base(held: AdapterDict, site: Site, x: Tensor, output: Tensor) -> Base:
    """Return what the layer does without adapters; its output is at hand unless something is merged or in place."""
    weight = site.operator.to_standard(base_weight(held, site))
    if held.merged or held.shadowed:
        return Base(site.operator.apply(x, weight), weight)
    part = output if site.part is None else site.part.of_output(output)
    bias = site.owner._parameters.get("bias")
    if bias is None:
        return Base(part, weight)
    own = bias.detach() if site.part is None else site.part.of(bias.detach())
    return Base(part - own.view(-1, *(1,) * (-1 - site.operator.channel_dim)), weight)


def _shadow(held: AdapterDict, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Put W + ΔW into the place of the parameters whose updates are materialised."""
    inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    x = inputs[0] if inputs else torch.empty(0)
    resized = isinstance(host, _ConvTransposeNd) and any(each is not None for each in (*args[1:], *kwargs.values()))
    chosen = {key: one for key, one in held.active().items() if _takes_place(held.sites[key], one, x, resized=resized)}
    held.shadowed = tuple(chosen)
    for parameter in dict.fromkeys(held.sites[key].parameter for key in chosen):
        group = {key: one for key, one in chosen.items() if held.sites[key].parameter == parameter}
        owner = held.sites[next(iter(group))].owner
        owner.__dict__[parameter] = with_updates(held, parameter, group)


def _takes_place(site: Site, adapter: Adapter, x: Tensor, *, resized: bool) -> bool:
    """Tell whether W + ΔW takes the weight's place, which a layer that reads a quantised weight would not stand."""
    if not resized and not adapter.materialises(x):  # where the call says its output's size, the operator is another
        return False
    return isinstance(site.operator, ParameterOperator) or not is_quantised(parameter_of(site.owner, site.parameter))


def _unshadow(held: AdapterDict, host: nn.Module, args: tuple[Any, ...], output: object) -> None:
    """Let the parameters be seen again, also after an error."""
    for key in held.shadowed:
        held.sites[key].owner.__dict__.pop(held.sites[key].parameter, None)
    held.shadowed = ()
