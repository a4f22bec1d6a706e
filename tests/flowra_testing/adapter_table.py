"""The table of adapter methods: a new method joins the whole battery of laws by adding one row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from flowra_adapters import AdapterMethod, sites
from flowra_testing.tiny_blocks import (
    ExpertList,
    Mixture,
    SelfAttention,
    StandardisedConv1d,
    StandardisedConv2d,
    used_norm,
)
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
    affine: bool = True
    """Whether the output is an affine function of what is adapted, so that updates of the output add up."""
    seed: int = 0
    """Of the layer; one that keeps tokens away from the border between two experts."""
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    """Those that it computes in."""

    @property
    def name(self) -> str:
        """Of the site, in a model whose attribute ``layer`` is this layer."""
        return f"layer{self.site if self.site.startswith(':') or not self.site else '.' + self.site}"

    def layer(self, dtype: torch.dtype) -> nn.Module:
        """Build the layer in this dtype, in evaluation mode."""
        with seeded(self.seed):
            return self.build().to(dtype).eval()

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
    own: AdapterMethod | None = None
    """The method itself, where it is none of the package's."""

    @property
    def made_by(self) -> str | AdapterMethod:
        """What ``attach`` is given."""
        return self.own or self.key


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


def _attention(site: str, **options: Any) -> LayerType:  # noqa: ANN401
    build = partial(SelfAttention, **options)
    return LayerType(build=build, input_shape=(2, 5, 8), site=f"attention.{site}", affine=False)


def _mixture(kind: str, site: str) -> LayerType:
    build = partial(Mixture, kind)
    return LayerType(build=build, input_shape=(2, 5, 8), site=f"block.experts.{site}", affine=False, seed=7)


BLOCKS: Mapping[str, LayerType] = MappingProxyType({
    "attention": _attention("in_proj_weight"),
    "attention_queries": _attention("in_proj_weight:q"),
    "attention_keys_length_first": _attention("in_proj_weight:k", batch_first=False),
    "attention_values_with_weights": _attention("in_proj_weight:v", need_weights=True),
    "attention_output": _attention("out_proj"),
    "attention_separate_queries": _attention("q_proj_weight", key_size=6),
    "attention_separate_keys": _attention("k_proj_weight", key_size=6),
    "attention_separate_values": _attention("v_proj_weight", key_size=6, batch_first=False),
    "mixtral_expert": _mixture("mixtral", "gate_up_proj:3"),
    "qwen3_moe_expert": _mixture("qwen3_moe", "down_proj:1"),
    "olmoe_expert": _mixture("olmoe", "gate_up_proj:2"),
    "gpt_oss_expert": _mixture("gpt_oss", "down_proj:1"),
    "expert_of_a_list": LayerType(build=ExpertList, input_shape=(9, 8), site="experts.1"),
    "embedding_bag": LayerType(build=lambda: nn.EmbeddingBag(7, 6, mode="mean"), input_shape=(3, 5), ids=7),
    "standardised_conv1d": LayerType(
        build=lambda: StandardisedConv1d(4, 6, 3, padding=1), input_shape=(2, 4, 9), affine=False
    ),
    "standardised_conv2d_grouped": LayerType(
        build=lambda: StandardisedConv2d(8, 6, 3, groups=2), input_shape=(2, 8, 5, 4), affine=False
    ),
})


def _norm(build: Callable[[], nn.Module], *shape: int, site: str = "") -> LayerType:
    return LayerType(build=lambda: used_norm(build()), input_shape=shape, rank=1, site=site)


