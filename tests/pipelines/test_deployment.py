"""The deployment as a team uses it: a server, a worker on a process pool, and the command line that triggers runs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from flowra_pipelines.stages.record import STAGES
from flowra_testing.tiny_runs import tiny_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LOOPBACK = build_opener(ProxyHandler({}))
MISTAKE = "patterns must match at least one module, got 'qurey'. Nearest names: query"


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def background(command: Sequence[str], environment: dict[str, str], folder: Path, log: Path) -> Iterator[None]:
    """Run a service during the block; afterwards neither it nor anything it started is left."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            yield
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            for each in family:
                if each.is_running():
                    each.kill()
            process.wait(15)


@dataclass(frozen=True, kw_only=True)
class Orchestrator:
    """A server and a worker of our own."""

    folder: Path
    api: str
    environment: dict[str, str]

    def prefect(self, *arguments: str) -> str:
        """Run Prefect's command line in the project's folder."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, question: dict[str, Any] | None = None) -> Any:  # noqa: ANN401 - JSON
        """Read from the server's API; a question is posted."""
        content = None if question is None else json.dumps(question).encode()
        request = Request(f"{self.api}/{path}", content, {"Content-Type": "application/json"})
        with LOOPBACK.open(request, timeout=30) as answer:
            return json.load(answer)

    def trigger(self, *overrides: str) -> str:
        """Trigger a run as a person does, and return its id."""
        parameters = ["-p", "config=run.yaml", "-p", f"overrides={json.dumps(overrides)}"]
        shown = self.prefect("deployment", "run", "fine-tuning/flowra", *parameters)
        found = re.search(r"UUID: ([0-9a-f-]{36})", shown)
        assert found, shown
        return found[1]

    def wait(self, run: str) -> dict[str, Any]:
        """Wait for a run's end and return it."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            flow_run: dict[str, Any] = self.ask(f"flow_runs/{run}")
            if flow_run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return flow_run
            time.sleep(0.5)
        raise TimeoutError((self.folder / "worker.log").read_text())


@pytest.fixture(scope="module")
def orchestrator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    """Everything docs/deployment.md starts, in a project that has nothing of this repository but ``prefect.yaml``."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "prefect.yaml", folder)
    (folder / "run.yaml").write_text(yaml.safe_dump({**tiny_config(folder), "output_root": "runs"}))
    port = free_port()
    one = Orchestrator(
        folder=folder,
        api=f"http://127.0.0.1:{port}/api",
        environment={
            # Without what the command line of this process may have set for itself.
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "true",
            "COLUMNS": "200",
            "NO_COLOR": "1",
        },
    )
    prefect = [sys.executable, "-m", "prefect"]
    with ExitStack() as services:
        services.enter_context(
            background([*prefect, "server", "start"], one.environment, folder, folder / "server.log")
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                one.ask("health")
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.1)
        one.prefect("work-pool", "create", "flowra", "--type", "process")
        worker = [*prefect, "worker", "start", "--pool", "flowra", "--limit", "1"]
        services.enter_context(
            background(worker, one.environment, tmp_path_factory.mktemp("elsewhere"), folder / "worker.log")
        )
        assert "'fine-tuning/flowra' successfully created" in one.prefect("deploy", "--all")
        yield one


@pytest.fixture(scope="module")
def runs(orchestrator: Orchestrator) -> tuple[dict[str, Any], dict[str, Any]]:
    """A good run, and a broken one triggered while it waits or runs."""
    good = orchestrator.trigger("training.steps=20", "evaluation.baselines=[base]")
    broken = orchestrator.trigger("name=broken", "adapter.targets=[qurey]")
    return orchestrator.wait(good), orchestrator.wait(broken)


def test_a_triggered_run_completes_with_six_tasks_and_the_table(
    orchestrator: Orchestrator, runs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    good, _ = runs
    assert good["state_type"] == "COMPLETED", good["state"]["message"]
    only = {"flow_runs": {"id": {"any_": [good["id"]]}}}
    tasks = orchestrator.ask("task_runs/filter", {**only, "sort": "EXPECTED_START_TIME_ASC"})
    assert [(task["name"], task["state_type"]) for task in tasks] == [(stage, "COMPLETED") for stage in STAGES]
    (artifact,) = orchestrator.ask("artifacts/filter", only)
    assert (artifact["key"], artifact["type"]) == ("comparison", "markdown")
    assert "| Flowra |" in artifact["data"]
    logged = [
        line["message"] for line in orchestrator.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [good["id"]]}}})
    ]
    assert f"Working directory: {orchestrator.folder.resolve()}" in logged


def test_relative_paths_start_where_it_was_deployed_and_overrides_take_effect(
    orchestrator: Orchestrator, runs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    good, _ = runs
    folder = orchestrator.folder / "runs" / "tiny"
    assert all((folder / stage / "stage.json").is_file() for stage in STAGES)
    assert (folder / "merge" / "adapter" / "adapter_model.safetensors").is_file()
    client = MlflowClient(tracking_uri=f"sqlite:///{orchestrator.folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("flowra")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    parent = next(run for run in found if run.info.run_name == "tiny")
    assert parent.info.status == "FINISHED"
    assert parent.data.params["training.steps"] == "20"
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert [run.info.run_name for run in children] == list(STAGES)
    assert {run.data.tags["prefect.flow_run_id"] for run in children} == {good["id"]}
    steps = [
        metric.step
        for run in children
        if run.info.run_name in ("calibrate", "train", "refine")
        for metric in client.get_metric_history(run.info.run_id, "train/loss")
    ]
    assert steps == list(range(1, 21))


def test_a_mistake_fails_the_run_with_its_one_line(
    orchestrator: Orchestrator, runs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    _, broken = runs
    assert broken["state_type"] == "FAILED"
    message = broken["state"]["message"]
    assert message.startswith(f"Flow run encountered an exception: UserError: {MISTAKE}")
    assert len(message.splitlines()) == 1
    assert not (orchestrator.folder / "runs" / "broken").exists()


def test_prefect_keeps_nothing_but_json(
    orchestrator: Orchestrator, runs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    stored = [path for path in (orchestrator.folder / "prefect" / "storage").rglob("*") if path.is_file()]
    assert [json.loads(path.read_text())["__exc_type__"] for path in stored] == ["flowra_pipelines.errors.UserError"]


def test_a_worker_with_limit_1_runs_one_after_the_other(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    good, broken = runs
    assert datetime.fromisoformat(broken["start_time"]) >= datetime.fromisoformat(good["end_time"])
