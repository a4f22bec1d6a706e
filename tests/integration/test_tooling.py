"""The tools of the repository: changelog fragments, pins, hooks, sessions, and what wheels and sdists hold."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
import yaml
from flit_core.buildapi import build_sdist, build_wheel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDERS = [*sorted(ROOT.glob("packages/*/")), ROOT / "pipelines"]
LEGAL_FRAGMENT = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\.(breaking|added|deprecated|fixed)\.md")
MARKER = "<!-- towncrier release notes start -->\n"

each_distribution = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)


def towncrier(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("towncrier", "build", "--config", ROOT / "pyproject.toml", "--dir", folder, *arguments)


def fragments(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "changelog.d").iterdir() if path.name != ".gitkeep")


# Changelogs


@each_distribution
def test_fragments_have_legal_names_and_say_something(folder: Path) -> None:
    assert [path.name for path in fragments(folder) if not LEGAL_FRAGMENT.fullmatch(path.name)] == []
    assert [path.name for path in fragments(folder) if not path.read_text(encoding="utf-8").strip()] == []


@each_distribution
def test_a_draft_shows_every_fragment(folder: Path) -> None:
    done = towncrier(folder, "--draft", "--version", "1.2.3", "--date", "2030-01-31")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## 1.2.3 (2030-01-31)\n")
    for path in fragments(folder):
        assert path.read_text(encoding="utf-8").strip().splitlines()[0] in done.stdout


@each_distribution
def test_a_changelog_is_ready_for_the_next_section(folder: Path) -> None:
    text = (folder / "CHANGELOG.md").read_text(encoding="utf-8")
    name = toml(folder / "pyproject.toml")["project"]["name"]
    assert text.startswith(f"# Changelog of {name}\n")
    assert text.count(MARKER) == 1
    released = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert [title for title in released if not re.fullmatch(r"\d+\.\d+\.\d+\S* \(\d{4}-\d\d-\d\d\)", title)] == []


def test_a_release_moves_the_fragments_into_the_changelog(tmp_path: Path) -> None:
    shutil.copy(FOLDERS[0] / "CHANGELOG.md", tmp_path)
    pending = tmp_path / "changelog.d"
    pending.mkdir()
    (pending / ".gitkeep").touch()
    (pending / "b-first.added.md").write_text("Something to use.\n", encoding="utf-8")
    (pending / "a-second.breaking.md").write_text("Something to change,\nin two lines.\n", encoding="utf-8")
    done = towncrier(tmp_path, "--yes", "--version", "1.0.0", "--date", "2030-01-31")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in pending.iterdir()] == [".gitkeep"]
    (pending / "7-third.fixed.md").write_text("Something mended.\n", encoding="utf-8")
    done = towncrier(tmp_path, "--yes", "--version", "1.1.0", "--date", "2030-02-28")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.sub(r"\n+", "\n", text.split(MARKER)[1]).strip() == (
        "## 1.1.0 (2030-02-28)\n### Fixed\n- Something mended.\n"
        "## 1.0.0 (2030-01-31)\n### Breaking\n- Something to change,\n  in two lines.\n### Added\n- Something to use."
    )


@pytest.mark.parametrize("name", ["notes.md", "speed.changed.md", "Two_Words.added.md", "#12.fixed.md"])
def test_towncrier_refuses_an_illegal_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "changelog.d").mkdir()
    (tmp_path / "changelog.d" / name).write_text("Text.\n", encoding="utf-8")
    done = towncrier(tmp_path, "--draft", "--version", "1.2.3")
    assert done.returncode != 0
    assert "name" in done.stderr
    assert not LEGAL_FRAGMENT.fullmatch(name)


# Pins


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert len({canonicalize_name(name) for name, _ in pins}) == len(pins)
    return {canonicalize_name(name): version for name, version in pins}


def requirements() -> list[Requirement]:
    groups = toml(ROOT / "pyproject.toml")["dependency-groups"].values()
    written = [line for group in groups for line in group if isinstance(line, str)]
    for folder in FOLDERS:
        pyproject = toml(folder / "pyproject.toml")
        written += pyproject["build-system"]["requires"] + pyproject["project"]["dependencies"]
        for extra in pyproject["project"].get("optional-dependencies", {}).values():
            written += extra
    return [found for line in written if not (found := Requirement(line)).name.startswith("flowra-")]


def test_every_requirement_has_a_pin_that_meets_it() -> None:
    pins = constraints()
    assert [str(each) for each in requirements() if canonicalize_name(each.name) not in pins] == []
    assert [str(each) for each in requirements() if pins[canonicalize_name(each.name)] not in each.specifier] == []


def hooks() -> list[dict[str, Any]]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [each["repo"] for each in config["repos"]] == ["local"]  # none needs GitHub
    return [hook for each in config["repos"] for hook in each["hooks"]]


def test_the_hooks_use_the_versions_of_the_sessions() -> None:
    used = {tool for hook in hooks() for tool in hook.get("additional_dependencies", [])}
    pins = constraints()
    assert used == {f"{name}=={pins[name]}" for name in ("ruff", "pre-commit-hooks")}
    assert f"ruff=={pins['ruff']}" in toml(ROOT / "pyproject.toml")["dependency-groups"]["lint"]


@pytest.mark.parametrize(
    ("path", "is_refused"),
    [
        ("pipelines/changelog.d/.gitkeep", False),
        ("packages/flowra-compose/changelog.d/ties-2.added.md", False),
        ("packages/flowra-compose/changelog.d/ties.feature.md", True),
        ("packages/flowra-compose/changelog.d/Ties.added.md", True),
        ("pipelines/changelog.d/speed.fixed.txt", True),
        ("docs/speed.txt", False),
    ],
)
def test_the_hook_refuses_fragments_by_name(path: str, is_refused: bool) -> None:
    (hook,) = [each for each in hooks() if each["id"] == "fragment-names"]
    assert bool(re.search(hook["files"], path) and not re.search(hook["exclude"], path)) is is_refused


# Sessions


def nox(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("nox", "-f", ROOT / "noxfile.py", *arguments)


def sessions(*names: str) -> set[str]:
    return {each["session"] for each in json.loads(nox("--list-sessions", "--json", "-s", *names).stdout)}


def test_each_distribution_has_its_unit_session() -> None:
    assert sessions("unit") == {f"unit({folder.name.removeprefix('flowra-')})" for folder in FOLDERS}


def test_the_hooks_call_sessions_that_exist() -> None:
    called = {name for hook in hooks() if hook["entry"].startswith("nox -s ") for name in hook["entry"].split()[2:]}
    assert called == sessions("contracts", "types")


def test_bench_lists_each_benchmark_with_what_it_says_of_itself() -> None:
    lines = nox("-s", "bench").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        path.stem.removeprefix("bench_") for path in sorted(ROOT.glob("benchmarks/bench_*.py"))
    ]
    assert [line for line in lines if "says nothing" in line] == []


def test_bench_names_the_nearest_benchmark() -> None:
    done = nox("-s", "bench", "--", "quickstrat")
    assert done.returncode != 0
    assert "got 'quickstrat'; nearest is 'quickstart'" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["analysys"], ["analysis", "--drft"]], ids=["none", "package", "option"])
def test_changelog_says_how_it_is_used(arguments: list[str]) -> None:
    done = nox("-s", "changelog", "--", *arguments)
    assert done.returncode != 0
    assert "usage: nox -s changelog -- PACKAGE [--draft], PACKAGE one of analysis, allocation" in done.stderr


# What is built


@each_distribution
def test_a_wheel_holds_the_whole_package_its_licence_and_its_readme(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        info = {name.split(".dist-info/")[1]: wheel.read(name) for name in wheel.namelist() if ".dist-info/" in name}
    (package,) = [path.parent for path in folder.glob("**/py.typed")]
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert names == {path.relative_to(package.parent).as_posix() for path in files}
    assert info["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    metadata = message_from_bytes(info["METADATA"])
    assert metadata["License-Expression"] == "MIT"
    assert (folder / "README.md").read_text(encoding="utf-8").strip() in info["METADATA"].decode()


@each_distribution
def test_an_sdist_holds_what_a_wheel_is_built_of(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with tarfile.open(tmp_path / build_sdist(str(tmp_path))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
