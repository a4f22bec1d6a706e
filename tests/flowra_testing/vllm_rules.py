"""A reader that follows vLLM's rules for LoRA files, as its sources state them; vLLM itself needs no part in it.

What makes it a second judge beside peft: it knows one rank and one alpha for the whole adapter and ignores patterns,
takes tensor names literally, and refuses what it cannot serve.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
PREFIX = "base_model.model."


@dataclass(frozen=True)
class ServedUpdate:
    """What vLLM adds to one module's weight: scaling · lora_b @ lora_a."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    embeds: bool = False
    """Whether the tensors' names are those of an embedding."""


def read_as_vllm(folder: Path, *, modules: Collection[str], max_lora_rank: int) -> dict[str, ServedUpdate]:
    """Read an adapter folder.

    Args:
        folder: PEFT's two files.
        modules: last parts of the names of the layers that the server can adapt.
        max_lora_rank: the server's setting.

    Returns:
        Module name to update.

    Raises:
        ValueError: if vLLM would refuse the adapter.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    missing = {"r", "lora_alpha", "target_modules"} - config.keys()
    if missing:
        raise ValueError(f"missing configuration fields: {missing}")
    if config.get("modules_to_save"):
        raise ValueError("only modules_to_save = None is supported")
    if config.get("use_dora"):
        raise ValueError("DoRA is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError("adapter bias is not supported")
    if max_lora_rank not in MAX_LORA_RANKS:
        raise ValueError(f"max_lora_rank must be one of {MAX_LORA_RANKS}")
    rank = config["r"]
    if rank > max_lora_rank:
        raise ValueError(f"rank {rank} is greater than max_lora_rank {max_lora_rank}")
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    halves: dict[str, dict[str, Tensor]] = {}
    embedding = set()
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            module, half, embeds = _parse(key)
            embedding |= {module} if embeds else set()
            if module.rsplit(".", 1)[-1] not in modules:
                raise ValueError(f"unexpected module {module}")
            tensor = file.get_tensor(key)
            if tensor.ndim != 2:
                raise ValueError(f"{key} does not fit the buffers")
            halves.setdefault(module, {})[half] = tensor
    for module, pair in halves.items():
        if pair["lora_A"].shape[0] > max_lora_rank:
            raise ValueError(f"rank of {module} does not fit the buffers")
    return {
        name: ServedUpdate(pair["lora_A"], pair["lora_B"], scaling, name in embedding) for name, pair in halves.items()
    }


def _parse(key: str) -> tuple[str, str, bool]:
    """Split a tensor's name into module, half, and whether it is an embedding's.

    A key without the prefix keeps its own first parts and so means another module.
    """
    parts = key.removeprefix(PREFIX).split(".")
    if parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        return ".".join(parts[:-1]), f"lora_{parts[-1][-1]}", True
    if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
        raise ValueError(f"{key} is unsupported LoRA weight")
    return ".".join(parts[:-2]), parts[-2], False


def serve(model: nn.Module, updates: dict[str, ServedUpdate]) -> int:
    """Add the updates to the weights of a base, and return how many found their module; others have no effect."""
    found = 0
    for name, module in model.named_modules():
        update = updates.get(name)
        if update is not None and isinstance(module, nn.Embedding if update.embeds else nn.Linear):
            product = update.scaling * (update.lora_b @ update.lora_a)
            module.weight.data += product.T if update.embeds else product  # type: ignore[operator, union-attr]
            found += 1
    return found
