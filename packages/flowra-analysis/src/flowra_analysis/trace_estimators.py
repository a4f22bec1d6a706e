"""Traces of matrices that are known by their products with vectors only, from random probes.

A matrix M (d, d) is a function of blocks V (d, K) to M V. For a Hessian that is its product with each column; its trace
is then the sum of its eigenvalues. The trace of JᵀJ is ‖J‖²_F, which one jvp for each probe estimates.

Source: Girard (1989); Hutchinson (1989); Hutch++: Meyer, Musco, Musco & Woodruff (2021), arXiv:2010.09649, algorithm 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowra_analysis.jacobian_products import JacobianProducts, inner_products

__all__ = ["TraceEstimate", "hutch_plus_plus_trace", "hutchinson_trace", "squared_jacobian_norms"]


class TraceEstimate(NamedTuple):
    """A mean over probes and what is known of its error; float64."""

    mean: Tensor
    """Scalar, or ``(N,)`` where there is one matrix for each example."""
    standard_error: Tensor
    """Of the same shape: sample standard deviation (K - 1) over √K; NaN for a single probe, which does not tell."""


def hutchinson_trace(
    matvec: Callable[[Tensor], Tensor],
    dim: int,
    *,
    num_probes: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TraceEstimate:
    """Estimate tr M as the mean of zᵀ M z over Rademacher vectors z.

    Unbiased. The variance for symmetric M is 2(‖M‖²_F − Σ Mᵢᵢ²)/K, so a diagonal M needs one probe.

    Args:
        matvec: ``(d, K)`` to ``(d, K)``, V to M V, dtype and device kept.
        dim: d ≥ 1.
        num_probes: K ≥ 1. Cost: this many products.
        seed: of the probes, drawn on the CPU; the global generator is not touched.
        dtype: of the probes.
        device: of the probes.

    Returns:
        Scalars, summed in float64.

    Raises:
        ValueError: if a size is out of range, or the products have another shape or are not finite.

    >>> found = hutchinson_trace(lambda v: torch.tensor([[1.0], [2.0]]) * v, 2, num_probes=1)
    >>> found.mean
    tensor(3., dtype=torch.float64)
    """
    _check_sizes(dim, num_probes)
    probes = _rademacher(dim, num_probes, torch.Generator().manual_seed(seed), dtype, device)
    return _mean(_quadratic_forms(matvec, probes))


def hutch_plus_plus_trace(
    matvec: Callable[[Tensor], Tensor],
    dim: int,
    *,
    num_matvecs: int = 48,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TraceEstimate:
    """Estimate tr M exactly on a subspace that holds its leading directions, and by probes on the rest.

    With k = ⌊K/3⌋ and Q an orthonormal basis of M S, S (d, k) Rademacher, it is tr(Qᵀ M Q) plus the mean over k probes
    g of gᵀ P M P g, P = I − Q Qᵀ. For K products and positive semi-definite M the error is O(tr M / K), where that of
    :func:`hutchinson_trace` is O(‖M‖_F / √K): better on a decaying spectrum. Exact for d ≤ k, and for a rank of at most
    k unless S is unlucky. On a flat spectrum the subspace uses up products and gives little.

    Args:
        matvec: ``(d, k)`` to ``(d, k)``, V to M V, dtype and device kept; called three times.
        dim: d ≥ 1.
        num_matvecs: K ≥ 3. Cost: this many products, or up to two less.
        seed: of S and g, drawn on the CPU; the global generator is not touched.
        dtype: of what is multiplied with M; Q is found in float64.
        device: of the same.

    Returns:
        Scalars, summed in float64; the standard error is that of the second part.

    Raises:
        ValueError: if a size is out of range, or the products have another shape or are not finite.

    >>> u = torch.arange(100.0).unsqueeze(1) / 100
    >>> round(float(hutch_plus_plus_trace(lambda v: u @ (u.T @ v), 100, num_matvecs=6).mean), 3)  # rank 1
    32.835
    """
    if num_matvecs < 3:
        raise ValueError(f"num_matvecs must be at least 3, got {num_matvecs}")
    _check_sizes(dim, num_matvecs)
    generator = torch.Generator().manual_seed(seed)
    num_probes = num_matvecs // 3
    sketch = _product(matvec, _rademacher(dim, min(num_probes, dim), generator, dtype, device))
    basis = torch.linalg.qr(sketch.double()).Q
    probes = _rademacher(dim, num_probes, generator, dtype, device).double()
    probes = (probes - basis @ (basis.T @ probes)).to(dtype)
    rest = _mean(_quadratic_forms(matvec, probes))
    return rest._replace(mean=rest.mean + _quadratic_forms(matvec, basis.to(dtype)).sum())


def squared_jacobian_norms(products: JacobianProducts, *, num_probes: int = 16, seed: int = 0) -> TraceEstimate:
    """Estimate ‖J_n‖²_F of each example's Jacobian as the mean of ‖J_n z‖² over Rademacher vectors z.

    Args:
        products: the Jacobians.
        num_probes: K ≥ 1. Cost: this many jvps for the whole batch.
        seed: of the probes, independent for each example, drawn on the CPU; the global generator is not touched.

    Returns:
        ``(N,)``, summed in float64. The variance is 2(‖JᵀJ‖²_F − Σ (JᵀJ)ᵢᵢ²)/K.

    Raises:
        ValueError: if the number is out of range, or a product is not finite.

    >>> layer = torch.nn.Linear(5, 1)  # J is a row
    >>> found = squared_jacobian_norms(JacobianProducts(layer, torch.zeros(1, 5)), num_probes=400)
    >>> bool((found.mean - layer.weight.square().sum()).abs() < 3 * found.standard_error)
    True
    """
    _check_sizes(1, num_probes)
    generator = torch.Generator().manual_seed(seed)
    images = (products.jvp(products.rademacher(generator)) for _ in range(num_probes))
    return _mean(torch.stack([inner_products(image, image) for image in images]))


def _check_sizes(dim: int, num_probes: int) -> None:
    if dim < 1 or num_probes < 1:
        raise ValueError(f"dim and num_probes must be at least 1, got {dim} and {num_probes}")


def _rademacher(
    dim: int, num: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    signs = torch.randint(0, 2, (num, dim), generator=generator, dtype=torch.int8) * 2 - 1
    return signs.T.to(device, dtype)


def _product(matvec: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    product = matvec(vectors).detach()
    if product.shape != vectors.shape or not product.isfinite().all():
        what = "NaN or infinity" if product.shape == vectors.shape else f"shape {tuple(product.shape)}"
        raise ValueError(f"matvec must map (d, K) = {tuple(vectors.shape)} to finite values of that shape, got {what}")
    return product


def _quadratic_forms(matvec: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """Compute vᵀ M v for each column, ``(K,)``, float64."""
    return (vectors.double() * _product(matvec, vectors).double()).sum(0)


def _mean(samples: Tensor) -> TraceEstimate:
    """Average over the first axis."""
    if not samples.isfinite().all():
        raise ValueError("products must be finite, and their squares too, got NaN or infinity. Check the input.")
    num = len(samples)
    error = samples.std(0) / math.sqrt(num) if num > 1 else torch.full_like(samples[0], math.nan)
    return TraceEstimate(samples.mean(0), error)
