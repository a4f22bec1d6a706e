"""The SVD form: ΔW = s · B diag(E) A (Zhang et al. 2023, arXiv:2303.10512, AdaLoRA, eq. 3; FlexLoRA uses the same).

A direction is a triplet: a row a_k of A, a number E_k, a column b_k of B. Where A and B are kept near orthonormal
(:func:`~flowra_adapters.orthogonality`), E is near the singular values of ΔW / s, so that a direction's worth can be
read off and directions come and go one at a time. A convolution in g groups has rank r in each of them, as with LoRA;
E is common to the groups.

Here the tensors are made anew whenever the rank changes; :mod:`flowra_adapters.svd_masked` keeps their shapes.
Deviations: a new direction has the mean length of those that are there, where FlexLoRA's released code draws it from
N(0, 1), fifty times the spread at birth; E is ``(r,)``, not ``(r, 1)``.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter, Base, refuse_sharded
from flowra_adapters.operators import EmbeddingOperator, Operator
from flowra_adapters.sharding import whole

__all__ = ["SVDForm"]

BIRTH_SPREAD = 0.02  # the standard deviation of A and B in the released code of AdaLoRA and FlexLoRA


class SVDForm(Adapter):
    """Low-rank update of a layer in the form of a singular value decomposition.

    At birth A and B are N(0, 0.02²) and E is zero, so the output of the layer is unchanged, bit by bit.

    Args:
        operator: of the layer.
        rank: 0 ≤ rank ≤ min(m, n·∏k) / g.
        scaling: s, a finite number other than 0; constant for the life of the adapter.
        dropout: probability in [0, 1) of dropping an input element, in training mode, on the adapter's path only.
        dtype: of all factors. Device: of the generator.
        generator: source of randomness, also of what later growth draws.

    Attributes:
        lora_A: ``(r, n·∏k)``. Replaced by a new Parameter whenever the rank changes.
        lora_E: ``(r,)``. Likewise.
        lora_B: ``(m, r)``. Likewise.
        max_rank: the largest rank that :meth:`grow` can reach.
        observer: called with z = E ⊙ A x, or None.
        seed: 0-d int64, of the next growth; part of the state dict, so that a resumed run draws the same columns.

    Raises:
        ValueError: if rank, scaling or dropout is out of range.
    """

    lora_A: nn.Parameter
    lora_E: nn.Parameter
    lora_B: nn.Parameter
    max_rank: int
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
    ) -> None:
        super().__init__(operator, scaling=scaling)
        _check(operator, rank, scaling, dropout)
        self.dropout = dropout
        self.max_rank = operator.max_rank
        lora_A, lora_B = (
            torch.zeros(shape, dtype=dtype, device=generator.device).normal_(std=BIRTH_SPREAD, generator=generator)
            for shape in ((rank, operator.in_size), (operator.out_size, rank))
        )
        self.lora_A = nn.Parameter(lora_A)
        self.lora_E = nn.Parameter(lora_A.new_zeros(rank))
        self.lora_B = nn.Parameter(lora_B)
        self.register_buffer("seed", torch.randint(2**62, (), generator=generator, device=generator.device))

    @property
    def rank(self) -> int:
        """Current rank r."""
        return self.lora_A.shape[0]

    def cost(self, rank: int) -> int:
        """Count m + n·∏k + 1 parameters for each unit of rank."""
        return rank * (self.operator.out_size + self.operator.in_size + 1)

    @property
    def acting_E(self) -> Tensor:
        """E as the update uses it, as long as A has rows; differentiable."""
        return self.lora_E

    def forward(self, x: Tensor, base: Base | None = None) -> Tensor:
        """Map the layer's input to the update of its output; computed in the dtype of the factors."""
        if self.training and self.dropout > 0:
            x = F.dropout(x.to(self.lora_A.dtype), self.dropout)
        lora_A, lora_B = self._factors(self.lora_A.dtype)
        z = self.operator.down(x, lora_A)
        if self.observer is not None:
            shown = z.movedim(self.operator.channel_dim, -1)
            self.observer(shown)
            z = shown.movedim(-1, self.operator.channel_dim)
        return self.operator.pointwise(z, lora_B) * self.scaling

    def plain_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return A and B, E in one of them, unless dropout acts."""
        if self.dropout > 0 and self.training:
            return None
        return self._factors(self.lora_A.dtype)

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return s · B diag(E) A in the standard layout, computed in at least float32."""
        lora_A, lora_B = self._factors(torch.promote_types(self.lora_A.dtype, torch.float32))
        return self.scaling * self.operator.product(lora_B, lora_A)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and B with E multiplied into the smaller of them, or into A while z = E ⊙ A x is observed."""
        lora_A, lora_E, lora_B = self.lora_A.to(dtype), self.acting_E.to(dtype), self.lora_B.to(dtype)
        if self.observer is not None or self.operator.in_size <= self.operator.out_size:
            return lora_E.unsqueeze(1) * lora_A, lora_B
        return lora_A, lora_B * lora_E

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A ``(r, n·∏k)``, E ``(r,)`` and B ``(m, r)`` of the directions in their order; differentiable.

        They are whole, also where several processes hold the Parameters in parts.
        """
        return whole(self.lora_A), whole(self.lora_E), whole(self.lora_B)

    @torch.no_grad()
    def triplet_norms(self) -> Tensor:
        """Return |E_k| · ‖a_k‖ · ‖b_k‖, ``(r,)``, in at least float32.

        With one group, s times this is the Frobenius norm of what ΔW loses when direction k leaves. With several it is
        an upper bound.
        """
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        lora_A, lora_E, lora_B = (each.to(wide) for each in self.triplets())
        norms: Tensor = lora_E.abs() * lora_A.norm(dim=1) * lora_B.norm(dim=0)
        return norms

    def grow(self, rows: Tensor) -> None:
        """Append directions with E = 0: ΔW is unchanged, ∂L/∂E of the new ones is not 0.

        Only the direction of a row counts: it is scaled to the mean length of the rows that are there, and its column
        of B is drawn from a Gaussian and scaled to the mean length of the columns; to 1 where there are none.

        Args:
            rows: ``(k, n·∏k)``, none of them zero.

        Raises:
            ValueError: if the rows do not fit the layer, one is zero or not finite, or the new rank would exceed its
                largest.
        """
        lora_A, lora_E, lora_B = (each.detach() for each in self.triplets())
        new_A, new_B = self._matched(rows)
        self.replace_factors(
            torch.cat([lora_A, new_A]), torch.cat([lora_B, new_B], 1), torch.cat([lora_E, lora_E.new_zeros(len(rows))])
        )

    def shrink(self, keep: Sequence[int]) -> None:
        """Keep the directions ``keep``; ΔW loses exactly the products of the others.

        Raises:
            ValueError: if an index is out of range or given twice.
        """
        self._check_keep(keep)
        index = torch.tensor(list(keep), dtype=torch.long, device=self.lora_A.device)
        lora_A, lora_E, lora_B = (each.detach() for each in self.triplets())
        self.replace_factors(lora_A[index], lora_B[:, index], lora_E[index])

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor) -> None:
        """Install new factors of any common rank as new Parameters; ``requires_grad`` is carried over.

        An optimiser that holds the old Parameters must be told: that is the caller's part.

        Raises:
            ValueError: if the old Parameters are sharded over processes.
        """
        refuse_sharded(self.lora_A)
        old_A, old_E, old_B = self.lora_A, self.lora_E, self.lora_B
        self.lora_A = nn.Parameter(lora_A.detach().to(old_A).contiguous(), requires_grad=old_A.requires_grad)
        self.lora_E = nn.Parameter(lora_E.detach().to(old_E).contiguous(), requires_grad=old_E.requires_grad)
        self.lora_B = nn.Parameter(lora_B.detach().to(old_B).contiguous(), requires_grad=old_B.requires_grad)

    @torch.no_grad()
    def _matched(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Make the rows of A and the columns of B of new directions."""
        size, rank = self.operator.in_size, self.rank
        if rows.ndim != 2 or rows.shape[1] != size:
            raise ValueError(f"rows must have shape (k, {size}), got {tuple(rows.shape)}")
        if rank + len(rows) > self.max_rank:
            raise ValueError(f"rank must be in [0, {self.max_rank}], got {rank} + {len(rows)}")
        wide = rows.double()
        lengths = wide.norm(dim=1, keepdim=True)
        if not (torch.isfinite(lengths) & (lengths > 0)).all():
            raise ValueError(f"rows must be finite and not zero, got lengths {lengths.flatten().tolist()}")
        generator = torch.Generator().manual_seed(int(self.seed))
        columns = torch.randn(self.operator.out_size, len(rows), generator=generator, dtype=torch.float64)
        self.seed.fill_(int(torch.randint(2**62, (), generator=generator)))
        columns = columns / columns.norm(dim=0)
        lora_A, _, lora_B = self.triplets()
        return (
            (wide / lengths * _mean_length(lora_A, 1)).to(lora_A),
            (columns * _mean_length(lora_B, 0).to(columns)).to(lora_B),
        )

    def _check_keep(self, keep: Sequence[int]) -> None:
        rank = self.rank
        if len(set(keep)) != len(keep) or not all(0 <= index < rank for index in keep):
            raise ValueError(f"keep must hold distinct indices in [0, {rank}), got {list(keep)}")

    def extra_repr(self) -> str:
        """Show what defines the adapter in ``print(model)``."""
        m, n = self.operator.out_size, self.operator.in_size
        return (
            f"in_features={n}, out_features={m}, rank={self.rank}, max_rank={self.max_rank}, scaling={self.scaling:g},"
            f" dropout={self.dropout:g}"
        )


def _mean_length(vectors: Tensor, dim: int) -> Tensor:
    """Return the mean length of a factor's directions; 1 if there are none, or all are zero."""
    lengths = vectors.double().norm(dim=dim)
    mean = lengths.mean() if len(lengths) else lengths.new_zeros(())
    return torch.where(mean > 0, mean, 1.0)


def _check(operator: Operator, rank: int, scaling: float, dropout: float) -> None:
    if not 0 <= rank <= operator.max_rank:
        raise ValueError(f"rank must be in [0, {operator.max_rank}] for a weight {operator.shape}, got {rank}")
    if not math.isfinite(scaling) or scaling == 0:
        raise ValueError(f"scaling must be finite and not 0, got {scaling}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout > 0 and isinstance(operator, EmbeddingOperator):
        raise ValueError(f"dropout must be 0 on an embedding, whose input are ids, got {dropout}")
