"""How a layer uses its weight: the map (x, W) ↦ y, linear in each, with the layer's own geometry.

An adapter never touches the layer it adapts. It gets the layer's operator, a value, and says what it wants in terms of
it: LoRA is ``pointwise(apply(x, A), B)`` on a linear layer as on a strided, dilated, grouped or transposed convolution
and on an embedding. Weights are written in one *standard* layout, ``(m, n/g, *kernel)``: output channels, input
channels of one of g groups, kernel. The operator knows how the layer stores them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from flowra_adapters.layers import is_conv1d, is_falcon_linear
from flowra_adapters.quantised import is_quantised_linear

__all__ = [
    "ConvOperator",
    "EmbeddingOperator",
    "LinearOperator",
    "Operator",
    "ParameterOperator",
    "operator_of",
]

PLAIN: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
"""By the number of spatial axes, from 1."""


@dataclass(frozen=True)
class Operator(ABC):
    """A family of maps y = op(x, W); bias excluded."""

    shape: tuple[int, ...]
    """Of the weight in the standard layout: ``(m, n/g, *kernel)``."""
    groups: int = 1
    """g: output block j sees input block j only."""

    @property
    def in_size(self) -> int:
        """N · ∏k, the length of a direction on the input side, over all groups."""
        return self.groups * math.prod(self.shape[1:])

    @property
    def out_size(self) -> int:
        """Length m of a direction on the output side."""
        return self.shape[0]

    @property
    def max_rank(self) -> int:
        """Largest rank that an update of this weight can have; with groups, in each of them."""
        return min(self.out_size // self.groups, self.in_size // self.groups)

    @property
    def channel_dim(self) -> int:
        """Where the output channels lie in y, counted from the end."""
        return -1

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Use another weight ``(m', n/g, *kernel)``, with any m' that g divides, as the layer would use its own.

        Floating inputs are cast to the weight's dtype.
        """

    @abstractmethod
    def pointwise(self, z: Tensor, weight: Tensor) -> Tensor:
        """Mix the channels of z at each position: ``(m, r/g)`` maps r channels to m, group by group."""

    def to_stored(self, weight: Tensor) -> Tensor:
        """Turn the standard layout into the layer's own."""
        return weight

    def to_standard(self, weight: Tensor) -> Tensor:
        """Turn the layer's own layout into the standard one."""
        return weight

    def down(self, x: Tensor, lora_A: Tensor) -> Tensor:
        """Apply A ``(r, n·∏k)``, one row for each direction: r channels, or g · r of them, group by group."""
        return self.apply(x, self.standard_A(lora_A))

    def standard_A(self, lora_A: Tensor) -> Tensor:
        """Write A ``(r, n·∏k)`` as a weight ``(g · r, n/g, *kernel)``."""
        if self.groups == 1:
            return lora_A.view(len(lora_A), *self.shape[1:])
        by_group = lora_A.view(len(lora_A), self.groups, self.in_size // self.groups).transpose(0, 1)
        return by_group.reshape(self.groups * len(lora_A), *self.shape[1:])

    def product(self, lora_B: Tensor, lora_A: Tensor) -> Tensor:
        """Write B A as a weight in the standard layout: block j of the rows of B times block j of the columns of A."""
        if self.groups == 1:
            return (lora_B @ lora_A).view(self.shape)
        blocks_A = lora_A.view(len(lora_A), self.groups, self.in_size // self.groups).transpose(0, 1)
        blocks_B = lora_B.view(self.groups, self.out_size // self.groups, lora_B.shape[1])
        return (blocks_B @ blocks_A).reshape(self.shape)


@dataclass(frozen=True)
class LinearOperator(Operator):
    """y = x Wᵀ."""

    transposed: bool = False
    """Whether the layer stores W as ``(n, m)``, like the ``Conv1D`` of ``transformers``."""

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Map ``(…, n)`` to ``(…, m')``."""
        return F.linear(x.to(weight.dtype), weight)

    def pointwise(self, z: Tensor, weight: Tensor) -> Tensor:
        """Map ``(…, r)`` to ``(…, m)``."""
        return F.linear(z, weight)

    def to_stored(self, weight: Tensor) -> Tensor:
        """Transpose where the layer does; a view."""
        return weight.T if self.transposed else weight

    def to_standard(self, weight: Tensor) -> Tensor:
        """Transpose where the layer does; a view."""
        return weight.T if self.transposed else weight


@dataclass(frozen=True)
class EmbeddingOperator(Operator):
    """y = W[:, ids]: a linear map of one-hot rows, whose weight the layer stores as ``(V, d)``."""

    padding_idx: int | None = None

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Map ids ``(…)`` to ``(…, m')``."""
        return F.embedding(x, weight.T, self.padding_idx)  # dense also where the layer is sparse: A is small

    def pointwise(self, z: Tensor, weight: Tensor) -> Tensor:
        """Map ``(…, r)`` to ``(…, d)``."""
        return F.linear(z, weight)

    def to_stored(self, weight: Tensor) -> Tensor:
        """Turn ``(d, V)`` into ``(V, d)``; a view."""
        return weight.T

    def to_standard(self, weight: Tensor) -> Tensor:
        """Turn ``(V, d)`` into ``(d, V)``; a view."""
        return weight.T


@dataclass(frozen=True)
class ConvOperator(Operator):
    """Convolution in 1, 2 or 3 dimensions, or its transpose, with the layer's stride, padding, dilation and groups."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    pads: tuple[int, ...] = ()
    """What ``padding_mode`` other than zeros adds at each end, in the order of ``torch.nn.functional.pad``."""
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def dimensions(self) -> int:
        """D, the number of spatial axes."""
        return len(self.shape) - 2

    @property
    def channel_dim(self) -> int:
        """Before the spatial axes."""
        return -1 - self.dimensions

    def pad(self, x: Tensor) -> Tensor:
        """Pad the input where the mode is not zeros; zeros are left to the convolution."""
        return x if self.padding_mode == "zeros" else F.pad(x, self.pads, mode=self.padding_mode)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Map ``(…, n, *positions)`` to ``(…, m', *positions)``."""
        return self.convolve(x.to(weight.dtype), weight, groups=self.groups)

    def convolve(self, x: Tensor, weight: Tensor, *, groups: int) -> Tensor:
        """Convolve as the layer does, but in another number of groups; ``weight`` is ``(m', n'/groups, *kernel)``."""
        if self.transposed:
            stored = _swap_channels(weight, groups)
            return TRANSPOSED[self.dimensions - 1](
                x, stored, None, self.stride, self.padding, self.output_padding, groups, self.dilation
            )
        padding = self.padding if self.padding_mode == "zeros" else 0
        return PLAIN[self.dimensions - 1](self.pad(x), weight, None, self.stride, padding, self.dilation, groups)

    def pointwise(self, z: Tensor, weight: Tensor) -> Tensor:
        """Map ``(…, g · r, *positions)`` to ``(…, m, *positions)``."""
        return PLAIN[self.dimensions - 1](z, weight.view(*weight.shape, *(1,) * self.dimensions), groups=self.groups)

    def to_stored(self, weight: Tensor) -> Tensor:
        """Turn ``(m, n/g, *k)`` into ``(n, m/g, *k)`` where the layer is transposed."""
        return _swap_channels(weight, self.groups) if self.transposed else weight

    def to_standard(self, weight: Tensor) -> Tensor:
        """Turn ``(n, m/g, *k)`` into ``(m, n/g, *k)`` where the layer is transposed."""
        return _swap_channels(weight, self.groups) if self.transposed else weight


@dataclass(frozen=True)
class ParameterOperator(Operator):
    """A parameter whose use is not known; an update of it is applied by putting it into the parameter's place."""

    @property
    def out_size(self) -> int:
        """Length of the first axis."""
        return self.shape[0]

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Refuse: nothing is known about it."""
        raise NotImplementedError("a parameter's use is not known: materialise the update")

    def pointwise(self, z: Tensor, weight: Tensor) -> Tensor:
        """Refuse: nothing is known about it."""
        raise NotImplementedError("a parameter's use is not known: materialise the update")


def operator_of(layer: nn.Module) -> Operator | None:
    """Describe how a layer uses its weight.

    Returns:
        The operator, or None where the layer is of no known type or its class computes something else with its weight
        (a standardised convolution, a scaled embedding).
    """
    weight = layer._parameters.get("weight")
    kind = type(layer)
    if weight is None or isinstance(weight, nn.UninitializedParameter):
        return None
    plain = kind.forward is nn.Linear.forward or is_falcon_linear(layer)
    if isinstance(layer, nn.Linear) and (plain or is_quantised_linear(layer)):
        return LinearOperator((layer.out_features, layer.in_features))
    if is_conv1d(layer):
        return LinearOperator((weight.shape[1], weight.shape[0]), transposed=True)
    if isinstance(layer, nn.Embedding) and kind.forward is nn.Embedding.forward and layer.max_norm is None:
        shape = (layer.embedding_dim, layer.num_embeddings)
        return EmbeddingOperator(shape, padding_idx=layer.padding_idx)
    if isinstance(layer, CONVOLUTIONS):
        return _conv_operator(layer)
    return None


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _conv_operator(layer: nn.modules.conv._ConvNd) -> ConvOperator | None:
    own = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind))
    kind = type(layer)
    if kind.forward is not own.forward or getattr(kind, "_conv_forward", None) is not getattr(
        own, "_conv_forward", None
    ):
        return None
    assert isinstance(layer.weight, Tensor)
    kernel = tuple(layer.weight.shape[2:])
    return ConvOperator(
        (layer.out_channels, layer.in_channels // layer.groups, *kernel),
        layer.groups,
        stride=tuple(layer.stride),
        padding=layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
        dilation=tuple(layer.dilation),
        padding_mode=layer.padding_mode,
        pads=tuple(layer._reversed_padding_repeated_twice),
        transposed=layer.transposed,
        output_padding=tuple(layer.output_padding),
    )


def _swap_channels(weight: Tensor, groups: int) -> Tensor:
    """Turn ``(a, b/g, *k)`` into ``(b, a/g, *k)``, block by block; its own inverse."""
    blocks = weight.view(groups, len(weight) // groups, *weight.shape[1:])
    return blocks.transpose(1, 2).reshape(-1, len(weight) // groups, *weight.shape[2:])
