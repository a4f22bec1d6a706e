"""The singular value decomposition of a product B A, from its factors.

With thin QR decompositions Aᵀ = Q_A R_A and B = Q_B R_B the product is Q_B (R_B R_Aᵀ) Q_Aᵀ, so its singular values are
those of the core R_B R_Aᵀ, which is no larger than r × r; nothing of the size m × n of the product is formed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ProductSVD", "product_svd"]


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


def product_svd(a: Tensor, b: Tensor) -> ProductSVD:
    """Decompose B A for A ``(r, n)`` and B ``(m, r)``.

    The sizes of A and B may be as unequal as they like: the error is of the order 2⁻⁵² Σᵢ ‖bᵢ‖ ‖aᵢ‖, over the columns
    of B and rows of A.

    Returns:
        The decomposition, in float64 on the device of the factors.
    """
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double())
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return ProductSVD(q_b @ u, sigma, vh @ q_a.T)
