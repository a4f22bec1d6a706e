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

__all__ = ["BottleneckGram", "FlowSpectrum", "balance", "flow_spectra", "flow_spectrum", "truncate"]


@dataclass(frozen=True, slots=True)
class BottleneckGram:
    """Running sums of one module's bottleneck statistics; float64."""

    activations: Tensor
    """Σ z zᵀ over tokens, ``(r, r)``."""
    gradients: Tensor
    """Σ δ δᵀ over tokens, ``(r, r)``, δ of each example's own loss."""
    tokens: float
    """Number of tokens in ``activations``, possibly discounted."""
    examples: float
    """Number of examples in ``gradients``, possibly discounted."""

    @staticmethod
    def of(z: Tensor, delta: Tensor, *, examples: int, device: torch.device | str = "cpu") -> "BottleneckGram":
        """Sum over one batch.

        Args:
            z: ``(tokens, r)``, padding left out.
            delta: ``(tokens', r)``, gradients of each example's own loss.
            examples: number of examples in the batch, ≥ 1.
            device: where the sums are held.

        Returns:
            Sums accumulated in float32 at least, held in float64.
        """
        z, delta = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (z, delta))
        grams = [(each.T @ each).to(device, torch.float64) for each in (z, delta)]
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

    def to(self, device: torch.device | str) -> "BottleneckGram":
        """Return the sums on another device."""
        return BottleneckGram(self.activations.to(device), self.gradients.to(device), self.tokens, self.examples)

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return bool(torch.isfinite(self.activations).all() and torch.isfinite(self.gradients).all())

    def at(self, directions: Sequence[int]) -> "BottleneckGram":
        """Return the sums of these directions alone, in this order."""
        index = torch.tensor(list(directions), dtype=torch.long, device=self.activations.device)
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
        The spectrum, on the CPU. If B has not moved, all gains are 0: never allocate on it.

    Raises:
        ValueError: if a Gram holds NaN or infinity.
    """
    return flow_spectra([gram], jitter=jitter)[0]


def flow_spectra(grams: Sequence[BottleneckGram], *, jitter: float = 1e-6) -> list[FlowSpectrum]:
    """Return the :func:`flow_spectrum` of each of many modules; those of equal rank are computed at once."""
    alike: dict[int, list[int]] = {}
    for index, gram in enumerate(grams):
        alike.setdefault(len(gram.activations), []).append(index)
    found: dict[int, FlowSpectrum] = {}
    for indices in alike.values():
        # δ = ∂ℓ/∂z carries one factor s, so s² · M_B of the formulae is the Gram of δ itself.
        m_a = torch.stack([grams[index].activations / max(grams[index].tokens, 1e-300) for index in indices]).cpu()
        s2_m_b = torch.stack([grams[index].gradients / max(grams[index].examples, 1e-300) for index in indices]).cpu()
        if not (torch.isfinite(m_a).all() and torch.isfinite(s2_m_b).all()):
            raise ValueError("bottleneck Grams must be finite, got NaN or infinity. Lower the learning rate.")
        found |= zip(indices, _spectra(m_a, s2_m_b, jitter), strict=True)
    return [found[index] for index in range(len(grams))]


def _spectra(m_a: Tensor, s2_m_b: Tensor, jitter: float) -> list[FlowSpectrum]:
    """Diagonalise ``(k, r, r)`` pairs together."""
    rank = m_a.shape[-1]
    identity = torch.eye(rank, dtype=m_a.dtype)
    unseen = ~m_a.flatten(1).any(1)[:, None, None]  # no input: nothing to separate, nothing to gain
    m_a, s2_m_b = torch.where(unseen, identity, m_a), torch.where(unseen, 0.0, s2_m_b)
    epsilon = jitter * m_a.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(m_a.dtype).tiny
    lower = torch.linalg.cholesky(m_a + epsilon[:, None, None] * identity)
    eigenvalues, vectors = torch.linalg.eigh(lower.mT @ s2_m_b @ lower)
    eigenvalues, vectors = eigenvalues.flip(1).clamp(min=0), vectors.flip(2)
    to_A = torch.linalg.solve_triangular(lower, vectors.mT, upper=False, left=False)
    to_A, to_B = (torch.where(unseen, identity, each) for each in (to_A, lower @ vectors))
    return [FlowSpectrum(*each) for each in zip(eigenvalues / 2, to_A, to_B, strict=True)]


def truncate(lora_A: Tensor, lora_B: Tensor, spectrum: FlowSpectrum, rank: int) -> tuple[Tensor, Tensor]:
    """Keep the ``rank`` best directions of the update, as balanced factors.

    Args:
        lora_A: ``(r, n)``.
        lora_B: ``(m, r)``.
        spectrum: of this update.
        rank: 0 ≤ rank ≤ r.

    Returns:
        A ``(rank, n)`` and B ``(m, rank)`` in the dtype of the input, computed in float64.

    Raises:
        ValueError: if the rank is out of range.
    """
    if not 0 <= rank <= len(lora_A):
        raise ValueError(f"rank must be 0 to {len(lora_A)}, that of the update, got {rank}")
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
