"""What an optimiser remembers of a Parameter, carried to the Parameter that takes its place.

The new Parameter stands where the old one stood in its parameter group, so learning rate, weight decay, names and every
scheduler stay. What is remembered is mapped by what it is (:mod:`flowra_allocation.changes`); what is not known is
refused, before anything is changed. Served are

- Adam, AdamW, NAdam, RAdam, SGD, Muon and Adafactor of torch;
- Adafactor of transformers;
- the 8-bit and 32-bit Adam, AdamW, Lion and SGD of bitsandbytes (:mod:`flowra_allocation.quantised_moments`);
- LoRA-FA's optimiser of PEFT, which remembers B by the name of its layer;
- any other whose state is seen to be made of moments under the same names, once it has stepped.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_allocation.changes import Change
from flowra_allocation.factored_moments import KEYS, carry_means
from flowra_allocation.quantised_moments import (
    carry_quantised,
    check_quantised,
    hand_over_overrides,
    is_of_bitsandbytes,
)
from flowra_allocation.sharding import sharded_like, whole

__all__ = ["adopt", "carry_over", "check_optimizer", "held_by", "release", "state_keys"]

KNOWN = ("Adam", "AdamW", "NAdam", "RAdam", "SGD", "Muon", "Adafactor", "LoraFAOptimizer")
MOMENTS: Mapping[str, Callable[[Change, Tensor], Tensor]] = MappingProxyType({
    "exp_avg": lambda change, old: change.first(old),
    "momentum_buffer": lambda change, old: change.first(old),
    "exp_avg_B": lambda change, old: change.displacement(old),  # LoRA-FA averages steps of B: g_B (A Aᵀ)⁻¹
    "exp_avg_sq": lambda change, old: change.second(old, change.axis),
    "exp_avg_sq_B": lambda change, old: change.second(old, change.axis),
    "max_exp_avg_sq": lambda change, old: change.second(old, change.axis),
    "variance": lambda change, old: change.second(old, change.axis),
})
MEANS = frozenset(key for pair in KEYS for key in pair)


def held_by(optimizer: Optimizer) -> frozenset[int]:
    """Return the :func:`id` of every parameter in the optimiser's groups."""
    return frozenset(id(each) for group in _innermost(optimizer).param_groups for each in group["params"])


def check_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse, before anything is changed, an optimiser that lacks a parameter or whose state is not understood.

    A frozen parameter (A of LoRA-FA) need not be held.

    Raises:
        ValueError: if it does, or is not.
    """
    optimizer = _innermost(optimizer)
    places = _places(optimizer)
    held = [parameter for parameter in parameters if id(parameter) in places or parameter.requires_grad]
    if not all(id(parameter) in places for parameter in held):
        raise ValueError("optimizer must hold the layer's factors, got one that does not. Build it after attaching.")
    name = type(optimizer).__name__
    others = {key: value for key, value in vars(optimizer).items() if key not in {"param_groups", "state"}}
    also = {id(each): key for key, value in others.items() for each in _elements(value)}
    elsewhere = sorted({also[id(parameter)] for parameter in held if id(parameter) in also})
    if elsewhere:
        raise ValueError(
            f"optimizer must hold the layer's factors in its groups alone, got {name}, which has them in {elsewhere}"
            " too. Use AdamW."
        )
    if is_of_bitsandbytes(optimizer):
        check_quantised(optimizer)
        return
    familiar = any(each.__name__ in KNOWN for each in type(optimizer).__mro__)
    for parameter in held:
        own = optimizer.state.get(_key(optimizer, parameter, places[id(parameter)]), {})
        seen = [own] if own or familiar else [each for each in optimizer.state.values() if each]
        if not seen:
            raise ValueError(
                f"optimizer must be one of {list(KNOWN)} before its first step, got {name}. Take a step, so that its"
                " state can be seen, or use AdamW."
            )
        unknown = sorted({key for state in seen for key, value in state.items() if not _is_known(key, value)})
        unknown += [key for key in own if key in MOMENTS and _shape(own[key]) not in (None, parameter.shape)]
        if unknown:
            raise ValueError(
                f"optimizer state must be moments as those of {', '.join(KNOWN)}, got {unknown} in {name}. Use AdamW."
            )


def carry_over(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, change: Change) -> None:
    """Put ``new`` in the place of ``old`` (they may be one), with what the optimiser remembers mapped by the change.

    Where there was no direction before, the optimiser starts afresh.
    """
    optimizer = _innermost(optimizer)
    place = _place(optimizer, old)
    if place is None:
        return
    group, index = place
    key = _key(optimizer, old, place)
    optimizer.param_groups[group]["params"][index] = new
    state = optimizer.state.pop(key, None)
    if is_of_bitsandbytes(optimizer):
        hand_over_overrides(optimizer, old, new)
    if not state or change.from_nothing(old):
        return
    if is_of_bitsandbytes(optimizer):
        carry_quantised(optimizer, state, new, change, place)
        return
    mapped = _mapped({name: _whole(value) for name, value in state.items()}, old.ndim, change)
    optimizer.state[new if key is old else key] = {
        name: _placed(value, new, state[name]) for name, value in mapped.items()
    }


def adopt(optimizer: Optimizer, parameter: nn.Parameter, *, name: str, beside: nn.Parameter) -> None:
    """Put a Parameter that a layer did not have before at the end of the group of its ``lora_B``."""
    optimizer = _innermost(optimizer)
    place = _place(optimizer, beside)
    if place is None or not parameter.requires_grad:
        return
    group = optimizer.param_groups[place[0]]
    group["params"].append(parameter)
    if "param_names" in group:
        group["param_names"].append(group["param_names"][place[1]].replace("lora_B", name))


def release(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Take a Parameter that a layer has no more out of its group, and forget its state."""
    optimizer = _innermost(optimizer)
    place = _place(optimizer, parameter)
    if place is not None:
        optimizer.state.pop(_key(optimizer, parameter, place), None)
        group = optimizer.param_groups[place[0]]
        for key in {"params", "param_names"} & group.keys():
            del group[key][place[1]]


