"""The whole flow as a user runs it: a fresh process, Prefect's own server, MLflow on sqlite."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect.logging import disable_run_logger

from flowra_pipelines.errors import UserError
from flowra_pipelines.flows.fine_tuning import fine_tuning
from flowra_pipelines.stages.record import STAGES
from flowra_testing.tiny_runs import tiny_config, tiny_language_config


def run_flowra(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "COLUMNS": "160"}
    command = [sys.executable, "-m", "flowra_pipelines.cli", "run", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("flow")
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    done = run_flowra(folder, "run.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def runs(folder: Path) -> tuple[MlflowClient, Run, dict[str, Run]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("flowra")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    parent = next(run for run in found if "mlflow.parentRunId" not in run.data.tags)
    children = {
        run.info.run_name: run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    return client, parent, children


@pytest.mark.slow
def test_it_shows_progress_the_table_the_verdict_and_where_things_are(finished: tuple[Path, str]) -> None:
    folder, shown = finished
    for stage in STAGES:
        assert f"\n{stage}\n" in f"\n{shown}"
    for words in (
        "base, trained head",
        "uniform LoRA r=2 on query, value",
        "Flowra",
        "95 %",
        "Time per stage:",
        "Tie:",
    ):
        assert words in shown
    assert f"Artifacts: {folder / 'runs' / 'tiny'}" in shown
    assert f"flowra ui --uri sqlite:///{folder / 'runs' / 'mlflow.db'}" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_mlflow_has_one_parent_and_one_child_per_stage(finished: tuple[Path, str]) -> None:
    client, parent, children = runs(finished[0])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["training.steps"] == "40"
    assert set(children) == set(STAGES)
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert len({run.data.tags["prefect.flow_run_id"] for run in children.values()}) == 1
    assert len({run.data.tags["prefect.task_run_id"] for run in children.values()}) == 6
    history = [
        metric.step
        for stage in ("calibrate", "train", "refine")
        for metric in client.get_metric_history(children[stage].info.run_id, "train/loss")
    ]
    assert history == list(range(1, 41))
    plots = {
        Path(item.path).name for run in children.values() for item in client.list_artifacts(run.info.run_id, "plots")
    }
    assert {"sensitivity.png", "rank_plan.png", "rank_over_time.png", "loss.png"} <= plots
    artifacts = {
        stage: {item.path for item in client.list_artifacts(run.info.run_id)} for stage, run in children.items()
    }
    assert {"profile.json", "profile.safetensors", "adapter"} <= artifacts["calibrate"]
    assert "plan.json" in artifacts["allocate"]
    assert "rank_history.json" in artifacts["refine"]
    assert "model" not in artifacts["merge"]
    assert "metrics.json" in artifacts["evaluate"]
    assert "test/accuracy/flowra" in children["evaluate"].data.metrics


@pytest.mark.slow
def test_prefect_has_six_finished_tasks_and_the_table(finished: tuple[Path, str]) -> None:
    with closing(sqlite3.connect(finished[0] / "prefect" / "prefect.db")) as database:
        tasks = database.execute("select name, state_type from task_run order by start_time").fetchall()
        (table,) = database.execute("select data from artifact where key = 'comparison'").fetchone()
    assert tasks == [(stage, "COMPLETED") for stage in STAGES]
    assert "| Flowra |" in json.loads(table)


@pytest.mark.slow
def test_the_same_command_again_reuses_every_stage(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = json.loads((folder / "runs" / "tiny" / "refine" / "stage.json").read_text())
    again = run_flowra(folder, "run.yaml", "--no-prefect")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("unchanged: reusing its artifacts") == 6
    assert json.loads((folder / "runs" / "tiny" / "refine" / "stage.json").read_text()) == before


@pytest.mark.slow
def test_a_mistake_inside_the_flow_is_one_line(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    failed = run_flowra(folder, "run.yaml", "--set", "adapter.targets=[qurey]", "--set", "name=wrong")
    assert failed.returncode == 2
    assert "flowra: patterns must match at least one module, got 'qurey'" in failed.stderr
    assert "Traceback" not in failed.stderr + failed.stdout


def test_a_folder_that_cannot_be_written_to_is_one_line_of_the_flow(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with (
        disable_run_logger(),
        pytest.raises(UserError, match=r"folder must be one that can be written to, got .*taken"),
    ):
        fine_tuning.fn(tiny_config(tmp_path), (f"output_root={tmp_path / 'taken'}",))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["calibrate", "refine"])
def test_a_run_killed_in_a_stage_continues_to_the_artifacts_of_a_whole_one(
    finished: tuple[Path, str], tmp_path: Path, stage: str
) -> None:
    whole, _ = finished
    config = {**yaml.safe_load((whole / "run.yaml").read_text()), "output_root": str(tmp_path / "runs")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "flowra_pipelines.cli", "run", "run.yaml", "--no-prefect"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    partial = tmp_path / "runs" / "tiny" / f"{stage}.partial"
    deadline = time.monotonic() + 120
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists()
    assert not (tmp_path / "runs" / "tiny" / stage).exists()
    again = run_flowra(tmp_path, "run.yaml", "--no-prefect")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("reusing its artifacts") == STAGES.index(stage)
    for name in STAGES:
        first, second = (
            json.loads((root / "runs" / "tiny" / name / "stage.json").read_text()) for root in (whole, tmp_path)
        )
        assert first["artifacts"] == second["artifacts"], name


@pytest.mark.slow
def test_a_language_model_runs_without_prefect(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_language_config(tmp_path)))
    done = run_flowra(tmp_path, "run.yaml", "--no-prefect")
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "runs" / "language" / "evaluate" / "metrics.json").read_text())
    assert metrics["rows"]["flowra"]["accuracy"] is None
    assert metrics["rows"]["flowra"]["loss"]["value"] < metrics["rows"]["base"]["loss"]["value"]
