from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowra_analysis import (
    Change,
    FlowProfile,
    ModuleProfile,
    diff_profiles,
    rank_correlation,
    spectral_distance,
)

NUMBERS = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0, 1e9]), min_size=2, max_size=12)


def profile(*, factor: float = 1.0, stderr: float | None = 0.1, **provenance: str | int) -> FlowProfile:
    """Return a profile of three modules, whose ψ is 0.1, 0.2 and 0.4 times a factor."""
    errors = {} if stderr is None else {"psi_stderr": stderr}
    return FlowProfile(
        modules={
            name: ModuleProfile(shape=(2, 3), cost_per_rank=5, statistics={"psi": factor * psi, **errors})
            for name, psi in (("a", 0.1), ("b", 0.2), ("c", 0.4))
        },
        spectra={"weight": {"a": abs(factor) * torch.tensor([2.0, 1.0]), "b": torch.tensor([1.0])}},
        base_parameters=100,
        provenance=provenance,
    )


# Spearman's ρ


def mean_ranks(values: list[float]) -> list[float]:
    return [sum(each < value for each in values) + (values.count(value) + 1) / 2 for value in values]


@given(st.data())
def test_the_rank_correlation_is_pearson_s_of_the_mean_ranks(data: st.DataObject) -> None:
    first = data.draw(NUMBERS)
    second = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 7.0]), min_size=len(first), max_size=len(first)))
    found = rank_correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        ranks = torch.tensor([mean_ranks(first), mean_ranks(second)], dtype=torch.float64)
        assert found == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-12)


@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=30, unique=True))
def test_the_rank_correlation_of_equal_and_of_reversed_orders_is_exactly_one_and_minus_one(values: list[float]) -> None:
    assert rank_correlation(values, values) == 1
    assert rank_correlation(values, [-value for value in values]) == -1


@given(NUMBERS)
def test_ties_do_not_keep_the_rank_correlation_of_a_list_with_itself_from_being_exactly_one(
    values: list[float],
) -> None:
    assert rank_correlation(values, values) == (1 if len(set(values)) > 1 else None)


def test_a_rank_correlation_worked_out_by_hand() -> None:
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == 0.8  # 1 - 6 · 2 / (4 · 15)


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0]])
def test_a_rank_correlation_that_is_not_defined_is_none(values: list[float]) -> None:
    assert rank_correlation(values, [float(index) for index in range(len(values))]) is None


def test_lists_of_two_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="second must hold as many values as first, got 1 and 2"):
        rank_correlation([1.0, 2.0], [1.0])


# spectra


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ([3.0, 1.0], [3.0, 1.0], 0.0),
        ([3.0, 4.0], [3.0], 0.8),
        ([1e-320], [0.0], 1.0),
        ([1.7e308, 1.7e308], [1.7e308, 0.0], 0.5**0.5),
        ([0.0], [0.0, 0.0], 0.0),
        ([], [], 0.0),
        ([], [2.0], 1.0),
    ],
)
def test_the_distance_of_spectra_is_relative_to_the_longer_one(
    first: list[float], second: list[float], distance: float
) -> None:
    a, b = (torch.tensor(each, dtype=torch.float64) for each in (first, second))
    assert spectral_distance(a, b) == spectral_distance(b, a) == pytest.approx(distance, abs=1e-15)


def test_spectra_of_two_dtypes_are_compared_in_float64() -> None:
    assert spectral_distance(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.float64)) == 0


# profiles


def test_a_profile_does_not_differ_from_itself() -> None:
    one = profile(base_hash="b", data_hash="d")
    found = diff_profiles(one, one)
    assert (found.same_base, found.same_data) == (True, True)
    assert not any((found.provenance, found.only_in_first, found.only_in_second, found.other_shapes))
    assert found.statistics["psi"].rank_correlation == 1
    assert [each.in_errors for each in found.statistics["psi"].changes] == [0, 0, 0]
    assert found.spectra == {"weight": {"a": 0.0, "b": 0.0}}


def test_changes_are_counted_in_combined_standard_errors_the_largest_first() -> None:
    found = diff_profiles(profile(stderr=0.3), profile(factor=2.0, stderr=0.4)).statistics
    assert list(found) == ["psi"]
    assert [each.module for each in found["psi"].changes] == ["c", "b", "a"]
    assert found["psi"].changes[0] == Change(module="c", first=0.4, second=0.8, in_errors=pytest.approx(0.8))


@pytest.mark.parametrize(("first", "second"), [(None, 0.1), (None, None), (0.0, 0.0)])
def test_without_two_standard_errors_changes_are_ordered_by_size(first: float | None, second: float | None) -> None:
    found = diff_profiles(profile(stderr=first), profile(factor=-1.0, stderr=second)).statistics["psi"]
    assert [(each.module, each.in_errors) for each in found.changes] == [("c", None), ("b", None), ("a", None)]
    assert found.rank_correlation == -1


def test_a_change_of_countless_errors_is_a_finite_number() -> None:
    found = diff_profiles(profile(stderr=1e-320), profile(factor=9.0, stderr=0.0)).statistics["psi"]
    assert all(each.in_errors is not None and 1e300 < each.in_errors < float("inf") for each in found.changes)


@pytest.mark.parametrize(
    ("first", "second", "same"), [("x", "x", True), ("x", "y", False), ("x", None, None), (None, None, None)]
)
def test_bases_and_data_are_told_apart_by_their_hashes_alone(
    first: str | None, second: str | None, same: bool | None
) -> None:
    sides = [{} if each is None else {"base_hash": each, "data_hash": each} for each in (first, second)]
    found = diff_profiles(profile(model="m", **sides[0]), profile(model="m", **sides[1]))
    assert (found.same_base, found.same_data) == (same, same)


def test_what_differs_of_the_provenance_is_listed_with_both_values() -> None:
    found = diff_profiles(profile(seed=0, model="m", probe=8), profile(seed=1, model="m", host="x"))
    assert found.provenance == {"host": (None, "x"), "probe": (8, None), "seed": (0, 1)}


def test_modules_statistics_and_kinds_of_one_profile_only_are_listed() -> None:
    one = profile()
    other = replace(
        one,
        modules={
            "a": replace(one.modules["a"], shape=(3, 2), statistics={"gain": 1.0, "psi_stderr": 1.0}),
            "d": one.modules["a"],
        },
        spectra={"gradient": {"a": torch.ones(1)}},
        base_parameters=90,
    )
    found = diff_profiles(one, other)
    assert (found.only_in_first, found.only_in_second, found.other_shapes) == (("b", "c"), ("d",), ("a",))
    assert (found.statistics_only_in_first, found.statistics_only_in_second) == ((), ("gain",))
    assert (found.spectra_only_in_first, found.spectra_only_in_second) == (("weight",), ("gradient",))
    assert found.statistics == {}  # ψ is known to both, but of no module to both
    assert found.base_parameters == (100, 90)


def test_spectra_are_listed_by_distance_the_largest_first() -> None:
    one, other = profile(), profile()
    other = replace(other, spectra={"weight": {"b": torch.tensor([4.0]), "a": torch.tensor([2.0, 1.0])}})
    assert list(diff_profiles(one, other).spectra["weight"].items()) == [("b", 0.75), ("a", 0.0)]
