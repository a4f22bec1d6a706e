"""The directions that composition by matching outputs looks in, on one side of a module: the extended core.

The exact minimum of Σᵢ tr(Sᵢ (M - τᵢ) Cᵢ (M - τᵢ)ᵀ) is a full matrix, of m n unknowns. With S = I it is
Σᵢ τᵢ Cᵢ C̄⁻¹, C̄ = Σᵢ Cᵢ, whose rows lie in the span of C̄⁻¹ Cᵢ Aᵢᵀ; with C = I its columns lie in that of S̄⁻¹ Sᵢ Bᵢ.
So M is sought with rows in the span of [Aᵢᵀ, C̄⁻¹ Cᵢ Aᵢᵀ]ᵢ and columns in that of [Bᵢ, S̄⁻¹ Sᵢ Bᵢ]ᵢ: no more than 2 Σ rᵢ
directions on either side, and exact in both cases.

Source: docs/methods.md, section 26; the core without the extension is that of Core Space merging (arXiv:2509.17786).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowra_compose.side_moments import SideMoments

__all__ = ["LARGEST_SOLVED_SIDE", "extended_core"]

LARGEST_SOLVED_SIDE = 8192
INDEPENDENT = 1e-12  # of a direction of unit length, what must lie outside the span of the others


def extended_core(directions: Sequence[Tensor], moments: SideMoments, *, where: str) -> Tensor:
    """Return an orthonormal basis of the extended core of one side.

    Args:
        directions: for each task the directions of its update on this side, orthonormal, ``(d, rᵢ)``, rᵢ ≥ 0, float64.
        moments: of the tasks on this side. Beyond a side of 8192, where the moments are full matrices, they are not
            inverted, and the core is not extended.
        where: the module, for an error.

    Returns:
        Q ``(d, q)``, q ≤ min(d, 2 Σ rᵢ); of the whole space, the identity.

    Raises:
        ValueError: if Σᵢ Mᵢ is singular to rounding.
    """
    own = torch.cat(list(directions), dim=1)
    if own.shape[1] >= moments.dim:
        return torch.eye(moments.dim, dtype=own.dtype, device=own.device)
    if moments.dim > LARGEST_SOLVED_SIDE and not moments.diagonal:
        return _orthonormal(own)
    met = torch.cat([moments.times(task, each) for task, each in enumerate(directions)], dim=1)
    return _orthonormal(torch.cat([own, moments.total_solved(met, where=where)], dim=1))


def _orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of columns of any lengths, without directions of rounding."""
    lengths = columns.norm(dim=0)
    columns = columns[:, lengths > 0] / lengths[lengths > 0]
    q, r = torch.linalg.qr(columns)
    u, sigma, _ = torch.linalg.svd(r)
    basis: Tensor = q @ u[:, : int((sigma > INDEPENDENT).sum())]
    return basis
