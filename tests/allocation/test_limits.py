"""What `allocate` is told of ranks beside the budget: caps, floors, frozen modules, steps, items, sets."""

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowra_allocation import SOLVERS, RankPlan, allocate, read_plan, write_plan

NAMED = pytest.mark.parametrize("solver", SOLVERS)
Name = Literal["greedy", "exact"]
GAINS = {"a": [8.0, 4.0, 2.0, 1.0], "b": [6.0, 3.0, 1.5, 0.75], "c": [0.05, 0.04, 0.03, 0.02]}
COSTS = {"a": 10, "b": 10, "c": 10}
FALLING = st.lists(st.integers(0, 80).map(lambda value: value / 8), min_size=4, max_size=12).map(
    lambda values: sorted(values, reverse=True)
)


def planned(budget: int = 60, **arguments: Any) -> RankPlan:  # noqa: ANN401 - those of allocate
    return allocate(GAINS, COSTS, budget=budget, **arguments)


@NAMED
def test_a_cap_holds_for_all_or_by_name(solver: Name) -> None:
    assert planned(caps=2, solver=solver).ranks == {"a": 2, "b": 2, "c": 0}
    assert planned(caps={"a": 1}, solver=solver).ranks == {"a": 1, "b": 4, "c": 0}
    assert planned(caps=99, solver=solver).ranks == planned(solver=solver).ranks


@NAMED
def test_a_floor_holds_below_the_threshold_and_no_further(solver: Name) -> None:
    plan = planned(floors=1, solver=solver)
    assert plan.modules["c"].psi < plan.sensitivity_threshold
    assert plan.ranks == {"a": 3, "b": 2, "c": 1}
    assert planned(budget=999, floors={"c": 2}, solver=solver).ranks == {"a": 4, "b": 4, "c": 2}


def test_a_floor_for_all_asks_no_more_of_a_module_than_it_can_have() -> None:
    gains = {"a": [3.0, 2.0], "b": [2.0], "c": []}
    assert allocate(gains, COSTS, budget=30, floors=2).ranks == {"a": 2, "b": 1, "c": 0}
    assert planned(floors=2, caps={"a": 1, "c": 0}).ranks["a"] == 1


@NAMED
def test_a_frozen_module_keeps_its_rank_whatever_else_is_said(solver: Name) -> None:
    plan = planned(frozen={"c": 3, "a": 0}, caps=1, floors={"a": 1}, rank_steps=(1,), solver=solver)
    assert plan.ranks == {"a": 0, "b": 1, "c": 3}
    assert plan.last_in == ("b", 0.6)
    assert plan.first_out is None


def test_a_frozen_module_may_have_more_rank_than_gains_that_were_measured() -> None:
    plan = allocate({"a": [2.0], "b": [1.0]}, {"a": 3, "b": 3}, budget=20, frozen={"a": 5})
    assert plan.ranks == {"a": 5, "b": 1}
    assert plan.modules["a"].gains == (2.0,)


def test_a_plan_in_which_all_is_frozen_is_what_was_frozen() -> None:
    ranks = {"a": 1, "b": 0, "c": 2}
    assert planned(frozen=ranks).ranks == ranks
    assert planned(budget=5, frozen=dict.fromkeys(GAINS, 0)).parameters == 0


@NAMED
@given(st.lists(FALLING, min_size=1, max_size=4), st.integers(20, 200), st.sets(st.integers(1, 9), min_size=1))
def test_with_steps_every_rank_is_a_step_or_nothing(
    solver: Name, values: list[list[float]], budget: int, steps: set[int]
) -> None:
    gains = {str(index): each for index, each in enumerate(values)}
    plan = allocate(gains, dict.fromkeys(gains, 2), budget=budget, rank_steps=sorted(steps), solver=solver)
    assert set(plan.ranks.values()) <= {0, *steps}


def test_floors_and_caps_go_to_the_steps_inside_them() -> None:
    assert planned(999, rank_steps=(2, 4), caps=3, floors=1).ranks == {"a": 2, "b": 2, "c": 2}
    assert planned(999, rank_steps=(2, 4), caps=1).ranks == {"a": 0, "b": 0, "c": 0}


