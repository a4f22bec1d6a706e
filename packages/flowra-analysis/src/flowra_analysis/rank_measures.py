"""How many directions a spectrum really uses.

Conventions: σ is 1-D, non-negative, in any order; each measure is computed in float64 on σ / max σ, so none depends on
the scale. A zero (or empty) spectrum measures 0. With p_i = σ_i²/Σσ², stable rank, participation ratio and
effective rank of the energy are exponentials of the Rényi entropies of p of order ∞, 2 and 1; hence
1 ≤ stable ≤ participation ≤ effective (energy) ≤ effective ≤ rank, all equal r for r equal values.

Where only the leading k values and the energy Σσ² of all are known, each measure lies between those of two spectra:
what is left of the energy in as few further values as can hold it (each σ_k, and one smaller), and spread evenly over
all that there can be. Both are possible spectra, so the bounds cannot be narrowed. For measures that are functions of
the energies alone this is majorisation. For exp H(σ/Σσ), take σ_k as the unit, so that the known part has
Σσ log σ ≥ 0: the measure then rises with the sum s of the unknown values if these are equal, and s is largest when they
are, by Cauchy and Schwarz; and a least spectrum cannot hold two equal unknown values below σ_k, as it would fall if one
gave energy to the other, unless they were above e times the mean exp(Σσ log σ/Σσ), where only one other could be below.

Source: Roy & Vetterli (2007) for the effective rank; Marshall & Olkin (1979) for majorisation; docs/methods.md,
section 3.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flowra_analysis.layers import measurable_modules, weight_matrix

__all__ = [
    "effective_rank",
    "effective_rank_energy",
    "energy_rank",
    "leading_weight_spectrum",
    "participation_ratio",
    "profile_weights",
    "redundancy",
    "spectrum_decay",
    "spectrum_statistics",
    "stable_rank",
    "update_spectrum",
    "weight_spectrum",
]

FLOAT64_MAX_SIDE = 1024
POWER_ITERATIONS, OVERSAMPLING = 4, 4 / 3


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


def spectrum_decay(sigma: Tensor) -> Tensor:
    """Return the curve σᵢ/σ₁, in which the spectra of matrices of any size and scale compare (of Q, K and V, say).

    Args:
        sigma: 1-D, non-negative.

    Returns:
        As long as σ, float64, non-increasing, from 1 down; zeros for a zero spectrum.

    Raises:
        ValueError: if σ is not a spectrum.

    >>> spectrum_decay(torch.tensor([1.0, 4.0, 2.0])).tolist()
    [1.0, 0.5, 0.25]
    """
    leading = _normalised(sigma).sort(descending=True).values
    return torch.cat([leading, leading.new_zeros(len(sigma) - len(leading))])


def spectrum_statistics(
    kind: str, sigma: Tensor, shape: tuple[int, int], *, squared_norm: float | None = None
) -> dict[str, float]:
    """Measure a spectrum, whole or truncated, under the names that a :class:`FlowProfile` holds.

    Args:
        kind: what the matrix is, such as ``weight``, ``gradient``, ``activation`` or ``update``: the names' beginning.
        sigma: 1-D, non-negative: all values (any that are missing are zero), or the leading ones.
        shape: (m, n) of the matrix; at least as many rows and columns as values.
        squared_norm: Σσ² of *all* values, if σ holds the leading ones only. What is left of it lies in the values that
            are not there; less than σ holds, as an estimate may be, counts as nothing left.

    Returns:
        ``<kind>_effective_rank``, ``_stable_rank``, ``_participation_ratio``, ``_energy_rank_90`` and ``_redundancy``.
        If σ is truncated (a squared norm is given, and min(m, n) exceeds the number of values) these are lower bounds,
        of the redundancy the upper one; the other bounds are then there as ``<kind>_effective_rank_upper``,
        ``_participation_ratio_upper``, ``_energy_rank_90_upper`` and ``_redundancy_lower``, and
        ``<kind>_unresolved_energy`` is the share of the energy in the missing values. Names like these are there only
        for truncated spectra. The stable rank is exact in both cases. All this takes σ for exact: give only those
        values of a sketch that are accurate. Where they are too small, the upper bounds still hold, but what is missing
        from the large values is taken to be spread over small ones, and the lower bounds may be too high.

    Raises:
        ValueError: if σ is not a spectrum or longer than the shape allows, or the squared norm is not finite.

    >>> round(spectrum_statistics("weight", torch.ones(3), (4, 6))["weight_redundancy"], 6)
    0.25
    >>> known = spectrum_statistics("weight", torch.ones(3), (9, 9), squared_norm=5.0)
    >>> round(known["weight_effective_rank"], 3), round(known["weight_effective_rank_upper"], 3)
    (5.0, 8.677)
    """
    if squared_norm is None or min(shape) <= len(sigma):
        return {f"{kind}_{name}": value for name, value in _measures(sigma, shape).items()}
    if not math.isfinite(squared_norm) or squared_norm < 0:
        raise ValueError(f"squared_norm must be finite and not negative, got {squared_norm}; for kind {kind!r}")
    concentrated, flat, left = _completions(sigma, squared_norm, min(shape) - len(sigma))
    low, high = _measures(concentrated, shape), _measures(flat, shape)
    return {
        **{f"{kind}_{name}": value for name, value in low.items()},
        **{f"{kind}_{name}_upper": high[name] for name in ("effective_rank", "participation_ratio", "energy_rank_90")},
        f"{kind}_redundancy_lower": high["redundancy"],
        f"{kind}_unresolved_energy": left,
    }


def weight_spectrum(weight: Tensor) -> Tensor:
    """Compute the singular values of a weight.

    Args:
        weight: ``(m, n)``, floating point, finite. Not changed.

    Returns:
        ``(min(m, n),)``, non-increasing, on the device of the weight; float64 up to min(m, n) = 1024 and for float64
        weights, float32 above, where the rounding of a full SVD no longer matters to a rank measure. Up to that size,
        those of a weight in float32 or narrower are the roots of the eigenvalues of its float64 Gram matrix, at half
        the cost: off by 1e-8 σ₁ at most, less than the rounding of the weight itself.

    Raises:
        ValueError: if the weight is not a finite floating-point matrix.
    """
    _check_weight(weight)
    if weight.dtype == torch.float64 or min(weight.shape) > FLOAT64_MAX_SIDE:
        spectrum: Tensor = torch.linalg.svdvals(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
        return spectrum
    tall = weight.detach().double() if weight.shape[0] >= weight.shape[1] else weight.detach().double().T
    values: Tensor = torch.linalg.eigvalsh(tall.T @ tall)
    return values.flip(0).clamp(min=0).sqrt()


def leading_weight_spectrum(weight: Tensor, *, size: int = 128, seed: int = 0) -> tuple[Tensor, float]:
    """Approximate the leading singular values of a weight, and compute its squared norm.

    With Q an orthonormal basis of p = ⌈4k/3⌉ columns, found by subspace iteration from a Gaussian start, the values are
    the first k of Qᵀ W. Each is at most the one of W at its place, and together they miss Σ_{i≤k} (σᵢ² − σ̂ᵢ²) ≤ ‖W‖² −
    Σσ̂², which is known afterwards. What is missing from the basis in direction i shrinks by (σ_{p+1}/σᵢ)² in each of
    the four iterations: of the values of random 1000 x 1000 matrices (k = 96), the last was 5 % too small where the
    spectrum is flat, and 1 % or less where σᵢ falls like i^-½ or faster.

    Args:
        weight: ``(m, n)``, floating point, finite. Not changed.
        size: k ≥ 1, number of values; min(m, n) of them are all, and exact.
        seed: of the start, drawn on the CPU.

    Returns:
        ``(min(k, m, n),)``, non-increasing, on the device of the weight, in its dtype but at least float32; and
        ‖W‖_F² ≥ Σσ̂², summed in float64.

    Raises:
        ValueError: if the weight is not a finite floating-point matrix or the size is not positive.

    Source: Halko, Martinsson & Tropp (2011), SIAM Review 53, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    _check_weight(weight)
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    columns = min(math.ceil(size * OVERSAMPLING), *matrix.shape)
    start = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    sigma: Tensor = torch.linalg.svdvals(basis.T @ matrix)[:size]
    held = float(sigma.double().square().sum())
    return sigma, max(held, float(torch.linalg.vector_norm(matrix, dtype=torch.float64).square()))


