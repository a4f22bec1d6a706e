"""A low-rank update that meets the Protocols of ``flowra_allocation``, and no more: its tests run without adapters."""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StandInAdapter(nn.Module):
    """s · B A beside a linear layer; at birth A ``(r, n)`` is uniform on ±1/√n and B ``(m, r)`` is zero."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scaling: float,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        lora_A = torch.empty(rank, in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype))
        self.scaling = scaling
        self.observer: Callable[[Tensor], None] | None = None

    @property
    def rank(self) -> int:
        """Current rank r."""
        return len(self.lora_A)

    @property
    def cost_per_rank(self) -> int:
        """Parameters per unit of rank: m + n."""
        return self.lora_A.shape[1] + self.lora_B.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, n)`` to ``(…, m)``, and show the observer z = A x."""
        z = F.linear(x, self.lora_A)
        if self.observer is not None:
            self.observer(z)
        return F.linear(z, self.lora_B) * self.scaling

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Install new factors of a common rank as new Parameters; ``requires_grad`` is carried over."""
        self.lora_A = nn.Parameter(lora_A, requires_grad=self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(lora_B, requires_grad=self.lora_B.requires_grad)


def hang(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, StandInAdapter]:
    """Freeze the model and hang an update on each named ``nn.Linear``: a child that a forward hook adds.

    An update of rank 0 is left out of the graph, so that a layer in front of all others has none.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    hung = {}
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        hung[name] = StandInAdapter(
            layer.in_features, layer.out_features, rank=rank, scaling=2.0, dtype=layer.weight.dtype, generator=generator
        )
        layer.add_module("stand_in", hung[name])
        layer.register_forward_hook(_add_update)
    return hung


def _add_update(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    update = layer.stand_in
    assert isinstance(update, StandInAdapter)
    return output + update(args[0]) if update.rank > 0 else output
