"""The plan as a file."""

import doctest
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowra_allocation.planning
from flowra_allocation import ModulePlan, RankPlan, allocate, read_plan, write_plan
from flowra_allocation.rank_plan import MAX_PLAN_BYTES

GAINS = {"layer.0.query": [3.0, 1 / 3, 1e-12], "layer.0.value": [2.0, 0.1, 0.0], 'odd \n"name" ü': [1e-9]}
COSTS = {"layer.0.query": 24, "layer.0.value": 16, 'odd \n"name" ü': 7}


@pytest.fixture
def plan() -> RankPlan:
    return allocate(GAINS, COSTS, budget=70)


def test_a_plan_reads_back_as_it_was(plan: RankPlan, tmp_path: Path) -> None:
    path = write_plan(plan, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "plan.json"
    assert read_plan(path.parent) == plan
    assert list(read_plan(path.parent).modules) == list(GAINS)


@given(st.lists(st.floats(0, 1e30), max_size=4), st.integers(1, 500))
def test_every_finite_gain_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, gains: list[float], budget: int
) -> None:
    plan = allocate({"a": sorted(gains, reverse=True)}, {"a": 1}, budget=budget)
    folder = tmp_path_factory.getbasetemp() / "round_trip"
    write_plan(plan, folder)
    assert read_plan(folder) == plan


def test_equal_plans_give_equal_bytes_and_leave_nothing_else(plan: RankPlan, tmp_path: Path) -> None:
    first = write_plan(plan, tmp_path / "first").read_bytes()
    assert write_plan(allocate(GAINS, COSTS, budget=70), tmp_path / "second").read_bytes() == first
    assert write_plan(read_plan(tmp_path / "first"), tmp_path / "first").read_bytes() == first
    assert [path.name for path in (tmp_path / "first").iterdir()] == ["plan.json"]


def test_the_file_names_its_version(plan: RankPlan, tmp_path: Path) -> None:
    content = json.loads(write_plan(plan, tmp_path).read_text(encoding="utf-8"))
    assert content["format_version"] == 2
    assert content["modules"]["layer.0.query"]["kind"] == "lora"


def test_a_module_that_is_not_finite_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match=r"alpha, psi in \[0, 1\] and gains must be finite numbers"):
        ModulePlan(rank=0, alpha=0.0, cost_per_rank=1, psi=float("nan"), gains=())


@pytest.mark.parametrize(
    ("rank", "cost", "budget", "parameters", "message"),
    [
        (2, 3, 5, 6, r"parameters must be Σ cost · rank = 6 ≤ budget 5, got 6"),
        (2, 3, 9, 5, r"parameters must be Σ cost · rank = 6 ≤ budget 9, got 5"),
        (-1, 3, 9, -3, r"whole rank ≥ 0 and cost_per_rank ≥ 1, got"),
        (2, 0, 9, 0, r"whole rank ≥ 0 and cost_per_rank ≥ 1, got"),
    ],
)
def test_a_plan_that_breaks_its_own_promise_is_refused(
    rank: int, cost: int, budget: int, parameters: int, message: str
) -> None:
    def plan() -> RankPlan:
        module = ModulePlan(rank=rank, alpha=1.0, cost_per_rank=cost, psi=0.5, gains=(1.0, 0.5))
        return RankPlan(
            modules={"a": module}, budget=budget, parameters=parameters, scaling=1.0, sensitivity_threshold=0.05
        )

    with pytest.raises(ValueError, match=message):
        plan()


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plan must be a file of at most .* bytes, got .*plan\.json\. Run `allocate`"):
        read_plan(tmp_path)


def test_a_plan_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(ValueError, match="plan must be a file"):
        read_plan(tmp_path)


def test_a_plan_that_is_too_large_is_not_opened(tmp_path: Path) -> None:
    with (tmp_path / "plan.json").open("wb") as file:
        file.truncate(MAX_PLAN_BYTES + 1)
    with pytest.raises(ValueError, match="plan must be a file of at most"):
        read_plan(tmp_path)


