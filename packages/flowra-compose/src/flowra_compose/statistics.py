"""What is known of a task at one module, beside its update: the second moments that the update meets there.

They come as plain matrices, from whatever measured them on the task's own model (base and adapter) and inputs of the
task; labels are not needed. C is a mean over tokens and S over examples, or both of anything else: the rules that use
them do not ask for their scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ModuleStatistics"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModuleStatistics:
    """Second moments of one module under one task.

    Raises:
        ValueError: if a matrix is not square or not finite.
    """

    inputs: Tensor | None = None
    """C = E[x xᵀ], ``(n, n)``, or ``(n,)`` where it is diagonal (an embedding's). Floating, of any dtype."""
    outputs: Tensor | None = None
    """S, the second moment of the gradients with respect to the outputs, ``(m, m)`` or ``(m,)``."""
    fisher: Tensor | None = None
    """The diagonal of the Fisher information of the weight, ``(m, n)``, ≥ 0."""

    def __post_init__(self) -> None:
        for name, moment in (("inputs", self.inputs), ("outputs", self.outputs)):
            if moment is not None and not (moment.ndim == 1 or (moment.ndim == 2 and len(moment) == moment.shape[1])):
                raise ValueError(f"{name} must be (d, d) or (d,), got {tuple(moment.shape)}")
        for name, values in (("inputs", self.inputs), ("outputs", self.outputs), ("fisher", self.fisher)):
            if values is not None and not torch.isfinite(values).all():
                raise ValueError(f"{name} must be finite, got NaN or infinity")
