"""Tensors of safetensors files one at a time: read when they are asked for, written as they come.

The format: eight bytes with the length of a JSON header, the header with dtype, shape and place of every tensor, and
the tensors. What is asked of a header costs no reading of tensors.
"""

import ctypes
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["TensorFile", "write_tensors"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name; each is read when it is asked for, into memory of its own.

    Attributes:
        path: of the file.
        outlines: for each name, sorted, an empty tensor of its shape and dtype on the device ``meta``.
        metadata: the texts in the header.

    Raises:
        ValueError: if the file is damaged or holds a dtype that is not known; on reading, if it has changed since.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._stamp = _stamp(self.path)
            with safe_open(self.path, framework="pt") as file:
                self.metadata: Mapping[str, str] = file.metadata() or {}
                slices = {key: file.get_slice(key) for key in sorted(file.keys())}
                kinds = {key: (each.get_shape(), each.get_dtype()) for key, each in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} must be a whole safetensors file, got {error}") from None
        odd = sorted({dtype for _, dtype in kinds.values()} - DTYPES.keys())
        if odd:
            raise ValueError(f"tensors must be of a dtype in {sorted(DTYPES)}, got {odd} in {self.path}")
        self.outlines: Mapping[str, Tensor] = {
            key: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for key, (shape, dtype) in kinds.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, to the CPU."""
        if name not in self.outlines:
            raise KeyError(name)
        try:
            changed = _stamp(self.path) != self._stamp
        except OSError:
            changed = True
        if changed:
            raise ValueError(f"{self.path} must stay as it was when it was opened, got another. Read it again.")
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()  # what was read is a view of the mapped file, which would stay mapped

    def __iter__(self) -> Iterator[str]:
        """Go through the names, sorted."""
        return iter(self.outlines)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.outlines)


def write_tensors(
    path: Path, outlines: Mapping[str, Tensor], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, one tensor at a time; equal values give equal bytes.

    Args:
        path: of the file.
        outlines: for each name a tensor of its shape and dtype; it may be on the device ``meta``.
        read: gives the tensor of a name. Wide dtypes come first, so that every tensor lies on a multiple of its width;
            among those of one width the names are in order.
        metadata: texts for the header.

    Raises:
        ValueError: if a tensor is of a dtype that is not known here.
    """
    odd = sorted(name for name, each in outlines.items() if each.dtype not in NAMES)
    if odd:
        raise ValueError(f"tensors must be of a dtype in {sorted(DTYPES)}, got others for {odd}. Cast them first.")
    names = sorted(outlines, key=lambda name: (-outlines[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        one = outlines[name]
        begin, end = end, end + one.numel() * one.element_size()
        header[name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = read(name).detach().cpu().contiguous()
            if tensor.numel():
                size = tensor.numel() * tensor.element_size()
                file.write((ctypes.c_ubyte * size).from_address(tensor.data_ptr()))


def _stamp(path: Path) -> tuple[int, int, int]:
    """Tell one state of a file from another."""
    known = path.stat()
    return known.st_ino, known.st_size, known.st_mtime_ns
