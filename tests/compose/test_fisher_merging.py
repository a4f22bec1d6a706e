"""Fisher merging of updates, against the formula on whole weights."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowra_compose import LowRankUpdate, ModuleStatistics, merge_updates


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_update(m: int, n: int, *, seed: int) -> LowRankUpdate:
    return LowRankUpdate(random_tensor(2, n, seed=seed), random_tensor(m, 2, seed=seed + 1), 0.5)


def fisher(updates: Sequence[LowRankUpdate | None], diagonals: Sequence[Tensor | None]) -> Tensor:
    return merge_updates(
        [{} if update is None else {"fc": update} for update in updates],
        [1.0] * len(updates),
        rule="fisher",
        statistics=[{} if each is None else {"fc": ModuleStatistics(fisher=each)} for each in diagonals],
    )["fc"].delta_weight()


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_it_is_the_weighted_mean_of_whole_weights_whatever_the_base(m: int, n: int, tasks: int, seed: int) -> None:
    base, updates = random_tensor(m, n, seed=seed), [random_update(m, n, seed=seed + i) for i in range(tasks)]
    f = [random_tensor(m, n, seed=seed + 50 + i).square() + 0.01 for i in range(tasks)]
    theta = [base + update.delta_weight() for update in updates]
    weighted = torch.stack([fi * t for fi, t in zip(f, theta, strict=True)]).sum(0)
    expected = weighted / torch.stack(f).sum(0) - base
    torch.testing.assert_close(fisher(updates, f), expected, rtol=1e-9, atol=1e-9)


def test_equal_diagonals_give_the_mean_and_one_task_its_update() -> None:
    updates = [random_update(3, 4, seed=i) for i in range(3)]
    f = random_tensor(3, 4, seed=9).square()
    mean = torch.stack([update.delta_weight() for update in updates]).mean(0)
    torch.testing.assert_close(fisher(updates, [f] * 3), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fisher(updates[:1], [f]), updates[0].delta_weight(), rtol=1e-12, atol=1e-12)


def test_entries_that_no_task_is_sure_of_get_the_mean() -> None:
    updates = [random_update(2, 3, seed=i) for i in range(2)]
    first, second = (update.delta_weight() for update in updates)
    f = torch.tensor([[1.0, 1.0, 0.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    found = fisher(updates, [f, 0 * f])
    torch.testing.assert_close(found[:, 2], (first + second)[:, 2] / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0, 0], first[0, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fisher(updates, [0 * f, 0 * f]), (first + second) / 2, rtol=1e-12, atol=1e-12)


def test_the_floor_is_a_millionth_of_the_mean_of_all_tasks() -> None:
    updates = [random_update(1, 2, seed=i) for i in range(2)]
    first, second = (update.delta_weight() for update in updates)
    f = [torch.tensor([[8.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 2e-5]], dtype=torch.float64)]
    floor = 1e-6 * (8 + 2e-5) / 4
    expected = [
        (8 * first + floor * second)[0, 0] / (8 + floor),
        (floor * first + 2e-5 * second)[0, 1] / (floor + 2e-5),
    ]
    torch.testing.assert_close(fisher(updates, f)[0], torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    updates = [random_update(3, 4, seed=i) for i in range(2)]
    f = [random_tensor(3, 4, seed=i).square() for i in range(2)]
    torch.testing.assert_close(fisher(updates, [scale * each for each in f]), fisher(updates, f), rtol=1e-9, atol=1e-9)


def test_a_task_without_an_update_counts_by_its_diagonal_and_one_without_either_does_not() -> None:
    update, f = random_update(3, 4, seed=0), random_tensor(3, 4, seed=5).square() + 0.1
    torch.testing.assert_close(fisher([update, None], [f, 3 * f]), update.delta_weight() / 4, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fisher([update, None], [f, None]), update.delta_weight(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("diagonal", [None, torch.ones(4, 3)], ids=str)
def test_a_diagonal_that_is_missing_or_of_another_shape_is_refused(diagonal: Tensor | None) -> None:
    with pytest.raises(
        ValueError, match=r"must hold the fisher of every task for the rule 'fisher'.*of task 0 for 'fc'"
    ):
        fisher([random_update(3, 4, seed=0)], [diagonal])
