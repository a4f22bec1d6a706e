"""The laws of the budget, over random gains and costs, for every solver of the knapsack."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowra_allocation import SOLVERS, Allocation, Solver, allocate, greedy, mean_rank

SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
NAMED = pytest.mark.parametrize("solver", SOLVERS)
Name = Literal["greedy", "exact"]
Problem = tuple[dict[str, list[float]], dict[str, int]]

# Multiples of 1/8 add up exactly, and ties are frequent.
GAIN = st.integers(0, 80).map(lambda value: value / 8)
FALLING = st.lists(GAIN, max_size=6).map(lambda values: sorted(values, reverse=True))


@st.composite
def problems(draw: st.DrawFn, *, equal_costs: bool = False) -> Problem:
    gains = draw(st.dictionaries(st.sampled_from("abcde"), FALLING, min_size=1))
    common = draw(st.integers(1, 12))
    return gains, {name: common if equal_costs else draw(st.integers(1, 12)) for name in gains}


def optimum(gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> float:
    ranges = [range(len(each) + 1) for each in gains.values()]
    return max(
        sum(sum(each[:rank]) for each, rank in zip(gains.values(), ranks, strict=True))
        for ranks in itertools.product(*ranges)
        if sum(cost * rank for cost, rank in zip(costs.values(), ranks, strict=True)) <= budget
    )


@SOLVER
@given(problems(), st.integers(0, 150))
def test_the_budget_is_kept_and_counted(solver: Solver, problem: Problem, budget: int) -> None:
    gains, costs = problem
    found = solver(gains, costs, budget)
    assert found.parameters == sum(costs[name] * rank for name, rank in found.ranks.items()) <= budget
    assert found.gain == sum(sum(gains[name][:rank]) for name, rank in found.ranks.items())
    assert list(found.ranks) == list(gains)


@SOLVER
@given(problems(), st.integers(0, 150), st.integers(0, 7))
def test_no_module_below_its_cap_could_take_one_more_unit(
    solver: Solver, problem: Problem, budget: int, cap: int
) -> None:
    gains, costs = problem
    found = solver(gains, costs, budget, caps=dict.fromkeys(gains, cap))
    for name, rank in found.ranks.items():
        assert rank <= min(cap, len(gains[name]))
        assert rank == min(cap, len(gains[name])) or found.parameters + costs[name] > budget


@SOLVER
@given(problems(), st.integers(0, 120), st.integers(0, 30))
def test_the_planned_gain_never_falls_when_the_budget_grows(
    solver: Solver, problem: Problem, budget: int, more: int
) -> None:
    assert solver(*problem, budget + more).gain >= solver(*problem, budget).gain


@SOLVER
@given(problems(equal_costs=True), st.integers(0, 120), st.integers(0, 30))
def test_no_rank_falls_when_the_budget_grows_and_costs_are_equal(
    solver: Solver, problem: Problem, budget: int, more: int
) -> None:
    small, large = solver(*problem, budget), solver(*problem, budget + more)
    assert all(small.ranks[name] <= large.ranks[name] for name in small.ranks)


@SOLVER
@given(problems(), st.integers(0, 120), st.randoms(use_true_random=False))
def test_the_order_of_the_modules_does_not_matter(
    solver: Solver, problem: Problem, budget: int, random: Random
) -> None:
    gains, costs = problem
    names = list(gains)
    random.shuffle(names)
    found = solver(gains, costs, budget)
    other = solver({name: gains[name] for name in names}, {name: costs[name] for name in reversed(names)}, budget)
    assert other == found
    assert list(other.ranks) == names


@SOLVER
@given(problems(), st.integers(0, 120), st.integers(-10, 10))
def test_the_scale_of_the_loss_changes_no_rank(solver: Solver, problem: Problem, budget: int, power: int) -> None:
    gains, costs = problem
    scaled = {name: [2.0**power * gain for gain in each] for name, each in gains.items()}
    found, other = solver(gains, costs, budget), solver(scaled, costs, budget)
    assert other.ranks == found.ranks
    assert other.gain == 2.0**power * found.gain


@SOLVER
@given(problems(equal_costs=True), st.integers(0, 60))
def test_equal_costs_give_the_optimum(solver: Solver, problem: Problem, budget: int) -> None:
    assert solver(*problem, budget).gain == optimum(*problem, budget)


@given(problems(), st.integers(0, 60))
def test_it_falls_short_of_the_optimum_by_at_most_one_gain(problem: Problem, budget: int) -> None:
    largest = max((gain for each in problem[0].values() for gain in each), default=0)
    assert 0 <= optimum(*problem, budget) - greedy(*problem, budget).gain <= largest


@SOLVER
@given(problems(), st.integers(0, 120))
def test_the_edges_tell_what_was_taken_last_and_what_would_come_next(
    solver: Solver, problem: Problem, budget: int
) -> None:
    gains, costs = problem
    found = solver(gains, costs, budget)
    taken = [gains[name][rank - 1] / costs[name] for name, rank in found.ranks.items() if rank]
    left = [gains[name][rank] / costs[name] for name, rank in found.ranks.items() if rank < len(gains[name])]
    assert (found.last_in is None) == (not taken)
    assert (found.first_out is None) == (not left)
    if found.last_in:
        name, density = found.last_in
        assert density == min(taken) == gains[name][found.ranks[name] - 1] / costs[name]
    if found.first_out:
        name, density = found.first_out
        assert density == max(left) == gains[name][found.ranks[name]] / costs[name]


@SOLVER
def test_ties_are_broken_by_name(solver: Solver) -> None:
    gains = {"c": [1.0, 1.0], "a": [1.0, 1.0], "b": [1.0, 1.0]}
    found = solver(gains, dict.fromkeys(gains, 5), 15)
    assert found.ranks == {"c": 0, "a": 2, "b": 1}
    assert found.last_in == ("b", 0.2)
    assert found.first_out == ("b", 0.2)


def test_a_unit_that_does_not_fit_is_skipped_for_one_that_does() -> None:
    found = greedy({"big": [100.0], "small": [1.0]}, {"big": 10, "small": 3}, 9)
    assert found == Allocation(
        ranks={"big": 0, "small": 1}, parameters=3, gain=1.0, last_in=("small", 1 / 3), first_out=("big", 10.0)
    )


@SOLVER
def test_no_modules_and_no_gains_are_normal_values(solver: Solver) -> None:
    assert solver({}, {}, 5) == Allocation(ranks={}, parameters=0, gain=0.0, last_in=None, first_out=None)
    assert solver({"a": []}, {"a": 2}, 5).ranks == {"a": 0}


@SOLVER
@pytest.mark.parametrize("caps", [{"a": -1}, {"b": 1}], ids=["negative", "unknown"])
def test_a_cap_that_means_nothing_is_refused(solver: Solver, caps: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"caps must be ≥ 0 and of modules with gains, got {caps}")):
        solver({"a": [1.0]}, {"a": 1}, 5, caps=caps)


@SOLVER
def test_a_cap_may_name_some_modules_only(solver: Solver) -> None:
    assert solver({"a": [3.0] * 4, "b": [1.0] * 4}, {"a": 1, "b": 1}, 6, caps={"a": 1}).ranks == {"a": 1, "b": 4}


@SOLVER
@pytest.mark.parametrize(
    ("gains", "costs", "budget", "message"),
    [
        ({"a": [1.0]}, {"b": 1}, 5, r"costs must name the modules of gains, got \['a', 'b'\] in one only"),
        ({"a": [1.0]}, {"a": 1}, -1, "budget must be ≥ 0, got -1"),
        ({"a": [1.0]}, {"a": 0}, 5, "cost must be ≥ 1, got 0 for 'a'"),
        ({"a": [1.0, 2.0]}, {"a": 1}, 5, r"gains must be finite, ≥ 0 and non-increasing, got \[1.0, 2.0\] for 'a'"),
        ({"a": [-1.0]}, {"a": 1}, 5, "gains must be finite, ≥ 0"),
        ({"a": [math.inf]}, {"a": 1}, 5, "gains must be finite, ≥ 0"),
        ({"a": [math.nan]}, {"a": 1}, 5, "gains must be finite, ≥ 0"),
        ({"a": [2.0, math.nan, 1.0]}, {"a": 1}, 5, "gains must be finite, ≥ 0"),
        ({"a": [1e308], "b": [1e308]}, {"a": 1, "b": 1}, 5, "gains must have a finite sum, got inf"),
    ],
)
def test_malformed_problems_are_refused(
    solver: Solver, gains: dict[str, list[float]], costs: dict[str, int], budget: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        solver(gains, costs, budget)


# The plan: threshold and cap around the knapsack.


@NAMED
@given(problems(), st.integers(12, 150), st.sampled_from([0.0, 0.05, 0.5]))
def test_a_plan_keeps_its_budget_and_leaves_no_room_for_a_module_above_the_threshold(
    solver: Name, problem: Problem, budget: int, threshold: float
) -> None:
    gains, costs = problem
    plan = allocate(gains, costs, budget=budget, sensitivity_threshold=threshold, solver=solver)
    assert plan.parameters == sum(costs[name] * rank for name, rank in plan.ranks.items()) == budget - plan.left
    assert plan.left >= 0
    for name, module in plan.modules.items():
        assert module.rank <= len(gains[name])
        if module.psi < threshold:
            assert module.rank == 0
        elif module.rank < len(gains[name]):
            assert costs[name] > plan.left


@NAMED
@given(problems(), st.integers(12, 150), st.integers(-10, 10))
def test_the_scale_of_the_loss_changes_no_rank_of_a_plan(
    solver: Name, problem: Problem, budget: int, power: int
) -> None:
    gains, costs = problem
    scaled = {name: [2.0**power * gain for gain in each] for name, each in gains.items()}
    plan, other = (allocate(each, costs, budget=budget, solver=solver) for each in (gains, scaled))
    assert other.ranks == plan.ranks
    assert [each.psi for each in other.modules.values()] == [each.psi for each in plan.modules.values()]


@NAMED
@given(problems(equal_costs=True), st.integers(12, 100), st.integers(0, 30))
def test_without_a_threshold_the_gain_of_a_plan_never_falls_when_the_budget_grows_and_costs_are_equal(
    solver: Name, problem: Problem, budget: int, more: int
) -> None:
    gains, costs = problem

    def gain(parameters: int) -> float:
        plan = allocate(gains, costs, budget=parameters, sensitivity_threshold=0, solver=solver)
        return sum(sum(gains[name][:rank]) for name, rank in plan.ranks.items())

    assert gain(budget + more) >= gain(budget)


@NAMED
def test_with_the_default_threshold_the_gain_of_a_plan_never_falls_when_the_budget_grows(solver: Name) -> None:
    gains = {"a": [100.0] + [0.0] * 199, "b": [10.0] * 400, "c": [10.0] * 400}
    small, large = (allocate(gains, dict.fromkeys(gains, 1), budget=each, solver=solver) for each in (567, 571))
    planned = [sum(sum(gains[name][:rank]) for name, rank in plan.ranks.items()) for plan in (small, large)]
    assert planned[0] <= planned[1]


def test_a_plan_carries_what_decided_it() -> None:
    gains = {"a": [8.0, 4.0], "b": [8.0, 1.0], "c": [0.1, 0.0]}
    plan = allocate(gains, {"a": 10, "b": 10, "c": 10}, budget=35, scaling=3.0)
    assert plan.ranks == {"a": 2, "b": 1, "c": 0}
    assert plan.modules["c"].psi < 0.05
    assert (plan.modules["a"].alpha, plan.modules["b"].alpha, plan.modules["c"].alpha) == (6.0, 3.0, 0.0)
    assert plan.modules["a"].gains == (8.0, 4.0)
    assert (plan.parameters, plan.left, plan.scaling, plan.sensitivity_threshold) == (30, 5, 3.0, 0.05)
    assert plan.last_in == ("a", 0.4)
    assert plan.first_out == ("b", 0.1)


def test_the_exact_plan_takes_the_unit_that_greedy_leaves_no_room_for() -> None:
    gains, costs = {"query": [10.0, 1.0], "value": [6.0, 0.0]}, {"query": 10, "value": 5}
    greedily, exactly = (allocate(gains, costs, budget=10, solver=each) for each in ("greedy", "exact"))
    assert (greedily.ranks, exactly.ranks) == ({"query": 0, "value": 2}, {"query": 1, "value": 0})
    assert (exactly.last_in, exactly.first_out) == (("query", 1.0), ("value", 1.2))


@NAMED
def test_a_module_below_the_threshold_gets_nothing_from_any_solver(solver: Name) -> None:
    gains = {"a": [9.0, 8.0], "b": [9.0, 8.0], "c": [0.1, 0.1]}
    assert allocate(gains, {"a": 3, "b": 3, "c": 1}, budget=50, solver=solver).ranks == {"a": 2, "b": 2, "c": 0}


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("solver must be one of ['exact', 'greedy'], got 'best'")):
        allocate({"a": [1.0]}, {"a": 1}, budget=5, solver="best")  # type: ignore[arg-type]


def test_solvers_cannot_be_changed_from_outside() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        SOLVERS["mine"] = greedy  # type: ignore[index]


def test_the_mean_rank_is_a_real_number() -> None:
    assert mean_rank({"a": 4, "b": 4}, 12) == 1.5


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 2, math.nan])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"sensitivity_threshold must be in \[0, 1\), got"):
        allocate({"a": [1.0]}, {"a": 1}, budget=5, sensitivity_threshold=threshold)


@pytest.mark.parametrize("budget", [0, 4, -1])
def test_a_plan_below_one_unit_of_rank_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match=rf"budget must be at least one unit of rank, 5 parameters here, got {budget}"):
        allocate({"a": [1.0], "b": [1.0]}, {"a": 5, "b": 7}, budget=budget)


def test_a_plan_for_no_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="budget must be at least one unit of rank"):
        allocate({}, {}, budget=5)


@pytest.mark.parametrize(
    ("gains", "costs", "message"),
    [
        ({"a": [1.0]}, {"b": 1}, "costs must name the modules of gains"),
        ({"a": [1.0]}, {"a": 1, "b": 1}, "costs must name the modules of gains"),
        ({"a": [1.0], "b": [1.0]}, {"a": 1}, "costs must name the modules of gains"),
        ({"a": [1.0]}, {}, "costs must name the modules of gains"),
        ({"a": [1.0]}, {"a": 0}, "cost must be ≥ 1, got 0 for 'a'"),
        ({"a": [1.0], "b": [1.0]}, {"a": 0, "b": 2}, "cost must be ≥ 1, got 0 for 'a'"),
        ({"a": [1.0, 2.0]}, {"a": 1}, "gains must be finite, ≥ 0 and non-increasing"),
        ({"a": [-1.0], "b": [1.0], "c": [1.0]}, {"a": 1, "b": 1, "c": 1}, "gains must be finite, ≥ 0"),
        ({"a": [math.nan]}, {"a": 1}, "gains must be finite, ≥ 0"),
        ({"a": [math.inf], "b": [1.0]}, {"a": 1, "b": 1}, "gains must be finite, ≥ 0"),
    ],
)
def test_a_plan_for_a_malformed_problem_is_refused(
    gains: dict[str, list[float]], costs: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(gains, costs, budget=5)
