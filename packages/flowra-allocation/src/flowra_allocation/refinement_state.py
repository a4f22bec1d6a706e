"""What a refinement needs to go on in another process; :mod:`flowra_allocation.refinement_files` keeps it.

The values of the factors are not part of it. They are in the checkpoint of the model; this says what ranks they have.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from flowra_allocation.forms import RANK_AXIS, AnyLayer, factors, has_slots, has_triplets
from flowra_allocation.rank_history import RankHistory

__all__ = ["Form", "Gathered", "LayerForm", "RefinementState", "check_same_run", "form_of", "take_rank"]

Form = Literal["pair", "triplets", "slots"]
Gathered = Mapping[str, Mapping[str, Tensor]]
"""Module name to name to tensor, as :meth:`BottleneckObserver.gathered` gives them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerForm:
    """One update, but for its rank."""

    form: Form
    """As in :mod:`flowra_allocation.forms`."""
    shape: tuple[int, int]
    """(m, n): rows of B, columns of A."""
    cost: int
    """Parameters per direction."""
    cap: int
    """Largest rank."""
    floor: int
    """Least rank."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RefinementState:
    """A refinement between two steps of the optimiser."""

    format_version: ClassVar[int] = 2

    step: int
    """Finished optimiser steps of the whole run."""
    seed: int
    """Of what is drawn at events."""
    loss: Literal["mean", "sum"]
    """What the training loss is over the examples of a batch."""
    layers: Mapping[str, LayerForm]
    """Module name to form."""
    history: RankHistory
    """What happened so far; also says the policy, and the ranks now."""
    slots: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Module name to mask and order, where the form is slots."""
    policy: Mapping[str, Tensor] = field(default_factory=dict)
    """What :meth:`Policy.state` gives, in its order."""
    watched: tuple[Gathered, ...] = ()
    """What each process has gathered for the next event; empty if nothing is being watched."""

    @property
    def ranks(self) -> Mapping[str, int]:
        """Module name to rank now."""
        return self.history.events[-1].ranks if self.history.events else self.history.initial


def form_of(layer: AnyLayer, *, cost: int, cap: int, floor: int = 0) -> LayerForm:
    """Return the form of an update."""
    form: Form = "slots" if has_slots(layer) else "triplets" if has_triplets(layer) else "pair"
    return LayerForm(form=form, shape=(len(layer.lora_B), layer.lora_A.shape[1]), cost=cost, cap=cap, floor=floor)


@torch.no_grad()
def take_rank(layer: AnyLayer, rank: int, slots: tuple[Tensor, Tensor] | None) -> None:
    """Give an update a rank, and its slots where it has them. All values become NaN: they have to be loaded next."""
    if has_slots(layer):
        assert slots is not None
        layer.mask.copy_(slots[0])
        layer.order.copy_(slots[1])
        for each in factors(layer).values():
            each.fill_(math.nan)
        return
    values = {}
    for name, each in factors(layer).items():
        shape = list(each.shape)
        shape[RANK_AXIS[name]] = rank
        values[name] = each.detach().new_full(shape, math.nan)
    cast(Any, layer).replace_factors(**values)  # with E or without


def check_same_run(found: RefinementState, mine: RefinementState, processes: int) -> None:
    """Refuse the state of a refinement of other layers, policy or settings, or of another number of processes.

    Raises:
        ValueError: if it is one.
    """
    pairs: dict[str, tuple[object, object]] = {
        "seed": (found.seed, mine.seed),
        "loss": (found.loss, mine.loss),
        "layers": (sorted(found.layers), sorted(mine.layers)),
        **{f"layer {name!r}": (form, mine.layers.get(name)) for name, form in found.layers.items()},
        **{
            f"slots of {name!r}": (tuple(mask.shape), tuple(mine.slots[name][0].shape) if name in mine.slots else None)
            for name, (mask, _) in found.slots.items()
        },
        **{
            name: (getattr(found.history, name), getattr(mine.history, name))
            for name in ("policy", "settings", "steps", "budget")
        },
        "processes": (len(found.watched) or processes, processes),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(
                f"refinement state must be of the same run, got {what} {theirs} where it is {ours} now."
                " Resume with what the run began with."
            )
