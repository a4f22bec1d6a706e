"""What a change of rank does to one factor, its optimiser state and its running averages (docs/methods.md, section 8).

A change knows the axis along which the factor counts its directions, and maps three kinds of values:

- ``value``: the factor itself, or an average of it;
- ``first``: a first moment, which goes where gradients go;
- ``second``: a second moment, of which new or re-based directions take the mean. Some optimisers keep only its sums
  over rows or columns; then ``axis`` says where the directions lie in what is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Change", "Grown", "Kept", "Overwritten", "Rebased"]


class Change(Protocol):
    """How the directions of one factor change."""

    @property
    def axis(self) -> int:
        """Axis of the factor along which its directions lie."""

    def value(self, old: Tensor) -> Tensor:
        """Map values of the factor."""

    def first(self, old: Tensor) -> Tensor:
        """Map a first moment, shaped like the factor."""

    def second(self, old: Tensor, axis: int) -> Tensor:
        """Map a second moment whose directions lie along ``axis``."""


@dataclass(frozen=True, eq=False, slots=True)
class Kept:
    """Directions ``index`` stay, in this order; all they have stays with them."""

    axis: int
    index: Tensor

    def value(self, old: Tensor) -> Tensor:
        """Select the directions."""
        return old.index_select(self.axis, self.index)

    def first(self, old: Tensor) -> Tensor:
        """Select the directions."""
        return old.index_select(self.axis, self.index)

    def second(self, old: Tensor, axis: int) -> Tensor:
        """Select the directions."""
        return old.index_select(axis, self.index)


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

    def second(self, old: Tensor, axis: int) -> Tensor:
        """Append the mean."""
        return torch.cat([old, _filled(old, axis, self._count, _mean(old))], axis)


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

    def second(self, old: Tensor, axis: int) -> Tensor:
        """Put the mean everywhere: squares do not transform."""
        return _filled(old, axis, self.size, _mean(old))


@dataclass(frozen=True, eq=False, slots=True)
class Overwritten:
    """Directions with the values ``entries`` are written into the slots ``index``; ``live`` slots were in use."""

    axis: int
    index: Tensor
    live: Tensor
    entries: Tensor

    def value(self, old: Tensor) -> Tensor:
        """Write the entries."""
        return old.index_copy(self.axis, self.index, self.entries.to(old))

    def first(self, old: Tensor) -> Tensor:
        """Write zeros."""
        return old.index_fill(self.axis, self.index, 0)

    def second(self, old: Tensor, axis: int) -> Tensor:
        """Write the mean of the slots in use."""
        mean = _mean(old.index_select(axis, self.live))
        return old.index_copy(axis, self.index, _filled(old, axis, len(self.index), mean))


def _mean(moment: Tensor) -> Tensor:
    return moment.mean() if moment.numel() else moment.new_zeros(())


def _filled(like: Tensor, axis: int, size: int, value: Tensor) -> Tensor:
    """Return a tensor shaped like another but ``size`` long along one axis, of one value."""
    shape = list(like.shape)
    shape[axis] = size
    return value.expand(shape).clone()
