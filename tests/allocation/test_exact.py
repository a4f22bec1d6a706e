"""The exact solver against other ways to the optimum: every rank map, a dense table, the greedy answer."""

import doctest
import importlib
import itertools
import math
import random
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowra_allocation import exact, greedy

MODULE = importlib.import_module("flowra_allocation.exact")  # the package's own name is the function
Problem = tuple[dict[str, list[float]], dict[str, int]]
# Few values, so that ties are frequent; and floats of any size, whose rounded sums would mislead.
TIED = st.integers(0, 12).map(float)
WILD = st.one_of(st.floats(0, 1e300), st.sampled_from([0.0, 5e-324, 1e-16, 1.0, 1.0 + 2**-52, 2.0**53, 2.0**53 + 2]))


@st.composite
def problems(
    draw: st.DrawFn, *, gain: st.SearchStrategy[float], largest_cost: int = 12, names: str = "abcde", units: int = 4
) -> Problem:
    falling = st.lists(gain, max_size=units).map(lambda values: sorted(values, reverse=True))
    gains = draw(st.dictionaries(st.sampled_from(names), falling, min_size=1))
    factor = draw(st.sampled_from([1, 1, 6]))
    return gains, {name: factor * draw(st.integers(1, largest_cost)) for name in gains}


def total(gains: Mapping[str, Sequence[float]], ranks: Mapping[str, int]) -> Fraction:
    return sum((Fraction(gain) for name, rank in ranks.items() for gain in gains[name][:rank]), Fraction(0))


