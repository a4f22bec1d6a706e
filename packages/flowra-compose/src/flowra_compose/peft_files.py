"""PEFT's LoRA files: any writer's read, unit-scale ones written.

What is written has the scaling 1 everywhere: s is folded into B, every alpha equals its rank, and the global ``r`` and
``lora_alpha`` are the largest rank. A reader that knows only the global values then scales every module as meant.

Only safetensors and JSON are read; a file beside them in any other format is never opened.
Source: key names and pattern matching as PEFT 0.21 writes and resolves them.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowra_compose.low_rank import AdapterState, LowRankUpdate
from flowra_compose.whole_files import replacing

__all__ = ["read_adapter", "write_adapter"]

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 16 * 2**20
OFF: tuple[Any, ...] = (None, False, [], {})
# Options that give the tensors another meaning, with the values that do not. The initialisations listed leave the base
# weight alone; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it, so B A is not the whole update.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "use_rslora": (True, False, None),
    "use_dora": OFF,
    "lora_bias": OFF,
    "fan_in_fan_out": (True, False, None),
    "use_qalora": OFF,
    "use_bdlora": OFF,
    "layer_replication": OFF,
    "target_parameters": OFF,
    "trainable_token_indices": OFF,
    "alora_invocation_tokens": OFF,
    "arrow_config": OFF,
    "kasa_config": OFF,
    "monteclora_config": OFF,
    "velora_config": OFF,
}


def read_adapter(folder: str | Path) -> AdapterState:
    """Read a LoRA adapter of linear layers in PEFT's format.

    The scaling of a module is alpha / r, or alpha / √r with rsLoRA, of its own rank and alpha: those of the first key
    of ``rank_pattern`` and ``alpha_pattern`` that matches the end of its name, else the global ones. With
    ``fan_in_fan_out`` the base stores its weights transposed; A and B are stored as ever, and the note is passed on.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        Its values, tensors on the CPU in the dtype of the file.

    Raises:
        ValueError: if a file is missing or damaged, the adapter is not plain LoRA, a tensor is not finite, not
            understood, or not of the configured rank.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_NAME)
    pairs, saved, modules = _sort(_read_tensors(folder / TENSORS_NAME), config["modules_to_save"], folder)
    try:
        return AdapterState(
            updates={name: _update(name, pair, config) for name, pair in sorted(pairs.items())},
            modules_to_save=saved,
            trained_modules=tuple(modules),
            base_model_name_or_path=config.get("base_model_name_or_path") or None,
            task_type=config.get("task_type") or None,
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        )
    except ValueError as error:
        raise ValueError(f"{error}; in {folder}") from None


