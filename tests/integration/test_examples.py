"""Each example runs on its own, as a user would start it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flowra_adapters import read_checkpoint
from flowra_allocation import read_plan
from flowra_analysis import read_profile
from flowra_compose import read_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def check_allocation(out: Path) -> None:
    plan = read_plan(out)
    assert len(set(plan.ranks.values())) > 1
    ranks = {name: a.shape[0] for name, (a, _) in read_checkpoint(out / "adapter").factors.items()}
    assert ranks == {name: rank for name, rank in plan.ranks.items() if rank}


def check_merge(out: Path) -> None:
    merged, news, code = (read_adapter(out / name).updates for name in ("merged", "news", "code"))
    assert merged.keys() == news.keys() | code.keys()


def check_profile(out: Path) -> None:
    profile = read_profile(out)
    assert len(profile.modules) == 13
    assert all(module.statistics["fisher_trace"] > 0 for module in profile.modules.values())


def check_refinement(out: Path) -> None:
    found = read_checkpoint(out / "adapter")
    ranks = [found.rank(name) for name in found.factors]
    assert len(set(ranks)) > 1
    assert set(found.scalings.values()) == {2.0}


def check_resumed(out: Path) -> None:
    whole = {path.name: path.read_bytes() for path in (out / "checkpoint-30").iterdir()}
    assert len(whole) == 5
    assert whole == {path.name: path.read_bytes() for path in (out / "resumed").iterdir()}


CHECKS: dict[str, Callable[[Path], None]] = {
    "allocate_by_hand": check_allocation,
    "merge_adapters": check_merge,
    "profile_a_model": check_profile,
    "refine_a_peft_model": check_refinement,
    "resume_refinement": check_resumed,
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == CHECKS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_an_example_runs_in_a_fresh_process_and_writes_what_it_says(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-B", str(EXAMPLES / f"{name}.py"), str(out)],
        capture_output=True,
        text=True,
        timeout=180,  # of which most is imports, where the machine is busy
        cwd=tmp_path,
        env=os.environ | OFFLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    CHECKS[name](out)
