"""When FlexLoRA moves rank and by how much."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowra_allocation import FlexLoRASchedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flexlora_schedule.json").read_text())
PLAIN = {"total_steps": 100, "warmup": 10, "final": 20, "interval": 5, "b0": 4}


def schedule_of(case: Any, **changes: Any) -> FlexLoRASchedule:  # noqa: ANN401 - parsed JSON
    settings = {
        "total_steps": case["total_step"],
        "warmup": case["init_warmup"],
        "final": case["final_warmup"],
        "interval": case["mask_interval"],
        "b0": case["b0"],
        "decay": "cubic" if case["enable_scheduler"] else "constant",
        **changes,
    }
    return FlexLoRASchedule(**settings)


CASE = pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda case: f"b{case['b0']}-{case['total_step']}-{case['enable_scheduler']}"
)


@CASE
def test_events_and_their_directions_are_the_written_ones(case: Any) -> None:  # noqa: ANN401
    schedule = schedule_of(case)
    assert [[step, schedule.directions(step)] for step in schedule.steps] == case["adjustment_events_step_b"]


@CASE
def test_b_is_the_written_one_at_every_step(case: Any) -> None:  # noqa: ANN401
    schedule = schedule_of(case, decay="cubic")
    assert [[step, schedule.directions(step)] for step, _ in case["b_at_step"]] == case["b_at_step"]


@pytest.mark.parametrize("reading", GOLDEN["other_readings_of_eq4"], ids=lambda each: f"p{each['p']}")
def test_the_reading_of_equation_4_is_that_of_the_code(reading: Any) -> None:  # noqa: ANN401
    fine = FlexLoRASchedule(total_steps=8000, warmup=0, final=0, interval=1, b0=reading["b0"])
    assert fine.directions(round(8000 * reading["p"])) == reading["code_1_minus_p3"]


def test_halfway_seven_eighths_are_left() -> None:
    assert FlexLoRASchedule(total_steps=100, warmup=0, final=0, interval=1, b0=8).directions(50) == 7


@given(
    st.integers(1, 300), st.integers(0, 60), st.integers(0, 60), st.integers(1, 40), st.integers(1, 9), st.booleans()
)
def test_events_rise_lie_strictly_inside_and_move_something_or_the_schedule_is_refused(
    total: int, warmup: int, final: int, interval: int, b0: int, cubic: bool
) -> None:
    settings: dict[str, Any] = {"warmup": warmup, "final": final, "interval": interval, "b0": b0}
    settings |= {"total_steps": total, "decay": "cubic" if cubic else "constant"}
    try:
        schedule = FlexLoRASchedule(**settings)
    except ValueError:
        assert warmup + interval >= total - final or cubic  # a cubic b may be 0 at all events
        return
    steps = schedule.steps
    assert steps == tuple(sorted(set(steps)))
    assert all(warmup < step < total - final and (step - warmup) % interval == 0 for step in steps)
    sizes = [schedule.directions(step) for step in steps]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) >= 1
    assert max(sizes) <= b0


@pytest.mark.parametrize(
    "changes",
    [{"interval": 70}, {"total_steps": 35}, {"final": 85}, {"total_steps": 20}, {"interval": 69, "b0": 1}],
    ids=["long_interval", "short_run", "long_end", "no_room", "b_is_zero_by_then"],
)
def test_a_schedule_without_an_event_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match=r"schedule must have an event: a step 10 \+ k · \d+ with k ≥ 1 below .* Train"
    ):
        FlexLoRASchedule(**{**PLAIN, **changes})


@pytest.mark.parametrize("changes", [{"warmup": -1}, {"final": -1}, {"interval": 0}, {"b0": 0}])
def test_a_number_out_of_range_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="schedule must have warmup ≥ 0, final ≥ 0, interval ≥ 1 and b0 ≥ 1, got"):
        FlexLoRASchedule(**{**PLAIN, **changes})
