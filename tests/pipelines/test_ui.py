"""``flowra ui`` as a person uses it: a process with MLflow's server behind it, stopped with Ctrl-C."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import psutil
import pytest
import yaml

from flowra_pipelines.errors import UserError
from flowra_pipelines.progress import console
from flowra_pipelines.run_config import load_config
from flowra_pipelines.tracking import Tracker
from flowra_pipelines.ui import show_ui

LOOPBACK = build_opener(ProxyHandler({}))
COMPARISON = "runs?compareRunsMode=CHART&workflowType=machine_learning"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(address: str) -> str:
    with LOOPBACK.open(address, timeout=30) as answer:
        assert answer.status == 200
        return str(answer.read().decode())


def family(port: int) -> list[psutil.Process]:
    """Find every process with the port among its arguments: the command, the server and its worker."""
    return [each for each in psutil.process_iter(["cmdline"]) if str(port) in (each.info["cmdline"] or [])]


@contextmanager
def flowra_ui(*arguments: str, folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """Run the command during the block; afterwards neither it nor its server is left, whatever happened."""
    command = [sys.executable, "-m", "flowra_pipelines.cli", "ui", *arguments, "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            yield process
        finally:
            for each in family(port):
                each.kill()


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a configuration whose run has been logged, and the run's id."""
    folder = tmp_path_factory.mktemp("logged")
    content = {
        "name": "tiny",
        "output_root": str(folder / "runs"),
        "model": {"path": "./model"},
        "data": {"train": "./reviews.csv"},
        "tracking": {"experiment": "reviews & ratings"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    with Tracker(load_config(content)) as tracker:
        return folder, tracker.parent_run_id


@pytest.mark.slow
def test_it_serves_the_page_the_api_and_the_artifacts_on_the_loopback_only(logged: tuple[Path, str]) -> None:
    folder, run = logged
    port = free_port()
    with flowra_ui("run.yaml", "--no-browser", folder=folder, port=port) as process:
        assert process.stdout is not None
        shown = process.stdout.readline().strip()
        page = f"http://127.0.0.1:{port}"
        assert shown == f"Compare runs: {page}/#/experiments/1/{COMPARISON}"
        assert "<title>MLflow</title>" in get(page)
        found = json.loads(get(f"{page}/ajax-api/2.0/mlflow/experiments/search?max_results=10"))
        assert "reviews & ratings" in {each["name"] for each in found["experiments"]}
        assert json.loads(get(f"{page}/get-artifact?path=config.json&run_uuid={run}"))["name"] == "tiny"
        command, *servers = sorted(family(port), key=lambda each: each.pid != process.pid)
        assert command.pid == process.pid
        assert len(servers) == 2  # not the eight of the job runner
        listening = {
            each.laddr
            for server in servers
            for each in server.net_connections(kind="inet")
            if each.status == psutil.CONN_LISTEN
        }
        assert listening == {("127.0.0.1", port)}
        interrupted = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert time.monotonic() - interrupted < 15
        assert family(port) == []
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.slow
def test_terminated_before_it_is_ready_it_leaves_nothing_behind(logged: tuple[Path, str]) -> None:
    folder, _ = logged
    database = f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
    port = free_port()
    with flowra_ui("--uri", database, folder=folder, port=port) as process:
        deadline = time.monotonic() + 60
        while len(family(port)) < 2:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert family(port) == []


@pytest.mark.slow
def test_a_file_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database, but long enough to be read as one" * 9)
    with flowra_ui("--uri", "sqlite:///notes.db", folder=tmp_path, port=free_port()) as process:
        _, complaint = process.communicate(timeout=120)
    assert process.returncode == 2
    assert complaint.startswith("flowra: MLflow's server must run, got: ")
    assert complaint.endswith("file is not a database\n")
    assert len(complaint.splitlines()) == 1


def test_without_a_database_it_says_to_run_first(tmp_path: Path) -> None:
    with flowra_ui(folder=tmp_path, port=free_port()) as process:
        shown, complaint = process.communicate(timeout=120)
    assert process.returncode == 2
    assert shown == ""
    assert complaint == (
        f"flowra: tracking database must exist, got no file {tmp_path / 'runs' / 'mlflow.db'}."
        " Run first: flowra run CONFIG; or name another database with --uri.\n"
    )


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"port must be free, got {port}: Address already in use. Choose another with --port."
        with pytest.raises(UserError, match=message):
            show_ui(uri=f"sqlite:///{tmp_path / 'mlflow.db'}", experiment="flowra", port=port, browser=False)


class Remote(BaseHTTPRequestHandler):
    """A tracking server somewhere else, which knows one experiment."""

    def do_GET(self) -> None:
        known = self.path == "/team/api/2.0/mlflow/experiments/get-by-name?experiment_name=flowra"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"experiment": {"experiment_id": "7"}} if known else {}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(("experiment", "inside"), [("flowra", f"/#/experiments/7/{COMPARISON}"), ("other", "")])
def test_of_a_tracking_server_only_the_link_is_given_without_its_password(
    experiment: str, inside: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "file", sys.stdout)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with ThreadingHTTPServer(("127.0.0.1", 0), Remote) as server:
        threading.Thread(target=server.serve_forever).start()
        place = f"127.0.0.1:{server.server_port}/team"
        show_ui(uri=f"http://ann:secret@{place}/", experiment=experiment, port=5000, browser=True)
        server.shutdown()
    assert capsys.readouterr().out == f"Compare runs: http://{place}{inside}\n"
    assert opened == [f"http://{place}{inside}"]