NORMS: Mapping[str, LayerType] = MappingProxyType({
    "layer_norm_gain": _norm(lambda: nn.LayerNorm(6), 3, 4, 6),
    "layer_norm_shift": _norm(lambda: nn.LayerNorm(6), 3, 4, 6, site="bias"),
    "layer_norm_of_two_axes": _norm(lambda: nn.LayerNorm((4, 6)), 3, 4, 6),
    "rms_norm": _norm(lambda: nn.RMSNorm(6), 3, 4, 6),
    "rms_norm_of_llama": _norm(lambda: LlamaRMSNorm(6), 3, 4, 6),
    "rms_norm_of_gemma": replace(_norm(lambda: GemmaRMSNorm(6), 3, 4, 6), dtypes=(torch.float32, torch.bfloat16)),
    "layer_norm_of_t5": _norm(lambda: T5LayerNorm(6), 3, 4, 6),
    "group_norm": _norm(lambda: nn.GroupNorm(2, 6), 3, 6, 4),
    "batch_norm1d": _norm(lambda: nn.BatchNorm1d(6), 5, 6),
    "batch_norm2d_gain": _norm(lambda: nn.BatchNorm2d(4), 2, 4, 3, 5),
    "batch_norm2d_shift": _norm(lambda: nn.BatchNorm2d(4), 2, 4, 3, 5, site="bias"),
    "batch_norm3d": _norm(lambda: nn.BatchNorm3d(4), 2, 4, 2, 3, 2),
    "instance_norm_with_statistics": _norm(
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), 2, 4, 7
    ),
})
BIASES: Mapping[str, LayerType] = MappingProxyType({
    "bias_of_linear": LayerType(build=lambda: nn.Linear(8, 6), input_shape=(5, 8), rank=1, site="bias"),
    "bias_of_conv1d_of_transformers": LayerType(build=lambda: Conv1D(9, 6), input_shape=(3, 6), rank=1, site="bias"),
    "bias_of_conv2d": LayerType(build=lambda: nn.Conv2d(3, 5, 3), input_shape=(2, 3, 6, 5), rank=1, site="bias"),
    "bias_of_conv_transpose1d": LayerType(
        build=lambda: nn.ConvTranspose1d(4, 6, 3), input_shape=(2, 4, 5), rank=1, site="bias"
    ),
    "bias_of_layer_norm": _norm(lambda: nn.LayerNorm(6), 3, 4, 6, site="bias"),
    "bias_of_attention": replace(_attention("in_proj_bias"), rank=1),
    "bias_of_attention_output": replace(_attention("out_proj.bias"), rank=1),
    "biases_of_experts": replace(_mixture("gpt_oss", "gate_up_proj_bias"), rank=1),
})

LOW_RANK: Mapping[str, LayerType] = MappingProxyType({**EVERYWHERE, **BLOCKS})

METHODS: tuple[Method, ...] = (
    Method(name="lora", key="lora", layer_types=LOW_RANK, golden=("lora_family", "lora")),
    Method(name="rslora", key="rslora", layer_types=LOW_RANK, golden=("lora_family", "rslora"), takes_alpha=True),
    Method(
        name="dora",
        key="dora",
        layer_types=LOW_RANK,
        golden=("lora_family", "dora"),
        exceptions={
            "shrink_loses_exactly_the_dropped_product": "what is left is stretched to the magnitude again: only the"
            " direction W + s B A loses the product, which tests/adapters/test_dora.py checks"
        },
    ),
    Method(name="svd", key="svd", layer_types=LOW_RANK, golden=("svd_linear_forward", "W_merged")),
    Method(name="svd_masked", key="svd_masked", layer_types=LOW_RANK, golden=("svd_linear_forward", "W_merged")),
    Method(name="norm", key="norm", layer_types=NORMS, golden=("offsets", "norm"), scaled=False),
    Method(name="bitfit", key="bitfit", layer_types=BIASES, golden=("offsets", "bitfit"), scaled=False),
    Method(
        name="flora",
        key="flora",
        layer_types={**LOW_RANK, "stack_of_experts": _mixture("mixtral", "gate_up_proj")},
        golden=("flora_linear", "y_cr_mr"),
        exceptions={
            "shrink_loses_exactly_the_dropped_product": "the axes of a convolution meet in one core, so what two"
            " sets of slices make together is in neither; tests/adapters/test_tucker.py has the law that holds"
        },
    ),
    Method(
        name="polymorphic",
        key="polymorphic",
        layer_types=MappingProxyType({
            name: EVERYWHERE[name]
            for name in ("linear", "conv1d_of_transformers", "conv2d_pointwise", "embedding")  # LoRA, as matrices are
        }),
        golden=("lora_family", "lora"),
    ),
)

CORE = (
    *("linear", "conv1d_of_transformers", "conv2d_strided_dilated", "conv2d_grouped", "conv_transpose2d_grouped"),
    *("embedding", "attention_output", "layer_norm_gain", "batch_norm2d_gain", "bias_of_linear"),
)
"""Layer types that every run tries in every dtype; the others in float64, and in the rest by `nox -s laws`."""


def in_every_run(method: Method, kind: str, dtype: torch.dtype) -> bool:
    """Tell whether a case is part of every run. rsLoRA differs from LoRA in a number only."""
    return kind in CORE or (dtype == torch.float64 and method.key != "rslora")
