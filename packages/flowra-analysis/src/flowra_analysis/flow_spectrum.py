"""The flow spectrum of a gradient: what a first step of each rank could gain in the metric of K-FAC.

With the mean gradient G of a layer and the factors C and S of its Fisher, the loss after a change Δ of the weight is,
to second order, q(Δ) = ⟨G, Δ⟩ + ½ tr(Δᵀ S Δ C) more than before. Whiten Ĝ = S^-½ G C^-½ = U diag(σ) Vᵀ. Then the best
change of rank ≤ r is Δ* = −S^-½ U_r diag(σ_r) V_rᵀ C^-½, and q(Δ*) = −½ Σ_{i≤r} σᵢ²: the i-th unit of rank is worth
½ σᵢ², less the more there were before it, and the worth of layers adds up (the factors of each are its own).

Both factors are damped, and any root R with R Rᵀ = S will do for S^½, see :class:`DampedFactors`. The gradient may be
given by its sketch. In a convolution of G groups, each with its own C and S, a unit of rank belongs to one group.

It says what each layer could do alone at the first step. Layers substitute for one another, so it describes, and does
not decide ranks; those come from the spectrum of what was learned, which is no part of this package.

Source: Eckart & Young (1936) in the metric of Martens & Grosse (2015), arXiv:1503.05671; the noise floor after
Marchenko & Pastur (1967); docs/methods.md, section 4.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from flowra_analysis.gradient_spectrum import GradientSketch, GradientSpectrum, begun_sketch
from flowra_analysis.kfac import KFAC
from flowra_analysis.kronecker_factors import DampedFactors, KroneckerFactors, by_group
from flowra_analysis.layer_signals import Signals
from flowra_analysis.measure import measure
from flowra_analysis.per_example_signals import Batch
from flowra_analysis.rank_measures import effective_rank, stable_rank

__all__ = ["KFACGradientSpectrum", "MeanGradients", "kfac_gradient_spectra", "kfac_gradient_spectrum"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KFACGradientSpectrum:
    """The singular values of the whitened gradient Ĝ, and the directions of the weight that belong to them."""

    singular_values: Tensor
    """σ, ``(k,)``, non-increasing, float64; of all groups together."""
    left: Tensor
    """R_S⁻ᵀ U, ``(m, k)``, float64; with groups, each column is zero but at the rows of its own."""
    right: Tensor
    """R_C⁻ᵀ V, ``(n, k)``, float64."""
    noise_floor: float | None
    """Where the singular values of pure sampling noise would end, (√m + √n)/√N; None if N was not given."""

    @property
    def gains(self) -> Tensor:
        """What each unit of rank is worth, ½ σᵢ², in units of the loss; ``(k,)``."""
        return self.singular_values.square() / 2

    def gain(self, rank: int) -> float:
        """Compute −q(Δ*) = ½ Σ_{i≤rank} σᵢ², the most that a change of this rank can lower the loss.

        Args:
            rank: in [0, k].

        Returns:
            In units of the loss, ≥ 0.

        Raises:
            ValueError: if the rank is out of range.
        """
        return float(self.gains[: self._checked(rank)].sum())

    def best_change(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the best change of this rank, Δ* = −R_S⁻ᵀ U_r diag(σ_r) V_rᵀ R_C⁻¹, as two factors.

        Args:
            rank: in [0, k].

        Returns:
            B ``(m, rank)`` and A ``(rank, n)`` with Δ* = B A, of equal weight, in float64.

        Raises:
            ValueError: if the rank is out of range.
        """
        rank = self._checked(rank)
        lengths = self.singular_values[:rank].sqrt()
        return -self.left[:, :rank] * lengths, (self.right[:, :rank] * lengths).mT

    def rank_above_noise(self) -> int:
        """Count the singular values above the noise floor: what lies below may be chance.

        Returns:
            In [0, k].

        Raises:
            ValueError: if the number of examples is not known.
        """
        if self.noise_floor is None:
            raise ValueError("num_examples must be given for a noise floor, got None")
        return int((self.singular_values > self.noise_floor).sum())

    def statistics(self) -> dict[str, float]:
        """Return what a :class:`FlowProfile` holds of it.

        Returns:
            ``kfac_gradient_gain``, ½ Σ σᵢ²; ``kfac_gradient_effective_rank`` and ``kfac_gradient_stable_rank``; and, if
            it is known, ``kfac_gradient_rank_above_noise``.
        """
        found = {
            "kfac_gradient_gain": float(self.gains.sum()),
            "kfac_gradient_effective_rank": effective_rank(self.singular_values),
            "kfac_gradient_stable_rank": stable_rank(self.singular_values),
        }
        if self.noise_floor is not None:
            found["kfac_gradient_rank_above_noise"] = float(self.rank_above_noise())
        return found

    def _checked(self, rank: int) -> int:
        if not 0 <= rank <= len(self.singular_values):
            raise ValueError(f"rank must be in [0, {len(self.singular_values)}], got {rank}")
        return rank


