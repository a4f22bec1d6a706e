"""The spectral norm of a Jacobian by power iteration on JᵀJ, for each example of a batch at once.

From v₀, v ← Jᵀ J v / ‖Jᵀ J v‖; the estimate is ‖J v‖ / ‖v‖ ≤ σ₁. It never falls, and where v₀ is not orthogonal to the
leading singular vector its relative error shrinks like (σ₂/σ₁)^{2k}.

Source: Golub & Van Loan (2013), section 8.2.1; for networks, Yoshida & Miyato (2017), arXiv:1705.10941.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowra_analysis.jacobian_products import JacobianProducts, inner_products

__all__ = ["PowerIteration", "power_iteration"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PowerIteration:
    """What a power iteration found."""

    estimates: Tensor
    """``(K + 1, N)``, float64: of the start and after each of K iterations; non-decreasing along K."""

    @property
    def spectral_norm(self) -> Tensor:
        """``(N,)``, float64, ≥ 0: the last estimate, a lower bound of σ₁ but for rounding."""
        return self.estimates[-1]

    @property
    def num_iterations(self) -> int:
        """K, iterations made."""
        return len(self.estimates) - 1

    @property
    def relative_change(self) -> Tensor:
        """``(N,)``, in [0, 1]: what the last iteration added, as a share of the estimate.

        Above the tolerance, the iteration ended because it was at its maximum, and more would still raise the estimate.
        It is no bound of the error: among many singular values of nearly one size each step adds little.
        """
        last, previous = self.estimates[-1], self.estimates[-2]
        return torch.where(last == 0, 0, (last - previous) / last)


def power_iteration(
    products: JacobianProducts,
    *,
    max_iterations: int = 10,
    tolerance: float = 1e-3,
    seed: int = 0,
    start: Tensor | None = None,
) -> PowerIteration:
    """Estimate the spectral norm of each example's Jacobian. Costs a jvp and a vjp in each iteration, and one jvp.

    Args:
        products: the Jacobians; for one matrix W, those of ``nn.Linear`` at any input.
        max_iterations: ≥ 1.
        tolerance: ≥ 0; the iteration ends when the relative change of no example is larger.
        seed: of the start, Gaussian, drawn on the CPU; the global generator is not touched.
        start: like the input of the function: v₀ instead of a random one, of any length.

    Returns:
        All estimates; see :class:`PowerIteration`. Computed in the dtype of the function, norms in float64.

    Raises:
        ValueError: if an argument is out of range, or a product is not finite.

    >>> layer = torch.nn.Linear(8, 5)
    >>> found = power_iteration(JacobianProducts(layer, torch.zeros(1, 8)), max_iterations=200, tolerance=0)
    >>> torch.allclose(found.spectral_norm.float(), torch.linalg.matrix_norm(layer.weight, 2), rtol=1e-3)
    True
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    generator = torch.Generator().manual_seed(seed)
    v = products.gaussian(generator) if start is None else products.input_vectors(start)
    v, _ = _normalised(v, like=v)
    u, length = _normalised(products.jvp(v), like=v)
    estimates = [length]
    for _ in range(max_iterations):
        v, _ = _normalised(products.vjp(u), like=v)
        u, length = _normalised(products.jvp(v), like=v)
        estimates.append(torch.maximum(length, estimates[-1]))  # for rounding only
        found = PowerIteration(estimates=torch.stack(estimates))
        if (found.relative_change <= tolerance).all():
            break
    if not found.spectral_norm.isfinite().all():
        raise ValueError(
            f"products with the Jacobian must be finite, got norms {found.spectral_norm.tolist()}. Check the input."
        )
    return found


def _normalised(vectors: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors / ‖vectors‖, zeros for a zero vector, and ‖vectors‖ / ‖like‖ (0 where like is zero)."""
    lengths, scale = (inner_products(each, each).sqrt() for each in (vectors, like))
    shape = (-1, *[1] * (vectors.ndim - 1))
    divisor = torch.where(lengths == 0, 1, lengths).view(shape)
    return (vectors / divisor).to(vectors), torch.where(scale == 0, 0, lengths / scale)
