"""``iso_c``, ``iso_cts``: the merged update treats all its directions alike.

The sum Σᵢ τᵢ = U Σ Vᵀ is dominated by what a few tasks share; single tasks are lost in its small singular values.
``iso_c`` gives all directions the same, the mean s of the singular values: M = s U Vᵀ. With many tasks the directions
themselves are missing, so ``iso_cts`` replaces the last ones of the sum by the leading ones of each task outside the
common space: with U_c the first c left singular vectors, those of (I - U_c U_cᵀ) τᵢ. Of q directions in all, each of T
tasks gets t = round((q - ⌊common · q⌋) / T), at most ⌊q / T⌋, and c = q - T t. Left and right vectors are replaced by
their polar factors (``singular_vectors.py``) and all singular values by their mean.

All of it is computed from the factors. Since all singular values are equal, a truncation in the Frobenius norm has no
reason to prefer one direction: what it keeps is decided by rounding. In the metric of moments it has.

Source: Marczak et al. 2025, *No Task Left Behind* (arXiv:2502.04959): Iso-C and Iso-CTS, share 0.8.
``docs/methods.md``, section 25. Deviations: q is the rank of the sum where the paper, which merges full matrices, has
min(m, n); the mean is over singular values above rounding, so it is min(m, n) / q times what the authors' would be with
the zeros of a sum of low rank, and directions that the sum does not have stay 0. A task with fewer directions left than
t gives those. Dependent columns get no arbitrary completion; a vector is a matrix of one column, whose one singular
value stays, where the authors' code takes a mean; a task whose update is 0 does not count.
"""

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions
from flowra_compose.singular_vectors import decomposed, nonzero_svd, of_triplets, polar_factor, size_of

__all__ = ["iso_c", "iso_cts"]

COMMON = 0.8
"""The share of common directions in the experiments of Marczak et al. 2025."""


def iso_c(module: ModuleUpdates, options: MergeOptions) -> LowRankUpdate:
    """Give all singular values of the sum their mean.

    Returns:
        An update of the rank of the sum, in float64. That of a single task is flattened, too.
    """
    total = nonzero_svd(*module.stacked())
    return _flattened(module, total.u, total.sigma, total.vh)


def iso_cts(module: ModuleUpdates, options: MergeOptions) -> LowRankUpdate:
    """Give the leading directions of the sum, and those of each task outside of them, one size.

    Returns:
        An update of at most the rank of the sum, in float64; with ``common=1``, or of one task, that of :func:`iso_c`.
    """
    share = COMMON if options.common is None else options.common
    total = nonzero_svd(*module.stacked())
    rank, tasks = len(total.sigma), len(decomposed(module.present))
    each = min(rank // tasks, round((rank - int(share * rank)) / tasks))
    common = rank - tasks * each
    space, own = total.u[:, :common], []
    for update in module.present:
        b = update.scaling * update.lora_B.double()
        own.append(nonzero_svd(update.lora_A, b - space @ (space.T @ b), size=size_of(update.lora_A, b)))
    u = torch.cat([space, *(part.u[:, :each] for part in own)], dim=1)
    vh = torch.cat([total.vh[:common], *(part.vh[:each] for part in own)])
    sigma = torch.cat([total.sigma[:common], *(part.sigma[:each] for part in own)])
    return _flattened(module, polar_factor(u), sigma, polar_factor(vh.T).T)


def _flattened(module: ModuleUpdates, u: Tensor, sigma: Tensor, vh: Tensor) -> LowRankUpdate:
    return of_triplets(module, u, sigma.mean().expand_as(sigma), vh)
