"""Training in several processes: what each has seen, added up, and one decision for all.

Each process sees its own part of every batch. Sums over tokens and examples are added up, so the Grams are those of one
process that had seen everything; gradient sketches are linear in the gradient, so theirs are, too. Then the first
process decides and the others are told: floating point may differ between machines, ranks must not. What is sent are
numbers and text, nothing is unpickled.

Every function is called on all processes of the group, in the same order, and does nothing where there is but one.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from flowra_allocation.growth import PROBES, SUMS
from flowra_allocation.policy import Moves, NewTriplets, Rebasing

__all__ = ["added_up", "decided_once", "of_each", "rank_and_size", "several"]

KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Moves, NewTriplets, Rebasing)}
GRAM_SUMS = ("activations", "gradients", "counts")


def several(group: "dist.ProcessGroup | None" = None) -> bool:
    """Tell whether there are several processes in the group, by default in all."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def added_up(
    gathered: Mapping[str, Mapping[str, Tensor]],
    *,
    loss: Literal["mean", "sum"],
    device: torch.device,
    group: "dist.ProcessGroup | None" = None,
) -> dict[str, dict[str, Tensor]]:
    """Add up what the observers of all processes have gathered; every process gets the same bits.

    Args:
        gathered: as of :meth:`BottleneckObserver.gathered`, of equal shapes on each process.
        loss: of the batch of one process. Of means, the gradients are averaged over processes, as
            ``DistributedDataParallel`` and ``fully_shard`` do.
        device: on which the processes exchange tensors.
        group: of ``torch.distributed``; None for all processes.

    Returns:
        What one observer of all batches would have gathered.
    """
    result = {name: dict(tensors) for name, tensors in gathered.items()}
    if not several(group):
        return result
    share = dist.get_world_size(group) if loss == "mean" else 1
    for tensors in result.values():
        for keys, divisor in ((GRAM_SUMS, 1), (SUMS, share)):
            mine = {key: tensors[key] for key in keys if key in tensors}
            if mine:
                total = torch.cat([each.flatten() for each in mine.values()]).to(device)
                dist.all_reduce(total, group=group)
                parts = torch.split(total / divisor, [each.numel() for each in mine.values()])
                tensors |= {
                    key: part.view(mine[key].shape).to(mine[key].device) for key, part in zip(mine, parts, strict=True)
                }
    return result


def rank_and_size(group: "dist.ProcessGroup | None" = None) -> tuple[int, int]:
    """Return which process of the group this is, and how many there are; 0 and 1 where there is but one."""
    return (dist.get_rank(group), dist.get_world_size(group)) if several(group) else (0, 1)


def of_each(
    gathered: Mapping[str, Mapping[str, Tensor]], *, device: torch.device, group: "dist.ProcessGroup | None" = None
) -> tuple[Mapping[str, Mapping[str, Tensor]], ...]:
    """Return what the observer of each process has gathered, in the order of the processes.

    Args:
        gathered: as for :func:`added_up`.
        device: on which the processes exchange tensors.
        group: of ``torch.distributed``; None for all processes.
    """
    if not several(group):
        return (gathered,)
    size = dist.get_world_size(group)
    results: list[dict[str, dict[str, Tensor]]] = [{name: {} for name in gathered} for _ in range(size)]
    for name, tensors in gathered.items():
        for key, mine in tensors.items():
            parts = [mine] * size  # as it is, if it is the same everywhere
            if key not in PROBES and mine.numel():
                parts = [torch.empty_like(mine, device=device) for _ in range(size)]
                dist.all_gather(parts, mine.to(device).contiguous(), group=group)
            for result, part in zip(results, parts, strict=True):
                result[name][key] = part.to(mine.device)
    return tuple(results)


def decided_once(
    decide: Callable[[], Moves], *, device: torch.device, group: "dist.ProcessGroup | None" = None
) -> Moves:
    """Let the first process of the group decide, and tell the others.

    Args:
        decide: called on the first process only.
        device: on which the processes exchange tensors, and where those of the moves are put.
        group: of ``torch.distributed``; None for all processes.

    Returns:
        The same moves on every process, bit by bit; tensors are then float64.

    Raises:
        ValueError: on the others, if the first one could not decide.
    """
    if not several(group):
        return decide()
    text = b""
    tensors: list[Tensor] = []
    problem: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            text, tensors = _written(decide())
        except Exception as error:  # told to the others first, who would else wait
            text, problem = json.dumps({"problem": str(error)}).encode(), error
    size = _told(torch.tensor([len(text)]), device, group)
    sent = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(int(size), dtype=torch.uint8)
    plain = json.loads(_told(sent, device, group).cpu().numpy().tobytes())
    if problem is not None:
        raise problem
    if "problem" in plain:
        raise ValueError(f"{plain['problem']}; on the first process")
    shapes = plain["shapes"]
    flat = torch.cat([each.flatten() for each in tensors]) if tensors else _empty(sum(map(_numel, shapes)))
    parts = torch.split(_told(flat, device, group), [_numel(shape) for shape in shapes])
    moves = _read(plain["moves"], [part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
    assert isinstance(moves, Moves)
    return moves


def _told(value: Tensor, device: torch.device, group: "dist.ProcessGroup | None") -> Tensor:
    """Return what the first process has, given tensors of one shape and dtype."""
    value = value.to(device)
    dist.broadcast(value, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return value


def _written(moves: Moves) -> tuple[bytes, list[Tensor]]:
    """Write moves as text and tensors."""
    tensors: list[Tensor] = []
    plain = _plain(moves, tensors)
    return json.dumps({"moves": plain, "shapes": [list(each.shape) for each in tensors]}).encode(), tensors


def _plain(value: object, tensors: list[Tensor]) -> object:
    """Write a value as JSON has it: ``[kind, content]`` for all that is not a number or text."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().to("cpu", torch.float64))
        return ["tensor", len(tensors) - 1]
    if isinstance(value, tuple):
        return ["tuple", [_plain(each, tensors) for each in value]]
    if isinstance(value, Mapping):
        return ["mapping", {key: _plain(each, tensors) for key, each in value.items()}]
    if isinstance(value, Moves | NewTriplets | Rebasing):
        content = {each.name: _plain(getattr(value, each.name), tensors) for each in fields(value)}
        return [type(value).__name__, content]
    return value


def _read(value: object, tensors: list[Tensor]) -> object:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_read(each, tensors) for each in content)
    read = {key: _read(each, tensors) for key, each in content.items()}
    return read if kind == "mapping" else KINDS[kind](**read)


def _numel(shape: list[int]) -> int:
    return torch.Size(shape).numel()


def _empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64)
