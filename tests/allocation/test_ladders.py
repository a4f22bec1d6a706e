"""Floors, frozen modules, steps of rank and costs that are not in proportion to rank, against every rank map."""

import importlib
import itertools
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowra_allocation import SOLVERS, Solver, exact, greedy

SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
GAIN = st.integers(0, 40).map(lambda value: value / 8)  # add up exactly, and ties are frequent


@dataclass(frozen=True, kw_only=True)
class Problem:
    gains: dict[str, list[float]]
    costs: dict[str, int | Sequence[int]]
    caps: dict[str, int]
    floors: dict[str, int]
    rank_steps: dict[str, Sequence[int]]

    def cost(self, name: str, rank: int) -> int:
        cost = self.costs[name]
        return cost * rank if isinstance(cost, int) else ([0, *cost])[rank]

    def permitted(self, name: str) -> list[int]:
        low, high = self.floors.get(name, 0), min(self.caps.get(name, 99), len(self.gains[name]))
        steps = self.rank_steps.get(name)
        return [r for r in range(low, high + 1) if steps is None or low == high or r == 0 or r in steps]

    def least(self) -> int:
        return sum(self.cost(name, self.permitted(name)[0]) for name in self.gains)

    def used(self, ranks: Mapping[str, int]) -> int:
        return sum(self.cost(name, rank) for name, rank in ranks.items())

    def gain(self, ranks: Mapping[str, int]) -> Fraction:
        return sum((Fraction(gain) for name, rank in ranks.items() for gain in self.gains[name][:rank]), Fraction(0))

    def solved(self, solver: Solver, budget: int) -> dict[str, int]:
        found = solver(self.gains, self.costs, budget, caps=self.caps, floors=self.floors, rank_steps=self.rank_steps)
        assert found.parameters == self.used(found.ranks) <= budget
        assert found.gain == self.gain(found.ranks)
        return dict(found.ranks)

    def best(self, budget: int) -> dict[str, int]:
        """Try every rank map: the largest gain, then the fewest parameters, then the most rank for the first name."""
        names = sorted(self.gains)
        maps = (dict(zip(names, ranks, strict=True)) for ranks in itertools.product(*map(self.permitted, names)))
        fitting = [each for each in maps if self.used(each) <= budget]
        return max(fitting, key=lambda each: (self.gain(each), -self.used(each), tuple(each.values())))


@st.composite
def problems(draw: st.DrawFn, *, names: str = "abcd") -> Problem:
    falling = st.lists(GAIN, max_size=5).map(lambda values: sorted(values, reverse=True))
    gains = draw(st.dictionaries(st.sampled_from(names), falling, min_size=1))
    costs: dict[str, int | Sequence[int]] = {}
    caps, floors, steps = {}, {}, {}
    for name, each in gains.items():
        step = draw(st.integers(1, 9))
        if draw(st.booleans()):
            costs[name] = step
        else:
            size = max(1, len(each))
            rises = draw(st.lists(st.integers(1, 9), min_size=size, max_size=size))
            costs[name] = list(itertools.accumulate(rises))
        if draw(st.booleans()):
            caps[name] = draw(st.integers(0, 6))
        limit = min(len(each), caps.get(name, 99))
        if draw(st.booleans()):
            floors[name] = draw(st.integers(0, limit))
        if draw(st.booleans()):
            steps[name] = [*draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)), max(1, limit)]
    return Problem(gains=gains, costs=costs, caps=caps, floors=floors, rank_steps=steps)


ROOM = st.integers(0, 60)


@settings(max_examples=100)
@given(problems(), ROOM)
def test_exact_is_the_best_of_all_permitted_rank_maps(problem: Problem, room: int) -> None:
    budget = problem.least() + room
    found, best = problem.solved(exact, budget), problem.best(budget)
    assert problem.gain(found) == problem.gain(best)
    # what exceeds the best set gains nothing: it fills the room that is left
    assert all(found[name] >= rank for name, rank in best.items())


@settings(max_examples=100)
@given(problems(), ROOM)
def test_greedy_falls_short_of_the_best_by_at_most_one_step_of_an_envelope(problem: Problem, room: int) -> None:
    budget = problem.least() + room
    best, found = problem.gain(problem.best(budget)), problem.gain(problem.solved(greedy, budget))
    largest = max(sum(map(Fraction, each)) for each in problem.gains.values())
    assert 0 <= best - found <= largest


