"""Read PEFT's LoRA files, ours or another writer's, and attach them to a model.

Only safetensors and JSON are read; a file beside them in any other format is never opened. What the reader cannot mean
exactly it refuses.
"""

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowra_adapters.attach import attach
from flowra_adapters.checkpoint import AdapterCheckpoint, owner_of
from flowra_adapters.layers import linear_size
from flowra_adapters.lora import LoRA
from flowra_adapters.matching import adaptable_modules
from flowra_adapters.peft_writer import CONFIG_NAME, PREFIX, TENSORS_NAME

__all__ = ["load_adapter", "read_checkpoint"]

MAX_CONFIG_BYTES = 16 * 2**20
OFF: tuple[Any, ...] = (None, False, [], {})
# Options that change what the tensors mean, with the values that do not; others are refused rather than ignored. The
# initialisations listed leave the base weight alone; the rest (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it, so that
# B A would not be the whole update.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "use_rslora": (True, False, None),
    "fan_in_fan_out": (True, False, None),
    **dict.fromkeys(
        (
            "use_dora",
            "lora_bias",
            "layer_replication",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_qalora",
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
            "velora_config",
        ),
        OFF,
    ),
}
KINDS: Mapping[str, type] = {
    "base_model_name_or_path": str,
    "task_type": str,
    "modules_to_save": list,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}


def read_checkpoint(folder: str | Path) -> AdapterCheckpoint:
    """Read a LoRA adapter in PEFT's format, ours or another writer's.

    Returns:
        Its values, with the scaling of each module from the global or per-module rank and alpha and rsLoRA.

    Raises:
        ValueError: if a file is missing or damaged, an option would change the meaning of the tensors, a tensor is not
            understood, or factor shapes disagree with the configured ranks.
    """
    folder = Path(folder)
    config = _read_config(folder)
    factors, saved, trained = _sort(_read_tensors(folder), config["modules_to_save"], folder)
    ranks = _Pattern(config, "rank_pattern", "r")
    alphas = _Pattern(config, "alpha_pattern", "lora_alpha")
    scalings = {}
    for name, (a, _) in factors.items():
        rank = ranks.value(name)
        if a.ndim == 2 and rank != a.shape[0]:
            raise ValueError(
                f"rank must be what the configuration says, {rank:g}, got {a.shape[0]} for {name!r} in {folder}"
            )
        scalings[name] = alphas.value(name) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    try:
        return AdapterCheckpoint(
            factors=factors,
            scalings=scalings,
            modules_to_save=saved,
            trained_modules=trained,
            base_model_name_or_path=config["base_model_name_or_path"] or None,
            task_type=config["task_type"] or None,
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        )
    except ValueError as error:
        raise ValueError(f"{error}; in {folder}") from None


def load_adapter(
    model: nn.Module, folder: str | Path, *, adapter: str = "default", dtype: torch.dtype | None = None
) -> dict[str, LoRA]:
    """Attach the adapter in a folder to a model, and load its ``modules_to_save`` into the model's own modules.

    Args:
        model: changed in place; left as it was if anything does not fit.
        folder: PEFT's two files.
        adapter: name for the attached set.
        dtype: of the adapter's tensors; by default the file's.

    Returns:
        The attached adapters by module name.

    Raises:
        ValueError: if the files are damaged, or any tensor does not fit or has no place in this model.
    """
    checkpoint = read_checkpoint(folder)
    own, layers = model.state_dict(), adaptable_modules(model)
    unfit = sorted(checkpoint.factors.keys() - layers.keys())
    if unfit:
        raise ValueError(f"adapter must fit the model, got one for {unfit[0]!r}, no layer of it; in {folder}")
    for name, tensor in checkpoint.modules_to_save.items():
        if name not in own or own[name].shape != tensor.shape:
            have = tuple(own[name].shape) if name in own else "no such tensor"
            raise ValueError(f"{name!r} must fit the model ({have}), got {tuple(tensor.shape)} from {folder}")
    for name, (a, b) in checkpoint.factors.items():
        have = linear_size(layers[name])
        if have != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"adapter must belong to this base, got an update of {(b.shape[0], a.shape[1])} for {name!r} ({have});"
                f" in {folder}"
            )
    attached: dict[str, LoRA] = {}
    ranks = {name: a.shape[0] for name, (a, _) in checkpoint.factors.items()}
    for name, one in attach(model, ranks, modules_to_save=checkpoint.trained_modules, adapter=adapter).items():
        assert isinstance(one, LoRA)
        a, b = checkpoint.factors[name]
        one.scaling = checkpoint.scalings[name]
        device = one.lora_A.device
        one.replace_factors(a.to(device=device, dtype=dtype or a.dtype), b.to(device=device, dtype=dtype or b.dtype))
        attached[name] = one
    with torch.no_grad():
        for name, tensor in checkpoint.modules_to_save.items():
            own[name].copy_(tensor)
    return attached


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"adapter must be a folder with {CONFIG_NAME}, got {folder}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(
            f"{CONFIG_NAME} must be at most {MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}; in {folder}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    strange = {key: config.get(key) for key, allowed in NEUTRAL.items() if config.get(key) not in allowed}
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


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS_NAME
    if not path.is_file():
        others = sorted(each.name for each in folder.iterdir() if each.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        hint = f" Found {others[0]}: pickles are never opened; convert it to safetensors." if others else ""
        raise ValueError(f"adapter must hold {TENSORS_NAME}, got none in {folder}.{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got {error}") from None


def _sort(
    tensors: Mapping[str, Tensor], listed: list[str], folder: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], tuple[str, ...]]:
    """Sort tensors into factor pairs and modules trained in full; a tensor that is neither is an error.

    Returns:
        Factors by module, other tensors by name, and the modules that those belong to.

    Raises:
        ValueError: if a tensor is not understood or a factor is alone.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    trained: set[str] = set()
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        factor = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", path)
        owner = owner_of(path, listed)
        if key == path or not (factor or owner):
            raise ValueError(f"tensors must be LoRA factors or lie in modules_to_save, got {key!r} in {folder}")
        if factor:
            halves.setdefault(factor[1], {})[factor[2]] = tensor
        elif owner:
            saved[path] = tensor
            trained.add(owner)
    alone = [name for name, pair in halves.items() if len(pair) != 2]
    if alone or not halves:
        raise ValueError(f"every module must have lora_A and lora_B, got {alone or 'no factors'} in {folder}")
    factors = {name: (pair["lora_A"], pair["lora_B"]) for name, pair in sorted(halves.items())}
    return factors, saved, tuple(sorted(trained))


class _Pattern:
    """Per-module values as PEFT resolves them: the first key that matches the end of a name, or the global value."""

    def __init__(self, config: Mapping[str, Any], pattern: str, default: str) -> None:
        self._what = f"{pattern} and {default}"
        self._default = config.get(default)
        self._keys = []
        for key, value in config[pattern].items():
            if re.search(r"\)[*+{]", key):  # a repeated group can take exponential time
                raise ValueError(f"{pattern} must hold plain patterns, got a repeated group in {key!r}")
            try:
                self._keys.append((re.compile(rf"(.*\.)?({key})$"), value))
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{pattern} must hold regular expressions, got {key!r}: {error}") from None

    def value(self, name: str) -> float:
        """Return the value for a module."""
        value = next((value for key, value in self._keys if key.match(name)), self._default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) <= sys.float_info.max:
            raise ValueError(f"{self._what} must be finite numbers other than 0, got {str(value)[:40]} for {name!r}")
        return float(value)
