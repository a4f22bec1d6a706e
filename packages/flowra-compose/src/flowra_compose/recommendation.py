"""Merge, fuse or keep apart: the numbers of a report in words.

What is known decides: measured scores, else interference predicted from statistics, else the geometry of the updates
alone. Every task is judged by itself and the worst one decides, so that no average hides a task that is lost. Where the
numbers do not say, the advice is the more careful one.

==============  ==========================================================================================
``merge``       one adapter for all tasks
``fuse``        all adapters stay, and a gate says at each input how much of each is taken (LoRA-Flow)
``keep apart``  each task goes on with its own adapter, which costs it nothing
==============  ==========================================================================================

Source: docs/methods.md, section 27.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flowra_compose.interference_report import InterferenceReport, MeasuredTask, TaskScores

__all__ = [
    "FAR_PROJECTION",
    "LARGE_INTERFERENCE",
    "LEAST_COVERAGE",
    "LEAST_RETENTION",
    "SMALL_INTERFERENCE",
    "Advice",
    "Recommendation",
    "recommend",
]

Advice = Literal["merge", "fuse", "keep apart"]
ADVICE: tuple[Advice, ...] = ("merge", "fuse", "keep apart")
"""From the least to the most careful."""

SMALL_INTERFERENCE = 0.05
"""Of the gain of its adapter a task may lose at most this much for ``merge``. For a gain of 20 points that is one
point, the standard error of an accuracy of 90 % on a thousand examples: less could not be told from nothing."""
LARGE_INTERFERENCE = 0.5
"""From here on ``keep apart``: half or more of what the adapter was trained for is gone. What pulls the weights apart
that far also meets in a gate, which only weighs the same updates."""
LEAST_RETENTION = 0.97
"""Share of the single score that ``merge`` must keep, too: where an adapter gains much, a small share of the gain is
still a large part of the score."""
FAR_PROJECTION = 0.5
"""How far the share of its own update that a task finds in the merged one may be from 1 for ``fuse``, without
statistics: at 0.5 a quarter of the gain is lost to the scale alone, before any other task disturbs it. There is no such
limit for ``merge``: updates at right angles still meet where inputs excite both, so without statistics only a merged
update that is nearly the task's own (a distance of at most :data:`SMALL_INTERFERENCE`) is one to merge."""


