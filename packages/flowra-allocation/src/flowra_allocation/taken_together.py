"""Modules that have the same rank, such as a norm's gain and shift: one module to the knapsack."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from flowra_allocation.knapsack import Cost, parameters_at

__all__ = ["joint_costs", "joint_gains", "joint_limits", "sets_of"]

Sets = Mapping[str, Sequence[str]]
"""First name by the alphabet of each set to all its names; what stands alone is a set of one."""


def sets_of(together: Iterable[Collection[str]], names: Iterable[str]) -> dict[str, list[str]]:
    """Put every module into its set.

    Args:
        together: sets of modules.
        names: all modules.

    Returns:
        First name by the alphabet to all names, in the order of ``names``.

    Raises:
        ValueError: if a set is empty or names an unknown module, or a module is in two.
    """
    first = {name: name for name in names}
    placed: set[str] = set()
    for each in together:
        if not each or not first.keys() >= set(each) or placed & set(each):
            raise ValueError(f"together must be sets of known modules, each in one of them only, got {sorted(each)}")
        placed |= set(each)
        first |= dict.fromkeys(each, min(each))
    found: dict[str, list[str]] = {}
    for name, leader in first.items():
        found.setdefault(leader, []).append(name)
    return found


def joint_gains(gains: Mapping[str, Sequence[float]], sets: Sets) -> dict[str, Sequence[float]]:
    """Add up the gains of each set unit by unit, as far as all its modules have some."""
    return {
        leader: gains[leader]
        if len(names) == 1
        else [math.fsum(units) for units in zip(*(gains[name] for name in names), strict=False)]
        for leader, names in sets.items()
    }


def joint_costs(costs: Mapping[str, Cost], sets: Sets, units: Mapping[str, int]) -> dict[str, Cost]:
    """Add up the costs of each set, up to the given number of units where they are not in proportion to rank."""
    found: dict[str, Cost] = {}
    for leader, names in sets.items():
        own = [costs[name] for name in names]
        if len(own) == 1:
            found[leader] = own[0]
        elif all(isinstance(cost, int) for cost in own):
            found[leader] = sum(parameters_at(cost, 1) for cost in own)
        else:
            ranks = range(1, max(units[leader], 1) + 1)
            found[leader] = [sum(parameters_at(cost, rank) for cost in own) for rank in ranks]
    return found


def joint_limits(named: Mapping[str, int], sets: Sets) -> dict[str, list[int]]:
    """Collect what is said of the modules of each set; sets of which nothing is said are left out."""
    found = {leader: [named[name] for name in names if name in named] for leader, names in sets.items()}
    return {leader: values for leader, values in found.items() if values}
