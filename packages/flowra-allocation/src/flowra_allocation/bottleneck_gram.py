"""The flow spectrum of a learned update, from two r × r Grams of its bottleneck (docs/methods.md, section 4).

For y = W x + s · B A x let z = A x and δ = ∂ℓ/∂z. Then M_A = E[z zᵀ] = A C Aᵀ and M_B = E[δ δᵀ] / s² = Bᵀ S B, with C
the second moment of the inputs and S that of the output gradients. With M_A = L Lᵀ and Lᵀ M_B L = U diag(λ) Uᵀ:

- s² λ_i are the squared singular values of S^½ ΔW C^½, so dropping direction i raises the K-FAC model of the loss by
  exactly ½ s² λ_i: the *flow gain* of that unit of rank;
- B' = B L U and A' = Uᵀ L⁻¹ A stand for the same ΔW, and their first k columns and rows are its best approximation of
  rank k in that metric (Eckart–Young).

Nothing of size m², n² or m·n is formed. Conventions: M_A is a mean over tokens, M_B a sum over the tokens of an
example, averaged over examples, so that modules which see different numbers of tokens are comparable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BottleneckGram", "FlowSpectrum", "balance", "flow_spectrum", "truncate"]


@dataclass(frozen=True, slots=True)
class BottleneckGram:
    """Running sums of one module's bottleneck statistics; float64, on the CPU."""

    activations: Tensor
    """Σ z zᵀ over tokens, ``(r, r)``."""
    gradients: Tensor
    """Σ δ δᵀ over tokens, ``(r, r)``, δ of each example's own loss."""
    tokens: float
    """Number of tokens in ``activations``, possibly discounted."""
    examples: float
    """Number of examples in ``gradients``, possibly discounted."""

    @staticmethod
    def of(z: Tensor, delta: Tensor, *, examples: int) -> "BottleneckGram":
        """Sum over one batch.

        Args:
            z: ``(tokens, r)``, padding left out.
            delta: ``(tokens', r)``, gradients of each example's own loss.
            examples: number of examples in the batch, ≥ 1.

        Returns:
            Sums accumulated in float32 at least, held in float64.
        """
        z, delta = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (z, delta))
        grams = [(each.T @ each).to("cpu", torch.float64) for each in (z, delta)]
        return BottleneckGram(grams[0], grams[1], float(len(z)), float(examples))

    @staticmethod
    def empty(rank: int) -> "BottleneckGram":
        """Return the sums over nothing."""
        zeros = torch.zeros(rank, rank, dtype=torch.float64)
        return BottleneckGram(zeros, zeros, 0.0, 0.0)

    def __add__(self, other: "BottleneckGram") -> "BottleneckGram":
        return BottleneckGram(
            self.activations + other.activations,
            self.gradients + other.gradients,
            self.tokens + other.tokens,
            self.examples + other.examples,
        )

    def at(self, directions: Sequence[int]) -> "BottleneckGram":
        """Return the sums of these directions alone, in this order."""
        index = torch.tensor(list(directions), dtype=torch.long)
        activations, gradients = (each[index][:, index] for each in (self.activations, self.gradients))
        return BottleneckGram(activations, gradients, self.tokens, self.examples)

    def decayed(self, decay: float) -> "BottleneckGram":
        """Discount the past by a factor in [0, 1], for an exponential moving average."""
        return BottleneckGram(
            decay * self.activations, decay * self.gradients, decay * self.tokens, decay * self.examples
        )


@dataclass(frozen=True, slots=True)
class FlowSpectrum:
    """Gains of an update's directions, best first, and the change of basis that separates them."""

    gains: Tensor
    """½ s² λ, ``(r,)``, ≥ 0, non-increasing, float64; in units of the loss."""
    to_A: Tensor
    """Uᵀ L⁻¹, ``(r, r)``: A' = to_A · A."""
    to_B: Tensor
    """L U, ``(r, r)``: B' = B · to_B."""


