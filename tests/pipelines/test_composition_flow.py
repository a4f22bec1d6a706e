"""Several tasks in one configuration: each a run of its own, then one adapter, and every task on it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from flowra_compose import read_adapter
from flowra_compose.interference_files import read_interference
from flowra_pipelines.composition_config import is_composition, load_composition
from flowra_pipelines.errors import UserError
from flowra_pipelines.stages.record import STAGES
from flowra_testing.tiny_runs import tiny_config, write_reviews

MINIMAL: dict[str, Any] = {
    "name": "both",
    "model": {"path": "m"},
    "training": {"steps": 40},
    "tasks": {"one": {"data": {"train": "one.csv"}}, "two": {"data": {"train": "two.csv"}}},
}


def tiny_tasks(folder: Path, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - keys of a YAML file
    """Return two tasks on one base, of ten steps each, without baselines but the head alone."""
    config = tiny_config(folder, name="both", evaluation={"baselines": ["base"]})
    data = config.pop("data")
    write_reviews(folder / "other.csv", seed=3)
    config["training"] = {"steps": 10, "batch_size": 8, "learning_rate": 0.01}
    config["refinement"] = {"policy": "none"}
    config["merge"] = {"rule": "flow", "examples": 24}
    config["tasks"] = {
        "one": {"data": data},
        "two": {"data": {**data, "train": str(folder / "other.csv")}, "weight": 2},
    }
    return {**config, **changes}


def run_flowra(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "COLUMNS": "160"}
    command = [sys.executable, "-m", "flowra_pipelines.cli", "run", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, env=environment)


def tracked(folder: Path) -> dict[str, list[str]]:
    """Return the tracking runs by the path of their names."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("flowra")
    assert experiment is not None
    runs: dict[str, Run] = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    found: dict[str, list[str]] = {}
    for run in runs.values():
        path = [str(run.info.run_name)]
        above = run.data.tags.get("mlflow.parentRunId")
        while above is not None:
            path.append(str(runs[above].info.run_name))
            above = runs[above].data.tags.get("mlflow.parentRunId")
        found.setdefault("/".join(reversed(path)), []).append(str(run.info.status))
    return found


# the configuration


def test_what_a_task_says_comes_before_what_is_common() -> None:
    config = load_composition(MINIMAL, ["tasks.two.training.steps=60", "tasks.two.weight=0.5", "seed=3"])
    one, two = config.tasks["one"], config.tasks["two"]
    assert (one.run.training.steps, two.run.training.steps) == (40, 60)
    assert (one.weight, two.weight) == (1.0, 0.5)
    assert {config.seed, one.run.seed, two.run.seed} == {3}
    assert one.run.folder == config.folder / "tasks" / "one"
    assert one.run.tracking_uri == config.tracking_uri
    assert config.merge.rule == "flow"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks={}"], "tasks must be sections by name, at least one"),
        (["tasks=[a]"], "tasks must be sections by name, at least one"),
        (["tasks.two={}"], r"tasks\.two: data must be given"),
        (["tasks.two.training.stepz=5"], r"tasks\.two: training\.stepz must be a known key; nearest: steps"),
        (["tasks.two.name=x"], r"tasks\.two\.name must be left out: it is said once, at the top"),
        (["tasks.two.merge.rule=cat"], r"tasks\.two\.merge must be left out"),
        (["tasks.two.model.path=other"], "tasks must have one base, got"),
        (["tasks.two.weight=heavy"], r"tasks\.two: weight must be a valid number"),
        (["tasks.one.weight=0", "tasks.two.weight=0"], "tasks must have a weight other than 0"),
        (["trainig.steps=5"], r"tasks\.one: trainig must be a known key; nearest: training"),
        (["merge.rule=ti"], r"merge\.rule must be 'cat', .* got 'ti'"),
        (["merge.density=0.5"], r"merge\.density has no effect with merge\.rule flow"),
        (["parallel=0"], "parallel must be greater than or equal to 1, got 0"),
        (["tasks.a b={data: {train: x.csv}}"], "tasks.a b: name must match pattern"),
    ],
)
def test_a_mistake_is_one_line_that_says_of_which_task(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_composition({**MINIMAL, "merge": {"rule": "flow"}}, overrides)
    assert "\n" not in str(caught.value)


def test_what_the_merge_is_asked_for_is_looked_at_before_a_task_is_trained(tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tiny_tasks(tmp_path)))
    for more in ((), ("--dry-run",)):
        done = run_flowra(tmp_path, "tasks.yaml", "--no-prefect", "--set", "merge.budget=much", *more)
        assert done.returncode == 2
        assert "budget must be like" in done.stderr
        assert not (tmp_path / "runs").exists()


