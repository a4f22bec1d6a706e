"""Gates as files without pickle (docs/formats/gates.md): safetensors, and JSON that names the adapters they know."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from flowra_compose.fingerprints import fingerprint
from flowra_compose.fusion.gates import GateOptions, Gates
from flowra_compose.low_rank import AdapterState
from flowra_compose.whole_files import replacing

__all__ = ["FILES", "FORMAT_VERSION", "adapter_fingerprint", "adapter_names", "read_gates", "write_gates"]

FILES = ("gates.safetensors", "gates.json")
"""In the order in which they come to be: where the second is, the gates are whole."""
FORMAT_VERSION = 1
MAX_JSON_BYTES = 16 * 2**20
KEYS = {"format_version", "options", "adapters", "places", "sha256"}


def adapter_fingerprint(adapter: AdapterState) -> str:
    """Return a SHA-256 of what an adapter adds to each module: A, and s B as :func:`write_adapter` writes it.

    So an adapter has one fingerprint in memory and in the files that it is written to.
    """
    parts = {}
    for name, one in adapter.updates.items():
        a, b = one.lora_A.detach(), one.lora_B.detach()
        scaled = (one.scaling * b.to(torch.promote_types(b.dtype, torch.float32))).to(b.dtype)
        parts[name] = fingerprint(a, scaled, one.layout, one.kernel)
    return fingerprint(parts)


def write_gates(gates: Gates, adapters: Mapping[str, AdapterState], folder: str | Path) -> None:
    """Write ``gates.safetensors`` and ``gates.json``, both or none; equal gates give equal bytes.

    Args:
        gates: as trained.
        adapters: name to adapter, those that the gates were trained with, in their order.
        folder: to write to.

    Raises:
        ValueError: if there is not one adapter for each weight of the gates, or a gate is not finite and float32.
    """
    if len(adapters) != gates.adapters:
        raise ValueError(f"adapters must be {gates.adapters}, as the gates weigh, got {len(adapters)}")
    odd = [name for name, each in gates.named_parameters() if each.dtype != torch.float32 or not each.isfinite().all()]
    if odd:
        raise ValueError(f"gates must be finite and float32, got others in {odd[:3]}. Convert them with gates.float().")
    tensors = {name: each.detach().to("cpu", copy=True).contiguous() for name, each in gates.state_dict().items()}
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "options": asdict(gates.options),
        "adapters": [{"name": name, "sha256": adapter_fingerprint(one)} for name, one in adapters.items()],
        "places": [{"name": name, "width": width} for name, width in gates.widths.items()],
    }
    with replacing(*(Path(folder) / name for name in FILES)) as (tensors_file, json_file):
        safetensors.torch.save_file(dict(sorted(tensors.items())), tensors_file)
        content["sha256"] = _sha256(tensors_file)
        json_file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_gates(folder: str | Path, adapters: Mapping[str, AdapterState]) -> Gates:
    """Read what :func:`write_gates` wrote, for the adapters that the gates were trained with.

    Args:
        folder: with the two files.
        adapters: name to adapter. Names and order are those of training: a gate that has learned to weigh some adapters
            means nothing for others.

    Returns:
        The gates, on the CPU, with the bits that were written.

    Raises:
        ValueError: if a file is missing, damaged or of another version, or the adapters are others.
    """
    tensors_file, json_file = (Path(folder) / name for name in FILES)
    try:
        content = _content(json_file)
        if _sha256(tensors_file) != content["sha256"]:
            raise ValueError(f"sha256 must be that of {tensors_file.name}, got {content['sha256']!r}")
        known = [(each["name"], each["sha256"]) for each in content["adapters"]]
        places = {each["name"]: each["width"] for each in content["places"]}
        if len(places) != len(content["places"]) or not all(type(each) is int and each > 0 for each in places.values()):
            raise ValueError("places must be distinct names with widths > 0")
        options = _options(content["options"])
        rows = len(known) if options.rank is None else options.rank
        if 4 * rows * sum(places.values()) > tensors_file.stat().st_size:  # before memory is taken for them
            raise ValueError(f"places must be no wider than {tensors_file.name}, got {sum(places.values())} in all")
        gates = Gates(places, len(known), options)
        _load(gates, safetensors.torch.load_file(tensors_file))
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError, SafetensorError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"gates must follow docs/formats/gates.md, got {problem}; in {json_file}. Train them again."
        ) from None
    given = [(name, adapter_fingerprint(one)) for name, one in adapters.items()]
    if given != known:
        trained, got = [name for name, _ in known], [name for name, _ in given]
        changed = [name for (name, digest), (_, now) in zip(known, given, strict=False) if digest != now]
        what = f"{got} where they know {trained}" if trained != got else f"other updates of {changed}"
        raise ValueError(
            f"adapters must be those that the gates were trained with, in their order, got {what}; in {json_file}."
            " Give the same adapters, or train gates for these."
        )
    return gates


def adapter_names(folder: str | Path) -> list[str]:
    """Return the names of the adapters that gates were trained with, in their order.

    Raises:
        ValueError: if ``gates.json`` is missing, damaged or of another version.
    """
    try:
        return [str(each["name"]) for each in _content(Path(folder) / FILES[1])["adapters"]]
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"gates must follow docs/formats/gates.md, got {problem}; in {folder}") from None


def _content(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"at most {MAX_JSON_BYTES} bytes are read, got {file.stat().st_size}")
    content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    version = content["format_version"] if isinstance(content, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"format_version must be {FORMAT_VERSION}, got {version!r}")
    _same_keys(content, KEYS, "the gates")
    for each in content["adapters"]:
        _same_keys(each, {"name", "sha256"}, "an adapter")
    for each in content["places"]:
        _same_keys(each, {"name", "width"}, "a place")
    return dict(content)


def _options(content: dict[str, Any]) -> GateOptions:
    _same_keys(content, {each.name for each in fields(GateOptions)}, "options")
    return GateOptions(**content)


def _same_keys(content: object, keys: set[str], what: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{what} must be an object, got {type(content).__name__}")
    missing, unknown = sorted(keys - content.keys()), sorted(content.keys() - keys)
    if missing or unknown:
        raise ValueError(f"keys of {what} must be {sorted(keys)}, got missing {missing} and unknown {unknown}")


def _load(gates: Gates, tensors: Mapping[str, Tensor]) -> None:
    own = gates.state_dict()
    if tensors.keys() != own.keys():
        raise ValueError(f"tensors must be {sorted(own)[:4]}…, got {sorted(tensors)[:4]}…")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype or not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite {tuple(own[name].shape)} float32, got {tuple(tensor.shape)}")
    gates.load_state_dict({name: each.clone() for name, each in tensors.items()})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"numbers must be finite, got {name}")