def flow_spectrum(gram: BottleneckGram, *, jitter: float = 1e-6) -> FlowSpectrum:
    """Diagonalise the two Grams together.

    Args:
        gram: sums over tokens and examples; over none, all gains are 0.
        jitter: ε = jitter · tr(M_A)/r is added to M_A, so that a direction that saw no input can be factorised.

    Returns:
        The spectrum. If B has not moved, all gains are 0: never allocate on it.

    Raises:
        ValueError: if a Gram holds NaN or infinity.
    """
    # δ = ∂ℓ/∂z carries one factor s, so s² · M_B of the formulae is the Gram of δ itself.
    m_a = gram.activations / max(gram.tokens, 1e-300)
    s2_m_b = gram.gradients / max(gram.examples, 1e-300)
    if not (torch.isfinite(m_a).all() and torch.isfinite(s2_m_b).all()):
        raise ValueError("bottleneck Grams must be finite, got NaN or infinity. Lower the learning rate.")
    rank = len(m_a)
    if rank == 0:
        return FlowSpectrum(m_a.new_zeros(0), m_a, m_a)
    if not m_a.any():  # no input was seen: nothing to separate, nothing to gain
        return FlowSpectrum(m_a.new_zeros(rank), torch.eye(rank).to(m_a), torch.eye(rank).to(m_a))
    epsilon = jitter * m_a.diagonal().mean() + torch.finfo(m_a.dtype).tiny
    lower = torch.linalg.cholesky(m_a + epsilon * torch.eye(rank, dtype=m_a.dtype))
    eigenvalues, vectors = torch.linalg.eigh(lower.T @ s2_m_b @ lower)
    eigenvalues, vectors = eigenvalues.flip(0).clamp(min=0), vectors.flip(1)
    return FlowSpectrum(
        gains=eigenvalues / 2,
        to_A=torch.linalg.solve_triangular(lower, vectors.T, upper=False, left=False),
        to_B=lower @ vectors,
    )


def truncate(lora_A: Tensor, lora_B: Tensor, spectrum: FlowSpectrum, rank: int) -> tuple[Tensor, Tensor]:
    """Keep the ``rank`` best directions of the update, as balanced factors.

    Args:
        lora_A: ``(r, n)``.
        lora_B: ``(m, r)``.
        spectrum: of this update.
        rank: 0 ≤ rank ≤ r.

    Returns:
        A ``(rank, n)`` and B ``(m, rank)`` in the dtype of the input, computed in float64.
    """
    a, b = lora_A.detach().to("cpu", torch.float64), lora_B.detach().to("cpu", torch.float64)
    kept_A, kept_B = balance(spectrum.to_A[:rank] @ a, b @ spectrum.to_B[:, :rank])
    return kept_A.to(lora_A), kept_B.to(lora_B)


def balance(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Refactor B A = Q_B D Q_A as (D^½ Q_A, Q_B D^½): both factors equally large, directions orthogonal.

    A direction with D = 0 would never receive a gradient again; it keeps a row of norm 1/√3 in A (that of a fresh
    adapter) and a zero column in B.

    Args:
        lora_A: ``(r, n)``, r ≤ n.
        lora_B: ``(m, r)``, r ≤ m.

    Returns:
        Factors of the same shapes and product.
    """
    if len(lora_A) == 0:
        return lora_A, lora_B
    q_a, r_a = torch.linalg.qr(lora_A.T)
    q_b, r_b = torch.linalg.qr(lora_B)
    u, d, vt = torch.linalg.svd(r_b @ r_a.T)
    live = d > d.max() * 1e-12
    root = d.sqrt()
    fresh = torch.full_like(d, 3**-0.5)
    rows = torch.where(live, root, fresh)[:, None] * (vt @ q_a.T)
    columns = (q_b @ u) * torch.where(live, root, torch.zeros_like(root))
    return rows, columns
