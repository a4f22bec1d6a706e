"""Flowra's own pair of files, for every method: ``flowra_config.json`` and ``flowra_model.safetensors``.

PEFT has no word for Tucker updates, offsets of norms, free slots, residual starts, adapters of rank 0, or a rank for
each part of a fused projection. Here each site is kept as it is: the method, the values it was made with, and its
tensors, so that what is read is bit by bit what was written.
"""

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter
from flowra_adapters.attach import adapters, attach
from flowra_adapters.checkpoint import DTYPES, check_saved, is_odd, own_copy
from flowra_adapters.json_files import read_json_object, read_tensors
from flowra_adapters.methods import METHODS, AdapterMethod
from flowra_adapters.sites import Site, sites

__all__ = ["FLOWRA_CONFIG_NAME", "FLOWRA_TENSORS_NAME", "flowra_content", "load_flowra_files"]

FLOWRA_CONFIG_NAME = "flowra_config.json"
FLOWRA_TENSORS_NAME = "flowra_model.safetensors"
FORMAT_VERSION = 1
KEYS = {"format_version", "base_model_name_or_path", "task_type", "modules_to_save", "sites"}
SITE_KEYS = {"method", "rank", "scaling", "dropout", "dtype", "arguments"}
GIVEN = ("operator", "rank", "scaling", "dropout", "dtype", "generator")


def flowra_content(
    model: nn.Module,
    *,
    adapter: str = "default",
    modules_to_save: Iterable[str] = (),
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    methods: Iterable[AdapterMethod] = (),
) -> tuple[dict[str, Tensor], str]:
    """Return the content of both files: tensors by name, and the configuration's text.

    Raises:
        ValueError: if no such adapter is attached, one is of a method that is not known, or a tensor is not finite.
    """
    known, places = _known(methods), sites(model)
    entries: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, one in adapters(model, adapter).items():
        row = _row_of(one, places[name], known, name)
        own = {key: tensor for key, tensor in one.state_dict().items() if tensor is not None}
        entries[name] = {
            "method": row.name,
            "rank": one.rank,
            "scaling": one.scaling,
            "dropout": getattr(one, "dropout", 0.0),
            "dtype": _dtype_name(next((each.dtype for each in one.parameters()), torch.float32)),
            "arguments": {key: _encoded(getattr(one, key)) for key in _extra(row) if hasattr(one, key)},
        }
        tensors |= {f"site/{name}/{key}": own_copy(tensor) for key, tensor in own.items()}
    trained = sorted(modules_to_save)
    for module_name in trained:
        for key, tensor in model.get_submodule(module_name).state_dict().items():
            tensors[f"saved/{module_name}.{key}"] = own_copy(tensor)
    _refuse_infinite(tensors)
    config = {
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
        "modules_to_save": trained,
        "sites": entries,
    }
    return dict(sorted(tensors.items())), json.dumps(config, indent=2, sort_keys=True) + "\n"


def load_flowra_files(
    model: nn.Module, folder: Path, *, adapter: str = "default", methods: Iterable[AdapterMethod] = ()
) -> dict[str, Adapter]:
    """Attach what Flowra's pair holds to a model, and load the modules trained in full into its own.

    Args:
        model: changed in place; left as it was if anything does not fit.
        folder: holds both files.
        adapter: name for the attached set.
        methods: methods of your own that the file may name.

    Returns:
        The attached adapters by site name.

    Raises:
        ValueError: if the files are damaged, or anything does not fit or has no place in this model.
    """
    config = _checked(read_json_object(folder / FLOWRA_CONFIG_NAME), folder)
    tensors = read_tensors(folder / FLOWRA_TENSORS_NAME)
    _refuse_infinite(tensors)
    known, places = _known(methods), sites(model)
    made: dict[str, Adapter] = {}
    for name, entry in config["sites"].items():
        if name not in places:
            raise ValueError(f"adapter must fit the model, got one for {name[:200]!r}, no site of it; in {folder}")
        try:
            made[name] = _made(places[name], name, entry, known, tensors)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{error}; for {name!r} in {folder}") from None
    state = model.state_dict()
    saved = {key.removeprefix("saved/"): tensors.pop(key) for key in list(tensors) if key.startswith("saved/")}
    for key, tensor in saved.items():
        check_saved(key, tensor, state)
        if not any(key.startswith(f"{module}.") for module in config["modules_to_save"]):
            raise ValueError(f"tensors must belong to a site or to modules_to_save, got {key!r} in {folder}")
    if tensors:
        raise ValueError(
            f"tensors must belong to a site or to modules_to_save, got {next(iter(tensors))!r} in {folder}"
        )
    # attach asks for the adapters in the order of the model's sites.
    order = iter([made[name] for name in places if name in made])
    ready = AdapterMethod(name="as saved", adapter=lambda *_, **__: next(order), scaling=None, adapts=lambda _: True)
    ranks = {name: one.rank for name, one in made.items()}
    attached = attach(model, ranks, method=ready, modules_to_save=config["modules_to_save"], adapter=adapter)
    with torch.no_grad():
        for key, tensor in saved.items():
            state[key].copy_(tensor)
    return attached


