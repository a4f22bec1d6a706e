"""Where the factors of LoRA begin: PiSSA, MiLoRA, OLoRA, orthogonal, LoRA-GA, LoRA-One and ``flow_v``.

All are maps from tensors to factors; EVA, which begins at the inputs of a layer, is in ``input_pca.py``. A weight W and
a gradient G = ∂ℓ/∂W are ``(m, n)``, output by input; that of a convolution is flattened to ``(m, n · k…)`` first. The
update is s · B A, with A ``(r, n)`` and B ``(m, r)``.

Some methods begin at B A ≠ 0, and their papers subtract s · B A from the base weight. Here the base weight is never
touched: :attr:`Initialisation.offset` asks the adapter to subtract its own start. In exact arithmetic the trained model
is the same; the base can be shared, and the update is plain LoRA of rank 2r, s · [B, -B₀] [A; A₀].

Conventions: computed and returned in float32, or in float64 from float64, on the device of the argument; contiguous,
and sharing no memory with it. Singular vectors have no sign of their own: here the largest entry of each right one is
positive, the first of equals. B A does not depend on that.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Initialisation", "flow_v", "lora_ga", "lora_one", "milora", "olora", "orthogonal", "pissa"]

_SMALL = 256
"""Smaller side of the largest gradient that is always decomposed exactly."""


@dataclass(frozen=True, slots=True, eq=False)
class Initialisation:
    """The factors of one layer's update at birth."""

    lora_A: Tensor
    """A₀, ``(r, n)``."""
    lora_B: Tensor
    """B₀, ``(m, r)``."""
    offset: bool
    """True: the update is s · (B A - B₀ A₀), with these very factors frozen in the second term, so it is 0 at birth.
    False: it is s · B A, and B₀ A₀ = 0."""


