import pytest
import torch

from flowra_pipelines.statistics import accuracy, concatenate, mean_loss, paired_p_value
from flowra_pipelines.tasks import Scores


def classified(correct: list[bool]) -> Scores:
    return Scores(loss=torch.ones(len(correct)), targets=torch.ones(len(correct)), correct=torch.tensor(correct))


def test_wilson_s_interval_of_a_known_case() -> None:
    interval = accuracy(classified([True] * 8 + [False] * 2))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.8, 0.49016, 0.94331), abs=1e-4)


def test_mcnemar_counts_only_disagreements() -> None:
    first = classified([True] * 5 + [True] * 9 + [False])
    second = classified([True] * 5 + [False] * 9 + [True])
    assert paired_p_value(first, second) == pytest.approx(2 * (1 + 10) / 2**10)
    assert paired_p_value(first, first) == 1.0


def test_the_mean_loss_of_unequal_examples_is_per_target() -> None:
    scores = Scores(loss=torch.tensor([2.0, 9.0, 4.0]), targets=torch.tensor([1, 3, 1]), correct=None)
    interval = mean_loss(scores)
    assert interval.value == pytest.approx(3.0)
    assert interval.low < 3.0 < interval.high


def test_language_models_are_compared_example_by_example() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(200, generator=generator)
    first = Scores(loss=loss, targets=torch.ones(200), correct=None)
    better = Scores(
        loss=loss - 0.01 - 0.001 * torch.rand(200, generator=generator), targets=torch.ones(200), correct=None
    )
    assert paired_p_value(first, better) < 1e-6
    assert paired_p_value(first, first) == 1.0


def test_batches_come_back_in_the_order_of_the_examples() -> None:
    parts = [
        (torch.tensor([2.0, 0.0]), torch.tensor([1, 1]), torch.tensor([True, False])),
        (torch.tensor([1.0]), torch.tensor([1]), torch.tensor([True])),
    ]
    scores = concatenate(parts, [2, 0, 1])
    assert scores.loss.tolist() == [0.0, 1.0, 2.0]
    assert scores.correct is not None
    assert scores.correct.tolist() == [False, True, True]
