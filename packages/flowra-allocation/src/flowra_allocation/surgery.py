"""Carry optimiser state over a change of rank (docs/methods.md, section 8).

A resized factor is a new Parameter. It takes the old one's place in its parameter group, so learning rate, weight
decay and any scheduler stay; its moments are mapped from the old ones:

- rows that stay keep their moments;
- new rows start with a zero first moment and the module's mean second moment, so that their first step is no larger
  than the others' (a zero second moment would give about 3 times the learning rate);
- re-based factors (A' = T_A A, B' = B T_B) carry the first moment as gradients transform, m_A' = T_Bᵀ m_A and
  m_B' = m_B T_Aᵀ, and take the module's mean as second moment.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["ResizableLayer", "grow", "keep", "rebase"]

FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
Map = Callable[[Tensor], Tensor]


class ResizableLayer(Protocol):
    """A low-rank update s · B A whose factors can be exchanged."""

    scaling: float
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Install new factors of a common rank as new Parameters."""


def keep(layer: ResizableLayer, indices: list[int], optimizer: Optimizer | None) -> None:
    """Keep the rank slices with these indices; they keep their moments."""
    index = torch.tensor(indices, dtype=torch.long, device=layer.lora_A.device)

    def rows(old: Tensor) -> Tensor:
        return old[index]

    def columns(old: Tensor) -> Tensor:
        return old[:, index]

    _replace(
        layer, rows(layer.lora_A.detach()), columns(layer.lora_B.detach()), optimizer, (rows, rows, columns, columns)
    )


def grow(layer: ResizableLayer, rows: Tensor, optimizer: Optimizer | None) -> None:
    """Append ``rows`` ``(k, n)`` to A and zero columns to B; the update does not change."""
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    count = len(rows)

    def zero_rows(old: Tensor) -> Tensor:
        return torch.cat([old, old.new_zeros(count, a.shape[1])])

    def mean_rows(old: Tensor) -> Tensor:
        return torch.cat([old, _mean(old).expand(count, a.shape[1])])

    def zero_columns(old: Tensor) -> Tensor:
        return torch.cat([old, old.new_zeros(b.shape[0], count)], 1)

    def mean_columns(old: Tensor) -> Tensor:
        return torch.cat([old, _mean(old).expand(b.shape[0], count)], 1)

    maps = (zero_rows, mean_rows, zero_columns, mean_columns)
    _replace(layer, torch.cat([a, rows.to(a)]), zero_columns(b), optimizer, maps)


def rebase(layer: ResizableLayer, lora_A: Tensor, lora_B: Tensor, optimizer: Optimizer | None) -> None:
    """Install factors that span a subspace of the old ones' (a truncation, a change of basis, or both).

    Args:
        layer: to change.
        lora_A: ``(k, n)``, rows in the span of the old rows.
        lora_B: ``(m, k)``, columns in the span of the old columns.
        optimizer: holds the layer's factors; None if they are not being trained.
    """
    a, b = (each.detach().to(torch.float64) for each in (layer.lora_A, layer.lora_B))
    to_A = lora_A.to(a) @ torch.linalg.pinv(a)  # T_A, (k, r)
    to_B = torch.linalg.pinv(b) @ lora_B.to(b)  # T_B, (r, k)

    def first_A(old: Tensor) -> Tensor:
        return torch.matmul(to_B.T, old.double()).to(old)

    def first_B(old: Tensor) -> Tensor:
        return torch.matmul(old.double(), to_A.T).to(old)

    def second_A(old: Tensor) -> Tensor:
        return _mean(old).expand(lora_A.shape).clone()

    def second_B(old: Tensor) -> Tensor:
        return _mean(old).expand(lora_B.shape).clone()

    _replace(layer, lora_A, lora_B, optimizer, (first_A, second_A, first_B, second_B))


def _mean(moment: Tensor) -> Tensor:
    return moment.mean() if moment.numel() else moment.new_zeros(())


def _replace(
    layer: ResizableLayer, lora_A: Tensor, lora_B: Tensor, optimizer: Optimizer | None, maps: tuple[Map, Map, Map, Map]
) -> None:
    old_A, old_B = layer.lora_A, layer.lora_B
    if optimizer is not None:
        for parameter in (old_A, old_B):
            _check_state(optimizer, parameter)
    layer.replace_factors(lora_A.to(old_A), lora_B.to(old_B))
    if optimizer is not None:
        _migrate(optimizer, old_A, layer.lora_A, first=maps[0], second=maps[1])
        _migrate(optimizer, old_B, layer.lora_B, first=maps[2], second=maps[3])


def _check_state(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Refuse, before anything is changed, an optimiser that lacks the parameter or whose state is not understood."""
    if not any(parameter is held for group in optimizer.param_groups for held in group["params"]):
        raise ValueError("optimizer must hold the layer's factors, got one that does not. Build it after attaching.")
    unknown = [
        key
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.ndim > 0 and key not in FIRST_MOMENTS | SECOND_MOMENTS
    ]
    if unknown:
        raise ValueError(
            f"optimizer state must be moments of AdamW or SGD, got {unknown} in {type(optimizer).__name__}"
        )


def _migrate(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, *, first: Map, second: Map) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if held is old else held for held in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None or old.numel() == 0:  # nothing to carry: the new factor starts with a fresh state
        return
    optimizer.state[new] = {
        key: first(value) if key in FIRST_MOMENTS else second(value) if key in SECOND_MOMENTS else value
        for key, value in state.items()
    }
