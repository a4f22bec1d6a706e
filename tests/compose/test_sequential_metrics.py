"""ACC, BWT and forgetting of sequences of tasks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowra_compose import sequential_metrics

NAN = math.nan
MATRICES = st.integers(1, 5).flatmap(
    lambda size: st.lists(st.lists(st.floats(0, 1), min_size=size, max_size=size), min_size=size, max_size=size)
)


def test_a_sequence_worked_out_by_hand() -> None:
    found = sequential_metrics([[0.9, 0.2, 0.1], [0.7, 0.8, NAN], [0.8, 0.6, 0.7]])
    assert found.accuracy == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    assert found.backward_transfer == pytest.approx((-0.1 - 0.2) / 2)
    assert found.forgetting == pytest.approx((0.1 + 0.2) / 2)
    assert found.forgotten == pytest.approx((0.1, 0.2, 0.0))


def test_forgetting_counts_from_the_best_score_and_not_from_the_first() -> None:
    found = sequential_metrics([[0.5, NAN, NAN], [0.9, 0.5, NAN], [0.6, 0.5, 0.5]])
    assert found.backward_transfer == pytest.approx(0.05)
    assert found.forgetting == pytest.approx(0.15)


def test_a_gain_of_one_task_does_not_hide_the_loss_of_another() -> None:
    found = sequential_metrics([[0.5, NAN, NAN], [0.5, 0.9, NAN], [0.9, 0.5, 0.7]])
    assert found.backward_transfer == pytest.approx(0.0)
    assert found.forgetting == pytest.approx(0.2)


def test_a_score_before_a_task_was_trained_is_not_looked_at() -> None:
    plain = sequential_metrics([[0.5, NAN], [0.4, 0.6]])
    assert sequential_metrics([[0.5, 0.99], [0.4, 0.6]]) == plain
    assert sequential_metrics([[0.5, math.inf], [0.4, 0.6]]) == plain


def test_one_task_has_nothing_to_forget() -> None:
    found = sequential_metrics(torch.tensor([[0.7]], dtype=torch.float64))
    assert (found.accuracy, found.backward_transfer, found.forgetting, found.forgotten) == (0.7, 0.0, 0.0, (0.0,))


@given(MATRICES)
def test_forgetting_is_no_less_than_zero_and_than_what_backward_transfer_says(rows: list[list[float]]) -> None:
    found = sequential_metrics(rows)
    assert found.forgetting >= 0
    assert found.forgetting >= -found.backward_transfer - 1e-12
    assert sum(found.forgotten) == pytest.approx(found.forgetting * max(1, len(rows) - 1))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_scores_that_stay_are_not_forgotten(scores: list[float]) -> None:
    found = sequential_metrics([scores] * len(scores))
    assert (found.backward_transfer, found.forgetting) == (0.0, 0.0)
    assert found.accuracy == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[0.5, 0.5]], r"scores must be \(T, T\) with T ≥ 1, got \(1, 2\)"),
        ([], r"got \(0,\)"),
        (torch.zeros(0, 0), r"got \(0, 0\)"),
        (torch.zeros(2, 2, 2), r"got \(2, 2, 2\)"),
        ([[0.5], [0.4, 0.6]], "scores must be a square matrix of numbers"),
        ([["a"]], "scores must be a square matrix of numbers"),
        ([[0.5, 0.1], [NAN, 0.6]], r"finite on and below the diagonal, got nan at \[1, 0\]"),
        ([[0.5, 0.1], [0.4, math.inf]], r"got inf at \[1, 1\]"),
    ],
)
def test_scores_that_are_none_are_refused(scores: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequential_metrics(scores)  # type: ignore[arg-type]
