"""The state of a refinement as files without pickle (docs/formats/refinement_state.md)."""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from flowra_allocation.growth import PROBES, SIZE, SUMS
from flowra_allocation.rank_history import RankEvent, RankHistory
from flowra_allocation.refinement_state import Form, LayerForm, RefinementState
from flowra_allocation.whole_files import replacing

__all__ = ["FILES", "read_refinement_state", "write_refinement_state"]

FILES = ("refinement_state.safetensors", "refinement_state.json")
"""In the order in which they come to be: where the second is, the state is whole."""
MAX_JSON_BYTES = 256 * 2**20
"""What is read at most, and so written at most: about 20,000 events of 224 modules."""


def write_refinement_state(state: RefinementState, folder: str | Path) -> None:
    """Write ``refinement_state.safetensors`` and ``refinement_state.json``, both or none; equal states, equal bytes.

    Raises:
        ValueError: if the history of events is longer than what would be read again.
    """
    history = state.history.as_json()
    del history["seconds"]  # files of a run do not depend on the machine's speed
    content: dict[str, Any] = {
        "format_version": state.format_version,
        "step": state.step,
        "seed": state.seed,
        "loss": state.loss,
        "layers": {name: asdict(form) for name, form in state.layers.items()},
        "history": history,
        "policy_state": list(state.policy),
        "processes": len(state.watched),
    }
    tensors = {name: each.detach().to("cpu", copy=True).contiguous() for name, each in _tensors(state).items()}
    paths = [Path(folder) / name for name in FILES]
    with replacing(*paths) as (tensors_file, json_file):
        safetensors.torch.save_file(dict(sorted(tensors.items())), tensors_file)
        content["sha256"] = _sha256(tensors_file)
        text = json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n"
        if len(text.encode()) > MAX_JSON_BYTES:
            raise ValueError(
                f"refinement state must be at most {MAX_JSON_BYTES} bytes, so that it can be read again, got"
                f" {len(text.encode())} after {len(state.history.events)} events. Let rank move less often."
            )
        json_file.write_text(text, encoding="utf-8")


def _tensors(state: RefinementState) -> dict[str, Tensor]:
    """Name every tensor; what sketches are made with is the same in every process and kept once."""
    tensors = {f"policy/{key}": each for key, each in state.policy.items()}
    for name, (mask, order) in state.slots.items():
        tensors |= {f"mask/{name}": mask, f"order/{name}": order}
    for process, gathered in enumerate(state.watched):
        for name, parts in gathered.items():
            tensors |= {
                f"{part}/{name}" if part in PROBES else f"{part}/{process}/{name}": parts[part] for part in parts
            }
    return tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_refinement_state(folder: str | Path) -> RefinementState:
    """Read what :func:`write_refinement_state` wrote.

    Returns:
        The state, checked in itself, on the CPU.

    Raises:
        ValueError: if a file is missing, damaged or of another version, the two do not belong together, a key or tensor
            is missing or unknown, or a value is not one that a refinement can have (a shape, NaN, a rank too large).
    """
    tensors_file, json_file = (Path(folder) / name for name in FILES)
    try:
        if json_file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"at most {MAX_JSON_BYTES} bytes are read, got {json_file.stat().st_size}")
        content = json.loads(json_file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        version = content["format_version"] if isinstance(content, dict) else None
        if type(version) is not int or version != RefinementState.format_version:
            raise ValueError(f"format_version must be {RefinementState.format_version}, got {version!r}")
        if _sha256(tensors_file) != content.get("sha256"):
            raise ValueError(f"sha256 must be that of {tensors_file.name}, got {content.get('sha256')!r}")
        loaded = {name: each.clone() for name, each in safetensors.torch.load_file(tensors_file).items()}
        return _state(content, loaded)  # clones, for tensors that lie in a file's buffer may be aligned otherwise
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError, SafetensorError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"refinement state must follow docs/formats/refinement_state.md, got {problem}; in {json_file}."
            " Resume from another checkpoint."
        ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"numbers must be finite, got {name}")


