"""Let an optimiser go on where a model, or a layer of it, has been made anew: compacted, sharded, or both."""

from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from flowra_allocation.changes import Change, Kept, Same
from flowra_allocation.forms import RANK_AXIS, AnyLayer, has_slots
from flowra_allocation.optimizer_state import carry_over, check_optimizer, release

__all__ = ["hand_over"]


def hand_over(optimizer: Optimizer, old: nn.Module, new: nn.Module) -> None:
    """Put the Parameters of ``new`` in the places of those of ``old``, with what the optimiser remembers of them.

    Parameters belong together by name. Where an update had slots and has none now, it was compacted: its directions
    keep their moments, in their order, and what is remembered of free slots goes. So training goes on as it would
    have, to rounding. Of an update that has no direction left nothing stays. Values are not touched, and schedulers
    stay. Call it between two steps, on all processes.

    Args:
        optimizer: holds those Parameters of ``old`` that are trained.
        old: a layer or a model, not inside a wrapper, whose Parameters may be sharded.
        new: likewise; what it shares with ``old`` stays.

    Raises:
        ValueError: if Parameters do not belong together, or the optimiser cannot be handed over; nothing is changed
            then.
    """
    theirs, modules = dict(new.named_parameters()), dict(new.named_modules())
    pairs: list[tuple[nn.Parameter, nn.Parameter | None, Change]] = []
    for name, parameter in old.named_parameters():
        where, _, factor = name.rpartition(".")
        change = _change(old.get_submodule(where), modules.get(where), factor)
        nothing_left = isinstance(change, Kept) and len(change.index) == 0
        replacement = None if nothing_left else theirs.get(name)
        if replacement is parameter:
            continue
        if not nothing_left:
            shape = list(parameter.shape)
            if isinstance(change, Kept):
                shape[change.axis] = len(change.index)
            if replacement is None or list(replacement.shape) != shape:
                found = "none" if replacement is None else list(replacement.shape)
                raise ValueError(f"new must have the parameters of old, got {found} for {name!r} of shape {shape}")
        pairs.append((parameter, replacement, change))
    check_optimizer(optimizer, [parameter for parameter, _, _ in pairs])
    for parameter, replacement, change in pairs:
        if replacement is None:
            release(optimizer, parameter)
        else:
            carry_over(optimizer, parameter, replacement, change)


def _change(before: nn.Module, after: nn.Module | None, factor: str) -> Change:
    """Say what happened to one Parameter of a module."""
    layer = cast(AnyLayer, before)
    if factor not in RANK_AXIS or not has_slots(layer) or (after is not None and has_slots(cast(AnyLayer, after))):
        return Same()
    return Kept(RANK_AXIS[factor], torch.tensor(layer.slots(), dtype=torch.long, device=layer.mask.device))
