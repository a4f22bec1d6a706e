"""Plans that look at no data, and gains that no learned update was measured for."""

import doctest
import importlib
import math
import re
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowra_allocation import (
    RankPlan,
    allocate,
    greedy,
    harmonic_gains,
    offset_gain,
    one_shot_limits,
    placement_plan,
    random_plan,
    spectral_gains,
    uniform_plan,
)

COSTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 12), min_size=1)
DRAWN = pytest.mark.parametrize("plan", [uniform_plan, random_plan])


def cheapest(costs: dict[str, int]) -> int:
    return min(costs.values())


@DRAWN
@given(COSTS, st.integers(0, 300), st.integers(0, 9), st.randoms(use_true_random=False))
def test_a_drawn_plan_keeps_the_budget_and_depends_on_the_seed_and_not_on_the_order(
    plan: Callable[..., RankPlan], costs: dict[str, int], more: int, seed: int, random: Random
) -> None:
    budget = cheapest(costs) + more
    found = plan(costs, budget=budget, seed=seed)
    assert found.parameters == sum(costs[name] * rank for name, rank in found.ranks.items()) <= budget
    names = list(costs)
    random.shuffle(names)
    other = plan({name: costs[name] for name in names}, budget=budget, seed=seed)
    assert other.ranks == found.ranks
    assert list(other.ranks) == names


@given(COSTS, st.integers(0, 300), st.integers(0, 9))
def test_uniform_is_the_whole_mean_rank_and_one_more_where_no_further_unit_fits(
    costs: dict[str, int], more: int, seed: int
) -> None:
    budget = cheapest(costs) + more
    plan = uniform_plan(costs, budget=budget, seed=seed)
    whole = budget // sum(costs.values())
    assert set(plan.ranks.values()) <= {whole, whole + 1}
    assert all(costs[name] > plan.left for name, rank in plan.ranks.items() if rank == whole)


@given(COSTS, st.integers(0, 300), st.integers(0, 9))
def test_random_leaves_no_room_for_a_unit(costs: dict[str, int], more: int, seed: int) -> None:
    budget = cheapest(costs) + more
    assert random_plan(costs, budget=budget, seed=seed).left < cheapest(costs)


@DRAWN
def test_seeds_draw_differently(plan: Callable[..., RankPlan]) -> None:
    costs = {str(index): 3 for index in range(30)}
    drawn = {tuple(plan(costs, budget=45, seed=seed).ranks.values()) for seed in range(5)}
    assert len(drawn) == 5


def test_below_rank_one_uniform_is_a_random_subset() -> None:
    plan = uniform_plan({str(index): 7 for index in range(10)}, budget=30, seed=3)
    assert sorted(plan.ranks.values()) == [0] * 6 + [1] * 4


@DRAWN
@given(COSTS, st.integers(0, 200), st.integers(0, 3))
def test_caps_bind_and_what_they_leave_goes_to_others(
    plan: Callable[..., RankPlan], costs: dict[str, int], more: int, cap: int
) -> None:
    budget, first = cheapest(costs) + more, min(costs)
    found = plan(costs, budget=budget, seed=0, caps={first: cap})
    assert found.ranks[first] <= cap
    others = {name: cost for name, cost in costs.items() if name != first}
    if plan is random_plan and others:
        assert found.left < min(others.values())


def test_uniform_goes_on_where_a_small_module_is_full() -> None:
    plan = uniform_plan({"small": 2, "big": 10}, budget=50, caps={"small": 1})
    assert plan.ranks == {"small": 1, "big": 4}


@pytest.mark.parametrize("plan", [uniform_plan, random_plan])
def test_costs_that_are_not_in_proportion_count_in_full(plan: Callable[..., RankPlan]) -> None:
    found = plan({"conv": [5, 14, 27], "q": [5, 14, 27]}, budget=30, seed=0)
    assert found.parameters in (27 + 0, 28, 27)
    assert found.parameters == sum({0: 0, 1: 5, 2: 14, 3: 27}[rank] for rank in found.ranks.values())