def test_a_file_with_tasks_is_told_from_a_run(tmp_path: Path) -> None:
    for name, content in (("tasks", MINIMAL), ("run", {"name": "one"})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    assert is_composition(tmp_path / "tasks.yaml")
    assert not is_composition(tmp_path / "run.yaml")


# end to end


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two tasks, trained and composed without the orchestrator."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tiny_tasks(folder)))
    done = run_flowra(folder, "tasks.yaml", "--no-prefect")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_every_task_is_trained_and_scored_on_the_merged_update(finished: tuple[Path, str]) -> None:
    folder, shown = finished
    whole = folder / "runs" / "both"
    assert "both: 2 tasks, one adapter" in shown
    assert "Recommendation: " in shown
    for name in ("one", "two"):
        assert all((whole / "tasks" / name / stage / "stage.json").is_file() for stage in STAGES)
        assert (whole / "statistics" / name / "task_statistics.json").is_file()
    content = json.loads((whole / "evaluate" / "metrics.json").read_text())
    assert set(content["tasks"]) == {"one", "two"}
    for row in content["tasks"].values():
        assert {"base", "single", "merged", "weight", "p_value_merged_against_single"} <= row.keys()
        assert 0 <= row["merged"] <= 1
    report = read_interference(whole / "evaluate")
    assert report.tasks == ("one", "two")
    assert report.scores is not None
    assert set(report.predicted) == {"one", "two"}
    assert "<html" in (whole / "evaluate" / "interference.html").read_text()


@pytest.mark.slow
def test_each_task_gets_the_merged_update_with_its_own_head(finished: tuple[Path, str]) -> None:
    whole = finished[0] / "runs" / "both"
    merged = read_adapter(whole / "compose" / "adapter")
    for name in ("one", "two"):
        mine = read_adapter(whole / "compose" / "tasks" / name)
        own = read_adapter(whole / "tasks" / name / "merge" / "adapter")
        assert mine.updates.keys() == merged.updates.keys()
        for module, update in merged.updates.items():
            assert bool((mine.updates[module].delta_weight() == update.delta_weight()).all())
        for key, value in own.modules_to_save.items():
            assert bool((mine.modules_to_save[key] == value).all())


@pytest.mark.slow
def test_mlflow_has_the_tasks_and_the_composition_under_one_run(finished: tuple[Path, str]) -> None:
    found = tracked(finished[0])
    wanted = {"both", "both/one", "both/two", "both/compose", "both/evaluate"}
    wanted |= {f"both/{task}/{stage}" for task in ("one", "two") for stage in STAGES}
    assert set(found) == wanted
    assert {status for each in found.values() for status in each} == {"FINISHED"}


@pytest.mark.slow
def test_the_same_command_again_reuses_every_stage_and_another_rule_only_composes_again(
    finished: tuple[Path, str],
) -> None:
    folder, _ = finished
    again = run_flowra(folder, "tasks.yaml", "--no-prefect")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("unchanged: reusing its artifacts") == 2 * len(STAGES) + 2 + 2
    other = run_flowra(folder, "tasks.yaml", "--no-prefect", "--set", "merge={rule: ties}")
    assert other.returncode == 0, other.stderr
    assert other.stdout.count("unchanged: reusing its artifacts") == 2 * len(STAGES)
    back = run_flowra(folder, "tasks.yaml", "--no-prefect")
    assert back.stdout.count("unchanged: reusing its artifacts") == 2 * len(STAGES) + 2


@pytest.mark.slow
def test_what_was_killed_goes_on_to_the_same_artifacts(finished: tuple[Path, str], tmp_path: Path) -> None:
    whole, _ = finished
    config = {**yaml.safe_load((whole / "tasks.yaml").read_text()), "output_root": str(tmp_path / "runs")}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "flowra_pipelines.cli", "run", "tasks.yaml", "--no-prefect"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    reached = tmp_path / "runs" / "both" / "tasks" / "two" / "calibrate.partial"
    deadline = time.monotonic() + 300
    while not reached.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert reached.exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = run_flowra(tmp_path, "tasks.yaml", "--no-prefect")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unchanged: reusing its artifacts") == len(STAGES)
    for name in ("compose/adapter/adapter_model.safetensors", "evaluate/metrics.json"):
        assert (tmp_path / "runs" / "both" / name).read_bytes() == (whole / "runs" / "both" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 2])
def test_prefect_runs_each_task_as_a_subflow(finished: tuple[Path, str], tmp_path: Path, parallel: int) -> None:
    whole, _ = finished
    config = {**yaml.safe_load((whole / "tasks.yaml").read_text()), "output_root": str(tmp_path / "runs")}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({**config, "parallel": parallel}))
    done = run_flowra(tmp_path, "tasks.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    found = tracked(tmp_path)
    assert {f"both/{task}/{stage}" for task in ("one", "two") for stage in STAGES} <= found.keys()
    assert {status for each in found.values() for status in each} == {"FINISHED"}
    same = Path("runs", "both", "compose", "adapter", "adapter_model.safetensors")
    assert (tmp_path / same).read_bytes() == (whole / same).read_bytes()
