"""The closed form of WUDI against dense pseudo-inverses."""

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowra_compose import LowRankUpdate, merge_updates

SHAPES = [(5, 30), (30, 5), (6, 6), (1, 4), (4, 1), (12, 9), (40, 50)]


def random_update(m: int, n: int, rank: int, *, scaling: float = 1.0, seed: int = 0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    return LowRankUpdate(a, b, scaling)


def merged(updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> Tensor:
    return merge_updates([{"fc": one} for one in updates], weights, rule="wudi")["fc"].delta_weight()


def task_vectors(updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> list[Tensor]:
    return [w * one.delta_weight() for w, one in zip(weights, updates, strict=True)]


def loss(m: Tensor, tasks: Sequence[Tensor]) -> Tensor:
    return torch.stack([((m - one) @ one.T).square().sum() / one.square().sum() for one in tasks]).sum()


def condition(tasks: Sequence[Tensor]) -> float:
    """The smallest singular value of the stacked rows, each task of norm 1, that is not 0."""
    values = torch.linalg.svdvals(torch.cat([one / one.norm() for one in tasks]))
    return float(values[values > 1e-9].min())


@st.composite
def inputs(draw: st.DrawFn) -> tuple[list[LowRankUpdate], list[float]]:
    m, n = draw(st.sampled_from(SHAPES))
    scalings = st.sampled_from([-1.5, 0.01, 1.0, 16.0])
    seed = draw(st.integers(0, 10**6))
    updates = [
        random_update(m, n, draw(st.integers(1, 7)), scaling=draw(scalings), seed=seed + task)
        for task in range(draw(st.integers(1, 4)))
    ]
    weight = st.floats(-3, 3).filter(lambda value: abs(value) > 1e-3)
    return updates, draw(st.lists(weight, min_size=len(updates), max_size=len(updates)))


# exact


@settings(max_examples=80)
@given(inputs())
def test_it_is_regmean_with_the_task_vectors_for_inputs(case: tuple[list[LowRankUpdate], list[float]]) -> None:
    tasks = task_vectors(*case)
    moments = [one.T @ one / one.square().sum() for one in tasks]
    crossed = torch.stack([one @ moment for one, moment in zip(tasks, moments, strict=True)]).sum(0)
    least = condition(tasks)
    expected = crossed @ torch.linalg.pinv(torch.stack(moments).sum(0), atol=0.5 * least**2, rtol=0, hermitian=True)
    size = sum(float(one.norm()) for one in tasks)
    assert float((merged(*case) - expected).norm()) <= 1e-12 * size / least**4


@settings(max_examples=30)
@given(inputs(), st.integers(0, 10**6))
def test_no_other_matrix_has_a_smaller_loss(case: tuple[list[LowRankUpdate], list[float]], seed: int) -> None:
    tasks = task_vectors(*case)
    found = merged(*case)
    step = random_update(*found.shape, 3, seed=seed).delta_weight()
    size = sum(float(one.square().sum()) for one in tasks) ** 2 / condition(tasks) ** 2
    assert float(loss(found + 1e-2 * step, tasks) - loss(found, tasks)) >= -1e-12 * size
    total = torch.stack(tasks).sum(0)
    assert float(loss(found, tasks)) <= float(loss(total, tasks)) + 1e-12 * size


def test_gradient_descent_from_the_sum_ends_there() -> None:
    tasks = [random_update(8, 10, 3, seed=seed) for seed in range(4)]  # twelve rows of ten columns: not independent
    deltas = task_vectors(tasks, [1, 2, -1, 0.5])
    stacked, moments = torch.stack(deltas), [one.T @ one / one.square().sum() for one in deltas]
    rate = 0.9 / float(torch.linalg.eigvalsh(torch.stack(moments).sum(0))[-1])
    m = stacked.sum(0)
    for _ in range(20_000):
        m = m - rate * ((m - stacked) @ torch.stack(moments)).sum(0)
    torch.testing.assert_close(merged(tasks, [1, 2, -1, 0.5]), m, rtol=0, atol=1e-8)


# what it promises


def test_independent_row_spaces_are_treated_exactly_as_their_tasks_treat_them() -> None:
    updates, weights = [random_update(20, 30, rank, seed=rank) for rank in (2, 5, 7)], [1.0, -100.0, 0.01]
    found = merged(updates, weights)
    for one, task in zip(updates, task_vectors(updates, weights), strict=True):
        torch.testing.assert_close(found @ one.lora_A.T, task @ one.lora_A.T, rtol=0, atol=1e-8)


def test_orthogonal_row_spaces_give_the_sum() -> None:
    rows = torch.linalg.qr(random_update(30, 9, 9).delta_weight()).Q.T
    updates = [
        LowRankUpdate(rows[part], random_update(20, 20, 5, seed=1).lora_B[:, : len(rows[part])])
        for part in (slice(0, 3), slice(3, 4), slice(4, 9))
    ]
    total = torch.stack(task_vectors(updates, [1, -2, 0.5])).sum(0)
    torch.testing.assert_close(merged(updates, [1, -2, 0.5]), total, rtol=0, atol=1e-12)


def test_equal_row_spaces_give_a_mean() -> None:
    rows = torch.linalg.qr(random_update(30, 3, 3).delta_weight()).Q.T
    updates = [
        LowRankUpdate(rows, torch.linalg.qr(random_update(20, 3, 3, seed=seed).delta_weight()).Q) for seed in (1, 2)
    ]
    mean = torch.stack(task_vectors(updates, [1, 1])).mean(0)  # flat spectra: equal second moments
    torch.testing.assert_close(merged(updates, [1, 1]), mean, rtol=0, atol=1e-12)


# laws


@settings(max_examples=40)
@given(inputs())
def test_one_adapter_and_copies_of_it_come_back(case: tuple[list[LowRankUpdate], list[float]]) -> None:
    update, weight = case[0][0], case[1][0]
    expected = weight * update.delta_weight()
    assert float((merged([update], [weight]) - expected).norm()) <= 1e-13 * float(expected.norm())
    tolerance = 1e-12 * float(expected.norm()) / condition([expected]) ** 2
    assert float((merged([update] * 3, [weight] * 3) - expected).norm()) <= tolerance
    assert float(merged([update] * 2, [weight, -weight]).norm()) <= tolerance


def test_one_adapter_of_an_ill_conditioned_spectrum_loses_nothing() -> None:
    sigma = torch.tensor([1.0, 1e-6, 1e-12], dtype=torch.float64)
    u, v = (torch.linalg.qr(random_update(d, 3, 3, seed=d).delta_weight()).Q for d in (20, 30))
    update = LowRankUpdate(v.T, u * sigma)
    assert float((merged([update], [1]) - update.delta_weight()).norm()) <= 1e-15


@settings(max_examples=40)
@given(inputs(), st.sampled_from([0.125, 3.0, -7.0]), st.randoms(use_true_random=False))
def test_order_and_common_scale_and_alpha_against_b(
    case: tuple[list[LowRankUpdate], list[float]], factor: float, chance: random.Random
) -> None:
    updates, weights = case
    tasks = task_vectors(*case)
    tolerance = 1e-12 * sum(float(one.norm()) for one in tasks) / condition(tasks) ** 2
    found, order = merged(updates, weights), list(range(len(updates)))
    chance.shuffle(order)
    shuffled = merged([updates[each] for each in order], [weights[each] for each in order])
    assert float((shuffled - found).norm()) <= tolerance
    scaled = merged(updates, [factor * weight for weight in weights])
    assert float((scaled - factor * found).norm()) <= abs(factor) * tolerance
    rescaled = [LowRankUpdate(one.lora_A, one.lora_B / factor, one.scaling * factor) for one in updates]
    assert float((merged(rescaled, weights) - found).norm()) <= tolerance


def test_vectors_are_averaged() -> None:
    columns = [random_update(6, 1, 1, seed=seed).delta_weight() for seed in range(2)]
    updates = [LowRankUpdate.of_delta_weight(one, layout="vector") for one in columns]
    torch.testing.assert_close(merged(updates, [1, 3]), (columns[0] + 3 * columns[1]) / 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_take_no_part(shape: tuple[int, int]) -> None:
    update = random_update(*shape, 4, scaling=3.0)
    zero = LowRankUpdate(update.lora_A, torch.zeros_like(update.lora_B))
    assert not merged([zero, zero], [1, 1]).any()
    torch.testing.assert_close(merged([zero, update], [1, 1]), merged([update], [1]))
