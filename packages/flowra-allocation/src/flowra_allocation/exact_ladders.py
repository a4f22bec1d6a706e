"""The exact solver where ranks come in steps or costs are not in proportion to rank (docs/methods.md, section 6).

One rank is chosen on each ladder: a multiple-choice knapsack. The upper concave envelopes of all ladders, their steps
sorted by gain per parameter and taken while they fit, give the *break* set, and the density λ of the first step that
does not fit. Choosing another rank on one ladder loses (G - λ C) of the break set's rank minus that of the other, ≥ 0,
and no set that differs from the break set can have more than

    its gain + λ · what it leaves of the budget - the losses of all its changes.

So ladders are opened in the order of their smallest loss, a list of states (cost, gain) is kept, and a state leaves
when another costs no more and gains no less, or when its losses are too large to beat the best set known. The search
ends when the smallest loss of the next ladder alone is.

All arithmetic is in whole numbers (see ``_Number``), so the answer is the optimum of the steps' gains as given.

Source: Pisinger (1995), A minimal algorithm for the multiple-choice knapsack problem. Deviations: one bound, that of
the Lagrangian at λ; ties are decided.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from flowra_allocation.greedy import climb
from flowra_allocation.knapsack import Ladder

__all__ = ["exact_ladders"]

Point = tuple[int, int]
"""Cost and number of a rank; the number is larger for the better of two sets, see ``_Number``."""


def exact_ladders(rungs: Mapping[str, Ladder], room: int, *, max_states: int) -> dict[str, int]:
    """Choose the rank on each ladder that gives the largest sum of gains in the room.

    Of several optima, that with the fewest parameters; of several of these, the one that gives the first module, by
    name, the most rank, then the second, and so on.

    Args:
        rungs: module name to its ladder.
        room: parameters above the least ranks, ≥ 0.
        max_states: states that the search may look at.

    Returns:
        Module name to the index of the rank on its ladder.

    Raises:
        ValueError: if the search would look at more than ``max_states`` states.
    """
    divisor = math.gcd(*(cost for each in rungs.values() for cost in each.costs)) or 1
    capacity = room // divisor
    number = _Number(rungs, divisor, capacity)
    points = {name: number.points(name) for name in sorted(rungs)}
    taken, density = _break(points, capacity)
    first = climb(rungs, room)
    known = sum(points[name][rungs[name].ranks.index(rank)][1] for name, rank in first.items())
    cost = sum(points[name][place][0] for name, place in taken.items())
    value = sum(points[name][place][1] for name, place in taken.items())
    changes = [_changes(points[name], place, density) for name, place in taken.items() if len(points[name]) > 1]
    changes.sort(key=lambda each: each.least)
    best = _search(changes, cost=cost, value=value, capacity=capacity, known=known, density=density, limit=max_states)
    return number.places(best)


class _Number:
    """One whole number for a set of ranks, the larger the better: gain first, then parameters, then names.

    From the top: the gain above the least ranks times a power of two that makes it whole; minus the cost; and for each
    module, the first by name highest, the index of its rank. Numbers of ranks add up to that of their set.
    """

    def __init__(self, rungs: Mapping[str, Ladder], divisor: int, capacity: int) -> None:
        self._rungs, self._divisor, self._capacity = rungs, divisor, capacity
        self._scale = max((gain.as_integer_ratio()[1] for each in rungs.values() for gain in each.gains), default=1)
        self._places: dict[str, int] = {}
        self._widths: dict[str, int] = {}
        place = 0
        for name in sorted(rungs, reverse=True):
            self._places[name], self._widths[name] = place, len(rungs[name].costs).bit_length()
            place += self._widths[name]
        self._cost_place = place
        self._gain_place = place + (capacity + 1).bit_length()

    def points(self, name: str) -> list[Point]:
        """List the ranks of one ladder that fit alone."""
        ladder, found = self._rungs[name], []
        wholes = (above * (self._scale // below) for above, below in map(float.as_integer_ratio, ladder.gains))
        gains, costs = accumulate(wholes, initial=0), accumulate(ladder.costs, initial=0)
        for index, (gain, cost) in enumerate(zip(gains, costs, strict=True)):
            cost //= self._divisor
            if cost <= self._capacity:
                whole = (gain << self._gain_place) - (cost << self._cost_place)
                found.append((cost, whole + (index << self._places[name])))
        return found

    def places(self, number: int) -> dict[str, int]:
        """Read off which rank of each ladder a set holds."""
        return {name: (number >> place) & ((1 << self._widths[name]) - 1) for name, place in self._places.items()}


def _break(points: Mapping[str, Sequence[Point]], capacity: int) -> tuple[dict[str, int], Point]:
    """Take steps of the envelopes by density while they fit.

    Returns:
        The places reached, and cost and number of the first step that did not fit; (1, 0) if there was none.
    """
    precision = 2 * capacity.bit_length() + 1  # tells any two densities apart
    steps = []
    for name, each in points.items():
        for low, high in _envelope(each):
            cost, value = each[high][0] - each[low][0], each[high][1] - each[low][1]
            steps.append(((value << precision) // cost, name, high, cost, value))
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    places, left = dict.fromkeys(points, 0), capacity
    for _, name, place, cost, value in steps:
        if cost > left:
            return places, (cost, value)
        places[name], left = place, left - cost
    return places, (1, 0)


def _envelope(points: Sequence[Point]) -> list[tuple[int, int]]:
    """List the steps, as pairs of places, of the upper concave envelope up to its highest point."""
    corners: list[int] = []
    for place, (cost, value) in enumerate(points):
        if corners and value <= points[corners[-1]][1]:
            continue
        while len(corners) > 1:
            (first_cost, first), (middle_cost, middle) = points[corners[-2]], points[corners[-1]]
            if (value - first) * (middle_cost - first_cost) < (middle - first) * (cost - first_cost):
                break
            corners.pop()
        corners.append(place)
    return list(pairwise(corners))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Changes:
    """What another rank on one ladder would change."""

    least: int
    """Smallest loss of a change."""
    each: tuple[Point, ...]
    """Differences of cost and number; at least one."""


def _changes(points: Sequence[Point], place: int, density: Point) -> _Changes:
    cost, value = points[place]
    others = [(other - cost, another - value) for index, (other, another) in enumerate(points) if index != place]
    return _Changes(least=min(_loss(each, density) for each in others), each=tuple(others))


def _loss(change: Point, density: Point) -> int:
    """Return λ · cost - number of a change, times the cost that λ = number / cost is of."""
    return density[1] * change[0] - density[0] * change[1]


def _search(
    ladders: Sequence[_Changes], *, cost: int, value: int, capacity: int, known: int, density: Point, limit: int
) -> int:
    """Return the largest number of a set that fits; ``ladders`` in the order of their least loss."""
    room = capacity - cost
    known = max(known, value)
    states = [(0, 0)]
    looked_at = 0
    for index, ladder in enumerate(ladders):
        gap = density[0] * (value - known) + density[1] * room  # a set with losses of this and more is no better
        if ladder.least >= gap:
            break
        likely = [each for each in ladder.each if _loss(each, density) < gap]
        looked_at += len(states) * (1 + len(likely))
        if looked_at > limit:
            raise ValueError(
                f"gains and costs must let the exact solver look at no more than {limit} states, got more for"
                f" {len(ladders)} ladders of ranks. Use 'greedy', which falls short by at most one step."
            )
        states += [(used + more, other + better) for used, other in states for more, better in likely]
        known = max([known, *(value + other for used, other in states if used <= room)])
        gap = density[0] * (value - known) + density[1] * room
        least = ladders[index + 1].least if index + 1 < len(ladders) else gap  # that is still to be lost
        kept: list[Point] = []
        for state in sorted(states, key=lambda each: (each[0], -each[1])):
            if (not kept or state[1] > kept[-1][1]) and _loss(state, density) + least < gap:
                kept.append(state)
        states = kept
    return known
