"""A symmetric positive semi-definite matrix M in one of three forms, and the inverse of M + λI.

=========  ================  =======================================================
form       kept              M
=========  ================  =======================================================
dense      ``(d, d)``        as it is
sketched   ``(d, k + 1)``    F Fᵀ + D, D = diag M − diag F Fᵀ ≥ 0, see :class:`SecondMoment`
diagonal   ``(d,)``          diag M; the second moment of one-hot vectors is no more
=========  ================  =======================================================

Each may have a leading axis G, of matrices that belong to the groups of a convolution; what is computed then has it
too.

Any root R with R Rᵀ = M + λI whitens what M is the second moment of. For a dense or a diagonal M it is the symmetric
root. For a sketched one F Fᵀ + D + λI = B (I + E Eᵀ) B, with B = (D + λI)^½ and E = B⁻¹ F, and R = B (I + E Eᵀ)^½,
whose inner root is known in the span of E and is I outside it. So nothing but the sketch itself is approximate: R⁻ᵀ R⁻¹
is the inverse of F Fᵀ + D + λI (Woodbury), at the price of d k numbers and a product with them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DampedMoment", "MomentMatrix"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MomentMatrix:
    """A symmetric positive semi-definite ``(d, d)``: M itself, or F Fᵀ + D where only a sketch of M was kept."""

    diagonal: Tensor
    """``(d,)``, or ``(G, d)``, exact in all forms."""
    dense: Tensor | None = None
    """``(d, d)``, symmetric: M, if it was kept."""
    low_rank: Tensor | None = None
    """``(d, k)``, orthogonal columns, longest first: F, if M was sketched. Where this and ``dense`` are None, M is
    diagonal."""

    def trace(self) -> float:
        """Compute tr M, exact in all forms; of G matrices the sum."""
        return float(self.diagonal.double().sum())

    def factor(self) -> Tensor:
        """Return F with F Fᵀ = M, or for a sketched moment the best that is known of it.

        Returns:
            ``(d, d)`` or ``(d, k)``, orthogonal columns, longest first, in the dtype of the moment. The first r columns
            give the best approximation of rank r to F Fᵀ.
        """
        if self.low_rank is not None:
            return self.low_rank
        if self.dense is None:
            lengths, order = self.diagonal.sqrt().sort(descending=True)
            return torch.zeros_like(torch.diag_embed(lengths)).scatter_(-2, order.unsqueeze(-2), lengths.unsqueeze(-2))
        values, vectors = torch.linalg.eigh(self.dense.double())
        factor: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        return factor.flip(-1).to(self.dense.dtype)

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of M, for a sketched moment those of F Fᵀ.

        Returns:
            ``(d,)``, those of M, or ``(k,)`` for a sketched moment, each ≤ the one of M at its place; float64, ≥ 0,
            non-increasing. Since F Fᵀ ⪯ M, the error ‖M − F Fᵀ‖ in the nuclear norm is the trace less their sum.
        """
        if self.dense is not None:
            values: Tensor = torch.linalg.eigvalsh(self.dense.double())
            return values.clamp(min=0).flip(-1)
        values = self.diagonal.double() if self.low_rank is None else self.low_rank.double().square().sum(-2)
        return values.sort(descending=True).values

    def matmul(self, vectors: Tensor) -> Tensor:
        """Compute M V, or (F Fᵀ + D) V, D = diag M − diag F Fᵀ.

        Args:
            vectors: V ``(d, q)``, in the dtype and on the device of the moment; or ``(…, d, q)``.

        Returns:
            ``(d, q)``.
        """
        if self.dense is not None:
            return self.dense @ vectors
        if self.low_rank is None:
            return self.diagonal.unsqueeze(-1) * vectors
        return self.low_rank @ (self.low_rank.mT @ vectors) + self._remainder().unsqueeze(-1) * vectors

    def quadratic_form(self, vectors: Tensor) -> Tensor:
        """Compute Vᵀ M V, such as A C Aᵀ for the rows of an adapter's A, V = Aᵀ.

        Args:
            vectors: V ``(d, q)``, in the dtype and on the device of the moment.

        Returns:
            ``(q, q)``, symmetric.
        """
        form = vectors.mT @ self.matmul(vectors)
        return (form + form.mT) / 2

    def damped(self, damping: float) -> "DampedMoment":
        """Prepare the inverse of M + λI, λ = damping · tr(M)/d: a fraction of the mean eigenvalue.

        Costs a Cholesky factor of a dense M (d³/3), a singular value decomposition of a sketch (d k²), in float64.

        Args:
            damping: ≥ 0; 0 only where M has full rank.

        Returns:
            What multiplies by M + λI, its inverse and their roots, of F Fᵀ + D + λI for a sketched moment. Where M is
            zero, so is λ, and the inverse is taken to be zero as well.

        Raises:
            ValueError: if the damping is negative, or too small for an inverse in double precision.
        """
        if damping < 0:
            raise ValueError(f"damping must be at least 0, got {damping}")
        mean = self.diagonal.double().mean(-1, keepdim=True)
        if self.dense is not None:
            return self._factorised(self.dense.double(), damping, mean)
        values = (self.diagonal if self.low_rank is None else self._remainder()).double() + damping * mean
        self._check_invertible(values, damping, mean)
        scale = values.sqrt()
        if self.low_rank is None:
            return DampedMoment(scale=scale, basis=scale.new_zeros(*scale.shape, 0), values=scale[..., :0])
        outer = self.low_rank.double() * _reciprocal(scale).unsqueeze(-1)
        basis, lengths, _ = torch.linalg.svd(outer, full_matrices=False)
        return DampedMoment(scale=scale, basis=basis, values=1 + lengths.square())

    def _factorised(self, dense: Tensor, damping: float, mean: Tensor) -> "DampedMoment":
        """Take the Cholesky factor of a dense M + λI; of I where M is zero."""
        identity = torch.eye(dense.shape[-1], dtype=dense.dtype, device=dense.device)
        damped = dense + (torch.where(mean > 0, damping * mean, 1.0)).unsqueeze(-1) * identity
        lower, failed = torch.linalg.cholesky_ex(damped)
        if (
            failed.any() or damping <= 2 * torch.finfo(self.diagonal.dtype).eps * dense.shape[-1]
        ):  # it may be too little
            self._check_invertible(torch.linalg.eigvalsh(dense).clamp(min=0) + damping * mean, damping, mean)
        return DampedMoment(
            scale=(mean > 0).to(dense).expand(dense.shape[:-1]), basis=lower, values=lower.new_zeros(0), is_root=True
        )

    def _check_invertible(self, values: Tensor, damping: float, mean: Tensor) -> None:
        """Refuse eigenvalues that rounding of M could have made."""
        floor = torch.finfo(self.diagonal.dtype).eps * values.shape[-1] * mean
        if ((values <= floor) & (mean > 0)).any():
            raise ValueError(
                f"damping must leave M + λI invertible, got {damping} with a least eigenvalue of"
                f" {float(values.min()):.3g} where their mean is {float(mean.max()):.3g}. Take a larger damping."
            )

    def _remainder(self) -> Tensor:
        """Return the diagonal of D."""
        assert self.low_rank is not None
        return (self.diagonal - self.low_rank.square().sum(-1)).clamp(min=0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DampedMoment:
    """M + λI = R Rᵀ, symmetric positive definite, with the products by it, by its inverse and by those of R.

    R = diag(scale) (I + basis diag(√values − 1) basisᵀ); for a dense moment R is its Cholesky factor.
    Each product takes V ``(…, d, q)`` of any floating dtype, computes in float64 and returns the dtype of V.
    """

    scale: Tensor
    """``(d,)``; of a dense moment 1, or 0 where the moment is zero."""
    basis: Tensor
    """``(d, k)``, orthonormal columns; of a dense moment the Cholesky factor ``(d, d)``."""
    values: Tensor
    """``(k,)``; empty for a dense moment."""
    is_root: bool = False
    """Whether ``basis`` is a Cholesky factor."""

    def matmul(self, vectors: Tensor) -> Tensor:
        """Compute (M + λI) V."""
        scaled = self.scale.unsqueeze(-1) * vectors.double()
        return self.root(self.basis.mT @ scaled if self.is_root else self._inner(self.values.sqrt(), scaled)).to(
            vectors.dtype
        )

    def solve(self, vectors: Tensor) -> Tensor:
        """Compute (M + λI)⁻¹ V."""
        return self.inverse_root_transposed(self.inverse_root(vectors.double())).to(vectors.dtype)

    def root(self, vectors: Tensor) -> Tensor:
        """Compute R V."""
        wide = vectors.double()
        product = self.basis @ wide if self.is_root else self._inner(self.values.sqrt(), wide)
        return (self.scale.unsqueeze(-1) * product).to(vectors.dtype)

    def inverse_root(self, vectors: Tensor) -> Tensor:
        """Compute R⁻¹ V: the second moment of R⁻¹ v is I, if that of v is M + λI."""
        scaled = _reciprocal(self.scale).unsqueeze(-1) * vectors.double()
        if self.is_root:
            product: Tensor = torch.linalg.solve_triangular(self.basis, scaled, upper=False)
        else:
            product = self._inner(_reciprocal(self.values).sqrt(), scaled)
        return product.to(vectors.dtype)

    def inverse_root_transposed(self, vectors: Tensor) -> Tensor:
        """Compute R⁻ᵀ V, which is R⁻¹ V for a diagonal moment."""
        wide = vectors.double()
        if self.is_root:
            scaled: Tensor = torch.linalg.solve_triangular(self.basis.mT, wide, upper=True)
        else:
            scaled = self._inner(_reciprocal(self.values).sqrt(), wide)
        return (_reciprocal(self.scale).unsqueeze(-1) * scaled).to(vectors.dtype)

    def _inner(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Multiply by basis diag(values) basisᵀ, and by I outside its span."""
        return vectors + self.basis @ ((values - 1).unsqueeze(-1) * (self.basis.mT @ vectors))


def _reciprocal(values: Tensor) -> Tensor:
    """Return 1/v, and 0 for 0."""
    return torch.where(values > 0, 1 / values.where(values > 0, 1), 0)