def _state(content: dict[str, Any], tensors: dict[str, Tensor]) -> RefinementState:
    known = ("format_version", "step", "seed", "loss", "layers", "history", "policy_state", "processes", "sha256")
    _check_keys(content, known, "the state")
    layers = {name: _layer(each, name) for name, each in content["layers"].items()}
    history = _history(content["history"], layers)
    held = len(history.events)
    if content["loss"] not in {"mean", "sum"} or type(content["seed"]) is not int:
        raise ValueError(
            f"loss must be 'mean' or 'sum' and seed an integer, got {content['loss']!r}, {content['seed']!r}"
        )
    step, processes = _count(content["step"], "step"), _count(content["processes"], "processes")
    if (
        not (history.steps[held - 1] if held else 0)
        <= step
        < (history.steps[held] if held < len(history.steps) else math.inf)
    ):
        raise ValueError(f"step must lie where {held} events of {history.steps} have been held, got {step}")
    policy_state = content["policy_state"]
    if not isinstance(policy_state, list) or not all(isinstance(key, str) for key in policy_state):
        raise ValueError(f"policy_state must be a list of names, got {policy_state!r}")
    if len(set(policy_state)) < len(policy_state):
        raise ValueError(f"policy_state must name everything once, got {policy_state!r}")
    ranks = history.events[-1].ranks if held else history.initial
    names = [f"policy/{key}" for key in policy_state]
    slots = {name: _slots(tensors, name, ranks[name]) for name, form in layers.items() if form.form == "slots"}
    names += [f"{part}/{name}" for name in slots for part in ("mask", "order")]
    watched = []
    for process in range(processes):
        gathered, used = _gathered(
            tensors, process, layers, ranks, {name: len(mask) for name, (mask, _) in slots.items()}
        )
        watched.append(gathered)
        names += used
    _check_keys(tensors, names, "the tensors")
    for name, each in tensors.items():
        if each.is_floating_point() and not each.isfinite().all():
            raise ValueError(f"tensors must be finite, got NaN or infinity in {name!r}")
    return RefinementState(
        step=step,
        seed=content["seed"],
        loss=content["loss"],
        layers=layers,
        history=history,
        slots=slots,
        policy={key: tensors[f"policy/{key}"] for key in policy_state},
        watched=tuple(watched),
    )


def _layer(content: Any, name: str) -> LayerForm:  # noqa: ANN401 - JSON
    _check_keys(content, ("form", "shape", "cost", "cap", "floor"), f"layer {name!r}")
    shape = content["shape"]
    if content["form"] not in get_args(Form) or not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(f"layers must have a known form and a shape (m, n), got {content}; {name!r}")
    m, n = (_count(size, f"shape of {name!r}", 1) for size in shape)
    cost, cap, floor = (_count(content[key], f"{key} of {name!r}") for key in ("cost", "cap", "floor"))
    return LayerForm(form=content["form"], shape=(m, n), cost=cost, cap=cap, floor=floor)


def _history(content: Any, layers: Mapping[str, LayerForm]) -> RankHistory:  # noqa: ANN401 - JSON
    plain = [each.name for each in fields(RankHistory) if each.name != "seconds"]
    _check_keys(content, ("format_version", *plain), "the history")
    if content["format_version"] != RankHistory.format_version:
        raise ValueError(f"format_version of the history must be {RankHistory.format_version}")
    settings, policy, steps = content["settings"], content["policy"], content["steps"]
    if not isinstance(settings, dict) or not all(
        isinstance(each, float | int | str | None) for each in settings.values()
    ):
        raise ValueError(f"settings must be plain values, got {settings!r}")
    if not isinstance(policy, str) or not isinstance(steps, list) or not steps:
        raise ValueError(f"policy must be a name and steps a list, got {policy!r}, {steps!r}")
    steps = tuple(_count(step, "steps", 1) for step in steps)
    events = [_event(each, layers) for each in content["events"]]
    if list(steps) != sorted(set(steps)) or tuple(event.step for event in events) != steps[: len(events)]:
        raise ValueError(f"events must be the first of those at steps {steps}, got {[event.step for event in events]}")
    return RankHistory(
        initial=_ranks(content["initial"], layers),
        budget=_count(content["budget"], "budget"),
        policy=policy,
        settings=settings,
        steps=steps,
        peak=_count(content["peak"], "peak"),
        events=events,
    )


