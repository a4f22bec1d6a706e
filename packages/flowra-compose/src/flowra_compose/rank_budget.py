"""How a number of parameters is shared out among modules, so that truncation to their ranks loses least in all.

The i-th unit of rank of module l keeps the energy σ²_{l,i} and costs c_l parameters. Energies do not increase with i,
so taking units in the order of σ²/c, largest first, is optimal for the parameters it spends (exchange argument). Where
the next unit of a module no longer fits, the module is closed and others go on. What is kept falls short of the optimum
by less than the energy of the first unit that did not fit; with equal costs, by nothing.

Source: the greedy order of Dantzig 1957 (Discrete-variable extremum problems); docs/methods.md, section 26.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["ranks_within"]


def ranks_within(
    energies: Mapping[str, Sequence[float]], costs: Mapping[str, int], *, parameters: int
) -> dict[str, int]:
    """Choose a rank for every module.

    Args:
        energies: by module, what each unit of rank keeps, ≥ 0 and non-increasing; comparable among modules. Units of
            energy 0 are never taken.
        costs: by module, the parameters of one unit of rank, ≥ 1.
        parameters: to be spent at most.

    Returns:
        A rank for every module, 0 where the parameters do better elsewhere or there is nothing to keep. Of units worth
        the same for each parameter those of the first name are taken first.

    Raises:
        ValueError: if parameters are too few for any unit.

    Source: docs/methods.md, section 26.

    Example:
        The first unit of ``wide`` keeps most, but costs more than that of ``slim``, whose second is not worth its cost.

        >>> ranks_within({"slim": [4.0, 2.0], "wide": [9.0, 1.0]}, {"slim": 10, "wide": 30}, parameters=40)
        {'slim': 1, 'wide': 1}
    """
    ranks = dict.fromkeys(sorted(energies), 0)
    queue = list(_next_units(energies, costs, ranks, ranks))
    least = min((costs[name] for _, name in queue), default=0)
    if parameters < least:
        raise ValueError(f"parameters must be ≥ {least}, one unit of rank of the cheapest module, got {parameters}")
    heapq.heapify(queue)
    left = parameters
    while queue:
        _, name = heapq.heappop(queue)
        if costs[name] <= left:
            left -= costs[name]
            ranks[name] += 1
            for unit in _next_units(energies, costs, ranks, [name]):
                heapq.heappush(queue, unit)
    return ranks


def _next_units(
    energies: Mapping[str, Sequence[float]], costs: Mapping[str, int], ranks: Mapping[str, int], names: Iterable[str]
) -> Iterator[tuple[float, str]]:
    """Yield, of modules whose next unit is worth something, minus its worth for a parameter, and the name."""
    for name in names:
        following = energies[name][ranks[name] : ranks[name] + 1]
        if len(following) and following[0] > 0:
            yield -following[0] / costs[name], name