@SOLVER
@given(problems(), ROOM)
def test_ranks_are_permitted_and_no_higher_one_of_any_module_would_fit(
    solver: Solver, problem: Problem, room: int
) -> None:
    budget = problem.least() + room
    ranks = problem.solved(solver, budget)
    left = budget - problem.used(ranks)
    for name, rank in ranks.items():
        permitted = problem.permitted(name)
        assert rank in permitted
        for higher in permitted[permitted.index(rank) + 1 :]:
            assert problem.cost(name, higher) - problem.cost(name, rank) > left


@SOLVER
@given(problems(), ROOM, st.integers(0, 25))
def test_the_planned_gain_never_falls_when_the_budget_grows(
    solver: Solver, problem: Problem, room: int, more: int
) -> None:
    budget = problem.least() + room
    small, large = (problem.gain(problem.solved(solver, each)) for each in (budget, budget + more))
    assert large >= small


@SOLVER
@given(problems(), ROOM, st.randoms(use_true_random=False))
def test_the_order_of_the_modules_does_not_matter(solver: Solver, problem: Problem, room: int, random: Random) -> None:
    names = list(problem.gains)
    random.shuffle(names)
    other = Problem(
        gains={name: problem.gains[name] for name in names},
        costs=dict(reversed(problem.costs.items())),
        caps=problem.caps,
        floors=problem.floors,
        rank_steps=problem.rank_steps,
    )
    budget = problem.least() + room
    assert other.solved(solver, budget) == problem.solved(solver, budget)


@SOLVER
@given(problems(), ROOM, st.integers(-8, 8))
def test_the_scale_of_the_loss_changes_no_rank(solver: Solver, problem: Problem, room: int, power: int) -> None:
    scaled = Problem(
        gains={name: [2.0**power * gain for gain in each] for name, each in problem.gains.items()},
        costs=problem.costs,
        caps=problem.caps,
        floors=problem.floors,
        rank_steps=problem.rank_steps,
    )
    budget = problem.least() + room
    assert scaled.solved(solver, budget) == problem.solved(solver, budget)


@SOLVER
@given(problems(), ROOM)
def test_the_edges_are_the_slopes_of_the_envelope_on_either_side(solver: Solver, problem: Problem, room: int) -> None:
    budget = problem.least() + room
    found = solver(
        problem.gains,
        problem.costs,
        budget,
        caps=problem.caps,
        floors=problem.floors,
        rank_steps=problem.rank_steps,
    )

    def slope(name: str, low: int, high: int) -> float:
        return sum(problem.gains[name][low:high]) / (problem.cost(name, high) - problem.cost(name, low))

    below, above = [], []
    for name, rank in found.ranks.items():
        permitted = problem.permitted(name)
        below += [min(slope(name, low, rank) for low in permitted if low < rank)] if rank > permitted[0] else []
        above += [max(slope(name, rank, high) for high in permitted if high > rank)] if rank < permitted[-1] else []
    assert (found.last_in and found.last_in[1]) == (min(below) if below else None)
    assert (found.first_out and found.first_out[1]) == (max(above) if above else None)


@SOLVER
@given(problems(), ROOM)
def test_proportional_costs_written_out_are_the_same_costs(solver: Solver, problem: Problem, room: int) -> None:
    linear = {name: cost if isinstance(cost, int) else cost[0] for name, cost in problem.costs.items()}
    written = {name: [cost * rank for rank in range(1, 7)] for name, cost in linear.items()}
    budget = sum(cost * problem.floors.get(name, 0) for name, cost in linear.items()) + room
    caps, floors = problem.caps, problem.floors
    assert solver(problem.gains, linear, budget, caps=caps, floors=floors) == solver(
        problem.gains, written, budget, caps=caps, floors=floors
    )


@SOLVER
@given(problems(), ROOM)
def test_a_floor_is_a_first_part_of_the_budget_already_spent(solver: Solver, problem: Problem, room: int) -> None:
    floors, costs = problem.floors, {name: index + 2 for index, name in enumerate(sorted(problem.gains))}
    rest = {name: each[floors.get(name, 0) :] for name, each in problem.gains.items()}
    spent = sum(costs[name] * floor for name, floor in floors.items())
    expected = solver(rest, costs, room).ranks
    found = solver(problem.gains, costs, spent + room, floors=floors).ranks
    assert found == {name: rank + floors.get(name, 0) for name, rank in expected.items()}


# by hand


@SOLVER
def test_a_step_that_gains_more_than_the_one_before_is_taken_with_it(solver: Solver) -> None:
    # a Tucker update whose second unit costs little: (10, 5), (11, 9) lies above the line, so b waits for both
    gains, costs = {"a": [4.0], "b": [5.0, 4.0]}, {"a": 6, "b": [10, 11]}
    assert solver(gains, costs, 11).ranks == {"a": 0, "b": 2}
    found = greedy(gains, costs, 11)
    assert found.last_in == ("b", 9 / 11)
    assert found.first_out == ("a", 4 / 6)


