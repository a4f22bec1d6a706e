"""The magnitude that the entries which a trim keeps have at least: of one matrix, or over all modules of a task.

A trim to a density keeps K = ⌊density · N⌋ of N entries, and at least one. The threshold is the K-th largest magnitude;
all entries that equal it are kept, so order plays no part, and a few more than K stay where entries are equal.
Magnitudes are compared in float32: entries that differ by the rounding of products are equal.

Over all modules, N counts the modules that the task updates. The K-th largest is found exactly, without ever holding
more than one module: the bits of a float32 ≥ 0, read as an integer, are ordered as the numbers are. A first pass over
the modules counts the upper 16 bits, which says in which of 2¹⁵ bins the K-th lies; a second one counts the lower 16
bits of what is in that bin.

Source: Yadav et al. 2023 (arXiv:2306.01708), section 4, whose code trims the whole vector of a task. Per module is
what PEFT does. Deviations: of equal entries PEFT keeps some, K in all, and none where K is 0.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.spaces import Space

__all__ = ["TRIM_DENSITY", "global_thresholds", "magnitudes", "threshold"]

TRIM_DENSITY = 0.2
"""What a trim keeps where nothing is said: the 20 % of Yadav et al. 2023."""

BITS = 16
"""Of a magnitude that are counted in one pass."""


def magnitudes(matrix: Tensor) -> Tensor:
    """Return |x| of every entry as it is compared with a threshold, in float32."""
    return matrix.float().abs()


def threshold(matrix: Tensor, *, density: float) -> float:
    """Return the smallest magnitude that is kept of a matrix by itself.

    Args:
        matrix: any shape, at least one entry.
        density: share of entries that is kept, in (0, 1].
    """
    dropped = matrix.numel() - _count(density, matrix.numel())
    return float(magnitudes(matrix).flatten().kthvalue(dropped + 1).values)


def global_thresholds(
    modules: Callable[[], Iterator[ModuleUpdates]], *, space: Space, density: float
) -> tuple[float, ...]:
    """Return for each task the smallest magnitude that is kept over all modules.

    Args:
        modules: goes through the modules from the start; called twice.
        space: of the coordinates whose entries are meant.
        density: share of entries that is kept, in (0, 1].

    Returns:
        One for each task; 0 for a task that updates no module.
    """
    upper = [
        _kth_largest(histogram, _count(density, int(histogram.sum())))
        for histogram in _histograms(modules, space, lambda bits, task: bits >> BITS)
    ]
    lower = [
        _kth_largest(histogram, upper[task][1])
        for task, histogram in enumerate(
            _histograms(modules, space, lambda bits, task: bits[bits >> BITS == upper[task][0]] % 2**BITS)
        )
    ]
    found = [(high << BITS) + low for (high, _), (low, _) in zip(upper, lower, strict=True)]
    return tuple(torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist())


def _count(density: float, entries: int) -> int:
    return max(1, int(density * entries))


def _histograms(
    modules: Callable[[], Iterator[ModuleUpdates]], space: Space, bins: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    """Count for each task into which bins, of 2¹⁶, the bits of its magnitudes fall."""
    histograms: dict[int, Tensor] = {}
    for module in modules():
        coordinates = space(module)
        for task, update in enumerate(module.updates):
            histogram = histograms.setdefault(task, torch.zeros(2**BITS, dtype=torch.int64))
            if update is not None:
                bits = magnitudes(coordinates.of(update)).flatten().view(torch.int32)
                histogram += torch.bincount(bins(bits, task), minlength=2**BITS).cpu()
    return list(histograms.values())


def _kth_largest(histogram: Tensor, k: int) -> tuple[int, int]:
    """Return the bin of the k-th largest, and its place from the top within that bin; of nothing, bin 0."""
    down = histogram.flip(0).cumsum(0)
    place = min(int(torch.searchsorted(down, k)), len(down) - 1)
    return len(down) - 1 - place, k - int(down[place - 1] if place else 0)
