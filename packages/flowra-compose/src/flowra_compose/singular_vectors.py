"""``tsv_m``, ``orth``: the singular vectors of all tasks, made orthogonal to one another; and how far they were not.

With τᵢ = Uᵢ Σᵢ Vᵢᵀ the tasks' triplets stand side by side, U = [U₁ … U_T], and Σᵢ τᵢ = U Σ Vᵀ. Where vectors of two
tasks overlap, each task's directions pass on what is meant for the other. So U and V are replaced by their polar
factors U_⊥ = U (UᵀU)^(-½), the orthonormal columns nearest to them, and the singular values stay: M = U_⊥ Σ V_⊥ᵀ.
``orth`` is M / √T, of a size that does not grow with the tasks: the rule to take where nothing is known of the data.

The decompositions come from the factors. All triplets of low-rank adapters are kept while the ranks together fit into
min(m, n). Where they do not, each of T tasks keeps its ⌊min(m, n) / T⌋ leading ones, as the paper does always, since it
merges full matrices; and one at least. Where columns depend on others, as those of equal adapters do, and those of more
than min(m, n) tasks, (UᵀU)^(-½) is the root of the pseudo-inverse, and U_⊥ the nearest partial isometry. So T equal
adapters, while they fit, give that adapter by ``tsv_m``.

Source: Gargiulo et al. 2025, *Task Singular Vectors* (arXiv:2412.00081): TSV-Merge and the singular task
interference. ``docs/methods.md``, section 25. Deviations: the number of triplets, as above; no coefficient α but the
weights; dependent columns get no arbitrary completion; a vector is a matrix of one column, where the authors' code
takes a mean; a task whose update is 0 does not count. ``orth`` is ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions
from flowra_compose.product_svd import ProductSVD, product_svd

__all__ = [
    "decomposed",
    "nonzero_svd",
    "of_triplets",
    "orth",
    "polar_factor",
    "singular_task_interference",
    "size_of",
    "tsv_m",
]

EPS = torch.finfo(torch.float64).eps


def tsv_m(module: ModuleUpdates, options: MergeOptions) -> LowRankUpdate:
    """Merge the updates of one module by their orthogonalised singular vectors.

    Returns:
        An update of rank ≤ Σ rᵢ, in float64: the sum where the tasks are orthogonal on both sides.
    """
    every = _side_by_side(decomposed(module.present))
    return of_triplets(module, polar_factor(every.u), every.sigma, polar_factor(every.vh.T).T)


def orth(module: ModuleUpdates, options: MergeOptions) -> LowRankUpdate:
    """Merge as :func:`tsv_m` does, divided by √T for T tasks whose update of this module is not 0.

    Returns:
        An update of rank ≤ Σ rᵢ, in float64. Its ‖M‖_F² is the mean of the ‖τᵢ‖_F² where no vector depends on others.
    """
    merged, tasks = tsv_m(module, options), len(decomposed(module.present))
    return module.of_factors(merged.lora_A, merged.lora_B / tasks**0.5)


@torch.no_grad()
def singular_task_interference(updates: Sequence[LowRankUpdate]) -> float:
    """Measure how far the singular vectors of tasks overlap on both sides, ‖(UᵀU - I) Σ (VᵀV - I)‖₁.

    The norm is the sum of all magnitudes. It is of the size of the updates: compare modules by their ratio to Σᵢ ‖τᵢ‖.
    Where singular values of one task are equal, it depends on which of their vectors are taken.

    Args:
        updates: τᵢ of one module for each task, of one shape, weights in the scaling; at least one. In the paper, ΔWᵢ.

    Returns:
        A number ≥ 0; 0 for one task, and where the tasks share no input or no output direction.

    Raises:
        ValueError: if there is no update, or their shapes differ.

    Source: Gargiulo et al. 2025 (arXiv:2412.00081); of the triplets that :func:`tsv_m` keeps.

    Example:
        Two tasks that read the same input and write to outputs 60° apart.

        >>> first = LowRankUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
        >>> second = LowRankUpdate(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5], [0.75**0.5]]))
        >>> round(singular_task_interference([first, second]), 6)
        1.5
    """
    shapes = sorted({update.shape for update in updates})
    if len(shapes) != 1:
        raise ValueError(f"updates must be of one shape, at least one, got {shapes}")
    triplets = _side_by_side(decomposed(updates))
    identity = torch.eye(len(triplets.sigma), dtype=torch.float64, device=triplets.sigma.device)
    overlap_out = triplets.u.T @ triplets.u - identity
    overlap_in = triplets.vh @ triplets.vh.T - identity
    return float(((overlap_out * triplets.sigma) @ overlap_in).abs().sum())


def polar_factor(columns: Tensor) -> Tensor:
    """Return the partial isometry nearest to a matrix, C (CᵀC)^(-½) with the root of the pseudo-inverse.

    Directions whose singular value is below √ε of the largest are taken for dependent, and left out: singular vectors
    of two tasks are known no better than that.

    Args:
        columns: C, ``(d, k)``, float64.

    Returns:
        ``(d, k)``; its columns are orthonormal where those of C are independent.
    """
    p, sigma, qh = torch.linalg.svd(columns, full_matrices=False)
    independent = sigma > EPS**0.5 * sigma[:1]
    nearest: Tensor = p[:, independent] @ qh[independent]
    return nearest


def decomposed(updates: Sequence[LowRankUpdate]) -> list[ProductSVD]:
    """Decompose the updates that are not 0; where all are, the first, which has no triplet."""
    parts = [nonzero_svd(update.lora_A, update.scaling * update.lora_B.double()) for update in updates]
    return [part for part in parts if len(part.sigma)] or parts[:1]


def nonzero_svd(a: Tensor, b: Tensor, *, size: float | None = None) -> ProductSVD:
    """Decompose B A, without the singular values that are within rounding of 0.

    Args:
        a: A, ``(r, n)``.
        b: B, ``(m, r)``.
        size: what rounding is measured against, by default that of these factors.

    Returns:
        The decomposition in float64, of as many triplets as B A has; it may have none.
    """
    svd = product_svd(a, b)
    rounding = 8 * EPS * max(b.shape[0], a.shape[1]) * (size_of(a, b) if size is None else size)
    rank = int((svd.sigma > rounding).sum())
    return ProductSVD(svd.u[:, :rank], svd.sigma[:rank], svd.vh[:rank])


def size_of(a: Tensor, b: Tensor) -> float:
    """Return Σᵢ ‖bᵢ‖ ‖aᵢ‖ over the columns of B and the rows of A, which rounding is measured against."""
    return float(b.double().norm(dim=0) @ a.double().norm(dim=1))


def of_triplets(module: ModuleUpdates, u: Tensor, sigma: Tensor, vh: Tensor) -> LowRankUpdate:
    """Return U diag(σ) Vᵀ as an update of a module; where there is no triplet, 0 of rank 1."""
    if not len(sigma):
        m, n = module.shape
        return module.of_factors(sigma.new_zeros(1, n), sigma.new_zeros(m, 1))
    root = sigma.sqrt()
    return module.of_factors(root[:, None] * vh, u * root)


def _side_by_side(parts: Sequence[ProductSVD]) -> ProductSVD:
    """Concatenate the triplets of all tasks, the leading ones where there are more than fit."""
    fit = min(parts[0].u.shape[0], parts[0].vh.shape[1])
    each = fit if sum(len(part.sigma) for part in parts) <= fit else max(1, fit // len(parts))
    return ProductSVD(
        torch.cat([part.u[:, :each] for part in parts], dim=1),
        torch.cat([part.sigma[:each] for part in parts]),
        torch.cat([part.vh[:each] for part in parts]),
    )