def best_ranks(gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Try every rank map: the largest gain, then the fewest parameters, then the most rank for the first by name."""
    names = sorted(gains)
    options = itertools.product(*(range(len(gains[name]) + 1) for name in names))
    maps = [dict(zip(names, ranks, strict=True)) for ranks in options]
    used = [sum(costs[name] * rank for name, rank in ranks.items()) for ranks in maps]
    key = {i: (total(gains, maps[i]), -used[i], tuple(maps[i].values())) for i in range(len(maps)) if used[i] <= budget}
    best = max(key, key=lambda i: key[i])
    ranks, left = maps[best], budget - used[best]
    for name in names:  # what still fits gains nothing; no room is left all the same
        while ranks[name] < len(gains[name]) and costs[name] <= left:
            ranks[name], left = ranks[name] + 1, left - costs[name]
    return ranks


def table_optimum(gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> float:
    """Fill the whole table of the 0/1 knapsack, one unit at a time; exact where sums of the gains are."""
    best = torch.zeros(budget + 1, dtype=torch.float64)
    for name, each in gains.items():
        for gain in each:
            if costs[name] <= budget:
                best[costs[name] :] = torch.maximum(best[costs[name] :], best[: budget + 1 - costs[name]] + gain)
    return float(best[-1])


@settings(max_examples=150)
@given(problems(gain=TIED), st.integers(0, 120))
def test_it_is_the_best_of_all_rank_maps_and_ties_go_by_parameters_then_name(problem: Problem, budget: int) -> None:
    assert exact(*problem, budget).ranks == best_ranks(*problem, budget)


@settings(max_examples=150)
@given(problems(gain=WILD), st.integers(0, 120))
@example(problem=({"a": [2.0**53], "b": [1.0], "c": [2.0**53 + 2]}, {"a": 2, "b": 1, "c": 3}), budget=3)
def test_it_is_the_best_of_all_rank_maps_for_floats_of_any_size(problem: Problem, budget: int) -> None:
    assert exact(*problem, budget).ranks == best_ranks(*problem, budget)


@given(problems(gain=TIED, largest_cost=40, names="abcdefghijklmnop", units=9), st.integers(0, 1500))
def test_it_is_the_optimum_of_the_dense_table(problem: Problem, budget: int) -> None:
    assert exact(*problem, budget).gain == table_optimum(*problem, budget)


@given(problems(gain=TIED), st.integers(0, 120), st.dictionaries(st.sampled_from("abcde"), st.integers(0, 5)))
def test_a_cap_is_the_same_as_having_no_more_gains(problem: Problem, budget: int, caps: dict[str, int]) -> None:
    gains, costs = problem
    caps = {name: cap for name, cap in caps.items() if name in gains}
    cut = {name: each[: caps.get(name, len(each))] for name, each in gains.items()}
    assert exact(gains, costs, budget, caps=caps).ranks == exact(cut, costs, budget).ranks


@given(problems(gain=WILD, largest_cost=10**6, names="abcdefghij", units=8), st.integers(0, 2 * 10**7))
def test_greedy_lies_between_the_optimum_and_one_gain_below(problem: Problem, budget: int) -> None:
    gains, costs = problem
    largest = max((Fraction(gain) for each in gains.values() for gain in each), default=Fraction(0))
    optimum, found = exact(gains, costs, budget), greedy(gains, costs, budget)
    assert 0 <= total(gains, optimum.ranks) - total(gains, found.ranks) <= largest
    assert optimum.gain >= found.gain


@given(problems(gain=TIED, names="abcdefghij", units=8), st.integers(1, 9), st.integers(0, 500))
def test_equal_costs_give_what_greedy_gives(problem: Problem, cost: int, budget: int) -> None:
    gains, costs = problem[0], dict.fromkeys(problem[0], cost)
    assert exact(gains, costs, budget) == greedy(gains, costs, budget)


@given(problems(gain=TIED), st.integers(0, 100), st.integers(1, 50))
def test_a_common_factor_of_costs_and_budget_changes_no_rank(problem: Problem, budget: int, factor: int) -> None:
    gains, costs = problem
    scaled = exact(gains, {name: factor * cost for name, cost in costs.items()}, factor * budget + factor - 1)
    assert scaled.ranks == exact(gains, costs, budget).ranks


def test_of_equal_gains_the_fewest_parameters_are_taken() -> None:
    assert exact({"a": [2.0], "b": [1.0, 1.0]}, {"a": 5, "b": 2}, 6).ranks == {"a": 0, "b": 2}


def test_of_equal_gains_and_parameters_the_first_name_is_taken() -> None:
    gains = {"c": [3.0], "a": [2.0, 2.0], "b": [4.0]}
    assert exact(gains, {"c": 3, "a": 2, "b": 4}, 4).ranks == {"c": 0, "a": 2, "b": 0}


def test_a_gain_too_small_to_change_the_rounded_sum_still_decides() -> None:
    gains, costs = {"a": [1.0], "b": [1.0], "c": [1e-30]}, {"a": 2, "b": 2, "c": 1}
    assert exact(gains, costs, 5).ranks == {"a": 1, "b": 1, "c": 1}
    assert exact({"a": [1.0], "b": [1.0], "c": [1e-30, 1e-30]}, costs, 4).ranks == {"a": 1, "b": 1, "c": 0}


def test_a_dense_unit_may_be_left_out_and_the_edges_say_so() -> None:
    found = exact({"a": [10.0], "b": [6.0]}, {"a": 10, "b": 5}, 10)
    assert (found.last_in, found.first_out) == (("a", 1.0), ("b", 1.2))


# Sizes of real models: 200 modules of up to 64 units.


def decaying(costs: Mapping[str, int], seed: int) -> dict[str, list[float]]:
    """Gains as a probe finds them: unequal modules, each with a falling spectrum; multiples of 2^-20 add up exactly."""
    generator = random.Random(seed)
    gains = {}
    for name in costs:
        size, decay = math.exp(generator.gauss(0, 1.5)), generator.uniform(0.05, 0.3)
        gains[name] = [round(2**20 * size * math.exp(-decay * unit)) / 2**20 for unit in range(64)]
    return gains


FEW = {f"layer.{index:03}": (8192, 5120, 5120, 18432, 18432)[index % 5] for index in range(200)}
MANY = {f"layer.{index:03}": random.Random(index).randint(1000, 20_000) for index in range(200)}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_real_model_with_few_costs_is_solved_to_the_optimum_of_the_dense_table(share: float) -> None:
    gains, budget = decaying(FEW, seed=0), int(share * 64 * sum(FEW.values()))
    table = table_optimum(gains, {name: cost // 1024 for name, cost in FEW.items()}, budget // 1024)
    assert exact(gains, FEW, budget).gain == table


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5])
def test_a_real_model_with_many_costs_is_solved_in_seconds_and_beats_greedy(share: float) -> None:
    gains, budget = decaying(MANY, seed=1), int(share * 64 * sum(MANY.values()))
    start = time.process_time()
    found = exact(gains, MANY, budget)
    assert time.process_time() - start < 10
    assert found.parameters <= budget
    assert found.gain >= greedy(gains, MANY, budget).gain
    # No set can beat the greedy one whose last unit is cut to fit.
    units = sorted(((gain / MANY[name], MANY[name]) for name, each in gains.items() for gain in each), reverse=True)
    left, bound = budget, 0.0
    for density, cost in units:
        bound += density * min(cost, left)
        left -= min(cost, left)
    assert found.gain <= bound * (1 + 1e-12)


def test_equal_scores_for_all_modules_are_solved_too() -> None:
    flat = {name: [1.0] * 64 for name in FEW}
    budget = 64 * 80 * 5120 + 1024 * 1234
    assert exact(flat, FEW, budget).gain == 64 * 80 + 1024 * 1234 // 8192


def test_a_search_beyond_the_stated_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "MAX_STATES", 1000)
    gains = {name: [float(cost)] * 64 for name, cost in MANY.items()}  # gains in proportion to costs: nothing to prune
    message = "must let the exact solver look at no more than 1000 states, got more for 12800 units of .* Use 'greedy'"
    with pytest.raises(ValueError, match=message):
        exact(gains, MANY, 12_345_678)


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(MODULE).failed == 0
