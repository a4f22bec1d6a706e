"""What PEFT's two files of an adapter are called, and what their configuration says of ranks and scalings.

Only safetensors and JSON are read; a file beside them in any other format is never opened.
Source: names of keys and matching of patterns as PEFT 0.21 writes and resolves them.
"""

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["CONFIG_NAME", "PREFIX", "TENSORS_NAME", "adalora_scaling", "rank_and_scaling", "read_config"]

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 16 * 2**20
OFF: tuple[Any, ...] = (None, False, [], {})
# Options that give the tensors another meaning, with the values that are read. The initialisations listed leave the
# base weight alone; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it, so B A is not the whole update.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", "ADALORA"),
    "bias": ("none", None, "all", "lora_only"),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "use_rslora": (True, False, None),
    "use_dora": (True, False, None),
    "lora_bias": (True, False, None),
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
# Options that PEFT has no meaning for beside another one: its DoRA takes lora_bias for a part of the weight where it
# measures the norm, but not where it merges; its AdaLoRA knows none of these.
EXCLUDED: Mapping[str, tuple[str, ...]] = {
    "use_dora": ("lora_bias",),
    "ADALORA": ("use_rslora", "use_dora", "lora_bias", "alpha_pattern"),
}
KINDS: Mapping[str, type] = {
    "base_model_name_or_path": str,
    "task_type": str,
    "modules_to_save": list,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of an adapter whose tensors mean what this package knows.

    Returns:
        All of it; patterns and ``modules_to_save`` are never None.

    Raises:
        ValueError: if it is missing or damaged, or gives the tensors another meaning.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"adapter must be a folder with {CONFIG_NAME}, got {folder}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{CONFIG_NAME} must be at most {MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}: {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    strange = {key: config.get(key) for key, plain in PLAIN.items() if config.get(key) not in plain}
    mixed = [*(EXCLUDED["use_dora"] if config.get("use_dora") else ())]
    mixed += EXCLUDED["ADALORA"] if config.get("peft_type") == "ADALORA" else ()
    strange |= {key: config[key] for key in mixed if config.get(key)}
    if strange:
        raise ValueError(f"adapter must be plain LoRA, got {strange} in {path}. Convert it with PEFT first.")
    for key, kind in KINDS.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{key} must be a {kind.__name__} or null, got {value!r}; in {path}")
        config[key] = kind() if value is None else value
    if not all(isinstance(name, str) and name for name in config["modules_to_save"]):
        raise ValueError(f"modules_to_save must be names, got {config['modules_to_save']}; in {path}")
    return config


def rank_and_scaling(name: str, config: Mapping[str, Any]) -> tuple[float, float]:
    """Return r of a module and s = alpha / r, or alpha / √r with rsLoRA.

    Each is that of the first key of ``rank_pattern`` and ``alpha_pattern`` that matches the end of the name, else the
    global one.

    Raises:
        ValueError: if one is no number, or a pattern is none.
    """
    rank = _value_for(name, config, "rank_pattern", "r")
    alpha = _value_for(name, config, "alpha_pattern", "lora_alpha")
    if config.get("use_rslora"):
        if rank < 0:
            raise ValueError(f"r and rank_pattern must be above 0, got {rank:g} for {name!r}")
        return rank, alpha / math.sqrt(rank)
    return rank, alpha / rank


def adalora_scaling(config: Mapping[str, Any]) -> float:
    """Return s = alpha / (``init_r`` + 10⁻⁵) of every module of AdaLoRA, whatever rank is left.

    Raises:
        ValueError: if one is not above 0.
    """
    initial, alpha = _number(config.get("init_r"), "init_r"), _number(config.get("lora_alpha"), "lora_alpha")
    if initial < 0 or alpha < 0:
        raise ValueError(f"init_r and lora_alpha of AdaLoRA must be above 0, got {initial:g} and {alpha:g}")
    return alpha / (initial + 1e-5)


def _value_for(name: str, config: Mapping[str, Any], pattern: str, default: str) -> float:
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
    return _number(value, f"{default} and {pattern}", f" for {name!r}")


def _number(value: object, what: str, where: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) <= sys.float_info.max:
        raise ValueError(f"{what} must be finite numbers other than 0, got {value!r}{where}")
    return float(value)
