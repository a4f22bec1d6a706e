"""Coordinates in which several symmetric matrices are as near to diagonal at once as may be.

An orthogonal U makes Σᵢ ‖off(Uᵀ Mᵢ U)‖² small, step by step: in Uᵀ Mᵢ U, of diagonal d and entries m, a small rotation
I + X, X skew, changes m_ab by (d_a - d_b) x_ab, so least squares over the matrices give
x_ab = -Σᵢ (d_a - d_b) m_ab / Σᵢ (d_a - d_b)², all pairs at once; I + X is made orthogonal again.

They are for scaling a linear system, not for its solution: a few steps in float32 will do.

Source: Ziehe et al. 2004 (JMLR 5, FFDIAG), for orthogonal U. Deviations: the denominators are regularised by
1 % of their mean; the start is the eigenvectors of an uneven sum of the matrices, which are exact if they commute.
"""

import torch
from torch import Tensor

__all__ = ["joint_coordinates"]

STEPS = 6


def joint_coordinates(matrices: Tensor) -> Tensor:
    """Return U ``(d, d)``, orthogonal, in the dtype of the matrices, ``(T, d, d)``."""
    uneven = torch.arange(1, len(matrices) + 1).to(matrices) / len(matrices)
    coordinates: Tensor = torch.linalg.eigh(torch.einsum("t,tij->ij", uneven, matrices)).eigenvectors
    if len(matrices) <= 2:  # two that add up to the identity commute
        return coordinates
    u, single = coordinates.float(), matrices.float()
    for _ in range(STEPS):
        seen = u.T @ single @ u
        diagonals = seen.diagonal(dim1=1, dim2=2)
        apart = diagonals[:, :, None] - diagonals[:, None, :]
        below = apart.square().sum(0)
        skew = -(apart * seen).sum(0) / (below + 0.01 * below.mean()).clamp(min=torch.finfo(below.dtype).tiny)
        u = u @ torch.linalg.qr(torch.eye(len(u)).to(u) + skew)[0]
    coordinates, _ = torch.linalg.qr(u.to(matrices))
    return coordinates
