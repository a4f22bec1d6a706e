"""InfLoRA: A is made of the new task's inputs, off what past tasks see, and fixed; B alone is trained.

Whatever B becomes, the layer answers inputs in the span of U as before. The rows of A are the leading directions of the
new task's inputs after projection, so that B is trained where the new task's gradient is largest.

Source: Liang & Li 2024 (arXiv:2404.00228), section 3. Deviations: the memory is that of :mod:`flowra_compose.memory`,
which always keeps U and caps k, where the paper's keeps the smaller of U and its complement, with a threshold that
rises from task to task; A is held by the pair, where the paper calls it B.
"""

from collections.abc import Mapping

import torch

from flowra_compose.memory import TaskMemory, leading_directions
from flowra_compose.null_space import LENGTH, NullSpace, projected
from flowra_compose.statistics import ModuleStatistics
from flowra_compose.trained_layers import TrainedPair

__all__ = ["start_inflora"]

NEGLIGIBLE = 1e-6  # of tr C: less energy than this is no direction


@torch.no_grad()
def start_inflora(
    layers: Mapping[str, TrainedPair], memory: TaskMemory, statistics: Mapping[str, ModuleStatistics]
) -> None:
    """Fix the A of each layer for a new task; call before the optimiser is built.

    Args:
        layers: module name to pair, with B = 0; A then no longer has ``requires_grad``.
        memory: of the tasks so far.
        statistics: ``inputs`` C ``(n, n)`` of each layer, on inputs of the new task before it is trained.

    Raises:
        ValueError: if a layer does not fit the memory, its B is not zero, it has no statistics, or the inputs have
            fewer directions off the memory than A has rows. Nothing is changed then.
    """
    NullSpace(layers, memory)  # refuses what it could not keep off the memory
    starts = {}
    for name, layer in layers.items():
        n, rank = layer.lora_A.shape[1], len(layer.lora_A)
        if layer.lora_B.any():
            raise ValueError(f"lora_B must be zero at the start, got another at {name!r}. Start with a new pair.")
        moment = statistics[name].inputs if name in statistics else None
        if moment is None or tuple(moment.shape) != (n, n):
            got = None if moment is None else tuple(moment.shape)
            raise ValueError(f"statistics must have inputs ({n}, {n}) for {name!r}, got {got}")
        values, vectors, u = leading_directions(moment, memory.modules[name].basis.to(moment.device))
        new = int((values > NEGLIGIBLE * moment.double().trace()).sum())
        if new < rank:
            raise ValueError(
                f"rank must be at most the {new} directions that the new inputs have off the memory, got {rank} at"
                f" {name!r}. Lower the rank there."
            )
        rows = projected(vectors[:, :rank].T, u)
        starts[name] = LENGTH * rows / rows.norm(dim=1, keepdim=True)
    for name, layer in layers.items():
        layer.lora_A.copy_(starts[name])
        layer.lora_A.requires_grad_(False)
