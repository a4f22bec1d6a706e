"""Diagonal of the empirical Fisher per module: F_ij = E_n[(G_n)_ij²], or its sums over the rows or columns of W.

G_n = Σ_t g_t x_tᵀ is the gradient of example n. The whole diagonal has m n numbers; its sums E_n‖(G_n)_i·‖² for each
row and E_n‖(G_n)_·j‖² for each column have m and n, and do not need G_n: with the token Gram K = X Xᵀ of the inputs,
‖(G_n)_i·‖² = Σ_t g_ti (K g)_ti, and the same with x and g exchanged for the columns. All add up to the trace that
:class:`EmpiricalFisher` gives.
Conventions: x is ``(N, T, n)``, g is ``(N, T, m)``, the gradient of each example's *own* loss, without a factor 1/N.

Source: ghost norms after Goodfellow (2015), arXiv:1510.01799, here for one row or column; docs/methods.md, section 2.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flowra_analysis.empirical_fisher import EmpiricalFisher, Estimate, moments_of
from flowra_analysis.layer_signals import Signals

__all__ = ["DiagonalFisher", "FisherDiagonal"]

Reduction = Literal["none", "rows", "columns"]
CHUNK_NUMBERS = 2**22
"""Entries of per-example gradients that are formed at a time, 16 MiB in float32; at least one gradient."""


class FisherDiagonal(NamedTuple):
    """The diagonal of one module's Fisher, or its sums."""

    values: Tensor
    """``(m, n)``, ``(m,)`` for sums of rows or ``(n,)`` for sums of columns; float64, ≥ 0."""
    trace: Estimate
    """The sum of all values, with its standard error over examples."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DiagonalFisher:
    """What is known so far of the Fisher diagonal of each module.

    A value: each step returns a new one. Batches may be split over states, and over processes, in any way; merged, the
    result is the same to within rounding. Sums are kept in double precision, per module m n of them, m or n.

    >>> from flowra_analysis import measure
    >>> model, batches = torch.nn.Linear(3, 2), [torch.ones(4, 3)]
    >>> begun = {"rows": DiagonalFisher.init(reduction="rows")}
    >>> seen = measure(model, batches, lambda model, batch: model(batch).sum(1), [""], begun)
    >>> seen["rows"].finalise()[""].values
    tensor([3., 3.], dtype=torch.float64)
    """

    reduction: Reduction
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Module name to the sum over examples: ``(m, n)``, ``(m,)`` or ``(n,)``, float64."""
    traces: EmpiricalFisher = field(default_factory=EmpiricalFisher)
    """The traces, from the same squares, of the same modules."""

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {self.reduction!r}")
        if self.sums.keys() != self.traces.moments.keys():
            raise ValueError(
                f"sums and traces must be of the same modules, got {[*self.sums]} and {[*self.traces.moments]}"
            )
        axes = 2 if self.reduction == "none" else 1
        for name, sums in self.sums.items():
            if sums.ndim != axes or sums.dtype != torch.float64:
                raise ValueError(
                    f"sums must be torch.float64 of {axes} axes, got {sums.dtype} {tuple(sums.shape)} for {name!r}"
                )

    @classmethod
    def init(cls, *, reduction: Reduction = "none") -> "DiagonalFisher":
        """Return the state before the first batch.

        Args:
            reduction: ``"none"`` for the whole diagonal, m n numbers of 8 bytes for each module; ``"rows"`` for its
                sums over each row of the weight, m numbers; ``"columns"`` over each column, n numbers.

        Raises:
            ValueError: if the reduction is none of these.
        """
        return cls(reduction=reduction)

    def update(self, name: str, signals: Signals, *, batch: int | None = None) -> "DiagonalFisher":
        """Add the examples of one batch for one module.

        Args:
            name: the module's.
            signals: what passed through it, g the gradient of each example's own loss.
            batch: index of the batch, for error messages.

        Returns:
            The state with these N examples.

        Raises:
            ValueError: if the shapes do not fit, or a square is NaN or infinite.
        """
        where = "" if batch is None else f", batch {batch}"
        m, n = signals.weight_shape
        shape = {"none": (m, n), "rows": (m,), "columns": (n,)}[self.reduction]
        old = self.sums.get(name)
        if old is not None and old.shape != shape:
            raise ValueError(f"signals must fit sums {tuple(old.shape)}, got {shape} for {name!r}{where}")
        sums, norms = _squares(signals, self.reduction)
        if (new := moments_of(norms, name, batch=batch)) is None:
            return self
        if signals.columns is not None and self.reduction != "rows":
            old = sums.new_zeros(shape) if old is None else old
            total = old.index_add(-1, signals.columns, sums)
        else:
            total = sums if old is None else old + sums
        return replace(
            self,
            sums={**self.sums, name: total},
            traces=self.traces.merge(EmpiricalFisher(moments={name: new})),
        )

    def merge(self, other: "DiagonalFisher") -> "DiagonalFisher":
        """Return the state that has seen the examples of both, each module on the device of this one.

        Raises:
            ValueError: if the two did not begin with the same reduction, or a module has another shape in the other.
        """
        if self.reduction != other.reduction:
            raise ValueError(f"other must have reduction {self.reduction!r}, got {other.reduction!r}")
        sums = dict(self.sums)
        for name, theirs in other.sums.items():
            ours = sums.get(name)
            if ours is not None and ours.shape != theirs.shape:
                raise ValueError(f"other must have sums {tuple(ours.shape)}, got {tuple(theirs.shape)} for {name!r}")
            sums[name] = theirs if ours is None else ours + theirs.to(ours)
        return replace(self, sums=sums, traces=self.traces.merge(other.traces))

    def finalise(self) -> dict[str, FisherDiagonal]:
        """Return the diagonal of each module, or its sums.

        Raises:
            ValueError: if a module has fewer than two examples, which leaves the standard error unknown.
        """
        return {
            name: FisherDiagonal(self.sums[name] / self.traces.moments[name].num_examples, trace)
            for name, trace in self.traces.finalise().items()
        }