def update_spectrum(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Compute the singular values of a low-rank update B A without forming it.

    With Aᵀ = Q_A R_A and B = Q_B R_B they are those of R_B R_Aᵀ, of the size of the rank.

    Args:
        lora_A: ``(r, n)``, floating point, finite.
        lora_B: ``(m, r)``, in which a scaling s and numbers E may have been multiplied.

    Returns:
        ``(min(r, m, n),)``, non-increasing, float64; all others of B A are zero.

    Raises:
        ValueError: if the factors do not fit each other or are not finite.

    Source: docs/methods.md, section 1.

    >>> update_spectrum(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [2.0], [0.0]])).tolist()
    [10.0]
    """
    if lora_A.ndim != 2 or lora_B.ndim != 2 or len(lora_A) != lora_B.shape[1]:
        raise ValueError(
            f"lora_A and lora_B must have shapes (r, n) and (m, r), got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        )
    a, b = lora_A.detach().double(), lora_B.detach().double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("lora_A and lora_B must be finite, got NaN or infinity")
    spectrum: Tensor = torch.linalg.svdvals(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T)
    return spectrum


def profile_weights(
    model: nn.Module, module_names: Iterable[str], *, exact_limit: int = 1024, size: int = 128, seed: int = 0
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Measure the weights of the named modules, as a :class:`FlowProfile` holds them.

    The weight of a convolution is measured as the matrix that it multiplies patches with, an embedding's as the matrix
    of its rows, a quantised one's as what it stands for; see :func:`weight_matrix`.

    Args:
        model: not changed.
        module_names: exact qualified names of layers, see :func:`is_measurable_layer`.
        exact_limit: largest min(m, n) for which all values are computed, a cost of about 4 m n min(m, n).
        size: number of leading values above that, about 27 m n size; see :func:`leading_weight_spectrum`.
        seed: of their approximation.

    Returns:
        Statistics by module name, those of :func:`spectrum_statistics` for the kind ``weight``, and spectra by module
        name, on the CPU.

    Raises:
        ValueError: if a name is unknown or a weight is not a finite floating-point matrix.
    """
    statistics, spectra = {}, {}
    for name, module in measurable_modules(model, module_names).items():
        weight = weight_matrix(module)
        squared_norm = None
        try:
            if min(weight.shape) <= max(exact_limit, size):
                sigma = weight_spectrum(weight)
            else:
                sigma, squared_norm = leading_weight_spectrum(weight, size=size, seed=seed)
        except ValueError as error:
            raise ValueError(f"{error}; for module {name!r}") from None
        spectra[name] = sigma.cpu()
        shape = (weight.shape[0], weight.shape[1])
        statistics[name] = spectrum_statistics("weight", spectra[name], shape, squared_norm=squared_norm)
    return statistics, spectra


