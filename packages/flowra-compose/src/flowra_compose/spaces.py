"""The spaces in which rules look at entries of task vectors: coordinates X = Lᵀ ΔW R, and ΔW = L X Rᵀ back.

L and R have orthonormal columns that span what the task vectors of a module span, so every space holds them whole, and
a sum in any space is the sum. Rules that treat each entry for itself (``entries.py``) depend on the space.

===========  =====================================  =====================================  ==============
space        L                                      R                                      X
===========  =====================================  =====================================  ==============
``weight``   I                                      I                                      ΔW, ``(m, n)``
``aligned``  left singular vectors of [τ₁ … τ_T]    I                                      ``(p, n)``
``core``     left singular vectors of [τ₁ … τ_T]    right singular vectors of [τ₁; …; τ_T]  ``(p, q)``
===========  =====================================  =====================================  ==============

With [τ₁ … τ_T] = U Σ [V₁ᵀ … V_Tᵀ] the aligned coordinates Uᵀ τᵢ are Σ Vᵢᵀ. Singular vectors come from factors: with
Aᵢᵀ = Qᵢ Rᵢ, [τ₁ … τ_T] = [B₁R₁ᵀ … B_T R_Tᵀ] diag(Qᵢᵀ), whose last factor has orthonormal rows. p, q ≤ Σ rᵢ, and nothing
of the size m × n is formed but by the space ``weight``. Where two singular values are equal, which vectors stand for
them is arbitrary, and what a rule makes of entries with it.

Source: ``aligned``: KnOTS, Stoica et al. 2024 (arXiv:2410.19735). ``core``: Panariello et al. 2025 (arXiv:2509.17786).
Deviations: singular values are kept down to rounding (the code of KnOTS keeps those above 1e-5, so it knows a scale and
loses what is below). The core's bases are those of products; in the paper they are those of the stacked Bᵢ and of the
stacked Aᵢ, which span the same but turn when a factor is scaled against the other.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates

__all__ = ["Coordinates", "Space", "aligned_space", "core_space", "weight_space"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Coordinates:
    """Two bases, for one module."""

    left: Tensor | None = None
    """L, ``(m, p)``, orthonormal columns, float64; None is the identity."""
    right: Tensor | None = None
    """R, ``(n, q)``; None is the identity, as it is where L is."""

    def of(self, update: LowRankUpdate) -> Tensor:
        """Return X = Lᵀ ΔW R, ``(p, q)``, in float64."""
        a, b = _factors(update)
        a = a if self.right is None else a @ self.right
        b = b if self.left is None else self.left.T @ b
        return b @ a

    def back(self, module: ModuleUpdates, x: Tensor) -> LowRankUpdate:
        """Return the update of a module with ΔW = L X Rᵀ, of a rank of at most the shorter side of X."""
        if self.left is None:
            return module.of_delta_weight(x)
        if self.right is None:
            return module.of_factors(x, self.left)
        if x.shape[0] <= x.shape[1]:
            return module.of_factors(x @ self.right.T, self.left)
        return module.of_factors(self.right.T, self.left @ x)


Space = Callable[[ModuleUpdates], Coordinates]
"""Choose coordinates for the task vectors of a module."""


def weight_space(module: ModuleUpdates) -> Coordinates:
    """Take ΔW as it is."""
    return Coordinates()


def aligned_space(module: ModuleUpdates) -> Coordinates:
    """Take what KnOTS aligns: the left singular vectors that all tasks share."""
    return Coordinates(left=_directions(_factors(update) for update in module.present))


def core_space(module: ModuleUpdates) -> Coordinates:
    """Take the common left and right singular vectors."""
    transposed = ((b.T, a.T) for a, b in map(_factors, module.present))
    return Coordinates(left=aligned_space(module).left, right=_directions(transposed))


def _factors(update: LowRankUpdate) -> tuple[Tensor, Tensor]:
    return update.lora_A.double(), update.scaling * update.lora_B.double()


def _directions(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the left singular vectors of [B₁A₁ … B_T A_T] whose σ is above rounding; one at least."""
    columns, rounding = [], 0.0
    for a, b in pairs:
        _, r = torch.linalg.qr(a.T, mode="r")
        columns.append(b @ r.T)
        sides = max(a.shape[1], b.shape[0])
        rounding += torch.finfo(torch.float64).eps * sides * float(b.norm(dim=0) @ a.norm(dim=1))
    u, sigma, _ = torch.linalg.svd(torch.cat(columns, dim=1), full_matrices=False)
    directions: Tensor = u[:, : max(1, int((sigma > rounding).sum()))]
    return directions
