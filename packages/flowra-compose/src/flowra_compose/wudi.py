"""``wudi``: task vectors stand in for the inputs of their tasks.

What a linear layer learned lies in the span of the inputs it saw, so the rows of τᵢ tell which inputs its task has. The
merge should act on them as the task does:

    M = argmin Σᵢ ‖(M - τᵢ) τᵢᵀ‖_F² / ‖τᵢ‖_F²,

which is RegMean with Cᵢ = τᵢᵀ τᵢ / ‖τᵢ‖_F² for second moments, and no data: M = (Σᵢ τᵢ Cᵢ) (Σᵢ Cᵢ)⁺. With
τᵢ = Uᵢ Σᵢ Vᵢᵀ from the factors, and the rows R = [Σᵢ Vᵢᵀ / ‖τᵢ‖] of all tasks, it is a least-squares problem without
squared products. From the sum it takes what the other tasks do to the rows of each:

    M = Σᵢ τᵢ - X (Rᵀ)⁺,  Xᵢ = Σ_{j≠i} τⱼ Rᵢᵀ.

This is the solution of least norm: M lies in the row space of the stacked Aᵢ. It is the sum where the tasks' row spaces
are orthogonal. Where they are independent, M does to each what its task does; where they are equal, it is a mean. Where
they are nearly equal and the tasks disagree, M is large: nothing is shrunk.

Source: Cheng et al. 2025, *Whoever Started the Interference Should End It* (arXiv:2503.08099), WUDI-Merging.
``docs/methods.md``, section 25. Deviations: the paper descends on this loss from Σᵢ τᵢ by Adam (300 steps of 1e-5), and
so stops near the sum; here is the minimum, where gradient descent from the sum would end. A task whose update is 0 does
not count; a ``vector`` becomes the mean.
"""

import torch

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions
from flowra_compose.singular_vectors import EPS, decomposed, of_triplets

__all__ = ["wudi"]


def wudi(module: ModuleUpdates, options: MergeOptions) -> LowRankUpdate:
    """Merge the updates of one module so that the rows of each task are treated as the task treats them.

    Returns:
        An update of rank ≤ Σ rᵢ, in float64.
    """
    parts = decomposed(module.present)
    u, sigma = torch.cat([part.u for part in parts], dim=1), torch.cat([part.sigma for part in parts])
    vh, weight = torch.cat([part.vh for part in parts]), torch.cat([part.sigma / part.sigma.norm() for part in parts])
    task = torch.cat([torch.full_like(part.sigma, index) for index, part in enumerate(parts)])
    g, size, h = torch.linalg.svd(weight[:, None] * vh, full_matrices=False)
    kept = size > 8 * EPS * max(vh.shape) * size[:1]
    crossed = (vh @ vh.T) * (task[:, None] != task) * weight  # X = U Σ crossed
    return of_triplets(module, u, sigma, vh - crossed @ (g[:, kept] / size[kept]) @ h[kept])
