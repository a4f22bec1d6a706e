"""Second moments of which only the means over rows and over columns are kept (Adafactor).

Adafactor (Shazeer & Stern 2018, arXiv:1804.04235, section 3) estimates the second moments of a matrix of gradients as
V_ij = R_i C_j / mean(R) from the means R over its columns and C over its rows. Of the two, one counts the directions of
the factor and changes with them as any second moment does; the other is multiplied by new mean / old mean of the first.
So V of the directions that stay is what it was, and mean(R) = mean(C) still holds, which the optimiser's own updates
keep up.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flowra_allocation.changes import Change

__all__ = ["KEYS", "carry_means"]

KEYS = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))
"""Keys of R and of C: in torch, which keeps the axis it averages over, and in transformers, which drops it."""


def carry_means(state: Mapping[str, Tensor], *, ndim: int, change: Change) -> dict[str, Tensor]:
    """Map the means that a state holds.

    Args:
        state: of a factor; without means of the last axis and of the one before it, nothing is returned.
        ndim: axes of the factor.
        change: of the factor.

    Returns:
        R and C under their keys.
    """
    mapped: dict[str, Tensor] = {}
    for row_key, column_key in KEYS:
        if row_key not in state:
            continue
        gone = {row_key: ndim - 1, column_key: ndim - 2}
        mapped |= {
            key: change.second(state[key], _axis(state[key], change.axis, ndim=ndim, gone=axis))
            for key, axis in gone.items()
            if axis != change.axis
        }
        for key, other in ((row_key, column_key), (column_key, row_key)):
            if key not in mapped:
                mapped[key] = state[key] * _growth(state[other], mapped[other])
    return mapped


def _axis(means: Tensor, axis: int, *, ndim: int, gone: int) -> int:
    """Return where an axis of the factor lies in means over another one."""
    return axis if means.ndim == ndim or axis < gone else axis - 1


def _growth(old: Tensor, new: Tensor) -> Tensor:
    """Return new mean / old mean; 1 where there is nothing to compare."""
    if new.numel() == 0 or old.numel() == 0:
        return old.new_ones(())
    return torch.where(old.mean() > 0, new.mean() / old.mean(), 1.0).to(old.dtype)
