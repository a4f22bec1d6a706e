"""What several processes add up and decide, and models whose ranks must not change by new Parameters.

Whole runs in two processes are in ``tests/integration/test_refinement_in_processes.py``.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flowra_allocation import Breathe, Moves, RefinementSchedule, Refiner
from flowra_allocation.processes import added_up, decided_once, several
from flowra_testing.deciding_child import CPU, gathered, moves, plain_of, tensors_of
from flowra_testing.stand_in_adapter import hang
from flowra_testing.tiny_models import mlp

# Two processes.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they were told."""
    folder = tmp_path_factory.mktemp("decided")
    path = os.pathsep.join(each for each in sys.path if each)
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "flowra_testing.deciding_child", str(folder)]
    children = [subprocess.Popen([*command, str(rank)], env=environment) for rank in (0, 1)]
    try:
        assert [child.wait(timeout=120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    return folder


def told(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{rank}.json").read_text())
    return found


def test_both_processes_have_the_same_bits(folder: Path) -> None:
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    for key, each in first.items():
        assert torch.equal(each, second[key]), key
    assert told(folder, 0)["moves"] == told(folder, 1)["moves"]


@pytest.mark.parametrize(("loss", "share"), [("mean", 2), ("sum", 1)])
def test_sums_are_added_up_and_gradients_of_mean_losses_averaged_while_probes_stay(
    loss: str, share: int, folder: Path
) -> None:
    found = load_file(folder / "0.safetensors")
    first, second = gathered(0), gathered(1)
    for name, tensors in first.items():
        for key, mine in tensors.items():
            expected = mine + second[name][key] if key in ("activations", "gradients", "counts", "y", "z") else mine
            expected = expected / share if key in ("y", "z") else expected
            assert torch.equal(found[f"{loss}/{name}/{key}"], expected), key


def test_the_first_process_decides_and_the_others_are_told_exactly(folder: Path) -> None:
    for rank in (0, 1):
        found = load_file(folder / f"{rank}.safetensors")
        for name, each in tensors_of(moves(0)).items():
            assert torch.equal(found[name], each.double()), name
        assert told(folder, rank)["moves"] == json.loads(json.dumps(plain_of(moves(0))))
        assert told(folder, rank)["empty"] is None


def test_a_decision_that_fails_on_the_first_process_fails_on_all(folder: Path) -> None:
    first, second = told(folder, 0), told(folder, 1)
    assert first["undecided"] == ["ZeroDivisionError", "division by zero"]
    assert second["undecided"] == ["ValueError", "division by zero; on the first process"]
    assert first["unsendable"][0] == "TypeError"
    assert second["unsendable"] == ["ValueError", f"{first['unsendable'][1]}; on the first process"]


def test_a_group_of_one_process_decides_by_itself(folder: Path) -> None:
    for rank in (0, 1):
        assert told(folder, rank)["several"] == [True, False, True]
        assert told(folder, rank)["groups"] == [90 + rank, 90]


# One process.


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """``torch.distributed`` with this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_other_processes_nothing_is_sent() -> None:
    mine, own = gathered(0), Moves(budget=3)
    assert not several()
    assert added_up(mine, loss="mean", device=CPU) == mine
    assert decided_once(lambda: own, device=CPU) is own


def refiner_of(model: nn.Module, layers: Any) -> Refiner:  # noqa: ANN401
    costs = {name: layer.cost_per_rank for name, layer in layers.items()}
    schedule = RefinementSchedule(start=0, freeze=4, events=2, observe=1)
    return Refiner(
        model, layers, policy=Breathe(schedule=schedule), costs=costs, caps=dict.fromkeys(costs, 4), budget=1000
    )


def test_resizing_under_distributed_data_parallel_is_refused(group_of_one: None) -> None:
    model = mlp()
    layers = hang(model, {"up": 2, "down": 1})
    named = {f"module.{name}": layer for name, layer in layers.items()}
    with pytest.raises(ValueError, match=r"got 'module.up' under DistributedDataParallel. Attach with method 'svd_mas"):
        refiner_of(DistributedDataParallel(model), named)


@pytest.mark.parametrize("how", ["returned", "in place", "a part in place"])
def test_resizing_in_a_compiled_model_is_refused_at_birth_and_before_the_first_step(how: str) -> None:
    model = mlp()
    layers = hang(model, {"up": 2, "down": 1})
    early = refiner_of(model, layers)
    if how == "returned":
        compiled = torch.compile(model, backend="eager")
        assert isinstance(compiled, nn.Module)
        with pytest.raises(ValueError, match=r"got '_orig_mod.up' in a compiled model"):
            refiner_of(compiled, {f"_orig_mod.{name}": layer for name, layer in layers.items()})
        early.before_step(0)  # the model itself does not know
        return
    (model if how == "in place" else model.up).compile(backend="eager")
    with pytest.raises(ValueError, match="layers must have slots where the model is wrapped, got 'up' in a compiled"):
        refiner_of(model, layers)
    with pytest.raises(ValueError, match="got 'up' in a compiled model"):
        early.before_step(0)


def test_what_the_trainer_will_compile_is_refused_too() -> None:
    model = mlp()
    refiner = refiner_of(model, hang(model, {"up": 2, "down": 1}))
    refiner.check_wrapping()
    with pytest.raises(ValueError, match="got 'up' in a compiled model"):
        refiner.check_wrapping(compiled=True)
