"""What an update as a whole is worth, by its singular values: the scores of FlexLoRA (docs/methods.md, section 7).

The entropy is the paper's (Liu, Si & Jia 2026, arXiv:2601.22905, eq. 3). The others are from its ablations, for which
no code was released: ``nuclear`` and ``frobenius`` follow a formula in words, ``sensitivity`` is AdaLoRA's, and
``elem_energy`` and ``mat_energy`` are our best reading of two sentences.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "RECONSTRUCTED",
    "SPECTRAL_METRICS",
    "Metric",
    "elem_energy",
    "frobenius",
    "mat_energy",
    "nuclear",
    "spectral_entropy",
]

Metric = Literal["entropy", "nuclear", "frobenius", "sensitivity", "elem_energy", "mat_energy"]
"""How FlexLoRA may score updates."""

EPSILON = 1e-8  # inside the logarithm only, as in the released code
NOTHING = 1e-30  # an energy below this is none


def spectral_entropy(singular_values: Tensor) -> float:
    """Measure how evenly an update spreads over its directions.

    I = −Σ p_i ln(p_i + ε) / ln r with p_i = E_i² / Σ E², ε = 1e-8. Neither scale nor signs matter.

    Args:
        singular_values: E, ``(r,)``; computed in float64.

    Returns:
        I: 1 for equal values, 0 for a single one, up to ε. 0 at rank 0 and 1, and where Σ E² < 1e-30: the released
        code has NaN there.

    Source: Liu, Si & Jia (2026), arXiv:2601.22905, eq. 3. Deviations: the two cases without a value.
    """
    return _entropy(singular_values, weights=None)


def nuclear(singular_values: Tensor) -> float:
    """Return Σ |E_i| / r; 0 at rank 0."""
    return float(singular_values.double().abs().sum()) / max(len(singular_values), 1)


def frobenius(singular_values: Tensor) -> float:
    """Return √(Σ E_i²) / r; 0 at rank 0."""
    return float(singular_values.double().norm()) / max(len(singular_values), 1)


def elem_energy(singular_values: Tensor) -> float:
    """Return −Σ E_i² p_i ln(p_i + ε) / ln r: the entropy with each of its terms weighted by its energy.

    Reconstructed: no formula was published. 0 where :func:`spectral_entropy` is 0 for want of a value.
    """
    return _entropy(singular_values, weights=singular_values.double().square())


def mat_energy(singular_values: Tensor) -> float:
    """Return Σ E_i² · I: the entropy times the energy of all directions.

    Reconstructed: no formula was published.
    """
    return float(singular_values.double().square().sum()) * spectral_entropy(singular_values)


SPECTRAL_METRICS: Mapping[Metric, Callable[[Tensor], float]] = {
    "entropy": spectral_entropy,
    "nuclear": nuclear,
    "frobenius": frobenius,
    "elem_energy": elem_energy,
    "mat_energy": mat_energy,
}
"""Those that need E alone."""

RECONSTRUCTED: frozenset[Metric] = frozenset({"elem_energy", "mat_energy"})
"""Those whose formula was not published."""


def _entropy(singular_values: Tensor, weights: Tensor | None) -> float:
    energies = singular_values.double().square()
    total = float(energies.sum())
    if len(energies) < 2 or total < NOTHING:
        return 0.0
    p = energies / total
    terms = p * torch.log(p + EPSILON)
    if weights is not None:
        terms = terms * weights
    return -float(terms.sum()) / math.log(len(energies))