@SOLVER
def test_where_the_whole_step_does_not_fit_a_part_of_it_is_taken(solver: Solver) -> None:
    assert solver({"b": [5.0, 4.0]}, {"b": [10, 11]}, 10).ranks == {"b": 1}


@SOLVER
def test_ranks_come_in_the_steps_that_are_permitted(solver: Solver) -> None:
    gains = {"a": [8.0] * 20, "b": [1.0] * 20}
    costs = {"a": 1, "b": 1}
    steps = {"a": (1, 8, 16), "b": (1, 8, 16)}
    assert solver(gains, costs, 15, rank_steps=steps).ranks == {"a": 8, "b": 1}
    assert solver(gains, costs, 24, rank_steps=steps).ranks == {"a": 16, "b": 8}


@SOLVER
def test_a_module_whose_floor_is_its_cap_keeps_its_rank_off_the_steps(solver: Solver) -> None:
    gains = {"a": [9.0] * 8, "b": [1.0] * 8}
    found = solver(gains, {"a": 1, "b": 1}, 12, caps={"b": 3}, floors={"b": 3}, rank_steps=dict.fromkeys(gains, (4, 8)))
    assert found.ranks == {"a": 8, "b": 3}
    assert found.last_in == ("a", 9.0)
    assert found.first_out is None


@SOLVER
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"floors": {"a": 3}}, "floors must be of modules with gains, ≥ 0 and at most the largest rank, got {'a': 3}"),
        ({"floors": {"b": 1}}, "floors must be of modules with gains"),
        ({"floors": {"a": -1}}, "floors must be of modules with gains"),
        ({"floors": {"a": 2}, "caps": {"a": 1}}, "floors must be of modules with gains"),
        ({"floors": {"a": 2}}, "floors and frozen modules must fit the budget, 5 parameters, got 6. Lower them"),
        ({"rank_steps": {"a": (0, 1)}}, "rank_steps must be of modules with gains, and ≥ 1, got {'a': [0, 1]}"),
        ({"rank_steps": {"b": (1,)}}, "rank_steps must be of modules with gains"),
        ({"rank_steps": {"a": (4,)}, "floors": {"a": 1}}, "rank_steps must have a step from 1, the floor, to 2, the"),
        ({"costs": {"a": [3]}}, "cost at rank 1, 2, … must be ≥ 1, rise, and reach to the last gain, the 2th, got [3]"),
        ({"costs": {"a": [3, 3]}}, "cost at rank 1, 2, … must be ≥ 1, rise"),
        ({"costs": {"a": [0, 3]}}, "cost at rank 1, 2, … must be ≥ 1, rise"),
    ],
)
def test_limits_that_cannot_hold_are_refused(
    solver: Solver, arguments: dict[str, dict[str, int]], message: str
) -> None:
    given_ = {"costs": {"a": 3}, "budget": 5, **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        solver({"a": [2.0, 1.0]}, **given_)  # type: ignore[arg-type]


def test_a_search_beyond_the_stated_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("flowra_allocation.exact")
    monkeypatch.setattr(module, "MAX_STATES", 1000)
    costs = {f"{index}": Random(index).randint(1000, 20_000) for index in range(100)}
    gains = {name: [float(cost)] * 16 for name, cost in costs.items()}  # in proportion to costs: nothing to prune
    with pytest.raises(ValueError, match="must let the exact solver look at no more than 1000 states, got more for"):
        exact(gains, costs, 1_234_567, rank_steps=dict.fromkeys(costs, (1, 8, 16)))


def test_a_model_of_560_modules_is_allocated_in_a_second_with_steps_and_with_tucker_costs() -> None:
    random = Random(0)
    costs = {f"layer.{index}": random.choice((9216, 16384, 36864)) for index in range(560)}
    sizes = {name: random.random() for name in costs}
    gains = {name: [size * 0.95**unit for unit in range(128)] for name, size in sizes.items()}
    tucker = {name: [cost * rank + 4 * rank * rank for rank in range(1, 129)] for name, cost in costs.items()}
    for price, steps in ((costs, dict.fromkeys(costs, (1, 8, 16, 32, 64, 128))), (tucker, None)):
        start = time.process_time()
        greedy(gains, price, 200_000_000, rank_steps=steps)
        assert time.process_time() - start < 3  # the bar is one second, on a quiet machine
