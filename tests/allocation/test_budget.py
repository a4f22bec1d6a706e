import doctest
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        ("300k", 300_000),
        ("300K", 300_000),
        ("300 k", 300_000),
        ("1.5M", 1_500_000),
        (" 1_000.5 k ", 1_000_500),
        ("2G", 2_000_000_000),
        (".5k", 500),
        ("2MB", 500_000),
        ("500kB", 125_000),
        ("500 KB", 125_000),
        ("1.5 GB", 375_000_000),
        ("2MiB", 2 * 2**20 // 4),
        ("1 KiB", 256),
        ("1GiB", 2**28),
        ("0.007kB", 1),
    ],
)
def test_a_budget_is_a_share_a_count_or_a_size_of_parameters(budget: str | int, parameters: int) -> None:
    assert parse_budget(budget, base_parameters=BASE) == parameters


@pytest.mark.parametrize("tenths", range(1, 60))
def test_a_percentage_loses_no_parameter_to_binary_rounding(tenths: int) -> None:
    assert parse_budget(f"{tenths / 10:.1f}%", base_parameters=1000) == tenths


def test_a_percentage_is_rounded_down() -> None:
    assert parse_budget("99.99%", base_parameters=100) == 99


@pytest.mark.parametrize(
    "budget",
    ["", "%", "much", "-5", "-1%", "1e3", "5 6", "0x10", "nan", "inf%", True, "1,5%", "MB", "1.2.3M", "٣k", "1 _k"],
)
def test_what_is_not_a_budget_is_refused(budget: str | int) -> None:
    forms = "'0.1%', 22713, '300k', '1.5M', '2MB', 'like r=8 on q,v' or 'same as <plan or adapter>'"
    message = f"budget must be like {forms}, got {budget!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        parse_budget(budget, base_parameters=BASE)


@pytest.mark.parametrize(
    ("budget", "understood"),
    [
        ("2mb", "got '2mb': 2 of the unit 'mb'. Did you mean MB?"),
        ("2Mb", "2 of the unit 'Mb'. Did you mean MB?"),
        ("1.5m", "1.5 of the unit 'm'. Did you mean M?"),
        ("300kb", "300 of the unit 'kb'. Did you mean kB or KB?"),
        ("7B", "7 of the unit 'B'. The units are %, k, K, M, G, kB, KB, MB, GB, KiB, MiB, GiB."),
        ("1%%", "1 of the unit '%%'. The units are"),
        ("300 params", "300 of the unit 'params'. The units are"),
        ("5%k", "5 of the unit '%k'. The units are"),
    ],
)
def test_a_unit_that_could_mean_something_else_is_refused_with_what_was_understood(
    budget: str, understood: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(understood)):
        parse_budget(budget, base_parameters=BASE)


@pytest.mark.parametrize("budget", ["1.2345k", "0.0000005M"])
def test_a_count_that_is_not_whole_is_refused(budget: str) -> None:
    with pytest.raises(ValueError, match=f"budget must be a whole number of parameters, got '{budget}'\\.$"):
        parse_budget(budget, base_parameters=BASE)


@pytest.mark.parametrize("size", ["0.003kB", "0kB", "0.0000039 MB"])
def test_less_than_four_bytes_are_no_budget(size: str) -> None:
    with pytest.raises(ValueError, match=f"budget must be at least one parameter, got '{size}'"):
        parse_budget(size, base_parameters=BASE)


COUNTS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}
SIZES = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SPACE = st.sampled_from(["", " ", "  "])


@given(st.integers(1, 10**12), st.sampled_from(sorted(COUNTS)), SPACE)
def test_a_count_written_in_any_unit_reads_back(parameters: int, unit: str, space: str) -> None:
    written = f"{Decimal(parameters) / COUNTS[unit]:f}"
    assert parse_budget(f"{space}{written}{space}{unit}", base_parameters=1) == parameters


@given(st.integers(1, 10**12), st.sampled_from(sorted(SIZES)), SPACE)
def test_the_bytes_of_a_float32_adapter_in_any_unit_read_back(parameters: int, unit: str, space: str) -> None:
    size = Fraction(4 * parameters, SIZES[unit])  # powers of ten and two: a finite decimal
    digits = 40
    written = f"{int(size * 10**digits) // 10**digits}.{int(size * 10**digits) % 10**digits:0{digits}}"
    assert parse_budget(f"{written}{space}{unit}", base_parameters=1) == parameters


