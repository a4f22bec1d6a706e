"""A statistic's state as one safetensors file: what was measured so far can be kept, moved, merged and gone on with.

A state is a frozen dataclass of numbers, strings, dtypes and tensors, and of mappings, tuples, NamedTuples and
dataclasses of such. The tensors are those of the file, numbered; the rest is a JSON tree in its metadata, where a
tensor is its number. A tensor that occurs more than once, such as probes that modules share, is written once, and is
one tensor again when read. The order in which the axes of a tensor lie in memory is kept, for products depend on it in
their last bits. What a file may hold is said by the type hints of the state's class alone: no name in a file
chooses code.
"""

import json
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowra_analysis.activation_spectra import ActivationSpectra
from flowra_analysis.diagonal_fisher import DiagonalFisher
from flowra_analysis.ekfac import EKFAC, Basis
from flowra_analysis.empirical_fisher import Moments
from flowra_analysis.flow_spectrum import GradientSum
from flowra_analysis.gradient_spectrum import CORE_FACTOR, NUM_CHECKS, GradientSketch
from flowra_analysis.second_moments import SecondMoment
from flowra_analysis.whole_files import replacing

__all__ = ["read_state", "state_from_bytes", "state_to_bytes", "write_state"]

FORMAT_VERSION = 1
METADATA_KEY = "flowra_state"
MAX_JSON_BYTES = 64 * 2**20
MAX_INTEGER = 2**63 - 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
}

State = TypeVar("State")
Node = TypeVar("Node")


def write_state(state: object, path: str | Path) -> None:
    """Write a state to a file, under a temporary name that is then changed.

    Args:
        state: such as :class:`EmpiricalFisher` or :class:`GradientSpectra`, or a frozen dataclass of one's own, of
            numbers, strings, dtypes, tensors, mappings from strings, tuples, NamedTuples and dataclasses, as the type
            hints of their fields say. Its tensors may be on any device.
        path: of the file, by custom ``….safetensors``; its folder is created if missing.

    Raises:
        TypeError: if a field is of none of these types.
        ValueError: if a value is not one that :func:`read_state` takes, such as NaN.

    >>> import tempfile
    >>> from flowra_analysis import EmpiricalFisher
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_state(EmpiricalFisher.init(), f"{folder}/fisher.safetensors")
    ...     read_state(f"{folder}/fisher.safetensors", EmpiricalFisher)
    EmpiricalFisher(moments={})
    """
    text, tensors = _encoded(state)
    with replacing(Path(path)) as (partial,):
        safetensors.torch.save_file(tensors, partial, metadata={METADATA_KEY: text})


def read_state(path: str | Path, kind: type[State], *, device: torch.device | str = "cpu") -> State:
    """Read what :func:`write_state` wrote.

    Args:
        path: of the file.
        kind: the class that it must hold, such as :class:`EmpiricalFisher`.
        device: where the tensors shall be, that of the layers that go on being measured.

    Returns:
        The state that was written, to the bit. Measuring goes on with it as if it had never been written.

    Raises:
        ValueError: if the file is missing, damaged or of another version, holds another class, lacks a field or has an
            unknown one, or a value is not one that the class can hold (a wrong type, dtype or shape, NaN, infinity).
        TypeError: if a field of the kind is of a type that no file can hold.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path must be a file, got {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = Tensors(set(file.keys()), lambda name: file.get_tensor(name).to(device, copy=True))
            return _decoded(text, tensors, kind)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got {error}") from None
    except ValueError as error:
        raise ValueError(f"{error}; in {path}") from None


def state_to_bytes(state: object) -> bytes:
    """Return what :func:`write_state` would write.

    Raises:
        TypeError: as :func:`write_state`.
        ValueError: as :func:`write_state`.
    """
    text, tensors = _encoded(state)
    return safetensors.torch.save(tensors, metadata={METADATA_KEY: text})


def state_from_bytes(data: bytes, kind: type[State], *, device: torch.device | str = "cpu") -> State:
    """Return the state that :func:`state_to_bytes` was given.

    Raises:
        TypeError: as :func:`read_state`.
        ValueError: as :func:`read_state`.
    """
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"data must be a whole safetensors file, got {error}") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # as the format says; load has checked it
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    return _decoded(text, Tensors(set(tensors), lambda name: tensors[name].to(device, copy=True)), kind)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of a file, each loaded when it is first asked for."""

    names: set[str]
    load: Callable[[str], Tensor]
    """Gives a tensor memory of its own, aligned as that of any other: products are then the same to the bit."""
    axes: dict[str, list[int]] = field(default_factory=dict)
    """Name to where each axis of the file's tensor belongs, for those that did not lie row by row."""
    loaded: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise ValueError(f"tensors must be in the file, got no {short_repr(name)}")
        if name not in self.loaded:
            tensor = self.load(name)
            _check_type(tensor)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"tensors must be finite, got NaN or infinity in one of {tuple(tensor.shape)}")
            axes = self.axes.get(name, [*range(tensor.ndim)])
            if sorted(axes) != [*range(tensor.ndim)]:
                raise ValueError(f"axes must be those of the tensor, got {short_repr(axes)} for {tuple(tensor.shape)}")
            self.loaded[name] = tensor.permute([axes.index(axis) for axis in range(tensor.ndim)])
        return self.loaded[name]