def write_adapter(state: AdapterState, folder: str | Path) -> None:
    """Write an adapter at unit scale in PEFT's format; equal values give equal bytes.

    Both files are written under temporary names first, then renamed.

    Args:
        state: what to write; scalings are multiplied into B in at least float32, and B keeps its dtype.
        folder: created if missing; an adapter in it is replaced.

    Raises:
        ValueError: if there is no update to write, or a scaled B does not fit its dtype.
    """
    if not state.updates:
        raise ValueError("updates must hold at least one module, got none. Was every weight 0?")
    tensors = {}
    for name, update in state.updates.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _own(update.lora_A)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _scaled_b(name, update)
    tensors |= {PREFIX + name: _own(tensor) for name, tensor in state.modules_to_save.items()}
    ranks = {name: update.rank for name, update in state.updates.items()}
    largest = max(ranks.values())
    pattern = _pattern(ranks, largest)
    config = {
        "base_model_name_or_path": state.base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": state.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "modules_to_save": list(state.trained_modules) or None,
        "peft_type": "LORA",
        "r": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "task_type": state.task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors_file, config_file = Path(folder) / TENSORS_NAME, Path(folder) / CONFIG_NAME
    text = json.dumps(config, indent=2) + "\n"  # not sorted by json: the order within the patterns has a meaning
    with replacing(tensors_file, config_file) as (new_tensors, new_config):
        save_file(dict(sorted(tensors.items())), new_tensors, metadata={"format": "pt"})
        new_config.write_text(text, encoding="utf-8")


def _read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a plain LoRA adapter, with patterns and ``modules_to_save`` never None."""
    if not path.is_file():
        raise ValueError(f"adapter must be a folder with {CONFIG_NAME}, got {path.parent}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{CONFIG_NAME} must be at most {MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}: {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    strange = {key: config.get(key) for key, plain in PLAIN.items() if config.get(key) not in plain}
    if strange:
        raise ValueError(f"adapter must be plain LoRA, got {strange} in {path}. Convert it with PEFT first.")
    kinds = {"base_model_name_or_path": str, "task_type": str, "modules_to_save": list}
    kinds |= {"rank_pattern": dict, "alpha_pattern": dict}
    for key, kind in kinds.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{key} must be a {kind.__name__} or null, got {value!r}; in {path}")
        config[key] = kind() if value is None else value
    if not all(isinstance(name, str) and name for name in config["modules_to_save"]):
        raise ValueError(f"modules_to_save must be names, got {config['modules_to_save']}; in {path}")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickles = sorted(each.name for each in path.parent.iterdir() if each.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        hint = f" {pickles[0]} is a pickle, never opened: convert it to safetensors." if pickles else ""
        raise ValueError(f"adapter must hold {TENSORS_NAME}, got none in {path.parent}.{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got {error}") from None


def _sort(
    tensors: Mapping[str, Tensor], full: list[str], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], set[str]]:
    """Sort tensors into factor pairs by module, and tensors and names of modules trained in full; nothing is left."""
    pairs: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    modules: set[str] = set()
    unknown = []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        factor = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name)
        trained = _trained_module(name, full)
        if not key.startswith(PREFIX) or not (factor or trained):
            unknown.append(key)
        elif factor:
            pairs.setdefault(factor[1], {})[factor[2]] = tensor
        elif trained:
            saved[name] = tensor
            modules.add(trained)
    if unknown:
        raise ValueError(f"tensors must be LoRA factors or belong to modules_to_save, got {unknown} in {folder}")
    alone = sorted(name for name, pair in pairs.items() if len(pair) != 2)
    if alone or not pairs:
        raise ValueError(f"every module must have lora_A and lora_B, got {alone or 'no factors'} in {folder}")
    return pairs, saved, modules


def _trained_module(name: str, modules: list[str]) -> str | None:
    """Return the outermost owner of a tensor that is in the list, which PEFT matches by the end of the name."""
    parts = name.split(".")
    owners = [".".join(parts[:end]) for end in range(1, len(parts))]
    return next((owner for owner in owners if any(f".{owner}".endswith(f".{module}") for module in modules)), None)


def _update(name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRankUpdate:
    rank = _value_for(name, config, "rank_pattern", "r")
    alpha = _value_for(name, config, "alpha_pattern", "lora_alpha")
    try:
        update = LowRankUpdate(pair["lora_A"], pair["lora_B"])
    except ValueError as error:
        raise ValueError(f"{error}; for {name!r}") from None
    if update.rank != rank:
        raise ValueError(f"rank must be the configured {rank:g}, got {update.rank} for {name!r}")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return dataclasses.replace(update, scaling=scaling)


def _value_for(name: str, config: Mapping[str, Any], pattern: str, default: str) -> float:
    """Return the value of the first key of the pattern that matches the end of the name, or the global value."""
    value = config.get(default)
    for key, special in config[pattern].items():
        if re.search(r"\)[*+{]", key):  # a repeated group can take exponential time
            raise ValueError(f"{pattern} must hold plain patterns, got a repeated group in {key!r}")
        try:
            matched = re.match(rf"^(.*\.)?({key})$", name)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{pattern} must hold regular expressions, got {key!r}: {error}") from None
        if matched:
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) <= sys.float_info.max:
        raise ValueError(f"{default} and {pattern} must be finite numbers other than 0, got {value!r} for {name!r}")
    return float(value)


def _own(tensor: Tensor) -> Tensor:
    """Copy to the CPU: the file format refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _scaled_b(name: str, update: LowRankUpdate) -> Tensor:
    b = update.lora_B
    scaled = _own((update.scaling * b.to(torch.promote_types(b.dtype, torch.float32))).to(b.dtype))
    if not torch.isfinite(scaled).all():
        raise ValueError(f"scaling · lora_B must fit {b.dtype}, got infinity for {name!r}. Write a float32 copy.")
    return scaled


def _pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """Write ranks as PEFT's pattern, longest name first because the first key that matches the end of a name wins.

    A module of the default rank is written too where the shorter name of another would capture it.

    Returns:
        Escaped name to rank, in the order of the search.
    """
    special = [name for name, rank in ranks.items() if rank != default]
    captured = [name for name in ranks if any(name.endswith(f".{other}") for other in special)]
    ordered = sorted({*special, *captured}, key=lambda name: (-len(name), name))
    return {re.escape(name): ranks[name] for name in ordered}