def kfac_gradient_spectrum(
    gradient: Tensor | GradientSpectrum,
    factors: KroneckerFactors | DampedFactors,
    *,
    damping: float = 0.1,
    num_examples: int | None = None,
) -> KFACGradientSpectrum:
    """Compute the singular values of S^-½ G C^-½, the best changes of each rank and what they gain.

    Args:
        gradient: G ``(m, n)``, the mean over examples of the gradient of each one's own loss; or what a sketch knows of
            it, whose k values and vectors then stand for it.
        factors: C and S of the same examples; or damped already, and then ``damping`` is not looked at.
        damping: λ in C + λ tr(C)/n I and S + λ tr(S)/m I; 0 only where both have full rank.
        num_examples: N, for the noise floor. Whitening makes the sampling noise of a mean of N gradients isotropic with
            variance 1/N, where F = C ⊗ S, so its singular values end at (√m + √n)/√N; with groups, m/G.

    Returns:
        min(m, n) values and directions, or the k of the sketch; over groups, all of them together. Computed in float64.

    Raises:
        ValueError: if the shapes do not fit, or the damping is negative or too small.

    >>> from flowra_analysis import MomentMatrix
    >>> C = MomentMatrix(diagonal=torch.ones(3), dense=torch.eye(3))
    >>> S = MomentMatrix(diagonal=torch.full((2,), 4.0), dense=4 * torch.eye(2))
    >>> gradient = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    >>> spectrum = kfac_gradient_spectrum(gradient, KroneckerFactors(C, S), damping=0)
    >>> spectrum.singular_values.tolist(), spectrum.gain(1)
    ([1.0, 0.5], 0.5)
    """
    damped = factors.damped(damping) if isinstance(factors, KroneckerFactors) else factors
    groups = damped.groups
    rows, n = damped.gradients.scale.shape[-1], damped.inputs.scale.shape[-1]
    m = rows * (groups or 1)
    shape = (
        (gradient.left.shape[0], gradient.right.shape[0]) if isinstance(gradient, GradientSpectrum) else gradient.shape
    )
    if tuple(shape) != (m, n):
        raise ValueError(f"gradient must have shape {(m, n)} as its factors say, got {tuple(shape)}")
    if isinstance(gradient, GradientSpectrum):
        outer = by_group(gradient.left.double() * gradient.singular_values, groups)
        inner = gradient.right.double()
        q, upper = torch.linalg.qr(damped.gradients.inverse_root(outer))
        p, lower = torch.linalg.qr(damped.inputs.inverse_root(inner))
        u, sigma, vt = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        u, v = q @ u, p @ vt.mT
    else:
        whitened = by_group(damped.whiten(gradient.double()), groups)
        u, sigma, vt = torch.linalg.svd(whitened, full_matrices=False)
        v = vt.mT
    left, right = damped.gradients.inverse_root_transposed(u), damped.inputs.inverse_root_transposed(v)
    if groups is not None:
        sigma, left, right = _pooled(sigma, left, right)
    floor = None if num_examples is None else (math.sqrt(rows) + math.sqrt(n)) / math.sqrt(num_examples)
    return KFACGradientSpectrum(singular_values=sigma, left=left, right=right, noise_floor=floor)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GradientSum:
    """Σ_i G_i of one module, which is kept."""

    num_examples: int
    sum: Tensor
    """``(m, n)``."""

    def update(self, signals: Signals) -> "GradientSum":
        """Add the examples of one batch. Costs T m n multiplications for T tokens."""
        if signals.weight_shape != self.sum.shape:
            raise ValueError(
                f"x and g must be those of a weight {tuple(self.sum.shape)}, got one of {signals.weight_shape}."
            )
        x, g = (each.flatten(1, 2).to(self.sum.dtype) for each in signals.by_group())
        seen = (g.mT @ x).flatten(0, 1)
        total = self.sum + seen if signals.columns is None else self.sum.index_add(1, signals.columns, seen)
        if not total.sum().isfinite():
            raise ValueError(
                "x and g must be finite, and their products too, got NaN or infinity. Check the loss and the inputs of"
                " this batch, or compute in a wider dtype."
            )
        return GradientSum(num_examples=self.num_examples + len(signals.x), sum=total)

    def merge(self, other: "GradientSum") -> "GradientSum":
        """Return the state that has seen the examples of both."""
        return GradientSum(num_examples=self.num_examples + other.num_examples, sum=self.sum + other.sum.to(self.sum))

    def finalise(self) -> Tensor:
        """Return the mean, ``(m, n)``."""
        return self.sum / self.num_examples


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MeanGradients:
    """What is known so far of the mean gradient of each module: itself where it is small, else a sketch.

    A value: each step returns a new one, and states merge, as those of :class:`GradientSpectra`.
    """

    dense_limit: int
    size: int
    seed: int
    gradients: Mapping[str, GradientSum | GradientSketch]
    """Module name to what is known."""

    @classmethod
    def init(cls, *, dense_limit: int = 2**22, size: int = 32, seed: int = 0) -> "MeanGradients":
        """Return the state before the first batch.

        Args:
            dense_limit: largest m · n for which the gradient itself is kept; 2²² are 16 MiB in float32.
            size: of the :class:`GradientSketch` above that.
            seed: of the sketches.

        Raises:
            ValueError: if the size is not positive.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        return cls(dense_limit=dense_limit, size=size, seed=seed, gradients={})

    def update(self, name: str, signals: Signals, *, batch: int | None = None) -> "MeanGradients":
        """Add the examples of one batch for one module.

        Args:
            name: the module's.
            signals: what passed through it, g the gradient of each example's own loss.
            batch: index of the batch, for error messages.

        Returns:
            The state with these N examples, accumulated in the dtype of x and g, at least float32.

        Raises:
            ValueError: if the shapes do not fit, or a sum is then not finite.
        """
        known = self.gradients.get(name) or self._begin(signals)
        try:
            return replace(self, gradients={**self.gradients, name: known.update(signals)})
        except ValueError as error:
            where = "" if batch is None else f", batch {batch}"
            raise ValueError(f"{error} For module {name!r}{where}.") from None

    def merge(self, other: "MeanGradients") -> "MeanGradients":
        """Return the state that has seen the examples of both.

        Raises:
            ValueError: if the two did not begin with the same arguments.
        """
        ours, theirs = ((each.dense_limit, each.size, each.seed) for each in (self, other))
        if ours != theirs:
            raise ValueError(f"other must begin with the same (dense_limit, size, seed) {ours}, got {theirs}")
        gradients = dict(self.gradients)
        for name, added in other.gradients.items():
            gradients[name] = _merged(gradients[name], added) if name in gradients else added
        return replace(self, gradients=gradients)

    def finalise(self) -> dict[str, Tensor | GradientSpectrum]:
        """Return the mean gradient of each module, ``(m, n)``, or what its sketch knows of it.

        Raises:
            ValueError: if no example was seen.
        """
        if not self.gradients:
            raise ValueError("batches must hold at least one example, got none")
        return {name: each.finalise() for name, each in self.gradients.items()}

    def _begin(self, signals: Signals) -> GradientSum | GradientSketch:
        dtype = torch.promote_types(torch.promote_types(signals.x.dtype, signals.g.dtype), torch.float32)
        shape, device = signals.weight_shape, signals.g.device
        if math.prod(shape) <= self.dense_limit:
            return GradientSum(num_examples=0, sum=torch.zeros(shape, dtype=dtype, device=device))
        known = (each for each in self.gradients.values() if isinstance(each, GradientSketch))
        return begun_sketch(known, signals, size=self.size, seed=self.seed)


def kfac_gradient_spectra(
    model: nn.Module,
    batches: Iterable[Batch],
    per_example_loss: Callable[[nn.Module, Batch], Tensor],
    module_names: Iterable[str],
    *,
    damping: float = 0.1,
    weight_sharing: Literal["expand", "reduce"] = "expand",
    dense_limit: int = 2048,
    size: int = 256,
    gradient_limit: int = 2**22,
    gradient_size: int = 32,
    seed: int = 0,
    mask: Callable[[Batch], Tensor] | None = None,
) -> dict[str, KFACGradientSpectrum]:
    """Compute the flow spectrum of the mean gradient of each named module, factors and gradients from one pass.

    Args:
        model: must treat the examples of a batch independently, first axis N.
        batches: whatever ``per_example_loss`` understands; at least one example in all.
        per_example_loss: ``(model, batch)`` to ``(N,)``; see :func:`per_example_signals`.
        module_names: exact qualified names of layers, see :func:`is_measurable_layer`.
        damping: of the factors; see :func:`kfac_gradient_spectrum`.
        weight_sharing: ``"expand"`` or ``"reduce"``; see :class:`KFAC`.
        dense_limit: largest n or m for which a factor is exact.
        size: columns of the factors' sketch above that.
        gradient_limit: largest m · n for which the gradient itself is kept.
        gradient_size: of the gradient's sketch above that: four times as many as the values that shall be accurate.
        seed: of the sketches.
        mask: ``batch`` to ``(N, T)``, nonzero at real tokens; see :func:`layer_signals`.

    Returns:
        Module name to spectrum, with its noise floor, in the order of ``module_names``.

    Raises:
        ValueError: as :func:`per_example_signals`; if there is no example, a sum is not finite (naming the module and
            the batch), or the damping is negative or too small.

    >>> _ = torch.manual_seed(0)
    >>> model, batches = nn.Linear(6, 4), [torch.randn(8, 6), torch.randn(8, 6)]
    >>> spectra = kfac_gradient_spectra(model, batches, lambda model, x: model(x).square().sum(1), [""])
    >>> spectra[""].singular_values.shape, spectra[""].gain(1) < spectra[""].gain(4)
    (torch.Size([4]), True)
    """
    begun: dict[str, KFAC | MeanGradients] = {
        "factors": KFAC.init(weight_sharing=weight_sharing, dense_limit=dense_limit, size=size, seed=seed),
        "gradients": MeanGradients.init(dense_limit=gradient_limit, size=gradient_size, seed=seed),
    }
    seen = measure(model, batches, per_example_loss, module_names, begun, mask=mask)
    kfac, means = seen["factors"], seen["gradients"]
    assert isinstance(kfac, KFAC)
    assert isinstance(means, MeanGradients)
    factors, gradients = kfac.finalise(), means.finalise()
    return {
        name: kfac_gradient_spectrum(
            gradients[name], pair, damping=damping, num_examples=means.gradients[name].num_examples
        )
        for name, pair in factors.items()
    }


def _pooled(sigma: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put the values of all groups in one order; ``(G, k)``, ``(G, m/G, k)``, ``(G, n, k)`` to flat ones."""
    num_groups, rows, width = left.shape
    spread = left.new_zeros(num_groups, rows, num_groups, width)
    each = torch.arange(num_groups, device=left.device)
    spread[each, :, each] = left
    values, order = sigma.flatten().sort(descending=True)
    columns = right.movedim(0, 1).flatten(1)
    return values, spread.flatten(2).flatten(0, 1)[:, order], columns[:, order]


def _merged(ours: GradientSum | GradientSketch, theirs: GradientSum | GradientSketch) -> GradientSum | GradientSketch:
    if isinstance(ours, GradientSum) and isinstance(theirs, GradientSum):
        return ours.merge(theirs)
    assert isinstance(ours, GradientSketch)
    assert isinstance(theirs, GradientSketch)
    return ours.merge(theirs)
