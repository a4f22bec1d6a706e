"""The policy: what leaves, what is tried, and that the budget holds."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowra_allocation import BottleneckGram, Breathe, LayerView, RefinementSchedule, Snapshot
from flowra_allocation.breathe import admit
from flowra_allocation.shedding import shed


class Moves(NamedTuple):
    """What one event does."""

    keep: dict[str, int]
    admit: tuple[str, ...]
    kkt_gap: float | None


def breathe(
    gains: dict[str, list[float]],
    costs: dict[str, int],
    *,
    budget: int,
    share: float,
    predictions: dict[str, float],
    caps: dict[str, int],
) -> Moves:
    """Shed to what leaves the share free, then admit, as the policy does at an event."""
    left = shed(gains, costs, budget=budget * (1 - share))
    tried = admit(predictions, costs, ranks=left.keep, caps=caps, budget=budget) if share else ()
    return Moves(dict(left.keep), tried, left.kkt_gap)


GAIN = st.integers(0, 80).map(lambda value: value / 8)


@st.composite
def events(draw: st.DrawFn) -> dict[str, dict[str, object]]:
    names = draw(st.lists(st.sampled_from("abcde"), min_size=1, unique=True))
    gains = {name: sorted(draw(st.lists(GAIN, max_size=5)), reverse=True) for name in names}
    return {
        "gains": gains,
        "costs": {name: draw(st.integers(1, 12)) for name in names},
        "predictions": {name: draw(GAIN) for name in names},
        "caps": {name: max(len(gains[name]), draw(st.integers(0, 7))) for name in names},
    }


def kept_parameters(event: dict[str, dict[str, object]], moves: Moves) -> int:
    return sum(event["costs"][name] * rank for name, rank in moves.keep.items())


@given(events(), st.integers(1, 200), st.floats(0, 0.9))
def test_the_budget_holds_and_the_share_is_free_before_anything_is_admitted(
    event: dict[str, dict[str, object]], budget: int, share: float
) -> None:
    moves = breathe(**event, budget=budget, share=share)
    kept = kept_parameters(event, moves)
    assert kept <= budget * (1 - share)
    assert kept + sum(event["costs"][name] for name in moves.admit) <= budget


@given(events(), st.integers(1, 200), st.floats(0, 0.9))
def test_the_kkt_gap_is_what_separates_kept_from_dropped(
    event: dict[str, dict[str, object]], budget: int, share: float
) -> None:
    moves = breathe(**event, budget=budget, share=share)
    kept, dropped = [], []
    for name, gains in event["gains"].items():
        densities = [gain / event["costs"][name] for gain in gains]
        kept += densities[: moves.keep[name]]
        dropped += densities[moves.keep[name] :]
    assert moves.kkt_gap == (min(kept) - max(dropped) if kept and dropped else None)
    assert moves.kkt_gap is None or moves.kkt_gap >= 0


@given(events(), st.integers(1, 200), st.floats(0, 0.9))
def test_no_more_is_dropped_than_needed(event: dict[str, dict[str, object]], budget: int, share: float) -> None:
    moves = breathe(**event, budget=budget, share=share)
    dropped = [name for name, gains in event["gains"].items() if moves.keep[name] < len(gains)]
    if dropped:
        largest = max(event["costs"][name] for name in dropped)
        assert kept_parameters(event, moves) + largest > budget * (1 - share)


@given(events(), st.integers(1, 200), st.floats(0.01, 0.9))
def test_admission_follows_the_prediction_per_parameter_within_caps(
    event: dict[str, dict[str, object]], budget: int, share: float
) -> None:
    moves = breathe(**event, budget=budget, share=share)
    ranking = [(-event["predictions"][name] / event["costs"][name], name) for name in moves.admit]
    assert ranking == sorted(ranking)
    assert len(set(moves.admit)) == len(moves.admit)
    used = kept_parameters(event, moves) + sum(event["costs"][name] for name in moves.admit)
    for name, prediction in event["predictions"].items():
        if name in moves.admit:
            assert prediction > 0
            assert moves.keep[name] < event["caps"][name]
        elif prediction > 0 and moves.keep[name] < event["caps"][name]:
            assert used + event["costs"][name] > budget


@given(events(), st.integers(1, 200))
def test_nothing_is_admitted_without_a_share(event: dict[str, dict[str, object]], budget: int) -> None:
    moves = breathe(**event, budget=budget, share=0)
    assert moves.admit == ()
    used = sum(event["costs"][name] * len(gains) for name, gains in event["gains"].items())
    if used <= budget:
        assert moves.keep == {name: len(gains) for name, gains in event["gains"].items()}


@given(events(), st.integers(1, 200), st.floats(0, 0.9))
def test_the_order_of_the_modules_does_not_matter(
    event: dict[str, dict[str, object]], budget: int, share: float
) -> None:
    turned = {key: dict(reversed(each.items())) for key, each in event.items()}
    assert breathe(**turned, budget=budget, share=share) == breathe(**event, budget=budget, share=share)


@pytest.mark.parametrize("order", ["abc", "cba", "bca"])
def test_ties_are_broken_by_name(order: str) -> None:
    moves = breathe(
        {name: [1.0] for name in order},
        dict.fromkeys(order, 1),
        budget=3,
        share=0.3,
        predictions=dict.fromkeys(order, 2.0),
        caps=dict.fromkeys(order, 4),
    )
    assert moves == Moves(keep={"a": 0, "b": 1, "c": 1}, admit=("a",), kkt_gap=0.0)


def test_a_module_at_its_cap_is_passed_over() -> None:
    moves = breathe(
        {"a": [9.0, 8.0], "b": [1.0, 0.5]},
        {"a": 1, "b": 1},
        budget=4,
        share=0.25,
        predictions={"a": 99.0, "b": 0.1},
        caps={"a": 2, "b": 3},
    )
    assert moves == Moves(keep={"a": 2, "b": 1}, admit=("b",), kkt_gap=0.5)


def test_the_density_and_not_the_gain_decides_who_leaves() -> None:
    moves = breathe(
        {"dear": [10.0], "cheap": [5.0]},
        {"dear": 10, "cheap": 1},
        budget=11,
        share=0.05,
        predictions={},
        caps={"dear": 1, "cheap": 1},
    )
    assert moves == Moves(keep={"dear": 0, "cheap": 1}, admit=(), kkt_gap=4.0)


def test_a_module_of_rank_zero_may_be_tried() -> None:
    moves = breathe({"a": []}, {"a": 2}, budget=4, share=0.5, predictions={"a": 1.0}, caps={"a": 1})
    assert moves == Moves(keep={"a": 0}, admit=("a",), kkt_gap=None)


# The policy itself, on plain values.


def view(rank: int, *, cost: int = 10, cap: int = 99, energy: float = 1.0) -> LayerView:
    """An update whose directions all are worth something, and whose module would grow if its energy is not 0."""
    gram = BottleneckGram(*(torch.diag(torch.arange(1.0, rank + 1)).double() for _ in range(2)), 4.0, 4.0)
    return LayerView(
        lora_A=torch.eye(rank, 128),
        lora_B=torch.eye(128, rank),
        cost=cost,
        cap=cap,
        gram=gram,
        growth=(energy, torch.eye(1, 128)[0]),
    )


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 12), st.booleans(), st.sampled_from([0.0, 1.0])),
        min_size=1,
        max_size=4,
    ),
    st.floats(0.01, 0.9),
)
def test_less_than_one_unit_of_what_is_freed_stays_free(
    modules: list[tuple[int, int, bool, float]], share: float
) -> None:
    layers = {
        f"m{index}": view(rank, cost=cost, cap=rank if full else 99, energy=energy)
        for index, (rank, cost, full, energy) in enumerate(modules)
    }
    budget = sum(each.cost * each.rank for each in layers.values())
    policy = Breathe(schedule=RefinementSchedule(start=0, freeze=8, events=2), share=share)
    moves = policy.decide(Snapshot(step=4, layers=layers, budget=budget, seed=0))
    left = {name: len(moves.keep[name].lora_A) if name in moves.keep else each.rank for name, each in layers.items()}
    after = sum(each.cost * (left[name] + (name in moves.admit)) for name, each in layers.items())
    assert budget - 2 * max(each.cost for each in layers.values()) < after <= budget


def test_updates_that_may_not_grow_are_refused_before_training() -> None:
    policy = Breathe(schedule=RefinementSchedule(start=0, freeze=8, events=2), share=0.5)
    full, free = view(3, cap=3), view(3, cap=4)
    policy.check(Snapshot(step=0, layers={"full": full, "free": free}, budget=60, seed=0))
    with pytest.raises(ValueError, match="caps must leave an update room to grow, got 2 updates, all of their largest"):
        policy.check(Snapshot(step=0, layers={"full": full, "other": full}, budget=60, seed=0))


def test_what_no_module_could_take_up_is_not_taken_away() -> None:
    full, flat = view(3, cap=3), view(3, energy=0.0)
    policy = Breathe(schedule=RefinementSchedule(start=0, freeze=8, events=2), share=0.5)
    moves = policy.decide(Snapshot(step=4, layers={"full": full, "flat": flat}, budget=60, seed=0))
    assert moves.keep == {}
    assert moves.admit == {}
