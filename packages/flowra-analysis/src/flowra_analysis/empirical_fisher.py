"""Trace of the empirical Fisher per module: tr F = E_n ‖G_n‖²_F, with G_n = Σ_t g_t x_tᵀ the gradient of example n.

The expectation of the square, not the square of the mean gradient: with more than one example they differ.
Conventions: x is ``(N, T, n)``, g is ``(N, T, m)``, the gradient of each example's *own* loss, without a factor 1/N.

Source: ghost norms after Goodfellow (2015), arXiv:1510.01799; the empirical Fisher and its limits: Kunstner et al.
(2019), arXiv:1905.12558; running moments: Chan, Golub & LeVeque (1983).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowra_analysis.layer_signals import Signals
from flowra_analysis.measure import measure
from flowra_analysis.per_example_signals import Batch

__all__ = ["EmpiricalFisher", "Estimate", "fisher_trace", "squared_gradient_norms"]


class Estimate(NamedTuple):
    """A mean over examples and what is known of its error."""

    mean: float
    standard_error: float
    """Sample standard deviation (N - 1) over √N."""


class Moments(NamedTuple):
    """Running moments of one module's ‖G_n‖²."""

    num_examples: int
    mean: float
    squares: float
    """Sum of squared deviations from the mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmpiricalFisher:
    """What is known so far of the Fisher trace of each module.

    A value: each step returns a new one, so a state can be kept, sent and merged. Batches may be split over states in
    any way; the result is the same to within rounding. Sums are kept in double precision.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    """Module name to running moments."""

    @classmethod
    def init(cls) -> "EmpiricalFisher":
        """Return the state before the first batch."""
        return cls()

    def update(self, name: str, signals: Signals, *, batch: int | None = None) -> "EmpiricalFisher":
        """Add the examples of one batch for one module.

        Args:
            name: the module's.
            signals: what passed through it, g the gradient of each example's own loss.
            batch: index of the batch, for error messages.

        Returns:
            The state with these N examples.

        Raises:
            ValueError: if the shapes do not fit, or a norm is NaN or infinite.
        """
        x, g = signals.by_group()
        norms = squared_gradient_norms(x.flatten(0, 1), g.flatten(0, 1))
        values = norms.view(signals.groups, -1).double().sum(0)
        if (new := moments_of(values, name, batch=batch)) is None:
            return self
        old = self.moments.get(name)
        return EmpiricalFisher(moments={**self.moments, name: _combine(old, new) if old else new})

    def merge(self, other: "EmpiricalFisher") -> "EmpiricalFisher":
        """Return the state that has seen the examples of both."""
        moments = dict(self.moments)
        for name, theirs in other.moments.items():
            moments[name] = _combine(moments[name], theirs) if name in moments else theirs
        return EmpiricalFisher(moments=moments)

    def finalise(self) -> dict[str, Estimate]:
        """Return the estimate of tr F for each module.

        Raises:
            ValueError: if a module has fewer than two examples, which leaves its standard error unknown.
        """
        few = {name: moments.num_examples for name, moments in self.moments.items() if moments.num_examples < 2}
        if few or not self.moments:
            raise ValueError(f"every module must have at least 2 examples, got {few or 'none'}. Give more batches.")
        return {
            name: Estimate(mean, math.sqrt(squares / (num - 1) / num))
            for name, (num, mean, squares) in self.moments.items()
        }


def moments_of(norms: Tensor, name: str, *, batch: int | None) -> Moments | None:
    """Return the moments of each example's squared gradient norm ``(N,)``, or None where there is no example.

    Raises:
        ValueError: if one is NaN or infinite.
    """
    if not torch.isfinite(norms).all():
        example = int((~torch.isfinite(norms)).nonzero()[0])
        where = "" if batch is None else f", batch {batch}"
        raise ValueError(
            f"squared gradient norm must be finite, got {float(norms[example])} for {name!r}{where}, example"
            f" {example}. Check the loss and the inputs of this batch, or compute in a wider dtype."
        )
    if not len(norms):
        return None
    mean = norms.mean()
    return Moments(len(norms), float(mean), float((norms - mean).square().sum()))


def squared_gradient_norms(x: Tensor, g: Tensor) -> Tensor:
    """Compute ‖Σ_t g_t x_tᵀ‖²_F for each example.

    By the ghost-norm identity ‖G_n‖² = ⟨g gᵀ, x xᵀ⟩_F over the T x T token Grams, cost N T²(m + n); where T² > m n,
    G_n itself is the smaller of the two and is formed instead. Both give the same number.

    Args:
        x: ``(N, T, n)``, floating point.
        g: ``(N, T, m)``, floating point, same device.

    Returns:
        ``(N,)``, ≥ 0, in the wider of the two dtypes, at least float32; computed in it.

    Raises:
        ValueError: if x and g do not have these shapes.

    Source: Goodfellow (2015), arXiv:1510.01799, extended from T = 1 to sequences (docs/methods.md, section 2).
    """
    if x.ndim != 3 or g.ndim != 3 or x.shape[:2] != g.shape[:2]:
        raise ValueError(f"x and g must have shapes (N, T, n) and (N, T, m), got {tuple(x.shape)} and {tuple(g.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
    x, g = x.to(dtype), g.to(dtype)
    if x.shape[1] ** 2 > x.shape[2] * g.shape[2]:
        return (g.mT @ x).square().sum((1, 2))
    return ((g @ g.mT) * (x @ x.mT)).sum((1, 2)).clamp(min=0)


def fisher_trace(
    model: nn.Module,
    batches: Iterable[Batch],
    per_example_loss: Callable[[nn.Module, Batch], Tensor],
    module_names: Iterable[str],
    *,
    mask: Callable[[Batch], Tensor] | None = None,
) -> dict[str, Estimate]:
    """Estimate the trace of the empirical Fisher of each named module's weight.

    The *sum* of the losses is backpropagated, so each example's gradient is that of its own loss. The model runs in
    eval mode and is afterwards in the modes it was in. The backward pass ends at the modules' outputs: no
    ``.grad`` is written and no hook of a parameter fires.

    Args:
        model: must treat the examples of a batch independently, first axis N.
        batches: whatever ``per_example_loss`` understands; at least two examples in all.
        per_example_loss: ``(model, batch)`` to ``(N,)``, each example's own loss: a sum or mean over its own tokens,
            never over the batch.
        module_names: exact qualified names of layers, see :func:`is_measurable_layer`.
        mask: ``batch`` to ``(N, T)``, nonzero at real tokens; see :func:`layer_signals`. Not needed where padding
            reaches neither attention nor loss.

    Returns:
        Module name to mean and standard error over examples, in the order of ``module_names``.

    Raises:
        ValueError: if a name is unknown, the losses are not ``(N,)`` and differentiable, a module is not reached by
            the loss of a batch or does not see one row per example, a statistic is NaN or infinite (naming the module
            and the batch), or there are fewer than two examples.

    Source: docs/methods.md, section 2.
    """
    begun = {"fisher": EmpiricalFisher.init()}
    return measure(model, batches, per_example_loss, module_names, begun, mask=mask)["fisher"].finalise()


def _combine(a: Moments, b: Moments) -> Moments:
    """Join two groups: Chan, Golub & LeVeque (1983), eq. 2.1."""
    num = a.num_examples + b.num_examples
    step = b.mean - a.mean
    mean = a.mean + step * b.num_examples / num
    return Moments(num, mean, a.squares + b.squares + step**2 * a.num_examples * b.num_examples / num)