LEAST_COVERAGE = 0.95
"""Share of the merged update's squared size that lies in modules with statistics of a task, for its prediction to
decide: what one adapter changes matters to the task of another, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """What to do, and why."""

    advice: Advice
    basis: Literal["measured", "predicted", "geometry"]
    """What decided."""
    by_task: Mapping[str, Advice]
    """What each task alone would have; the most careful of them is the advice."""
    reasons: tuple[str, ...]
    """Sentences with the numbers and the thresholds they were held against."""
    would_change: tuple[str, ...]
    """Sentences that say what would change the advice."""


def recommend(report: InterferenceReport) -> Recommendation:
    """Recommend what to do with adapters whose merge has been reported.

    Scores are taken as they are: whoever measured them on few examples should widen them by their error first.

    Args:
        report: with scores, with statistics of every task, or with neither.

    Returns:
        The advice.
    """
    if len(report.tasks) == 1:
        return _single(report)
    if report.scores is not None:
        return _by_scores(report)
    if report.predicted.keys() == set(report.tasks) and min(report.coverage.values()) >= LEAST_COVERAGE:
        return _by_prediction(report)
    return _by_geometry(report)


def _single(report: InterferenceReport) -> Recommendation:
    name = report.tasks[0]
    return Recommendation(
        advice="merge",
        basis="geometry",
        by_task={name: "merge"},
        reasons=(f"{name} is the only task: there is nothing that it could interfere with.",),
        would_change=("A second task.",),
    )


# with scores


def _by_scores(report: InterferenceReport) -> Recommendation:
    measured = report.measured
    by_task = {name: _of_scores(one) for name, one in measured.items()}
    advice = _most_careful(by_task)
    reasons = [_said_of_scores(name, measured[name], by_task[name]) for name in report.tasks]
    drop = report.largest_drop
    if drop is not None and drop[1] > 0:
        reasons.append(f"The largest drop is {drop[1]:.4g}, of {drop[0]}.")
    if report.agreement is not None:
        reasons.append(f"Predicted and measured interference order the tasks with ρ = {report.agreement:.2f}.")
    return Recommendation(
        advice=advice,
        basis="measured",
        by_task=by_task,
        reasons=tuple(reasons),
        would_change=tuple(_change_of_scores(report, advice, by_task)),
    )


def _of_scores(one: MeasuredTask) -> Advice:
    kept = one.retention is None or one.retention >= LEAST_RETENTION
    if one.interference is None:  # nothing was gained that could be lost: only the score itself can be
        return "merge" if kept and one.retention is not None else "keep apart"
    if one.interference <= SMALL_INTERFERENCE and kept:
        return "merge"
    return "fuse" if one.interference < LARGE_INTERFERENCE else "keep apart"


def _said_of_scores(name: str, one: MeasuredTask, advice: Advice) -> str:
    kept = "" if one.retention is None else f" and keeps {one.retention:.1%} of its score"
    if one.interference is None:
        return f"{name} gains nothing by its own adapter{kept}: {advice}. Its adapter may be left out."
    lost = f"{name} loses {one.interference:.1%} of the gain of its adapter{kept}"
    limits = f"merging allows {SMALL_INTERFERENCE:.0%} and asks for {LEAST_RETENTION:.0%}"
    if advice == "keep apart":
        limits = f"from {LARGE_INTERFERENCE:.0%} lost on, tasks are kept apart"
    return f"{lost}; {limits}: {advice}."


def _change_of_scores(report: InterferenceReport, advice: Advice, by_task: Mapping[str, Advice]) -> list[str]:
    assert report.scores is not None
    if advice == "merge":
        edges = [f"{name} below {_edge(report.scores[name]):.4g}" for name in report.tasks]
        return [f"Another advice follows from a merged score of {', or '.join(edges)}."]
    worst = [name for name in report.tasks if by_task[name] != "merge"]
    edges = [f"{name} at {_edge(report.scores[name]):.4g} or more" for name in worst]
    return [
        f"Merging would be advised with merged scores of {', and '.join(edges)}: try another rule, a larger budget of"
        " rank, or other weights.",
        *_leaving_out(report, worst),
    ]


def _edge(scores: TaskScores) -> float:
    """Return the least merged score for which merging is advised."""
    gain = scores.single - scores.base
    by_gain = [scores.single - SMALL_INTERFERENCE * gain] if gain > 0 else []
    by_score = [LEAST_RETENTION * scores.single] if scores.single > 0 else []
    return max([*by_gain, *by_score], default=scores.single)


# with statistics


def _by_prediction(report: InterferenceReport) -> Recommendation:
    predicted = report.predicted
    by_task = {name: _of_prediction(value) for name, value in predicted.items()}
    advice = _most_careful(by_task)
    reasons = [
        f"{name} is predicted to lose {predicted[name]:.1%} of the gain of its adapter (cross-talk over all modules);"
        f" merging allows {SMALL_INTERFERENCE:.0%}, and from {LARGE_INTERFERENCE:.0%} on tasks are kept apart:"
        f" {by_task[name]}."
        for name in report.tasks
    ]
    measure = "Scores of every task without adapter, with its own and with the merged one decide before any prediction."
    if advice == "merge":
        return Recommendation(
            advice=advice,
            basis="predicted",
            by_task=by_task,
            reasons=tuple(reasons),
            would_change=(measure,),
        )
    worst = [name for name in report.tasks if by_task[name] != "merge"]
    lower = f"Merging would be advised with a predicted loss of at most {SMALL_INTERFERENCE:.0%} for {_and(worst)}"
    rule = "the rule that knows the statistics, more rank, or other weights may bring it down."
    return Recommendation(
        advice=advice,
        basis="predicted",
        by_task=by_task,
        reasons=tuple(reasons),
        would_change=(measure, f"{lower}: {rule}", *_leaving_out(report, worst)),
    )


def _of_prediction(value: float) -> Advice:
    return "merge" if value <= SMALL_INTERFERENCE else "fuse" if value < LARGE_INTERFERENCE else "keep apart"


# with neither


def _by_geometry(report: InterferenceReport) -> Recommendation:
    projections, distances = report.projections, report.distances
    by_task: dict[str, Advice] = {}
    reasons = []
    for name in report.tasks:
        if name not in projections:
            by_task[name] = "merge"
            reasons.append(f"{name} changes nothing by itself, so nothing of it can be lost: merge.")
            continue
        share, distance = projections[name], distances[name]
        far: Advice = "fuse" if abs(1 - share) < FAR_PROJECTION else "keep apart"
        by_task[name] = "merge" if distance <= SMALL_INTERFERENCE else far
        reasons.append(
            f"{name} finds {share:.1%} of its own update in the merged one, at a squared distance of {distance:.3g}"
            f" times its energy; merging allows {SMALL_INTERFERENCE:g}, fusing a share within {FAR_PROJECTION:.0%} of"
            f" all: {by_task[name]}."
        )
    reasons.append("Neither scores nor statistics of every task are known, and weights alone do not see the inputs.")
    change = [
        "Statistics of every task (a calibration on unlabelled inputs) or measured scores decide before any geometry."
    ]
    lacking = {name: share for name, share in report.coverage.items() if 0 < share < LEAST_COVERAGE}
    if lacking:
        said = _and([f"{share:.0%} of it for {name}" for name, share in lacking.items()])
        change[0] += f" Those that are known cover too little of the merged update: {said}."
    scaled = [name for name, share in projections.items() if abs(1 - share) >= FAR_PROJECTION]
    if scaled:
        change.append(f"Other weights would bring what is left of {_and(scaled)} closer to all of it.")
    return Recommendation(
        advice=_most_careful(by_task),
        basis="geometry",
        by_task=by_task,
        reasons=tuple(reasons),
        would_change=tuple(change),
    )


# words


def _most_careful(by_task: Mapping[str, Advice]) -> Advice:
    return max(by_task.values(), key=ADVICE.index)


def _leaving_out(report: InterferenceReport, worst: Sequence[str]) -> list[str]:
    """Say what is left when the tasks that suffer stay apart."""
    rest = [name for name in report.tasks if name not in worst]
    if len(rest) < 2:
        return []
    return [f"Leave {_and(worst)} apart, merge {_and(rest)} alone and report again: the merged update is then another."]


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
