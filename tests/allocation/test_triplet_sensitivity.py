"""The smoothed sensitivity of triplets: written values, PEFT's allocator as judge, and what a change of rank does."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowra_allocation import LayerView
from flowra_allocation.triplet_sensitivity import TripletSensitivity

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "adalora_importance.json").read_text())
WRITTEN = {"rtol": 1e-6, "atol": 1e-9}
FACTORS = ("lora_A", "lora_E", "lora_B")
KINDS = {"sensitivity": "exp_avg_ipt", "uncertainty": "exp_avg_unc"}


def written(values: dict[str, list[list[float]]]) -> dict[str, dict[str, Tensor]]:
    """Module name to factor name to values; E is ``(r, 1)`` in the file."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in values.items():
        name, factor = key.split(".")
        tensor = torch.tensor(value)
        found.setdefault(name, {})[factor] = tensor.flatten() if factor == "lora_E" else tensor
    return found


def views(values: dict[str, dict[str, Tensor]]) -> dict[str, LayerView]:
    return {name: LayerView(**each, cost=1, cap=9) for name, each in values.items()}


def drawn(seed: int, ranks: dict[str, int], dtype: torch.dtype = torch.float64) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def one(rank: int) -> dict[str, Tensor]:
        shapes = {"lora_A": (rank, 5), "lora_E": (rank,), "lora_B": (4, rank)}
        return {key: torch.randn(shape, generator=generator, dtype=dtype) for key, shape in shapes.items()}

    return {name: one(rank) for name, rank in ranks.items()}


def fed(steps: range, ranks: dict[str, int], into: TripletSensitivity | None = None) -> TripletSensitivity:
    """See one seeded step for each number."""
    found = into or TripletSensitivity()
    for step in steps:
        found.update(views(drawn(2 * step, ranks)), drawn(2 * step + 1, ranks))
    return found


def assert_equal_states(one: TripletSensitivity, other: TripletSensitivity) -> None:
    assert one.state().keys() == other.state().keys()
    assert all(torch.equal(each, other.state()[key]) for key, each in one.state().items())


# Written values.


def test_averages_and_scores_are_as_written() -> None:
    found = TripletSensitivity(GOLDEN["beta1"], GOLDEN["beta2"])
    layers = views(written(GOLDEN["weights"]))
    for update in GOLDEN["updates"]:
        found.update(layers, written(update["grad"]))
        state = found.state()
        for kind, key in KINDS.items():
            for name, factors in written(update[key]).items():
                for factor, expected in factors.items():
                    torch.testing.assert_close(state[f"{name}.{factor}.{kind}"], expected, **WRITTEN)
        assert len(state) == 2 * len(update["grad"])
    scores = found.scores()
    assert scores.keys() == GOLDEN["triplet_score"].keys()
    for name, expected in GOLDEN["triplet_score"].items():
        torch.testing.assert_close(scores[name], torch.tensor(expected), **WRITTEN)


def test_scores_are_those_of_the_formula_element_by_element() -> None:
    beta1, beta2, ranks = 0.7, 0.9, {"a": 3, "b": 2}
    found = TripletSensitivity(beta1, beta2)
    smoothed: dict[tuple[str, str], Tensor] = {}
    uncertain: dict[tuple[str, str], Tensor] = {}
    for step in range(4):
        values, gradients = drawn(2 * step, ranks), drawn(2 * step + 1, ranks)
        found.update(views(values), gradients)
        for key in [(name, factor) for name in ranks for factor in FACTORS]:
            impact = (values[key[0]][key[1]] * gradients[key[0]][key[1]]).abs()
            smoothed[key] = beta1 * smoothed.get(key, 0) + (1 - beta1) * impact
            uncertain[key] = beta2 * uncertain.get(key, 0) + (1 - beta2) * (impact - smoothed[key]).abs()
    for name in ranks:
        A, E, B = (smoothed[name, factor] * uncertain[name, factor] for factor in FACTORS)
        torch.testing.assert_close(found.scores()[name], E + A.mean(1) + B.mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    found = TripletSensitivity()
    found.update(views(drawn(0, {"a": 2}, dtype)), drawn(1, {"a": 2}, dtype))
    assert {each.dtype for each in found.state().values()} == {torch.float32}


# Edges.


def test_nothing_is_known_before_the_first_step() -> None:
    assert TripletSensitivity().scores() == {}
    assert TripletSensitivity().state() == {}
    found = TripletSensitivity()
    found.update({}, {})
    assert found.scores() == {}


def test_a_module_of_rank_zero_has_no_scores() -> None:
    scores = fed(range(2), {"a": 2, "none": 0}).scores()
    assert scores["a"].shape == (2,)
    assert scores["none"].shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_whose_gradient_overflowed_is_left_out(bad: float) -> None:
    ranks = {"a": 2, "b": 1}
    gradients = drawn(99, ranks)
    gradients["b"]["lora_E"][0] = bad
    found = fed(range(3), ranks)
    found.update(views(drawn(98, ranks)), gradients)
    fed(range(3, 5), ranks, found)
    assert_equal_states(found, fed(range(5), ranks))


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.5, float("nan")])
def test_a_beta_out_of_range_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"beta1 must be in \(0, 1\), got"):
        TripletSensitivity(wrong, 0.85)
    with pytest.raises(ValueError, match=r"beta2 must be in \(0, 1\), got"):
        TripletSensitivity(0.85, wrong)


