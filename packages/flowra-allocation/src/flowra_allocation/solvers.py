"""The solvers of the knapsack by name."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from flowra_allocation.exact import exact
from flowra_allocation.greedy import greedy
from flowra_allocation.knapsack import Allocation, Cost

__all__ = ["SOLVERS", "Solver"]


class Solver(Protocol):
    """Choose ranks with a large sum of gains that fit a budget."""

    def __call__(
        self,
        gains: Mapping[str, Sequence[float]],
        costs: Mapping[str, Cost],
        budget: int,
        *,
        caps: Mapping[str, int] | None = None,
        floors: Mapping[str, int] | None = None,
        rank_steps: Mapping[str, Sequence[int]] | None = None,
    ) -> Allocation:
        """Solve one knapsack; the arguments are those of :func:`flowra_allocation.greedy`."""
        ...


SOLVERS: Mapping[str, Solver] = MappingProxyType({"greedy": greedy, "exact": exact})
"""Solvers by name."""
