"""Tiny blocks of torch alone, random adapters on any model, and what the two should give."""

import copy
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn

from flowra_compose import AdapterState, LowRankUpdate
from flowra_compose.fusion import Gates

LEVELS = ("layer", "step", "module")
TARGETS: dict[str, tuple[tuple[str, ...], ...]] = {  # of the first, second and third adapter: they overlap in part
    "llama": (("q_proj", "v_proj", "up_proj"), ("q_proj", "o_proj", "down_proj"), ("q_proj", "gate_proj")),
    "gpt2": (("c_attn", "c_fc"), ("c_attn", "c_proj"), ("c_fc",)),
    "opt": (("q_proj", "fc1"), ("v_proj", "fc2"), ("fc1",)),
    "qwen2_moe": (("q_proj", "shared_expert.up_proj"), ("o_proj", "shared_expert.down_proj"), ("q_proj",)),
    "bert": (("query", "value"), ("query", "output.dense"), ("key",)),
    "stack": (("up", "down"), ("up", "skip"), ("skip",)),
}
RANKS = (4, 2, 1)
NAMES = ("language", "task", "style")


class Block(nn.Module):
    """``up``, ``down`` and a ``skip`` on a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.skip = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(…, width)`` to itself."""
        result: Tensor = hidden + self.down(torch.tanh(self.up(hidden))) + self.skip(hidden)
        return result


class Stack(nn.Module):
    """Repeated blocks and a ``head``; its ``config`` says the width. Exact in float64, unlike RMSNorm's of Llama."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(batch, positions, width)`` to ``(batch, positions, 3)``."""
        for block in self.blocks:
            hidden = block(hidden)
        result: Tensor = self.head(hidden)
        return result


def stack(*, width: int = 8, layers: int = 3, dtype: torch.dtype = torch.float64) -> Stack:
    """Blocks with weights of seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Stack(width, layers).to(dtype).eval()


def adapter(model: nn.Module, targets: Iterable[str], rank: int, *, seed: int = 0, size: float = 0.3) -> AdapterState:
    """Random updates, in the model's dtype, of the modules whose names end so."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, module in model.named_modules():
        if any(name.endswith(f".{target}") for target in targets) and hasattr(module, "weight"):
            m, n = matrix(module).shape
            a = torch.randn(rank, n, generator=generator, dtype=torch.float64)
            b = torch.randn(m, rank, generator=generator, dtype=torch.float64)
            dtype = matrix(module).dtype
            updates[name] = LowRankUpdate((size * a).to(dtype), (size * b).to(dtype), 1.5)
    return AdapterState(updates=updates)


def adapters_of(model: nn.Module, kind: str, adapters: int = 2) -> dict[str, AdapterState]:
    """Adapters of ranks 4, 2 and 1 with targets of their own, in part shared."""
    targets = TARGETS.get(kind, TARGETS["llama"])
    return {NAMES[index]: adapter(model, targets[index], RANKS[index], seed=index) for index in range(adapters)}


def randomised(gates: Gates, *, seed: int = 7, size: float = 0.5) -> Gates:
    """Make gates that weigh every position in another way."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in gates.parameters():
            each.add_(size * torch.randn(each.shape, generator=generator))
    return gates


def constant(gates: Gates, weights: Iterable[float]) -> Gates:
    """Make gates, float64 now, that give the same weights everywhere."""
    with torch.no_grad():
        for gate in gates.double():
            gate.weight.zero_()
            gate.bias.copy_(torch.tensor(list(weights), dtype=torch.float64) - 1 / gates.adapters)
    return gates


def merged(model: nn.Module, adapters: Mapping[str, AdapterState], weights: Iterable[float]) -> nn.Module:
    """Copy a model with Σ wᵢ ΔWᵢ added to its weights."""
    copied = copy.deepcopy(model)
    modules = dict(copied.named_modules())
    with torch.no_grad():
        for one, weight in zip(adapters.values(), weights, strict=True):
            for name, update in one.updates.items():
                held = matrix(modules[name])
                held.add_((weight * update.delta_weight()).to(held.dtype))
    return copied


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), a view."""
    weight = cast("Tensor", module.weight)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def states(
    *, size: int = 2, length: int = 5, width: int = 8, seed: int = 1, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Hidden states ``(size, length, width)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, length, width, generator=generator, dtype=torch.float64).to(dtype)
