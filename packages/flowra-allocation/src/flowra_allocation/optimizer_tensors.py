"""What an optimiser remembers, as tensors by parameter name: for checkpoints without pickle, over a change of rank.

``torch.save(optimizer.state_dict())`` is a pickle and counts parameters instead of naming them. Here every value has
the name of its parameter, so a file of them can be read, checked and compared.

=================================  ====================================================
name                               tensor
=================================  ====================================================
``state/<key>/<parameter name>``   what is remembered, such as ``exp_avg``, as it is
``count/<key>/<parameter name>``   what is remembered as a number, 0-d
``group/<index>/<key>``            a number of a parameter group, such as ``lr``, 0-d; several, such as ``betas``, 1-d
=================================  ====================================================

What LoRA-FA's optimiser of PEFT remembers by the name of a layer has the name of its B. Of sharded parameters
(``fully_shard``) the tensors are whole; call both functions on all processes then.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_allocation.optimizer_state import state_keys
from flowra_allocation.sharding import sharded_like, whole
from flowra_allocation.wrapping import reshard

__all__ = ["optimizer_tensors", "restore_optimizer"]

OF_EVERY_ENTRY = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_avg_B", "exp_avg_sq_B"}
"""What has the shape of its parameter."""
SCHEDULED = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
"""What schedules of torch write into a parameter group, which need not be there before they are made."""


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copy the optimiser's state and the numbers of its parameter groups to the CPU.

    Args:
        model: that names the parameters.
        optimizer: of some of its parameters.

    Returns:
        Name to tensor, as in the table above; what is None is left out.

    Raises:
        ValueError: if the optimiser holds a parameter that the model does not have.
        TypeError: if something that is remembered is neither a tensor nor a number.
    """
    reshard(model)
    tensors = {}
    owners = {key: parameter for parameter, key in state_keys(optimizer).items()}
    for owner, state in optimizer.state.items():
        name = _name(model, owners.get(owner, owner))
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"state/{key}/{name}"] = whole(value.detach()).to("cpu", copy=True).contiguous()
            elif value is not None:
                tensors[f"count/{key}/{name}"] = _number(value, key)
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if type(value) in {int, float}:
                tensors[f"group/{index}/{key}"] = _number(value, key)
            elif _are_numbers(value):
                tensors[f"group/{index}/{key}"] = torch.tensor(value, dtype=torch.float64)
            elif isinstance(value, Tensor) and value.ndim == 0:
                tensors[f"group/{index}/{key}"] = value.detach().to("cpu", copy=True)
    return tensors


def restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give a new optimiser what another remembered; call when the model has the ranks that it had then.

    Args:
        model: that names the parameters.
        optimizer: built as the other was, over parameters of the same names and shapes.
        tensors: from :func:`optimizer_tensors`.

    Raises:
        ValueError: if a tensor has no place; nothing is changed then.
    """
    reshard(model)
    parameters = dict(model.named_parameters())
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    keys = state_keys(optimizer)
    states: dict[Any, dict[str, object]] = {}
    numbers: list[tuple[dict[str, Any], str, Tensor]] = []
    for full_name, value in tensors.items():
        kind, _, rest = full_name.partition("/")
        key, _, name = rest.partition("/")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"tensors must be finite, got NaN or infinity in {full_name!r}")
        if kind == "group" and key.isdecimal() and int(key) < len(optimizer.param_groups):
            group = optimizer.param_groups[int(key)]
            _check_has_place(group, name, value, full_name)
            numbers.append((group, name, value))
            continue
        parameter = parameters.get(name)
        if kind not in {"state", "count"} or parameter is None or id(parameter) not in groups:
            raise ValueError(f"tensors must be of parameters that the optimizer holds, got {full_name!r}")
        if kind == "count":
            states.setdefault(keys[parameter], {})[key] = value.item()
            continue
        if value.shape != parameter.shape and key in OF_EVERY_ENTRY:
            raise ValueError(
                f"tensors must fit their parameters, got {tuple(value.shape)} for {tuple(parameter.shape)} in"
                f" {full_name!r}. Restore the refinement before the optimizer."
            )
        group = groups[id(parameter)]
        on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))  # as load_state_dict has it
        placed = value.to("cpu" if on_cpu else parameter.device, copy=True)
        placed = sharded_like(placed, parameter) if value.shape == parameter.shape else placed
        states.setdefault(keys[parameter], {})[key] = placed
    optimizer.state.clear()
    optimizer.state.update(states)
    for group, key, value in numbers:
        held = group.get(key)
        if isinstance(held, Tensor):
            held.fill_(value.item())
        else:
            group[key] = value.item() if value.ndim == 0 else tuple(value.tolist())


def _name(model: nn.Module, parameter: Tensor | str) -> str:
    for name, each in model.named_parameters():
        if each is parameter:
            return name
    got = parameter if isinstance(parameter, str) else f"of shape {tuple(parameter.shape)}"
    raise ValueError(f"optimizer must hold parameters of the model, got another {got}")


def _check_has_place(group: Mapping[str, Any], key: str, value: Tensor, full_name: str) -> None:
    """Refuse what would put a number in the place of something else."""
    held = group.get(key, 0.0 if key in SCHEDULED else None)
    one = type(held) in {int, float} or (isinstance(held, Tensor) and held.ndim == 0)
    if not (value.shape == () if one else _are_numbers(held) and value.shape == (len(held),)):
        raise ValueError(f"tensors must be numbers that the optimizer's groups have, got {full_name!r}")


def _are_numbers(value: object) -> TypeGuard[tuple[float, ...]]:
    """Tell whether it is several numbers, as ``betas`` are."""
    return isinstance(value, tuple) and bool(value) and all(type(each) in {int, float} for each in value)


def _number(value: object, key: str) -> Tensor:
    if type(value) not in {int, float}:
        raise TypeError(
            f"what an optimizer remembers must be tensors and numbers, got {type(value).__name__} in {key!r}"
        )
    return torch.tensor(value, dtype=torch.int64 if type(value) is int else torch.float64)
