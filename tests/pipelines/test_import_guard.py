"""What answers at once must not import what takes seconds."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "datasets", "mlflow", "pandas", "numpy", "matplotlib", "scipy", "flowra_adapters"}
COMMAND = """
import sys
from flowra_pipelines.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
"""


def imported(program: str, *arguments: str) -> set[str]:
    """Run a program in a fresh interpreter and return the top-level modules it imported."""
    program += "\nimport json, sys\nprint(); print(json.dumps([name for name in sys.modules if '.' not in name]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["fuse", "train", "--help"], ["ui", "--help"], ["config", "explain"]]
)
def test_a_command_that_only_explains_imports_nothing_heavy(arguments: list[str]) -> None:
    assert not (HEAVY | {"prefect"}) & imported(COMMAND, *arguments)


def test_the_flow_is_read_for_a_deployment_without_the_libraries_it_runs() -> None:
    found = imported("import flowra_pipelines.flows.fine_tuning")
    assert "prefect" in found
    assert not HEAVY & found
