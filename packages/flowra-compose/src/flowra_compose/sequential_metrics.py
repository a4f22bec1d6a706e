"""How well a sequence of tasks was learned, and how much of it was forgotten, from the scores after each task.

Source: ACC and BWT of Lopez-Paz & Ranzato 2017 (arXiv:1706.08840), section 2.2; forgetting of Chaudhry et al. 2018
(arXiv:1801.10112), section 3. Deviation: in forgetting the best score may be the last one, so that no task counts
negative and a gain of one does not hide the loss of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SequentialMetrics", "sequential_metrics"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SequentialMetrics:
    """Numbers of one sequence of T tasks, in the unit of the scores."""

    accuracy: float
    """ACC = (1/T) Σᵢ a[T, i]."""
    backward_transfer: float
    """BWT = 1/(T − 1) Σ_{i<T} (a[T, i] − a[i, i]); negative where tasks were forgotten, 0 if T = 1."""
    forgetting: float
    """1/(T − 1) Σ_{i<T} (max_{i≤t≤T} a[t, i] − a[T, i]) ≥ 0; 0 if T = 1."""
    forgotten: tuple[float, ...]
    """The summands of ``forgetting``, and 0 for the last task."""


def sequential_metrics(scores: Tensor | Sequence[Sequence[float]]) -> SequentialMetrics:
    """Sum up a matrix of scores.

    Args:
        scores: ``(T, T)``, T ≥ 1, in the order of training: ``scores[t, i]`` is that of task i after task t, higher is
            better. Entries of tasks that were still to come (i > t) are not looked at and may be NaN.

    Returns:
        ACC, BWT and forgetting.

    Raises:
        ValueError: if it is not square, empty, or a score of a task that had been trained is not finite.
    """
    try:
        a = torch.as_tensor(scores, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scores must be a square matrix of numbers, got rows that do not fit: {error}") from None
    if a.ndim != 2 or a.shape[0] != a.shape[1] or len(a) == 0:
        raise ValueError(f"scores must be (T, T) with T ≥ 1, got {tuple(a.shape)}")
    trained = torch.ones_like(a, dtype=torch.bool).tril()
    if not torch.isfinite(a[trained]).all():
        t, i = (trained & ~torch.isfinite(a)).nonzero()[0].tolist()
        raise ValueError(f"scores must be finite on and below the diagonal, got {a[t, i].item()} at [{t}, {i}]")
    best = a.masked_fill(~trained, -torch.inf).amax(0)
    lost = best - a[-1]
    past = max(1, len(a) - 1)  # of one task alone nothing can be lost
    return SequentialMetrics(
        accuracy=a[-1].mean().item(),
        backward_transfer=(a[-1] - a.diagonal()).sum().item() / past,
        forgetting=lost.sum().item() / past,
        forgotten=tuple(lost.tolist()),
    )
