import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowra_analysis import read_state
from flowra_analysis.state_files import state_to_bytes
from flowra_testing.measuring_child import KINDS, assert_same, begin, measured, named


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes, that met over the loopback device, left what each of them has."""
    folder = tmp_path_factory.mktemp("gathered")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "flowra_testing.measuring_child", "gather", str(folder)]
    children = [subprocess.Popen([*command, str(rank)], env=environment) for rank in (0, 1)]
    try:
        assert [child.wait(timeout=120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_have_the_same_bits(kind: str, folder: Path) -> None:
    state = type(begin(torch.float64)[1][kind])
    first, second = (state_to_bytes(named(read_state(folder / f"{kind}.{rank}", state))) for rank in (0, 1))
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_find_what_one_finds(kind: str, folder: Path) -> None:
    model, empty = begin(torch.float64)
    alone = measured(model, {kind: empty[kind]}, slice(None))[kind]
    together = read_state(folder / f"{kind}.0", type(empty[kind]))
    assert_same(named(together), named(alone), rtol=1e-10)
    assert [*together.finalise()] == [*alone.finalise()]


def test_a_group_of_one_process_keeps_its_own(folder: Path) -> None:
    for rank in (0, 1):
        assert (folder / f"alone.{rank}").read_bytes() == (folder / f"own.{rank}").read_bytes()
    assert (folder / "alone.0").read_bytes() != (folder / "alone.1").read_bytes()


def test_states_that_do_not_fit_are_refused_on_every_process(folder: Path) -> None:
    first, second = (json.loads((folder / f"problems.{rank}").read_text()) for rank in (0, 1))
    assert first["arguments"] == second["arguments"]
    assert "same (size, seed) (2, 0), got (3, 0); from process 1" in first["arguments"]
    assert "class must be 'EmpiricalFisher', got 'GradientSpectra'; from process 1" in first["class"]
    assert "class must be 'GradientSpectra', got 'EmpiricalFisher'; from process 0" in second["class"]
    assert first["nan"] == "state must be one that can be sent, got none from process 1 of the group"
    assert "must be finite" in second["nan"]
