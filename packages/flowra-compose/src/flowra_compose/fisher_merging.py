"""``fisher``: the mean of the weights, each entry weighted by how sure every task is of it.

The posterior of task i is taken to be a Gaussian around its weights θᵢ, of diagonal precision Fᵢ; the product of all is
greatest at Σᵢ Fᵢ θᵢ / Σᵢ Fᵢ, entry by entry. The base θ₀ cancels: with θᵢ = θ₀ + τᵢ that is θ₀ + Σᵢ Fᵢ τᵢ / Σᵢ Fᵢ, so
this is a rule for updates.

Source: Matena & Raffel 2021 (arXiv:2111.09832), section 3. Deviations: coefficients λᵢ are the weights of the adapters,
of τᵢ and not of Fᵢ; the floor under F is 1e-6 of its mean over all tasks and entries of the module, the same for all
tasks, so that entries no task is sure of get the mean, and the unit of the loss does not matter.
"""

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions

__all__ = ["fisher"]

FLOOR = 1e-6


def fisher(module: ModuleUpdates, options: MergeOptions) -> LowRankUpdate:
    """Average the updates of one module by the diagonals of their Fisher matrices.

    A task takes part by its statistics: where it leaves the module alone but has them, with τᵢ = 0.

    Returns:
        A dense update, in float64.
    """
    tasks = [
        (update, known.fisher)
        for update, known in zip(module.updates, module.statistics, strict=True)
        if known is not None and known.fisher is not None
    ]
    floor = FLOOR * float(torch.stack([values.double().mean() for _, values in tasks]).mean())
    weighted, total = torch.zeros((2, *module.shape), dtype=torch.float64, device=tasks[0][1].device)
    for update, values in tasks:
        precision = _floored(values, floor)
        total += precision
        if update is not None:
            weighted += precision * (update.scaling * update.lora_B.double() @ update.lora_A.double())
    return module.of_delta_weight(weighted / total)


def _floored(values: Tensor, floor: float) -> Tensor:
    """Return F raised to the floor; ones where all of it is 0."""
    return values.double().clamp(min=floor) if floor else torch.ones_like(values, dtype=torch.float64)
