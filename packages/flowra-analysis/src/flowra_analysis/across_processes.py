"""States of several processes, each of which has measured its own part of the data, merged into one that all have."""

from typing import Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flowra_analysis.state_files import state_from_bytes, state_to_bytes

__all__ = ["merged_over_processes"]


class Mergeable(Protocol):
    """The state of a :class:`Statistic`, or another that merges and that :func:`write_state` takes."""

    def merge(self, other: Self) -> Self:
        """Return the state that has seen the examples of both.

        Raises:
            ValueError: if the two did not begin alike.
        """


State = TypeVar("State", bound=Mergeable)


def merged_over_processes(
    state: State, group: "dist.ProcessGroup | None" = None, *, device: torch.device | str = "cpu"
) -> State:
    """Merge the states of all processes of a group; every process gets the same bits.

    The states travel as the bytes of :func:`write_state`, so nothing is unpickled, and each process merges all of them
    in the order of their ranks, one after the other, so none holds all. Call it on every process of the group.

    Args:
        state: this process's, begun with the same arguments on each. Examples that two processes have seen count twice.
        group: of ``torch.distributed``; None for all processes.
        device: where the tensors of the result shall be; the same kind on each process, for the same bits.

    Returns:
        The state that has seen the examples of all processes.

    Raises:
        ValueError: on every process, if a process has a state of another class or one that did not begin alike, or
            one that is not finite.

    >>> import tempfile
    >>> from flowra_analysis import EmpiricalFisher
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    ...     merged_over_processes(EmpiricalFisher.init())
    ...     dist.destroy_process_group()
    EmpiricalFisher(moments={})
    """
    carrier = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    data, problem = b"", None
    try:
        data = state_to_bytes(state)
    except (TypeError, ValueError) as error:
        problem = error  # told to the others first, who would else wait
    sizes = _gathered(len(data), group, carrier)
    if problem is not None:
        raise problem
    if 0 in sizes:
        raise ValueError(f"state must be one that can be sent, got none from process {sizes.index(0)} of the group")
    merged: State | None = None
    for rank, size in enumerate(sizes):
        received = _broadcast(data, rank, size, group, carrier)
        if problem is not None:
            continue  # the others are still sending
        try:
            theirs = state_from_bytes(received, type(state), device=device)
            merged = theirs if merged is None else merged.merge(theirs)
        except ValueError as error:
            problem = ValueError(f"{error}; from process {rank} of the group")
    if problem is not None:
        raise problem
    assert merged is not None
    return merged


def _gathered(number: int, group: "dist.ProcessGroup | None", carrier: torch.device) -> list[int]:
    """Return the number of each process, by rank."""
    mine = torch.tensor([number], device=carrier)
    all_of_them = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of_them, mine, group=group)
    return [int(each) for each in all_of_them]


def _broadcast(data: bytes, rank: int, size: int, group: "dist.ProcessGroup | None", carrier: torch.device) -> bytes:
    """Return what the process of this rank of the group has."""
    sent: Tensor
    if dist.get_rank(group) == rank:
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(carrier)
    else:
        sent = torch.empty(size, dtype=torch.uint8, device=carrier)
    dist.broadcast(sent, src=dist.get_global_rank(group, rank) if group is not None else rank, group=group)
    return sent.cpu().numpy().tobytes()