def _encoded(state: object) -> tuple[str, dict[str, Tensor]]:
    """Return the JSON text and the tensors, copies on the CPU; what could not be read again is an error."""
    numbers: dict[tuple[object, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    axes: dict[str, list[int]] = {}

    def number(tensor: Tensor) -> str:
        _check_type(tensor)
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        key = (*place, tensor.dtype, tensor.device)
        if key not in numbers:
            name = numbers[key] = str(len(numbers))
            tensors[name] = tensor.detach()
            strides = tensor.stride()
            order = sorted(range(tensor.ndim), key=lambda axis: -strides[axis])
            if not tensor.is_contiguous() and tensor.permute(order).is_contiguous():
                tensors[name], axes[name] = tensors[name].permute(order), order
        return numbers[key]

    kind = type(state)
    if not _is_structure(kind):
        raise TypeError(f"state must be a frozen dataclass, got {kind.__name__}")
    tree = {
        "format_version": FORMAT_VERSION,
        "class": kind.__qualname__,
        "state": _encode(state, number, "state"),
        "axes": axes,
    }
    try:
        text = json.dumps(tree, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise ValueError("numbers of a state must be finite, got NaN or infinity") from None
    _decoded(text, Tensors(set(tensors), tensors.__getitem__), kind)
    return text, {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _encode(value: object, number: Callable[[Tensor], str], where: str) -> object:
    """Turn a value into JSON, which asks for the number of each tensor."""
    if isinstance(value, Tensor):
        return {"tensor": number(value)}
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"keys of mappings in a state must be strings, got others; at {where}")
        return {key: _encode(each, number, f"{where}[{key!r}]") for key, each in value.items()}
    if isinstance(value, tuple) and not _is_structure(type(value)):
        return [_encode(each, number, f"{where}[{index}]") for index, each in enumerate(value)]
    if _is_structure(type(value)):
        names = _field_types(type(value))
        return {name: _encode(getattr(value, name), number, f"{where}.{name}") for name in names}
    raise TypeError(
        "values in a state must be numbers, strings, dtypes, tensors, mappings, tuples, NamedTuples or frozen"
        f" dataclasses, got {type(value).__name__}; at {where}"
    )


def _decoded(text: str | None, tensors: Tensors, kind: type[State]) -> State:
    """Return the state of a JSON text; every tensor must have its place in it."""
    if text is None:
        raise ValueError(f"metadata must hold {METADATA_KEY!r}, got none: no file of a state")
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{METADATA_KEY!r} must be at most {MAX_JSON_BYTES} characters, got {len(text)}")
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError(f"{METADATA_KEY!r} must be JSON of a state, got one that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{METADATA_KEY!r} must be JSON, got {error}") from None
    content = _object(content, {"format_version", "class", "state", "axes"}, METADATA_KEY)
    version, name = content["format_version"], content["class"]
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise ValueError(f"format_version must be {FORMAT_VERSION}, got {short_repr(version)}")
    if name != kind.__qualname__:
        raise ValueError(f"class must be {kind.__qualname__!r}, got {short_repr(name)}")
    for key, axes in _expect(content["axes"], dict, "an object", "axes").items():
        tensors.axes[key] = [_expect(axis, int, "int", "axes") for axis in _expect(axes, list, "an array", "axes")]
    state = _decode_structure(content["state"], kind, tensors, "state")
    unused = tensors.names - tensors.loaded.keys()
    if unused:
        raise ValueError(
            f"tensors must have a place in the state, got {len(unused)} without, {short_repr(min(unused))}"
        )
    return state


def _decode(node: object, hint: object, tensors: Tensors, where: str) -> object:
    """Turn JSON into the value of a type hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return _decode_union(node, arguments, tensors, where)
    if hint is Tensor:
        return tensors[_expect(_object(node, {"tensor"}, where)["tensor"], str, "str", where)]
    if origin is Mapping or origin is dict:
        if arguments[0] is not str:
            raise TypeError(f"keys of mappings in a state must be strings, got {hint}; at {where}")
        entries: dict[str, object] = _expect(node, dict, "an object", where)
        return {key: _decode(each, arguments[1], tensors, f"{where}[{key!r}]") for key, each in entries.items()}
    if origin is tuple:
        items: list[object] = _expect(node, list, "an array", where)
        hints = [arguments[0]] * len(items) if arguments[1:] == (...,) else list(arguments)
        if len(items) != len(hints):
            raise ValueError(f"values must have {len(hints)} items, got {len(items)}; at {where}")
        places = enumerate(zip(items, hints, strict=True))
        return tuple(_decode(item, each, tensors, f"{where}[{index}]") for index, (item, each) in places)
    if _is_structure(hint):
        return _decode_structure(node, hint, tensors, where)
    return _decode_plain(node, hint, where)


def _decode_plain(node: object, hint: object, where: str) -> object:
    """Turn JSON that is neither an object nor an array into a value."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if not any(node == choice and type(node) is type(choice) for choice in choices):
            raise ValueError(f"values must be one of {choices}, got {short_repr(node)}; at {where}")
        return node
    if hint is torch.dtype:
        if not isinstance(node, str) or node not in DTYPES:
            raise ValueError(f"dtypes must be one of {[*DTYPES]}, got {short_repr(node)}; at {where}")
        return DTYPES[node]
    if isinstance(node, int) and abs(node) > MAX_INTEGER:
        raise ValueError(f"whole numbers must be of 64 bits, got {short_repr(node)}; at {where}")
    if hint is float:
        value = float(_expect(node, int if type(node) is int else float, "a number", where))
        if not math.isfinite(value):
            raise ValueError(f"numbers must be finite, got {value}; at {where}")
        return value
    if isinstance(hint, type) and hint in {bool, int, str, types.NoneType}:
        return _expect(node, hint, "null" if hint is types.NoneType else hint.__name__, where)
    raise TypeError(f"fields of a state must be of a type that a file can hold, got {hint}; at {where}")


def _decode_union(node: object, hints: Iterable[object], tensors: Tensors, where: str) -> object:
    """Take the first of several types that fits."""
    problems = []
    for hint in hints:
        try:
            return _decode(node, hint, tensors, where)
        except ValueError as error:
            problems.append(error)
    raise problems[0]


def _decode_structure(node: object, kind: type[State], tensors: Tensors, where: str) -> State:
    """Turn a JSON object into a dataclass, which may check itself when it is made, or a NamedTuple."""
    hints = _field_types(kind)
    content = _object(node, hints.keys(), where)
    values = {name: _decode(content[name], hint, tensors, f"{where}.{name}") for name, hint in hints.items()}
    try:
        value = kind(**values)
        _check(value)
    except ValueError as error:
        raise ValueError(f"{error}; at {where}") from None
    return value


def _check(value: object) -> None:
    """Check that the parts of a value fit together: what else would come out where it is used."""
    match value:
        case Moments(num_examples, mean, squares):
            if num_examples < 1 or mean < 0 or squares < 0:
                raise ValueError(f"moments must be of at least one example and ≥ 0, got {tuple(value)}")
        case GradientSketch(shape=(m, n), size=k):
            s, p = CORE_FACTOR * k, NUM_CHECKS
            if not 1 <= k <= min(m, n) or value.num_examples < 0:
                raise ValueError(f"size must be in [1, {min(m, n)}], got {k}, of {value.num_examples} examples")
            shapes = [(k, m), (k, n), (s, m), (s, n), (p, m), (k, n), (m, k), (s, s), (p, n)]
            _check_shapes([*value.probes, *value.sums], shapes)
        case SecondMoment(probes=probes, sums=sums, squares=squares):
            if squares.ndim not in {1, 2} or value.count < 0 or (sums is None and probes is not None):
                raise ValueError(f"squares must be (d,) or (G, d), got {tuple(squares.shape)} of {value.count} vectors")
            _check_squares(squares)
            size = squares.shape[-1]
            columns = size if probes is None else probes.shape[-1]
            parts: list[tuple[Tensor | None, tuple[int, ...]]] = [
                (squares, tuple(squares.shape)),
                (sums, (*squares.shape, columns)),
                (probes, (size, columns)),
            ]
            there = [(tensor, shape) for tensor, shape in parts if tensor is not None]
            _check_shapes([tensor for tensor, _ in there], [shape for _, shape in there])
        case GradientSum(num_examples=count, sum=total):
            if count < 1 or total.ndim != 2:
                raise ValueError(f"sums must be (m, n) of at least one example, got {tuple(total.shape)} of {count}")
            _check_shapes([total], [tuple(total.shape)])
        case DiagonalFisher(sums=by_module):
            for total in by_module.values():
                _check_squares(total)
        case ActivationSpectra(keys=keys, moments=moments):
            if set(keys.values()) != set(moments):
                raise ValueError(
                    f"keys must be those of the moments, got {short_repr(keys)} for {len(moments)} moments"
                )
        case EKFAC(bases=bases, sums=by_module, counts=counts):
            if not bases.keys() == by_module.keys() == counts.keys():
                raise ValueError(f"bases, sums and counts must be of the same modules, got {short_repr([*bases])}")
            for name, basis in bases.items():
                _check_corrected(basis, by_module[name], counts[name])


def _check_corrected(basis: Basis, sums: Tensor, count: int) -> None:
    """Check the bases of one layer beside what was summed in them."""
    if sums.ndim not in {2, 3} or count < 0:
        raise ValueError(f"sums must be (m, n) or (G, m/G, n), got {tuple(sums.shape)} of {count} examples")
    *groups, m, n = sums.shape
    sizes = [(basis.inputs, n), (basis.gradients, m)]
    there = [(each, (*groups, size, size)) for each, size in sizes if each is not None]
    _check_shapes([sums, *(each for each, _ in there)], [(*groups, m, n), *(shape for _, shape in there)])
    _check_squares(sums)


def _check_squares(sums: Tensor) -> None:
    if (sums < 0).any():
        raise ValueError(f"sums of squares must be ≥ 0, got {float(sums.min())}")


def _check_shapes(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    found = [tuple(each.shape) for each in tensors]
    if found != shapes:
        raise ValueError(f"tensors must have shapes {shapes}, got {found}")
    if {each.dtype for each in tensors} not in ({torch.float32}, {torch.float64}):
        raise ValueError(f"tensors must be of torch.float32 or torch.float64, got {[each.dtype for each in tensors]}")


def _check_type(tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.dtype not in DTYPES.values():
        raise ValueError(f"tensors must be dense and of dtypes {[*DTYPES]}, got {tensor.layout} {tensor.dtype}")


def _is_structure(kind: object) -> TypeGuard[type[Any]]:
    return isinstance(kind, type) and (is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields")))


def _field_types(kind: type[Any]) -> dict[str, Any]:
    names = [each.name for each in fields(kind)] if is_dataclass(kind) else [*getattr(kind, "_fields", ())]
    hints = get_type_hints(kind)
    return {name: hints[name] for name in names}


def _object(node: object, keys: Iterable[str], where: str) -> dict[str, Any]:
    content: dict[str, Any] = _expect(node, dict, "an object", where)
    missing, unknown = sorted(set(keys) - content.keys()), sorted(content.keys() - set(keys))
    if missing or unknown:
        raise ValueError(
            f"keys must be {sorted(keys)}, got missing {missing} and unknown {short_repr(unknown)}; at {where}"
        )
    return content


def _expect(node: object, kind: type[Node], name: str, where: str) -> Node:
    if not isinstance(node, kind) or type(node) is not kind:  # True is an int
        raise ValueError(f"values must be {name}, got {short_repr(node)}; at {where}")
    return node


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError(f"a key twice among {short_repr(sorted(key for key, _ in pairs))}")
    return content