@torch.no_grad()
def pissa(
    weight: Tensor,
    rank: int,
    *,
    scaling: float,
    iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Initialisation:
    """Begin at the principal part of the weight: s · B A = Σ_{i≤r} σᵢ uᵢ vᵢᵀ, balanced, BᵀB = A Aᵀ = Σ_r/|s|.

    A singular value of 0 gives a row of A and a column of B of zeros, which no gradient moves.

    Args:
        weight: W ``(m, n)``, floating point.
        rank: 1 ≤ rank ≤ min(m, n).
        scaling: s, finite and not 0.
        iterations: power iterations ≥ 0 of a randomised decomposition with rank + 10 probes (Halko, Martinsson & Tropp
            2011), or None for the exact one, which is slow for large weights.
        generator: source of randomness of the randomised decomposition, which needs it.

    Returns:
        The factors, with an offset.

    Raises:
        TypeError: if the weight is not floating point.
        ValueError: if the weight is not a finite matrix, an argument is out of range, or ``generator`` is missing.

    Source: Meng, Wang & Zhang (2024), arXiv:2404.02948, section 3. Deviations: the base weight stays (see
    :class:`Initialisation`); the singular values are divided by s, as in PEFT, while the paper has s = 1; there are 10
    probes more than the rank, in PEFT none.
    """
    matrix = _matrix(weight, "weight")
    _check_rank(rank, matrix.shape, "min(m, n)")
    _check_scaling(scaling)
    if iterations is None:
        u, sigma, vh = leading_svd(matrix, min(matrix.shape))
    else:
        u, sigma, vh = leading_svd(matrix, rank + 10, iterations=iterations, generator=generator)
    return _balanced(u[:, :rank], sigma[:rank], vh[:rank], scaling)


@torch.no_grad()
def milora(weight: Tensor, rank: int, *, scaling: float) -> Initialisation:
    """Begin at the minor part of the weight: as :func:`pissa` with the r smallest of its min(m, n) singular values.

    Args:
        weight: W ``(m, n)``, floating point. The smaller the smallest singular values, the slower the start; where W
            has no full rank, directions of singular value 0 never move.
        rank: 1 ≤ rank ≤ min(m, n).
        scaling: s, finite and not 0.

    Returns:
        The factors, largest singular value first, with an offset.

    Raises:
        TypeError: if the weight is not floating point.
        ValueError: if the weight is not a finite matrix, or an argument is out of range.

    Source: Wang et al. (2024), arXiv:2406.09044. Deviations: the base weight stays.
    """
    matrix = _matrix(weight, "weight")
    _check_rank(rank, matrix.shape, "min(m, n)")
    _check_scaling(scaling)
    u, sigma, vh = leading_svd(matrix, min(matrix.shape))
    return _balanced(u[:, -rank:], sigma[-rank:], vh[-rank:], scaling)


@torch.no_grad()
def olora(weight: Tensor, rank: int, *, scaling: float) -> Initialisation:
    """Begin at a part of W = Q R: B has the first r columns of Q, orthonormal, and A the first r rows of R, over s.

    The diagonal of R is ≥ 0, which makes Q and R unique where the first columns of W are independent.

    Args:
        weight: W ``(m, n)``, floating point.
        rank: 1 ≤ rank ≤ min(m, n).
        scaling: s, finite and not 0.

    Returns:
        The factors, with an offset; s · B A = Q_r R_r.

    Raises:
        TypeError: if the weight is not floating point.
        ValueError: if the weight is not a finite matrix, or an argument is out of range.

    Source: Büyükakyüz (2024), arXiv:2406.01775. Deviations: the base weight stays; A is divided by s. PEFT 0.21 does
    not divide, and subtracts s · Q_r R_r: for s = 1 the two agree.
    """
    matrix = _matrix(weight, "weight")
    _check_rank(rank, matrix.shape, "min(m, n)")
    _check_scaling(scaling)
    q, r = _positive_qr(matrix)
    return Initialisation((r[:rank] / scaling).contiguous(), q[:, :rank].contiguous(), offset=True)


@torch.no_grad()
def orthogonal(
    m: int, n: int, rank: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Initialisation:
    """Begin with two factors that are not 0 and whose product is: the rows of B are orthogonal to the columns of A.

    Of a random orthogonal ``(r, r)`` matrix, the odd rows Q₁ and the even rows Q₂ span complements; A = Q₁ᵀ Z₁ / 10 and
    B = Z₂ Q₂ / 10 with Gaussian Z₁ ``(r/2, n)`` and Z₂ ``(m, r/2)``. So B A = 0, and each factor has rank r/2.

    Args:
        m: size of the layer's output.
        n: size of the layer's input.
        rank: even, 2 ≤ rank ≤ min(m, n).
        generator: source of randomness. Device: of the factors.
        dtype: of the factors. B A is 0 to its rounding only: the narrower it is, the further from the base the start.

    Returns:
        The factors, without an offset.

    Raises:
        ValueError: if the rank is odd or out of range.

    Source: Datta, "Rethink LoRA initialisations", https://datta0.github.io/posts/rethink-lora-init/; PEFT's
    ``orthogonal``, whose numbers a float32 CPU generator with the same seed repeats. Deviations: none.
    """
    _check_rank(rank, (m, n), "min(m, n)")
    if rank % 2:
        raise ValueError(f"rank must be even for orthogonal factors, got {rank}")
    shapes = ((rank, rank), (n, rank // 2), (rank // 2, m))
    square, z_a, z_b = (torch.randn(shape, generator=generator, device=generator.device) for shape in shapes)
    q = torch.linalg.qr(square.double()).Q
    lora_A = (z_a.double() @ q[0::2]).T / 10
    lora_B = z_b.double().T @ q[1::2] / 10
    return Initialisation(lora_A.to(dtype).contiguous(), lora_B.to(dtype).contiguous(), offset=False)


@torch.no_grad()
def lora_ga(gradient: Tensor, rank: int, *, gamma: float = 16.0, generator: torch.Generator) -> Initialisation:
    """Begin where the first step of gradient descent on A and B is nearest to that on W.

    With G = U Σ Vᵀ, A = c · V_{1…r}ᵀ and B = c · U_{r+1…2r}, c = m^¼/√γ. A small step η of gradient descent then
    changes s · B A by -η s² c² times the best approximation of G of rank 2r.

    Args:
        gradient: G ``(m, n)``, floating point, of the loss over some batches; its scale does not matter. Directions
            beyond the rank of G are arbitrary.
        rank: 1 ≤ rank ≤ min(m, n)/2, as 2r directions are used.
        gamma: γ, finite and > 0; the larger, the smaller the factors.
        generator: source of randomness for the decomposition: 4r probes and 4 power iterations. Where min(m, n) ≤ 256,
            or ≤ 4r, it is exact and draws nothing.

    Returns:
        The factors, with an offset. They do not depend on s.

    Raises:
        TypeError: if the gradient is not floating point.
        ValueError: if the gradient is not a finite matrix other than 0, or an argument is out of range.

    Source: Wang, Yu & Li (2024), arXiv:2407.05000, and the authors' code with ``direction="ArB2r"``,
    ``scale="stable"``. Deviations: the base weight stays. PEFT 0.21 takes the same directions, but leaves A orthonormal
    and multiplies B by c and by the singular values, so its factors scale with the gradient.
    """
    matrix = _matrix(gradient, "gradient")
    _check_rank(2 * rank, matrix.shape, "min(m, n)", "2 · rank")
    u, _, vh = _gradient_svd(matrix, rank, gamma, generator)
    scale = matrix.shape[0] ** 0.25 / math.sqrt(gamma)
    return Initialisation(scale * vh[:rank], (scale * u[:, rank : 2 * rank]).contiguous(), offset=True)


@torch.no_grad()
def lora_one(gradient: Tensor, rank: int, *, gamma: float = 128.0, generator: torch.Generator) -> Initialisation:
    """Begin at the best approximation of rank r to a step along the negative gradient: B A = -G_r / (σ₁ γ), balanced.

    Args:
        gradient: G ``(m, n)``, floating point, of the loss over some batches; its scale does not matter. A singular
            value of 0 gives a row of A and a column of B of zeros, which no gradient moves.
        rank: 1 ≤ rank ≤ min(m, n).
        gamma: γ, finite and > 0; the larger, the smaller the factors.
        generator: source of randomness for the decomposition, as in :func:`lora_ga`.

    Returns:
        The factors, with an offset. They do not depend on s.

    Raises:
        TypeError: if the gradient is not floating point.
        ValueError: if the gradient is not a finite matrix other than 0, or an argument is out of range.

    Source: Zhang, Liu & Chen (2025), arXiv:2502.01235, and the authors' code with ``scale="stable"``, without its
    preconditioners. Deviations: the paper takes the step, so that training begins at W + s · B A; here the offset
    takes it back, so that attaching changes nothing. ``dataclasses.replace(start, offset=False)`` is the paper's start.
    The authors' code decomposes with 512 probes and 16 iterations.
    """
    matrix = _matrix(gradient, "gradient")
    _check_rank(rank, matrix.shape, "min(m, n)")
    u, sigma, vh = _gradient_svd(matrix, rank, gamma, generator)
    return _balanced(u[:, :rank], sigma[:rank] / sigma[0], vh[:rank], -gamma)


@torch.no_grad()
def flow_v(directions: Tensor, rank: int, *, out_features: int) -> Initialisation:
    """Begin with A an orthonormal basis of the leading input directions, and B = 0.

    The first step of gradient descent on B then changes s · B A by -η s² G P, P the projection on these directions. The
    first k rows of A span the first k directions, and are the same for each rank ≥ k.

    Args:
        directions: ``(k, n)``, floating point, linearly independent rows, the leading one first, such as the right
            singular vectors of a gradient (docs/methods.md, section 10); they need be neither unit nor orthogonal.
        rank: 1 ≤ rank ≤ min(k, n, m).
        out_features: m, size of the layer's output.

    Returns:
        The factors, without an offset.

    Raises:
        TypeError: if the directions are not floating point.
        ValueError: if they are not a finite matrix of independent rows, or the rank is out of range.

    Source: Flowra's own.
    """
    matrix = _matrix(directions, "directions")
    _check_rank(rank, (*matrix.shape, out_features), "min(k, n, m)")
    number = torch.finfo(matrix.dtype)
    unit = matrix[:rank] / torch.linalg.vector_norm(matrix[:rank], dim=1, keepdim=True).clamp(min=number.tiny)
    q, r = _positive_qr(unit.T)
    dependent = r.diagonal() <= math.sqrt(matrix.shape[1]) * number.eps
    if dependent.any():
        row = int(dependent.nonzero()[0])
        raise ValueError(
            f"directions must be linearly independent, got row {row} in the span of those before it."
            f" Lower the rank to {row}, or measure more data."
        )
    return Initialisation(q.T.contiguous(), matrix.new_zeros(out_features, rank), offset=False)


def leading_svd(
    matrix: Tensor, size: int, *, iterations: int = 4, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a matrix, exactly where ``size`` reaches its smaller side, else by randomised subspace iteration.

    Args:
        matrix: ``(m, n)``, float32 or float64.
        size: number of triplets ≥ 1; leading ones are accurate if it is larger than what is wanted by some.
        iterations: power iterations ≥ 0.
        generator: of the Gaussian probes; needed where the result is not exact.

    Returns:
        U ``(m, k)``, σ ``(k,)`` non-increasing and Vᵀ ``(k, n)``, k = min(size, m, n), in the signs of this module.

    Raises:
        ValueError: if ``iterations`` is negative or ``generator`` is missing.

    Source: Halko, Martinsson & Tropp (2011), algorithms 4.4 and 5.1.
    """
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    if size >= min(matrix.shape):
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    elif generator is None:
        raise ValueError("generator must be given for a randomised decomposition, got None")
    else:
        shape = (matrix.shape[1], size)
        probes = torch.randn(shape, generator=generator, dtype=matrix.dtype, device=generator.device)
        basis = torch.linalg.qr(matrix @ probes.to(matrix.device)).Q
        for _ in range(iterations):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        core, sigma, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ core
    signs = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
    return u * signs.T, sigma, signs * vh


def _gradient_svd(matrix: Tensor, rank: int, gamma: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    if not math.isfinite(gamma) or gamma <= 0:
        raise ValueError(f"gamma must be finite and > 0, got {gamma}")
    if not matrix.any():
        raise ValueError(
            "gradient must not be 0, got zeros only. Give batches whose loss depends on the layer, or exclude it."
        )
    smaller = min(matrix.shape)
    return leading_svd(matrix, 4 * rank if smaller > _SMALL else smaller, generator=generator)


def _balanced(u: Tensor, sigma: Tensor, vh: Tensor, scaling: float) -> Initialisation:
    """Split U Σ Vᵀ / s evenly; the sign of s goes to B."""
    root = (sigma / abs(scaling)).sqrt()
    lora_B = math.copysign(1.0, scaling) * root * u
    return Initialisation((root[:, None] * vh).contiguous(), lora_B.contiguous(), offset=True)


def _positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(matrix.dtype)
    return q * signs, signs[:, None] * r


def _matrix(tensor: Tensor, name: str) -> Tensor:
    """Return a finite matrix in float32, or float64 if it was."""
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {tensor.dtype}."
            " Dequantise it first, or choose an initialisation that does not decompose it."
        )
    if tensor.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(tensor.shape)}. Flatten it to (m, n).")
    matrix = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return matrix


def _check_rank(rank: int, sizes: tuple[int, ...], bound: str, name: str = "rank") -> None:
    if not 1 <= rank <= min(sizes):
        raise ValueError(f"{name} must be in [1, {bound} = {min(sizes)}], got {rank}")


def _check_scaling(scaling: float) -> None:
    if not math.isfinite(scaling) or scaling == 0:
        raise ValueError(f"scaling must be finite and not 0, got {scaling}")
