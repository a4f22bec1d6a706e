"""The flow in this process, with what Prefect needs for it begun while the command still imports and checks.

Unless the settings name a server, Prefect starts a temporary one, whose process takes seconds to import and, the first
time, to make its database. Both can go on beside the command's own imports.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from subprocess import STDOUT, Popen
from tempfile import TemporaryDirectory
from threading import Thread

from flowra_pipelines.databases import put_database, sqlite_file
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import RunConfig

__all__ = ["flow_ahead"]

MAKE = (sys.executable, "-m", "prefect", "--no-prompt", "server", "database", "upgrade", "--yes")
URL = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
ELSEWHERE = ("PREFECT_API_URL", "PREFECT_API_DATABASE_CONNECTION_URL", URL)


@contextmanager
def flow_ahead() -> Iterator[Callable[[RunConfig, bool], None]]:
    """Begin what the flow will need: Prefect's temporary server or, where it was never used, the server's database.

    A run that ends before the flow leaves nothing that was not there.

    Yields:
        Function that runs the flow of a configuration in this process; every stage, if its second argument is true.
    """
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    begun = _start_server() if (home / "prefect.db").exists() else None
    with _database_ahead(home) as put:

        def run(config: RunConfig, force: bool) -> None:
            from flowra_pipelines.flows.fine_tuning import fine_tuning
            from flowra_pipelines.tracking import open_tracking

            put()
            wait = begun or _start_server()
            open_tracking(config)
            wait()
            fine_tuning(config.model_dump(mode="json", exclude_unset=True), force=force)

        yield run


def _start_server() -> Callable[[], object]:
    """Begin to start Prefect's temporary server, if the settings name no other; return what waits for it."""
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is None:
        import prefect.server.api.server  # noqa: F401 - here, as two threads that import get in each other's way

    started: Future[object] = Future()

    def start() -> None:
        if hasattr(signal, "pthread_sigmask"):
            # Ctrl-C goes to all processes of the terminal; a flow that is interrupted still needs its server.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            started.set_result(get_client(sync_client=True))
        except BaseException as error:
            started.set_exception(error)

    # Prefect ends the server at exit; that must not wait until the thread has seen it answer.
    Thread(target=copy_context().run, args=(start,), daemon=True).start()
    return started.result


@contextmanager
def _database_ahead(home: Path) -> Iterator[Callable[[], None]]:
    """Begin to make the temporary server's database, in a process of its own, if Prefect was never used.

    Where it must lie, only Prefect's settings say, and to read them makes their folder. So this begins if the folder is
    that of a Prefect never used, and the settings are asked when the database is to be put in its place.

    Yields:
        Function that waits for the database and puts it in its place.
    """
    used = any((home / name).exists() for name in ("prefect.db", "profiles.toml"))
    if used or any(name in os.environ for name in ELSEWHERE):
        yield lambda: None
        return
    with TemporaryDirectory(prefix="flowra-") as folder:
        made, said = Path(folder) / "prefect.db", Path(folder) / "said.txt"
        environment = {**os.environ, "PREFECT_HOME": folder, URL: f"sqlite+aiosqlite:///{made}"}
        with said.open("w") as log, Popen(MAKE, env=environment, stdout=log, stderr=STDOUT) as process:

            def put() -> None:
                from prefect.settings import get_current_settings

                settings = get_current_settings()
                url = settings.server.database.connection_url
                path = None if settings.api.url or url is None else sqlite_file(url.get_secret_value())
                if path is None or path.exists():
                    return
                if process.wait() != 0:
                    errors = [line for line in said.read_text(errors="replace").splitlines() if "Error" in line]
                    raise UserError(
                        f"Prefect's database must be one that can be made, got {'; '.join(errors[-1:])!r}; for {path}."
                        " Try: prefect server database upgrade. Or run with --no-prefect."
                    )
                put_database(made, path)

            try:
                yield put
            finally:
                process.kill()