HOSTILE_TEXT = {
    "empty": b"",
    "not_json": b"rank: 3",
    "truncated": b'{"format_version": 2, "modules": {',
    "not_utf8": b'{"format_version": 2, "modules": "\xff\xfe"}',
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "text": b'"plan"',
    "empty_object": b"{}",
    "nested": b"[" * 200_000,
    "nested_in_modules": b'{"format_version": 2, "modules": ' + b'{"a":' * 100_000,
    "long_number": b'{"format_version": ' + b"1" * 10_000 + b"}",
}


def refused(folder: Path, words: str = "plan must follow docs/formats/plan.md, got") -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_plan(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert str(folder / "plan.json") in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE_TEXT)
def test_a_file_that_is_no_plan_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(HOSTILE_TEXT[name])
    refused(tmp_path)


def _put(*path: str, value: object) -> Callable[[Any], None]:
    def change(content: Any) -> None:  # noqa: ANN401 - parsed JSON
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def _remove(*path: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:  # noqa: ANN401 - parsed JSON
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


MODULE = ("modules", "layer.0.query")
HOSTILE_CHANGES = {
    "other_version": _put("format_version", value=1),
    "version_text": _put("format_version", value="2"),
    "no_version": _remove("format_version"),
    "no_modules": _remove("modules"),
    "no_budget": _remove("budget"),
    "no_edge": _remove("last_in"),
    "no_final_budget": _remove("final_budget"),
    "final_budget_float": _put("final_budget", value=1.5),
    "final_budget_negative": _put("final_budget", value=-1),
    "unknown_key": _put("colour", value="red"),
    "unknown_key_with_line_break": _put("two\nlines", value=1),
    "unknown_module_key": _put(*MODULE, "colour", value="red"),
    "no_rank": _remove(*MODULE, "rank"),
    "modules_list": _put("modules", value=[]),
    "module_number": _put(*MODULE, value=3),
    "gains_number": _put(*MODULE, "gains", value=3),
    "rank_text": _put(*MODULE, "rank", value="2"),
    "rank_null": _put(*MODULE, "rank", value=None),
    "rank_negative": _put(*MODULE, "rank", value=-1),
    "budget_text": _put("budget", value="70"),
    "budget_too_small": _put("budget", value=1),
    "parameters_wrong": _put("parameters", value=1),
    "edge_number": _put("last_in", value=3),
}


@pytest.mark.parametrize("name", HOSTILE_CHANGES)
def test_a_damaged_plan_is_refused_in_one_line(name: str, plan: RankPlan, tmp_path: Path) -> None:
    path = write_plan(plan, tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    HOSTILE_CHANGES[name](content)
    path.write_text(json.dumps(content), encoding="utf-8")
    refused(tmp_path)


WRONG_VALUES = {
    "rank_float": _put(*MODULE, "rank", value=1.0),
    "rank_bool": _put(*MODULE, "rank", value=True),
    "kind_unknown": _put(*MODULE, "kind", value="pickle"),
    "alpha_text": _put(*MODULE, "alpha", value="big"),
    "psi_nan": _put(*MODULE, "psi", value=float("nan")),
    "gains_text": _put(*MODULE, "gains", value="123"),
    "gains_nan": _put(*MODULE, "gains", value=[float("nan")]),
    "scaling_null": _put("scaling", value=None),
    "scaling_infinite": _put("scaling", value=float("inf")),
    "scaling_beyond_floats": _put("scaling", value=10**400),
    "threshold_text": _put("sensitivity_threshold", value="low"),
    "budget_float": _put("budget", value=70.5),
    "edge_text": _put("last_in", value="abc"),
    "edge_too_long": _put("last_in", value=["a", 1.0, 2.0]),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_plan_with_a_value_of_the_wrong_kind_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    plan = allocate({"layer.0.query": [3.0, 1.0]}, {"layer.0.query": 40}, budget=70)  # rank 1
    path = write_plan(plan, tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    WRONG_VALUES[name](content)
    path.write_text(json.dumps(content), encoding="utf-8")
    refused(tmp_path)


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(flowra_allocation.planning).failed == 0
