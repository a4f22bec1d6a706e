"""The moments of bitsandbytes' optimisers (Dettmers et al. 2022, arXiv:2110.02861): 8 bits in blocks, or float32.

``state1`` and ``state2`` of a large tensor are 8-bit codes, row by row in blocks of 256 that have a scale (``absmax``)
each; of a small one, or with 32-bit optimisers, they are float32. A change of rank moves rows between blocks, and a
tensor between the two kinds. So moments are decoded, changed as any others are, and encoded for the kind that
bitsandbytes itself gives a tensor of the new size. A moment that stays is then within one step of the code.

Nothing here needs bitsandbytes: whoever has such an optimiser has it.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from flowra_allocation.changes import Change

__all__ = [
    "BITSANDBYTES",
    "carry_quantised",
    "check_quantised",
    "decode",
    "encode",
    "hand_over_overrides",
    "is_of_bitsandbytes",
]

BITSANDBYTES: Mapping[str, tuple[Literal["first", "second"], ...]] = {
    "adam": ("first", "second"),
    "momentum": ("first",),
    "lion": ("first",),
}
"""``optimizer_name`` to what ``state1`` and ``state2`` are."""
BLOCK = 256


def is_of_bitsandbytes(optimizer: Optimizer) -> bool:
    """Tell whether an optimiser keeps its state as those of bitsandbytes do."""
    return any(each.__module__.startswith("bitsandbytes.") for each in type(optimizer).__mro__)


def check_quantised(optimizer: Any) -> None:  # noqa: ANN401 - bitsandbytes has no types
    """Refuse an optimiser of bitsandbytes whose states are not known.

    Raises:
        ValueError: if they are not.
    """
    if optimizer.optimizer_name not in BITSANDBYTES:
        raise ValueError(
            f"optimizer must be one of {sorted(BITSANDBYTES)} among those of bitsandbytes,"
            f" got {optimizer.optimizer_name}. Use AdamW8bit."
        )


def carry_quantised(
    optimizer: Any,  # noqa: ANN401 - bitsandbytes has no types
    state: Mapping[str, Any],
    new: nn.Parameter,
    change: Change,
    place: tuple[int, int],
) -> None:
    """Give ``new``, which stands at ``place`` already, a state mapped by the change.

    Args:
        optimizer: of bitsandbytes.
        state: that it had for the factor as it was.
        new: the factor as it is.
        change: of the factor.
        place: index of the parameter group, and of the parameter in it.
    """
    group, index = place
    optimizer.init_state(optimizer.param_groups[group], new, group, index)
    fresh = optimizer.state[new]
    fresh["step"] = state["step"]
    for number, kind in enumerate(BITSANDBYTES[optimizer.optimizer_name], 1):
        moment = _decoded(state, number)
        mapped = change.first(moment) if kind == "first" else change.second(moment, change.axis)
        _encode(fresh, number, mapped)
    gone = [value for value in state.values() if isinstance(value, Tensor)]
    paged = optimizer.page_mng.paged_tensors
    paged[:] = [each for each in paged if not any(each is value for value in gone)]


def hand_over_overrides(optimizer: Any, old: nn.Parameter, new: nn.Parameter) -> None:  # noqa: ANN401 - no types
    """Let the settings that bitsandbytes keeps for a single Parameter, known by its address, follow it."""
    settings = optimizer.mng.pid2config
    if id(old) in settings:
        settings[id(new)] = settings.pop(id(old))


def decode(codes: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """Return the values that codes stand for.

    Args:
        codes: uint8, any shape.
        scales: ``(⌈elements / 256⌉,)``, float32.
        code: ``(256,)``, float32, rising: code to value in [-1, 1].

    Returns:
        Float32, shaped as the codes.
    """
    each = scales.repeat_interleave(BLOCK)[: codes.numel()]
    return (code[codes.flatten().long()] * each).view(codes.shape)


def encode(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest codes, and scales: the largest absolute value of each block.

    Zero stays zero, which the CPU kernel of bitsandbytes 0.50 makes about 2e-5 of the block's scale.

    Args:
        values: float32.
        code: as for :func:`decode`.

    Returns:
        Codes and scales, as :func:`decode` takes them.
    """
    blocks = functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    parts = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    codes = torch.bucketize(parts, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: values.numel()].view(values.shape), scales


def _decoded(state: Mapping[str, Any], number: int) -> Tensor:
    codes: Tensor = state[f"state{number}"]
    return decode(codes, state[f"absmax{number}"], state[f"qmap{number}"]) if f"absmax{number}" in state else codes


def _encode(fresh: Mapping[str, Any], number: int, moment: Tensor) -> None:
    if f"absmax{number}" in fresh:
        moment, scales = encode(moment, fresh[f"qmap{number}"])
        fresh[f"absmax{number}"].copy_(scales)
    fresh[f"state{number}"].copy_(moment)
