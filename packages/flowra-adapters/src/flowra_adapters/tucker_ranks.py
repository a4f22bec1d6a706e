"""How one rank becomes the ranks (r_1, r_2, …) of a Tucker update: one for each axis of the weight.

Axes of a weight ``(m, n/g, *kernel)``: output, input of one group, kernel. The rank r stands for r_1 = r_2 = r; an axis
of a kernel has a small rank of its own. All axes of a raw parameter follow r. No axis has more than its size, nor more
than the product of the other ranks, for what lies above changes nothing but the number of parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowra_adapters.operators import Operator, ParameterOperator

__all__ = ["TuckerRanks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TuckerRanks:
    """Limits of the ranks; all ≥ 1.

    >>> from flowra_adapters.operators import ConvOperator
    >>> TuckerRanks().of(ConvOperator((64, 32, 3, 3)), 8)
    (8, 8, 2, 2)
    >>> TuckerRanks(kernel=1, largest_in=4).of(ConvOperator((64, 32, 3, 3)), 8)
    (4, 4, 1, 1)
    >>> TuckerRanks().of(ConvOperator((96, 1, 7, 7), groups=96), 8)  # depthwise: more than 1 · 2 · 2 is redundant
    (4, 1, 2, 2)
    """

    kernel: int = 2
    """Of each axis of a kernel."""
    largest_out: int | None = None
    """r_1 of the output axis is at most this."""
    largest_in: int | None = None
    """r_2 of the input axis is at most this."""

    def __post_init__(self) -> None:
        for name in ("kernel", "largest_out", "largest_in"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def of(self, operator: Operator, rank: int) -> tuple[int, ...]:
        """Return the rank of each axis at this rank; at rank 0 zeros, but 1 for an axis that has no factor."""
        follows, own = following_axes(operator), factor_axes(operator)
        if rank == 0:
            return tuple(0 if axis in own else 1 for axis in range(len(operator.shape)))
        found = [min(rank if axis in follows else self.kernel, size) for axis, size in enumerate(operator.shape)]
        found[0] = min(found[0], self.largest_out or found[0])
        found[1] = min(found[1], self.largest_in or found[1])
        for axis in follows:  # only one of them can be larger than the product of the others
            found[axis] = min(found[axis], math.prod(found) // found[axis])
        return tuple(found)

    def largest(self, operator: Operator) -> int:
        """Return the largest rank that changes anything: above it no axis gets more."""
        return rank_of(operator, self.of(operator, max(operator.shape)))

    def kept(self, operator: Operator, ranks: tuple[int, ...], keep: Sequence[int]) -> list[list[int]]:
        """Return which slices of each axis stay: those of ``keep``, in its order, where an axis has so many."""
        found = []
        for axis, count in enumerate(self.of(operator, len(keep))):
            own = range(ranks[axis])
            first = [index for index in keep if index in own] if axis in following_axes(operator) else []
            found.append([*first, *(index for index in own if index not in first)][:count])
        return found

    def cost(self, operator: Operator, rank: int) -> int:
        """Count Σ I_d r_d + ∏ r_d parameters; an axis of a kernel that has length 1 has no factor."""
        ranks = self.of(operator, rank)
        return math.prod(ranks) + sum(operator.shape[axis] * ranks[axis] for axis in factor_axes(operator))


def rank_of(operator: Operator, ranks: tuple[int, ...]) -> int:
    """Return the rank that these ranks stand for: the largest of those that follow it."""
    return max(ranks[axis] for axis in following_axes(operator))


def following_axes(operator: Operator) -> tuple[int, ...]:
    """List the axes whose ranks follow the rank."""
    return factor_axes(operator) if isinstance(operator, ParameterOperator) else (0, 1)


def factor_axes(operator: Operator) -> tuple[int, ...]:
    """List the axes that have a factor: output, input, and every further one that is longer than 1."""
    return tuple(axis for axis, size in enumerate(operator.shape) if axis < 2 or size > 1)


def attainable(operator: Operator) -> int:
    """Return the largest rank that an unfolding of such a weight can have along an axis that follows the rank."""
    size = math.prod(operator.shape)
    return max(min(operator.shape[axis], size // operator.shape[axis]) for axis in following_axes(operator))
