"""Leading singular values and vectors of a layer's mean gradient G = (1/N) Σ_i Σ_t g_it x_itᵀ, which is never formed.

G is linear in the stream of (x, g), so it can be sketched as it goes by, and sketches of parts of the data add up.
With fixed Gaussian Υ (k, m), Ω (k, n), Φ (s, m), Ψ (s, n), Θ (p, m):

    X = Υ G  (co-range, k x n),   Y = G Ωᵀ  (range, m x k),   Z = Φ G Ψᵀ  (core, s x s),   E = Θ G  (check, p x n).

Q = orth(Y) and P = orth(Xᵀ) hold the leading directions, and Ĝ = Q C Pᵀ with C = (ΦQ)⁺ Z ((ΨP)⁺)ᵀ approximates G; if
rank G ≤ k, it is G. E takes no part in Ĝ, so it tells how far Ĝ is from G, and how long G is.

Source: Tropp, Yurtsever, Udell & Cevher (2019), SIAM J. Sci. Comput. 41, A2430, arXiv:1902.08651: the
sketch, its reconstruction and its error estimate. docs/methods.md, section 10. Deviations: s = 4k, where
the paper's least is 2k + 1; ‖G‖² by a control variate, see :meth:`GradientSketch.finalise`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowra_analysis.layer_signals import Signals
from flowra_analysis.measure import measure
from flowra_analysis.per_example_signals import Batch
from flowra_analysis.rank_measures import spectrum_statistics

__all__ = ["GradientSketch", "GradientSpectra", "GradientSpectrum", "gradient_spectra"]

CORE_FACTOR = 4
NUM_CHECKS = 10


class Probes(NamedTuple):
    """The fixed Gaussian matrices; states that begin as one share them."""

    upsilon: Tensor
    omega: Tensor
    phi: Tensor
    psi: Tensor
    theta: Tensor


class Sums(NamedTuple):
    """The sketches of N·G."""

    corange: Tensor
    range: Tensor
    core: Tensor
    check: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GradientSpectrum:
    """The best that a sketch knows of a gradient: G ≈ Ĝ = left · diag(singular_values) · rightᵀ.

    The values are those of Ĝ: they are off by at most ‖G − Ĝ‖, together (Σ(σ̂ᵢ − σᵢ)² ≤ ‖G − Ĝ‖², Mirsky 1960), and the
    spectrum is truncated at k. Where it decays, the first quarter of the values is good; the last are rough. Where it
    does not, ``squared_error`` is near ``squared_norm`` or above it, and Ĝ says little about G.
    """

    singular_values: Tensor
    """``(k,)``, non-increasing, float64."""
    left: Tensor
    """``(m, k)``, orthonormal columns, in the dtype of the sketch."""
    right: Tensor
    """``(n, k)``, orthonormal columns."""
    squared_norm: float
    """Unbiased estimate of ‖G‖²_F; exact if rank G ≤ k."""
    squared_error: float
    """Unbiased estimate of ‖G − Ĝ‖²_F, ≥ 0."""

    def energy_share(self, rank: int) -> float:
        """Compute Σ_{i≤rank} σᵢ²/‖G‖²: how much of the gradient its leading directions hold.

        Args:
            rank: in [0, k].

        Returns:
            About in [0, 1]; estimates that are off can take it above 1. 0 for a zero gradient.

        Raises:
            ValueError: if the rank is out of range.
        """
        if not 0 <= rank <= len(self.singular_values):
            raise ValueError(
                f"rank must be in [0, {len(self.singular_values)}], got {rank}. Take a larger size of the sketch."
            )
        energy = float(self.singular_values[:rank].square().sum())
        return energy / self.squared_norm if energy else 0.0

    def statistics(self) -> dict[str, float]:
        """Return what a :class:`FlowProfile` holds of a gradient.

        Returns:
            ``gradient_squared_norm`` and ``gradient_squared_error``, the estimates above, and
            :func:`spectrum_statistics` of the values that are good: the first quarter, or all where k = min(m, n).
        """
        shape = (len(self.left), len(self.right))
        count = len(self.singular_values)
        good = count if count == min(shape) else math.ceil(count / 4)
        return {
            "gradient_squared_norm": self.squared_norm,
            "gradient_squared_error": self.squared_error,
            **spectrum_statistics("gradient", self.singular_values[:good], shape, squared_norm=self.squared_norm),
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GradientSketch:
    """What is known so far of one module's mean gradient.

    A value: each step returns a new one. Batches may be split over states, and over processes, in any way and order;
    merged, they are the same to within rounding, if all began with the same arguments. Holds k(m + n) + 16k² + 10n
    numbers, and as probes 5k(m + n) + 10m more, which states of one shape share if they begin as one.

    >>> _ = torch.manual_seed(0)
    >>> x, g = torch.randn(8, 5, 2) @ torch.randn(2, 40), torch.randn(8, 5, 30)  # the gradient has rank 2
    >>> spectrum = GradientSketch.init((30, 40), size=4).update(Signals(x, g)).finalise()
    >>> exact = torch.linalg.svdvals(torch.einsum("ntm,ntk->mk", g, x) / 8)
    >>> torch.allclose(spectrum.singular_values[:2].float(), exact[:2], rtol=1e-3)
    True
    """

    shape: tuple[int, int]
    """(m, n) of the weight."""
    size: int
    """k."""
    seed: int
    num_examples: int
    probes: Probes
    sums: Sums

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        size: int = 32,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "GradientSketch":
        """Return the state before the first batch.

        Args:
            shape: (m, n) = (out, in) of the weight.
            size: k ≥ 1, number of singular values; four times as many as shall be accurate. At most min(m, n) are used,
                and then nothing is approximated.
            seed: of the probes. They are drawn on the CPU, so they are the same on each device.
            dtype: to accumulate in, float32 or float64.
            device: of x and g.

        Returns:
            The state that has seen nothing.

        Raises:
            ValueError: if the size is not positive or the dtype is narrower than float32.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if dtype not in {torch.float32, torch.float64}:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        m, n = shape
        k = min(size, m, n)
        s = CORE_FACTOR * k
        generator = torch.Generator().manual_seed(seed)
        shapes = [(k, m), (k, n), (s, m), (s, n), (NUM_CHECKS, m)]
        probes = [torch.randn(each, generator=generator, dtype=dtype).to(device) for each in shapes]
        zeros = [torch.zeros(each, dtype=dtype, device=device) for each in [(k, n), (m, k), (s, s), (NUM_CHECKS, n)]]
        return cls(shape=(m, n), size=k, seed=seed, num_examples=0, probes=Probes(*probes), sums=Sums(*zeros))

    def update(self, signals: Signals) -> "GradientSketch":
        """Add the examples of one batch. Cost T(6k + 10)(m + n) multiplications or so, T the tokens.

        Args:
            signals: what passed through the module, g the gradient of each example's own loss.

        Returns:
            The state with these N examples.

        Raises:
            ValueError: if the shapes do not fit, or the sketch is then not finite.
        """
        m, n = self.shape
        if signals.x.shape[:2] != signals.g.shape[:2] or signals.weight_shape != self.shape:
            raise ValueError(
                f"x and g must have shapes (N, T, {n * signals.groups}) and (N, T, {m}), got"
                f" {tuple(signals.x.shape)} and {tuple(signals.g.shape)}"
            )
        x, g = signals.by_group()
        upsilon, omega, phi, psi, theta = self.probes
        x, g = x.flatten(1, 2).to(omega.dtype), g.flatten(1, 2).to(omega.dtype)
        tokens = x.flatten(0, 1)

        def rows(probe: Tensor) -> Tensor:
            """Project g, each group by its own part of the probe."""
            projected: Tensor = g @ probe.unflatten(1, (signals.groups, -1)).movedim(1, 0).mT
            return projected.flatten(0, 1)

        def columns(probe: Tensor) -> Tensor:
            return tokens @ (probe if signals.columns is None else probe[:, signals.columns]).T

        def spread(values: Tensor) -> Tensor:
            """Give the result a column for each id of an embedding."""
            if signals.columns is None:
                return values
            return values.new_zeros(len(values), n).index_copy_(1, signals.columns, values)

        left = rows(torch.cat([upsilon, theta, phi]))  # few wide products are faster than many narrow ones
        right = columns(torch.cat([omega, psi]))
        k, outer = self.size, self.size + NUM_CHECKS
        products = spread(left[:, :outer].T @ tokens)
        seen = Sums(
            corange=products[:k],
            range=(g.mT @ right[:, :k].unflatten(0, (signals.groups, -1))).flatten(0, 1),
            core=left[:, outer:].T @ right[:, k:],
            check=products[k:],
        )
        if not torch.stack([each.sum() for each in seen]).isfinite().all():
            raise ValueError(
                "x and g must be finite, and their products too, got NaN or infinity. Check the loss and the inputs of"
                " this batch, or compute in a wider dtype."
            )
        return replace(self, num_examples=self.num_examples + len(signals.x), sums=_add(self.sums, seen))

    def emptied(self) -> "GradientSketch":
        """Return the state before the first batch that began as this one did."""
        return replace(self, num_examples=0, sums=Sums(*map(torch.zeros_like, self.sums)))

    def merge(self, other: "GradientSketch") -> "GradientSketch":
        """Return the state that has seen the examples of both, on the device of this one.

        Raises:
            ValueError: if the two did not begin with the same shape, size, seed and dtype.
        """
        ours, theirs = self._origin(), other._origin()
        if ours != theirs:
            raise ValueError(f"other must begin with the same (shape, size, seed, dtype) {ours}, got {theirs}")
        return replace(self, num_examples=self.num_examples + other.num_examples, sums=_add(self.sums, other.sums))

    def finalise(self) -> GradientSpectrum:
        """Reconstruct the leading singular values and vectors of the mean gradient, in float64.

        ‖G − Ĝ‖² is estimated by ‖Θ(G − Ĝ)‖²/p, which is unbiased since Θ takes no part in Ĝ. ‖G‖² is estimated by
        ‖Ĝ‖² + (‖ΘG‖² − ‖ΘĜ‖²)/p: unbiased for the same reason, with variance (2/p)‖G Gᵀ − Ĝ Ĝᵀ‖²_F, which vanishes with
        the error, where ‖ΘG‖²/p alone would scatter by up to √(2/p). The expectation is over the probes. Where Ĝ says
        next to nothing, with sizes of 1 or 2, the sum can be negative; then ‖ΘG‖²/p is taken.

        Returns:
            Values and vectors of Ĝ, on the device of the state. With σ the values of G (the paper's theorem 5.1),
            E‖G − Ĝ‖² ≤ (s − 1)/(s − k − 1) · min_{ρ<k−1} (k + ρ − 1)/(k − ρ − 1) · Σ_{i>ρ} σᵢ².

        Raises:
            ValueError: if no example was seen.
        """
        if not self.num_examples:
            raise ValueError("the state must have seen at least one example, got none. Give more batches.")
        phi, psi, theta = self.probes.phi.double(), self.probes.psi.double(), self.probes.theta.double()
        corange, range_, core, check = (each.double() / self.num_examples for each in self.sums)
        q, p = torch.linalg.qr(range_).Q, torch.linalg.qr(corange.T).Q
        half = _least_squares(phi @ q, core)  # (k, s)
        u, sigma, vt = torch.linalg.svd(_least_squares(psi @ p, half.T).T)
        left, right = q @ u, p @ vt.T
        expected = (theta @ left * sigma) @ right.T  # Θ Ĝ
        squared_norm = float(sigma.square().sum() + (check.square().sum() - expected.square().sum()) / NUM_CHECKS)
        return GradientSpectrum(
            singular_values=sigma,
            left=left.to(self.sums.range.dtype),
            right=right.to(self.sums.range.dtype),
            squared_norm=squared_norm if squared_norm >= 0 else float(check.square().sum() / NUM_CHECKS),
            squared_error=float((check - expected).square().sum() / NUM_CHECKS),
        )

    def _origin(self) -> tuple[tuple[int, int], int, int, torch.dtype]:
        return self.shape, self.size, self.seed, self.probes.omega.dtype


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GradientSpectra:
    """What is known so far of the mean gradient of each module: a :class:`GradientSketch` for each."""

    size: int
    seed: int
    sketches: Mapping[str, GradientSketch]
    """Module name to sketch; those of one shape share their probes."""

    @classmethod
    def init(cls, *, size: int = 32, seed: int = 0) -> "GradientSpectra":
        """Return the state before the first batch.

        Args:
            size: k, number of singular values, four times as many as shall be accurate; at most min(m, n) are used.
            seed: of the probes.

        Raises:
            ValueError: if the size is not positive.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        return cls(size=size, seed=seed, sketches={})

    def update(self, name: str, signals: Signals, *, batch: int | None = None) -> "GradientSpectra":
        """Add the examples of one batch for one module.

        Args:
            name: the module's.
            signals: what passed through it, g the gradient of each example's own loss.
            batch: index of the batch, for error messages.

        Returns:
            The state with these N examples, accumulated in the dtype of x and g, at least float32.

        Raises:
            ValueError: if the shapes do not fit, or the sketch is then not finite.
        """
        sketch = self.sketches.get(name)
        if sketch is None:
            sketch = begun_sketch(self.sketches.values(), signals, size=self.size, seed=self.seed)
        try:
            return replace(self, sketches={**self.sketches, name: sketch.update(signals)})
        except ValueError as error:
            where = "" if batch is None else f", batch {batch}"
            raise ValueError(f"{error} For module {name!r}{where}.") from None

    def merge(self, other: "GradientSpectra") -> "GradientSpectra":
        """Return the state that has seen the examples of both.

        Raises:
            ValueError: if the two did not begin with the same size and seed.
        """
        if (self.size, self.seed) != (other.size, other.seed):
            raise ValueError(
                f"other must begin with the same (size, seed) {self.size, self.seed}, got {other.size, other.seed}"
            )
        sketches = dict(self.sketches)
        for name, theirs in other.sketches.items():
            sketches[name] = sketches[name].merge(theirs) if name in sketches else theirs
        return replace(self, sketches=sketches)

    def finalise(self) -> dict[str, GradientSpectrum]:
        """Return the spectrum of each module.

        Raises:
            ValueError: if no example was seen.
        """
        if not self.sketches:
            raise ValueError("batches must hold at least one example, got none")
        return {name: sketch.finalise() for name, sketch in self.sketches.items()}


def begun_sketch(known: Iterable[GradientSketch], signals: Signals, *, size: int, seed: int) -> GradientSketch:
    """Return an empty sketch for these signals, with the probes of a known one of its shape where there is one."""
    dtype = torch.promote_types(torch.promote_types(signals.x.dtype, signals.g.dtype), torch.float32)
    shape, device = signals.weight_shape, signals.g.device
    for sketch in known:
        omega = sketch.probes.omega
        if (sketch.shape, omega.dtype, omega.device) == (shape, dtype, device):
            return sketch.emptied()
    return GradientSketch.init(shape, size=size, seed=seed, dtype=dtype, device=device)


def gradient_spectra(
    model: nn.Module,
    batches: Iterable[Batch],
    per_example_loss: Callable[[nn.Module, Batch], Tensor],
    module_names: Iterable[str],
    *,
    size: int = 32,
    seed: int = 0,
    mask: Callable[[Batch], Tensor] | None = None,
) -> dict[str, GradientSpectrum]:
    """Sketch the spectrum of the mean gradient of each named module's weight; no ``weight.grad`` is needed or written.

    The gradient is the mean over examples of that of each example's own loss. Accumulated in the dtype of x and g, at
    least float32. To split the data over processes, feed :class:`GradientSpectra` states by
    :func:`measure` and merge them.

    Args:
        model: must treat the examples of a batch independently, first axis N.
        batches: whatever ``per_example_loss`` understands; at least one example in all.
        per_example_loss: ``(model, batch)`` to ``(N,)``; see :func:`per_example_signals`.
        module_names: exact qualified names of layers, see :func:`is_measurable_layer`.
        size: k, number of singular values, four times as many as shall be accurate; at most min(m, n) are used.
        seed: of the probes.
        mask: ``batch`` to ``(N, T)``, nonzero at real tokens; see :func:`layer_signals`.

    Returns:
        Module name to spectrum, in the order of ``module_names``.

    Raises:
        ValueError: as :func:`per_example_signals`; if there is no example, or a sketch is not finite (naming the module
            and the batch).

    Source: docs/methods.md, section 10.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(6, 4)
    >>> spectrum = gradient_spectra(model, [torch.randn(8, 6)], lambda model, x: model(x).square().sum(1), [""])[""]
    >>> spectrum.singular_values.shape, round(spectrum.energy_share(rank=4), 4), model.weight.grad
    (torch.Size([4]), 1.0, None)
    """
    begun = {"gradient": GradientSpectra.init(size=size, seed=seed)}
    return measure(model, batches, per_example_loss, module_names, begun, mask=mask)["gradient"].finalise()


def _least_squares(a: Tensor, b: Tensor) -> Tensor:
    """Solve min ‖A X − B‖ for A ``(s, k)`` of full rank; the same bits each time, as LAPACK's drivers need not give."""
    q, r = torch.linalg.qr(a)
    solution: Tensor = torch.linalg.solve_triangular(r, q.T @ b, upper=True)
    return solution


def _add(ours: Sums, theirs: Sums) -> Sums:
    return Sums(*(a + b.to(a) for a, b in zip(ours, theirs, strict=True)))
