"""The advice on constructed cases: what decides, and where it changes."""

from dataclasses import replace

import pytest

from flowra_compose.interference_report import (
    InterferenceReport,
    ModuleInterference,
    ModulePair,
    ModuleTask,
    TaskScores,
)
from flowra_compose.recommendation import FAR_PROJECTION, LARGE_INTERFERENCE, SMALL_INTERFERENCE, recommend


def report(
    *,
    lost: tuple[float, ...] | None = None,
    shares: tuple[float, ...] | None = None,
    merged_energy: float = 1.0,
    scores: tuple[tuple[float, float, float], ...] | None = None,
) -> InterferenceReport:
    """Return a report of one module in which tasks a, b, … are predicted to lose what is said.

    Args:
        lost: predicted interference by task; None without statistics.
        shares: projections by task, of updates of energy 1.
        merged_energy: ‖M‖².
        scores: base, single and merged by task.
    """
    count = len(lost or shares or scores or ())
    names = tuple("abcd"[:count])
    tasks = tuple(
        ModuleTask(
            weight=1.0,
            rank=1,
            energy=1.0,
            inner=1.0 if shares is None else shares[index],
            missed=None if lost is None else lost[index],
            response=None if lost is None else 1.0,
        )
        for index in range(count)
    )
    pair = ModulePair(cosine=0.0, row_overlap=0.0, row_angle=1.5, column_overlap=0.0, column_angle=1.5)
    module = ModuleInterference(
        shape=(4, 4),
        tasks=tasks,
        pairs=(pair,) * (count * (count - 1) // 2),
        merged_rank=1,
        merged_energy=merged_energy,
        sum_energy=1.0,
        singular_task_interference=0.0,
    )
    made = InterferenceReport(tasks=names, modules={"fc": module}, metric=None if lost is None else "inputs")
    if scores is None:
        return made
    named = {
        name: TaskScores(base=one[0], single=one[1], merged=one[2]) for name, one in zip(names, scores, strict=True)
    }
    return replace(made, scores=named)


# scores


@pytest.mark.parametrize(
    ("scores", "advice"),
    [
        (((0.5, 0.9, 0.9), (0.5, 0.8, 0.8)), "merge"),
        (((0.5, 0.9, 0.881), (0.5, 0.8, 0.85)), "merge"),
        (((0.5, 0.9, 0.879), (0.5, 0.8, 0.8)), "fuse"),
        (((0.0, 0.9, 0.86), (0.5, 0.8, 0.8)), "fuse"),
        (((0.5, 0.9, 0.701), (0.5, 0.8, 0.8)), "fuse"),
        (((0.5, 0.9, 0.699), (0.5, 0.8, 0.8)), "keep apart"),
        (((0.5, 0.9, 0.4), (0.5, 0.8, 0.9)), "keep apart"),
        (((0.5, 0.5, 0.5), (0.5, 0.8, 0.8)), "merge"),
        (((0.5, 0.5, 0.4), (0.5, 0.8, 0.8)), "keep apart"),
        (((-0.9, -0.3, -0.32), (0.5, 0.8, 0.8)), "merge"),
        (((-0.9, -0.9, -0.9), (0.5, 0.8, 0.8)), "keep apart"),
    ],
    ids=[
        "nothing lost",
        "little lost",
        "more than 5 % of the gain",
        "more than 3 % of the score",
        "nearly half",
        "half",
        "worse than no adapter",
        "no gain to lose",
        "no gain, and a loss",
        "losses as scores",
        "nothing that can be said",
    ],
)
def test_the_task_that_loses_most_decides(scores: tuple[tuple[float, float, float], ...], advice: str) -> None:
    found = recommend(report(shares=(1.0, 1.0), scores=scores))
    assert (found.advice, found.basis) == (advice, "measured")
    assert found.by_task == {"a": advice, "b": "merge"}
    turned = recommend(report(shares=(1.0, 1.0), scores=scores[::-1]))
    assert (turned.advice, turned.by_task["a"]) == (advice, "merge")


def test_scores_come_before_any_prediction() -> None:
    scores = ((0.5, 0.9, 0.9), (0.5, 0.8, 0.8))
    assert recommend(report(lost=(0.9, 0.9), scores=scores)).advice == "merge"
    assert recommend(report(lost=(0.0, 0.0), scores=((0.5, 0.9, 0.5), scores[1]))).advice == "keep apart"


def test_the_score_that_would_change_the_advice_does() -> None:
    single = (0.5, 0.9)
    found = recommend(report(shares=(1.0, 1.0), scores=((*single, 0.8), (*single, 0.9))))
    assert found.advice == "fuse"
    assert any("a at 0.88 or more" in line for line in found.would_change)
    at = recommend(report(shares=(1.0, 1.0), scores=((*single, 0.88 + 1e-9), (*single, 0.9))))
    assert at.advice == "merge"
    assert any("a below 0.88, or b below 0.88" in line for line in at.would_change)


def test_the_rest_may_be_merged_without_the_task_that_suffers() -> None:
    good, bad = (0.5, 0.9, 0.9), (0.5, 0.9, 0.5)
    found = recommend(report(shares=(1.0, 1.0, 1.0), scores=(good, bad, good)))
    assert any("Leave b apart, merge a and c alone and report again" in line for line in found.would_change)
    two = recommend(report(shares=(1.0, 1.0), scores=(good, bad)))
    assert not any("Leave" in line for line in two.would_change)


def test_the_numbers_and_limits_are_said() -> None:
    found = recommend(report(lost=(0.1, 0.2, 0.3), scores=((0.5, 0.9, 0.8), (0.5, 0.9, 0.85), (0.5, 0.9, 0.9))))
    assert found.reasons[0] == (
        "a loses 25.0% of the gain of its adapter and keeps 88.9% of its score;"
        " merging allows 5% and asks for 97%: fuse."
    )
    assert "The largest drop is 0.1, of a." in found.reasons
    assert "Predicted and measured interference order the tasks with ρ = -1.00." in found.reasons


# statistics


@pytest.mark.parametrize(
    ("lost", "advice"),
    [
        ((0.0, 0.0), "merge"),
        ((SMALL_INTERFERENCE, 0.01), "merge"),
        ((SMALL_INTERFERENCE + 1e-9, 0.01), "fuse"),
        ((0.01, LARGE_INTERFERENCE - 1e-9), "fuse"),
        ((0.01, LARGE_INTERFERENCE), "keep apart"),
        ((0.0, 7.0), "keep apart"),
    ],
    ids=str,
)
def test_without_scores_the_prediction_decides(lost: tuple[float, ...], advice: str) -> None:
    found = recommend(report(lost=lost, shares=(0.0, 0.0)))
    assert (found.advice, found.basis) == (advice, "predicted")
    assert any("Scores of every task" in line for line in found.would_change)


def test_statistics_of_some_tasks_are_not_enough() -> None:
    known = report(lost=(0.0, 0.0))
    module = known.modules["fc"]
    unknown = replace(module.tasks[1], missed=None, response=None)
    partly = replace(known, modules={"fc": replace(module, tasks=(module.tasks[0], unknown))})
    assert recommend(partly).basis == "geometry"


# geometry


@pytest.mark.parametrize(
    ("shares", "merged_energy", "advice"),
    [
        ((1.0, 1.0), 1.0, "merge"),
        ((1.0, 1.0), 1.04, "merge"),
        ((1.0, 1.0), 1.06, "fuse"),
        ((1.0, 1.0), 2.0, "fuse"),
        ((0.6, 1.0), 2.0, "fuse"),
        ((1.0, 1 - FAR_PROJECTION), 2.0, "keep apart"),
        ((1.0, -1.0), 2.0, "keep apart"),
        ((2.0, 2.0), 4.0, "keep apart"),
    ],
    ids=[
        "equal",
        "nearly equal",
        "not equal",
        "orthogonal",
        "partly lost",
        "half lost",
        "opposed",
        "equal and added",
    ],
)
def test_without_statistics_only_what_is_nearly_equal_is_merged(
    shares: tuple[float, ...], merged_energy: float, advice: str
) -> None:
    found = recommend(report(shares=shares, merged_energy=merged_energy))
    assert (found.advice, found.basis) == (advice, "geometry")
    assert any("weights alone do not see the inputs" in line for line in found.reasons)
    assert any("Statistics of every task" in line for line in found.would_change)
    assert any("Other weights" in line for line in found.would_change) == (advice == "keep apart")


def test_a_task_that_changes_nothing_can_lose_nothing() -> None:
    known = report(shares=(1.0, 1.0))
    module = known.modules["fc"]
    zero = ModuleTask(weight=1.0, rank=0, energy=0.0, inner=0.0)
    made = replace(known, modules={"fc": replace(module, tasks=(module.tasks[0], zero), pairs=(None,))})
    assert recommend(made).by_task == {"a": "merge", "b": "merge"}


def test_one_task_is_merged() -> None:
    found = recommend(report(shares=(0.1,)))
    assert (found.advice, found.by_task) == ("merge", {"a": "merge"})
    assert "a is the only task" in found.reasons[0]


def test_statistics_of_some_modules_do_not_decide_about_the_others() -> None:
    one = report(lost=(0.0, 0.0), shares=(0.2, 0.2))
    assert one.coverage == {"a": 1.0, "b": 1.0}
    assert (recommend(one).advice, recommend(one).basis) == ("merge", "predicted")
    (module,) = one.modules.values()
    unknown = replace(module, tasks=(module.tasks[0], replace(module.tasks[1], missed=None, response=None)))
    both = replace(one, modules={"fc": module, "other": unknown})
    assert both.coverage == {"a": 1.0, "b": 0.5}
    found = recommend(both)
    assert (found.advice, found.basis) == ("keep apart", "geometry")
    assert "cover too little of the merged update: 50% of it for b." in found.would_change[0]
    small = replace(unknown, merged_energy=0.01)
    assert recommend(replace(one, modules={"fc": module, "other": small})).basis == "predicted"
