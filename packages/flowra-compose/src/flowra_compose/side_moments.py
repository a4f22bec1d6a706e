"""The second moments of all tasks on one side of a module: C (n, n) of its inputs, or S (m, m) of its gradients.

With fewer examples than directions a moment is singular, and nothing says that a direction that was not seen is worth
nothing: so it is shrunk, M ← (1 - ρ) M + ρ D, to a diagonal D that knows less (Ledoit & Wolf 2004). Only products with
moments are taken, in float64, a block of rows at a time: no second copy is made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SHRINKAGE", "SideMoments", "cholesky"]

SHRINKAGE = 0.02
ROWS = 1024


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SideMoments:
    """Mᵢ of each task, shrunk."""

    moments: Sequence[Tensor]
    """One ``(d, d)``, or ``(d,)`` if diagonal, for each task; at least one."""
    kept: float
    """1 - ρ, in [0, 1]."""
    added: Sequence[Tensor]
    """ρ D of each task, ``(d,)``, float64."""

    @classmethod
    def toward_identity(cls, moments: Sequence[Tensor], shrinkage: float) -> "SideMoments":
        """Shrink by ρ in [0, 1] to D = tr(M)/d · I."""
        added = [(shrinkage * _diagonal(moment).mean()).expand(len(moment)) for moment in moments]
        return cls(moments=moments, kept=1 - shrinkage, added=added)

    @classmethod
    def toward_diagonal(cls, moments: Sequence[Tensor], shrinkage: float) -> "SideMoments":
        """Shrink by ρ in [0, 1] to D = diag M; where that is 0 for all tasks, the diagonal is set to 1 for all."""
        diagonals = [_diagonal(moment) for moment in moments]
        unseen = (torch.stack(diagonals).sum(0) == 0).double()
        return cls(moments=moments, kept=1 - shrinkage, added=[shrinkage * each + unseen for each in diagonals])

    @property
    def dim(self) -> int:
        """Return d."""
        return len(self.moments[0])

    @property
    def diagonal(self) -> bool:
        """Whether all of them are diagonal."""
        return all(moment.ndim == 1 for moment in self.moments)

    def times(self, task: int, x: Tensor) -> Tensor:
        """Return Mᵢ X for X ``(d, k)``."""
        moment = self.moments[task]
        if moment.ndim == 1:
            product = moment.double()[:, None] * x
        else:
            product = torch.cat([rows.double() @ x for rows in moment.split(ROWS)])
        return product.mul_(self.kept).addcmul_(self.added[task][:, None], x)

    def total_times(self, x: Tensor) -> Tensor:
        """Return (Σᵢ Mᵢ) X for X ``(d, k)``, at the cost of one product."""
        if self.diagonal:
            return self._total_diagonal()[:, None] * x
        return torch.cat([rows @ x for rows in self._total_rows()])

    def total_solved(self, x: Tensor, *, where: str) -> Tensor:
        """Return (Σᵢ Mᵢ)⁻¹ X for X ``(d, k)``.

        Raises:
            ValueError: if Σᵢ Mᵢ is singular to rounding.
        """
        if not self.diagonal:
            return torch.cholesky_solve(x, cholesky(torch.cat(list(self._total_rows())), where=where))
        total = self._total_diagonal()
        if not bool((total > 0).all()):
            raise ValueError(_singular(where))
        return x / total[:, None]

    def projected(self, basis: Tensor) -> Tensor:
        """Return Qᵀ Mᵢ Q of each task, ``(T, k, k)``, for Q ``(d, k)``."""
        found = torch.stack([basis.T @ self.times(task, basis) for task in range(len(self.moments))])
        return (found + found.mT) / 2

    def _total_diagonal(self) -> Tensor:
        added = torch.stack(list(self.added)).sum(0)
        return added + self.kept * torch.stack([_diagonal(moment) for moment in self.moments]).sum(0)

    def _total_rows(self) -> Iterator[Tensor]:
        """Yield blocks of rows of Σᵢ Mᵢ."""
        added = torch.stack(list(self.added)).sum(0)
        for start in range(0, self.dim, ROWS):
            rows = added.new_zeros(len(added[start : start + ROWS]), self.dim)
            on_diagonal = rows.diagonal(offset=start)
            for moment in self.moments:
                sums = rows if moment.ndim == 2 else on_diagonal
                sums.add_(moment[start : start + ROWS], alpha=self.kept)
            on_diagonal.add_(added[start : start + ROWS])
            yield rows


def _diagonal(moment: Tensor) -> Tensor:
    return (moment if moment.ndim == 1 else moment.diagonal()).double()


def cholesky(matrix: Tensor, *, where: str) -> Tensor:
    """Return L with L Lᵀ = M, for M symmetric positive definite, ``(d, d)`` in float64.

    Raises:
        ValueError: if M is singular to rounding.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps
    if failed or not bool((factor.diagonal().square() > rounding * matrix.diagonal()).all()):
        raise ValueError(_singular(where))
    return factor


def _singular(where: str) -> str:
    return (
        f"statistics must have moments whose sum over tasks is positive definite, got singular ones; {where}."
        " Raise the shrinkage, or measure what is 0 everywhere."
    )
