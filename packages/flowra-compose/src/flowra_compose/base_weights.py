"""The parameters of a base model by name, where an adapter means something only beside them (DoRA, trained biases)."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flowra_compose.whole_tensors import TensorFile

__all__ = ["Base", "BaseReader", "base_outline", "base_reader", "base_value", "base_weights", "check_has"]

Base = Mapping[str, Tensor] | Callable[[str], Tensor]
"""Gives a parameter of the base by its name in the model that was adapted, such as ``encoder.fc.weight``."""

BaseReader = Callable[[str, tuple[int, ...], bool], Tensor]
"""Gives a parameter of a shape by name; the last argument tells whether the base may keep it transposed."""

STEMS = ("model", "diffusion_pytorch_model")
MAX_INDEX_BYTES = 64 * 2**20


class _Shards(Mapping[str, Tensor]):
    """Tensors of several files, each read when it is asked for."""

    def __init__(self, files: Mapping[str, TensorFile]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def base_weights(folder: str | Path) -> Mapping[str, Tensor]:
    """Open the weights of a model in safetensors, of one file or of several by their index.

    Names are those in the files. A model that renames its weights on loading needs ``base=lambda name: weights[…]`` in
    :func:`read_adapter` instead.

    Args:
        folder: holds ``model.safetensors``, or ``model.safetensors.index.json`` and what it names; or the same with
            ``diffusion_pytorch_model``.

    Returns:
        Each tensor by name, read when it is asked for, on the CPU in the dtype of the file.

    Raises:
        ValueError: if there are no such files, or one is damaged.
    """
    folder = Path(folder)
    for stem in STEMS:
        whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _sharded(index)
        if whole.is_file():
            return TensorFile(whole)
    wanted = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    raise ValueError(f"folder must hold {wanted}, or its index, got {folder}. Save the model with safetensors.")


def base_reader(base: Base | None) -> BaseReader:
    """Return what reads parameters of a base as updates need them.

    Returns:
        A function which raises a ValueError if the base lacks the parameter, or has it in another shape.
    """

    def read(name: str, shape: tuple[int, ...], may_be_transposed: bool) -> Tensor:
        tensor = base_value(base, name)
        found = tuple(tensor.shape)
        if may_be_transposed and found == shape[::-1]:
            return tensor.T
        if found != shape or not tensor.is_floating_point():
            raise ValueError(
                f"base must hold {name!r} as a floating tensor {shape}, got {found} of {tensor.dtype}."
                " Give the base that was adapted, not quantised."
            )
        return tensor

    return read


def base_outline(name: str, shape: tuple[int, ...], may_be_transposed: bool) -> Tensor:
    """Return an empty tensor of the shape, on the device ``meta``: a base for those who ask for shapes only."""
    return torch.empty(shape, device="meta")


def check_has(base: Mapping[str, Tensor], name: str) -> None:
    """Refuse a base that lacks a parameter.

    Raises:
        ValueError: if it does.
    """
    if name not in base:
        raise ValueError(
            f"base must hold {name!r}, got {len(base)} tensors such as {sorted(base)[:3]}."
            " Give base=<function of the name> if it has other names there."
        )


def base_value(base: Base | None, name: str) -> Tensor:
    """Return a parameter of a base, on the CPU.

    Raises:
        ValueError: if there is no base, or it lacks the parameter.
    """
    if base is None:
        raise ValueError(f"base must be given for {name!r}, got none. Give base=base_weights(<folder of the model>).")
    if isinstance(base, Mapping):
        check_has(base, name)
        return base[name].detach().cpu()
    return base(name).detach().cpu()


def _sharded(index: Path) -> _Shards:
    size = index.stat().st_size
    if size > MAX_INDEX_BYTES:
        raise ValueError(f"index must be of at most {MAX_INDEX_BYTES} bytes, got {size}: {index}")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} must be JSON, got {error}") from None
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(each, str) for each in places.values()):
        raise ValueError(f"weight_map must give a file for each tensor, got {str(places)[:100]} in {index}")
    names = sorted(set(places.values()))
    odd = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if odd:
        raise ValueError(f"weight_map must name safetensors files beside it, got {odd[:3]} in {index}")
    files = {name: TensorFile(index.parent / name) for name in names}
    lost = [key for key, name in places.items() if key not in files[name]]
    if lost:
        raise ValueError(f"weight_map must say where each tensor lies, got a file without {lost[:3]} in {index}")
    return _Shards({key: files[name] for key, name in places.items()})
