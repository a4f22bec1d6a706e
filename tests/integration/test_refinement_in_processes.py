"""Two processes that train one model: one decision, the same bits in both, and what one process would have done."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowra_testing import trainer_child
from flowra_testing.refining_child import POLICIES, SCENARIOS, Result, run

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    path = os.pathsep.join(each for each in sys.path if each)
    return {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what each of them ended with."""
    folder = tmp_path_factory.mktemp("refined")
    command = [sys.executable, "-m", "flowra_testing.refining_child", str(folder)]
    children = [subprocess.Popen([*command, str(rank)], env=environment()) for rank in (0, 1)]
    try:
        assert [child.wait(timeout=300) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    return folder


@cache
def alone(policy: str) -> Result:
    """What one process makes of the whole batches, never compacted."""
    return run(policy, "alone")


def assert_same_bits(folder: Path, name: str) -> dict[str, Tensor]:
    first, second = (load_file(folder / f"{name}.{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert any(key.startswith("gradient/") for key in first)
    for key, each in first.items():
        assert torch.equal(each, second[key]), key
    return first


def histories(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


def moves(history: Mapping[str, Any]) -> list[Any]:
    """What happened, without the numbers that decided."""
    keys = ("step", "ranks", "parameters", "budget", "dropped", "admitted", "silenced")
    return [{key: event[key] for key in keys} for event in history["events"]]


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_processes_have_the_same_decisions_tensors_and_gradients(name: str, folder: Path) -> None:
    assert_same_bits(folder, name)
    first, second = histories(folder, name)
    assert first == second


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_end_where_one_does_on_whole_batches_also_if_compacted_at_the_freeze(
    name: str, folder: Path
) -> None:
    policy, _, _ = SCENARIOS[name]
    expected = alone(policy)
    assert moves(histories(folder, name)[0]) == moves(json.loads(json.dumps(expected.history)))
    found = load_file(folder / f"{name}.update.0.safetensors")
    assert found.keys() == expected.update.keys()
    rtol = 1e-6 if policy == "breathe" else 1e-12  # sketches of gradients are float32
    for key, each in expected.update.items():
        torch.testing.assert_close(found[key], each, rtol=0, atol=rtol * float(each.abs().max()), msg=key)


@pytest.mark.parametrize("policy", POLICIES)
def test_rank_moves_in_every_run(policy: str) -> None:
    history = alone(policy).history
    assert any(event["dropped"] for event in history["events"])
    assert history["events"][-1]["ranks"] != history["initial"]


def test_resizing_and_compacting_what_is_wrapped_is_refused_on_every_process(folder: Path) -> None:
    problems, others = (json.loads((folder / f"problems.{rank}.json").read_text()) for rank in (0, 1))
    assert problems == others
    for name in ("pairs", "triplets"):
        assert "layers must have slots where the model is wrapped, got 'up' in 2 processes" in problems.pop(name)
    for name in ("keep-lora", "grow-lora", "keep-svd", "grow-svd"):
        assert "layer must have slots to be resized, got" in problems.pop(name)
    for name in (f"{what}-{form}" for what in ("replace", "shrink", "append") for form in ("lora", "svd")):
        assert "factors must be whole to be replaced, got sharded ones" in problems.pop(name)
    assert "got one under DistributedDataParallel. Pass its module" in problems.pop("compact-ddp")
    assert "got one that is sharded over processes" in problems.pop("compact-fsdp")
    assert not problems


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes of ``transformers.Trainer`` under torchrun left what each of them ended with."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    child = subprocess.Popen([*command, "flowra_testing.trainer_child", str(folder)], env=environment())
    try:
        assert child.wait(timeout=300) == 0
    finally:
        child.terminate()
    return folder


def test_in_a_trainer_under_torchrun_both_processes_have_the_same_bits(trained: Path) -> None:
    assert_same_bits(trained, "whole")
    first, second = histories(trained, "whole")
    assert first == second
    assert any(event["dropped"] for event in first["events"])
    assert any(event["admitted"] for event in first["events"])


def test_in_a_trainer_under_torchrun_a_resumed_run_ends_with_the_bits_of_the_whole_run(trained: Path) -> None:
    whole, resumed = assert_same_bits(trained, "whole"), assert_same_bits(trained, "resumed")
    assert whole.keys() == resumed.keys()
    for key, each in whole.items():
        assert torch.equal(each, resumed[key]), key
    assert histories(trained, "whole") == histories(trained, "resumed")


def test_in_a_trainer_under_torchrun_two_processes_end_where_one_does(trained: Path, tmp_path: Path) -> None:
    tensors, history = trainer_child.train(tmp_path, batch_size=8)
    found = load_file(trained / "whole.0.safetensors")
    assert moves(histories(trained, "whole")[0]) == moves(json.loads(json.dumps(history)))
    assert found.keys() == tensors.keys()
    for key, each in tensors.items():
        torch.testing.assert_close(found[key], each, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_in_a_trainer_under_torchrun_layers_that_are_resized_are_refused(trained: Path) -> None:
    for rank in (0, 1):
        problem = (trained / f"problem.{rank}").read_text()
        assert problem.startswith("layers must have slots where the model is wrapped, got 'bert.encoder.layer.0.")
        assert "in 2 processes" in problem
