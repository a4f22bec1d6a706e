import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from flowra_pipelines.statistics import (
    ACCURACY,
    LANGUAGE_LOSS,
    R_SQUARED,
    SPEARMAN,
    SQUARED_ERROR,
    Scores,
    accuracy,
    concatenate,
    mcnemar_p_value,
    mean_loss,
    paired_t_p_value,
    r_squared,
    spearman,
)


def classified(correct: list[bool]) -> Scores:
    return Scores(loss=torch.ones(len(correct)), targets=torch.ones(len(correct)), answers=torch.tensor(correct))


def predicted(answers: Tensor, expected: Tensor) -> Scores:
    return Scores(
        loss=(answers - expected).square(), targets=torch.ones(len(answers)), answers=answers, expected=expected
    )


def sample(size: int, *, noise: float, seed: int = 0) -> Scores:
    """Draw numbers of variance 1 and answers that differ from them by noise."""
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(size, generator=generator, dtype=torch.float64)
    return predicted(expected + noise * torch.randn(size, generator=generator, dtype=torch.float64), expected)


def test_wilson_s_interval_of_a_known_case() -> None:
    interval = accuracy(classified([True] * 8 + [False] * 2))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.8, 0.49016, 0.94331), abs=1e-4)


def test_mcnemar_counts_only_disagreements() -> None:
    first = classified([True] * 5 + [True] * 9 + [False])
    second = classified([True] * 5 + [False] * 9 + [True])
    assert mcnemar_p_value(first, second) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar_p_value(first, first) == 1.0


def test_the_mean_loss_of_unequal_examples_is_per_target() -> None:
    scores = Scores(loss=torch.tensor([2.0, 9.0, 4.0]), targets=torch.tensor([1, 3, 1]))
    interval = mean_loss(scores)
    assert interval.value == pytest.approx(3.0)
    assert interval.low < 3.0 < interval.high


def test_the_interval_of_a_loss_does_not_go_below_zero() -> None:
    assert mean_loss(Scores(loss=torch.tensor([0.0, 0.0, 9.0]), targets=torch.ones(3))).low == 0.0


def test_language_models_are_compared_example_by_example() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(200, generator=generator)
    first = Scores(loss=loss, targets=torch.ones(200))
    better = Scores(loss=loss - 0.01 - 0.001 * torch.rand(200, generator=generator), targets=torch.ones(200))
    assert paired_t_p_value(first, better) < 1e-6
    assert paired_t_p_value(first, first) == 1.0


def test_the_paired_test_is_the_t_test_on_the_differences_of_squared_errors() -> None:
    first, second = sample(50, noise=0.5), sample(50, noise=0.7)
    expected = stats.ttest_rel(first.loss.numpy(), second.loss.numpy()).pvalue
    assert paired_t_p_value(first, second) == pytest.approx(expected, rel=1e-12)
    assert paired_t_p_value(first, second) == paired_t_p_value(second, first)


def test_a_difference_without_any_spread_is_a_sure_one() -> None:
    first = Scores(loss=torch.tensor([1.0, 2.0, 3.0]), targets=torch.ones(3))
    assert paired_t_p_value(first, Scores(loss=first.loss + 1, targets=torch.ones(3))) == 0.0


# R²


def test_r_squared_of_a_case_worked_out_by_hand() -> None:
    interval = r_squared(predicted(torch.tensor([1.0, 2.0, 5.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 6.0])))
    # errors² 0 0 4 4; (y - 3)²: 4 1 0 9
    assert interval is not None
    assert interval.value == pytest.approx(1 - 8 / 14, rel=1e-12)
    share = np.array([0, 0, 4, 4]) - 8 / 14 * np.array([4, 1, 0, 9])
    error = share.std(ddof=1) / 3.5 / 2
    assert interval.low == pytest.approx(interval.value - 1.96 * error, rel=1e-6)


def test_r_squared_is_one_for_true_answers_zero_for_their_mean_and_negative_for_worse() -> None:
    expected = torch.tensor([0.0, 1.0, 2.0, 3.0])
    values = [r_squared(predicted(answers, expected)) for answers in (expected, torch.full((4,), 1.5), expected + 10)]
    assert [each.value for each in values if each] == [1.0, 0.0, pytest.approx(1 - 400 / 5)]
    assert r_squared(predicted(expected, torch.ones(4))) is None


