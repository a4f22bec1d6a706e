"""Ranks within a number of parameters, against every choice there is."""

import doctest
import importlib
from itertools import pairwise, product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowra_compose import ranks_within

Energies = dict[str, list[float]]

LADDER = st.lists(st.floats(0.01, 10), max_size=4).map(lambda values: sorted(values, reverse=True))


def kept(energies: Energies, ranks: dict[str, int]) -> float:
    return sum(sum(energies[name][:rank]) for name, rank in ranks.items())


def spent(costs: dict[str, int], ranks: dict[str, int]) -> int:
    return sum(costs[name] * rank for name, rank in ranks.items())


def best(energies: Energies, costs: dict[str, int], parameters: int) -> float:
    choices = (
        dict(zip(energies, ranks, strict=True)) for ranks in product(*(range(len(e) + 1) for e in energies.values()))
    )
    return max(kept(energies, ranks) for ranks in choices if spent(costs, ranks) <= parameters)


@st.composite
def instances(draw: st.DrawFn, *, equal: bool) -> tuple[Energies, dict[str, int], int]:
    energies = dict(zip("abcd", draw(st.lists(LADDER, min_size=1, max_size=4)), strict=False))
    cost = st.integers(1, 9)
    one = draw(cost)
    costs = {name: one if equal else draw(cost) for name in energies}
    assume(any(energies.values()))
    least = min(costs[name] for name, each in energies.items() if each)
    return energies, costs, draw(st.integers(least, 60))


@settings(max_examples=150)
@given(instances(equal=True))
def test_with_equal_costs_no_choice_keeps_more(case: tuple[Energies, dict[str, int], int]) -> None:
    energies, costs, parameters = case
    found = ranks_within(energies, costs, parameters=parameters)
    assert kept(energies, found) == pytest.approx(best(energies, costs, parameters), rel=1e-12)


@settings(max_examples=150)
@given(instances(equal=False))
def test_with_unequal_costs_less_than_one_unit_is_missing(case: tuple[Energies, dict[str, int], int]) -> None:
    energies, costs, parameters = case
    found = ranks_within(energies, costs, parameters=parameters)
    assert spent(costs, found) <= parameters
    assert found.keys() == energies.keys()
    left_out = [values[found[name] :][:1] for name, values in energies.items()]
    largest = max((each[0] for each in left_out if each), default=0.0)
    missing = best(energies, costs, parameters) - kept(energies, found)
    assert missing <= largest * (1 + 1e-12)
    # For what it spends there is nothing better, wherever the order was not broken by a unit that did not fit.
    worth = [values[found[name]] / costs[name] for name, values in energies.items() if found[name] < len(values)]
    taken = [values[found[name] - 1] / costs[name] for name, values in energies.items() if found[name]]
    fits = [
        n for n, values in energies.items() if found[n] < len(values) and costs[n] <= parameters - spent(costs, found)
    ]
    assert not fits
    if max(worth, default=0.0) <= min(taken):
        assert kept(energies, found) == pytest.approx(best(energies, costs, spent(costs, found)), rel=1e-12)


@given(instances(equal=False))
def test_all_is_kept_where_the_parameters_are_enough(case: tuple[Energies, dict[str, int], int]) -> None:
    energies, costs, _ = case
    everything = {name: len(values) for name, values in energies.items()}
    assert ranks_within(energies, costs, parameters=spent(costs, everything)) == everything


@settings(max_examples=60)
@given(instances(equal=False), st.sampled_from([1e-300, 1e-8, 1e8]))
def test_the_unit_of_energy_does_not_matter(case: tuple[Energies, dict[str, int], int], unit: float) -> None:
    energies, costs, parameters = case
    in_order = sorted(v / costs[n] for n, values in energies.items() for v in values)
    assume(all(b - a > 1e-9 * b for a, b in pairwise(in_order)))  # ties are broken by rounding
    scaled = {name: [unit * value for value in values] for name, values in energies.items()}
    assert ranks_within(scaled, costs, parameters=parameters) == ranks_within(energies, costs, parameters=parameters)


def test_units_of_energy_0_and_modules_without_any_get_nothing() -> None:
    energies = {"zero": [0.0, 0.0], "some": [1.0, 0.0], "none": []}
    assert ranks_within(energies, dict.fromkeys(energies, 1), parameters=10) == {"none": 0, "some": 1, "zero": 0}
    assert ranks_within({"zero": [0.0]}, {"zero": 5}, parameters=1) == {"zero": 0}


def test_of_units_worth_the_same_the_first_name_is_served_first() -> None:
    energies = {"b": [1.0, 1.0], "a": [1.0, 1.0]}
    assert ranks_within(energies, {"a": 1, "b": 1}, parameters=3) == {"a": 2, "b": 1}


def test_fewer_parameters_than_any_unit_costs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameters must be ≥ 7, one unit of rank of the cheapest module, got 6"):
        ranks_within({"a": [1.0], "b": [1.0], "zero": [0.0]}, {"a": 7, "b": 9, "zero": 1}, parameters=6)


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(importlib.import_module("flowra_compose.rank_budget")).failed == 0
