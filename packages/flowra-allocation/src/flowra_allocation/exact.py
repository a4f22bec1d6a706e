"""The exact solver of the knapsack (docs/methods.md, section 6).

Units of rank are sorted by gain per parameter. The longest prefix that fits, the *break* set, is within a fraction of
one unit of the optimum, and the optimum differs from it in few units, near the break. So the search grows outwards from
the break: it may add the next unit to the right, then may remove the next one to the left, and keeps a list of states
(cost, gain). A state leaves when another costs no more and gains no less, or when not even a fraction of the next unit
could lift it above the best set known, at first the greedy one. The search ends when none is left.

All arithmetic is in whole numbers (a float is one, times a power of two), so the answer is the optimum of the gains as
given, not of their rounded sums. Which of several optimal sets is meant is part of the same number (``_Number``).

Costs are divided by their greatest common divisor. With c the largest quotient, some optimum differs from the break set
in fewer than 2 c units: in a fitting order the costs on the way from one set to the other stay within c of the budget,
and if one of these 2 c values came twice, the units in between could be put back without loss. So on either side only
the 2 c - 1 nearest units of each cost are looked at. This bounds the work where costs share a large divisor, as in
transformers. Other costs are as a rule no harder; gains in proportion to such costs can be too hard, and are refused.

Where ranks come in steps or costs are not in proportion to rank, units cannot be taken in any order, and the search is
that of ``exact_ladders.py``.

Source: Pisinger (1997), A minimal algorithm for the 0-1 knapsack problem; the bound on the changes is the argument of
Eisenbrand & Weismantel (2018) in one dimension. Deviations: the first bound is the greedy set, units are not reduced
beforehand, ties are decided.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from flowra_allocation.exact_ladders import exact_ladders
from flowra_allocation.greedy import greedy, room_above
from flowra_allocation.knapsack import Allocation, Cost, Ladder, check_gains, describe, ladders

__all__ = ["MAX_STATES", "exact"]

MAX_STATES = 2**21
"""States that one search may look at: seconds of time, at most some hundred megabytes."""


def exact(
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, Cost],
    budget: int,
    *,
    caps: Mapping[str, int] | None = None,
    floors: Mapping[str, int] | None = None,
    rank_steps: Mapping[str, Sequence[int]] | None = None,
) -> Allocation:
    """Take the units of rank with the largest sum of gains that fits.

    Of several optimal sets, the one with the fewest parameters; of several of these, the one that gives the first
    module, by name, the most rank, then the second, and so on. Units of gain 0 that still fit are then taken by name,
    as ``greedy`` does: no module stays below its limit while the budget has room. So equal costs give the ranks of
    ``greedy``, and the order of the input does not matter.

    Args:
        gains: module name to the gains of its first, second, … unit of rank, non-increasing, ≥ 0. Their number is the
            module's largest possible rank. One gain makes an item: there or not.
        costs: module name to parameters per unit of rank, ≥ 1; or to the parameters at rank 1, 2, … in all, rising.
        budget: P ≥ 0, in parameters.
        caps: module name to the largest rank wanted; modules not named are limited by the number of gains.
        floors: module name to the least rank, 0 where not named. A module whose floor is its largest rank is frozen.
        rank_steps: module name to the ranks that it may have beside 0; all, where not named.

    Returns:
        The ranks.

    Raises:
        ValueError: if the names differ, a cost is below 1 or does not rise, a cap or floor is out of range, the floors
            exceed the budget, gains are negative, increasing or not finite, or the search would look at more than
            ``MAX_STATES`` states.

    Example:
        Greedy takes the denser unit, and then the better one does not fit.

        >>> gains, costs = {"query": [10.0], "value": [6.0]}, {"query": 10, "value": 5}
        >>> greedy(gains, costs, 10).ranks, exact(gains, costs, 10).ranks
        ({'query': 0, 'value': 1}, {'query': 1, 'value': 0})
    """
    check_gains(gains, costs, budget)
    rungs = ladders(gains, costs, caps=caps, floors=floors, rank_steps=rank_steps)
    room = room_above(rungs, costs, budget)
    if all(each.concave and len(set(each.costs)) < 2 for each in rungs.values()):
        places = _places(rungs, room)
    else:
        places = exact_ladders(rungs, room, max_states=MAX_STATES)
    least = {name: each.ranks[places[name]] for name, each in rungs.items()}
    # what still fits gains nothing; no room is left all the same
    ranks = greedy(gains, costs, budget, caps=caps, floors=least, rank_steps=rank_steps).ranks
    return describe(ranks, gains, costs, rungs)


def _places(rungs: Mapping[str, Ladder], room: int) -> dict[str, int]:
    """Solve for ladders whose steps are all as dear: how many steps up each."""
    gains = {
        name: [gain for gain in each.gains if gain > 0]
        for name, each in sorted(rungs.items())
        if each.costs and each.costs[0] <= room
    }
    gains = {name: each for name, each in gains.items() if each}
    return dict.fromkeys(rungs, 0) | _optimum(gains, {name: rungs[name].costs[0] for name in gains}, room)


def _optimum(gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Solve for modules sorted by name, of positive gains, each of which would fit alone."""
    if not gains:
        return {}
    divisor = math.gcd(*(costs[name] for name in gains))
    capacity = budget // divisor
    number = _Number(gains, {name: costs[name] // divisor for name in gains}, capacity)
    units = [(number.costs[name], number.of(name, gain)) for name, each in gains.items() for gain in each]
    first = greedy(gains, costs, budget).ranks
    known = sum(number.of(name, gain) for name, rank in first.items() for gain in gains[name][:rank])
    return number.ranks(_search(units, capacity, known))


class _Number:
    """One whole number for a set of units, the larger the better: gain first, then cost, then names.

    From the top: the gain times a power of two that makes it whole; minus the cost; and for each module, the first by
    name highest, as many bits as its rank needs. Numbers of units add up to the number of their set, sets that fit
    compare as they should, and the ranks can be read off the lowest bits.
    """

    def __init__(self, gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], capacity: int) -> None:
        self.costs = costs
        self._scale = max(gain.as_integer_ratio()[1] for each in gains.values() for gain in each)
        self._widths = {name: len(each).bit_length() for name, each in gains.items()}
        self._places: dict[str, int] = {}
        place = 0
        for name in reversed(list(gains)):
            self._places[name] = place
            place += self._widths[name]
        self._cost_place = place
        self._gain_place = place + (capacity + 1).bit_length()

    def of(self, name: str, gain: float) -> int:
        """Return the number of one unit."""
        above, below = gain.as_integer_ratio()
        whole = above * (self._scale // below)
        return (whole << self._gain_place) - (self.costs[name] << self._cost_place) + (1 << self._places[name])

    def ranks(self, number: int) -> dict[str, int]:
        """Read off how many units of each module a set holds."""
        return {name: (number >> self._places[name]) & ((1 << width) - 1) for name, width in self._widths.items()}


def _search(units: Sequence[tuple[int, int]], capacity: int, known: int) -> int:
    """Return the largest number of a set of units ``(cost, number)`` that fits.

    Args:
        units: at least one, each of which fits alone.
        capacity: largest cost of a set.
        known: number of a set that fits.

    Returns:
        The number.

    Raises:
        ValueError: if the search would look at more than ``MAX_STATES`` states.
    """
    precision = 2 * capacity.bit_length()  # tells any two densities apart
    units = sorted(units, key=lambda unit: ((unit[1] << precision) // unit[0], unit), reverse=True)
    cost = value = taken = 0
    while taken < len(units) and cost + units[taken][0] <= capacity:
        cost, value, taken = cost + units[taken][0], value + units[taken][1], taken + 1
    reach = 2 * max(each for each, _ in units) - 1
    right = [*_nearest(units[taken:], reach), (1, 0)]  # where nothing is left to add, the density is 0
    left = [*_nearest(reversed(units[:taken]), reach), (0, 1)]  # where nothing is left to remove, infinite
    states = [(cost, -value)]  # negative, so that sorting puts the better of equal costs first
    added = removed = looked_at = 0
    while states:
        looked_at += 4 * len(states)
        if looked_at > MAX_STATES:
            kinds = len({each for each, _ in units})
            raise ValueError(
                f"gains and costs must let the exact solver look at no more than {MAX_STATES} states, got more for"
                f" {len(units)} units of {kinds} costs. Use 'greedy', which falls short by at most one gain."
            )
        if added < len(right) - 1:
            cost, value = right[added]
            added += 1
            states += [(used + cost, other - value) for used, other in states]
            states, known = _pruned(states, capacity, known, right[added], left[removed])
        if removed < len(left) - 1:
            cost, value = left[removed]
            removed += 1
            states += [(used - cost, other + value) for used, other in states]
            states, known = _pruned(states, capacity, known, right[added], left[removed])
    return known


def _nearest(units: Iterable[tuple[int, int]], reach: int) -> list[tuple[int, int]]:
    """Keep the first ``reach`` units of each cost."""
    seen: Counter[int] = Counter()
    kept = []
    for unit in units:
        seen[unit[0]] += 1
        if seen[unit[0]] <= reach:
            kept.append(unit)
    return kept


def _pruned(
    states: list[tuple[int, int]], capacity: int, known: int, right: tuple[int, int], left: tuple[int, int]
) -> tuple[list[tuple[int, int]], int]:
    """Keep the states that may lead to a larger number than the best one known, which they may raise themselves.

    A state with room to spare can gain at most the room times the density of the next unit to add; one over the
    capacity loses at least the excess times the density of the next to remove.

    Returns:
        The states, and the largest number known.
    """
    (add_cost, add_value), (remove_cost, remove_value) = right, left
    kept = []
    least = 1  # all are ≤ 0
    for used, negative in sorted(states):
        if negative < least:
            least = negative
            room = capacity - used
            if room >= 0:
                known = max(known, -negative)
                hopeful = (known + negative) * add_cost < room * add_value
            else:
                hopeful = (known + negative) * remove_cost < room * remove_value
            if hopeful:
                kept.append((used, negative))
    return kept, known
