"""What each distribution offers, and what importing it brings along."""

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

LIBRARIES = ("flowra_adapters", "flowra_allocation", "flowra_analysis", "flowra_compose")
ALL = (*LIBRARIES, "flowra_pipelines")
NOT_NEEDED = ("transformers", "datasets", "prefect", "mlflow", "pydantic", "peft", "typer", "rich", "matplotlib")


@pytest.mark.parametrize("name", ALL)
def test_all_names_what_the_package_offers(name: str) -> None:
    package = importlib.import_module(name)
    offered = {
        each
        for each, value in vars(package).items()
        if not each.startswith("_") and not isinstance(value, ModuleType) and value is not version
    }
    assert offered == set(package.__all__) - {"__version__"}
    assert len(package.__all__) == len(set(package.__all__))


@pytest.mark.parametrize("name", ALL)
def test_the_version_is_that_of_the_distribution(name: str) -> None:
    assert importlib.import_module(name).__version__ == version(name.replace("_", "-"))


@pytest.mark.parametrize("name", ALL)
def test_a_package_says_that_it_is_typed(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file is not None
    assert Path(file).with_name("py.typed").is_file()


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_imports_neither_siblings_nor_the_application_s_tools(name: str) -> None:
    unwanted = [*NOT_NEEDED, *(each for each in ALL if each != name)]
    code = f"import json, sys, {name}; print(json.dumps([each for each in {unwanted!r} if each in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
