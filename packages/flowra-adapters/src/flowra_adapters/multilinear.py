"""Tensors in Tucker form: a core ``(r_1, …, r_N)`` times a factor ``(I_d, r_d)`` along some of its axes.

Notation of Kolda & Bader 2009, SIAM Review 51(3): the product along an axis (section 2.5) and the higher-order singular
value decomposition (section 4.2; De Lathauwer, De Moor & Vandewalle 2000).
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["along_axis", "compose", "hosvd", "mean_length", "new_directions", "unfold"]


def along_axis(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply by a matrix ``(I, J)`` along an axis of length J, which becomes I."""
    product: Tensor = torch.tensordot(tensor, matrix, ([axis], [1]))
    return product.movedim(-1, axis)


def compose(core: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """Multiply the core by each factor along its axis, the last axes first; differentiable."""
    for axis in sorted(factors, reverse=True):
        core = along_axis(core, factors[axis], axis)
    return core


def unfold(tensor: Tensor, axis: int) -> Tensor:
    """Write a tensor as a matrix whose rows run along one axis."""
    return tensor.movedim(axis, 0).flatten(1)


def hosvd(core: Tensor, factors: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """Write the same tensor with orthonormal factors and a core whose slices are orthogonal, the largest first.

    Along each axis that has a factor, slices of the core are mutually orthogonal, and their norms, which do not
    increase, are the singular values of the tensor's unfolding. A matrix core comes out diagonal.

    Args:
        core: float64.
        factors: axis to factor ``(I, r)`` with r ≤ I; float64.

    Returns:
        Core and factors of the same shapes.
    """
    orthonormal = {}
    for axis, factor in factors.items():
        orthonormal[axis], rest = torch.linalg.qr(factor)
        core = along_axis(core, rest, axis)
    if math.prod(core.shape[2:]) == 1:  # a matrix: one decomposition for both sides, so that equal values do not mix
        left, _, right = torch.linalg.svd(core.flatten(1), full_matrices=True)
        turns = {0: left, 1: right.mH}
    else:
        turns = {axis: _left_vectors(unfold(core, axis)) for axis in factors}
    turned = compose(core, {axis: turn.mH for axis, turn in turns.items()})
    return turned, {axis: each @ turns[axis] if axis in turns else each for axis, each in orthonormal.items()}


def new_directions(seen: Tensor, known: Tensor, count: int) -> Tensor:
    """Choose directions that vectors use most, beyond those that are known.

    Args:
        seen: ``(I, c)``, the vectors.
        known: ``(I, r)``, what spans the known directions.
        count: at most I.

    Returns:
        ``(I, count)``: the vectors themselves if they are as many, else the leading left singular vectors of what is
        orthogonal to the known directions.
    """
    if seen.shape[1] == count:
        return seen
    basis = torch.linalg.qr(known).Q
    return _left_vectors(seen - basis @ (basis.T @ seen))[:, :count]


def mean_length(factor: Tensor) -> Tensor:
    """Return the mean length of a factor's columns, float64; 1 if there are none, or all are zero."""
    lengths = factor.double().norm(dim=0)
    mean = lengths.mean() if len(lengths) else lengths.new_zeros(())
    return torch.where(mean > 0, mean, 1.0)


def _left_vectors(matrix: Tensor) -> Tensor:
    """Return all left singular vectors, ``(r, r)``, also of a matrix ``(r, c)`` with fewer columns than rows."""
    missing = max(0, len(matrix) - matrix.shape[1])
    left: Tensor = torch.linalg.svd(F.pad(matrix, (0, missing)), full_matrices=False).U
    return left
