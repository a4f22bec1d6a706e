"""EKFAC: K-FAC with its eigenvalues corrected, F ≈ (U_C ⊗ U_S) diag(λ) (U_C ⊗ U_S)ᵀ.

U_C and U_S are the eigenbases of the factors C and S, from a first pass over the data. In their basis the gradient of
an example is U_Sᵀ G_i U_C, and λ = E_i[(U_Sᵀ G_i U_C)²], element by element, from a second pass: the diagonal of the
Fisher there. Of all diagonals it is the nearest to the Fisher in the Frobenius norm, so no farther than that of K-FAC,
which is λ_S λ_Cᵀ; and Σ λ is the trace of the Fisher, whatever the basis.

Source: George, Laurent, Bouthillier, Ballas & Vincent (2018), arXiv:1806.03884, sections 3 and 4. Deviation: the paper
updates the eigenvalues while training; here they are those of one model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from flowra_analysis.kronecker_factors import KroneckerFactors, by_group, joined
from flowra_analysis.layer_signals import Signals
from flowra_analysis.moment_matrix import MomentMatrix

__all__ = ["EKFAC", "EigenFactors"]

MOST_NUMBERS = 2**24


class Basis(NamedTuple):
    """The eigenbases of one layer's factors; None for the unit vectors, of a diagonal factor."""

    inputs: Tensor | None
    """U_C ``(n, n)`` or ``(G, n, n)``, eigenvectors as columns."""
    gradients: Tensor | None
    """U_S ``(m, m)`` or ``(G, m/G, m/G)``."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EigenFactors:
    """The corrected Fisher of one layer, a symmetric positive semi-definite matrix over its weight ``(m, n)``."""

    basis: Basis
    eigenvalues: Tensor
    """λ, ``(m, n)``: of the direction U_S[:, i] U_C[:, j]ᵀ; ``(G, m/G, n)`` for a convolution of several groups."""

    def matmul(self, change: Tensor) -> Tensor:
        """Compute U_S (λ ∘ U_Sᵀ Δ U_C) U_Cᵀ, the product of the Fisher and a change of the weight.

        Args:
            change: Δ ``(…, m, n)``, in the dtype and on the device of the eigenvalues.

        Returns:
            ``(…, m, n)``.
        """
        return self._scaled(change, self.eigenvalues)

    def solve(self, gradient: Tensor, damping: float = 0.1) -> Tensor:
        """Compute the product of (F + μI)⁻¹ and a gradient, μ = damping · tr(F)/(m n), of each group its own.

        Args:
            gradient: G ``(…, m, n)``, in the dtype and on the device of the eigenvalues.
            damping: ≥ 0; 0 only where every eigenvalue is positive.

        Returns:
            ``(…, m, n)``; 0 where the Fisher is zero.

        Raises:
            ValueError: if the damping is negative or too small.
        """
        if damping < 0:
            raise ValueError(f"damping must be at least 0, got {damping}")
        mean = self.eigenvalues.mean((-2, -1), keepdim=True)
        values = self.eigenvalues + damping * mean
        floor = torch.finfo(values.dtype).eps * values.shape[-1] * mean
        if ((values <= floor) & (mean > 0)).any():
            raise ValueError(
                f"damping must leave F + μI invertible, got {damping} with a least eigenvalue of"
                f" {float(values.min()):.3g} where their mean is {float(mean.max()):.3g}. Take a larger damping."
            )
        return self._scaled(gradient, torch.where(mean > 0, 1 / values.where(mean > 0, 1), 0))

    def trace(self) -> float:
        """Compute tr F, that of the Fisher itself, to within rounding."""
        return float(self.eigenvalues.double().sum())

    def largest_eigenvalue(self) -> float:
        """Compute max λ."""
        return float(self.eigenvalues.max())

    def _scaled(self, matrix: Tensor, values: Tensor) -> Tensor:
        """Multiply by these values in the eigenbasis."""
        groups = len(self.eigenvalues) if self.eigenvalues.ndim == 3 else None
        matrix = by_group(matrix, groups)
        inputs, gradients = self.basis
        matrix = matrix if inputs is None else matrix @ inputs
        matrix = values * (matrix if gradients is None else gradients.mT @ matrix)
        matrix = matrix if inputs is None else matrix @ inputs.mT
        return joined(matrix if gradients is None else gradients @ matrix, groups)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EKFAC:
    """What is known so far of the corrected eigenvalues of each module.

    A value: each step returns a new one. Batches may be split over states, and over processes, in any way and order;
    merged, they are the same to within rounding, if all began with the same factors. Besides the bases, a layer takes
    m n numbers.

    >>> from flowra_analysis import kronecker_factors, fisher_trace, measure
    >>> _ = torch.manual_seed(0)
    >>> model, batches = torch.nn.Linear(6, 4), [torch.randn(8, 6), torch.randn(8, 6)]
    >>> def loss(model, batch): return model(batch).square().sum(1)
    >>> begun = {"ekfac": EKFAC.init(kronecker_factors(model, batches, loss, [""]))}
    >>> fisher = measure(model, batches, loss, [""], begun)["ekfac"].finalise()[""]
    >>> abs(fisher.trace() / fisher_trace(model, batches, loss, [""])[""].mean - 1) < 1e-5
    True
    """

    bases: Mapping[str, Basis]
    sums: Mapping[str, Tensor]
    """Module name to Σ_i (U_Sᵀ G_i U_C)², ``(m, n)`` or ``(G, m/G, n)``."""
    counts: Mapping[str, int]
    """Module name to the examples seen."""

    @classmethod
    def init(cls, factors: Mapping[str, KroneckerFactors]) -> "EKFAC":
        """Return the state before the first batch of the second pass.

        Args:
            factors: module name to C and S, of either kind of weight sharing; see :class:`KFAC`.

        Returns:
            The state that has seen nothing, with the eigenbases, found in float64, in the dtype of the factors. Factors
            that are one and the same (Q, K and V share C) are decomposed once.

        Raises:
            ValueError: if a factor is sketched, so that it has no whole eigenbasis.
        """
        sketched = [name for name, pair in factors.items() if any(each.low_rank is not None for each in pair)]
        if sketched:
            raise ValueError(
                f"factors must be dense or diagonal, got sketched ones for {sketched}."
                " Raise dense_limit, or leave these modules out."
            )
        moments = {id(moment): moment for pair in factors.values() for moment in pair}
        bases = {key: _eigenbasis(moment) for key, moment in moments.items()}
        return cls(
            bases={name: Basis(bases[id(C)], bases[id(S)]) for name, (C, S) in factors.items()},
            sums={
                name: S.diagonal.new_zeros(*S.diagonal.shape, C.diagonal.shape[-1]) for name, (C, S) in factors.items()
            },
            counts=dict.fromkeys(factors, 0),
        )

    def update(self, name: str, signals: Signals, *, batch: int | None = None) -> "EKFAC":
        """Add the examples of one batch for one module. Costs T(m² + n² + m n) multiplications for T tokens.

        Args:
            name: the module's.
            signals: what passed through it, g the gradient of each example's own loss.
            batch: index of the batch, for error messages.

        Returns:
            The state with these N examples.

        Raises:
            ValueError: if there are no factors of this module, or of another shape, or the sums are then not finite.
        """
        where = f"for module {name!r}" + ("" if batch is None else f", batch {batch}")
        if name not in self.bases:
            raise ValueError(f"factors must hold every module, got none {where}. Begin with the factors of all.")
        sums = self.sums[name]
        m, n = signals.weight_shape
        shape = (m, n) if signals.groups == 1 else (signals.groups, m // signals.groups, n)
        if shape != sums.shape:
            raise ValueError(
                f"x and g must be those of a weight {tuple(sums.shape)}, as the factors, got {shape} {where}."
            )
        x, g = signals.by_group() if signals.groups > 1 else (signals.x, signals.g)
        inputs, gradients = self.bases[name]
        x = _rotated(x.to(sums.dtype), inputs if inputs is None or signals.columns is None else inputs[signals.columns])
        g = _rotated(g.to(sums.dtype), gradients)
        if inputs is None and signals.columns is not None:
            sums = sums.index_add(-1, signals.columns, _sum_of_squares(x, g))
        else:
            sums = sums + _sum_of_squares(x, g)
        if not sums.sum().isfinite():
            raise ValueError(
                f"x and g must be finite, and their products too, got NaN or infinity {where}. Check the loss and the"
                " inputs of this batch, or compute in a wider dtype."
            )
        counts = {**self.counts, name: self.counts[name] + len(signals.x)}
        return replace(self, sums={**self.sums, name: sums}, counts=counts)

    def merge(self, other: "EKFAC") -> "EKFAC":
        """Return the state that has seen the examples of both, on the device of this one.

        Raises:
            ValueError: if the two did not begin with the same factors.
        """
        differ = [name for name, basis in self.bases.items() if not _is_same(basis, other.bases.get(name))]
        differ += other.bases.keys() - self.bases.keys()
        if differ:
            raise ValueError(f"other must begin with the same factors, got other ones for {sorted(differ)}")
        return replace(
            self,
            sums={name: ours + other.sums[name].to(ours) for name, ours in self.sums.items()},
            counts={name: ours + other.counts[name] for name, ours in self.counts.items()},
        )

    def finalise(self) -> dict[str, EigenFactors]:
        """Return the corrected Fisher of each module.

        Raises:
            ValueError: if a module has seen no example.
        """
        unseen = [name for name, count in self.counts.items() if not count]
        if unseen or not self.counts:
            raise ValueError(f"every module must have seen at least one example, got none for {unseen or 'any'}")
        return {
            name: EigenFactors(basis=basis, eigenvalues=self.sums[name] / self.counts[name])
            for name, basis in self.bases.items()
        }


def _eigenbasis(moment: MomentMatrix) -> Tensor | None:
    """Return the eigenvectors as columns; None for the unit vectors."""
    if moment.dense is None:
        return None
    vectors: Tensor = torch.linalg.eigh(moment.dense.double()).eigenvectors
    return vectors.to(moment.dense.dtype)


def _rotated(vectors: Tensor, basis: Tensor | None) -> Tensor:
    """Multiply ``(…, N, T, d)`` by the basis of its group."""
    if basis is None:
        return vectors
    return vectors @ (basis if basis.ndim == 2 else basis.unsqueeze(1))


def _sum_of_squares(x: Tensor, g: Tensor) -> Tensor:
    """Compute Σ_i (g_iᵀ x_i)².

    With one token it is a product of squares. With more, so many examples at once as fit in a bounded room.

    Args:
        x: ``(…, N, T, n)``.
        g: ``(…, N, T, m)``.

    Returns:
        ``(…, m, n)``.
    """
    num, length, n = x.shape[-3:]
    if length == 1:
        return g.squeeze(-2).square().mT @ x.squeeze(-2).square()
    total = x.new_zeros(*x.shape[:-3], g.shape[-1], n)
    chunk = max(1, MOST_NUMBERS // total.numel())
    for start in range(0, num, chunk):
        part = slice(start, start + chunk)
        total += (g[..., part, :, :].mT @ x[..., part, :, :]).square_().sum(-3)
    return total


def _is_same(ours: Basis, theirs: Basis | None) -> bool:
    if theirs is None:
        return False
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b.to(a)))
        for a, b in zip(ours, theirs, strict=True)
    )