@NAMED
@given(st.lists(FALLING, min_size=1, max_size=4), st.integers(10, 200), st.integers(0, 4))
def test_with_cap_steps_the_largest_rank_is_at_most_the_step_that_is_at_most_the_largest_rank_without(
    solver: Name, values: list[list[float]], budget: int, floor: int
) -> None:
    gains, steps = {str(index): each for index, each in enumerate(values)}, (2, 4, 8)
    costs = dict.fromkeys(gains, 2)
    floor = min(floor, budget // (2 * len(gains)))
    free = allocate(gains, costs, budget=budget, floors=floor, solver=solver)
    cut = allocate(gains, costs, budget=budget, floors=floor, cap_steps=steps, solver=solver)
    largest = max(free.ranks.values())
    step = max((each for each in steps if floor <= each <= largest), default=largest)
    assert max(cut.ranks.values()) == step
    assert cut.ranks == free.ranks if step == largest else cut.ranks != free.ranks


def test_where_no_cap_step_is_below_the_largest_rank_nothing_changes() -> None:
    assert planned(cap_steps=(8, 16)).ranks == planned().ranks
    assert planned(999, frozen={"a": 4}, cap_steps=(1, 2, 3)).ranks == planned(999, frozen={"a": 4}).ranks


@NAMED
def test_an_item_is_there_or_not_and_competes_with_units_of_rank(solver: Name) -> None:
    gains, costs = {"q": [4.0, 1.0], "norm.weight": [0.5]}, {"q": 16, "norm.weight": 4}
    kinds = {"norm.weight": "norm"}
    plan = allocate(gains, costs, budget=20, kinds=kinds, rank_steps=(1, 2), solver=solver)
    assert plan.ranks == {"q": 1, "norm.weight": 1}
    assert plan.modules["norm.weight"].kind == "norm"
    assert allocate(gains, costs, budget=16, kinds=kinds, solver=solver).ranks == {"q": 1, "norm.weight": 0}


def test_steps_do_not_concern_items() -> None:
    gains, costs = {"q": [4.0] * 8, "norm.weight": [0.5]}, {"q": 1, "norm.weight": 4}
    plan = allocate(gains, costs, budget=12, kinds={"norm.weight": "norm"}, rank_steps=(8,), cap_steps=(8,))
    assert plan.ranks == {"q": 8, "norm.weight": 1}


@NAMED
def test_modules_taken_together_cost_and_gain_together(solver: Name) -> None:
    gains = {"shift": [0.1], "q": [3.0, 1.0], "gain": [3.0]}
    costs = {"shift": 4, "q": 8, "gain": 4}
    kinds = {"gain": "norm", "shift": "norm"}
    together = [("gain", "shift")]
    plan = allocate(gains, costs, budget=8, kinds=kinds, together=together, solver=solver)
    assert plan.ranks == {"shift": 1, "q": 0, "gain": 1}
    assert list(plan.ranks) == list(gains)
    assert plan.last_in == ("gain", 3.1 / 8)
    assert plan.modules["gain"].psi == plan.modules["shift"].psi
    assert allocate(gains, costs, budget=7, kinds=kinds, solver=solver).ranks["gain"] == 1
    with pytest.raises(ValueError, match="budget must be at least one unit of rank, 8 parameters here, got 7"):
        allocate(gains, costs, budget=7, kinds=kinds, together=together, solver=solver)


def test_of_modules_taken_together_the_tightest_limit_binds() -> None:
    together = [{"a", "b"}]
    assert planned(999, together=together, caps={"a": 3, "b": 2}).ranks["a"] == 2
    assert planned(999, together=together, floors={"b": 1}, caps=1).ranks == {"a": 1, "b": 1, "c": 0}
    assert planned(999, together=together, frozen={"b": 3}).ranks == {"a": 3, "b": 3, "c": 0}


def test_together_costs_that_are_not_in_proportion_add_up_too() -> None:
    gains, costs = {"a": [2.0, 1.0], "b": [2.0, 1.0, 1.0]}, {"a": [3, 9], "b": 2}
    plan = allocate(gains, costs, budget=99, together=[["b", "a"]])
    assert plan.ranks == {"a": 2, "b": 2}
    assert plan.parameters == 9 + 4


def test_what_costs_more_or_less_than_its_rank_says_so_in_the_plan_and_its_file(tmp_path: Path) -> None:
    gains, costs = {"conv": [4.0, 3.0], "q": [1.0, 0.5]}, {"conv": [7, 16], "q": 5}
    plan = allocate(gains, costs, budget=22, kinds={"conv": "flora"})
    assert plan.ranks == {"conv": 2, "q": 1}
    assert (plan.modules["conv"].cost_per_rank, plan.modules["conv"].parameters) == (7, 16)
    assert (plan.modules["q"].parameters, plan.parameters) == (None, 21)
    write_plan(plan, tmp_path)
    assert read_plan(tmp_path) == plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"caps": -1}, "caps must be ranks ≥ 0, got -1"),
        ({"floors": {"a": -1}}, "floors must be ranks ≥ 0, got {'a': -1}"),
        ({"frozen": {"a": -1}}, "frozen must be ranks ≥ 0, got {'a': -1}"),
        ({"caps": {"z": 1}}, "caps must name modules with gains, got ['z']"),
        ({"floors": {"z": 1}}, "floors must name modules with gains, got ['z']"),
        ({"frozen": {"z": 1}}, "frozen must name modules with gains, got ['z']"),
        ({"kinds": {"z": "norm"}}, "kinds must name modules with gains, got ['z']"),
        ({"floors": {"a": 5}}, "floors must be at most the largest rank, 4 for 'a', got 5. Lower the floor."),
        ({"floors": {"a": 3}, "caps": 2}, "floors must be at most the largest rank, 2 for 'a', got 3"),
        ({"floors": 4}, "floors and frozen modules must fit the budget, 60 parameters, got 120"),
        ({"rank_steps": ()}, "rank_steps must be at least one rank ≥ 1, got []"),
        ({"rank_steps": (0, 8)}, "rank_steps must be at least one rank ≥ 1, got [0, 8]"),
        ({"cap_steps": (0,)}, "cap_steps must be at least one rank ≥ 1, got [0]"),
        ({"rank_steps": (8,), "budget": 70}, "budget must be at least one unit of rank, 80 parameters here, got 70"),
        ({"together": [()]}, "together must be sets of known modules, each in one of them only, got []"),
        ({"together": [("a", "z")]}, "together must be sets of known modules"),
        ({"together": [("a", "b"), ("b", "c")]}, "each in one of them only, got ['b', 'c']"),
        ({"kinds": {"a": "pickle"}}, "kind must be one of"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        planned(**arguments)


def test_modules_taken_together_cannot_be_frozen_at_two_ranks() -> None:
    with pytest.raises(ValueError, match="frozen must be the same rank for all that are taken together, got"):
        planned(together=[("a", "b")], frozen={"a": 1, "b": 2})
