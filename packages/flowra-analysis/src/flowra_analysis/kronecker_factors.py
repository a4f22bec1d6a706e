"""What can be done with a Kronecker-factored Fisher F ≈ C ⊗ S of a layer without forming it.

For a change Δ ``(m, n)`` of the weight, (C ⊗ S) vec Δ = vec(S Δ C), with vec stacking columns. A convolution of G
groups has G such blocks: C is ``(G, n, n)``, S ``(G, m/G, m/G)``, and the rows of Δ are those of the groups, one after
the other. The inverse is damped factor by factor: (C + λ_C I) ⊗ (S + λ_S I), λ_C = λ tr(C)/n and λ_S = λ tr(S)/m.

Source: Martens & Grosse (2015), arXiv:1503.05671; docs/methods.md, sections 4 and 11. Deviation: the paper's damping
splits one number between the factors; here each takes the same fraction of its own mean eigenvalue, so neither scale
matters.
"""

from typing import NamedTuple

from torch import Tensor

from flowra_analysis.moment_matrix import DampedMoment, MomentMatrix

__all__ = ["DampedFactors", "KroneckerFactors"]


class KroneckerFactors(NamedTuple):
    """The two factors of one layer."""

    inputs: MomentMatrix
    """C, ``(n, n)`` or ``(G, n, n)``."""
    gradients: MomentMatrix
    """S, ``(m, m)`` or ``(G, m/G, m/G)``."""

    @property
    def groups(self) -> int | None:
        """G, of a convolution of several groups."""
        return len(self.inputs.diagonal) if self.inputs.diagonal.ndim == 2 else None

    def matmul(self, change: Tensor) -> Tensor:
        """Compute S Δ C, the product of the Fisher and a change of the weight.

        Args:
            change: Δ ``(…, m, n)``, in the dtype and on the device of the factors.

        Returns:
            ``(…, m, n)``.
        """
        product = self.inputs.matmul(by_group(change, self.groups).mT).mT
        return joined(self.gradients.matmul(product), self.groups)

    def trace(self) -> float:
        """Compute tr(C ⊗ S) = tr C · tr S, exact for sketched factors too; over groups the sum."""
        inputs, gradients = (side.diagonal.double().sum(-1) for side in self)
        return float((inputs * gradients).sum())

    def largest_eigenvalue(self) -> float:
        """Compute the largest eigenvalue of C ⊗ S, λ₁(C) λ₁(S).

        Returns:
            Over groups the maximum. For a sketched factor λ₁ is that of F Fᵀ, and the result a lower bound.
        """
        inputs, gradients = (side.eigenvalues()[..., 0] for side in self)
        return float((inputs * gradients).max())

    def damped(self, damping: float = 0.1) -> "DampedFactors":
        """Prepare the inverse of (C + λ_C I) ⊗ (S + λ_S I), λ_C = damping · tr(C)/n, λ_S = damping · tr(S)/m.

        Args:
            damping: λ ≥ 0; 0 only where both factors have full rank.

        Returns:
            What multiplies by it, by its inverse and by its roots; see :meth:`MomentMatrix.damped` for what is inverted
            where a factor is sketched, diagonal or zero.

        Raises:
            ValueError: if the damping is negative or too small.
        """
        return DampedFactors(self.inputs.damped(damping), self.gradients.damped(damping))


class DampedFactors(NamedTuple):
    """C + λ_C I = R_C R_Cᵀ and S + λ_S I = R_S R_Sᵀ.

    All take and return ``(…, m, n)`` of any floating dtype and compute in float64.
    """

    inputs: DampedMoment
    """C + λ_C I."""
    gradients: DampedMoment
    """S + λ_S I."""

    @property
    def groups(self) -> int | None:
        """G, of a convolution of several groups."""
        return len(self.inputs.scale) if self.inputs.scale.ndim == 2 else None

    def matmul(self, change: Tensor) -> Tensor:
        """Compute (S + λ_S I) Δ (C + λ_C I)."""
        product = self.inputs.matmul(by_group(change, self.groups).mT).mT
        return joined(self.gradients.matmul(product), self.groups)

    def solve(self, gradient: Tensor) -> Tensor:
        """Compute (S + λ_S I)⁻¹ G (C + λ_C I)⁻¹: the natural gradient."""
        product = self.inputs.solve(by_group(gradient, self.groups).mT).mT
        return joined(self.gradients.solve(product), self.groups)

    def whiten(self, gradient: Tensor) -> Tensor:
        """Compute Ĝ = R_S⁻¹ G R_C⁻ᵀ, with the singular values of S^-½ G C^-½: ⟨G, Δ⟩ = ⟨Ĝ, R_Sᵀ Δ R_C⟩."""
        product = self.inputs.inverse_root(by_group(gradient, self.groups).mT).mT
        return joined(self.gradients.inverse_root(product), self.groups)

    def unwhiten(self, change: Tensor) -> Tensor:
        """Compute R_S⁻ᵀ Δ̂ R_C⁻¹: the change Δ whose R_Sᵀ Δ R_C is Δ̂."""
        product = self.inputs.inverse_root_transposed(by_group(change, self.groups).mT).mT
        return joined(self.gradients.inverse_root_transposed(product), self.groups)


def by_group(change: Tensor, groups: int | None) -> Tensor:
    """Cut the rows of ``(…, m, n)`` into those of G groups, ``(…, G, m/G, n)``."""
    return change if groups is None else change.unflatten(-2, (groups, -1))


def joined(change: Tensor, groups: int | None) -> Tensor:
    """Put the rows of the groups one below the other again."""
    return change if groups is None else change.flatten(-3, -2)