@given(st.integers(0, 10**9), st.integers(1, 9), st.sampled_from(sorted(SIZES)), st.integers(1, 10**9))
def test_a_size_is_the_largest_number_of_parameters_whose_bytes_it_holds(
    whole: int, tenth: int, unit: str, base: int
) -> None:
    held = parse_budget(f"{whole}.{tenth}{unit}", base_parameters=base)
    size = Fraction(10 * whole + tenth, 10) * SIZES[unit]
    assert 4 * held <= size < 4 * (held + 1)


@given(st.integers(1, 10**6), st.integers(1, 10**11))
def test_a_percentage_is_the_largest_whole_share(ten_thousandths: int, base: int) -> None:
    base = max(base, 10**6)
    exact = Fraction(ten_thousandths, 10**6) * base
    found = parse_budget(f"{Decimal(ten_thousandths) / 10**4:f}%", base_parameters=base)
    assert found <= exact < found + 1


# like …

LAYERS = {"layer.0.q": 24, "layer.0.v": 16, "layer.1.q": 24, "layer.1.v": 16, "head.out_proj": 7}


def unit_cost(patterns: Sequence[str]) -> int:
    """Stand for a model: a pattern means the layers whose name ends with it."""
    unmatched = [each for each in patterns if not any(name.endswith(each) for name in LAYERS)]
    if unmatched:
        raise ValueError(f"no layer is called {unmatched}")
    return sum(cost for name, cost in LAYERS.items() if any(name.endswith(each) for each in patterns))


@pytest.mark.parametrize(
    ("budget", "parameters"),
    [
        ("like r=8 on q,v", 8 * 80),
        ("like r=8 on q, v", 8 * 80),
        ("  like  r = 8  on  v , q ", 8 * 80),
        ("like rank=1 on layer.0.q", 24),
        ("like r=16 on q", 16 * 48),
        ("like r=2 on out_proj", 14),
    ],
)
def test_a_budget_can_be_that_of_uniform_lora(budget: str, parameters: int) -> None:
    assert parse_budget(budget, base_parameters=1, unit_cost=unit_cost) == parameters


@given(st.integers(1, 10**6), st.sets(st.sampled_from(sorted(LAYERS)), min_size=1))
def test_uniform_lora_is_its_rank_times_the_cost_of_its_layers(rank: int, names: set[str]) -> None:
    found = parse_budget(f"like r={rank} on {','.join(sorted(names))}", base_parameters=1, unit_cost=unit_cost)
    assert found == rank * sum(LAYERS[name] for name in names)


@pytest.mark.parametrize(
    "budget",
    [
        "like",
        "like r=8",
        "like r=8 on",
        "like r=8 on ,",
        "like r=8 on q,",
        "like r=8 on q,,v",
        "like r=0 on q",
        "like r=-1 on q",
        "like r=8.5 on q",
        "like 8 on q",
        "liker=8 on q",
        "like r=8 q,v",
    ],
)
def test_a_likeness_that_is_not_complete_is_refused(budget: str) -> None:
    message = f"budget must be 'like r=<rank ≥ 1> on <names>', the names with commas between, got '{budget}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_budget(budget, base_parameters=BASE, unit_cost=unit_cost)


def test_a_likeness_without_a_model_says_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"got 'like r=8 on q,v'\. Give unit_cost"):
        parse_budget("like r=8 on q,v", base_parameters=BASE)


def test_a_layer_that_the_model_lacks_is_reported_in_the_model_s_words() -> None:
    with pytest.raises(ValueError, match=r"no layer is called \['k'\]"):
        parse_budget("like r=8 on q,k", base_parameters=BASE, unit_cost=unit_cost)


@pytest.mark.parametrize("budget", ["0.5", "7.", ".5", "22.000"])
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


# same as …


@pytest.mark.parametrize("budget", ["same as runs/a b", "  same   as  runs/a b "])
def test_a_budget_can_be_that_of_a_plan_or_an_adapter(budget: str) -> None:
    assert parse_budget(budget, base_parameters=1, parameters_of={"runs/a b": 57_600}.__getitem__) == 57_600


@pytest.mark.parametrize("budget", ["same", "same as", "sameas x", "same r=8"])
def test_a_sameness_that_is_not_complete_is_refused(budget: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"must be 'same as <path of a plan or an adapter>', got {budget!r}")
    ):
        parse_budget(budget, base_parameters=1, parameters_of=len)


def test_a_sameness_without_a_reader_says_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"got 'same as x'\. Give parameters_of"):
        parse_budget("same as x", base_parameters=BASE)


def test_the_same_as_nothing_is_no_budget() -> None:
    with pytest.raises(ValueError, match="budget must be at least one parameter, got 'same as x', which has 0"):
        parse_budget("same as x", base_parameters=BASE, parameters_of=lambda path: 0)


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(flowra_allocation.budget).failed == 0
