"""Where a profile comes from: SHA-256 of the contents of model and data, and what else must be known of it.

A hash is taken of values, not of files: the same tensors give the same hash on every device, in every memory layout and
from every file format. Names, shapes, dtypes and bytes count; so does each bit, -0.0 differs from 0.0.

Numbers are hashed as this machine stores them; all machines that PyTorch is built for but s390x are little-endian.
"""

import ctypes
from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version

import torch
from torch import Tensor, nn

__all__ = ["base_hash", "data_hash", "provenance_of"]

CHUNK = 2**24
"""Elements that are copied to the CPU at a time, where they are elsewhere."""


def base_hash(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """Hash what a model's ``state_dict`` holds: parameters, buffers, and the scales of quantised weights.

    The order in which modules were registered does not matter; a tied weight counts under each of its names. What is
    no tensor does not count. The cost is one pass of SHA-256 over the bytes, and no second copy of the weights.

    Args:
        model: any; nothing of it is changed.
        without: modules left out with all inside them, such as a fresh head or adapters. By qualified name.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: if no tensor of the model lies in one of the modules to leave out.
    """
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    kept = tensors
    for left_out in without:
        kept = {name: value for name, value in kept.items() if not name.startswith(f"{left_out}.")}
        if not any(name.startswith(f"{left_out}.") for name in tensors):
            raise ValueError(f"without must name modules of the model that hold tensors, got {left_out!r}")
    known: dict[tuple[object, ...], bytes] = {}  # a tied weight is read once
    lines = []
    for name, value in sorted(kept.items()):
        place = (id(value),) if _has_parts(value) else (value.data_ptr(), value.dtype, value.shape, value.stride())
        if place not in known:
            known[place] = _tensor_digest(value)
        lines.append(_sized(name.encode()) + known[place])
    return sha256(b"".join(lines)).hexdigest()


def data_hash(batches: Iterable[object]) -> str:
    """Hash batches as they are given to a model: their tensors, in order, with the keys they go by.

    The same examples in another order or in batches of another size have another hash. The order of keys within a batch
    does not matter.

    Args:
        batches: each a tensor, or mappings and sequences of them in any depth; text, numbers and None may be among
            them.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: if a batch holds something else.
    """
    whole = sha256()
    for batch in batches:
        whole.update(_digest(batch))
    return whole.hexdigest()


def provenance_of(
    *, base: str, data: str, seed: int, examples: int, estimators: Sequence[str]
) -> dict[str, str | int | float]:
    """Put together what every profile should say of where it comes from, under the names that comparisons look for.

    Args:
        base: what :func:`base_hash` gives.
        data: what :func:`data_hash` gives.
        seed: that decided which examples were drawn and which random numbers.
        examples: how many.
        estimators: what was measured, in words.

    Returns:
        ``base_hash``, ``data_hash``, ``seed``, ``examples``, ``estimators`` (joined by ``; ``), and the versions
        ``flowra_analysis`` and ``torch``. For ``FlowProfile.provenance``, with anything else beside it.
    """
    return {
        "base_hash": base,
        "data_hash": data,
        "seed": seed,
        "examples": examples,
        "estimators": "; ".join(estimators),
        "flowra_analysis": version("flowra-analysis"),
        "torch": torch.__version__,
    }


def _digest(value: object) -> bytes:
    """Hash a batch or a part of it."""
    if isinstance(value, Tensor):
        return _tensor_digest(value)
    if value is None or isinstance(value, str | bytes | bool | int | float):
        return sha256(_sized(type(value).__name__.encode()) + repr(value).encode()).digest()
    if isinstance(value, Mapping):
        entries = sorted(_digest(key) + _digest(each) for key, each in value.items())
        return sha256(b"mapping" + b"".join(entries)).digest()
    if isinstance(value, Sequence):
        return sha256(b"sequence" + b"".join(map(_digest, value))).digest()
    raise TypeError(f"batches must hold tensors, text and numbers in mappings and sequences, got {type(value)}")


def _has_parts(tensor: Tensor) -> bool:
    """Tell whether a tensor is made of others, as torchao's quantised weights are."""
    return hasattr(tensor, "__tensor_flatten__")


def _tensor_digest(tensor: Tensor) -> bytes:
    """Hash dtype, shape and bytes."""
    made = sha256(_sized(str(tensor.dtype).encode()) + _sized(repr(tuple(tensor.shape)).encode()))
    if _has_parts(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        for name in sorted(names):
            made.update(_sized(name.encode()) + _tensor_digest(getattr(tensor, name)))
        return made.digest()
    dense = tensor.detach()
    if dense.layout is not torch.strided:
        dense = dense.to_dense()
    flat = dense.resolve_conj().resolve_neg().reshape(-1)
    for chunk in flat.split(CHUNK) if flat.numel() else ():
        here = chunk.cpu().contiguous()
        size = here.numel() * here.element_size()
        made.update((ctypes.c_char * size).from_address(here.data_ptr()))
    return made.digest()


def _sized(text: bytes) -> bytes:
    """Put the length before, so that what is joined can be told apart."""
    return len(text).to_bytes(8, "little") + text
