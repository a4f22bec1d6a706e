"""How many directions a spectrum really uses.

Conventions: σ is 1-D, non-negative, in any order; each measure is computed in float64 on σ / max σ, so none depends on
the scale. A zero (or empty) spectrum measures 0. With p_i = σ_i²/Σσ², stable rank, participation ratio and
effective rank of the energy are exponentials of the Rényi entropies of p of order ∞, 2 and 1; hence
1 ≤ stable ≤ participation ≤ effective (energy) ≤ effective ≤ rank, all equal r for r equal values.

Source: Roy & Vetterli (2007) for the effective rank; docs/methods.md, section 3.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flowra_analysis.layers import measurable_modules, weight_matrix

__all__ = [
    "effective_rank",
    "effective_rank_energy",
    "energy_rank",
    "participation_ratio",
    "profile_weights",
    "redundancy",
    "stable_rank",
    "weight_spectrum",
]

FLOAT64_MAX_SIDE = 1024


def effective_rank(sigma: Tensor) -> float:
    """Compute exp(H(σ/Σσ)), H the entropy in nats. Source: Roy & Vetterli (2007), definition 1."""
    return _exp_entropy(_normalised(sigma))


def effective_rank_energy(sigma: Tensor) -> float:
    """Compute exp(H(σ²/Σσ²)): as :func:`effective_rank`, of the energy."""
    return _exp_entropy(_normalised(sigma).square())


def stable_rank(sigma: Tensor) -> float:
    """Compute Σσ²/max σ²."""
    return float(_normalised(sigma).square().sum())


def participation_ratio(sigma: Tensor) -> float:
    """Compute (Σσ²)²/Σσ⁴."""
    energy = _normalised(sigma).square()
    return float(energy.sum().square() / energy.square().sum()) if len(energy) else 0.0


def energy_rank(sigma: Tensor, fraction: float) -> int:
    """Count the largest values needed to hold a fraction of the energy Σσ².

    Args:
        sigma: 1-D, non-negative.
        fraction: τ in (0, 1].

    Returns:
        The smallest k with Σ_{i≤k} σ_i² ≥ τ Σσ², σ descending.

    Raises:
        ValueError: if σ is not a spectrum or the fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    energy = _normalised(sigma).square().sort(descending=True).values.cumsum(0)
    return 1 + int((energy < fraction * energy[-1]).sum()) if len(energy) else 0


def redundancy(sigma: Tensor, shape: tuple[int, int]) -> float:
    """Compute 1 - effective_rank(σ)/min(m, n): the part of the possible rank that is not used.

    Args:
        sigma: 1-D, non-negative, at most min(m, n) values.
        shape: (m, n) of the matrix.

    Returns:
        In [0, 1); 1 for a zero matrix.

    Raises:
        ValueError: if σ is not a spectrum or longer than the shape allows.
    """
    if min(shape) < max(1, len(sigma)):
        raise ValueError(f"shape must have at least {max(1, len(sigma))} rows and columns, got {tuple(shape)}")
    return max(0.0, 1 - effective_rank(sigma) / min(shape))


def weight_spectrum(weight: Tensor) -> Tensor:
    """Compute the singular values of a weight.

    Args:
        weight: ``(m, n)``, floating point, finite. Not changed.

    Returns:
        ``(min(m, n),)``, non-increasing, on the device of the weight; float64 up to min(m, n) = 1024 and for float64
        weights, float32 above, where the rounding of a full SVD no longer matters to a rank measure.

    Raises:
        ValueError: if the weight is not a finite floating-point matrix.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point matrix, got {weight.dtype} {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError(f"weight must be finite, got NaN or infinity in a matrix {tuple(weight.shape)}")
    small = min(weight.shape) <= FLOAT64_MAX_SIDE or weight.dtype == torch.float64
    spectrum: Tensor = torch.linalg.svdvals(weight.detach().to(torch.float64 if small else torch.float32))
    return spectrum


def profile_weights(
    model: nn.Module, module_names: Iterable[str]
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Measure the weights of the named modules, as a :class:`FlowProfile` holds them.

    Args:
        model: not changed.
        module_names: exact qualified names of layers, see :func:`is_measurable_layer`.

    Returns:
        Statistics by module name (``weight_effective_rank``, ``weight_stable_rank``, ``weight_redundancy``), and
        spectra by module name, on the CPU.

    Raises:
        ValueError: if a name is unknown or a weight is not a finite floating-point matrix.
    """
    statistics, spectra = {}, {}
    for name, module in measurable_modules(model, module_names).items():
        weight = weight_matrix(module)
        try:
            sigma = weight_spectrum(weight).cpu()
        except ValueError as error:
            raise ValueError(f"{error}; for module {name!r}") from None
        statistics[name] = {
            "weight_effective_rank": effective_rank(sigma),
            "weight_stable_rank": stable_rank(sigma),
            "weight_redundancy": redundancy(sigma, (weight.shape[0], weight.shape[1])),
        }
        spectra[name] = sigma
    return statistics, spectra


def _normalised(sigma: Tensor) -> Tensor:
    """Return σ/max σ in float64, without zeros; empty for a zero spectrum."""
    if sigma.ndim != 1 or not sigma.is_floating_point():
        raise ValueError(f"sigma must be 1-D and floating point, got {sigma.dtype} {tuple(sigma.shape)}")
    if not torch.isfinite(sigma).all() or (sigma < 0).any():
        raise ValueError("sigma must be finite and not negative, got NaN, infinity or a negative value")
    positive = sigma.detach().double()[sigma > 0]
    return positive / positive.max() if len(positive) else positive


def _exp_entropy(weights: Tensor) -> float:
    return float(torch.special.entr(weights / weights.sum()).sum().exp()) if len(weights) else 0.0
