"""``regmean``: the linear layer whose outputs are nearest to those of every task on its own inputs.

    argmin_M Σᵢ tr((M - τᵢ) C̃ᵢ (M - τᵢ)ᵀ) = (Σᵢ τᵢ C̃ᵢ) (Σᵢ C̃ᵢ)⁻¹,    C̃ᵢ = (1 - ρ) Cᵢ + ρ diag(Cᵢ)

on updates as on weights: for θᵢ = θ₀ + τᵢ, (Σᵢ θᵢ C̃ᵢ)(Σᵢ C̃ᵢ)⁻¹ = θ₀ + (Σᵢ τᵢ C̃ᵢ)(Σᵢ C̃ᵢ)⁻¹. With τᵢ = Bᵢ Aᵢ it is
[B₁ …] [A₁ C̃₁; …] (Σᵢ C̃ᵢ)⁻¹, of the rank of the sum.

Source: Jin et al. 2022 (arXiv:2212.09849), section 3; they keep α = 0.9 of the entries off the diagonal, ρ = 1 - α.
Deviations: C is a mean over tokens where they sum, so that tasks count alike whatever the size of their data; a feature
that is 0 in all inputs of all tasks, of which the objective says nothing, gets the mean.
"""

import torch

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions
from flowra_compose.side_moments import SideMoments

__all__ = ["regmean"]

SHRINKAGE = 0.1


def regmean(module: ModuleUpdates, options: MergeOptions) -> LowRankUpdate:
    """Solve the linear regression of all tasks at one module.

    A task takes part by its statistics: where it leaves the module alone but has them, with τᵢ = 0.

    Returns:
        An update of rank Σ rᵢ, in float64.

    Raises:
        ValueError: if Σᵢ C̃ᵢ is singular, as it can be at shrinkage 0.
    """
    shrinkage = SHRINKAGE if options.shrinkage is None else options.shrinkage
    tasks = [
        (update, known.inputs)
        for update, known in zip(module.updates, module.statistics, strict=True)
        if known is not None and known.inputs is not None
    ]
    inputs = SideMoments.toward_diagonal([c for _, c in tasks], shrinkage)
    met = [inputs.times(task, update.lora_A.double().T) for task, (update, _) in enumerate(tasks) if update is not None]
    where = f"{module.name!r}, shrinkage {shrinkage}"
    return module.of_factors(inputs.total_solved(torch.cat(met, dim=1), where=where).T, module.stacked()[1])
