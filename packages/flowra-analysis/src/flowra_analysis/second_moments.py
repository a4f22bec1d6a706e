"""Second moments of what passes through a layer, exact where they are small and sketched where they are large.

M = Σ v vᵀ / count for vectors v of size d. Up to a limit M is kept, d² numbers. Above it, its exact diagonal is kept,
and Y = M Ω for a fixed orthonormal Ω (d, k): d(k + 1) numbers. The Nyström approximation F Fᵀ = Y (Ωᵀ Y)⁺ Yᵀ then has
0 ⪯ F Fᵀ ⪯ M, and M ≈ F Fᵀ + D, D = diag M − diag F Fᵀ ≥ 0.

Source: Tropp, Yurtsever, Udell & Cevher (2017), NeurIPS, arXiv:1706.05736; docs/methods.md, section 11. Deviations: the
exact diagonal is put back; and where the paper shifts M for stability, eigenvalues of Ωᵀ Y below √d ε ‖Y‖ are raised to
that, ε of the dtype of the sums. It cannot fail, keeps F Fᵀ ⪯ M, and loses less of a moment of rank near k.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

__all__ = ["MomentMatrix", "SecondMoment"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MomentMatrix:
    """A symmetric positive semi-definite ``(d, d)``: M itself, or F Fᵀ + D where only a sketch of M was kept."""

    diagonal: Tensor
    """``(d,)``, exact in both cases."""
    dense: Tensor | None
    """``(d, d)``, symmetric: M, if it was kept."""
    low_rank: Tensor | None
    """``(d, k)``, orthogonal columns, longest first: F, if M was sketched."""

    def trace(self) -> float:
        """Compute tr M, exact in both cases."""
        return float(self.diagonal.double().sum())

    def factor(self) -> Tensor:
        """Return F with F Fᵀ = M, or for a sketched moment the best that is known of it.

        Returns:
            ``(d, d)`` or ``(d, k)``, orthogonal columns, longest first, in the dtype of the moment. The first r columns
            give the best approximation of rank r to F Fᵀ.
        """
        if self.low_rank is not None:
            return self.low_rank
        assert self.dense is not None
        values, vectors = torch.linalg.eigh(self.dense.double())
        factor: Tensor = vectors * values.clamp(min=0).sqrt()
        return factor.flip(1).to(self.dense.dtype)

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of F Fᵀ.

        Returns:
            ``(d,)``, those of M, or ``(k,)`` for a sketched moment, each ≤ the one of M at its place; float64, ≥ 0,
            non-increasing. Since F Fᵀ ⪯ M, the error ‖M − F Fᵀ‖ in the nuclear norm is the trace less their sum.
        """
        if self.low_rank is not None:
            return self.low_rank.double().square().sum(0).sort(descending=True).values  # equal ones, but for rounding
        assert self.dense is not None
        values: Tensor = torch.linalg.eigvalsh(self.dense.double())
        return values.clamp(min=0).flip(0)

    def matmul(self, vectors: Tensor) -> Tensor:
        """Compute M V, or (F Fᵀ + D) V, D = diag M − diag F Fᵀ.

        Args:
            vectors: V ``(d, q)``, in the dtype and on the device of the moment.

        Returns:
            ``(d, q)``.
        """
        if self.low_rank is None:
            assert self.dense is not None
            return self.dense @ vectors
        remainder = (self.diagonal - self.low_rank.square().sum(1)).clamp(min=0)
        return self.low_rank @ (self.low_rank.T @ vectors) + remainder.unsqueeze(1) * vectors

    def quadratic_form(self, vectors: Tensor) -> Tensor:
        """Compute Vᵀ M V, such as A C Aᵀ for the rows of an adapter's A, V = Aᵀ.

        Args:
            vectors: V ``(d, q)``, in the dtype and on the device of the moment.

        Returns:
            ``(q, q)``, symmetric.
        """
        form = vectors.T @ self.matmul(vectors)
        return (form + form.T) / 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SecondMoment:
    """What is known so far of the second moment of one side of one layer.

    A value: each step returns a new one. Batches may be split over states, and over processes, in any way and order;
    merged, they are the same to within rounding, if all began with the same arguments.

    >>> _ = torch.manual_seed(0)
    >>> x, v = torch.randn(8, 5, 300), torch.randn(300, 3)  # 40 tokens, so the moment has rank 40
    >>> exact = SecondMoment.init(300, per="token").update(x).finalise()
    >>> sketched = SecondMoment.init(300, per="token", dense_limit=100, size=50).update(x).finalise()
    >>> torch.dist(sketched.matmul(v), exact.matmul(v)) < 1e-3 * torch.linalg.norm(exact.matmul(v))
    tensor(True)
    """

    per: Literal["token", "example"]
    seed: int
    count: int
    """Real tokens or examples seen."""
    probes: Tensor | None
    """Ω ``(d, k)``; None where the moment is dense. States that begin as one share it."""
    sums: Tensor
    """Σ v vᵀ ``(d, d)``, or Σ v vᵀ Ω ``(d, k)``."""
    squares: Tensor
    """Σ v² ``(d,)``."""

    @classmethod
    def init(
        cls,
        dim: int,
        *,
        per: Literal["token", "example"],
        dense_limit: int = 2048,
        size: int = 256,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "SecondMoment":
        """Return the state before the first batch.

        Args:
            dim: d, size of the vectors.
            per: ``"token"`` for the mean E_t[v vᵀ] over real tokens; ``"example"`` for the sum over the tokens of an
                example, averaged over examples.
            dense_limit: largest d that is kept exactly, as d² numbers; 2048² are 16 MiB in float32.
            size: k ≥ 1, columns of the sketch above that. Where d ≤ k the moment is dense as well.
            seed: of Ω. It is drawn on the CPU, so it is the same on each device.
            dtype: to accumulate in, float32 or float64.
            device: of the vectors.

        Returns:
            The state that has seen nothing.

        Raises:
            ValueError: if the size is not positive or the dtype is narrower than float32.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if dtype not in {torch.float32, torch.float64}:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        probes = None
        if dim > max(dense_limit, size):
            gaussian = torch.randn(dim, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            probes = torch.linalg.qr(gaussian).Q.to(device, dtype)
        return cls(
            per=per,
            seed=seed,
            count=0,
            probes=probes,
            sums=torch.zeros(dim, dim if probes is None else size, dtype=dtype, device=device),
            squares=torch.zeros(dim, dtype=dtype, device=device),
        )

    def update(self, vectors: Tensor, real: Tensor | None = None) -> "SecondMoment":
        """Add the examples of one batch.

        Args:
            vectors: ``(N, T, d)``, floating point.
            real: ``(N, T)``, true at the tokens that count; None if all do.

        Returns:
            The state with these N examples.

        Raises:
            ValueError: if the shapes do not fit, or the sums are then not finite.
        """
        dim = len(self.squares)
        if vectors.ndim != 3 or vectors.shape[2] != dim or (real is not None and real.shape != vectors.shape[:2]):
            raise ValueError(
                f"vectors and real must have shapes (N, T, {dim}) and (N, T), got {tuple(vectors.shape)} and"
                f" {None if real is None else tuple(real.shape)}"
            )
        v = (vectors.flatten(0, 1) if real is None else vectors[real]).to(self.sums.dtype)
        sums = torch.addmm(self.sums, v.T, v if self.probes is None else v @ self.probes)
        squares = self.squares + v.square().sum(0)
        if not (sums.sum() + squares.sum()).isfinite():
            raise ValueError(
                "vectors must be finite, and their products too, got NaN or infinity. Check the loss and the inputs of"
                " this batch, or compute in a wider dtype."
            )
        count = self.count + (len(v) if self.per == "token" else len(vectors))
        return replace(self, count=count, sums=sums, squares=squares)

    def merge(self, other: "SecondMoment") -> "SecondMoment":
        """Return the state that has seen the examples of both, on the device of this one.

        Raises:
            ValueError: if the two did not begin with the same per, shape, seed and dtype.
        """
        ours, theirs = self._origin(), other._origin()
        if ours != theirs:
            raise ValueError(f"other must begin with the same (per, shape, seed, dtype) {ours}, got {theirs}")
        return replace(
            self,
            count=self.count + other.count,
            sums=self.sums + other.sums.to(self.sums),
            squares=self.squares + other.squares.to(self.squares),
        )

    def finalise(self) -> MomentMatrix:
        """Return the moment, in the dtype and on the device of the state; the sketch is factorised in float64.

        With λ the eigenvalues of M, E‖M − F Fᵀ‖ ≤ min_{r<k−1} (1 + r/(k − r − 1)) Σ_{i>r} λᵢ in the nuclear norm
        (Tropp et al. 2017); the error that was made is known, see :meth:`MomentMatrix.eigenvalues`.

        Raises:
            ValueError: if nothing was seen.
        """
        if not self.count:
            raise ValueError("the state must have seen at least one example, got none. Give more batches.")
        diagonal = self.squares / self.count
        if self.probes is None:
            return MomentMatrix(diagonal=diagonal, dense=(self.sums + self.sums.T) / (2 * self.count), low_rank=None)
        y = self.sums.double() / self.count
        floor = math.sqrt(len(y)) * torch.finfo(self.sums.dtype).eps * float(y.norm())
        low_rank = _nystrom_factor(y, self.probes.double(), floor) if floor else torch.zeros_like(y)
        return MomentMatrix(diagonal=diagonal, dense=None, low_rank=low_rank.to(self.sums.dtype))

    def _origin(self) -> tuple[str, tuple[int, ...], int, torch.dtype]:
        return self.per, tuple(self.sums.shape), self.seed, self.sums.dtype


def _nystrom_factor(y: Tensor, omega: Tensor, floor: float) -> Tensor:
    """Factorise Y (Ωᵀ Y)⁺ Yᵀ, with what is below the floor in Ωᵀ Y, and may be rounding, raised to it."""
    values, vectors = torch.linalg.eigh((omega.T @ y + y.T @ omega) / 2)
    u, sigma, _ = torch.linalg.svd(y @ (vectors / values.clamp(min=floor).sqrt()), full_matrices=False)
    factor: Tensor = u * sigma
    return factor
