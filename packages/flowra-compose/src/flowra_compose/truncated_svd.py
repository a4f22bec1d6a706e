"""``truncated_svd``: the best approximation of low rank to the weighted sum of low-rank updates.

Of all matrices of rank ≤ r, the one nearest to ΔW = Σᵢ wᵢ ΔWᵢ in the Frobenius norm keeps its r leading singular values
and vectors, and ‖ΔW - ΔW_r‖² = Σ_{j>r} σⱼ² (Eckart & Young 1936). The decomposition is taken from the stacked factors
(``product_svd.py``), so nothing of the size of a weight is formed.

Source: the combination type ``svd`` in PEFT's ``add_weighted_adapter``. Deviations: it is computed from the factors,
in float64; the rank may differ by module, or follow from a share of the energy; what is lost is told; both factors get
the square roots of the singular values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.product_svd import product_svd
from flowra_compose.weighted_sum import Term, common_dtype, fitted, stack, terms_by_module

__all__ = ["TruncatedUpdate", "truncated_svd"]


@dataclass(frozen=True, slots=True, eq=False)
class TruncatedUpdate(LowRankUpdate):
    """A low-rank update that knows what it approximates.

    The numbers describe the truncation in float64, before its factors were rounded to their dtype.
    """

    singular_values: Tensor = field(kw_only=True)
    """σ of the sum ΔW before the truncation, non-increasing; ``(min(m, n, Σ rᵢ),)``, float64. Values within rounding
    of zero are zero."""
    loss: float = field(kw_only=True)
    """‖ΔW - ΔW_r‖_F², the sum of the squares of the singular values left out."""

    @property
    def relative_loss(self) -> float:
        """‖ΔW - ΔW_r‖_F² / ‖ΔW‖_F², in [0, 1); 0 if ΔW is 0."""
        return self.loss / float(self.singular_values.square().sum()) if self.loss else 0.0


@torch.no_grad()
def truncated_svd(
    updates: Sequence[Mapping[str, LowRankUpdate]],
    weights: Sequence[float],
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
) -> dict[str, TruncatedUpdate]:
    """Add weighted updates, module by module, and keep the leading directions of each sum.

    A module's rank is the smaller of what ``rank`` and ``energy`` allow, and never more than ΔW has; a ΔW of 0 gets
    rank 1 with factors of 0. So no module is lost: to drop one, leave it out of the updates.

    Args:
        updates: one mapping from module name to update for each input. The shapes of a module agree in all of them,
            and all factors are on one device.
        weights: one finite number for each input, of any sign; an input of weight 0 takes no part.
        rank: largest rank ≥ 1, the same for all modules, or by the name of every module that is merged.
        energy: share of ‖ΔW‖_F² to keep at least, in (0, 1]; the smallest rank that does is taken. 1 keeps all of ΔW
            to rounding. At least one of ``rank`` and ``energy`` must be given.

    Returns:
        By name, for every module of an input of non-zero weight: an update of scaling 1 with balanced factors,
        BᵀB = A Aᵀ = diag(σ₁ … σ_r), computed in float64 and returned in the promoted dtype of its inputs.

    Raises:
        ValueError: if ``rank`` or ``energy`` is out of range, neither is given, ``rank`` does not name the merged
            modules, or a factor does not fit its dtype.

    Example:
        The loss is the squared distance from the sum.

        >>> update = LowRankUpdate(torch.eye(3), torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> best = truncated_svd([{"fc": update}], [1.0], rank=1)["fc"]
        >>> [round(value, 6) for value in best.singular_values.tolist()]
        [3.0, 2.0, 1.0]
        >>> round(best.loss, 6), round(best.relative_loss, 6)
        (5.0, 0.357143)
        >>> round(float((update.delta_weight() - best.delta_weight()).square().sum()), 4)
        5.0
    """
    terms = terms_by_module(updates, weights)
    ranks = _ranks(rank, energy, terms)
    return {name: _truncate(name, each, ranks[name], energy) for name, each in terms.items()}


def _ranks(
    rank: int | Mapping[str, int] | None, energy: float | None, names: Mapping[str, object]
) -> dict[str, int | None]:
    """Spread the rank over the modules, None where only the energy decides."""
    if rank is None and energy is None:
        raise ValueError("rank or energy must be given, got neither. Give rank=<largest rank> or energy=<share kept>.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    if rank is None:
        return dict.fromkeys(names)
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(names, rank)
    if ranks.keys() != names.keys():
        lacking, unknown = sorted(names.keys() - ranks.keys()), sorted(ranks.keys() - names.keys())
        raise ValueError(f"rank must name the merged modules, got none for {lacking} and one for unknown {unknown}")
    wrong = {name: each for name, each in ranks.items() if type(each) is not int or each < 1}
    if wrong:
        raise ValueError(f"rank must be a whole number ≥ 1, got {wrong}. To drop a module, leave it out of the inputs.")
    return {**ranks}


def _truncate(name: str, terms: Sequence[Term], rank: int | None, energy: float | None) -> TruncatedUpdate:
    a, b = stack(terms, torch.float64)
    svd = product_svd(a, b)
    rounding = torch.finfo(torch.float64).eps * max(terms[0][1].shape) * float(b.norm(dim=0) @ a.norm(dim=1))
    sigma = torch.where(svd.sigma > rounding, svd.sigma, 0)
    tails = sigma.square().flip(0).cumsum(0).flip(0)  # tails[r]: what a truncation to rank r loses
    share_to_lose = 0.0 if energy is None else 1 - energy
    kept = int((tails > share_to_lose * tails[0]).sum())
    kept = max(1, min(kept, rank or kept))
    factors = fitted(name, *replace(svd, sigma=sigma).balanced_factors(kept), common_dtype(terms))
    return TruncatedUpdate(*factors, singular_values=sigma, loss=float(tails[kept]) if kept < len(tails) else 0.0)
