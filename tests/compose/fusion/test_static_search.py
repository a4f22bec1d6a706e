"""The search of static weights: it finds optima, asks no more than it may, and does the same every time."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compose.fusion.stacks import adapters_of, merged, stack, states
from flowra_compose.fusion import StaticWeights, fuse, search_static_weights

TARGETS = st.lists(st.floats(-1.4, 1.4), min_size=1, max_size=4)


def quadratic(target: list[float], calls: list[tuple[float, ...]]) -> Callable[[tuple[float, ...]], float]:
    def loss(weights: tuple[float, ...]) -> float:
        calls.append(weights)
        distances = [weight - at for weight, at in zip(weights, target, strict=True)]
        return sum((2 + index) * each**2 for index, each in enumerate(distances)) + 0.5 * sum(distances) ** 2

    return loss


@given(target=TARGETS)
def test_the_optimum_of_a_quadratic_is_found(target: list[float]) -> None:
    found = search_static_weights(quadratic(target, []), len(target), evaluations=400)
    assert max(abs(weight - at) for weight, at in zip(found.weights, target, strict=True)) < 0.01


@given(target=TARGETS, extra=st.integers(0, 30))
def test_the_loss_is_asked_for_no_more_than_it_may_be_and_never_twice(target: list[float], extra: int) -> None:
    calls: list[tuple[float, ...]] = []
    evaluations = len(target) + 2 + extra
    found = search_static_weights(quadratic(target, calls), len(target), evaluations=evaluations)
    assert len(calls) <= evaluations
    assert len(set(calls)) == len(calls)
    assert [weights for weights, _ in found.tried] == calls
    assert found.loss == min(loss for _, loss in found.tried)
    assert dict(found.tried)[found.weights] == found.loss
    calls.clear()
    assert search_static_weights(quadratic(target, calls), len(target), evaluations=evaluations) == found


def test_it_begins_with_the_sum_the_mean_and_each_alone() -> None:
    calls: list[tuple[float, ...]] = []
    search_static_weights(quadratic([0.3, 0.4], calls), 2, evaluations=4)
    assert calls == [(1.0, 1.0), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]


def test_it_begins_with_what_it_is_given_within_the_bounds() -> None:
    calls: list[tuple[float, ...]] = []
    found = search_static_weights(quadratic([0.3, 0.4], calls), 2, evaluations=6, starts=[(0.3, 0.4), (9, 0)])
    assert calls == [(0.3, 0.4), (1.5, 0.0), (1.0, 1.0), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]
    assert (found.weights, found.loss) == ((0.3, 0.4), 0.0)


def test_the_best_is_never_worse_than_the_best_of_the_starts() -> None:
    losses = iter([3.0, 5.0, 1.0, 4.0, *[9.0] * 96])
    found = search_static_weights(lambda _: next(losses), 2, evaluations=100)
    assert (found.weights, found.loss) == ((1.0, 0.0), 1.0)


@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.inf])
def test_losses_that_are_not_finite_are_survived(bad: float) -> None:
    calls: list[tuple[float, ...]] = []
    loss = quadratic([0.3, 0.6], calls)
    found = search_static_weights(lambda w: bad if max(w) > 0.9 else loss(w), 2, evaluations=200)
    assert max(abs(found.weights[0] - 0.3), abs(found.weights[1] - 0.6)) < 0.01
    assert any(each == math.inf for _, each in found.tried)
    everywhere = search_static_weights(lambda _: bad, 2)
    assert everywhere.loss == math.inf
    assert len(everywhere.weights) == 2


def test_bounds_hold_and_an_optimum_outside_is_met_on_them() -> None:
    calls: list[tuple[float, ...]] = []
    found = search_static_weights(lambda w: quadratic([3.0], calls)(w), 1, evaluations=60, bounds=(-0.5, 0.8))
    assert found.weights == (0.8,)
    assert all(-0.5 <= weight <= 0.8 for (weight,) in calls)


def test_the_penalty_is_that_of_the_mean_magnitude() -> None:
    found = search_static_weights(lambda _: 1.0, 2, penalty=0.05, evaluations=60)
    assert all(loss == pytest.approx(1 + 0.05 * (abs(a) + abs(b)) / 2) for (a, b), loss in found.tried)
    assert found.weights == (0.0, 0.0)


def test_weights_of_a_merge_are_recovered_from_what_it_answers() -> None:
    model = stack()
    adapters = adapters_of(model, "stack")
    with torch.no_grad():
        wanted = merged(model, adapters, [0.75, -0.25])(states())

        def loss(weights: tuple[float, ...]) -> float:
            with fuse(model, adapters, StaticWeights(weights)):
                return (model(states()) - wanted).pow(2).mean().item()

        found = search_static_weights(loss, 2, evaluations=120)
    assert found.weights == pytest.approx((0.75, -0.25), abs=0.01)


@pytest.mark.parametrize(
    ("adapters", "changes", "message"),
    [
        (0, {}, "evaluations must be at least k"),
        (3, {"evaluations": 4}, "evaluations must be at least k \\+ 2 with k ≥ 1, got 4 for k = 3"),
        (2, {"evaluations": 4, "starts": [(1, 0)]}, "evaluations must be at least k \\+ 3 with k ≥ 1, got 4 for k = 2"),
        (2, {"starts": [(1, 0, 0)]}, "starts must have a weight for each of 2 adapters"),
        (2, {"bounds": (1.0, 1.0)}, "bounds, penalty and initial_step must be low < high"),
        (2, {"penalty": -0.1}, "bounds, penalty and initial_step"),
        (2, {"penalty": math.nan}, "bounds, penalty and initial_step"),
        (2, {"initial_step": 0.0}, "bounds, penalty and initial_step"),
    ],
)
def test_settings_out_of_range_are_refused(adapters: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search_static_weights(lambda _: 0.0, adapters, **changes)
