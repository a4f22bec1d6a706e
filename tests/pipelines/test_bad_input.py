"""Bad data and configurations: one clear line, exit code 2, no traceback, and nothing is written."""

import bz2
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flowra_pipelines.cli import main
from flowra_pipelines.progress import console
from flowra_testing.tiny_runs import tiny_config

Fails = Callable[..., str]


def parquet(path: Path, columns: dict[str, Any]) -> bytes:
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


def rows(count: int, label: Callable[[int], Any] = lambda index: "ab"[index % 2]) -> str:
    return "".join(f"text {index},{label(index)}\n" for index in range(count))


# What is wrong: name of the data file, its content (given the folder), and what is said of it.
DATA: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "empty csv": ("d.csv", lambda _: b"", "data must hold rows, got none"),
    "empty json": ("d.jsonl", lambda _: b"", "data must hold rows, got none"),
    "empty compressed": ("d.csv.gz", lambda _: gzip.compress(b""), "data must hold rows, got none"),
    "header only": ("d.csv", lambda _: b"text,label\n", "data must hold rows, got none"),
    "no rows": (
        "d.parquet",
        lambda folder: parquet(folder / "p", {"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}),
        "data must hold rows, got none",
    ),
    "no labels": (
        "d.csv",
        lambda _: f"text,label\n{rows(9, lambda _: '')}".encode(),
        "data must hold rows with 'text' and 'label', got none in 9 rows",
    ),
    "one class": (
        "d.csv",
        lambda _: f"text,label\n{rows(9, lambda _: 'a')}".encode(),
        "column 'label' must hold at least two classes, got only ['a']",
    ),
    "numbers for classes": (
        "d.csv",
        lambda _: f"text,label\n{rows(9, lambda index: index / 2)}".encode(),
        "column 'label' must hold classes, got 0.0",
    ),
    "label column missing": (
        "d.csv",
        lambda _: f"text,stars\n{rows(9)}".encode(),
        "column must be one of ['text', 'stars'], got 'label'",
    ),
    "text column missing": (
        "d.csv",
        lambda _: f"review,label\n{rows(9)}".encode(),
        "column must be one of ['review', 'label'], got 'text'",
    ),
    "text is a number": (
        "d.csv",
        lambda _: b"text,label\n1,a\n2,b\n",
        "column 'text' must hold text, got 1",
    ),
    "text is a list": (
        "d.jsonl",
        lambda _: b'{"text": ["a"], "label": "x"}\n',
        "column 'text' must hold text, got ['a']",
    ),
    "half a parquet": (
        "d.parquet",
        lambda folder: parquet(folder / "p", {"text": ["a"] * 9, "label": ["x"] * 9})[:200],
        "data file must be readable parquet, got Parquet magic bytes not found",
    ),
    "noise as parquet": ("d.parquet", lambda _: b"noise" * 50, "data file must be readable parquet, got Parquet magic"),
    "half a json line": (
        "d.jsonl",
        lambda _: b'{"text": "a", "label": "x"}\n{"text": "b", "la',
        "data file must be readable json, got JSON parse error",
    ),
    "text as json": ("d.json", lambda _: b"text, label", "data file must be readable json, got"),
    "columns that change": (
        "d.csv",
        lambda _: b"text,label\na,b\nc,d,e,f\n",
        "data file must be readable csv, got Error tokenizing data. C error: Expected 2 fields in line 3, saw 4",
    ),
    "latin-1 csv": (
        "d.csv",
        lambda _: "text,label\ncafé au lait,a\n".encode("latin-1"),
        "data file must be readable csv, got 'utf-8' codec can't decode byte 0xe9",
    ),
    "latin-1 json": (
        "d.jsonl",
        lambda _: '{"text": "café au lait", "label": "x"}\n'.encode("latin-1"),
        "data file must be readable json, got 'utf-8' codec can't decode byte 0xe9",
    ),
    "not compressed": ("d.csv.gz", lambda _: b"text,label\na,b\n", "data file must be readable csv, got Not a gzipped"),
    "half compressed": (
        "d.csv.bz2",
        lambda _: bz2.compress(b"text,label\n" + b"a,b\n" * 10_000)[:40],
        "data file must be readable csv, got Compressed file ended",
    ),
    "damaged compressed": (
        "d.csv.gz",
        lambda _: gzip.compress(rows(500).encode())[:60] + b"\0" * 400,
        "data file must be readable csv, got",
    ),
    "an ending without a format": ("d.txt", lambda _: b"text", "data must be a file ending in one of ['.csv'"),
}


def run_config(folder: Path, name: str, content: bytes) -> dict[str, Any]:
    """Write a data file, and return a run on it."""
    (folder / name).write_bytes(content)
    return tiny_config(folder, data={"train": str(folder / name)})


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command in this process, check how it failed and that it wrote nothing, and return its one line."""

    def run(content: dict[str, Any] | str | bytes, *options: str, command: str = "calibrate") -> str:
        path = tmp_path / "run.yaml"
        text = yaml.safe_dump(content) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        before = listing(tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["flowra", command, str(path), *options])
        monkeypatch.setattr(console, "file", sys.stdout)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("flowra: ")
        assert listing(tmp_path) == before
        return lines[0]

    return run


@pytest.mark.parametrize("what", DATA)
def test_bad_data_are_one_line_and_leave_nothing(what: str, fails: Fails, tmp_path: Path) -> None:
    name, content, said = DATA[what]
    message = fails(run_config(tmp_path, name, content(tmp_path)))
    assert f"flowra: {said}" in message
    assert name in message


@pytest.mark.parametrize(
    ("labels", "shown"),
    [(lambda index: "n/a" if index == 3 else index, "'n/a'"), (lambda index: index % 2 == 0, "True")],
    ids=["text", "truth"],
)
def test_labels_that_are_no_numbers_are_one_line_and_leave_nothing(
    labels: Callable[[int], Any], shown: str, fails: Fails, tmp_path: Path
) -> None:
    config = run_config(tmp_path, "d.jsonl", b"")
    lines = [json.dumps({"text": f"text {index}", "label": str(labels(index))}) for index in range(9)]
    if shown == "True":
        lines = [json.dumps({"text": f"text {index}", "label": labels(index)}) for index in range(9)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    message = fails({**config, "model": {**config["model"], "task": "regression"}})
    assert f"column 'label' must hold numbers within ±1e+18, got {shown}; in" in message


def test_rows_that_are_all_left_out_are_one_line_with_the_reasons(fails: Fails, tmp_path: Path) -> None:
    message = fails(run_config(tmp_path, "d.csv", b"text,label\n" + b"same,a\nsame,b\n" * 5))
    assert "data must leave at least 1 training and 2 test rows, got" in message
    assert "left out: 9 because the text has been seen before" in message


def test_a_name_that_is_neither_a_file_nor_on_the_hub_is_one_line(fails: Fails, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data={"train": "no-such-data"})
    assert "data must be a file that exists or a data set of the Hub, got 'no-such-data'" in fails(config)
    assert "file must exist, got 'no-such-data.csv'" in fails({**config, "data": {"train": "no-such-data.csv"}})
    assert "data must be a file ending in one of" in fails({**config, "data": {"train": str(tmp_path / "bert")}})


START = "name: a\nmodel: {path: m}\ndata: {train: d.csv}\n"
CONFIGURATIONS: dict[str, tuple[str | bytes, str]] = {
    "unknown key": (f"{START}trainig: {{}}\n", "trainig must be a known key; nearest: training"),
    "key twice": (f"{START}name: b\n", "configuration must be YAML, got the key 'name' twice"),
    "no YAML": ("name: [a\n", "configuration must be YAML, got"),
    "no text": (b"\xff\xfe\x00", "configuration must be YAML, got 'utf-8' codec can't decode"),
    "empty": ("", "configuration must be a mapping of sections, got NoneType"),
    "sections missing": ("name: a\n", "model must be given; data must be given"),
    "a name with a path": (START.replace("name: a", "name: ../a"), "name must match pattern"),
}


@pytest.mark.parametrize("what", CONFIGURATIONS)
@pytest.mark.parametrize("command", ["run", "calibrate"])
def test_a_bad_configuration_is_one_line_and_leaves_nothing(what: str, command: str, fails: Fails) -> None:
    content, said = CONFIGURATIONS[what]
    assert f"flowra: {said}" in fails(content, command=command)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("header only", ["--no-prefect"]),
        ("header only", ["--prefect"]),
        ("half a parquet", ["--no-prefect"]),
        ("latin-1 csv", ["--no-prefect"]),
        ("label column missing", ["--dry-run"]),
        ("text is a number", ["--no-prefect", "--set", "output_root=deep/runs"]),
    ],
    ids=str,
)
def test_a_fresh_process_says_one_line_and_leaves_nothing(what: str, options: list[str], tmp_path: Path) -> None:
    name, content, said = DATA[what]
    config = run_config(tmp_path, name, content(tmp_path))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    before = listing(tmp_path)
    home = tmp_path.parent / f"{tmp_path.name}-prefect"
    done = subprocess.run(
        [sys.executable, "-m", "flowra_pipelines.cli", "run", "run.yaml", *options],
        cwd=tmp_path,
        env={**os.environ, "PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1, done.stderr[-2000:]
    assert done.stderr.startswith(f"flowra: {said}")
    assert "Traceback" not in done.stdout
    assert listing(tmp_path) == before
    assert not home.exists()
