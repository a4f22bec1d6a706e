"""Rules that treat each entry for itself: which entries of task vectors are kept, and how those of all tasks combine.

=====================  ===================  ================================
keeps                  adds up              elects a sign, takes the mean
=====================  ===================  ================================
all                    ``task_arithmetic``
the largest (a trim)   ``magnitude_prune``  ``ties``
some, drawn by chance  ``dare_linear``      ``dare_ties``
=====================  ===================  ================================

These are on ΔW; ``knots_…`` does the same to aligned and ``core_…`` to core coordinates (``spaces.py``).

Source: TIES: Yadav et al. 2023 (arXiv:2306.01708), section 4. DARE: Yu et al. 2023 (arXiv:2311.03099), section 3; in
``dare_ties`` the draw stands in for the trim, as in PEFT. Deviations: weights multiply the task vectors first, so they
vote (in PEFT they multiply entries after the vote). Entries whose sum is 0 elect no sign and become 0, where PEFT
elects the plus and the code of TIES the sign of the majority of all entries: so a task cancels its negative, and what
comes out does not depend on the signs of singular vectors. A vote by count (PEFT's ``frequency``) is not offered.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import reduce

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.module_updates import ModuleUpdates
from flowra_compose.options import MergeOptions
from flowra_compose.spaces import Space
from flowra_compose.thresholds import TRIM_DENSITY, magnitudes, threshold

__all__ = [
    "DROP_DENSITY",
    "Combine",
    "Keep",
    "added_up",
    "all_entries",
    "dropped",
    "elected_mean",
    "merge_entries",
    "trimmed",
]

DROP_DENSITY = 0.5
"""What DARE keeps where nothing is said. The expected square of what it changes is (1/density - 1) ‖τ‖², so at 0.5 as
much noise comes in as there is signal, and below it more. (The drop rates of 0.9 and above in the paper are those that
one fine-tuned large model bears.)"""

NO_VOTE = 2.0**-40
"""A sum of entries within this share of the sum of their magnitudes is 0 to rounding."""

Keep = Callable[[Tensor, ModuleUpdates, int, MergeOptions], Tensor]
"""From the coordinates of a task, of a number among the module's updates, to what is kept of them; the rest is 0."""

Combine = Callable[[Iterable[Tensor]], Tensor]
"""From what is kept of each task to one matrix. Tasks that leave the module alone are left out: all entries are 0."""


def merge_entries(
    module: ModuleUpdates, options: MergeOptions, *, space: Space, keep: Keep, combine: Combine
) -> LowRankUpdate:
    """Merge one module by entries, one task in memory at a time.

    Args:
        module: its task vectors.
        options: of the rule.
        space: whose entries are meant.
        keep: says which entries of a task are kept.
        combine: makes one matrix of those of all tasks.

    Returns:
        An update of full rank in the space of weights, else of the rank of the space at most; in float64.
    """
    coordinates = space(module)
    kept = (
        keep(coordinates.of(update), module, task, options)
        for task, update in enumerate(module.updates)
        if update is not None
    )
    return coordinates.back(module, combine(kept))


# which entries are kept


def all_entries(matrix: Tensor, module: ModuleUpdates, task: int, options: MergeOptions) -> Tensor:
    """Keep every entry."""
    return matrix


def trimmed(matrix: Tensor, module: ModuleUpdates, task: int, options: MergeOptions) -> Tensor:
    """Keep the largest magnitudes, of the task's whole vector where its threshold is known, else of this matrix."""
    if module.thresholds is None:
        smallest = threshold(matrix, density=options.density or TRIM_DENSITY)
    else:
        smallest = module.thresholds[task]
    return torch.where(magnitudes(matrix) >= smallest, matrix, 0)


def dropped(matrix: Tensor, module: ModuleUpdates, task: int, options: MergeOptions) -> Tensor:
    """Keep each entry with the probability ``density``, divided by it, so that the expectation stays."""
    update = module.updates[task]
    assert update is not None
    density = options.density or DROP_DENSITY
    draws = torch.rand(matrix.shape, generator=_generator(options.seed or 0, module.name, update), dtype=torch.float64)
    return torch.where(draws.to(matrix.device) < density, matrix / density, 0)


def _generator(seed: int, name: str, update: LowRankUpdate) -> torch.Generator:
    """Return the draws of an update, on the CPU.

    It is known by |⟨ΔW, pⱼ⟩| / ‖ΔW‖ for four fixed random matrices pⱼ of rank 1, to 2⁻²⁰: neither the order of the
    adapters, nor weight and scaling, nor how the product is split into factors changes the draws.
    """
    a, b = update.lora_A.double().cpu(), update.lora_B.double().cpu()
    probes = torch.Generator().manual_seed(0)
    right = torch.randn(4, a.shape[1], generator=probes, dtype=torch.float64) @ a.T
    left = torch.randn(4, b.shape[0], generator=probes, dtype=torch.float64) @ b
    norm = ((b.T @ b) * (a @ a.T)).sum().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    marks = ((left * right).sum(1).abs() / norm * 2**20).round().tolist()
    digest = hashlib.sha256(repr((seed, name, marks)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


# how those of all tasks combine


def added_up(matrices: Iterable[Tensor]) -> Tensor:
    """Return the sum."""
    return reduce(torch.add, matrices)


def elected_mean(matrices: Iterable[Tensor]) -> Tensor:
    """Return for each entry the mean over the tasks that agree with the sign of its sum; entries of 0 do not count.

    The sum is that of the positive and that of the negative entries, and the larger of the two gives the mean.
    """
    up = down = torch.zeros((), dtype=torch.float64)
    ups = downs = torch.zeros((), dtype=torch.int32)
    for matrix in matrices:
        up, ups = up + matrix.clamp(min=0), ups + (matrix > 0)
        down, downs = down + matrix.clamp(max=0), downs + (matrix < 0)
    mean = torch.where(up + down > 0, up / ups.clamp(min=1), down / downs.clamp(min=1))
    return torch.where((up + down).abs() <= NO_VOTE * (up - down), 0, mean)
