import doctest

import pytest

import flowra_allocation.budget
from flowra_allocation import parse_budget

BASE = 22_713_216


@pytest.mark.parametrize(
    ("budget", "parameters"),
    [
        ("0.1%", 22713),
        (" 0.1 % ", 22713),
        (".1%", 22713),
        ("1.%", 227132),
        ("100%", BASE),
        ("250%", 56_783_040),
        (22713, 22713),
        ("22713", 22713),
        ("22_713", 22713),
        ("  7 ", 7),
        (1, 1),
    ],
)
def test_a_budget_is_a_percentage_or_a_number_of_parameters(budget: str | int, parameters: int) -> None:
    assert parse_budget(budget, base_parameters=BASE) == parameters


@pytest.mark.parametrize("tenths", range(1, 60))
def test_a_percentage_loses_no_parameter_to_binary_rounding(tenths: int) -> None:
    assert parse_budget(f"{tenths / 10:.1f}%", base_parameters=1000) == tenths


def test_a_percentage_is_rounded_down() -> None:
    assert parse_budget("99.99%", base_parameters=100) == 99


@pytest.mark.parametrize(
    "budget", ["", "%", "much", "-5", "-1%", "1e3", "5 6", "1%%", "0x10", "nan", "inf%", True, "1,5%"]
)
def test_what_is_not_a_budget_is_refused(budget: str | int) -> None:
    with pytest.raises(ValueError, match=r"budget must be a percentage like '0\.1%' or a number of parameters, got"):
        parse_budget(budget, base_parameters=BASE)


@pytest.mark.parametrize("budget", ["0.5", "7.", ".5"])
def test_part_of_a_parameter_is_refused(budget: str) -> None:
    with pytest.raises(ValueError, match=r"budget must be a whole number of parameters, got '.*'\. For a percentage"):
        parse_budget(budget, base_parameters=BASE)


@pytest.mark.parametrize("budget", [0, "0", "0%", "0.0%", "0.000001%"])
def test_a_budget_below_one_parameter_is_refused(budget: str | int) -> None:
    with pytest.raises(ValueError, match=r"budget must be at least one parameter, got .* of 1000"):
        parse_budget(budget, base_parameters=1000)


@pytest.mark.parametrize("budget", ["1__0", "10_"])
def test_misplaced_underscores_are_refused_in_the_words_of_the_budget(budget: str) -> None:
    with pytest.raises(ValueError, match=r"^budget must be"):
        parse_budget(budget, base_parameters=BASE)


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(flowra_allocation.budget).failed == 0
