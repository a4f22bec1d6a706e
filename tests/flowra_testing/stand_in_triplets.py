"""Updates of triplets that meet the Protocols of ``flowra_allocation``, and no more: its tests run without adapters.

``StandInTriplets`` is the form *triplets* (s · B diag(E) A, factors become new Parameters), ``StandInSlots`` the form
*slots* (s · B diag(E ⊙ μ) A over a fixed number of slots). Both stand beside a linear layer:

    layers = hang_triplets(mlp(), {"up": 3, "down": 2, "skip": 0})          # or with slots=6
    layers["up"].lora_E.data.fill_(0.1)                                     # E is 0 at birth, A and B are N(0, 0.02²)

``cost_per_rank`` is m + n + 1. Growth draws columns of B from the global generator, at the mean length of those there.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StandInTriplets(nn.Module):
    """s · B diag(E) A beside a linear layer."""

    def __init__(self, lora_A: Tensor, lora_E: Tensor, lora_B: Tensor, *, scaling: float) -> None:
        super().__init__()
        self.lora_A, self.lora_E, self.lora_B = (nn.Parameter(each) for each in (lora_A, lora_E, lora_B))
        self.scaling = scaling
        self.observer: Callable[[Tensor], None] | None = None

    @property
    def rank(self) -> int:
        """Current rank r."""
        return len(self.lora_A)

    @property
    def cost_per_rank(self) -> int:
        """Parameters per unit of rank: m + n + 1."""
        return self.lora_A.shape[1] + self.lora_B.shape[0] + 1

    @property
    def acting_E(self) -> Tensor:
        """E as the update uses it."""
        return self.lora_E

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, n)`` to ``(…, m)``, and show the observer z = E ⊙ A x."""
        z = F.linear(x, self.lora_A) * self.acting_E
        if self.observer is not None:
            self.observer(z)
        return F.linear(z, self.lora_B) * self.scaling

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor) -> None:
        """Install new factors of a common rank as new Parameters."""
        self.lora_A, self.lora_E, self.lora_B = (nn.Parameter(each.clone()) for each in (lora_A, lora_E, lora_B))

    def grow(self, rows: Tensor) -> None:
        """Append directions with E = 0, as long as those that are there."""
        rows, columns = self.matched(rows)
        self.replace_factors(
            torch.cat([self.lora_A.detach(), rows]),
            torch.cat([self.lora_B.detach(), columns], 1),
            torch.cat([self.lora_E.detach(), self.lora_E.new_zeros(len(rows))]),
        )

    def slots(self) -> list[int]:
        """Return where the directions lie, in their order."""
        return list(range(len(self.lora_A)))

    @torch.no_grad()
    def matched(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Make rows of A and columns of B of mean length; 1 where there are none."""
        columns = torch.randn(len(self.lora_B), len(rows)).to(self.lora_B)
        live = self.slots()
        long, wide = (self.lora_A[live].norm(dim=1).mean(), self.lora_B[:, live].norm(dim=0).mean()) if live else (1, 1)
        rows = rows.to(self.lora_A)
        return rows / rows.norm(dim=1, keepdim=True) * long, columns / columns.norm(dim=0) * wide


class StandInSlots(StandInTriplets):
    """s · B diag(E ⊙ μ) A over a fixed number of slots."""

    mask: Tensor
    order: Tensor

    def __init__(self, lora_A: Tensor, lora_E: Tensor, lora_B: Tensor, *, scaling: float, slots: int) -> None:
        free = slots - len(lora_E)
        super().__init__(
            F.pad(lora_A, (0, 0, 0, free)), F.pad(lora_E, (0, free)), F.pad(lora_B, (0, free)), scaling=scaling
        )
        self.register_buffer("mask", torch.arange(slots) < len(lora_E))
        self.register_buffer("order", torch.arange(slots))

    @property
    def rank(self) -> int:
        """Current rank r, read off the mask."""
        return int(self.mask.sum())

    @property
    def acting_E(self) -> Tensor:
        """E ⊙ μ."""
        return self.lora_E * self.mask

    def slots(self) -> list[int]:
        """Return where the directions lie, in their order."""
        return sorted(self.mask.nonzero().flatten().tolist(), key=self.order.tolist().__getitem__)

    def shrink(self, keep: Sequence[int]) -> None:
        """Mask all directions but these."""
        slots = self.slots()
        self.mask.zero_()
        for place, index in enumerate(keep):
            self.mask[slots[index]] = True
            self.order[slots[index]] = place

    @torch.no_grad()
    def grow(self, rows: Tensor) -> None:
        """Write directions with E = 0 into the first free slots."""
        rows, columns = self.matched(rows)
        free = (~self.mask).nonzero().flatten()[: len(rows)]
        self.lora_A[free], self.lora_B[:, free], self.lora_E[free] = rows, columns, 0.0
        self.order[free] = int(self.order.max()) + 1 + torch.arange(len(free))
        self.mask[free] = True


def hang_triplets(
    model: nn.Module, ranks: Mapping[str, int], *, slots: int | None = None
) -> dict[str, StandInTriplets]:
    """Freeze the model and hang an update on each named ``nn.Linear``: a child that a forward hook adds.

    Args:
        model: to change.
        ranks: module name to rank.
        slots: of every update; None for updates whose tensors change their shapes.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    hung: dict[str, StandInTriplets] = {}
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        like = layer.weight.detach()
        lora_A, lora_B = (
            torch.zeros(shape, dtype=like.dtype).normal_(std=0.02, generator=generator)
            for shape in ((rank, layer.in_features), (layer.out_features, rank))
        )
        born = lora_A, like.new_zeros(rank), lora_B
        hung[name] = (
            StandInTriplets(*born, scaling=2.0) if slots is None else StandInSlots(*born, scaling=2.0, slots=slots)
        )
        layer.add_module("stand_in", hung[name])
        layer.register_forward_hook(_add_update)
    return hung


def _add_update(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    update = layer.stand_in
    assert isinstance(update, StandInTriplets)
    return output + update(args[0]) if update.rank > 0 else output
