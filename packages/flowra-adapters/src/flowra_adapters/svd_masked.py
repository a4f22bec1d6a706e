"""The SVD form in tensors that never change their shape: ΔW = s · B diag(E ⊙ μ) A with a mask μ over slots.

A direction that leaves is masked; one that comes is written into a free slot. So growth changes no bit of the output
(the products have the same shapes, and a masked slot adds zeros to them), a compiled step is compiled once, and an
optimiser, a scheduler or a process group that holds the Parameters need not hear of it. The price is memory for
``max_rank`` directions. Under ``torch.distributed.fsdp.fully_shard`` every process holds a part of each Parameter: what
reads or changes directions is then to be called on all of them.

A masked slot has a gradient of exactly zero in A, E and B. An optimiser may still move it, by what is left of its
momentum and by weight decay; nothing reads it, and a new direction overwrites all of it. Its moments stay with the
slot: whoever grows must reset them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowra_adapters.operators import Operator
from flowra_adapters.sharding import whole, write
from flowra_adapters.svd import SVDForm

__all__ = ["MaskedSVDForm"]


class MaskedSVDForm(SVDForm):
    """The update of :class:`SVDForm` over a fixed number of slots.

    Directions have the order in which they came, as there; the slots they lie in need not. At rank 0 the adapter adds
    exact zeros: it takes part in every pass, so that all Parameters have gradients at all times.

    Args:
        operator: of the layer.
        rank: 0 ≤ rank ≤ max_rank.
        scaling: s, a finite number other than 0; constant for the life of the adapter.
        dropout: probability in [0, 1) of dropping an input element, in training mode, on the adapter's path only.
        dtype: of all factors. Device: of the generator.
        generator: source of randomness, also of what later growth draws.
        max_rank: slots, at most min(m, n·∏k) / g; by default four times the rank, but at least 8, as far as that goes.

    Attributes:
        lora_A: ``(max_rank, n·∏k)``, the same Parameter for life.
        lora_E: ``(max_rank,)``. Likewise.
        lora_B: ``(m, max_rank)``. Likewise.
        mask: ``(max_rank,)``, bool: which slots hold a direction.
        order: ``(max_rank,)``, int64: directions are counted by rising values.

    Raises:
        ValueError: if rank, scaling, dropout or max_rank is out of range.
    """

    mask: Tensor
    order: Tensor

    def __init__(
        self,
        operator: Operator,
        *,
        rank: int,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
        generator: torch.Generator,
        max_rank: int | None = None,
    ) -> None:
        super().__init__(operator, rank=rank, scaling=scaling, dropout=dropout, dtype=dtype, generator=generator)
        largest = operator.max_rank
        slots = min(largest, max(4 * rank, 8)) if max_rank is None else max_rank
        if not rank <= slots <= largest:
            raise ValueError(f"max_rank must be in [{rank}, {largest}] for a weight {operator.shape}, got {slots}")
        self.max_rank = slots
        lora_A, lora_E, lora_B = (each.detach() for each in super().triplets())
        self.register_buffer("mask", torch.zeros(slots, dtype=torch.bool, device=lora_A.device))
        self.register_buffer("order", torch.arange(slots, device=lora_A.device))
        self.lora_A = nn.Parameter(lora_A.new_zeros(slots, operator.in_size))
        self.lora_E = nn.Parameter(lora_E.new_zeros(slots))
        self.lora_B = nn.Parameter(lora_B.new_zeros(operator.out_size, slots))
        self.replace_factors(lora_A, lora_B, lora_E)

    @property
    def rank(self) -> int:
        """Current rank r, read off the mask."""
        return int(self.mask.sum())

    @property
    def empty(self) -> bool:
        """Whether there is no slot."""
        return self.max_rank == 0

    @property
    def acting_E(self) -> Tensor:
        """E ⊙ μ, ``(max_rank,)``."""
        return self.lora_E * self.mask

    def slots(self) -> list[int]:
        """Return where the directions lie, in their order."""
        order = self.order.tolist()
        return sorted((slot for slot, live in enumerate(self.mask.tolist()) if live), key=order.__getitem__)

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A ``(r, n·∏k)``, E ``(r,)`` and B ``(m, r)`` of the directions in their order; differentiable."""
        index = self._index(self.slots())
        return whole(self.lora_A)[index], whole(self.lora_E)[index], whole(self.lora_B)[:, index]

    def num_parameters(self) -> int:
        """Count the parameters of the directions that are there, not those of free slots."""
        return self.cost(self.rank)

    @torch.no_grad()
    def grow(self, rows: Tensor) -> None:
        """Write directions with E = 0 into the first free slots; the output does not change by a bit.

        Lengths are matched as in :meth:`SVDForm.grow`.

        Args:
            rows: ``(k, n·∏k)``, none of them zero.

        Raises:
            ValueError: if the rows do not fit the layer, one is zero or not finite, or there are not enough slots.
        """
        lora_A, lora_B = self._matched(rows)
        free = [slot for slot, live in enumerate(self.mask.tolist()) if not live][: len(rows)]
        last = int(self.order.max()) if len(self.order) else 0
        self._write(free, lora_A, lora_B, lora_A.new_zeros(len(rows)), first=last + 1)

    def shrink(self, keep: Sequence[int]) -> None:
        """Mask all directions but ``keep``; ΔW loses exactly the products of the others.

        Raises:
            ValueError: if an index is out of range or given twice.
        """
        self._check_keep(keep)
        slots = self.slots()
        kept = self._index([slots[index] for index in keep])
        self.mask.zero_()
        self.mask[kept] = True
        self.order[kept] = torch.arange(len(kept), device=kept.device)

    @torch.no_grad()
    def replace_factors(self, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor) -> None:
        """Write new factors of a common rank ≤ ``max_rank`` into the first slots and free the others."""
        self.mask.zero_()
        self._write(list(range(len(lora_A))), lora_A, lora_B, lora_E, first=0)

    def compact(self) -> SVDForm:
        """Return the same update without free slots; outputs agree to rounding.

        :func:`~flowra_adapters.compact` does it for a whole model.
        """
        lora_A, lora_E, lora_B = self.triplets()
        compacted = SVDForm(
            self.operator,
            rank=0,
            scaling=self.scaling,
            dropout=self.dropout,
            dtype=self.lora_A.dtype,
            generator=torch.Generator(self.lora_A.device),
        )
        for name in ("lora_A", "lora_E", "lora_B"):
            compacted.get_parameter(name).requires_grad_(self.get_parameter(name).requires_grad)
        compacted.replace_factors(lora_A, lora_B, lora_E)
        compacted.seed.copy_(self.seed)
        compacted.enabled = self.enabled
        return compacted.train(self.training)

    def _write(self, slots: list[int], lora_A: Tensor, lora_B: Tensor, lora_E: Tensor, *, first: int) -> None:
        """Put directions into slots and count them from ``first``."""
        index = self._index(slots)
        for parameter, axis, values in ((self.lora_A, 0, lora_A), (self.lora_B, 1, lora_B), (self.lora_E, 0, lora_E)):
            old = whole(parameter.detach())
            write(parameter, old.index_copy(axis, index, values.to(old)))
        self.mask[index] = True
        self.order[index] = torch.arange(first, first + len(slots), device=index.device)

    def _index(self, slots: list[int]) -> Tensor:
        return torch.tensor(slots, dtype=torch.long, device=self.lora_A.device)
