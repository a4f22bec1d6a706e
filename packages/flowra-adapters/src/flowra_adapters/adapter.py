"""The seam between a method and the machinery.

A method says how its update is parameterised, applied, materialised, resized and counted. It never touches the layer
it adapts: the machinery (:mod:`flowra_adapters.attach`, :mod:`flowra_adapters.merge`, the readers and writers) does
that once for all methods.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Adapter", "AdapterDict"]


class Adapter(nn.Module, ABC):
    """One method's update of one layer's weight.

    Attributes:
        scaling: the factor ``s`` of the update. Fixed at birth: it does not depend on the current rank, so that growing
            or shrinking never rescales the directions that stay.
        enabled: whether the layer adds this update to its output.
    """

    scaling: float
    enabled: bool

    @property
    @abstractmethod
    def rank(self) -> int:
        """Current rank, ≥ 0. An adapter of rank 0 holds no parameters and contributes nothing, but may grow."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply the update to the layer's input; the result is added to the layer's output."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """Materialise ΔW as ``(m, n)``, output by input, in the dtype of the adapter (at least float32)."""

    def plain_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return (A ``(r, n)``, B ``(m, r)``) if the update in this pass is exactly s · (x Aᵀ) Bᵀ, else None.

        The machinery then applies them faster than :meth:`forward`, which nobody sees being called.
        """
        return None

    @abstractmethod
    def grow(self, rows: Tensor) -> None:
        """Append directions given by their input side; the output does not change."""

    @abstractmethod
    def shrink(self, keep: Sequence[int]) -> None:
        """Keep the directions with these indices, in this order, and drop the others."""

    @property
    @abstractmethod
    def cost_per_rank(self) -> int:
        """Parameters that one more unit of rank costs."""

    def num_parameters(self) -> int:
        """Count the adapter's parameters at its current rank."""
        return sum(parameter.numel() for parameter in self.parameters())


class AdapterDict(nn.ModuleDict):
    """The adapters of one layer, by name, and what merging them needs to remember.

    Attributes:
        merged: names of the adapters whose updates are in the layer's weight now.
        kept_weight: the base weight before the first merge, if it is kept.
        added: sum of the updates in the weight, if the base weight is not kept.
        hook: what adds the updates to the layer's output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.merged: tuple[str, ...] = ()
        self.kept_weight: Tensor | None = None
        self.added: Tensor | None = None
        self.hook: torch.utils.hooks.RemovableHandle | None = None

    def active(self) -> dict[str, Adapter]:
        """Return the adapters whose update must be added to the output now."""
        return {
            name: adapter
            for name, adapter in self.items()
            if isinstance(adapter, Adapter) and adapter.enabled and adapter.rank > 0 and name not in self.merged
        }
