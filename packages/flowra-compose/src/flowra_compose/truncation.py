"""The best approximation of low rank to an update, with what it loses.

Of all matrices of rank ≤ r, the one nearest to ΔW in the Frobenius norm keeps its r leading singular values and
vectors, and ‖ΔW - ΔW_r‖² = Σ_{j>r} σⱼ² (Eckart & Young 1936). The decomposition is taken from the factors
(``product_svd.py``), so nothing of the size of a weight is formed where the update is of low rank.

Source: the combination type ``svd`` in PEFT's ``add_weighted_adapter``. Deviations: it is computed from the factors,
in float64; the rank may differ by module, or follow from a share of the energy; what is lost is told; both factors get
the square roots of the singular values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.product_svd import product_svd

__all__ = ["TruncatedUpdate", "Truncation", "truncated"]


@dataclass(frozen=True, slots=True, eq=False)
class TruncatedUpdate(LowRankUpdate):
    """A low-rank update that knows what it approximates.

    The numbers describe the truncation in float64, before its factors were rounded to their dtype.
    """

    singular_values: Tensor = field(kw_only=True)
    """σ of ΔW before the truncation, non-increasing; ``(min(m, n, r),)``, float64. Values within rounding of zero are
    zero."""
    loss: float = field(kw_only=True)
    """‖ΔW - ΔW_r‖_F², the sum of the squares of the singular values left out."""

    @property
    def relative_loss(self) -> float:
        """‖ΔW - ΔW_r‖_F² / ‖ΔW‖_F², in [0, 1); 0 if ΔW is 0."""
        return self.loss / float(self.singular_values.square().sum()) if self.loss else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncation:
    """How far merged updates are truncated.

    A module's rank is the smallest that its settings allow, and never more than ΔW has; a ΔW of 0 gets rank 1 with
    factors of 0. So no module is lost: to drop one, leave it out of the updates.

    Raises:
        ValueError: if a setting is out of range, or none is given.
    """

    rank: int | Mapping[str, int] | None = None
    """Largest rank ≥ 1, the same for all modules, or by the name of every module that is merged."""
    energy: float | None = None
    """Share of ‖ΔW‖_F² to keep at least, in (0, 1]; the smallest rank that does is taken. 1 keeps all of ΔW to
    rounding."""

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise ValueError(
                "rank or energy must be given, got neither. Give rank=<largest rank> or energy=<share kept>."
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}")
        ranks = self.rank if isinstance(self.rank, Mapping) else {"all modules": 1 if self.rank is None else self.rank}
        wrong = {name: each for name, each in ranks.items() if type(each) is not int or each < 1}
        if wrong:
            raise ValueError(
                f"rank must be a whole number ≥ 1, got {wrong}. To drop a module, leave it out of the inputs."
            )

    def check_names(self, names: set[str]) -> None:
        """Refuse ranks by name that do not name the merged modules.

        Raises:
            ValueError: if one is missing or unknown.
        """
        if isinstance(self.rank, Mapping) and self.rank.keys() != names:
            lacking, unknown = sorted(names - self.rank.keys()), sorted(self.rank.keys() - names)
            raise ValueError(f"rank must name the merged modules, got none for {lacking} and one for unknown {unknown}")

    def of(self, name: str) -> int | None:
        """Return the largest rank of a module, None where only the energy decides."""
        return self.rank[name] if isinstance(self.rank, Mapping) else self.rank


@torch.no_grad()
def truncated(update: LowRankUpdate, *, rank: int | None = None, energy: float | None = None) -> TruncatedUpdate:
    """Keep the leading directions of an update.

    Args:
        update: ΔW.
        rank: largest rank ≥ 1.
        energy: share of ‖ΔW‖_F² to keep at least, in (0, 1].

    Returns:
        An update of scaling 1 with balanced factors, BᵀB = A Aᵀ = diag(σ₁ … σ_r), in float64.

    Example:
        The loss is the squared distance.

        >>> update = LowRankUpdate(torch.eye(3), torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> best = truncated(update, rank=1)
        >>> [round(value, 6) for value in best.singular_values.tolist()]
        [3.0, 2.0, 1.0]
        >>> round(best.loss, 6), round(best.relative_loss, 6)
        (5.0, 0.357143)
        >>> round(float((update.delta_weight() - best.delta_weight()).square().sum()), 4)
        5.0
    """
    a, b = update.lora_A.double(), update.scaling * update.lora_B.double()
    svd = product_svd(a, b)
    rounding = torch.finfo(torch.float64).eps * max(update.shape) * float(b.norm(dim=0) @ a.norm(dim=1))
    sigma = torch.where(svd.sigma > rounding, svd.sigma, 0)
    tails = sigma.square().flip(0).cumsum(0).flip(0)  # tails[r]: what a truncation to rank r loses
    share_to_lose = 0.0 if energy is None else 1 - energy
    kept = int((tails > share_to_lose * tails[0]).sum())
    kept = max(1, min(kept, rank or kept))
    a, b = replace(svd, sigma=sigma).balanced_factors(kept)
    loss = float(tails[kept]) if kept < len(tails) else 0.0
    return TruncatedUpdate(a, b, layout=update.layout, kernel=update.kernel, singular_values=sigma, loss=loss)