def _known(methods: Iterable[AdapterMethod]) -> dict[str, AdapterMethod]:
    return {**METHODS, **{row.name: row for row in methods}}


def _row_of(one: Adapter, site: Site, known: Mapping[str, AdapterMethod], name: str) -> AdapterMethod:
    """Find the method that makes adapters of this class, or the nearest class above it, for such a site."""
    fitting = [row for row in known.values() if isinstance(one, _kind(row)) and row.adapts(site)]
    if not fitting:
        raise ValueError(
            f"adapter must be of a known method, got {type(one).__name__} at {name!r}. Give your own to methods."
        )
    return max(fitting, key=lambda row: len(_kind(row).__mro__))


def _maker(row: AdapterMethod) -> Callable[..., Adapter]:
    """Return what makes the adapters of a method, without arguments that are bound to it."""
    maker: Callable[..., Adapter] = getattr(row.adapter, "func", row.adapter)
    return maker


def _kind(row: AdapterMethod) -> type[Adapter]:
    """Return the class that a method makes."""
    maker = _maker(row)
    kind: type[Adapter] = maker if isinstance(maker, type) else get_type_hints(maker).get("return", type(None))
    return kind


def _extra(row: AdapterMethod) -> list[str]:
    """Name the arguments that only this method has; those that it does not keep matter at birth alone."""
    return [name for name in inspect.signature(_maker(row)).parameters if name not in GIVEN]