def _measures(sigma: Tensor, shape: tuple[int, int]) -> dict[str, float]:
    return {
        "effective_rank": effective_rank(sigma),
        "stable_rank": stable_rank(sigma),
        "participation_ratio": participation_ratio(sigma),
        "energy_rank_90": float(energy_rank(sigma, 0.9)),
        "redundancy": redundancy(sigma, shape),
    }


def _completions(sigma: Tensor, squared_norm: float, missing: int) -> tuple[Tensor, Tensor, float]:
    """Return two spectra of this energy, and the share of it that σ does not hold.

    The first has what is left in as few values as can hold it, the second in all that are missing. If even those would
    have to exceed the least of σ, which then is off, both are the second.
    """
    scale = float(sigma.max()) if len(_normalised(sigma)) else 1.0
    head = sigma.detach().double() / scale
    total = squared_norm / scale / scale
    left = max(0.0, total - float(head.square().sum()))
    flat = head.new_full((missing,), math.sqrt(left / missing))
    least = float(head.min()) if len(head) else math.sqrt(left)
    few = flat
    if 0 < left < least**2 * missing:
        full = int(left / least**2)
        few = head.new_full((full + 1,), least)
        few[-1] = math.sqrt(max(0.0, left - full * least**2))
    return torch.cat([head, few]), torch.cat([head, flat]), left / total if left else 0.0


def _check_weight(weight: Tensor) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point matrix, got {weight.dtype} {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError(f"weight must be finite, got NaN or infinity in a matrix {tuple(weight.shape)}")


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
