"""Databases are made whole or not at all, and what the flow needs is begun before it and leaves nothing without it."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Event

import prefect.client.orchestration
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings

from flowra_pipelines import tracking
from flowra_pipelines.databases import put_database, sqlite_file
from flowra_pipelines.errors import UserError
from flowra_pipelines.flows import fine_tuning as flow_module
from flowra_pipelines.flows import starting
from flowra_pipelines.run_config import load_config
from flowra_testing.tiny_runs import tiny_config

MAKES = "import os, sqlite3; url = os.environ['PREFECT_SERVER_DATABASE_CONNECTION_URL']; "
QUICKLY = MAKES + "sqlite3.connect(url.removeprefix('sqlite+aiosqlite:///')).execute('create table step_1 (x)')"
NEVER = MAKES + "import time; time.sleep(600)"
FAILS = "print('sqlite3.OperationalError: database or disk is full'); print('bye'); raise SystemExit(1)"


def tables(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        return [name for (name,) in database.execute("select name from sqlite_master order by name")]


def version(path: Path) -> str:
    with closing(sqlite3.connect(path)) as database:
        (found,) = database.execute("select version_num from alembic_version").fetchone()
    return str(found)


def made(path: Path, *names: str) -> Path:
    with closing(sqlite3.connect(path)) as database:
        for name in names:
            database.execute(f"create table {name} (x)")
    return path


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:////a/runs/mlflow.db", Path("/a/runs/mlflow.db")),
        ("sqlite:///runs/my mlflow.db", Path("runs/my mlflow.db")),
        ("sqlite+aiosqlite:////home/me/.prefect/prefect.db", Path("/home/me/.prefect/prefect.db")),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("sqlite+aiosqlite:///file::memory:?cache=shared&uri=true", None),
        ("sqlite:////a/mlflow.db?timeout=9", None),
        ("postgresql+asyncpg://me:secret@host/prefect", None),
        ("http://127.0.0.1:5000", None),
        ("file:///a/mlruns", None),
    ],
)
def test_only_a_plain_sqlite_url_names_a_file(url: str, file: Path | None) -> None:
    assert sqlite_file(url) == file


def test_a_database_is_put_in_folders_that_are_not_there(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "er" / "mlflow.db"
    put_database(made(tmp_path / "made.db", "a", "b"), place)
    assert tables(place) == ["a", "b"]
    assert list(place.parent.iterdir()) == [place]


def test_a_database_may_be_read_by_whom_sqlite_lets(tmp_path: Path) -> None:
    put_database(made(tmp_path / "made.db", "a"), tmp_path / "put.db")
    assert (tmp_path / "put.db").stat().st_mode == (tmp_path / "made.db").stat().st_mode


@pytest.mark.parametrize("links", [True, False])
def test_a_database_that_is_there_by_now_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    place = made(tmp_path / "put.db", "earlier")
    put_database(made(tmp_path / "made.db", "later"), place)
    assert tables(place) == ["earlier"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.db", "put.db"]


def no_links(_: Path, path: Path) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported", str(path))


def test_a_file_system_without_links_gets_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    put_database(made(tmp_path / "made.db", "a"), tmp_path / "put.db")
    assert tables(tmp_path / "put.db") == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.db", "put.db"]


def test_what_the_log_of_a_database_holds_is_put_too(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "made.db")) as database:
        database.execute("pragma journal_mode = wal")
        database.execute("create table a (x)")
        assert (tmp_path / "made.db-wal").stat().st_size
        put_database(tmp_path / "made.db", tmp_path / "put" / "put.db")
    assert tables(tmp_path / "put" / "put.db") == ["a"]


def test_a_process_killed_before_the_end_leaves_no_database_and_the_next_one_puts_it(tmp_path: Path) -> None:
    source, place = made(tmp_path / "made.db", "a"), tmp_path / "put.db"
    program = (
        "import os, signal, sys; from pathlib import Path; from flowra_pipelines.databases import put_database;"
        "os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL); put_database(*map(Path, sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(source), str(place)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not place.exists()
    put_database(source, place)
    assert tables(place) == ["a"]


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(FileExistsError, match="taken"):
        put_database(made(tmp_path / "made.db", "a"), tmp_path / "taken" / "put.db")


def test_tracking_makes_its_database_once_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    config = load_config(tiny_config(tmp_path))
    first = tracking.open_tracking(config).create_experiment("kept")
    assert [path.name for path in Path(config.output_root).iterdir()] == ["mlflow.db"]
    assert not list((tmp_path / "tmp").iterdir())
    found = tracking.open_tracking(config).get_experiment_by_name("kept")
    assert found is not None
    assert found.experiment_id == first


@pytest.mark.slow
def test_processes_that_make_the_tracking_database_at_once_share_it(tmp_path: Path) -> None:
    program = (
        "import sys; from flowra_pipelines.tracking import open_tracking;"
        "from flowra_pipelines.run_config import load_config;"
        "config = {'name': 'a', 'model': {'path': 'm'}, 'data': {'train': 'd.csv'}, 'output_root': sys.argv[1]};"
        "open_tracking(load_config(config)).create_experiment(sys.argv[2])"
    )
    names = ["one", "two", "three"]
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name], stderr=subprocess.PIPE, text=True)
        for name in names
    ]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        found = {name for (name,) in database.execute("select name from experiments")}
    assert found == {"Default", *names}


class Steps:
    """What a start of the flow did, in order, and whether Prefect's database was there."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.place = folder / "home" / "prefect.db"
        self.temporary = folder / "tmp"
        self.done: list[tuple[str, bool]] = []
        self.temporary.mkdir()

    def note(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: self.done.append((name, self.place.exists()))


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """A user's folder in which Prefect was never used; server, tracking and flow only take notes."""
    noted = Steps(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(noted.temporary))
    monkeypatch.setenv("PREFECT_HOME", str(noted.home))
    for name in starting.ELSEWHERE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(prefect.client.orchestration, "get_client", noted.note("server"))
    monkeypatch.setattr(tracking, "open_tracking", noted.note("tracking"))
    monkeypatch.setattr(flow_module, "fine_tuning", noted.note("flow"))
    url = f"sqlite+aiosqlite:///{noted.place}"
    with temporary_settings({PREFECT_SERVER_DATABASE_CONNECTION_URL: url}, restore_defaults={PREFECT_API_URL}):
        yield noted


def make_with(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(starting, "MAKE", (sys.executable, "-c", program))


CONFIG = load_config({"name": "a", "model": {"path": "m"}, "data": {"train": "d.csv"}})


def test_the_database_made_meanwhile_is_there_before_the_server_starts(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_with(monkeypatch, QUICKLY)
    with starting.flow_ahead() as run:
        assert not steps.home.exists()
        run(CONFIG, False)
    assert sorted(steps.done[:2]) == [("server", True), ("tracking", True)]
    assert steps.done[2:] == [("flow", True)]
    assert tables(steps.place) == ["step_1"]
    assert not list(steps.temporary.iterdir())


def test_an_end_before_the_flow_waits_for_nothing_and_leaves_nothing(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_with(monkeypatch, NEVER)
    with pytest.raises(UserError, match="no such data"), starting.flow_ahead():
        raise UserError("no such data")
    assert not steps.home.exists()
    assert not list(steps.temporary.iterdir())
    assert not steps.done


def test_a_database_that_cannot_be_made_is_one_line(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    make_with(monkeypatch, FAILS)
    with (
        pytest.raises(
            UserError, match=r"^Prefect's database .* got 'sqlite3.OperationalError: database or disk is full'"
        ),
        starting.flow_ahead() as run,
    ):
        run(CONFIG, False)
    assert not steps.place.exists()
    assert not steps.done


def test_a_database_that_another_run_put_meanwhile_stays(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    make_with(monkeypatch, NEVER)
    with starting.flow_ahead() as run:
        steps.home.mkdir()
        made(steps.place, "other")
        run(CONFIG, False)
    assert tables(steps.place) == ["other"]
    assert steps.done[2:] == [("flow", True)]


def test_settings_that_name_a_server_get_no_database(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    make_with(monkeypatch, NEVER)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}), starting.flow_ahead() as run:
        run(CONFIG, False)
    assert steps.done[2:] == [("flow", False)]
    assert not steps.home.exists()


@pytest.mark.parametrize("known", ["profiles.toml", *starting.ELSEWHERE])
def test_where_prefect_is_set_up_no_database_is_begun(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    monkeypatch.setattr(starting, "MAKE", ("/no/such/program",))
    if known == "profiles.toml":
        steps.home.mkdir()
        (steps.home / known).touch()
    else:
        monkeypatch.setenv(known, "set")
    with starting.flow_ahead() as run:
        run(CONFIG, False)
    assert steps.done[2:] == [("flow", False)]


def test_where_there_is_a_database_the_server_starts_at_once_and_only_once(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "MAKE", ("/no/such/program",))
    steps.home.mkdir()
    made(steps.place, "earlier")
    began = Event()
    monkeypatch.setattr(prefect.client.orchestration, "get_client", lambda **_: began.set())
    with starting.flow_ahead() as run:
        assert began.wait(60)
        began.clear()
        run(CONFIG, False)
    assert not began.is_set()
    assert steps.done == [("tracking", True), ("flow", True)]


def test_an_interrupt_at_the_terminal_reaches_the_command_and_not_the_server(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    said: list[str] = []

    def server(**_: object) -> None:
        said.append(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)

    make_with(monkeypatch, QUICKLY)
    monkeypatch.setattr(prefect.client.orchestration, "get_client", server)
    with starting.flow_ahead() as run:
        run(CONFIG, False)
    assert said == ["True\n"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_server_that_does_not_start_ends_the_run_before_the_flow(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("Timed out")

    make_with(monkeypatch, QUICKLY)
    monkeypatch.setattr(prefect.client.orchestration, "get_client", fail)
    with pytest.raises(RuntimeError, match="Timed out"), starting.flow_ahead() as run:
        run(CONFIG, False)
    assert steps.done == [("tracking", True)]


@pytest.mark.slow
def test_prefect_has_nothing_to_add_to_its_database(steps: Steps) -> None:
    with starting.flow_ahead() as run:
        run(CONFIG, False)
    before = tables(steps.place), version(steps.place)
    assert {"flow_run", "task_run", "artifact"} <= set(before[0])
    done = subprocess.run(starting.MAKE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tables(steps.place), version(steps.place)) == before
