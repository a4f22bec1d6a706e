"""The table of adapter methods."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flowra_adapters.adapter import Adapter
from flowra_adapters.lora import LoRA
from flowra_adapters.matching import low_rank
from flowra_adapters.operators import Operator

__all__ = ["METHODS", "AdapterMethod"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterMethod:
    """How adapters of one kind are made. A method of your own is a value of this class, given to ``attach``."""

    name: str
    """Of the method."""
    adapter: Callable[..., Adapter]
    """Called with the operator, and ``rank``, ``scaling``, ``dropout``, ``dtype`` and ``generator`` by name."""
    scaling: Callable[[float, int], float] | None
    """s from α and the reference rank; None if the update has no scale."""
    needs_alpha: bool = False
    """Whether s must come from α."""
    adapts: Callable[[Operator], bool] = low_rank
    """Which weights it can adapt."""


def _over_rank(alpha: float, rank: int) -> float:
    return alpha / rank


def _over_root(alpha: float, rank: int) -> float:
    """Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2: the only power of the rank that keeps learning stable."""
    return alpha / math.sqrt(rank)


METHODS: Mapping[str, AdapterMethod] = MappingProxyType({
    row.name: row
    for row in (
        AdapterMethod(name="lora", adapter=LoRA, scaling=_over_rank),
        AdapterMethod(name="rslora", adapter=LoRA, scaling=_over_root, needs_alpha=True),
    )
})
