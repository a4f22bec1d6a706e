"""The table of adapter methods: a new method joins the whole battery of laws by adding one row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flowra_adapters import sites
from flowra_testing.tiny_models import seeded

ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class LayerType:
    """A small layer that a method can adapt, and inputs that fit it."""

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    rank: int = 3
    site: str = ""
    """Where in the layer the adapter goes: a path under it, as sites are named; empty for its own weight."""
    ids: int | None = None
    """Size of the vocabulary, where the inputs are ids."""

    @property
    def name(self) -> str:
        """Of the site, in a model whose attribute ``layer`` is this layer."""
        return f"layer{self.site if self.site.startswith(':') or not self.site else '.' + self.site}"

    def layer(self, dtype: torch.dtype, *, seed: int = 0) -> nn.Module:
        """Build the layer in this dtype."""
        with seeded(seed):
            return self.build().to(dtype)

    def inputs(self, dtype: torch.dtype, *, seed: int = 1) -> Tensor:
        """Draw a batch; the same values, rounded, in every dtype."""
        generator = torch.Generator().manual_seed(seed)
        if self.ids is not None:
            return torch.randint(self.ids, self.input_shape, generator=generator)
        return torch.randn(self.input_shape, generator=generator, dtype=torch.float64).to(dtype)

    def rows(self, count: int, *, seed: int = 2) -> Tensor:
        """Draw directions to grow by."""
        size = sites(nn.ModuleDict({"layer": self.build()}))[self.name].operator.in_size
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, size, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    name: str
    key: str
    """Key of :data:`flowra_adapters.METHODS`."""
    layer_types: Mapping[str, LayerType]
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    exact_at_birth: bool = True
    """Whether attaching changes no bit of the output."""
    takes_alpha: bool = False
    """Whether its scaling comes from α."""
    golden: tuple[str, str]
    """File in ``tests/golden`` and the case or key in it that holds its numbers; a test reads them."""
    scaled: bool = True
    """Whether its update has a scaling."""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """Law that the method cannot obey to the reason."""


LINEAR: Mapping[str, LayerType] = MappingProxyType({
    "linear": LayerType(build=lambda: nn.Linear(8, 6), input_shape=(5, 8)),
    "linear_without_bias": LayerType(build=lambda: nn.Linear(6, 9, bias=False), input_shape=(5, 6)),
    "linear_on_sequences": LayerType(build=lambda: nn.Linear(16, 16), input_shape=(3, 4, 16), rank=6),
    "conv1d_of_transformers": LayerType(build=lambda: Conv1D(9, 6), input_shape=(3, 4, 6)),
    "linear_to_one_output": LayerType(build=lambda: nn.Linear(8, 1), input_shape=(4, 8), rank=1),
})
CONVOLUTIONS: Mapping[str, LayerType] = MappingProxyType({
    "conv1d": LayerType(build=lambda: nn.Conv1d(4, 6, 3, padding=1), input_shape=(2, 4, 9)),
    "conv2d": LayerType(build=lambda: nn.Conv2d(3, 5, 3, padding=1), input_shape=(2, 3, 6, 5)),
    "conv2d_unbatched": LayerType(build=lambda: nn.Conv2d(3, 5, 3), input_shape=(3, 6, 5)),
    "conv2d_pointwise": LayerType(build=lambda: nn.Conv2d(6, 5, 1, bias=False), input_shape=(2, 6, 3, 4)),
    "conv2d_strided_dilated": LayerType(
        build=lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)), input_shape=(2, 3, 9, 7)
    ),
    "conv2d_same": LayerType(build=lambda: nn.Conv2d(3, 5, 3, padding="same", dilation=2), input_shape=(2, 3, 6, 5)),
    **{
        f"conv2d_{mode}": LayerType(
            build=partial(nn.Conv2d, 3, 5, 3, padding=(2, 1), padding_mode=mode), input_shape=(2, 3, 6, 5)
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "conv2d_grouped": LayerType(build=lambda: nn.Conv2d(8, 6, 3, groups=2, padding=1), input_shape=(2, 8, 5, 4)),
    "conv2d_depthwise": LayerType(
        build=lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), input_shape=(2, 6, 5, 4), rank=1
    ),
    "conv3d": LayerType(build=lambda: nn.Conv3d(3, 4, 2), input_shape=(2, 3, 3, 4, 3)),
    "conv_transpose1d": LayerType(
        build=lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), input_shape=(2, 4, 5)
    ),
    "conv_transpose2d_grouped": LayerType(
        build=lambda: nn.ConvTranspose2d(8, 6, 3, groups=2, stride=2, padding=1), input_shape=(2, 8, 4, 3)
    ),
    "conv_transpose3d": LayerType(build=lambda: nn.ConvTranspose3d(3, 4, 2, dilation=2), input_shape=(2, 3, 3, 2, 3)),
})
EMBEDDINGS: Mapping[str, LayerType] = MappingProxyType({
    "embedding": LayerType(build=lambda: nn.Embedding(7, 6), input_shape=(3, 5), ids=7),
    "embedding_with_padding": LayerType(build=lambda: nn.Embedding(7, 6, padding_idx=1), input_shape=(3, 5), ids=7),
})
EVERYWHERE: Mapping[str, LayerType] = MappingProxyType({**LINEAR, **CONVOLUTIONS, **EMBEDDINGS})

METHODS: tuple[Method, ...] = (
    Method(name="lora", key="lora", layer_types=EVERYWHERE, golden=("lora_family", "lora")),
    Method(name="rslora", key="rslora", layer_types=EVERYWHERE, golden=("lora_family", "rslora"), takes_alpha=True),
)
