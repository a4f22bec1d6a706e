"""InfLoRA: A fixed from the new inputs, off the memory."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from flowra_compose import ModuleStatistics, TaskMemory, start_inflora
from flowra_testing.past_tasks import input_statistics
from flowra_testing.stand_in_adapter import StandInAdapter, hang
from flowra_testing.tiny_models import MLP, mlp

RANKS = {"up": 3, "down": 2, "skip": 2}
SHAPES = {"up": (12, 8), "down": (6, 12), "skip": (6, 8)}


def inputs(size: int, seed: int) -> Tensor:
    return torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))


def task() -> tuple[MLP, dict[str, StandInAdapter], Tensor, TaskMemory, dict[str, ModuleStatistics]]:
    model, past, new = mlp(), inputs(4, 1), inputs(64, 2)
    memory = TaskMemory.empty(SHAPES).after(input_statistics(model, SHAPES, lambda: model(past)), energy=1.0)
    statistics = input_statistics(model, SHAPES, lambda: model(new))
    return model, hang(model, RANKS), past, memory, statistics


def unchanged(layers: Mapping[str, StandInAdapter], before: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(layer.lora_A, before[name]) for name, layer in layers.items())


@pytest.mark.parametrize("tasks", [0, 1])
def test_a_is_made_of_the_leading_directions_of_the_new_inputs_off_the_memory(tasks: int) -> None:
    _, layers, _, memory, statistics = task()
    memory = memory if tasks else TaskMemory.empty(SHAPES)
    start_inflora(layers, memory, statistics)
    for name, layer in layers.items():
        u = memory.modules[name].basis.double()
        off = torch.eye(len(u)).double() - u @ u.T
        c = statistics[name].inputs
        assert c is not None
        leading = torch.linalg.eigh(off @ c @ off).eigenvectors.flip(1)[:, : RANKS[name]]
        cosines = (layer.lora_A.double() @ leading).abs() * math.sqrt(3)
        torch.testing.assert_close(cosines, torch.eye(RANKS[name]).double(), rtol=0, atol=1e-5)
        if tasks:
            assert (layer.lora_A.double() @ u).abs().max() <= 1e-6
        assert not layer.lora_A.requires_grad
        assert layer.lora_B.requires_grad


def test_training_b_alone_leaves_past_outputs_and_learns() -> None:
    model, layers, past, memory, statistics = task()
    start_inflora(layers, memory, statistics)
    before, fixed = model(past).detach(), {name: layer.lora_A.clone() for name, layer in layers.items()}
    optimizer = AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05, weight_decay=0.1)
    x, y = inputs(64, 2), torch.randn(64, 3, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert unchanged(layers, fixed)
    torch.testing.assert_close(model(past), before, rtol=0, atol=1e-5)


def test_more_rows_than_new_directions_are_refused_and_nothing_is_changed() -> None:
    _, layers, _, memory, statistics = task()
    before = {name: layer.lora_A.clone() for name, layer in layers.items()}
    base = mlp()
    few = statistics | input_statistics(base, ["skip"], lambda: base(inputs(1, 9)))
    message = r"rank must be at most the 1 directions that the new inputs have off the memory, got 2 at 'skip'"
    with pytest.raises(ValueError, match=message):
        start_inflora(layers, memory, few)
    assert unchanged(layers, before)
    assert all(layer.lora_A.requires_grad for layer in layers.values())


def test_what_does_not_fit_is_refused() -> None:
    _, layers, _, memory, statistics = task()
    with pytest.raises(ValueError, match=r"statistics must have inputs \(12, 12\) for 'down', got None"):
        start_inflora(layers, memory, {name: each for name, each in statistics.items() if name != "down"})
    with pytest.raises(ValueError, match=r"statistics must have inputs \(8, 8\) for 'up', got \(12, 12\)"):
        start_inflora(layers, memory, statistics | {"up": statistics["down"]})
    layers["down"].lora_B.data += 1
    with pytest.raises(ValueError, match="lora_B must be zero at the start, got another at 'down'"):
        start_inflora(layers, memory, statistics)
