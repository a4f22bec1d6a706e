"""The singular value decomposition of a product B A, from its factors.

With thin QR decompositions Aᵀ = Q_A R_A and B = Q_B R_B the product is Q_B (R_B R_Aᵀ) Q_Aᵀ, so its singular values are
those of the core R_B R_Aᵀ, which is no larger than r × r; nothing of the size m × n of the product is formed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ProductSVD", "ThinQR", "product_svd"]


@dataclass(frozen=True, slots=True, eq=False)
class ProductSVD:
    """B A = U diag(σ) Vᵀ in float64, with k = min(m, n, r)."""

    u: Tensor
    """``(m, k)``, orthonormal columns."""
    sigma: Tensor
    """``(k,)``, ≥ 0 and non-increasing."""
    vh: Tensor
    """Vᵀ, ``(k, n)``, orthonormal rows."""

    def balanced_factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A ``(rank, n)`` and B ``(m, rank)`` of the leading part, each with the square roots of its σ."""
        root = self.sigma[:rank].sqrt()
        return root[:, None] * self.vh[:rank], self.u[:, :rank] * root


class ThinQR:
    """M = Q R for M ``(m, r)``, with Q as reflectors, of which only what is asked for is formed.

    Args:
        matrix: M, float64.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._reflectors, self._tau = torch.geqrf(matrix)

    @property
    def r(self) -> Tensor:
        """R, ``(min(m, r), r)``."""
        return self._reflectors[: len(self._tau)].triu()

    def times(self, columns: Tensor) -> Tensor:
        """Return Q X, ``(m, c)``, for X ``(min(m, r), c)``."""
        padded = columns.new_zeros(len(self._reflectors), columns.shape[1])
        padded[: len(columns)] = columns
        return torch.ormqr(self._reflectors[:, : len(self._tau)], self._tau, padded)


def product_svd(a: Tensor, b: Tensor) -> ProductSVD:
    """Decompose B A for A ``(r, n)`` and B ``(m, r)``.

    The sizes of A and B may be as unequal as they like: the error is of the order 2⁻⁵² Σᵢ ‖bᵢ‖ ‖aᵢ‖, over the columns
    of B and rows of A.

    Returns:
        The decomposition, in float64 on the device of the factors.
    """
    right, left = ThinQR(a.double().T), ThinQR(b.double())
    u, sigma, vh = torch.linalg.svd(left.r @ right.r.T, full_matrices=False)
    return ProductSVD(left.times(u), sigma, right.times(vh.T).T)