def _encoded(value: Any) -> Any:  # noqa: ANN401 - any argument
    """Write an argument as JSON: a dataclass of plain values as an object."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


PLAIN = (int, str, bool, type(None))


def _decoded(key: str, value: Any, hint: Any) -> Any:  # noqa: ANN401 - any argument
    """Turn JSON into an argument of the type that the method asks for."""
    kinds = get_args(hint) or (hint,)
    for kind in kinds:
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            hints = get_type_hints(kind)
            if not isinstance(value, dict) or value.keys() != hints.keys():
                raise ValueError(f"{key} must be an object with the keys {sorted(hints)}, got {repr(value)[:100]}")
            return kind(**{name: _decoded(name, each, hints[name]) for name, each in value.items()})
    if all(kind in PLAIN for kind in kinds) and type(value) not in kinds:
        raise ValueError(f"{key} must be {' or '.join(kind.__name__ for kind in kinds)}, got {repr(value)[:100]}")
    return value


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"format_version must be {FORMAT_VERSION}, got {repr(config.get('format_version'))[:40]} in {folder}. Read"
            " it with the Flowra that wrote it."
        )
    if config.keys() != KEYS:
        raise ValueError(
            f"{FLOWRA_CONFIG_NAME} must have the keys {sorted(KEYS)}, got {str(sorted(config))[:200]} in {folder}"
        )
    if not isinstance(config["sites"], dict) or not config["sites"]:
        raise ValueError(f"sites must be an object that names at least one site, got {repr(config['sites'])[:40]}")
    trained = config["modules_to_save"]
    if not isinstance(trained, list) or not all(isinstance(name, str) and name for name in trained):
        raise ValueError(f"modules_to_save must be names, got {repr(trained)[:200]} in {folder}")
    return config


def _made(
    site: Site, name: str, entry: object, known: Mapping[str, AdapterMethod], tensors: dict[str, Tensor]
) -> Adapter:
    """Make one adapter and install its tensors, which are taken out of ``tensors``."""
    if not isinstance(entry, dict) or entry.keys() != SITE_KEYS or not isinstance(entry["arguments"], dict):
        raise ValueError(f"a site must have the keys {sorted(SITE_KEYS)}, got {repr(entry)[:100]}")
    row = known.get(entry["method"]) if isinstance(entry["method"], str) else None
    if row is None:
        raise ValueError(f"method must be one of {sorted(known)}, got {str(entry['method'])[:40]!r}")
    if not row.adapts(site):
        raise ValueError(f"method must be one that adapts such a parameter, got {row.name!r}")
    dtype = {_dtype_name(each): each for each in DTYPES}.get(str(entry["dtype"]))
    numbers = (entry["scaling"], entry["dropout"])
    if isinstance(entry["rank"], bool) or not isinstance(entry["rank"], int) or dtype is None:
        raise ValueError(f"rank and dtype must be a whole number and one of floating point, got {repr(entry)[:100]}")
    if not all(_is_finite(each) for each in numbers):
        raise ValueError(f"scaling and dropout must be finite numbers, got {str(numbers)[:100]}")
    unknown = sorted(entry["arguments"].keys() - set(_extra(row)))
    if unknown:
        raise ValueError(f"arguments must be those of {row.name!r}, {_extra(row)}, got {unknown[0][:40]!r}")
    hints = get_type_hints(_maker(row).__init__ if isinstance(_maker(row), type) else _maker(row))
    arguments = {key: _decoded(key, value, hints.get(key)) for key, value in entry["arguments"].items()}
    one = _maker(row)(
        site.operator,
        rank=entry["rank"],
        scaling=float(entry["scaling"]),
        dropout=float(entry["dropout"]),
        dtype=dtype,
        generator=torch.Generator().manual_seed(0),
        **arguments,
    )
    one.placed(lambda: torch.zeros(site.operator.shape))  # now it has all that it has on a site
    prefix = f"site/{name}"
    own = {key.rpartition("/")[2]: tensors.pop(key) for key in list(tensors) if key.rpartition("/")[0] == prefix}
    _install(one, own)
    if one.rank != entry["rank"]:
        raise ValueError(f"rank must be that of the tensors, {one.rank}, got {entry['rank']}")
    return one


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _install(one: Adapter, own: Mapping[str, Tensor]) -> None:
    """Put the tensors of a file into an adapter: as Parameters and buffers of their dtypes, where it has such."""
    born = one.state_dict()
    missing = sorted(born.keys() - own.keys())
    if missing:
        raise ValueError(f"tensors must be all of the adapter's, got none called {missing[0]!r}")
    absent = {key for key, buffer in one._buffers.items() if buffer is None}
    late = own.keys() & absent
    if late and late != absent:
        raise ValueError(f"tensors must be all of {sorted(absent)} or none, got {sorted(late)}")
    for key, tensor in own.items():
        path, _, leaf = key.rpartition(".")
        holder = one.get_submodule(path) if not path or path in dict(one.named_modules()) else nn.Module()
        trained, kept = leaf in holder._parameters, leaf in holder._buffers
        if not (trained or kept):
            raise ValueError(f"tensors must be the adapter's, {sorted(born)}, got {key[:100]!r}")
        if key in born and born[key].shape != tensor.shape:
            raise ValueError(f"{key} must have shape {tuple(born[key].shape)}, got {tuple(tensor.shape)}")
        plain = tensor.dtype in DTYPES if key not in born or born[key].is_floating_point() else False
        if not plain and (key not in born or tensor.dtype != born[key].dtype):
            raise ValueError(f"{key} must be floating point of ≥ 16 bits, or what it was, got {tensor.dtype}")
        if trained:
            holder._parameters[leaf] = nn.Parameter(tensor)
        else:
            holder._buffers[leaf] = tensor
    matrices = {each.dtype for each in own.values() if each.is_floating_point() and each.ndim > 1}
    if len(matrices) > 1:
        raise ValueError(f"tensors of two axes and more must have one dtype, got {sorted(map(str, matrices))}")
    if late:
        _check_late(one)


def _check_late(one: Adapter) -> None:
    """Check tensors that an adapter is not born with, by their use."""
    m, size = one.operator.shape[0], one.operator.shape
    weight = torch.zeros(size) if one.reads_base else None
    try:
        fits = one.delta_weight(weight).shape == size
    except RuntimeError as error:
        raise ValueError(f"tensors must fit a weight {size} of {m} rows, got {str(error)[:100]}") from None
    if not fits:
        raise ValueError(f"tensors must fit a weight {size}, got an update of another shape")


def _refuse_infinite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not is_odd(tensor) and not torch.isfinite(tensor).all():
            raise ValueError(f"tensors must be finite, got NaN or infinity in {key[:200]!r}")
