"""A trained offset of a parameter: norm tuning and BitFit.

Norm tuning trains the gains and shifts of normalisations (for language models Zhao et al. 2023, arXiv:2312.11420),
BitFit trains biases (Ben Zaken et al. 2022, arXiv:2106.10199). Both are p = p₀ + δ with δ₀ = 0, so one class serves
them, and a normalisation that multiplies by 1 + w (Gemma) needs no case of its own.
Deviation from the papers: δ is stored and not p, so that updates add up and can be taken out again; a head is trained
in full only if it is named.
"""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter, Base
from flowra_adapters.matching import match_modules
from flowra_adapters.operators import Operator

__all__ = ["ParameterOffset", "create_missing_biases"]


class ParameterOffset(Adapter):
    """An offset of every element of a parameter, zero at birth: one item, there or not.

    Args:
        operator: of the parameter.
        rank: 1, or 0 for an offset that may come later.
        scaling: 1; the update has no scale.
        dropout: 0; the update does not depend on the input.
        dtype: of the offset. Device: of the generator.
        generator: gives the device; nothing is drawn.

    Attributes:
        offset: δ ``(rank, *shape)``. Replaced by a new Parameter whenever the rank changes.

    Raises:
        ValueError: if rank, scaling or dropout is anything else.
    """

    offset: nn.Parameter

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
        if rank not in (0, 1):
            raise ValueError(f"rank must be 0 or 1 for an offset, which is there or not, got {rank}")
        if scaling != 1:
            raise ValueError(f"scaling must be 1 for an offset, got {scaling}")
        if dropout != 0:
            raise ValueError(f"dropout must be 0 for an offset, which has no input, got {dropout}")
        super().__init__(operator)
        self.replace_offset(torch.zeros(rank, *operator.shape, dtype=dtype, device=generator.device))

    @property
    def rank(self) -> int:
        """1 if there is an offset, else 0."""
        return len(self.offset)

    def cost(self, rank: int) -> int:
        """Count the elements of the parameter, once."""
        return rank * math.prod(self.operator.shape)

    def forward(self, x: Tensor, base: Base | None = None) -> Tensor:
        """Use the offset as the layer uses its weight; where that is not known, it is materialised instead."""
        return self.operator.apply(x, self.delta_weight())

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return δ in the parameter's shape, in at least float32."""
        return self.offset.to(torch.promote_types(self.offset.dtype, torch.float32)).sum(0)

    def grow(self, rows: Tensor) -> None:
        """Bring the offset in, at zero; the values of ``rows`` ``(1, ·)`` say nothing about it.

        Raises:
            ValueError: if the new rank would exceed 1.
        """
        if self.rank + len(rows) > 1:
            raise ValueError(f"rank must be in [0, 1], got {self.rank} + {len(rows)}")
        new = self.offset.new_zeros(len(rows), *self.operator.shape)
        self.replace_offset(torch.cat([self.offset.detach(), new]))

    def shrink(self, keep: Sequence[int]) -> None:
        """Keep the offset, ``[0]``, or drop it, ``[]``.

        Raises:
            ValueError: if there is no such item, or it is named twice.
        """
        if list(keep) not in ([], [0][: self.rank]):
            raise ValueError(f"keep must be distinct indices below the rank {self.rank}, got {list(keep)}")
        self.replace_offset(self.offset.detach()[: len(keep)])

    def replace_offset(self, offset: Tensor) -> None:
        """Install another δ ``(rank, *shape)`` as a new Parameter; ``requires_grad`` is carried over.

        An optimiser that holds the old Parameter must be told: that is the caller's part.
        """
        trainable = self.offset.requires_grad if "offset" in self._parameters else True
        self.offset = nn.Parameter(offset.detach().contiguous(), requires_grad=trainable)

    def extra_repr(self) -> str:
        """Show what defines the adapter in ``print(model)``."""
        return f"shape={self.operator.shape}, rank={self.rank}"


def create_missing_biases(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Give linear layers without a bias one that is zero, so that it can be trained and merged.

    The model's output stays what it was, up to rounding. Its state dict gains the biases: whoever loads an adapter of
    them, or the merged weights, must create them first.

    Args:
        model: changed in place.
        patterns: see :func:`match_modules`; layers that have a bias stay as they are.

    Returns:
        Names of the layers that have a new bias, in the model's own order.

    Raises:
        ValueError: if a pattern matches no linear layer.
        TypeError: if a weight is not floating point.
    """
    layers = {name: model.get_submodule(name) for name in match_modules(model, patterns)}
    missing = {name: layer for name, layer in layers.items() if layer._parameters.get("bias") is None}
    for name, layer in missing.items():
        weight = cast(Tensor, layer.weight)
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating point to get a bias beside it, got {weight.dtype} for {name!r}")
    for layer in missing.values():
        assert isinstance(layer, nn.Linear)
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features), requires_grad=False)
    return list(missing)
