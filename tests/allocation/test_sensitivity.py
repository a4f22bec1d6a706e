import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowra_allocation import sensitivity

GAINS = st.dictionaries(st.sampled_from("abcdefg"), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5), min_size=1)


def test_the_median_module_has_one_half() -> None:
    psi = sensitivity({"a": [1.0], "b": [2.0], "c": [50.0]}, {"a": 1, "b": 1, "c": 1}, mean_rank=1)
    assert psi["b"] == 0.5


def test_nine_times_the_median_density_has_nine_tenths() -> None:
    psi = sensitivity({"a": [2.0], "b": [2.0], "c": [18.0]}, {"a": 1, "b": 1, "c": 1}, mean_rank=1)
    assert psi["c"] == pytest.approx(0.9, abs=1e-15)


def test_a_nineteenth_of_the_median_density_is_the_default_threshold() -> None:
    psi = sensitivity({"a": [1.0], "b": [19.0], "c": [19.0]}, {"a": 1, "b": 1, "c": 1}, mean_rank=1)
    assert psi["a"] == pytest.approx(0.05, abs=1e-15)


def test_density_counts_parameters_and_the_first_mean_rank_gains() -> None:
    gains = {"a": [4.0, 2.0, 100.0], "b": [3.0, 3.0, 0.0], "c": [6.0, 6.0, 0.0]}
    psi = sensitivity(gains, {"a": 1, "b": 1, "c": 2}, mean_rank=2)
    assert psi == {"a": 0.5, "b": 0.5, "c": 0.5}


def test_a_module_with_fewer_gains_than_the_mean_rank_is_diluted() -> None:
    psi = sensitivity({"a": [3.0], "b": [1.0, 1.0, 1.0]}, {"a": 1, "b": 1}, mean_rank=3)
    assert psi["a"] == psi["b"] == 0.5


def test_all_zero_gains_give_every_module_one_half() -> None:
    assert sensitivity({"a": [0.0], "b": []}, {"a": 1, "b": 2}, mean_rank=3) == {"a": 0.5, "b": 0.5}


def test_a_zero_median_gives_one_with_gains_and_zero_without() -> None:
    psi = sensitivity({"a": [0.0], "b": [0.0], "c": [1e-9]}, {"a": 1, "b": 1, "c": 1}, mean_rank=1)
    assert psi == {"a": 0.0, "b": 0.0, "c": 1.0}


def test_no_modules_have_no_sensitivity() -> None:
    assert sensitivity({}, {}, mean_rank=1) == {}


@pytest.mark.parametrize("mean_rank", [0, -1])
def test_a_mean_rank_below_one_is_refused(mean_rank: int) -> None:
    with pytest.raises(ValueError, match=rf"mean_rank must be ≥ 1, got {mean_rank}"):
        sensitivity({"a": [1.0]}, {"a": 1}, mean_rank=mean_rank)


@given(GAINS, st.integers(1, 4), st.integers(-20, 20))
def test_the_scale_of_the_loss_changes_nothing(gains: dict[str, list[float]], mean_rank: int, power: int) -> None:
    costs = {name: 1 + index for index, name in enumerate(gains)}
    scaled = {name: [2.0**power * gain for gain in each] for name, each in gains.items()}
    assert sensitivity(scaled, costs, mean_rank=mean_rank) == sensitivity(gains, costs, mean_rank=mean_rank)


@given(GAINS, st.integers(1, 4))
def test_it_lies_between_zero_and_one_and_grows_with_the_density(gains: dict[str, list[float]], mean_rank: int) -> None:
    costs = dict.fromkeys(gains, 3)
    psi = sensitivity(gains, costs, mean_rank=mean_rank)
    density = {name: sum(each[:mean_rank]) for name, each in gains.items()}
    assert all(0 <= value <= 1 for value in psi.values())
    ordered = sorted(gains, key=lambda name: (density[name], psi[name]))
    assert [psi[name] for name in ordered] == sorted(psi.values())