@given(COSTS, st.integers(0, 300), st.data())
def test_a_placement_has_the_largest_rank_that_fits_on_its_modules_only(
    costs: dict[str, int], more: int, data: st.DataObject
) -> None:
    names = data.draw(st.sets(st.sampled_from(sorted(costs)), min_size=1))
    unit = sum(costs[name] for name in names)
    plan = placement_plan(costs, names, budget=unit + more)
    assert {plan.ranks[name] for name in names} == {(unit + more) // unit}
    assert all(plan.ranks[name] == 0 for name in costs.keys() - names)
    assert plan.left < unit


def test_a_placement_goes_on_where_a_module_is_full() -> None:
    plan = placement_plan({"q": 10, "v": 5}, ["q", "v"], budget=60, caps={"v": 2})
    assert plan.ranks == {"q": 5, "v": 2}


def test_a_static_plan_notes_gains_and_their_edges_but_asks_for_no_threshold() -> None:
    gains = {"q": [4.0, 2.0], "v": [3.0], "o": [0.0, 0.0]}
    plan = uniform_plan({"q": 10, "v": 10, "o": 10}, budget=60, gains=gains)
    assert plan.ranks == {"q": 2, "v": 2, "o": 2}
    assert plan.modules["v"].gains == (3.0,)
    assert plan.sensitivity_threshold == 0
    assert plan.modules["q"].psi == allocate(gains, {"q": 10, "v": 10, "o": 10}, budget=60).modules["q"].psi
    assert plan.last_in == ("v", 0.0)
    assert uniform_plan({"q": 10}, budget=60).modules["q"].psi == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_plan({"q": 10}, budget=9), "budget must be at least one unit of rank, 10 parameters here"),
        (lambda: random_plan({}, budget=9, seed=0), "budget must be at least one unit of rank, 0 parameters here"),
        (lambda: uniform_plan({"q": 0}, budget=9), "cost must be ≥ 1, got 0 for 'q'"),
        (lambda: random_plan({"q": 1}, budget=9, seed=0, caps={"z": 1}), "caps must be ≥ 0 and of modules with a cost"),
        (lambda: uniform_plan({"q": 1}, budget=9, gains={"z": [1.0]}), "costs must name the modules of gains"),
        (lambda: placement_plan({"q": 1}, ["z"], budget=9), "names must be at least one module with a cost, got ['z']"),
        (lambda: placement_plan({"q": 1}, [], budget=9), "names must be at least one module with a cost, got none"),
        (
            lambda: placement_plan({"q": 5, "v": 5}, ["q", "v"], budget=9),
            "budget must pay for rank 1 on the 2 named modules, 10 parameters, got 9",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# gains of one shot


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 20))
def test_harmonic_gains_give_ranks_in_proportion_to_score_per_parameter(scores: list[int], times: int) -> None:
    named = {str(index): float(score) for index, score in enumerate(scores)}
    budget = times * sum(scores)  # so that score · times is a whole rank for each
    found = greedy(harmonic_gains(named, dict.fromkeys(named, budget)), dict.fromkeys(named, 1), budget)
    assert found.ranks == {name: round(score) * times for name, score in named.items()}


def test_spectral_gains_are_half_the_squares() -> None:
    assert spectral_gains({"q": [3.0, 1.0], "v": []}) == {"q": [4.5, 0.5], "v": []}


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_scores_and_spectra_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"scores must be finite and ≥ 0, got .* for 'q'"):
        harmonic_gains({"q": value}, {"q": 2})
    with pytest.raises(ValueError, match=r"spectra must be finite and ≥ 0, got .* for 'q'"):
        spectral_gains({"q": [value]})


def test_scores_of_other_modules_than_units_are_refused() -> None:
    with pytest.raises(ValueError, match=r"units must name the modules of scores, got \['k', 'q'\] in one only"):
        harmonic_gains({"q": 1.0}, {"k": 2})


@pytest.mark.parametrize(
    ("budget", "limits"), [(19, (0, 2)), (9, (0, 1)), (20, (1, 2)), (50, (1, 5)), (51, (1, 6)), (1, (0, 1))]
)
def test_one_shot_limits_are_one_and_twice_the_mean_rank(budget: int, limits: tuple[int, int]) -> None:
    assert one_shot_limits({"q": 12, "v": [8, 99]}, budget=budget) == limits


@given(COSTS, st.integers(1, 300))
def test_one_shot_limits_leave_room_for_the_whole_budget(costs: dict[str, int], budget: int) -> None:
    floor, cap = one_shot_limits(costs, budget=budget)
    assert sum(costs.values()) * floor <= budget <= sum(costs.values()) * cap


def test_one_shot_limits_need_modules_and_a_budget() -> None:
    for costs, budget in (({}, 5), ({"q": 1}, 0)):
        with pytest.raises(ValueError, match="budget must be ≥ 1 and there must be modules"):
            one_shot_limits(costs, budget=budget)


# items


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
def test_an_offset_is_worth_what_the_best_one_lowers_the_quadratic_model_by(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, root = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    curvature = root**2 + 0.3
    best = -gradient / curvature
    lowered = -(gradient * best + curvature * best**2 / 2).sum()
    assert offset_gain(gradient, root**2, damping=0.3) == pytest.approx(lowered.item(), rel=1e-12)


def test_an_offset_without_a_gradient_is_worth_nothing() -> None:
    assert offset_gain(torch.zeros(3), torch.zeros(3), damping=1e-3) == 0


@pytest.mark.parametrize(
    ("gradient", "fisher", "damping", "message"),
    [
        (torch.ones(2), torch.ones(3), 1.0, r"fisher_diagonal must have the shape of the gradient, \(2,\), got \(3,\)"),
        (torch.ones(2), torch.ones(2), 0.0, "damping must be > 0, got 0.0"),
        (torch.ones(2), torch.ones(2), math.nan, "damping must be > 0, got nan"),
        (torch.tensor([math.nan]), torch.ones(1), 1.0, "gradient and fisher_diagonal must be finite"),
        (torch.ones(1), -torch.ones(1), 2.0, "and the latter ≥ 0"),
    ],
)
def test_an_offset_that_has_no_worth_is_refused(
    gradient: torch.Tensor, fisher: torch.Tensor, damping: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        offset_gain(gradient, fisher, damping=damping)


@pytest.mark.parametrize("name", ["static_plans", "one_shot"])
def test_the_examples_of_the_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"flowra_allocation.{name}")
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
