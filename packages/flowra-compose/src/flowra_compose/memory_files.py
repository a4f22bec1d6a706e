"""What is kept of past tasks as files without pickle (docs/formats/task_memory.md)."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from flowra_compose.memory import ModuleMemory, TaskMemory
from flowra_compose.whole_files import replacing

__all__ = ["FILES", "FORMAT_VERSION", "read_task_memory", "write_task_memory"]

FILES = ("task_memory.safetensors", "task_memory.json")
"""In the order in which they come to be: where the second is, the memory is whole."""
FORMAT_VERSION = 1
MAX_JSON_BYTES = 64 * 2**20
KEYS = ("format_version", "tasks", "modules", "sha256")


def write_task_memory(memory: TaskMemory, folder: str | Path) -> None:
    """Write ``task_memory.safetensors`` and ``task_memory.json``, both or none; equal values give equal bytes."""
    tensors = {f"{part}/{name}": each for name, one in memory.modules.items() for part, each in _parts(one).items()}
    own = {key: each.detach().to("cpu", copy=True).contiguous() for key, each in sorted(tensors.items())}
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "tasks": memory.tasks,
        "modules": {name: {"shape": list(one.shape), "kept": list(one.kept)} for name, one in memory.modules.items()},
    }
    with replacing(*(Path(folder) / name for name in FILES)) as (tensors_file, json_file):
        safetensors.torch.save_file(own, tensors_file)
        content["sha256"] = _sha256(tensors_file)
        json_file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_task_memory(folder: str | Path) -> TaskMemory:
    """Read what :func:`write_task_memory` wrote.

    Returns:
        The memory, on the CPU, with the bits that were written.

    Raises:
        ValueError: if a file is missing, damaged or of another version, the two do not belong together, a key or tensor
            is missing or unknown, or a value is not one that a memory can have.
    """
    tensors_file, json_file = (Path(folder) / name for name in FILES)
    try:
        if json_file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"at most {MAX_JSON_BYTES} bytes are read, got {json_file.stat().st_size}")
        content = json.loads(json_file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        version = content["format_version"] if isinstance(content, dict) else None
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {version!r}")
        _check_keys(content, KEYS, "the memory")
        if _sha256(tensors_file) != content["sha256"]:
            raise ValueError(f"sha256 must be that of {tensors_file.name}, got {content['sha256']!r}")
        loaded = {name: each.clone() for name, each in safetensors.torch.load_file(tensors_file).items()}
        return _memory(content, loaded)  # clones, for tensors that lie in a file's buffer may be aligned otherwise
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError, SafetensorError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"task memory must follow docs/formats/task_memory.md, got {problem}; in {json_file}. Make it again."
        ) from None


def _parts(module: ModuleMemory) -> dict[str, Tensor]:
    parts = {"basis": module.basis, "rows": module.rows, "inputs": module.inputs, "outputs": module.outputs}
    return {part: each for part, each in parts.items() if each is not None}


def _memory(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TaskMemory:
    tasks, entries = content["tasks"], content["modules"]
    if type(tasks) is not int or tasks < 0 or not isinstance(entries, dict):
        raise ValueError(f"tasks must be a whole number ≥ 0 and modules an object, got {tasks!r}, {type(entries)}")
    modules: dict[str, ModuleMemory] = {}
    used: set[str] = set()
    for name, entry in entries.items():
        _check_keys(entry, ("shape", "kept"), f"module {name!r}")
        parts = {part: tensors.get(f"{part}/{name}") for part in ("basis", "rows", "inputs", "outputs")}
        basis, rows = parts["basis"], parts["rows"]
        if basis is None or rows is None:
            raise ValueError(f"tensors must hold basis/{name} and rows/{name}, got one or none of them")
        modules[name] = ModuleMemory(
            shape=_shape(entry["shape"], name),
            kept=_kept(entry["kept"], tasks, name),
            basis=basis,
            rows=rows,
            inputs=parts["inputs"],
            outputs=parts["outputs"],
        )
        used |= {f"{part}/{name}" for part, each in parts.items() if each is not None}
    _check_keys(tensors, used, "the tensors")
    return TaskMemory(modules=modules)


def _shape(value: object, name: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(each) is int and each > 0 for each in value):
        raise ValueError(f"shape must be two whole numbers > 0, got {value!r}; {name!r}")
    return value[0], value[1]


def _kept(value: object, tasks: int, name: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != tasks or not all(type(each) in {int, float} for each in value):
        raise ValueError(f"kept must be a number for each of {tasks} tasks, got {value!r}; {name!r}")
    return tuple(float(each) for each in value)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"numbers must be finite, got {name}")


def _check_keys(content: object, known: Collection[str], what: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{what} must be an object, got {content!r}")
    missing, unknown = sorted(set(known) - content.keys()), sorted(content.keys() - set(known))
    if missing or unknown:
        raise ValueError(f"keys of {what} must be as documented, got missing {missing[:3]} and unknown {unknown[:3]}")
