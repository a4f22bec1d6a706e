"""PEFT's files, out and in: ``adapter_config.json`` and ``adapter_model.safetensors``.

Two forms (docs/formats/adapter.md). A *checkpoint* keeps the scaling s of each module (``alpha_pattern = s · r``) and
can be trained on. An *export* has unit scale everywhere: s is folded into B, every alpha equals its rank, and the
global ``r`` and ``lora_alpha`` are the largest rank, so that a reader which knows only the global values cannot
mis-scale it. In both, modules of rank 0 are left out.

Only safetensors and JSON are read; a file beside them in any other format is never opened.
"""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowra_adapters.attach import adapters, attach
from flowra_adapters.lora import LoRA
from flowra_adapters.matching import adaptable_modules

__all__ = ["AdapterCheckpoint", "checkpoint_of", "load_adapter", "read_checkpoint", "save_adapter", "write_checkpoint"]

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 16 * 2**20
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
OFF: tuple[Any, ...] = (None, False, [], {})
# Options that change what the tensors mean, with the values that do not; others are refused rather than ignored. The
# initialisations listed leave the base weight alone; the rest (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it, so that
# B A would not be the whole update.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "use_rslora": (True, False, None),
    **dict.fromkeys(
        (
            "use_dora",
            "fan_in_fan_out",
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


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterCheckpoint:
    """A set of low-rank updates ΔW = scaling · B A, as values."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Module name to (A ``(r, n)``, B ``(m, r)``), r ≥ 1."""
    scalings: Mapping[str, float]
    """Module name to s, for the same modules."""
    modules_to_save: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter name to tensor, for modules trained in full."""
    trained_modules: tuple[str, ...] = ()
    """Names of those modules; every tensor of ``modules_to_save`` lies in one."""
    base_model_name_or_path: str | None = None
    """Where the base comes from, for the reader."""
    task_type: str | None = None
    """PEFT's task type, such as ``SEQ_CLS`` or ``CAUSAL_LM``."""

    def __post_init__(self) -> None:
        """Check that every module has a scaling and factors that fit each other, and nothing is NaN."""
        if self.factors.keys() != self.scalings.keys():
            raise ValueError(f"scalings must name the modules of factors, got {sorted(self.scalings)}")
        for name, (a, b) in self.factors.items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
                raise ValueError(
                    f"factors must be A (r, n) and B (m, r) with r ≥ 1, got {tuple(a.shape)}, {tuple(b.shape)}"
                    f" for {name!r}"
                )
            if not {a.dtype, b.dtype} <= DTYPES:
                raise ValueError(f"factors must be floating point of ≥ 16 bits, got {a.dtype}, {b.dtype} for {name!r}")
            if not (torch.isfinite(a).all() and torch.isfinite(b).all() and math.isfinite(self.scalings[name])):
                raise ValueError(f"factors must be finite, got NaN or infinity for {name!r}")
        both = [name for name in self.factors if _owner(f"{name}.weight", self.trained_modules) is not None]
        if both:
            raise ValueError(f"a module must be adapted or trained in full, got both for {both[0]!r}")
        strays = [name for name in self.modules_to_save if _owner(name, self.trained_modules) is None]
        if strays:
            raise ValueError(f"modules_to_save must lie in trained_modules {self.trained_modules}, got {strays[0]!r}")
        for name, tensor in self.modules_to_save.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"modules_to_save must be finite, got NaN or infinity in {name!r}")


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


def checkpoint_of(
    model: nn.Module,
    *,
    adapter: str = "default",
    modules_to_save: Iterable[str] = (),
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> AdapterCheckpoint:
    """Read the named adapter off a model.

    Returns:
        Its values; the tensors are copies, on the CPU.

    Raises:
        ValueError: if no such adapter is attached or a module to save does not exist.
        TypeError: if an adapter is not of a method that PEFT's LoRA format can hold.
    """
    factors, scalings = {}, {}
    for name, one in adapters(model, adapter).items():
        if not isinstance(one, LoRA):
            raise TypeError(
                f"adapter must be LoRA to be written in PEFT's format, got {type(one).__name__} at {name!r}"
            )
        if one.rank > 0:
            factors[name] = (_copy(one.lora_A), _copy(one.lora_B))
            scalings[name] = one.scaling
    saved = {}
    trained = tuple(modules_to_save)
    for module_name in trained:
        for name, tensor in model.get_submodule(module_name).state_dict().items():
            saved[f"{module_name}.{name}"] = _copy(tensor)
    return AdapterCheckpoint(
        factors=factors,
        scalings=scalings,
        modules_to_save=saved,
        trained_modules=trained,
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
    )


def write_checkpoint(checkpoint: AdapterCheckpoint, folder: str | Path, *, unit_scale: bool = False) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; equal values give equal bytes.

    Each file is written under a temporary name and renamed.

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
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _copy(a)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _copy(folded)
    for name, tensor in checkpoint.modules_to_save.items():
        tensors[PREFIX + name] = _copy(tensor)
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
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{TENSORS_NAME}.partial"
    save_file(dict(sorted(tensors.items())), partial, metadata={"format": "pt"})
    os.replace(partial, folder / TENSORS_NAME)
    partial = folder / f"{CONFIG_NAME}.partial"
    # Not sorted by json: the order inside the patterns has a meaning.
    partial.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG_NAME)


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
    own = model.state_dict()
    unfit = sorted(checkpoint.factors.keys() - adaptable_modules(model).keys())
    if unfit:
        raise ValueError(f"adapter must fit the model, got one for {unfit[0]!r}, no layer of it; in {folder}")
    for name, tensor in checkpoint.modules_to_save.items():
        if name not in own or own[name].shape != tensor.shape:
            have = tuple(own[name].shape) if name in own else "no such tensor"
            raise ValueError(f"{name!r} must fit the model ({have}), got {tuple(tensor.shape)} from {folder}")
    for name, (a, b) in checkpoint.factors.items():
        have = tuple(own[f"{name}.weight"].shape)
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


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


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


def _most_common(values: Iterable[float]) -> float:
    """Return the most common value; of several, the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _owner(name: str, modules: Iterable[str]) -> str | None:
    """Return the outermost module above a tensor that is listed, where a listing means the end of a module's name."""
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts))]
    return next((each for each in above if any(f".{each}".endswith(f".{module}") for module in modules)), None)


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
        owner = _owner(path, listed)
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
