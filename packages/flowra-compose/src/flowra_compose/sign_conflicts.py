"""Where updates pull the entries of a weight in opposite directions, counted a few rows at a time.

Signs are those of the entries of ΔW = s · B A, which no factor knows, so every entry is looked at; but no more of them
at once than a block of rows has. An entry that is 0 within the rounding of its product has no sign.

Source: Yadav et al. 2023 (arXiv:2306.01708), section 3, which counts entries; here they weigh what they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate

__all__ = ["SignConflicts", "sign_conflicts"]

ENTRIES_OF_EACH = 2**19
"""So many entries of an update are looked at: all of smaller ones, and of larger ones rows at even distances."""
ENTRIES_AT_ONCE = 2**21
"""Of all updates together: 16 MiB in float64."""


@dataclass(frozen=True, slots=True)
class SignConflicts:
    """How far the signs of updates conflict."""

    shares: tuple[tuple[float, ...], ...]
    """For updates i and j: Σ (|τᵢ| + |τⱼ|) over the entries where their signs are opposite, over that of all entries;
    in [0, 1], 0 where both are 0."""
    cancelled: float
    """1 - Σ|Σᵢ τᵢ| / Σᵢ Σ|τᵢ|: the share of all magnitude that opposite signs take away in the sum. In [0, 1]; 0 where
    all are 0."""


@torch.no_grad()
def sign_conflicts(
    updates: Sequence[LowRankUpdate], *, entries: int = ENTRIES_OF_EACH, entries_at_once: int = ENTRIES_AT_ONCE
) -> SignConflicts:
    """Weigh the entries in which updates have opposite signs.

    Args:
        updates: τᵢ of one shape and device, at least one.
        entries: bounds the work: of updates with more, so many of the rows at even distances, one at least.
        entries_at_once: bounds the memory: so many entries of all updates together, or one row of each if that is more.

    Returns:
        Shares of sums in float64 over the entries that were looked at.

    Example:
        Two of four entries conflict, and hold 6 of 10.

        >>> one, other = torch.tensor([[1.0, 2.0], [1.0, 1.0]]), torch.tensor([[-1.0, -2.0], [1.0, 1.0]])
        >>> found = sign_conflicts([LowRankUpdate.of_delta_weight(each) for each in (one, other)])
        >>> found.shares[0][1], found.cancelled
        (0.6, 0.6)
    """
    count = len(updates)
    device = updates[0].lora_A.device
    against = torch.zeros(count, count, dtype=torch.float64, device=device)
    sizes = torch.zeros(count, dtype=torch.float64, device=device)
    summed = torch.zeros((), dtype=torch.float64, device=device)
    for block in _blocks(updates, entries, entries_at_once):
        up, down = block.clamp(min=0), block.clamp(max=0).neg_()
        against += up @ (block < 0).double().T + down @ (block > 0).double().T  # |τᵢ| where τⱼ has the other sign
        sizes += up.sum(dim=1) + down.sum(dim=1)
        summed += block.sum(dim=0).abs().sum()
    both = sizes[:, None] + sizes
    shares = torch.where(both > 0, (against + against.T) / both.clamp(min=torch.finfo(torch.float64).tiny), 0)
    total = float(sizes.sum())
    return SignConflicts(
        shares=tuple(tuple(min(1.0, float(each)) for each in row) for row in shares),
        cancelled=max(0.0, 1 - float(summed) / total) if total else 0.0,
    )


def _blocks(updates: Sequence[LowRankUpdate], entries: int, entries_at_once: int) -> Iterator[Tensor]:
    """Go through rows of all updates; yield ``(count, entries)`` in float64."""
    whole, n = updates[0].shape
    m = min(whole, max(1, entries // n))
    chosen = torch.arange(m, device=updates[0].lora_A.device) * whole // m
    rows = max(1, entries_at_once // (n * len(updates)))
    eps = torch.finfo(torch.float64).eps
    factors = [(each.lora_A.double(), each.scaling * each.lora_B[chosen].double()) for each in updates]
    for start in range(0, m, rows):
        block = torch.empty(len(updates), min(rows, m - start), n, dtype=torch.float64, device=factors[0][0].device)
        for each, (a, b) in zip(block, factors, strict=True):
            part = b[start : start + rows]
            torch.matmul(part, a, out=each)
            sizes = torch.outer(part.norm(dim=1), eps * len(a) * a.norm(dim=0))
            each.masked_fill_(each.abs() <= sizes, 0)
        yield block.flatten(1)
