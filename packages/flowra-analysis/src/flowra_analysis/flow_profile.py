"""The FlowProfile, what calibration knows of a model, and its two files: ``profile.json`` and ``profile.safetensors``.

The JSON holds ``format_version``, ``base_parameters``, ``modules``, ``blocks`` and ``provenance``; the spectra are
tensors named ``<kind>/<module name>``. Nothing else is read; equal values give equal bytes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowra_analysis.whole_files import replacing

__all__ = ["FlowProfile", "ModuleProfile", "read_profile", "write_profile"]

JSON_NAME = "profile.json"
TENSORS_NAME = "profile.safetensors"
MAX_JSON_BYTES = 64 * 2**20
MAX_INTEGER = 2**63 - 1
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
"""Of spectra."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleProfile:
    """What is known of one module."""

    shape: tuple[int, int]
    """(m, n) = (out, in) of its weight."""
    cost_per_rank: int
    """Parameters that one more unit of rank costs, ≥ 1; m + n for a linear layer."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    """Name to finite value, such as ``fisher_trace``. Which names there are is open; the standard error of ``x``, if it
    is known, is ``x_stderr``."""

    def __post_init__(self) -> None:
        """Check that sizes are positive whole numbers and statistics are finite."""
        if not isinstance(self.shape, tuple) or len(self.shape) != 2 or not all(map(_is_count, self.shape)):
            raise ValueError(f"shape must be two whole numbers ≥ 1, got {short_repr(self.shape)}")
        if not _is_count(self.cost_per_rank):
            raise ValueError(f"cost_per_rank must be a whole number ≥ 1, got {short_repr(self.cost_per_rank)}")
        for key, value in self.statistics.items():
            _check_statistic(key, value, "statistics must be")


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowProfile:
    """Where information flows in a model, module by module."""

    modules: Mapping[str, ModuleProfile]
    """Qualified module name to what is known of it; at least one."""
    spectra: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Kind (such as ``flow_gains`` or ``weight``) to module name to spectrum: 1-D, float, finite, ≥ 0,
    non-increasing. A kind may cover some of the modules only, but no others."""
    blocks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Qualified name of a block of layers to statistics by name, such as those of :class:`BlockJacobian`."""
    base_parameters: int
    """Parameters of the base model, ≥ 1: what a budget in per cent refers to."""
    provenance: Mapping[str, str | int | float] = field(default_factory=dict)
    """How the profile came about: what :func:`flowra_analysis.provenance_of` gives, and anything beside it."""

    format_version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Check that spectra belong to known modules and are spectra, and that numbers are finite."""
        if not self.modules:
            raise ValueError("modules must hold at least one module, got none")
        if not _is_count(self.base_parameters):
            raise ValueError(f"base_parameters must be a whole number ≥ 1, got {short_repr(self.base_parameters)}")
        for key, value in self.provenance.items():
            if not isinstance(key, str) or not (isinstance(value, str) or _is_number(value)):
                raise ValueError(
                    f"provenance must be names and strings or finite numbers, got {key!r}: {short_repr(value)}"
                )
        for name, statistics in self.blocks.items():
            for key, value in statistics.items():
                _check_statistic(key, value, "blocks must have", f" for {name!r}")
        for kind, by_module in self.spectra.items():
            if not kind or "/" in kind:
                raise ValueError(f"kinds of spectra must be names without '/', got {kind!r}")
            unknown = sorted(by_module.keys() - self.modules.keys())
            if unknown:
                raise ValueError(f"spectra must belong to modules of the profile, got {kind!r} for {unknown}")
            for name, spectrum in by_module.items():
                _check_spectrum(spectrum, f"{kind!r} of {name!r}")


def write_profile(profile: FlowProfile, folder: str | Path) -> None:
    """Write ``profile.safetensors`` and ``profile.json``; equal values give equal bytes.

    Each file is written under a temporary name and renamed.

    Args:
        profile: what to write; its tensors may be on any device.
        folder: created if missing.
    """
    content = {
        "format_version": profile.format_version,
        "base_parameters": profile.base_parameters,
        "modules": {
            name: {
                "shape": list(module.shape),
                "cost_per_rank": module.cost_per_rank,
                "statistics": {key: float(value) for key, value in module.statistics.items()},
            }
            for name, module in profile.modules.items()
        },
        "blocks": {name: {key: float(value) for key, value in each.items()} for name, each in profile.blocks.items()},
        "provenance": dict(profile.provenance),
    }
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    tensors = {
        f"{kind}/{name}": spectrum.detach().to("cpu", copy=True).contiguous()  # copies: two names may share a tensor
        for kind, by_module in profile.spectra.items()
        for name, spectrum in by_module.items()
    }
    folder = Path(folder)
    with replacing(folder / TENSORS_NAME, folder / JSON_NAME) as (tensors_file, json_file):
        save_file(dict(sorted(tensors.items())), tensors_file, metadata={"format": "pt"})
        json_file.write_text(text, encoding="utf-8")


