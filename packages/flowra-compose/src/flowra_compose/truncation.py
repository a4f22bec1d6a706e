"""The best approximation of low rank to an update, in the metric that counts, with what it loses.

In the Frobenius norm the nearest matrix of rank ≤ r to ΔW keeps its r leading singular values and vectors, and
‖ΔW - ΔW_r‖² = Σ_{j>r} σⱼ² (Eckart & Young 1936). Where second moments are known, what counts is tr(S̄ D C̄ Dᵀ) of
D = ΔW - ΔW_r, with C̄ = Σᵢ Cᵢ of the inputs that the tasks have and S̄ = Σᵢ Sᵢ of what they feel at the outputs;
without S̄, tr(D C̄ Dᵀ), the change of the outputs. The nearest matrix then is that of S̄^½ ΔW C̄^½, multiplied back.

All from the factors: with thin QR decompositions Aᵀ = Q_A R_A, B = Q_B R_B, and L_A L_Aᵀ = Q_Aᵀ C̄ Q_A,
L_B L_Bᵀ = Q_Bᵀ S̄ Q_B, the singular values are those of L_Bᵀ R_B R_Aᵀ L_A, a matrix no larger than the ranks.
No root or inverse of C̄ or S̄ is taken, and nothing of the size of a weight is formed where the update is of low rank.

Source: the combination type ``svd`` in PEFT's ``add_weighted_adapter``; docs/methods.md, section 26. Deviations: it is
computed from the factors, in float64; the rank may differ by module, or follow from a share of the energy or from a
number of parameters; what is lost is told; both factors get the square roots of the singular values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.product_svd import ThinQR, product_svd
from flowra_compose.side_moments import SHRINKAGE, SideMoments, cholesky
from flowra_compose.statistics import ModuleStatistics

__all__ = ["MetricSVD", "TruncatedUpdate", "Truncation", "metric_svd", "truncated"]

Metric = Literal["frobenius", "inputs", "inputs_and_outputs"]


@dataclass(frozen=True, slots=True, eq=False)
class TruncatedUpdate(LowRankUpdate):
    """A low-rank update that knows what it approximates.

    The numbers describe the truncation in float64, before its factors were rounded to their dtype.
    """

    singular_values: Tensor = field(kw_only=True)
    """σ of ΔW before the truncation, of S̄^½ ΔW C̄^½ in the metric of moments, non-increasing; ``(min(m, n, r),)``,
    float64. Values within rounding of zero are zero."""
    loss: float = field(kw_only=True)
    """The squared distance of ΔW and ΔW_r in the metric, the sum of the squares of the singular values left out."""
    metric: Metric = field(default="frobenius", kw_only=True)
    """In which it was truncated, and in which the loss is told: that of the moments of inputs, of both sides, or of
    none."""

    @property
    def relative_loss(self) -> float:
        """The loss as a share of the squared length of ΔW in the metric, in [0, 1); 0 if ΔW is 0."""
        return self.loss / float(self.singular_values.square().sum()) if self.loss else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncation:
    """How far merged updates are truncated.

    A module's rank is the smallest that its settings allow, and never more than ΔW has; a ΔW of 0 gets rank 1 with
    factors of 0. So no module is lost, except to a number of parameters.

    Raises:
        ValueError: if a setting is out of range, or no size is given.
    """

    rank: int | Mapping[str, int] | None = None
    """Largest rank ≥ 1, the same for all modules, or by the name of every module that is merged."""
    energy: float | None = None
    """Share of the squared length of ΔW to keep at least, in (0, 1]; the smallest rank that does is taken. 1 keeps all
    of ΔW to rounding."""
    parameters: int | None = None
    """Largest number of parameters ≥ 1 of all factors together: ranks are those that lose least in all. Zeros are not
    counted, as those that PEFT's form wants of every adapted module where one has a bias. A module to
    which they give rank 0 is left out of the result: :func:`flowra_compose.budget_ranks` names them all."""
    metric: Literal["frobenius", "moments"] | None = None
    """``moments`` is the metric of C̄ and, where all tasks have them, S̄, each shrunk by 0.02 as for ``flow``;
    ``frobenius`` that of ΔW itself. None is moments at modules where all tasks have those of inputs, else Frobenius."""

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None and self.parameters is None:
            raise ValueError(
                "rank or energy must be given, got neither, and no parameters."
                " Give rank=<largest rank>, energy=<share kept> or parameters=<number in all>."
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}")
        if self.parameters is not None and (type(self.parameters) is not int or self.parameters < 1):
            raise ValueError(f"parameters must be a whole number ≥ 1, got {self.parameters!r}")
        if self.metric not in (None, "frobenius", "moments"):
            raise ValueError(f"metric must be 'frobenius', 'moments' or None, got {self.metric!r}")
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
        """Return the largest rank of a module, None where only other settings decide."""
        return self.rank[name] if isinstance(self.rank, Mapping) else self.rank

    def statistics_of(self, module: ModuleUpdates) -> list[ModuleStatistics]:
        """Return the statistics of the tasks whose moments make the metric of a module; none for Frobenius.

        Raises:
            ValueError: if the metric must be that of moments and a task that updates the module has none of inputs.
        """
        if self.metric == "frobenius":
            return []
        tasks = list(zip(module.updates, module.statistics, strict=True))
        known = [each for _, each in tasks if each is not None and each.inputs is not None]
        lacking = [
            task
            for task, (update, each) in enumerate(tasks)
            if update is not None and (each is None or each.inputs is None)
        ]
        if lacking and self.metric == "moments":
            raise ValueError(
                f"statistics must hold the inputs of every task for the metric 'moments', got none of {lacking};"
                f" {module.name!r}. Measure them, or truncate in the metric 'frobenius'."
            )
        return [] if lacking else known


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MetricSVD:
    """ΔW = left diag(σ) right, with orthonormal columns of S̄^½ left and rows of right C̄^½."""

    update: LowRankUpdate
    """ΔW."""
    sigma: Tensor
    """``(k,)``, k = min(m, n, r), non-increasing, zero where within rounding of it; float64."""
    left: Callable[[int], Tensor]
    """Gives its first columns, ``(m, rank)``, float64."""
    right: Callable[[int], Tensor]
    """Gives its first rows, ``(rank, n)``, float64."""
    metric: Metric
    """That of C̄ and S̄, of C̄ alone, or of neither."""

    def kept(self, *, rank: int | None, energy: float | None) -> int:
        """Return the smallest rank ≥ 0 that settings allow, at most that of ΔW."""
        tails = self._tails()
        share_to_lose = 0.0 if energy is None else 1 - energy
        kept = int((tails > share_to_lose * tails[0]).sum())
        return kept if rank is None else min(kept, rank)

    def truncated(self, *, rank: int | None, energy: float | None) -> TruncatedUpdate:
        """Return what settings keep of ΔW; of one that is 0, rank 1 of zeros."""
        kept, tails = max(1, self.kept(rank=rank, energy=energy)), self._tails()
        root = self.sigma[:kept].sqrt()
        a, b = root[:, None] * self.right(kept), self.left(kept) * root
        if self.metric != "frobenius":
            a, b = product_svd(a, b).balanced_factors(kept)
        return TruncatedUpdate(
            a,
            b,
            layout=self.update.layout,
            kernel=self.update.kernel,
            singular_values=self.sigma,
            loss=float(tails[kept]) if kept < len(tails) else 0.0,
            metric=self.metric,
        )

    def _tails(self) -> Tensor:
        """Return what a truncation to rank 0, 1, … k - 1 loses, ``(k,)``."""
        return self.sigma.square().flip(0).cumsum(0).flip(0)


@torch.no_grad()
def metric_svd(update: LowRankUpdate, statistics: Sequence[ModuleStatistics], *, where: str) -> MetricSVD:
    """Decompose an update in the metric of second moments, or without statistics in the Frobenius norm.

    Args:
        update: ΔW.
        statistics: of all tasks, each with inputs; outputs count where all have them.
        where: what it is, for an error.

    Returns:
        The decomposition, in float64.

    Raises:
        ValueError: if the moments are singular together.
    """
    a, b = update.lora_A.double(), update.scaling * update.lora_B.double()
    inputs = [each.inputs for each in statistics if each.inputs is not None]
    outputs = [each.outputs for each in statistics if each.outputs is not None]
    if len(outputs) < len(inputs):
        outputs = []
    core_a, back_a = _in_metric(a.T, inputs, where)
    core_b, back_b = _in_metric(b, outputs, where)
    u, sigma, vh = torch.linalg.svd(core_b @ core_a.T, full_matrices=False)
    rounding = torch.finfo(torch.float64).eps * max(update.shape) * float(core_b.norm(dim=0) @ core_a.norm(dim=0))
    return MetricSVD(
        update=update,
        sigma=torch.where(sigma > rounding, sigma, 0),
        left=lambda rank: back_b(u[:, :rank]),
        right=lambda rank: back_a(vh[:rank].T).T,
        metric="inputs_and_outputs" if outputs else "inputs" if inputs else "frobenius",
    )


def _in_metric(columns: Tensor, moments: Sequence[Tensor], where: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return R, and what multiplies by P: P R are the columns, Pᵀ M̄ P = I, for M̄ the sum of the moments, or I."""
    if not moments:
        qr = ThinQR(columns)
        return qr.r, qr.times
    q, r = torch.linalg.qr(columns)
    gram = q.T @ SideMoments.toward_identity(moments, SHRINKAGE).total_times(q)
    root = cholesky((gram + gram.T) / 2, where=where)
    back = torch.linalg.solve_triangular(root, q.T, upper=False).T
    return root.T @ r, lambda coordinates: back @ coordinates


@torch.no_grad()
def truncated(
    update: LowRankUpdate,
    *,
    rank: int | None = None,
    energy: float | None = None,
    statistics: Sequence[ModuleStatistics] = (),
) -> TruncatedUpdate:
    """Keep the leading directions of an update.

    Args:
        update: ΔW.
        rank: largest rank ≥ 1.
        energy: share of the squared length of ΔW to keep at least, in (0, 1].
        statistics: of all tasks, whose moments make the metric, each with inputs; outputs count where all have them.
            None is the Frobenius norm.

    Returns:
        An update of scaling 1 with balanced factors, BᵀB = A Aᵀ diagonal, in float64.

    Raises:
        ValueError: if the moments are singular together.

    Source: docs/methods.md, section 26.

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

        What the inputs do not meet costs little.

        >>> met = ModuleStatistics(inputs=torch.tensor([0.01, 0.01, 1.0]))
        >>> best = truncated(update, rank=1, statistics=[met])
        >>> [round(value, 6) for value in best.delta_weight().diagonal().tolist()]
        [0.0, 0.0, 1.0]
    """
    return metric_svd(update, statistics, where="the update to truncate").truncated(rank=rank, energy=energy)
