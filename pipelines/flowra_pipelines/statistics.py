"""What test results say: measures with intervals, and paired tests over the same examples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

__all__ = [
    "ACCURACY",
    "LANGUAGE_LOSS",
    "LOSS",
    "R_SQUARED",
    "SPEARMAN",
    "SQUARED_ERROR",
    "Interval",
    "Measure",
    "Scores",
    "accuracy",
    "concatenate",
    "mcnemar_p_value",
    "mean_loss",
    "paired_t_p_value",
    "r_squared",
    "spearman",
]

NORMAL = 1.96
"""Quantile of a two-sided 95 % interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Test results, example by example."""

    loss: Tensor
    """Sum of the loss over an example's targets, ``(N,)``: nats, or the squared error."""
    targets: Tensor
    """Number of targets of each example, ``(N,)``: 1, or its tokens."""
    answers: Tensor | None = None
    """Classification: whether each example is correct, ``(N,)`` bool. Regression: the number predicted, ``(N,)``."""
    expected: Tensor | None = None
    """Regression: the number asked for, ``(N,)``."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A number that says how good a model is on the test examples, and how to show it."""

    key: str
    """Its name in ``metrics.json``."""
    heading: str
    """Of its column."""
    shown: str
    """Format of a cell, of ``value``, ``low`` and ``high``."""
    estimate: Callable[[Scores], Interval | None]
    """From scores; None where it is not defined."""
    difference: str = ""
    """Format of a difference of two values in a sentence; only of a measure that verdicts are about."""
    scale: float = 1.0
    """Factor of a difference when it is shown: 100 for points."""
    more_is_better: bool = True
    """Whether a larger value is better."""
    p_value: Callable[[Scores, Scores], float] | None = None
    """Two-sided, that two models do equally well; only of a measure that verdicts are about."""


def accuracy(scores: Scores) -> Interval:
    """Return the share of correct examples with Wilson's score interval (Wilson 1927)."""
    assert scores.answers is not None
    test = stats.binomtest(int(scores.answers.sum()), len(scores.answers))
    interval = test.proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(float(test.statistic), float(interval.low), float(interval.high))


def mean_loss(scores: Scores) -> Interval:
    """Return the mean loss per target, with a normal interval for a ratio over examples (delta method).

    The interval of a loss does not go below 0.
    """
    value, error = _ratio(scores.loss.double(), scores.targets.double())
    return Interval(value, max(0.0, value - NORMAL * error), value + NORMAL * error)


def r_squared(scores: Scores) -> Interval | None:
    """Return R² = 1 - Σ (y - f)² / Σ (y - ȳ)², with a normal interval (delta method of the ratio over examples).

    ȳ is the mean of the test examples. R² is 0 for a model that always answers ȳ, and negative for a worse one. That ȳ
    is estimated has no effect on the interval to first order: the denominator is stationary in it.

    Returns:
        The estimate; None if all examples ask for the same number.
    """
    assert scores.expected is not None
    expected = scores.expected.double()
    if bool((expected == expected[0]).all()):
        return None
    share, error = _ratio(scores.loss.double(), (expected - expected.mean()).square())
    return Interval(1 - share, 1 - share - NORMAL * error, min(1.0, 1 - share + NORMAL * error))


def spearman(scores: Scores) -> Interval | None:
    """Return Spearman's rank correlation ρ of answers and expected numbers; ties share their mean rank.

    The interval is Fisher's: ``tanh(artanh ρ ± 1.96 √((1 + ρ²/2) / (N - 3)))``, with the variance of Bonett & Wright
    (2000, "Sample size requirements for estimating Pearson, Kendall and Spearman correlations").

    Returns:
        The estimate, in [-1, 1]; None if all answers or all expected numbers are the same.
    """
    assert scores.answers is not None
    assert scores.expected is not None
    pair = [np.asarray(each.double()) for each in (scores.answers, scores.expected)]
    if any((each == each[0]).all() for each in pair):
        return None
    rho = float(np.clip(stats.spearmanr(*pair).statistic, -1.0, 1.0))
    if len(pair[0]) < 4:
        return Interval(rho, -1.0, 1.0)
    if abs(rho) == 1.0:
        return Interval(rho, rho, rho)
    half = NORMAL * math.sqrt((1 + rho**2 / 2) / (len(pair[0]) - 3))
    return Interval(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half))


def mcnemar_p_value(first: Scores, second: Scores) -> float:
    """Return the exact McNemar test's p-value, on the examples that one model gets right and the other wrong."""
    assert first.answers is not None
    assert second.answers is not None
    only_first = int((first.answers & ~second.answers).sum())
    only_second = int((~first.answers & second.answers).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def paired_t_p_value(first: Scores, second: Scores) -> float:
    """Return the paired t-test's p-value, on the loss of each example."""
    difference = (first.loss - second.loss).double()
    if bool((difference == difference[0]).all()):  # no spread: t is not defined
        return 1.0 if float(difference[0]) == 0 else 0.0
    return float(stats.ttest_1samp(np.asarray(difference), 0.0).pvalue)


def concatenate(
    parts: Sequence[tuple[Tensor, Tensor, Tensor | None]], order: Sequence[int], *, expected: Tensor | None = None
) -> Scores:
    """Join batches that were scored in another order, back into the order of the examples.

    Args:
        parts: loss, targets and answers of each batch.
        order: index of each scored example.
        expected: numbers asked for, in the order of the examples.

    Returns:
        The scores.
    """
    back = torch.argsort(torch.tensor(order))
    answers = [part[2] for part in parts if part[2] is not None]
    return Scores(
        loss=torch.cat([part[0] for part in parts])[back],
        targets=torch.cat([part[1] for part in parts])[back],
        answers=torch.cat(answers)[back] if answers else None,
        expected=expected,
    )


def _ratio(above: Tensor, below: Tensor) -> tuple[float, float]:
    """Return Σ above / Σ below over examples, and its standard error by the delta method."""
    value = float(above.sum() / below.sum())
    return value, float((above - value * below).std() / below.mean() / math.sqrt(len(above)))


ACCURACY = Measure(
    key="accuracy",
    heading="accuracy (95 % interval)",
    shown="{value:.1%} ({low:.1%} – {high:.1%})",
    estimate=accuracy,
    difference="{:+.1f} points of accuracy",
    scale=100,
    p_value=mcnemar_p_value,
)
LOSS = Measure(key="loss", heading="loss", shown="{value:.4f}", estimate=mean_loss, more_is_better=False)
LANGUAGE_LOSS = Measure(
    key="loss",
    heading="loss",
    shown="{value:.4f}",
    estimate=mean_loss,
    difference="{:+.4f} nats per token",
    more_is_better=False,
    p_value=paired_t_p_value,
)
SQUARED_ERROR = Measure(
    key="loss",
    heading="mean squared error (95 % interval)",
    shown="{value:.4g} ({low:.4g} – {high:.4g})",
    estimate=mean_loss,
    difference="{:+.4g} in mean squared error",
    more_is_better=False,
    p_value=paired_t_p_value,
)
R_SQUARED = Measure(
    key="r2", heading="R² (95 % interval)", shown="{value:.3f} ({low:.3f} – {high:.3f})", estimate=r_squared
)
SPEARMAN = Measure(
    key="spearman",
    heading="Spearman's ρ (95 % interval)",
    shown="{value:.3f} ({low:.3f} – {high:.3f})",
    estimate=spearman,
)
