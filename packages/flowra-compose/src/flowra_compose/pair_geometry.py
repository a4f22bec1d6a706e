"""How updates lie to one another: inner products, and angles between their row and column spaces.

All of it is taken from factors. Each update is written once as U Σ Vᵀ, without directions of size zero; then
⟨τᵢ, τⱼ⟩ = tr((BⱼᵀBᵢ)(AᵢAⱼᵀ)) with B = U Σ and A = Vᵀ, the cosines of principal angles are the singular values of VᵢᵀVⱼ
(rows) and UᵢᵀUⱼ (columns), and nothing of the size m × n is formed for updates of low rank.

Source: Björck & Golub 1973 (Math. Comp. 27) for principal angles; docs/methods.md, section 27.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowra_compose.product_svd import ProductSVD
from flowra_compose.singular_vectors import size_of

__all__ = [
    "PairGeometry",
    "inner_product",
    "pair_geometry",
    "principal_angles",
    "product_energy",
]

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, kw_only=True, slots=True)
class PairGeometry:
    """How two updates other than 0 lie to each other. No number depends on their sizes."""

    cosine: float
    """⟨τᵢ, τⱼ⟩ / (‖τᵢ‖ ‖τⱼ‖), in [-1, 1]."""
    row_overlap: float
    """Mean of cos² of the principal angles between the row spaces, in [0, 1]. Random spaces of rank r have about
    r/n."""
    row_angle: float
    """The smallest of these angles, in [0, π/2]."""
    column_overlap: float
    """As ``row_overlap``, of the column spaces."""
    column_angle: float
    """As ``row_angle``, of the column spaces."""


@torch.no_grad()
def product_energy(a: Tensor, b: Tensor) -> float:
    """Compute ‖B A‖²_F, and exactly 0 where it is 0 within rounding.

    What cancels in the product cancels before anything is squared: with Aᵀ = Q R it is ‖B Rᵀ‖².

    Args:
        a: ``(r, n)``, float64.
        b: ``(m, r)``, float64.

    Returns:
        The energy, ≥ 0.
    """
    norm = float((b @ torch.linalg.qr(a.T).R.T).norm())
    return norm**2 if norm > EPS * max(a.shape[1], b.shape[0]) * size_of(a, b) else 0.0


@torch.no_grad()
def inner_product(a: Tensor, b: Tensor, other: ProductSVD) -> float:
    """Compute ⟨B A, U Σ Vᵀ⟩ as a trace of products of factors.

    Args:
        a: ``(r, n)``, float64.
        b: ``(m, r)``, float64.
        other: the other update.

    Returns:
        The inner product of Frobenius.
    """
    return float((((b.T @ other.u) * (a @ other.vh.T)) @ other.sigma).sum())


@torch.no_grad()
def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Compute the angles between the spaces of two bases.

    Small angles are taken from their sines and large ones from their cosines, so that all are exact to rounding.

    Args:
        first: ``(d, r)``, orthonormal columns, float64.
        second: ``(d, s)``, the same.

    Returns:
        ``(min(r, s),)``, non-decreasing, in [0, π/2].

    Example:
        A line in a plane, and the plane with another.

        >>> plane, line = torch.eye(3)[:, :2], torch.tensor([[0.6], [0.0], [0.8]])
        >>> round(float(principal_angles(plane, line).cos()), 6)
        0.6
        >>> principal_angles(plane, plane).tolist()
        [0.0, 0.0]
    """
    small, large = (first, second) if first.shape[1] <= second.shape[1] else (second, first)
    between = large.T @ small
    cosines = torch.linalg.svdvals(between).clamp(max=1)
    sines = torch.linalg.svdvals(small - large @ between).clamp(max=1).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


@torch.no_grad()
def pair_geometry(first: ProductSVD, second: ProductSVD) -> PairGeometry:
    """Say how two updates lie to each other.

    Args:
        first: U Σ Vᵀ without singular values of 0, of rank 1 at least.
        second: the same, of the same shape.

    Returns:
        The numbers.
    """
    columns, rows = first.u.T @ second.u, first.vh @ second.vh.T
    product = float(first.sigma @ (columns * rows) @ second.sigma)
    cosine = product / (float(first.sigma.norm()) * float(second.sigma.norm()))
    rank = min(columns.shape)
    return PairGeometry(
        cosine=max(-1.0, min(1.0, cosine)),
        row_overlap=min(1.0, float(rows.square().sum()) / rank),
        row_angle=float(principal_angles(first.vh.T, second.vh.T)[0]),
        column_overlap=min(1.0, float(columns.square().sum()) / rank),
        column_angle=float(principal_angles(first.u, second.u)[0]),
    )
