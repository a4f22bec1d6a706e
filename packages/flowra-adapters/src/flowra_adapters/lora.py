"""LoRA: ΔW = s · B A on a linear layer (Hu et al. 2022, arXiv:2106.09685, section 4.1).

Conventions: A is ``(r, n)``, B is ``(m, r)`` for a weight ``(m, n)``; y += s · (drop(x) Aᵀ) Bᵀ.
Deviation from the paper: ``s`` is a constant of the module, fixed at birth, and not α/r of the current rank.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter

__all__ = ["LoRA"]


class LoRA(Adapter):
    """Low-rank update of a linear layer.

    At birth A is uniform on ±1/√n and B is zero, so the output of the layer is unchanged, bit by bit.

    Args:
        in_features: n, size of the layer's input.
        out_features: m, size of the layer's output.
        rank: 0 ≤ rank ≤ min(m, n).
        scaling: s, a finite number other than 0; constant for the life of the adapter.
        dropout: probability in [0, 1) of dropping an input element, in training mode, on the adapter's path only.
        dtype: of both factors. Device: of the generator.
        generator: source of randomness for A.

    Attributes:
        lora_A: ``(r, n)``. Replaced by a new Parameter whenever the rank changes.
        lora_B: ``(m, r)``. Likewise.
        observer: called with the bottleneck activation z = A x, ``(…, r)``, on every forward pass, or None. This is
            how statistics are gathered as a by-product of training.

    Raises:
        ValueError: if rank, scaling or dropout is out of range.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if not 0 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank must be in [0, min({out_features}, {in_features})], got {rank}")
        if not math.isfinite(scaling) or scaling == 0:
            raise ValueError(f"scaling must be finite and not 0, got {scaling}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.scaling = scaling
        self.dropout = dropout
        self.enabled = True
        self.observer: Callable[[Tensor], None] | None = None
        device = generator.device
        bound = 1 / math.sqrt(in_features)
        lora_A = torch.empty(rank, in_features, dtype=dtype, device=device).uniform_(-bound, bound, generator=generator)
        self.replace_factors(lora_A, torch.zeros(out_features, rank, dtype=dtype, device=device))

    @property
    def rank(self) -> int:
        """Current rank r."""
        return self.lora_A.shape[0]

    @property
    def cost_per_rank(self) -> int:
        """Parameters per unit of rank: m + n."""
        return self.lora_A.shape[1] + self.lora_B.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, n)`` to ``(…, m)``; computed in the dtype of the factors."""
        dropped = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        z = F.linear(dropped, self.lora_A)
        if self.observer is not None:
            self.observer(z)
        return F.linear(z, self.lora_B) * self.scaling

    def plain_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return (A, B) unless dropout acts or an observer wants to see z."""
        if self.observer is not None or (self.training and self.dropout > 0):
            return None
        return self.lora_A, self.lora_B

    def delta_weight(self) -> Tensor:
        """Return s · B A, ``(m, n)``, computed in at least float32."""
        a, b = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (self.lora_A, self.lora_B))
        return self.scaling * (b @ a)

    def grow(self, rows: Tensor) -> None:
        """Append ``rows`` ``(k, n)`` to A and k zero columns to B: ΔW is unchanged, ∂L/∂B of the new columns is not 0.

        Raises:
            ValueError: if the rows do not fit the layer, or the new rank would exceed min(m, n).
        """
        m, n = self.lora_B.shape[0], self.lora_A.shape[1]
        if rows.ndim != 2 or rows.shape[1] != n:
            raise ValueError(f"rows must have shape (k, {n}), got {tuple(rows.shape)}")
        if self.rank + len(rows) > min(m, n):
            raise ValueError(f"rank must be in [0, min({m}, {n})], got {self.rank} + {len(rows)}")
        new_columns = self.lora_B.new_zeros(m, len(rows))
        self.replace_factors(
            torch.cat([self.lora_A.detach(), rows.to(self.lora_A)]), torch.cat([self.lora_B.detach(), new_columns], 1)
        )

    def shrink(self, keep: Sequence[int]) -> None:
        """Keep the rank slices ``keep``; ΔW loses exactly the products of the others.

        Raises:
            ValueError: if an index is out of range or given twice.
        """
        if len(set(keep)) != len(keep) or not all(0 <= index < self.rank for index in keep):
            raise ValueError(f"keep must hold distinct indices in [0, {self.rank}), got {list(keep)}")
        index = torch.tensor(list(keep), dtype=torch.long, device=self.lora_A.device)
        self.replace_factors(self.lora_A.detach()[index], self.lora_B.detach()[:, index])

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Install new factors of any common rank as new Parameters; ``requires_grad`` is carried over.

        An optimiser that holds the old Parameters must be told: that is the caller's part.
        """
        trainable = self.lora_A.requires_grad if "lora_A" in self._parameters else True
        self.lora_A = nn.Parameter(lora_A.detach().contiguous(), requires_grad=trainable)
        self.lora_B = nn.Parameter(lora_B.detach().contiguous(), requires_grad=trainable)

    def extra_repr(self) -> str:
        """Show what defines the adapter in ``print(model)``."""
        m, n = self.lora_B.shape[0], self.lora_A.shape[1]
        return (
            f"in_features={n}, out_features={m}, rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"
        )