def _event(content: Any, layers: Mapping[str, LayerForm]) -> RankEvent:  # noqa: ANN401 - JSON
    _check_keys(content, [each.name for each in fields(RankEvent)], "an event")
    moved = {}
    for key in ("dropped", "admitted", "silenced"):
        moved[key] = {name: _count(each, key, 1) for name, each in content[key].items()}
    importance, gap = content["importance"], content["kkt_gap"]
    for number in (*importance.values(), *([] if gap is None else [gap])):
        if type(number) not in {float, int}:
            raise ValueError(f"importance and kkt_gap must be numbers, got {number!r}")
    unknown = {*importance, *(name for each in moved.values() for name in each)} - layers.keys()
    if unknown:
        raise ValueError(f"events must be of the layers, got {sorted(unknown)}")
    return RankEvent(
        step=_count(content["step"], "step", 1),
        ranks=_ranks(content["ranks"], layers),
        parameters=_count(content["parameters"], "parameters"),
        budget=_count(content["budget"], "budget"),
        importance=importance,
        kkt_gap=gap,
        **moved,
    )


def _ranks(content: Any, layers: Mapping[str, LayerForm]) -> dict[str, int]:  # noqa: ANN401 - JSON
    _check_keys(content, layers, "ranks")
    for name, rank in content.items():
        if _count(rank, f"rank of {name!r}") > min(layers[name].shape):
            raise ValueError(f"rank must be in [0, {min(layers[name].shape)}], got {rank}; {name!r}")
    return dict(content)


def _slots(tensors: Mapping[str, Tensor], name: str, rank: int) -> tuple[Tensor, Tensor]:
    mask, order = tensors[f"mask/{name}"], tensors[f"order/{name}"]
    if mask.dtype != torch.bool or mask.ndim != 1 or order.dtype != torch.int64 or order.shape != mask.shape:
        raise ValueError(
            f"mask and order must be bool and int64 of one length, got {mask.shape}, {order.shape}; {name!r}"
        )
    if int(mask.sum()) != rank:
        raise ValueError(f"mask must hold {rank} directions, got {int(mask.sum())}; {name!r}")
    return mask, order


def _gathered(
    tensors: Mapping[str, Tensor],
    process: int,
    layers: Mapping[str, LayerForm],
    ranks: Mapping[str, int],
    slots: Mapping[str, int],
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return what one process has gathered, and the names of its tensors; sketches are of all layers or of none."""
    gathered: dict[str, dict[str, Tensor]] = {}
    names: list[str] = []
    sketched = any(name.startswith("omega/") for name in tensors)
    for name, form in layers.items():
        (m, n), rank = form.shape, ranks[name]
        size = slots.get(name, rank)
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if rank > 0:
            wanted |= {"activations": (torch.float64, (size, size)), "gradients": (torch.float64, (size, size))}
            wanted |= {"counts": (torch.float64, (2,))}
        if sketched:
            widths = [tensors[f"{part}/{name}"].shape[-1:].numel() for part in ("basis_A", "basis_B")]
            probes = max(0, min(SIZE, n - widths[0], m - widths[1]))
            tall = min(2 * probes + 1, m)
            shapes = ((n, widths[0]), (m, widths[1]), (n, probes), (tall, m), (m, probes), (tall, n))
            wanted |= {part: (torch.float32, shape) for part, shape in zip((*PROBES, *SUMS), shapes, strict=True)}
            if max(widths) > rank:
                raise ValueError(f"bases must have at most {rank} columns, got {widths}; {name!r}")
        gathered[name] = {}
        for part, (dtype, shape) in wanted.items():
            key = f"{part}/{name}" if part in PROBES else f"{part}/{process}/{name}"
            tensor = tensors[key]
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise ValueError(f"{key} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            gathered[name][part] = tensor
            names.append(key)
        if "counts" in wanted and bool((gathered[name]["counts"] < 0).any()):
            raise ValueError(f"counts must be ≥ 0, got {gathered[name]['counts'].tolist()}; {name!r}")
    return gathered, names


def _check_keys(content: Any, known: Collection[str], what: str) -> None:  # noqa: ANN401 - JSON
    if not isinstance(content, dict):
        raise ValueError(f"{what} must be an object, got {content!r}")
    missing, unknown = sorted(set(known) - content.keys()), sorted(content.keys() - set(known))
    if missing or unknown:
        raise ValueError(f"keys of {what} must be as documented, got missing {missing[:3]} and unknown {unknown[:3]}")


def _count(value: object, what: str, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{what} must be a whole number ≥ {least}, got {value!r}")
    return value