def read_profile(folder: str | Path) -> FlowProfile:
    """Read what :func:`write_profile` wrote.

    Returns:
        The profile, tensors on the CPU.

    Raises:
        ValueError: if a file is missing, damaged, too large or of another version, a key is missing or unknown, or a
            value is not one that a profile can hold.
    """
    folder = Path(folder)
    path = folder / JSON_NAME
    content = _read_json(path)
    version = content.get("format_version")
    if type(version) is not int or version != FlowProfile.format_version:
        raise ValueError(f"format_version must be {FlowProfile.format_version}, got {short_repr(version)}; in {path}")
    _require_keys(content, {"format_version", "base_parameters", "modules", "blocks", "provenance"}, str(path))
    modules = {name: _module(name, entry, path) for name, entry in _object(content, "modules", path).items()}
    spectra: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read_tensors(folder / TENSORS_NAME).items():
        kind, slash, name = key.partition("/")
        if not slash:
            raise ValueError(f"tensor names must be '<kind>/<module name>', got {key!r}; in {folder / TENSORS_NAME}")
        spectra.setdefault(kind, {})[name] = tensor
    try:
        return FlowProfile(
            modules=modules,
            spectra=spectra,
            blocks={
                name: _entry(each, f"block {name!r} in {path}")
                for name, each in _object(content, "blocks", path).items()
            },
            base_parameters=content["base_parameters"],
            provenance=_object(content, "provenance", path),
        )
    except ValueError as error:
        raise ValueError(f"{error}; in {folder}") from None


def _module(name: str, entry: object, path: Path) -> ModuleProfile:
    where = f"module {name!r} in {path}"
    if not isinstance(entry, dict):
        raise ValueError(f"modules must be JSON objects, got {type(entry).__name__} for {where}")
    _require_keys(entry, {"shape", "cost_per_rank", "statistics"}, where)
    shape, statistics = entry["shape"], _object(entry, "statistics", path)
    try:
        return ModuleProfile(
            shape=tuple(shape) if isinstance(shape, list) else shape,
            cost_per_rank=entry["cost_per_rank"],
            statistics=statistics,
        )
    except ValueError as error:
        raise ValueError(f"{error}; for {where}") from None


def _entry(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"blocks must be JSON objects, got {type(value).__name__} for {where}")
    return value


def _require_keys(content: Mapping[str, Any], expected: set[str], where: str) -> None:
    if content.keys() != expected:
        missing, unknown = sorted(expected - content.keys()), sorted(content.keys() - expected)
        raise ValueError(
            f"keys must be {sorted(expected)}, got missing {missing} and unknown {short_repr(unknown)}; in {where}"
        )


def _object(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a JSON object, got {type(value).__name__}; in {path}")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"profile must be a folder with {JSON_NAME}, got {path.parent}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{JSON_NAME} must be at most {MAX_JSON_BYTES} bytes, got {path.stat().st_size}; {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError(f"a key twice among {sorted(key for key, _ in pairs)[:8]}")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"profile must hold {TENSORS_NAME}, got none in {path.parent}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got {error}") from None


def _check_spectrum(spectrum: Tensor, what: str) -> None:
    if spectrum.ndim != 1 or spectrum.dtype not in DTYPES:
        raise ValueError(
            f"spectra must be 1-D and of 16, 32 or 64 bits, got {spectrum.dtype} {tuple(spectrum.shape)}: {what}"
        )
    if not torch.isfinite(spectrum).all():
        raise ValueError(f"spectra must be finite, got NaN or infinity: {what}")
    if (spectrum[1:] > spectrum[:-1]).any():
        raise ValueError(f"spectra must be non-increasing, got an increase: {what}")
    if len(spectrum) and float(spectrum[-1]) < 0:
        raise ValueError(f"spectra must be ≥ 0, got {float(spectrum[-1])}: {what}")


def _check_statistic(key: object, value: object, what: str, where: str = "") -> None:
    if not isinstance(key, str) or not _is_number(value):
        raise ValueError(f"{what} names and finite numbers, got {key!r}: {short_repr(value)}{where}")
    if key.endswith("_stderr") and float(value) < 0:  # type: ignore[arg-type]
        raise ValueError(f"{what} standard errors ≥ 0, got {key!r}: {value}{where}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_INTEGER


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return (isinstance(value, int) and abs(value) <= MAX_INTEGER) or (isinstance(value, float) and math.isfinite(value))
