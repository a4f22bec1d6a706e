"""``flow``: the update whose outputs match those of every task on its own inputs, in the metric of its own loss.

    M* = argmin_M Σᵢ tr(Sᵢ (M - τᵢ) Cᵢ (M - τᵢ)ᵀ)    ⟺    Σᵢ Sᵢ M Cᵢ = Σᵢ Sᵢ τᵢ Cᵢ

One task gives back its update, equal updates the update, equal statistics the mean; where the inputs of tasks are
orthogonal to one another, each task keeps its own outputs. There is no scale to tune. Without S (S = I) this is
RegMean, with diagonal moments the mean weighted by them (Matena & Raffel 2021).

M = Q_B X Q_Aᵀ in the extended core (``extended_core.py``), where the equation is one of q × q matrices, solved by
conjugate gradients from the mean of the updates on. In coordinates where the sums over tasks are the identity, and the
terms of single tasks nearly diagonal, that takes tens of steps.

Source: docs/methods.md, section 26; Jin et al. 2022 (arXiv:2212.09849) for S = I.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowra_compose.extended_core import extended_core
from flowra_compose.joint_diagonal import joint_coordinates
from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions
from flowra_compose.product_svd import ProductSVD, product_svd
from flowra_compose.side_moments import SHRINKAGE, SideMoments, cholesky

__all__ = ["flow"]

RESIDUAL = 1e-10
MOST_STEPS = 1000


def flow(module: ModuleUpdates, options: MergeOptions) -> LowRankUpdate:
    """Match the outputs of the tasks at one module.

    A task takes part by its statistics: where it leaves the module alone but has them, with τᵢ = 0.

    Returns:
        An update with balanced factors, of rank ≤ 2 Σ rᵢ, in float64.

    Raises:
        ValueError: if some tasks have output moments and others have none, or their sums over tasks are singular.
        ArithmeticError: if the equation is not solved in 1000 steps.
    """
    shrinkage = SHRINKAGE if options.shrinkage is None else options.shrinkage
    where = f"{module.name!r}, shrinkage {shrinkage}"
    m, n = module.shape
    tasks = [
        (update, known.inputs, known.outputs)
        for update, known in zip(module.updates, module.statistics, strict=True)
        if known is not None and known.inputs is not None
    ]
    inputs = SideMoments.toward_identity([c for _, c, _ in tasks], shrinkage)
    outputs = SideMoments.toward_identity(
        _output_moments([s for _, _, s in tasks], inputs.moments[0].new_ones(m), where), shrinkage
    )
    updates = [_directions(update, (m, n), inputs.moments[0].device) for update, _, _ in tasks]
    q_a = extended_core([each.vh.T for each in updates], inputs, where=where)
    q_b = extended_core([each.u for each in updates], outputs, where=where)
    if not q_a.shape[1]:
        return module.of_factors(q_a.new_zeros(1, n), q_b.new_zeros(m, 1))
    targets = torch.stack([(q_b.T @ each.u * each.sigma) @ (each.vh @ q_a) for each in updates])
    core = _matched(targets, inputs.projected(q_a), outputs.projected(q_b), where)
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    rank = max(1, int((sigma > max(m, n) * torch.finfo(sigma.dtype).eps * sigma[0]).sum()))
    return module.of_factors(*ProductSVD(q_b @ u, sigma, vh @ q_a.T).balanced_factors(rank))


def _output_moments(known: Sequence[Tensor | None], identity: Tensor, where: str) -> list[Tensor]:
    """Return Sᵢ of every task, the identity if none has any."""
    given = [moment for moment in known if moment is not None]
    if given and len(given) < len(known):
        raise ValueError(
            f"statistics must hold the outputs of all tasks or of none, got {len(given)} of {len(known)}; for {where}."
            " Measure the others, or leave them out."
        )
    return given or [identity] * len(known)


def _directions(update: LowRankUpdate | None, shape: tuple[int, int], device: torch.device) -> ProductSVD:
    """Return the singular values of τ, without those of rounding, and their directions."""
    m, n = shape
    if update is None:
        sizes = (m, 0), (0,), (0, n)
        return ProductSVD(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))
    a, b = update.lora_A.double(), update.scaling * update.lora_B.double()
    svd = product_svd(a, b)
    rounding = torch.finfo(torch.float64).eps * max(shape) * float(b.norm(dim=0) @ a.norm(dim=1))
    kept = int((svd.sigma > rounding).sum())
    return ProductSVD(svd.u[:, :kept], svd.sigma[:kept], svd.vh[:kept])


def _matched(targets: Tensor, c: Tensor, s: Tensor, where: str) -> Tensor:
    """Solve Σᵢ sᵢ X cᵢ = Σᵢ sᵢ Xᵢ cᵢ.

    Args:
        targets: Xᵢ, ``(T, p, q)``.
        c: cᵢ, ``(T, q, q)``, symmetric, positive semidefinite.
        s: sᵢ, ``(T, p, p)``, symmetric, positive semidefinite.
        where: the module, for an error.

    Returns:
        X, ``(p, q)``.

    Raises:
        ArithmeticError: if it takes more than 1000 steps.
    """
    w_c, w_s = _coordinates(c, where), _coordinates(s, where)  # X = W_s Y W_cᵀ
    start = w_s.T @ s.sum(0) @ targets.mean(0) @ c.sum(0) @ w_c
    gradients = w_s.T @ (s @ targets @ c) @ w_c
    c, s = w_c.T @ c @ w_c, w_s.T @ s @ w_s
    side_by_side = c.flatten(0, 1)

    def operator(y: Tensor) -> Tensor:  # Σᵢ sᵢ Y cᵢ, the sum as one product
        return (s @ y).transpose(0, 1).flatten(1) @ side_by_side

    diagonal = torch.einsum("tpp,tqq->pq", s, c).clamp(min=torch.finfo(c.dtype).eps)
    least = RESIDUAL * float(torch.linalg.matrix_norm(gradients).sum())
    y, norm = _conjugate_gradients(operator, gradients.sum(0), start, diagonal, least)
    if not norm <= least:
        raise ArithmeticError(
            f"outputs must be matched to a relative residual of {RESIDUAL:g} in {MOST_STEPS} steps,"
            f" got {norm / least * RESIDUAL:.1e}; for {where}. Raise the shrinkage."
        )
    return w_s @ y @ w_c.T


def _coordinates(moments: Tensor, where: str) -> Tensor:
    """Return W with Wᵀ (Σᵢ Mᵢ) W = I, in which every Wᵀ Mᵢ W is nearly diagonal."""
    root = cholesky(moments.sum(0), where=where)
    inverse: Tensor = torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=False)
    return inverse.T @ joint_coordinates(inverse @ moments @ inverse.T)


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor], rhs: Tensor, x: Tensor, diagonal: Tensor, least: float
) -> tuple[Tensor, float]:
    """Solve a symmetric positive semidefinite system with solutions, from a first guess and scaled by its diagonal.

    Returns:
        The solution, and the norm of its residual, not above ``least`` unless the steps ran out.
    """
    residual = rhs - operator(x)
    step = residual / diagonal
    slope = float((residual * step).sum())
    for _ in range(MOST_STEPS):
        if float(residual.norm()) <= least:
            break
        image = operator(step)
        length = slope / float((step * image).sum())
        x, residual = x + length * step, residual - length * image
        scaled = residual / diagonal
        slope, before = float((residual * scaled).sum()), slope
        step = scaled + slope / before * step
    return x, float(residual.norm())
