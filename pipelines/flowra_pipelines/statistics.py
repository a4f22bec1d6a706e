"""Intervals and tests of test results; the paired test is over the same examples."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from flowra_pipelines.tasks import Scores

__all__ = ["Interval", "accuracy", "mean_loss", "paired_p_value"]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def accuracy(scores: Scores) -> Interval:
    """Return the share of correct examples with Wilson's score interval (Wilson 1927)."""
    assert scores.correct is not None
    test = stats.binomtest(int(scores.correct.sum()), len(scores.correct))
    interval = test.proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(float(test.statistic), float(interval.low), float(interval.high))


def mean_loss(scores: Scores) -> Interval:
    """Return the mean loss per target in nats, with a normal interval for a ratio over examples (delta method)."""
    loss, targets = scores.loss.double(), scores.targets.double()
    mean = float(loss.sum() / targets.sum())
    residual = loss - mean * targets
    error = float(residual.std() / targets.mean() / math.sqrt(len(loss)))
    return Interval(mean, mean - 1.96 * error, mean + 1.96 * error)


def paired_p_value(first: Scores, second: Scores) -> float:
    """Return the two-sided p-value that two models do equally well on the same examples.

    Classification: exact McNemar test on the examples that one model gets right and the other wrong. Language models:
    paired t-test on the loss of each example.
    """
    if first.correct is not None and second.correct is not None:
        only_first = int((first.correct & ~second.correct).sum())
        only_second = int((~first.correct & second.correct).sum())
        if only_first + only_second == 0:
            return 1.0
        return float(stats.binomtest(only_first, only_first + only_second).pvalue)
    difference = (first.loss - second.loss).double()
    if bool(torch.all(difference == 0)):
        return 1.0
    return float(stats.ttest_1samp(np.asarray(difference), 0.0).pvalue)


def concatenate(parts: list[tuple[Tensor, Tensor, Tensor | None]], order: list[int]) -> Scores:
    """Join batches that were scored in another order, back into the order of the examples."""
    back = torch.argsort(torch.tensor(order))
    correct = [part[2] for part in parts if part[2] is not None]
    return Scores(
        loss=torch.cat([part[0] for part in parts])[back],
        targets=torch.cat([part[1] for part in parts])[back],
        correct=torch.cat(correct)[back] if correct else None,
    )
