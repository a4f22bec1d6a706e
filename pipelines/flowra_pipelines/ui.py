"""The tracking server's page: MLflow's own, started on this machine's loopback, or a link to the one that runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO
from urllib.parse import urlencode, urlsplit
from urllib.request import OpenerDirector, ProxyHandler, build_opener

from flowra_pipelines.errors import UserError
from flowra_pipelines.progress import console

__all__ = ["show_ui"]

HOST = "127.0.0.1"
START_SECONDS = 120.0
STOP_SECONDS = 5.0
# Bars for each metric over the runs; without the type, MLflow opens a page for traces of language models.
COMPARE = "compareRunsMode=CHART&workflowType=machine_learning"
SQLITE = "sqlite:///"


def show_ui(*, uri: str, experiment: str, port: int, browser: bool) -> None:
    """Serve MLflow's page until interrupted, and print the link that compares an experiment's runs.

    Args:
        uri: tracking URI. A database is served on 127.0.0.1; for a server, http or https, only the link is given.
        experiment: whose runs are compared; if there is none of this name, the link is to the list of experiments.
        port: to listen on.
        browser: open the link as well.

    Raises:
        UserError: if the sqlite file does not exist, the port is taken, or MLflow's server does not start.
    """
    if urlsplit(uri).scheme in ("http", "https"):
        parts = urlsplit(uri)
        page = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"  # no name, no password
        _show(_link(page, experiment, build_opener()), browser)
        return
    if uri.startswith(SQLITE) and not (path := Path(uri.removeprefix(SQLITE).partition("?")[0])).is_file():
        raise UserError(
            f"tracking database must exist, got no file {path.absolute()}. Run first: flowra run CONFIG;"
            " or name another database with --uri."
        )
    _check_free(port)
    signals: list[int] = []
    # A flag, not an exception: one raised while the server is being started would leave it behind.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: signals.append(number))
    with TemporaryFile("w+") as log:
        server = _start(uri, port, log)
        try:
            page = f"http://{HOST}:{port}"
            local = build_opener(ProxyHandler({}))
            deadline = time.monotonic() + START_SECONDS
            while not (ready := _answers(page, local)) and not signals and server.poll() is None:
                if time.monotonic() > deadline:
                    raise UserError(f"MLflow's server must answer within {START_SECONDS:.0f} s, got nothing at {page}")
                time.sleep(0.1)
            if ready:
                _show(_link(page, experiment, local), browser)
                console.print("Ctrl-C stops the server.")
            while not signals and server.poll() is None:
                time.sleep(0.1)
            if not signals:
                raise UserError(f"MLflow's server must run, got: {_last_error(log)}")
        finally:
            _stop(server)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that is closing does not count
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port must be free, got {port}: {error.strerror}. Choose another with --port.") from None


def _start(uri: str, port: int, log: IO[str]) -> subprocess.Popen[bytes]:
    """Start the server as the leader of a process group: it starts a worker, and both must go."""
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": uri,  # not on the command line, where everybody could read a password
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes less
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


def _answers(page: str, opener: OpenerDirector) -> bool:
    with suppress(OSError, HTTPException), opener.open(f"{page}/health", timeout=5):
        return True
    return False


def _last_error(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if "Error" in line or "Exception" in line]
    return lines[-1] if lines else "an exit without an error"


def _link(page: str, experiment: str, opener: OpenerDirector) -> str:
    query = urlencode({"experiment_name": experiment})
    try:
        with opener.open(f"{page}/api/2.0/mlflow/experiments/get-by-name?{query}", timeout=10) as answer:
            number = json.load(answer)["experiment"]["experiment_id"]
    except (OSError, HTTPException, ValueError, KeyError):  # no such experiment, or a server that asks for a login
        return page
    return f"{page}/#/experiments/{number}/runs?{COMPARE}"


def _show(link: str, browser: bool) -> None:
    console.print(f"Compare runs: {link}", markup=False)
    if browser:
        webbrowser.open(link)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its worker: politely, then not."""
    if os.name != "posix":
        server.terminate()
        server.wait()
        return
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            server.poll()
            os.killpg(server.pid, 0)  # raises when nobody is left
            time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
