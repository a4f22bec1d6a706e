"""FLoRA: ΔW = s · G ×_1 U_1 ×_2 U_2 … ×_N U_N, a Tucker form in the weight's own axes.

Si et al. 2024, arXiv:2405.14739, eq. 4-6. A convolution keeps its kernel axes: factors ``(m, r_1)``, ``(n/g, r_2)`` and
``(k_d, r_3)`` for each axis of the kernel, core ``(r_1, r_2, r_3, …)``; parameters r_1 m + r_2 n/g + Σ k_d r_3 + ∏ r.
On a matrix it is s · U_1 G U_2ᵀ: what such an update can be is what LoRA of rank min(r_1, r_2) can be, and no more. The
core adds r² parameters and another course of training, not another set of matrices.

Here: matrices and raw parameters of any number of axes. :mod:`flowra_adapters.tucker_conv` has convolutions.
Deviations from the paper: axes in torch's order, output first; an axis of length 1 in a kernel has no factor; groups of
a convolution, on which the paper is silent, share U_2, and G, and divide the rows of U_1; s does not follow the rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter, Base
from flowra_adapters.multilinear import compose, hosvd, mean_length, new_directions, unfold
from flowra_adapters.operators import EmbeddingOperator, LinearOperator, Operator, ParameterOperator
from flowra_adapters.tucker_ranks import TuckerRanks, attainable, factor_axes, rank_of

__all__ = ["Tucker"]

BIRTH_SPREAD = 0.02


class Tucker(Adapter):
    """Tucker update of a weight with at least two axes.

    At birth the core is zero, so the output of the layer is unchanged, bit by bit, and only the core has a gradient.

    Args:
        operator: of the layer.
        rank: r ≥ 0, at most the largest rank of a weight's unfolding; clamped for each axis (:class:`TuckerRanks`).
        scaling: s, a finite number other than 0; constant for the life of the adapter.
        dropout: probability in [0, 1) of dropping an input element, in training mode, on the adapter's path only.
        dtype: of all tensors. Device: of the generator.
        generator: source of randomness, also of what later growth draws.
        ranks: how the rank becomes a rank of each axis.
        init: of the factors: ``normal`` is N(0, 0.02²); ``kaiming`` is uniform on ±1/√n for U_2 and on ±1/√r_d for the
            others, ten times as large for small ranks. The released code has both.

    Attributes:
        core: G, ``(r_1, …, r_N)``. Replaced by a new Parameter whenever the rank changes.
        factor_0, factor_1, …: U of each axis, ``(I_d, r_d)``. Likewise.
        max_rank: the largest rank that :meth:`grow` can reach.
        seed: 0-d int64, of the next growth; part of the state dict, so that a resumed run draws the same columns.

    Raises:
        ValueError: if rank, scaling, dropout or init is out of range.
    """

    core: nn.Parameter
    factor_0: nn.Parameter
    factor_1: nn.Parameter
    seed: Tensor

    def __init__(
        self,
        operator: Operator,
        *,
        rank: int,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
        generator: torch.Generator,
        ranks: TuckerRanks = TuckerRanks(),  # noqa: B008 - a constant
        init: Literal["normal", "kaiming"] = "normal",
    ) -> None:
        super().__init__(operator, scaling=scaling)
        _check(operator, rank, scaling, dropout, init)
        self.dropout = dropout
        self.ranks = ranks
        self.axes = factor_axes(operator)
        self.max_rank = ranks.largest(operator)
        sizes = ranks.of(operator, rank)
        self.core = nn.Parameter(torch.zeros(sizes, dtype=dtype, device=generator.device))
        for axis in self.axes:
            factor = self.core.new_zeros(operator.shape[axis], sizes[axis])
            if init == "normal":
                factor.normal_(std=BIRTH_SPREAD, generator=generator)
            else:
                bound = 1 / math.sqrt(max(1, factor.shape[0 if axis == 1 else 1]))
                factor.uniform_(-bound, bound, generator=generator)
            self.register_parameter(f"factor_{axis}", nn.Parameter(factor))
        self.register_buffer("seed", torch.randint(2**62, (), generator=generator, device=generator.device))

    @property
    def rank(self) -> int:
        """Current rank r: the largest of those axes that follow it."""
        return rank_of(self.operator, tuple(self.core.shape))

    @property
    def factors(self) -> dict[int, Tensor]:
        """Axis to its factor."""
        return {axis: getattr(self, f"factor_{axis}") for axis in self.axes}

    def cost(self, rank: int) -> int:
        """Count Σ I_d r_d + ∏ r_d parameters: more than in proportion to the rank."""
        return self.ranks.cost(self.operator, rank)

    def forward(self, x: Tensor, base: Base | None = None) -> Tensor:
        """Map the layer's input to the update of its output; computed in the dtype of the factors."""
        down, up = self._matrices()
        return self.operator.pointwise(self.operator.apply(self._dropped(x), down), up) * self.scaling

    def plain_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return U_2ᵀ and U_1, the core in one of them, where the layer is linear and no dropout acts."""
        if not isinstance(self.operator, LinearOperator) or (self.dropout > 0 and self.training):
            return None
        return self._matrices()

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return s · G ×_1 U_1 ×_2 U_2 … in the standard layout, computed in at least float32."""
        wide = torch.promote_types(self.core.dtype, torch.float32)
        return compose(self.scaling * self.core.to(wide), {axis: each.to(wide) for axis, each in self.factors.items()})

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x.to(self.core.dtype), self.dropout) if self.training and self.dropout > 0 else x

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Return A ``(r, n)`` and B ``(m, r)`` of a matrix: the core goes into the one that costs less."""
        core, up, down = self.core, self.factor_0, self.factor_1
        if len(up) < len(down) or isinstance(self.operator, EmbeddingOperator):  # an embedding reads few rows of U_2
            return down.T, up @ core
        return core @ down.T, up

    @torch.no_grad()
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """Write the update as factors of LoRA; exact.

        Returns:
            A ``(r, n·∏k)`` and B ``(m, r)``, in the layout of :class:`~flowra_adapters.LoRA`, with
            ΔW = s · ``operator.product(B, A)`` for the s of this adapter. A is G times all factors but U_1, B is U_1,
            so r = r_1; in groups whose outputs are fewer than r_1, r is their number, and B the identity in each.
        """
        up, groups = self.factor_0.detach(), self.operator.groups
        inner = {axis: each.detach() for axis, each in self.factors.items() if axis > 0}
        rows = compose(self.core.detach(), inner).flatten(1)
        outputs = len(up) // groups
        if len(rows) <= outputs:
            return rows.repeat(1, groups), up.clone()
        by_group = up.view(groups, outputs, -1) @ rows
        return by_group.transpose(0, 1).flatten(1), torch.eye(outputs).to(up).repeat(groups, 1)

    @torch.no_grad()
    def grow(self, rows: Tensor) -> None:
        """Append slices of zeros to the core: ΔW is unchanged, and their gradient is not 0.

        The input axis gets directions out of the rows: on a matrix the rows themselves; else, each row scaled to length
        1, the leading left singular vectors of their unfolding along that axis, without what U_2 spans already. All
        other new columns are Gaussian. All are scaled to the mean length of the columns that are there, or to 1.

        Args:
            rows: ``(k, n·∏k)``, none of them zero.

        Raises:
            ValueError: if the rows do not fit the layer, one is zero or not finite, or the new rank would exceed its
                largest.
        """
        size, rank = self.operator.in_size, self.rank + len(rows)
        if rows.ndim != 2 or rows.shape[1] != size:
            raise ValueError(f"rows must have shape (k, {size}), got {tuple(rows.shape)}")
        if rank > self.max_rank:
            raise ValueError(f"rank must be in [0, {self.max_rank}], got {self.rank} + {len(rows)}")
        wide = rows.to(self.core.device, torch.float64)
        lengths = wide.norm(dim=1, keepdim=True)
        if not (torch.isfinite(lengths) & (lengths > 0)).all():
            raise ValueError(f"rows must be finite and not zero, got lengths {lengths.flatten().tolist()}")
        generator = torch.Generator().manual_seed(int(self.seed))
        grown, sizes = {}, self.ranks.of(self.operator, rank)
        for axis, factor in self.factors.items():
            count = sizes[axis] - factor.shape[1]
            if axis == 1:
                by_group = (wide / lengths).view(len(rows), self.operator.groups, *self.operator.shape[1:])
                new = new_directions(unfold(by_group, 2), factor.to(wide), count)
            else:
                new = torch.randn(len(factor), count, generator=generator, dtype=torch.float64).to(factor.device)
            new *= (mean_length(factor) / new.norm(dim=0)).to(new)
            grown[axis] = torch.cat([factor, new.to(factor)], 1)
        self.seed.fill_(int(torch.randint(2**62, (), generator=generator)))
        core = self.core.new_zeros(sizes)
        core[tuple(slice(old) for old in self.core.shape)] = self.core
        self.replace_factors(core, grown)

    @torch.no_grad()
    def shrink(self, keep: Sequence[int]) -> None:
        """Keep the slices ``keep`` of the update's higher-order singular value decomposition.

        The factors are made orthonormal first, so that slice j of an axis has the j-th largest singular value of the
        unfolding along it; then each axis that follows the rank keeps its slices of these indices, in their order, and
        where it has fewer, its leading ones. Each factor is scaled back to its mean length. On a matrix the slices are
        its singular triplets, and ΔW loses exactly those dropped. Else the slices of different axes meet in the core,
        and ΔW loses what :meth:`shrink_loss` says. Keeping all in their order changes nothing.

        Raises:
            ValueError: if an index is out of range or given twice.
        """
        chosen = self._chosen(keep)
        if list(keep) == list(range(self.rank)):
            return
        core, factors = self._decomposed() if len(keep) > 0 else (self.core, self.factors)
        for axis, index in chosen.items():
            core = core.index_select(axis, index)
            if axis in factors:
                factors[axis] = factors[axis][:, index]
        for axis, old in self.factors.items() if len(keep) > 0 else ():
            length = mean_length(old).to(core)
            factors[axis], core = factors[axis] * length, core / length
        self.replace_factors(core, factors)

    @torch.no_grad()
    def shrink_loss(self, keep: Sequence[int]) -> float:
        """Return ‖ΔW - ΔW'‖, the Frobenius norm of what :meth:`shrink` with these indices takes off; exact.

        Raises:
            ValueError: if an index is out of range or given twice.
        """
        chosen = self._chosen(keep)
        if list(keep) == list(range(self.rank)):
            return 0.0
        core = self._decomposed()[0]
        lost = torch.ones_like(core, dtype=torch.bool)
        lost[torch.meshgrid(*(chosen[axis] for axis in range(core.ndim)), indexing="ij")] = False
        return abs(self.scaling) * float(core[lost].norm())

    def _decomposed(self) -> tuple[Tensor, dict[int, Tensor]]:
        return hosvd(self.core.double(), {axis: each.double() for axis, each in self.factors.items()})

    def _chosen(self, keep: Sequence[int]) -> dict[int, Tensor]:
        """Return the slices that each axis keeps."""
        if len(set(keep)) != len(keep) or not all(0 <= index < self.rank for index in keep):
            raise ValueError(f"keep must hold distinct indices in [0, {self.rank}), got {list(keep)}")
        kept = self.ranks.kept(self.operator, tuple(self.core.shape), keep)
        return {axis: torch.tensor(index, dtype=torch.long, device=self.core.device) for axis, index in enumerate(kept)}

    def replace_factors(self, core: Tensor, factors: Mapping[int, Tensor]) -> None:
        """Install a new core and new factors, by axis, as new Parameters; ``requires_grad`` is carried over.

        An optimiser that holds the old Parameters must be told: that is the caller's part.

        Raises:
            ValueError: if the shapes are not those of a rank.
        """
        given = tuple(core.shape)
        sizes = self.ranks.of(self.operator, rank_of(self.operator, given)) if core.ndim == self.core.ndim else ()
        if given != sizes:
            raise ValueError(f"core must have a shape that {self.ranks} gives {self.operator.shape}, got {given}")
        for axis in self.axes:
            shape = (self.operator.shape[axis], sizes[axis])
            if tuple(factors[axis].shape) != shape:
                raise ValueError(f"factor {axis} must have shape {shape}, got {tuple(factors[axis].shape)}")
        for axis, old in self.factors.items():
            new = factors[axis].detach().to(old).contiguous()
            setattr(self, f"factor_{axis}", nn.Parameter(new, requires_grad=old.requires_grad))
        self.core = nn.Parameter(core.detach().to(self.core).contiguous(), requires_grad=self.core.requires_grad)

    def extra_repr(self) -> str:
        """Show what defines the adapter in ``print(model)``."""
        return (
            f"shape={self.operator.shape}, rank={self.rank}, ranks={tuple(self.core.shape)}, "
            f"scaling={self.scaling:g}, dropout={self.dropout:g}"
        )


def _check(operator: Operator, rank: int, scaling: float, dropout: float, init: str) -> None:
    if len(operator.shape) < 2:
        raise ValueError(f"weight must have at least 2 axes, got shape {operator.shape}")
    if not 0 <= rank <= attainable(operator):
        raise ValueError(f"rank must be in [0, {attainable(operator)}] for a weight {operator.shape}, got {rank}")
    if not math.isfinite(scaling) or scaling == 0:
        raise ValueError(f"scaling must be finite and not 0, got {scaling}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout > 0 and isinstance(operator, EmbeddingOperator | ParameterOperator):
        raise ValueError(f"dropout must be 0 on {type(operator).__name__}, which has no floating input, got {dropout}")
    if init not in ("normal", "kaiming"):
        raise ValueError(f"init must be 'normal' or 'kaiming', got {init!r}")
