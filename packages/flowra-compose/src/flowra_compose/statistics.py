"""What is known of a task at one module, beside its update: the second moments that the update meets there.

They come as plain matrices, from whatever measured them on the task's own model (base and adapter) and inputs of the
task; labels are not needed. C is a mean over tokens and S over examples, or both of anything else: a factor common to
all tasks changes nothing. Between tasks, the one of larger moments weighs more: of two losses in nats, that which feels
a change more. To weigh tasks alike, divide C and S by their traces.

A task that leaves a module alone but has statistics there asks rules to leave its outputs as they are (τᵢ = 0); without
statistics it asks for nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ModuleStatistics", "statistics_at"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModuleStatistics:
    """Second moments of one module under one task.

    Raises:
        ValueError: if a matrix is not square, not finite, or has a diagonal below 0.
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
        for name, moment in (("inputs", self.inputs), ("outputs", self.outputs)):
            if moment is not None and bool(((moment if moment.ndim == 1 else moment.diagonal()) < 0).any()):
                raise ValueError(f"{name} must have a diagonal ≥ 0, as second moments do, got one below 0")
        if self.fisher is not None and bool((self.fisher < 0).any()):
            raise ValueError(f"fisher must be ≥ 0, got {float(self.fisher.min())}")


def statistics_at(known: Mapping[str, ModuleStatistics], name: str) -> ModuleStatistics | None:
    """Look up what is known under a name; a bias is a weight whose one input is always 1.

    Args:
        known: module name to statistics.
        name: of a module, or of a module's bias, ``<module>.bias``.

    Returns:
        What is there, for a bias that is not C = [1] and the S of its module, whose diagonal stands for the Fisher's:
        it takes the tokens of an example to be independent. None if there is neither.
    """
    found = known.get(name)
    module = name.removesuffix(".bias")
    if found is not None or module == name or (of_module := known.get(module)) is None:
        return found
    one = torch.ones(1, dtype=torch.float64)
    return ModuleStatistics(
        inputs=one if of_module.inputs is None else one.to(of_module.inputs),
        outputs=of_module.outputs,
        fisher=_of_bias(of_module),
    )


def _of_bias(module: ModuleStatistics) -> Tensor | None:
    """Return the Fisher's diagonal of a module's bias, ``(m, 1)``, where that of its weight is known."""
    if module.fisher is None or module.outputs is None:
        return None
    return (module.outputs if module.outputs.ndim == 1 else module.outputs.diagonal())[:, None].clone()
