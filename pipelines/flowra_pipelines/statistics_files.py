"""What is known of a task at each module, in two files: ``task_statistics.json`` and ``task_statistics.safetensors``.

The JSON says which tensors each module has and where all of it comes from; the tensors are matrices, those that modules
share (Q, K and V see the same inputs) are there once. They are read when a module's turn comes, one module at a time.
docs/composition.md describes the files. Nothing else is read; equal values give equal bytes.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowra_adapters.json_files import read_json_object
from flowra_compose import ModuleStatistics
from flowra_pipelines.errors import UserError
from flowra_pipelines.whole_files import replacing

__all__ = ["JSON_NAME", "TENSORS_NAME", "TaskStatistics", "read_task_statistics", "write_task_statistics"]

JSON_NAME = "task_statistics.json"
TENSORS_NAME = "task_statistics.safetensors"
FORMAT_VERSION = 1
MAX_JSON_BYTES = 64 * 2**20
KINDS = ("inputs", "outputs", "fisher")
DTYPES = ("F16", "BF16", "F32", "F64")
"""As safetensors calls them."""


class TaskStatistics(Mapping[str, ModuleStatistics]):
    """Statistics by module name; a module is read from the file whenever it is asked for.

    Args:
        folder: that holds them.
        entries: module name to kind to the name of a tensor.
        provenance: where they come from.
    """

    def __init__(
        self, folder: Path, entries: Mapping[str, Mapping[str, str]], provenance: Mapping[str, str | int | float]
    ) -> None:
        self.folder = folder
        self.provenance = provenance
        self._entries = entries

    def __getitem__(self, name: str) -> ModuleStatistics:
        """Read one module.

        Returns:
            Its statistics, on the CPU.

        Raises:
            UserError: if a value is not finite, or the file is no longer there.
        """
        path = self.folder / TENSORS_NAME
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {kind: file.get_tensor(key) for kind, key in self._entries[name].items()}
            return ModuleStatistics(**tensors)
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error)[:300].split())
            raise UserError(f"statistics must be readable for {name!r}, got {reason}; in {path}") from None

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Count the modules."""
        return len(self._entries)


def write_task_statistics(
    modules: Mapping[str, ModuleStatistics], folder: str | Path, *, provenance: Mapping[str, str | int | float]
) -> None:
    """Write both files, whole or not at all.

    Args:
        modules: module name to what is known of it; modules may share a tensor, which is then written once.
        folder: created if missing.
        provenance: where the statistics come from.
    """
    tensors: dict[str, Tensor] = {}
    known: dict[int, tuple[Tensor, str]] = {}  # with the tensor, so that no other gets its id
    entries: dict[str, dict[str, str]] = {}
    for name, each in sorted(modules.items()):
        entries[name] = {}
        for kind in KINDS:
            value: Tensor | None = getattr(each, kind)
            if value is None:
                continue
            _, key = known.setdefault(id(value), (value, f"{kind}/{name}"))
            if key == f"{kind}/{name}":
                tensors[key] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
            entries[name][kind] = key
    content = {"format_version": FORMAT_VERSION, "modules": entries, "provenance": dict(provenance)}
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    folder = Path(folder)
    with replacing(folder / TENSORS_NAME, folder / JSON_NAME) as (tensors_file, json_file):
        save_file(dict(sorted(tensors.items())), tensors_file, metadata={"format": "pt"})
        json_file.write_text(text, encoding="utf-8")


def read_task_statistics(folder: str | Path) -> TaskStatistics:
    """Read what :func:`write_task_statistics` wrote: the JSON now, tensors when they are asked for.

    Returns:
        The statistics, tensors on the CPU.

    Raises:
        UserError: if a file is missing, damaged, too large or of another version, a key is missing or unknown, or the
            tensors are not those that the JSON names, of shapes that fit.
    """
    folder = Path(folder)
    path = folder / JSON_NAME
    content = _read_json(path)
    if content.keys() != {"format_version", "modules", "provenance"}:
        raise UserError(
            f"keys must be format_version, modules and provenance, got {short_repr(sorted(content))} in {path}"
        )
    if content["format_version"] != FORMAT_VERSION or isinstance(content["format_version"], bool):
        raise UserError(
            f"format_version must be {FORMAT_VERSION}, got {short_repr(content['format_version'])}; in {path}"
        )
    entries, provenance = content["modules"], content["provenance"]
    if not isinstance(provenance, dict) or not all(map(_is_plain, provenance.values())):
        raise UserError(
            f"provenance must be names and texts or finite numbers, got {short_repr(provenance)}; in {path}"
        )
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise UserError(f"modules must be names and names of tensors, each of {KINDS}; got others in {path}")
    shapes = _shapes(folder / TENSORS_NAME)
    named = {key for entry in entries.values() for key in entry.values()}
    if named != shapes.keys():
        odd = sorted(named ^ shapes.keys())[0]
        raise UserError(
            f"tensors must be those that {JSON_NAME} names, got {odd[:200]!r} on one side only; in {folder}"
        )
    for name, entry in entries.items():
        _check_shapes(name, {kind: shapes[key] for kind, key in entry.items()}, folder)
    return TaskStatistics(folder, entries, provenance)


def _check_shapes(name: str, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Check that moments are square or diagonal, and a Fisher diagonal fits them."""
    for kind in ("inputs", "outputs"):
        shape = shapes.get(kind, (1,))
        if not (len(shape) == 1 or (len(shape) == 2 and shape[0] == shape[1])) or 0 in shape:
            raise UserError(f"{kind} must be (d, d) or (d,), got {shape} for {name[:200]!r}; in {folder}")
    if "fisher" in shapes:
        m, n = (shapes.get(kind, (0,))[0] for kind in ("outputs", "inputs"))
        if len(shapes["fisher"]) != 2 or (m and n and shapes["fisher"] != (m, n)):
            raise UserError(f"fisher must be (m, n), got {shapes['fisher']} for {name[:200]!r}; in {folder}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"statistics must be a folder with {JSON_NAME}, got {path.parent}. Make one with flowra statistics."
        )
    try:
        return read_json_object(path, limit=MAX_JSON_BYTES)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names, dtypes and shapes of the tensors, and none of their values."""
    if not path.is_file():
        raise UserError(f"statistics must hold {TENSORS_NAME}, got none in {path.parent}")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            odd = [key for key, each in slices.items() if each.get_dtype() not in DTYPES]
            if odd:
                raise UserError(f"tensors must be floating point, got {odd[0][:200]!r} in {path}")
            return {key: tuple(each.get_shape()) for key, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} must be a whole safetensors file, got {' '.join(str(error)[:300].split())}") from None


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and all(
        kind in KINDS and isinstance(key, str) and key.startswith(f"{kind}/") for kind, key in entry.items()
    )


def _is_plain(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
