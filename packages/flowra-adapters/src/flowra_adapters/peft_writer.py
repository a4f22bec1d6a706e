"""Write PEFT's two files: ``adapter_config.json`` and ``adapter_model.safetensors``.

Two forms (docs/formats/adapter.md). A *checkpoint* keeps the scaling s of each module (``alpha_pattern = s · r``) and
can be trained on. An *export* has unit scale everywhere: s is folded into B, every alpha equals its rank, and the
global ``r`` and ``lora_alpha`` are the largest rank, so that a reader which knows only the global values cannot
mis-scale it. In both, modules of rank 0 are left out.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowra_adapters.checkpoint import AdapterCheckpoint, checkpoint_of, own_copy
from flowra_adapters.whole_files import replacing

__all__ = ["CONFIG_NAME", "PREFIX", "TENSORS_NAME", "save_adapter", "write_checkpoint"]

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str = "default",
    modules_to_save: Iterable[str] = (),
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    unit_scale: bool = False,
) -> None:
    """Write the named adapter of a model in PEFT's format. See :func:`checkpoint_of` and :func:`write_checkpoint`."""
    checkpoint = checkpoint_of(
        model,
        adapter=adapter,
        modules_to_save=modules_to_save,
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
    )
    write_checkpoint(checkpoint, folder, unit_scale=unit_scale)


def write_checkpoint(checkpoint: AdapterCheckpoint, folder: str | Path, *, unit_scale: bool = False) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; equal values give equal bytes.

    Both files are written under temporary names and then renamed.

    Args:
        checkpoint: what to write.
        folder: created if missing.
        unit_scale: fold every scaling into B (the *export* form) instead of keeping it (the *checkpoint* form).

    Raises:
        ValueError: if there is no update to write.
    """
    if not checkpoint.factors:
        raise ValueError("checkpoint must hold at least one module of rank ≥ 1, got none")
    ranks = {name: a.shape[0] for name, (a, _) in checkpoint.factors.items()}
    alphas = {name: float(rank) if unit_scale else checkpoint.scalings[name] * rank for name, rank in ranks.items()}
    # An export's global values are the largest rank's; a checkpoint's are those most modules have.
    default_rank = max(ranks.values()) if unit_scale else int(_most_common(ranks.values()))
    default_alpha = float(default_rank) if unit_scale else _most_common(alphas.values())
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in checkpoint.factors.items():
        folded = b * checkpoint.scalings[name] if unit_scale else b
        if not torch.isfinite(folded).all():
            raise ValueError(f"scaling · lora_B must fit {b.dtype}, got infinity for {name!r}. Use a wider dtype.")
        tensors[f"{PREFIX}{name}.lora_A.weight"] = own_copy(a)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = own_copy(folded)
    for name, tensor in checkpoint.modules_to_save.items():
        tensors[PREFIX + name] = own_copy(tensor)
    config = {
        "peft_type": "LORA",
        "task_type": checkpoint.task_type,
        "base_model_name_or_path": checkpoint.base_model_name_or_path,
        "inference_mode": True,
        "r": default_rank,
        "lora_alpha": _integer_if_whole(default_alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": _pattern(ranks, default_rank),
        "alpha_pattern": _pattern({name: _integer_if_whole(alpha) for name, alpha in alphas.items()}, default_alpha),
        "modules_to_save": sorted(checkpoint.trained_modules) or None,
        "bias": "none",
        "fan_in_fan_out": checkpoint.fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    folder = Path(folder)
    # Not sorted by json: the order inside the patterns has a meaning.
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    with replacing(folder / TENSORS_NAME, folder / CONFIG_NAME) as (tensors_file, config_file):
        save_file(dict(sorted(tensors.items())), tensors_file, metadata={"format": "pt"})
        config_file.write_text(text, encoding="utf-8")


def _integer_if_whole(value: float) -> float | int:
    """Return 16 for 16.0: readers that expect an integer alpha get one wherever it is one."""
    return int(value) if float(value).is_integer() else value


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Write per-module values as PEFT's patterns, where the first key that matches the end of a name wins.

    A key also matches longer names that end in it, so a module with the default value is written too if a shorter
    name would capture it; and longer names come first.

    Returns:
        Escaped name to value, in the order of the search.
    """
    special = {name for name, value in values.items() if value != default}
    captured = {name for name in values if any(name != other and name.endswith(f".{other}") for other in special)}
    ordered = sorted(special | captured, key=lambda name: (-len(name), name))
    return {re.escape(name).replace(r"\-", "-"): values[name] for name in ordered}


def _most_common(values: Iterable[float]) -> float:
    """Return the most common value; of several, the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))
