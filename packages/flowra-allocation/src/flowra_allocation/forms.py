"""The low-rank updates that refinement can move, as it sees them (docs/methods.md, section 7).

=========  ==============================  ====================================================================
form       update                          how its rank changes
=========  ==============================  ====================================================================
pair       ΔW = s · B A                    factors become new Parameters
triplets   ΔW = s · B diag(E) A            factors become new Parameters
slots      ΔW = s · B diag(E ⊙ μ) A        the mask μ over a fixed number of slots changes; Parameters stay
=========  ==============================  ====================================================================

``flowra_adapters`` has all three (``LoRA`` and ``DoRA``, ``SVDForm``, ``MaskedSVDForm``);
:mod:`flowra_allocation.peft_layers` shows a LoRA layer of PEFT as a pair.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from flowra_allocation.sharding import whole

__all__ = [
    "RANK_AXIS",
    "AnyLayer",
    "Recorded",
    "RefinableLayer",
    "SlottedLayer",
    "TripletLayer",
    "changed_together",
    "directions_of",
    "factors",
    "has_slots",
    "has_triplets",
    "live_factors",
    "live_slots",
]

RANK_AXIS: Mapping[str, int] = {"lora_A": 0, "lora_E": 0, "lora_B": 1}
"""Factor to the axis that counts directions: A is ``(r, n)``, E ``(r,)``, B ``(m, r)``."""


class RefinableLayer(Protocol):
    """A low-rank update that can be observed and resized: the form *pair*, and what all forms have."""

    scaling: float
    observer: Callable[[Tensor], None] | None
    """Called with z = A x (z = E ⊙ A x where there is an E), channels last, on every forward pass."""

    @property
    def lora_A(self) -> nn.Parameter:
        """A, ``(r, n)``."""

    @property
    def lora_B(self) -> nn.Parameter:
        """B, ``(m, r)``."""

    @property
    def rank(self) -> int:
        """Number of directions."""

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Install new factors of a common rank as new Parameters."""


class TripletLayer(Protocol):
    """An update whose directions are triplets a_k, E_k, b_k."""

    scaling: float
    lora_A: nn.Parameter
    lora_E: nn.Parameter
    lora_B: nn.Parameter
    observer: Callable[[Tensor], None] | None

    @property
    def rank(self) -> int:
        """Number of directions."""

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor) -> None:
        """Install new factors of a common rank."""

    def grow(self, rows: Tensor) -> None:
        """Append directions with these rows ``(k, n)`` and E = 0; lengths are matched to those that are there."""


class SlottedLayer(TripletLayer, Protocol):
    """Triplets in a fixed number of slots."""

    mask: Tensor
    """``(slots,)``, bool: which slots hold a direction."""
    order: Tensor
    """``(slots,)``, int64: directions are counted by rising values."""

    def slots(self) -> list[int]:
        """Return where the directions lie, in their order."""

    def shrink(self, keep: Sequence[int]) -> None:
        """Mask all directions but these."""


@runtime_checkable
class Recorded(Protocol):
    """An update whose rank is also written down elsewhere, together with those of others."""

    def recorded_once(self) -> AbstractContextManager[None]:
        """Put off writing to the end of a ``with`` block, or of the outermost of several."""


AnyLayer = RefinableLayer | TripletLayer


def has_triplets(layer: AnyLayer) -> TypeGuard[TripletLayer]:
    """Tell whether the update has an E."""
    return hasattr(layer, "lora_E")


def has_slots(layer: AnyLayer) -> TypeGuard[SlottedLayer]:
    """Tell whether the update's tensors keep their shapes."""
    return hasattr(layer, "mask")


@contextmanager
def changed_together(layers: Iterable[AnyLayer]) -> Iterator[None]:
    """Change many layers: what is written down of all of them is written once, at the end, also after an error."""
    with ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, Recorded):
                stack.enter_context(layer.recorded_once())
        yield


def live_slots(layer: AnyLayer) -> list[int]:
    """Return the indices along the rank axes that hold a direction, in the order of directions."""
    return layer.slots() if has_slots(layer) else list(range(layer.rank))


def factors(layer: AnyLayer) -> dict[str, nn.Parameter]:
    """Return the Parameters of an update by name, free slots included."""
    return {name: getattr(layer, name) for name in RANK_AXIS if hasattr(layer, name)}


def live_factors(layer: AnyLayer) -> dict[str, Tensor]:
    """Return the values of the directions that are there, whole, detached, in their order; not to be written to."""
    values = {name: whole(each.detach()) for name, each in factors(layer).items()}
    return directions_of(layer, values)


def directions_of(layer: AnyLayer, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what belongs to the directions that are there, in their order, of values shaped as the factors.

    Where there are no slots these are the values themselves.
    """
    if not has_slots(layer):
        return dict(values)
    index = torch.tensor(live_slots(layer), dtype=torch.long, device=layer.lora_A.device)
    return {name: each.index_select(RANK_AXIS[name], index) for name, each in values.items()}
