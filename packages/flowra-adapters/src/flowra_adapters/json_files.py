"""Reading configuration files that anyone may have written."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["read_json_object", "read_tensors"]

MAX_CONFIG_BYTES = 16 * 2**20
MAX_AXES = 64  # PyTorch holds more, but cannot calculate with them
MAX_NAME = 500  # characters; names appear in messages, and patterns are matched with them


def read_json_object(path: Path, *, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object of bounded size, in which no key stands twice.

    Args:
        path: of the file.
        limit: largest size in bytes.

    Returns:
        The object.

    Raises:
        ValueError: if the file is missing, too large, or anything else.
    """
    if not path.is_file():
        raise ValueError(f"adapter must be a folder with {path.name}, got {path.parent}")
    if path.stat().st_size > limit:
        raise ValueError(f"{path.name} must be at most {limit} bytes, got {path.stat().st_size}; in {path.parent}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice: readers differ on which one counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {double[:100]!r} twice")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Returns:
        Name to tensor.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    if not path.is_file():
        others = sorted(each.name for each in path.parent.glob("*") if each.suffix in PICKLES)
        hint = f" Found {others[0]}: pickles are never opened; convert it to safetensors." if others else ""
        raise ValueError(f"adapter must hold {path.name}, got none in {path.parent}.{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            long = [key for key in names if len(key) > MAX_NAME]
            if long:
                raise ValueError(f"names must have at most {MAX_NAME} characters, got {long[0][:100]!r}… in {path}")
            deep = [key for key in names if len(file.get_slice(key).get_shape()) > MAX_AXES]
            if deep:
                raise ValueError(f"tensors must have at most {MAX_AXES} axes, got more in {deep[0][:200]!r} in {path}")
            # In memory of its own: the file's may change under the model, and is not aligned, which changes products.
            return {key: file.get_tensor(key).clone() for key in names}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error)[:300].split())
        raise ValueError(f"{path} must be a whole safetensors file, got {reason}") from None


PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