def test_the_interval_of_r_squared_holds_the_true_value_in_nineteen_of_twenty_samples() -> None:
    true = 1 - 0.5**2
    found = [r_squared(sample(200, noise=0.5, seed=seed)) for seed in range(400)]
    covered = sum(each is not None and each.low <= true <= each.high for each in found) / 400
    assert covered == pytest.approx(0.95, abs=0.03)


# Spearman's ρ


@given(values=st.lists(st.integers(0, 5), min_size=4, max_size=30), seed=st.integers(0, 100))
def test_spearman_is_the_correlation_of_mean_ranks(values: list[int], seed: int) -> None:
    expected = torch.tensor(values, dtype=torch.float64)
    answers = torch.randint(0, 4, (len(values),), generator=torch.Generator().manual_seed(seed)).double()
    interval = spearman(predicted(answers, expected))
    if len(set(values)) == 1 or len(set(answers.tolist())) == 1:
        assert interval is None
        return
    ranks = [stats.rankdata(each.numpy()) for each in (answers, expected)]
    assert interval is not None
    assert interval.value == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    assert -1 <= interval.low <= interval.value <= interval.high <= 1


def test_spearman_sees_only_the_order() -> None:
    scores = sample(60, noise=0.4)
    assert scores.answers is not None
    assert scores.expected is not None
    assert spearman(predicted(scores.answers.exp(), 100 * scores.expected + 7)) == spearman(scores)


def test_spearman_s_interval_of_a_known_case() -> None:
    # ρ = 0.5 with N = 28: 1.96 √(1.125 / 25) = 0.41578; artanh 0.5 = 0.54931
    expected = torch.arange(28.0, dtype=torch.float64)
    answers = expected.clone()
    generator = torch.Generator().manual_seed(1)
    while (found := spearman(predicted(answers, expected))) is None or abs(found.value - 0.5) > 0.02:
        answers = answers[torch.randperm(28, generator=generator)]
    half = 1.96 * np.sqrt((1 + found.value**2 / 2) / 25)
    assert np.arctanh(found.high) - np.arctanh(found.value) == pytest.approx(half, rel=1e-9)
    assert np.arctanh(found.value) - np.arctanh(found.low) == pytest.approx(half, rel=1e-9)
    assert half == pytest.approx(0.4158, abs=0.002)


def test_the_interval_of_spearman_holds_the_true_value_in_nineteen_of_twenty_samples() -> None:
    pearson = 1 / np.sqrt(1 + 0.5**2)
    true = 6 / np.pi * np.arcsin(pearson / 2)  # of two normal variables
    found = [spearman(sample(100, noise=0.5, seed=seed)) for seed in range(400)]
    covered = sum(each is not None and each.low <= true <= each.high for each in found) / 400
    assert covered == pytest.approx(0.95, abs=0.03)


def test_perfect_and_few_answers_have_an_interval_too() -> None:
    line = torch.arange(10.0)
    assert spearman(predicted(2 * line, line)) == spearman(predicted(line, line))
    backwards = spearman(predicted(-line, line))
    assert backwards is not None
    assert (backwards.value, backwards.low, backwards.high) == pytest.approx((-1.0, -1.0, -1.0))
    few = spearman(predicted(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])))
    assert few is not None
    assert (few.low, few.high) == (-1.0, 1.0)


# how it is shown


def test_a_difference_is_told_in_the_unit_of_its_measure() -> None:
    assert ACCURACY.difference.format(ACCURACY.scale * 0.0321) == "+3.2 points of accuracy"
    assert LANGUAGE_LOSS.difference.format(-0.5) == "-0.5000 nats per token"
    assert SQUARED_ERROR.difference.format(-1250.0) == "-1250 in mean squared error"
    assert [measure.more_is_better for measure in (ACCURACY, SQUARED_ERROR, R_SQUARED, SPEARMAN)] == [1, 0, 1, 1]


def test_batches_come_back_in_the_order_of_the_examples() -> None:
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = [
        (torch.tensor([2.0, 0.0]), torch.tensor([1, 1]), torch.tensor([True, False])),
        (torch.tensor([1.0]), torch.tensor([1]), torch.tensor([True])),
    ]
    scores = concatenate(parts, [2, 0, 1])
    assert scores.loss.tolist() == [0.0, 1.0, 2.0]
    assert scores.answers is not None
    assert scores.answers.tolist() == [False, True, True]
