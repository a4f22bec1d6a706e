"""Second moments of what passes through a layer, exact where they are small and sketched where they are large.

M = Σ v vᵀ / count for vectors v of size d. Up to a limit M is kept, d² numbers. Above it, its exact diagonal is kept,
and Y = M Ω for a fixed orthonormal Ω (d, k): d(k + 1) numbers. The Nyström approximation F Fᵀ = Y (Ωᵀ Y)⁺ Yᵀ then has
0 ⪯ F Fᵀ ⪯ M, and M ≈ F Fᵀ + D, D = diag M − diag F Fᵀ ≥ 0. Of one-hot vectors, M is its diagonal; no more is kept.

Source: Tropp, Yurtsever, Udell & Cevher (2017), NeurIPS, arXiv:1706.05736; docs/methods.md, section 11. Deviations: the
exact diagonal is put back; and where the paper shifts M for stability, eigenvalues of Ωᵀ Y below √d ε ‖Y‖ are raised to
that, ε of the dtype of the sums. It cannot fail, keeps F Fᵀ ⪯ M, and loses less of a moment of rank near k.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flowra_analysis.moment_matrix import MomentMatrix

__all__ = ["SecondMoment"]

LEAST_BLOCK, NUM_BLOCKS = 128, 8


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, weakref_slot=True)
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
    """Ω ``(d, k)``; None where the moment is not sketched. States that begin as one share it."""
    triangle: Tensor | None
    """The lower triangle of Σ v vᵀ where M is kept, flat: blocks of rows, each up to and with its square on the
    diagonal."""
    sums: Tensor | None
    """Σ v vᵀ Ω ``(d, k)``, or ``(G, d, k)``, where M is sketched; Σ v vᵀ ``(G, d, d)`` where it is kept for groups.
    None with a triangle, and for a diagonal moment."""
    squares: Tensor
    """Σ v² ``(d,)``, or ``(G, d)``."""

    def __post_init__(self) -> None:
        if self.triangle is not None and self.triangle.shape != (_flat_size(self.squares.shape[-1]),):
            raise ValueError(
                f"triangle must have shape {(_flat_size(self.squares.shape[-1]),)}, got {tuple(self.triangle.shape)}"
            )

    @classmethod
    def init(
        cls,
        dim: int,
        *,
        per: Literal["token", "example"],
        form: Literal["full", "diagonal"] = "full",
        groups: int | None = None,
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
            form: ``"diagonal"`` keeps diag M alone, which for one-hot vectors is all of M.
            groups: G, for as many moments at once, of vectors ``(G, N, T, d)``; None for one, of ``(N, T, d)``.
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
        if form == "full" and dim > max(dense_limit, size):
            gaussian = torch.randn(dim, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            probes = torch.linalg.qr(gaussian).Q.to(device, dtype).contiguous()  # as it is when read from a file
        shape = (dim,) if groups is None else (groups, dim)
        squares = torch.zeros(shape, dtype=dtype, device=device)
        zero = torch.zeros((), dtype=dtype, device=device)  # takes no room before the first batch
        triangle = sums = None
        if form == "full" and probes is None and groups is None:
            triangle = zero.expand(_flat_size(dim))
        elif form == "full":
            sums = zero.expand(*shape, dim if probes is None else size)
        return cls(per=per, seed=seed, count=0, probes=probes, triangle=triangle, sums=sums, squares=squares)

    def emptied(self) -> "SecondMoment":
        """Return the state before the first batch that began as this one did."""
        triangle, sums = (
            None if each is None else each.new_zeros(()).expand(each.shape) for each in (self.triangle, self.sums)
        )
        return replace(self, count=0, triangle=triangle, sums=sums, squares=torch.zeros_like(self.squares))

    def update(self, vectors: Tensor, real: Tensor | None = None, *, columns: Tensor | None = None) -> "SecondMoment":
        """Add the examples of one batch. Costs T d²/2 to T d² multiplications for T tokens, T d k for a sketch.

        Args:
            vectors: ``(N, T, d)``, floating point; ``(G, N, T, d)`` with groups.
            real: ``(N, T)``, true at the tokens that count; None if all do.
            columns: ``(U,)``, distinct, where the vectors are zero but at these places: then they are ``(N, T, U)``.

        Returns:
            The state with these N examples.

        Raises:
            ValueError: if the shapes do not fit, or the sums are then not finite.
        """
        *groups, dim = self.squares.shape
        expected = (*groups, "N", "T", dim if columns is None else len(columns))
        fits = vectors.ndim == len(expected) and all(
            have == want for have, want in zip(vectors.shape, expected, strict=True) if want not in {"N", "T"}
        )
        if not fits or (real is not None and real.shape != vectors.shape[-3:-1]):
            raise ValueError(
                f"vectors and real must have shapes ({', '.join(map(str, expected))}) and (N, T), got"
                f" {tuple(vectors.shape)} and {None if real is None else tuple(real.shape)}"
            )
        v = (vectors.flatten(-3, -2) if real is None else vectors[..., real, :]).detach().to(self.squares.dtype)
        added = self._added(v) if columns is None else self._added_at(v, columns)
        checked = added.squares.sum()
        if added.sums is not None and self.probes is not None:  # |M_ij|² ≤ M_ii M_jj bounds all that is not sketched
            checked = checked + added.sums.sum()
        if not checked.isfinite():
            raise ValueError(
                "vectors must be finite, and their products too, got NaN or infinity. Check the loss and the inputs of"
                " this batch, or compute in a wider dtype."
            )
        count = self.count + (v.shape[-2] if self.per == "token" else vectors.shape[-3])
        return replace(added, count=count)

    def merge(self, other: "SecondMoment") -> "SecondMoment":
        """Return the state that has seen the examples of both, on the device of this one.

        Raises:
            ValueError: if the two did not begin with the same per, shape, seed and dtype.
        """
        origins = self._origin(), other._origin()
        if origins[0] != origins[1]:
            raise ValueError(f"other must begin with the same (per, shape, seed, dtype) {origins[0]}, got {origins[1]}")
        triangle, sums = (
            None if ours is None or theirs is None else ours + theirs.to(ours)
            for ours, theirs in ((self.triangle, other.triangle), (self.sums, other.sums))
        )
        squares = self.squares + other.squares.to(self.squares)
        return replace(self, count=self.count + other.count, triangle=triangle, sums=sums, squares=squares)

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
        if self.triangle is not None:
            return MomentMatrix(diagonal=diagonal, dense=_unfolded(self.triangle, len(diagonal)).div_(self.count))
        if self.sums is None:
            return MomentMatrix(diagonal=diagonal)
        if self.probes is None:
            return MomentMatrix(diagonal=diagonal, dense=_mirrored(self.sums).div_(self.count))
        omega = self.probes.double()
        eps = torch.finfo(self.sums.dtype).eps
        means = (self.sums.double() / self.count).view(-1, *omega.shape)
        factors = torch.stack([_nystrom_factor(mean, omega, eps) for mean in means])
        return MomentMatrix(diagonal=diagonal, low_rank=factors.view_as(self.sums).to(self.sums.dtype))

    def _added(self, v: Tensor) -> "SecondMoment":
        """Return the state with tokens ``(…, T, d)``, not counted."""
        if self.triangle is not None:
            triangle = self.triangle.new_empty(self.triangle.shape)
            squares = torch.empty_like(self.squares)
            blocks = zip(
                _blocks(len(squares)), _rows(self.triangle, len(squares)), _rows(triangle, len(squares)), strict=True
            )
            for (start, stop), old, new in blocks:
                torch.addmm(old, v[:, start:stop].T, v[:, :stop], beta=1 if self.count else 0, out=new)
                squares[start:stop] = new[:, start:].diagonal()
            return replace(self, triangle=triangle, squares=squares)
        squares = self.squares + v.square().sum(-2)
        if self.sums is None:
            return replace(self, squares=squares)
        return replace(self, sums=self.sums + v.mT @ (v if self.probes is None else v @ self.probes), squares=squares)

    def _added_at(self, v: Tensor, columns: Tensor) -> "SecondMoment":
        """Return the state with tokens ``(T, U)`` that are zero outside these columns, not counted."""
        squares = self.squares.index_add(0, columns, v.square().sum(0))
        if self.triangle is not None:
            whole = squares.new_zeros(len(squares), len(squares)).index_put((columns.unsqueeze(1), columns), v.T @ v)
            rows = torch.cat([whole[start:stop, :stop].flatten() for start, stop in _blocks(len(squares))])
            return replace(self, triangle=self.triangle + rows, squares=squares)
        if self.sums is None or self.probes is None:
            return replace(self, squares=squares)
        sums = self.sums.index_add(0, columns, v.T @ (v @ self.probes[columns]))
        return replace(self, sums=sums, squares=squares)

    def _origin(self) -> tuple[str, tuple[int, ...], int, torch.dtype]:
        kept = self.squares if self.sums is None else self.sums
        shape = tuple(kept.shape) if self.triangle is None else (len(kept), len(kept))
        return self.per, shape, self.seed, self.squares.dtype


def _blocks(dim: int) -> list[tuple[int, int]]:
    """Cut d rows into blocks: the lower triangle by blocks is little more than half of a square, in work and room."""
    size = max(LEAST_BLOCK, math.ceil(dim / NUM_BLOCKS))
    return [(start, min(start + size, dim)) for start in range(0, dim, size)]


def _flat_size(dim: int) -> int:
    return sum((stop - start) * stop for start, stop in _blocks(dim))


def _rows(flat: Tensor, dim: int) -> list[Tensor]:
    """Return the blocks of rows of a flat lower triangle, ``(stop − start, stop)`` each; views."""
    shapes = [(stop - start, stop) for start, stop in _blocks(dim)]
    parts = flat.split([height * width for height, width in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _unfolded(flat: Tensor, dim: int) -> Tensor:
    """Make a symmetric ``(d, d)`` of a flat lower triangle."""
    whole = flat.new_empty(dim, dim)
    for (start, stop), rows in zip(_blocks(dim), _rows(flat, dim), strict=True):
        whole[start:stop, :start] = rows[:, :start]
        whole[:start, start:stop] = rows[:, :start].T
        whole[start:stop, start:stop] = _mirrored(rows[:, start:])
    return whole


def _mirrored(matrix: Tensor) -> Tensor:
    """Make a matrix symmetric, to the bit, by its lower triangle."""
    return matrix.tril() + matrix.tril(-1).mT


def _nystrom_factor(y: Tensor, omega: Tensor, eps: float) -> Tensor:
    """Factorise Y (Ωᵀ Y)⁺ Yᵀ, with what is below a floor in Ωᵀ Y, and may be rounding, raised to it."""
    floor = math.sqrt(len(y)) * eps * float(y.norm())
    if not floor:
        return torch.zeros_like(y)
    values, vectors = torch.linalg.eigh((omega.T @ y + y.T @ omega) / 2)
    u, sigma, _ = torch.linalg.svd(y @ (vectors / values.clamp(min=floor).sqrt()), full_matrices=False)
    factor: Tensor = u * sigma
    return factor
