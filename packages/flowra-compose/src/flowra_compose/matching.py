"""How far one update is from the updates of several tasks, in what their outputs and losses feel.

To second order a change D of the weight raises the loss of a task by ½ tr(S D C Dᵀ): C = E[x xᵀ] says how much of D its
inputs meet, S how much its loss minds where the outputs go (K-FAC, Martens & Grosse 2015). With S = I this is the mean
squared change of the outputs. The sum over tasks is what ``flow`` makes least, and the share of each is its cross-talk.

All of it is taken from factors: D = U diag(σ) Vᵀ (``product_svd.py``), and tr(S D C Dᵀ) is a sum over UᵀSU and VᵀCV.
"""

import math
from collections.abc import Sequence

import torch

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.product_svd import product_svd
from flowra_compose.side_moments import SideMoments
from flowra_compose.statistics import ModuleStatistics

__all__ = ["cross_talk", "matching_energy", "matching_objective"]


@torch.no_grad()
def matching_objective(
    merged: LowRankUpdate,
    updates: Sequence[LowRankUpdate | None],
    statistics: Sequence[ModuleStatistics | None],
    *,
    shrinkage: float = 0.0,
) -> float:
    """Return Σᵢ tr(Sᵢ (M - τᵢ) Cᵢ (M - τᵢ)ᵀ) ≥ 0, the objective of ``flow``.

    Args:
        merged: M.
        updates: τᵢ of each task; None is 0.
        statistics: Cᵢ and Sᵢ of each task; S missing is the identity. A task without inputs takes no part.
        shrinkage: ρ in [0, 1], by which the moments are drawn to the identity first.

    Source: docs/methods.md, section 26.
    """
    tasks = zip(updates, statistics, strict=True)
    return sum(
        matching_energy(_difference(merged, update), known, shrinkage=shrinkage)
        for update, known in tasks
        if known is not None and known.inputs is not None
    )


@torch.no_grad()
def matching_energy(update: LowRankUpdate, statistics: ModuleStatistics, *, shrinkage: float = 0.0) -> float:
    """Return ‖S^½ ΔW C^½‖_F² = tr(S ΔW C ΔWᵀ) ≥ 0, in float64 from the factors.

    Args:
        update: ΔW, ``(m, n)``.
        statistics: C, and S if there is one; else S is the identity.
        shrinkage: ρ in [0, 1], by which the moments are drawn to the identity first.

    Raises:
        ValueError: if there is no C.

    Source: docs/methods.md, section 26.
    """
    if statistics.inputs is None:
        raise ValueError("statistics must hold the inputs, got none. Measure them.")
    svd = product_svd(update.lora_A, update.scaling * update.lora_B.double())
    gram = SideMoments.toward_identity([statistics.inputs], shrinkage).projected(svd.vh.T)[0]
    if statistics.outputs is None:
        return max(0.0, float(svd.sigma.square() @ gram.diagonal()))
    outer = SideMoments.toward_identity([statistics.outputs], shrinkage).projected(svd.u)[0]
    return max(0.0, float(svd.sigma @ (gram * outer) @ svd.sigma))


@torch.no_grad()
def cross_talk(
    merged: LowRankUpdate, update: LowRankUpdate, statistics: ModuleStatistics, *, shrinkage: float = 0.0
) -> float:
    """Return ‖S^½ (M - Δ) C^½‖_F² / ‖S^½ Δ C^½‖_F² of one task: 0 if nothing of it is disturbed, 1 at M = 0.

    Args:
        merged: M.
        update: Δ, the task's own.
        statistics: C, and S if there is one, of the task.
        shrinkage: ρ in [0, 1], by which the moments are drawn to the identity first.

    Returns:
        The ratio, ≥ 0; infinity where Δ does nothing for the task and M does something, 0 where neither does. Over
        modules, add up the energies (:func:`matching_energy`) instead.

    Source: docs/methods.md, section 26.
    """
    disturbed = matching_energy(_difference(merged, update), statistics, shrinkage=shrinkage)
    own = matching_energy(update, statistics, shrinkage=shrinkage)
    return disturbed / own if own else math.inf if disturbed else 0.0


def _difference(merged: LowRankUpdate, update: LowRankUpdate | None) -> LowRankUpdate:
    """Return M - τ, of stacked factors."""
    if update is None:
        return merged
    a = torch.cat([merged.lora_A.double(), update.lora_A.double()])
    b = torch.cat([merged.scaling * merged.lora_B.double(), -update.scaling * update.lora_B.double()], dim=1)
    return LowRankUpdate(a, b)