def _mapped(state: Mapping[str, Any], ndim: int, change: Change) -> dict[str, Any]:
    means = carry_means(state, ndim=ndim, change=change)
    return {
        key: MOMENTS[key](change, value) if key in MOMENTS and isinstance(value, Tensor) else means.get(key, value)
        for key, value in state.items()
    }


def _whole(value: Any) -> Any:  # noqa: ANN401 - whatever a state holds
    return whole(value) if isinstance(value, Tensor) else value


def _placed(value: Any, new: nn.Parameter, old: Any) -> Any:  # noqa: ANN401 - whatever a state holds
    """Shard a value like the Parameter it belongs to, or, where it has another shape, as it was."""
    if not isinstance(value, Tensor):
        return value
    return sharded_like(value, new if value.shape == new.shape else old)


def _innermost(optimizer: Optimizer) -> Optimizer:
    """Return what a wrapper (of accelerate) holds."""
    inner = getattr(optimizer, "optimizer", None)
    return _innermost(inner) if isinstance(inner, Optimizer) else optimizer


def _places(optimizer: Optimizer) -> dict[int, tuple[int, int]]:
    """Map the id of each parameter to the index of the group that holds it, and its own in that group."""
    return {
        id(held): (number, index)
        for number, group in enumerate(optimizer.param_groups)
        for index, held in enumerate(group["params"])
    }


def _place(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[int, int] | None:
    """Look up one parameter in what :func:`_places` would return."""
    for number, group in enumerate(optimizer.param_groups):
        for index, held in enumerate(group["params"]):
            if held is parameter:
                return number, index
    return None


def state_keys(optimizer: Optimizer) -> dict[nn.Parameter, Any]:
    """Return what the optimiser has each parameter's state under: itself, or for LoRA-FA's the name of a layer."""
    return {
        parameter: _key(optimizer, parameter, (number, index))
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    }


def _key(optimizer: Optimizer, parameter: nn.Parameter, place: tuple[int, int]) -> Any:  # noqa: ANN401 - see Returns
    """Return the parameter, or the name under which LoRA-FA's optimiser has the state of B."""
    group = optimizer.param_groups[place[0]]
    if not any(each.__name__ == "LoraFAOptimizer" for each in type(optimizer).__mro__):
        return parameter
    name: str = group["names"][place[1]]
    if "lora_A" in name:
        return parameter  # shares the name with B, and has no state
    return name[: name.find("lora")] + "lora" if "lora" in name else name


def _is_known(key: str, value: object) -> bool:
    """Tell whether a value can be mapped, or does not depend on the factor's size."""
    if key in MOMENTS or key in MEANS:
        return value is None or type(value) is Tensor or hasattr(value, "full_tensor")
    return (
        value is None or isinstance(value, (bool, int, float, str)) or (isinstance(value, Tensor) and value.ndim == 0)
    )


def _shape(value: object) -> object:
    return value.shape if isinstance(value, Tensor) else None


def _elements(value: object) -> Iterable[object]:
    """Return what a container holds, or the value itself."""
    if isinstance(value, Mapping):
        return (*value.keys(), *value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return cast(Iterable[object], value)
    return (value,)
