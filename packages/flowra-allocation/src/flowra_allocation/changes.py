"""What a change of rank does to one factor, its optimiser state and its running averages (docs/methods.md, section 8).

A change knows the axis along which the factor counts its directions, and maps four kinds of values:

- ``value``: the factor itself, or an average of it;
- ``first``: a gradient, or an average of gradients;
- ``displacement``: an average of steps, which goes where the factor goes;
- ``second``: a second moment, of which new or re-based directions take the mean. Some optimisers keep only its means
  over rows or columns; then ``axis`` says where the directions lie in what is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Change", "Grown", "Kept", "Overwritten", "Rebased", "Same"]


class Change(Protocol):
    """How the directions of one factor change."""

    @property
    def axis(self) -> int:
        """Axis of the factor along which its directions lie."""

    def value(self, old: Tensor) -> Tensor:
        """Map values of the factor."""

    def first(self, old: Tensor) -> Tensor:
        """Map a gradient or a first moment, shaped like the factor."""

    def displacement(self, old: Tensor) -> Tensor:
        """Map an average of steps, shaped like the factor."""

    def second(self, old: Tensor, axis: int) -> Tensor:
        """Map a second moment whose directions lie along ``axis``."""

    def from_nothing(self, old: Tensor) -> bool:
        """Tell whether there was no direction before, so that nothing is known of those that come."""


@dataclass(frozen=True, eq=False, slots=True)
class Same:
    """Nothing changes but the Parameter that holds the values."""

    axis: int = 0

    def value(self, old: Tensor) -> Tensor:
        """Return the values."""
        return old

    def first(self, old: Tensor) -> Tensor:
        """Return the values."""
        return old

    def displacement(self, old: Tensor) -> Tensor:
        """Return the values."""
        return old

    def second(self, old: Tensor, axis: int) -> Tensor:
        """Return the values."""
        return old

    def from_nothing(self, old: Tensor) -> bool:
        """Tell whether there are no values."""
        return old.numel() == 0


@dataclass(frozen=True, eq=False, slots=True)
class Kept:
    """Directions ``index`` stay, in this order; all they have stays with them."""

    axis: int
    index: Tensor

    def value(self, old: Tensor) -> Tensor:
        """Select the directions."""
        return self.second(old, self.axis)

    def first(self, old: Tensor) -> Tensor:
        """Select the directions."""
        return self.second(old, self.axis)

    def displacement(self, old: Tensor) -> Tensor:
        """Select the directions."""
        return self.second(old, self.axis)

    def second(self, old: Tensor, axis: int) -> Tensor:
        """Select the directions."""
        return old.index_select(axis, self.index.to(old.device))

    def from_nothing(self, old: Tensor) -> bool:
        """Tell whether there was no direction before."""
        return old.numel() == 0


@dataclass(frozen=True, eq=False, slots=True)
class Grown:
    """Directions with the values ``entries`` are appended."""

    axis: int
    entries: Tensor

    @property
    def _count(self) -> int:
        return self.entries.shape[self.axis]

    def value(self, old: Tensor) -> Tensor:
        """Append the entries."""
        return torch.cat([old, self.entries.to(old)], self.axis)

    def first(self, old: Tensor) -> Tensor:
        """Append zeros."""
        return torch.cat([old, torch.zeros_like(self.entries, dtype=old.dtype, device=old.device)], self.axis)

    def displacement(self, old: Tensor) -> Tensor:
        """Append zeros."""
        return self.first(old)

    def second(self, old: Tensor, axis: int) -> Tensor:
        """Append the mean."""
        return torch.cat([old, _filled(old, axis, self._count, _mean(old))], axis)

    def from_nothing(self, old: Tensor) -> bool:
        """Tell whether there was no direction before."""
        return old.numel() == 0


@dataclass(frozen=True, eq=False, slots=True)
class Rebased:
    """The factor is multiplied by a matrix along its axis; ``size`` directions result."""

    axis: int
    size: int
    value_map: Callable[[Tensor], Tensor]
    first_map: Callable[[Tensor], Tensor]

    def value(self, old: Tensor) -> Tensor:
        """Multiply by the matrix, in float64."""
        return self.value_map(old.double()).to(old)

    def first(self, old: Tensor) -> Tensor:
        """Transform as gradients do, in float64."""
        return self.first_map(old.double()).to(old)

    def displacement(self, old: Tensor) -> Tensor:
        """Multiply by the matrix, as the factor."""
        return self.value(old)

    def second(self, old: Tensor, axis: int) -> Tensor:
        """Put the mean everywhere: squares do not transform."""
        return _filled(old, axis, self.size, _mean(old))

    def from_nothing(self, old: Tensor) -> bool:
        """Tell whether there was no direction before."""
        return old.numel() == 0


@dataclass(frozen=True, eq=False, slots=True)
class Overwritten:
    """Directions with the values ``entries`` are written into the slots ``index``; ``live`` slots were in use."""

    axis: int
    index: Tensor
    live: Tensor
    entries: Tensor

    def value(self, old: Tensor) -> Tensor:
        """Write the entries."""
        return old.index_copy(self.axis, self.index.to(old.device), self.entries.to(old))

    def first(self, old: Tensor) -> Tensor:
        """Write zeros."""
        return old.index_fill(self.axis, self.index.to(old.device), 0)

    def displacement(self, old: Tensor) -> Tensor:
        """Write zeros."""
        return self.first(old)

    def second(self, old: Tensor, axis: int) -> Tensor:
        """Write the mean of the slots in use."""
        mean = _mean(old.index_select(axis, self.live.to(old.device)))
        return old.index_copy(axis, self.index.to(old.device), _filled(old, axis, len(self.index), mean))

    def from_nothing(self, old: Tensor) -> bool:
        """Tell whether no slot was in use before."""
        return len(self.live) == 0


def _mean(moment: Tensor) -> Tensor:
    return moment.mean() if moment.numel() else moment.new_zeros(())


def _filled(like: Tensor, axis: int, size: int, value: Tensor) -> Tensor:
    """Return a tensor shaped like another but ``size`` long along one axis, of one value."""
    shape = list(like.shape)
    shape[axis] = size
    return value.expand(shape).clone()