def _squares(signals: Signals, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Square the gradients of a batch.

    Returns:
        The squares summed over examples, ``(m, U)`` for U the columns of x, ``(m,)`` or ``(U,)``, and over everything
        but examples, ``(N,)``; float64. Squares are taken in the wider dtype of x and g, at least float32.
    """
    dtype = torch.promote_types(torch.promote_types(signals.x.dtype, signals.g.dtype), torch.float32)
    x, g = (each.to(dtype) for each in signals.by_group())  # (G, N, T, n), (G, N, T, m / G)
    if reduction != "none":
        reduced = _reduced(x, g, reduction).double()
        return reduced.clamp(min=0).sum(0), reduced.sum(1)
    total = x.new_zeros(len(x), g.shape[3], x.shape[3], dtype=torch.float64)
    norms = []
    for gradients in _gradients(x, g):
        squares = gradients.square_()
        total += squares.sum(1, dtype=torch.float64)
        norms.append(squares.sum((0, 2, 3), dtype=torch.float64))
    return total.flatten(0, 1), torch.cat(norms)


def _reduced(x: Tensor, g: Tensor, reduction: Reduction) -> Tensor:
    """Compute the squared lengths of the rows or columns of each example's gradient.

    By token Grams where that is less work than G_n; they are then also smaller than x and g together.

    Returns:
        ``(N, m)`` or ``(N, n)``; by rounding a Gram may give one just below zero.
    """
    ours, theirs, axis = (g, x, 3) if reduction == "rows" else (x, g, 2)
    num_tokens, m, n = x.shape[2], g.shape[3], x.shape[3]
    if num_tokens * (m + n) <= m * n:
        squares = (ours * ((theirs @ theirs.mT) @ ours)).sum(2)
    else:
        squares = torch.cat([each.square_().sum(axis) for each in _gradients(x, g)], 1)
    return squares.movedim(0, 1).flatten(1) if reduction == "rows" else squares.sum(0)  # groups lie along the rows


def _gradients(x: Tensor, g: Tensor) -> Iterator[Tensor]:
    """Form the gradients ``(G, ·, m / G, n)`` of as many examples at a time as fit."""
    size = max(1, CHUNK_NUMBERS // (len(x) * g.shape[3] * x.shape[3]))
    for inputs, gradients in zip(x.split(size, 1), g.split(size, 1), strict=True):
        yield gradients.mT @ inputs
