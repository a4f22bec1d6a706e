"""What an item is worth that is there or not: an offset of a parameter, as norm tuning and BitFit train it."""

import torch
from torch import Tensor

__all__ = ["offset_gain"]


def offset_gain(gradient: Tensor, fisher_diagonal: Tensor, *, damping: float) -> float:
    """Return ½ Σ gⱼ² / (Fⱼⱼ + λ): how far the quadratic model of the loss falls at the best offset.

    With the curvature diag(F) + λ the best offset is -gⱼ / (Fⱼⱼ + λ). In units of the loss, like flow gains, so it may
    enter the same allocation: one gain, at the cost of the parameter's elements. Like a gradient spectrum it is a
    promise of the first step, not measured on a learned update.

    Args:
        gradient: mean gradient g of the parameter, any shape.
        fisher_diagonal: E[g²] over examples, of the same shape, ≥ 0.
        damping: λ > 0.

    Returns:
        The gain, ≥ 0, summed in float64.

    Raises:
        ValueError: if the shapes differ, the damping is not positive, or a value is not finite.
    """
    if gradient.shape != fisher_diagonal.shape:
        raise ValueError(
            f"fisher_diagonal must have the shape of the gradient, {tuple(gradient.shape)}, got"
            f" {tuple(fisher_diagonal.shape)}"
        )
    if not damping > 0:
        raise ValueError(f"damping must be > 0, got {damping}")
    found = float((gradient.double() ** 2 / (fisher_diagonal.double() + damping)).sum() / 2)
    if not torch.isfinite(torch.tensor(found)) or bool((fisher_diagonal < 0).any()):
        raise ValueError(f"gradient and fisher_diagonal must be finite, and the latter ≥ 0, got a gain of {found}")
    return found
