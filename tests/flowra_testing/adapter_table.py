"""The table of adapter methods: a new method joins the whole battery of laws by adding one row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flowra_testing.tiny_models import seeded

ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class LayerType:
    """A small layer that a method can adapt, and inputs that fit it."""

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    row_size: int
    """Size n of a direction given to ``grow``."""
    rank: int = 3

    def layer(self, dtype: torch.dtype, *, seed: int = 0) -> nn.Module:
        """Build the layer in this dtype."""
        with seeded(seed):
            return self.build().to(dtype)

    def inputs(self, dtype: torch.dtype, *, seed: int = 1) -> Tensor:
        """Draw a batch; the same values, rounded, in every dtype."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.input_shape, generator=generator, dtype=torch.float64).to(dtype)

    def rows(self, count: int, *, seed: int = 2) -> Tensor:
        """Draw directions to grow by."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, self.row_size, generator=generator, dtype=torch.float64)


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
    golden_case: str
    """Name of its case in ``golden/lora_family.json``."""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """Law that the method cannot obey to the reason."""


LINEAR: Mapping[str, LayerType] = MappingProxyType({
    "linear": LayerType(build=lambda: nn.Linear(8, 6), input_shape=(5, 8), row_size=8),
    "linear_without_bias": LayerType(build=lambda: nn.Linear(6, 9, bias=False), input_shape=(5, 6), row_size=6),
    "linear_on_sequences": LayerType(build=lambda: nn.Linear(16, 16), input_shape=(3, 4, 16), row_size=16, rank=6),
    "conv1d_of_transformers": LayerType(build=lambda: Conv1D(9, 6), input_shape=(3, 4, 6), row_size=6),
    "linear_to_one_output": LayerType(build=lambda: nn.Linear(8, 1), input_shape=(4, 8), row_size=8, rank=1),
})

METHODS: tuple[Method, ...] = (
    Method(name="lora", key="lora", layer_types=LINEAR, golden_case="lora"),
    Method(name="rslora", key="rslora", layer_types=LINEAR, golden_case="rslora", takes_alpha=True),
)