# Changes of rank.


@st.composite
def changes(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, list[int]], dict[str, int]]:
    ranks = {name: draw(st.integers(0, 4)) for name in "abc"}
    named = draw(st.sets(st.sampled_from("abc")))
    keep = {
        name: draw(st.permutations(range(ranks[name])))[: draw(st.integers(0, ranks[name]))] for name in sorted(named)
    }
    return ranks, keep, {name: draw(st.integers(0, 2)) for name in draw(st.sets(st.sampled_from("abc")))}


@given(changes())
def test_directions_that_stay_keep_their_score_and_new_ones_have_none(
    change: tuple[dict[str, int], dict[str, list[int]], dict[str, int]],
) -> None:
    ranks, keep, admitted = change
    found = fed(range(3), ranks)
    before = found.scores()
    found.follow(keep=keep, admitted=admitted)
    after = found.scores()
    for name in ranks:
        new = torch.zeros(admitted.get(name, 0), dtype=torch.float64)
        expected = torch.cat([before[name][keep.get(name, range(ranks[name]))], new])
        torch.testing.assert_close(after[name], expected)
    fed(range(3, 4), {name: len(each) for name, each in after.items()}, found)  # goes on at the new ranks


def test_a_change_of_rank_that_was_not_told_is_an_error() -> None:
    found = fed(range(2), {"a": 3})
    with pytest.raises(
        ValueError, match=r"lora_A must have the shape \(3, 5\) of earlier steps, got \(2, 5\); a\. Tell"
    ):
        fed(range(2, 3), {"a": 2}, found)


# State.


def test_a_restored_state_goes_on_bit_by_bit() -> None:
    ranks = {"block.0.q": 3, "v:k": 1}
    resumed = TripletSensitivity()
    resumed.restore(fed(range(4), ranks).state())
    fed(range(4, 7), ranks, resumed)
    assert_equal_states(resumed, fed(range(7), ranks))


def test_going_on_does_not_change_the_state_that_was_restored() -> None:
    state = fed(range(2), {"a": 2}).state()
    before = {key: each.clone() for key, each in state.items()}
    resumed = TripletSensitivity()
    resumed.restore(state)
    fed(range(2, 4), {"a": 2}, resumed)
    assert all(torch.equal(each, before[key]) for key, each in state.items())


@pytest.mark.parametrize("key", ["a.lora_A.moment", "a.lora_C.sensitivity", "sensitivity"])
def test_a_foreign_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"state must be of sensitivities and uncertainties, got the key '{key}'"):
        TripletSensitivity().restore({key: torch.zeros(2)})


def test_half_a_state_is_refused_and_changes_nothing() -> None:
    state = fed(range(2), {"a": 2}).state()
    del state["a.lora_E.uncertainty"]
    one = fed(range(3), {"a": 2})
    before = one.scores()
    with pytest.raises(ValueError, match=r"an uncertainty for every sensitivity, got one of them for \['a.lora_E'\]"):
        one.restore(state)
    torch.testing.assert_close(one.scores(), before, rtol=0, atol=0)
