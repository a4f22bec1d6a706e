"""One short text for everything that a result depends on."""

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

from torch import Tensor

__all__ = ["fingerprint"]


def fingerprint(*values: object) -> str:
    """Return the SHA-256 of values, in hexadecimal digits: other values have another.

    Args:
        values: numbers, texts, None, tensors, dataclasses, and mappings and sequences of them; a path stands for the
            content of its file. Mappings are read in the order of their keys, one value at a time.

    Raises:
        TypeError: if a value is none of these.
    """
    digest = hashlib.sha256()
    for piece in values:
        digest.update(_digest(piece))
    return digest.hexdigest()


def _digest(value: object) -> bytes:
    digest = hashlib.sha256(f"{type(value).__name__}:".encode())
    if value is None or isinstance(value, bool | int | float | str):
        digest.update(repr(value).encode())
    elif isinstance(value, Path):
        with value.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    elif isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            size = tensor.numel() * tensor.element_size()
            digest.update((ctypes.c_ubyte * size).from_address(tensor.data_ptr()))
    elif is_dataclass(value):
        for each in fields(value):
            digest.update(_digest(each.name) + _digest(getattr(value, each.name)))
    elif isinstance(value, Mapping):
        digest = hashlib.sha256(b"mapping:")
        for key in sorted(value):
            digest.update(_digest(key) + _digest(value[key]))
    elif isinstance(value, Sequence):
        digest = hashlib.sha256(b"sequence:")
        for each in value:
            digest.update(_digest(each))
    else:
        raise TypeError(f"values must be plain, tensors, paths or made of them, got {type(value).__name__}")
    return digest.digest()
