"""Tiny blocks whose forward takes one tensor and gives one: attention, mixtures of experts, norms, odd layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")


class SelfAttention(nn.Module):
    """``attention`` of ``(batch, length, 8)`` with itself; with ``key_size`` keys are the first of its channels."""

    def __init__(self, *, batch_first: bool = True, key_size: int = 8, need_weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=key_size, vdim=key_size)
        self.key_size = key_size
        self.need_weights = need_weights
        nn.init.normal_(self.attention.in_proj_bias, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, length, 8)`` to the same shape; without ``batch_first`` the length comes first."""
        keys = x if self.key_size == x.shape[-1] else x[..., : self.key_size]
        output: Tensor = self.attention(x, keys, keys, need_weights=self.need_weights)[0]
        return output


class Mixture(nn.Module):
    """A mixture of experts of ``transformers``: ``block.experts`` holds a stack of matrices, one for each of four."""

    def __init__(self, kind: str, *, backend: str = "eager") -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 8,
            "intermediate_size": 12,
            "moe_intermediate_size": 12,
            "num_experts": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        }
        made: dict[str, Any] = {
            "mixtral": (MixtralConfig, MixtralSparseMoeBlock),
            "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeSparseMoeBlock),
            "olmoe": (OlmoeConfig, OlmoeSparseMoeBlock),
            "gpt_oss": (GptOssConfig, GptOssMLP),
        }
        config_type, block_type = made[kind]
        config = config_type(**sizes)
        config._experts_implementation = backend
        self.block = block_type(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, length, 8)`` to the same shape."""
        output: Tensor | tuple[Tensor, ...] = self.block(x)
        return output if isinstance(output, Tensor) else output[0]


class ExpertList(nn.Module):
    """Four linear ``experts``; the signs of a token's first two channels say which one it goes to, never the last."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 6) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(tokens, 8)`` to ``(tokens, 6)``; an expert without tokens is called with none."""
        chosen = ((x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()).clamp(max=2)
        output = x.new_zeros(len(x), 6)
        for index, expert in enumerate(self.experts):
            output = output.index_add(0, (chosen == index).nonzero()[:, 0], expert(x[chosen == index]))
        return output


def _standardised(weight: Tensor) -> Tensor:
    return F.layer_norm(weight, weight.shape[1:])


class StandardisedConv1d(nn.Conv1d):
    """Normalises each filter before it is used (Qiao et al. 2019, arXiv:1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, n, *positions)`` to ``(batch, m, *positions)``."""
        return F.conv1d(x, _standardised(self.weight), self.bias, padding=self.padding, groups=self.groups)


class StandardisedConv2d(nn.Conv2d):
    """Normalises each filter before it is used."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, n, *positions)`` to ``(batch, m, *positions)``."""
        return F.conv2d(x, _standardised(self.weight), self.bias, padding=self.padding, groups=self.groups)


def used_norm(norm: nn.Module) -> nn.Module:
    """Fill the gains, shifts and running statistics of a norm with other values than it is born with."""
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape) * 0.3
            tensor.copy_(values.abs() + 0.5 if name in ("weight", "running_var") else values)
    return norm
