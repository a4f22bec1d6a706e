"""Training off the memory: past outputs stay, whatever the new task learns."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Muon, NAdam, Optimizer, RAdam

from flowra_compose import LowRankUpdate, NullSpace, TaskMemory, merge_updates
from flowra_compose.null_space import projected
from flowra_testing.past_tasks import input_statistics
from flowra_testing.stand_in_adapter import StandInAdapter, hang
from flowra_testing.tiny_models import MLP, mlp

RANKS = {"up": 3, "down": 2, "skip": 2}
SHAPES = {"up": (12, 8), "down": (6, 12), "skip": (6, 8)}
OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW": lambda parameters: AdamW(parameters, lr=0.05, weight_decay=0.1),
    "AMSGrad": lambda parameters: AdamW(parameters, lr=0.05, amsgrad=True),
    "NAdam": lambda parameters: NAdam(parameters, lr=0.05),
    "RAdam": lambda parameters: RAdam(parameters, lr=0.05),
    "SGD": lambda parameters: SGD(parameters, lr=0.05),
    "momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "Muon": lambda parameters: Muon(parameters, lr=0.05),
    "Adafactor": lambda parameters: Adafactor(parameters, lr=0.05),
}


def inputs(size: int, seed: int) -> Tensor:
    return torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))


def trained(layers: Mapping[str, StandInAdapter]) -> list[nn.Parameter]:
    return [each for layer in layers.values() for each in layer.parameters()]


def train(
    model: nn.Module,
    layers: Mapping[str, StandInAdapter],
    space: NullSpace | None,
    *,
    make: Callable[[list[nn.Parameter]], Optimizer] = OPTIMIZERS["AdamW"],
    steps: int = 20,
    seed: int = 7,
) -> Optimizer:
    """Learn random answers to random inputs."""
    optimizer = make(trained(layers))
    x, y = inputs(32, seed), torch.randn(32, 3, generator=torch.Generator().manual_seed(seed + 1))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if space is not None:
            space.after_step(optimizer)
    return optimizer


def remembered(model: nn.Module, past: Tensor) -> TaskMemory:
    return TaskMemory.empty(SHAPES).after(input_statistics(model, SHAPES, lambda: model(past)), energy=1.0)


def task(seed: int = 1) -> tuple[MLP, dict[str, StandInAdapter], Tensor, TaskMemory]:
    """Return a model with new pairs, four inputs of a past task, and the memory of these."""
    model = mlp()
    past = inputs(4, seed)
    memory = remembered(model, past)
    return model, hang(model, RANKS), past, memory


# The projection.


def test_the_projection_gives_the_golden_numbers() -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "flowra_nullspace.json").read_text())
    u, a, x, expected = (
        torch.tensor(golden[key], dtype=torch.float64)
        for key in ("memory_basis", "A", "x_in_memory_span", "A_projected")
    )
    found = projected(a, u)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert (found @ u).abs().max() <= 1e-8 + golden["max_abs_A_U"]
    torch.testing.assert_close(found @ x, torch.tensor(golden["response"]).double(), rtol=0, atol=1e-8)


@given(r=st.integers(0, 4), n=st.integers(1, 9), k=st.integers(0, 9), seed=st.integers(0, 9))
def test_the_projection_takes_off_what_lies_in_the_span_and_nothing_else(r: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, n, generator=generator, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(n, min(k, n), generator=generator, dtype=torch.float64)).Q
    found = projected(a, u)
    torch.testing.assert_close(found @ u, torch.zeros(r, min(k, n)).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(a - found, (a - found) @ u @ u.T, rtol=0, atol=1e-12)


# Guarantees.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_a_new_task_leaves_past_outputs_and_learns(name: str) -> None:
    model, layers, past, memory = task()
    space = NullSpace(layers, memory)
    space.start()
    with torch.no_grad():
        before, elsewhere = model(past), model(inputs(5, 3))
    train(model, layers, space, make=OPTIMIZERS[name])
    assert max(space.overlaps().values()) <= 1e-6
    with torch.no_grad():
        torch.testing.assert_close(model(past), before, rtol=0, atol=1e-5)
        assert (model(inputs(5, 3)) - elsewhere).abs().max() > 5e-3


def test_without_the_projection_the_same_training_changes_past_outputs() -> None:
    model, layers, past, memory = task()
    NullSpace(layers, memory).start()
    before = model(past)
    train(model, layers, None)
    assert (model(past) - before).abs().max() > 0.05


def test_every_step_ends_off_the_memory_and_so_does_the_first_moment() -> None:
    model, layers, _, memory = task()
    space = NullSpace(layers, memory)
    space.start()
    for steps in (1, 2, 5):
        optimizer = train(model, layers, space, steps=steps)
        assert max(space.overlaps().values()) <= 1e-6
        for name, layer in layers.items():
            first = optimizer.state[layer.lora_A]["exp_avg"].double()
            assert steps == 1 or first.abs().max() > 1e-6  # B = 0 before the first step, so A has no gradient
            assert (first @ memory.modules[name].basis.double()).abs().max() <= 1e-6 * max(1, first.abs().max())


def test_three_tasks_one_after_another_leave_all_past_outputs() -> None:
    model = mlp()
    memory, kept, k = TaskMemory.empty(SHAPES), [], [dict.fromkeys(SHAPES, 0)]
    for number in range(3):
        layers = hang(model, RANKS)
        space = NullSpace(layers, memory)
        space.start()
        train(model, layers, space, seed=20 + number)
        space.check()
        fold(model, layers)
        past = inputs(2 if number == 0 else 1, number)
        kept.append((past, model(past).detach()))
        memory = memory.after(input_statistics(model, SHAPES, lambda past=past: model(past)), energy=1.0)
        k.append({name: each.rank for name, each in memory.modules.items()})
        for inputs_then, outputs_then in kept:
            torch.testing.assert_close(model(inputs_then), outputs_then, rtol=0, atol=1e-5)
    assert k == [dict.fromkeys(SHAPES, each) for each in (0, 2, 3, 4)]


def fold(model: nn.Module, layers: Mapping[str, StandInAdapter]) -> None:
    """Put pairs into the weights and take them off."""
    for name, layer in layers.items():
        linear = model.get_submodule(name)
        linear.weight.data += layer.scaling * (layer.lora_B @ layer.lora_A).detach()
        linear._forward_hooks.clear()
        del linear.stand_in


def test_the_first_task_is_ordinary_training_bit_by_bit() -> None:
    ends = []
    for projecting in (True, False):
        model = mlp()
        layers = hang(model, RANKS)
        space = NullSpace(layers, TaskMemory.empty(SHAPES)) if projecting else None
        if space is not None:
            space.start()
        optimizer = train(model, layers, space)
        ends.append([*trained(layers), *(optimizer.state[each]["exp_avg"] for each in trained(layers))])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*ends, strict=True))


@pytest.mark.parametrize("projecting", [True, False])
def test_adapters_trained_apart_and_off_one_another_sum_without_interference(projecting: bool) -> None:
    first = mlp()
    first_layers = hang(first, RANKS)
    train(first, first_layers, None, seed=40)
    past = inputs(4, 1)
    alone = first(past).detach()
    memory = remembered(first, past)
    second = mlp()
    second_layers = hang(second, RANKS)
    space = NullSpace(second_layers, memory)
    space.start()
    train(second, second_layers, space if projecting else None, seed=50)
    merged = merge_updates([values(first_layers), values(second_layers)], [1.0, 1.0], rule="cat")
    both = mlp()
    with torch.no_grad():
        for name, update in merged.items():
            both.get_submodule(name).weight += update.delta_weight()
        if projecting:
            torch.testing.assert_close(both(past), alone, rtol=0, atol=1e-5)
        else:
            assert (both(past) - alone).abs().max() > 0.05


def values(layers: Mapping[str, StandInAdapter]) -> dict[str, LowRankUpdate]:
    return {
        name: LowRankUpdate(layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling)
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("energy", [0.8, 0.95, 0.99])
def test_of_inputs_that_are_held_in_part_the_output_moves_by_no_more_than_the_rest_of_their_energy(
    energy: float,
) -> None:
    x = inputs(64, 5) @ torch.diag(0.6 ** torch.arange(8.0))
    model = mlp()
    statistics = input_statistics(model, ["skip"], lambda: model(x))
    memory = TaskMemory.empty({"skip": (6, 8)}).after(statistics, energy=energy, cap=1.0)
    layers = hang(model, {"skip": 2})
    space = NullSpace(layers, memory)
    space.start()
    train(model, layers, space)
    layer = layers["skip"]
    moved = layer(x).square().sum(1).mean().sqrt()
    size = layer.scaling * torch.linalg.matrix_norm(layer.lora_B @ layer.lora_A, 2)
    root = x.square().sum(1).mean().sqrt()
    assert 0 < moved <= size * (1 - memory.modules["skip"].kept[0] + 1e-6) ** 0.5 * root
    assert memory.modules["skip"].kept[0] >= energy


# The start.


def test_rows_start_off_the_memory_in_their_own_lengths_and_b_stays_zero() -> None:
    _, layers, _, memory = task()
    lengths = {name: layer.lora_A.detach().norm(dim=1) for name, layer in layers.items()}
    space = NullSpace(layers, memory)
    with pytest.raises(ValueError, match=r"A U must be zero to 1e-06, got .* at 'up'\. Call start\(\)"):
        space.check()
    space.start()
    space.check()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.lora_A.detach().norm(dim=1), lengths[name])
        assert not layer.lora_B.any()


def test_rows_can_start_from_the_leading_directions_of_gradients_off_the_memory() -> None:
    _, layers, _, memory = task()
    gradients = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    NullSpace(layers, memory).start(gradients)
    for name, layer in layers.items():
        u = memory.modules[name].basis.double()
        off = gradients[name].double() @ (torch.eye(len(u)).double() - u @ u.T)
        leading = torch.linalg.svd(off).Vh[: RANKS[name]]
        cosines = (layer.lora_A.double() @ leading.T * 3**0.5).abs()
        torch.testing.assert_close(cosines, torch.eye(RANKS[name]).double(), rtol=0, atol=1e-5)
        assert (layer.lora_A.double() @ u).abs().max() <= 1e-6


def test_where_a_gradient_has_fewer_directions_the_last_rows_are_those_that_were_there() -> None:
    _, layers, _, memory = task()
    other = copy.deepcopy(layers)
    gradients = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    gradients["up"] = torch.outer(torch.ones(12), torch.linspace(-1, 1, 8))
    NullSpace(layers, memory).start(gradients)
    NullSpace(other, memory).start()
    assert torch.equal(layers["up"].lora_A[1:], other["up"].lora_A[1:])
    assert not torch.equal(layers["up"].lora_A[0], other["up"].lora_A[0])
    assert torch.equal(layers["down"].lora_A, other["down"].lora_A)


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda layers: layers["down"].lora_B.data.fill_(1.0),
            "lora_B must be zero at the start, got another at 'down'",
        ),
        (lambda layers: layers["down"].lora_A.data.zero_(), "lora_A must have rows off the memory, got one .* 'down'"),
    ],
)
def test_a_start_that_cannot_be_is_refused_and_nothing_is_changed(
    change: Callable[[Any], object], message: str
) -> None:
    _, layers, _, memory = task()
    change(layers)
    before = [each.clone() for each in trained(layers)]
    with pytest.raises(ValueError, match=message):
        NullSpace(layers, memory).start()
    assert all(torch.equal(mine, was) for mine, was in zip(trained(layers), before, strict=True))


@pytest.mark.parametrize("gradients", [{}, {"up": torch.ones(8, 12)}, {"up": torch.full((12, 8), torch.nan)}])
def test_gradients_that_do_not_fit_are_refused(gradients: dict[str, Tensor]) -> None:
    _, layers, _, memory = task()
    with pytest.raises(ValueError, match=r"gradients must be finite \(12, 8\) for 'up', got"):
        NullSpace(layers, memory).start(gradients)


class Averaging(AdamW):
    """Remembers a copy of each parameter."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        super().step(closure)
        for each in self.param_groups[0]["params"]:
            self.state[each]["z"] = each.detach().clone()


def test_an_optimiser_whose_state_is_not_understood_is_refused() -> None:
    model, layers, _, memory = task()
    space = NullSpace(layers, memory)
    space.start()
    with pytest.raises(ValueError, match=r"moments as those of AdamW, got \['z'\] of 'up' in Averaging\. Use AdamW"):
        train(model, layers, space, make=Averaging)
    with pytest.raises(ValueError, match=r"optimizer must hold lora_A of each layer itself, got AdamW without 'down'"):
        train(model, layers, space, make=lambda parameters: AdamW(parameters[:2]))


def test_a_factor_that_is_not_trained_needs_no_optimiser() -> None:
    model, layers, _, memory = task()
    space = NullSpace(layers, memory)
    space.start()
    for layer in layers.values():
        layer.lora_A.requires_grad_(False)
    before = [layer.lora_A.clone() for layer in layers.values()]
    train(model, layers, space, make=lambda _: AdamW([layer.lora_B for layer in layers.values()]))
    assert all(torch.equal(layer.lora_A, was) for layer, was in zip(layers.values(), before, strict=True))


def test_layers_that_do_not_fit_are_refused() -> None:
    _, layers, _, memory = task()
    with pytest.raises(ValueError, match="layers must hold at least one pair, got none"):
        NullSpace({}, memory)
    with pytest.raises(ValueError, match="layers must be modules of the memory, got 'other'"):
        NullSpace({"other": layers["up"]}, memory)
    with pytest.raises(ValueError, match=r"layers must have the shapes of the memory, \(12, 8\), got \(6, 12\)"):
        NullSpace({"up": layers["down"]}, memory)
    layers["up"].bfloat16()
    with pytest.raises(ValueError, match=r"lora_A must be float32 or float64, and whole, got torch\.bfloat16"):
        NullSpace(layers, memory)
    layers["down"].lora_magnitude = nn.Parameter(torch.ones(6))
    with pytest.raises(ValueError, match=r"pairs s · B A, got StandInAdapter with lora_magnitude at 'down'"):
        NullSpace({"down": layers["down"]}, memory)


def test_training_anything_else_is_refused_unless_it_is_named_or_nothing_is_remembered() -> None:
    model, layers, _, memory = task()
    model.head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"must be frozen, got \['head.weight', 'head.bias'\]"):
        NullSpace(layers, memory).check_alone(model)
    NullSpace(layers, memory).check_alone(model, model.head.parameters())
    NullSpace(layers, TaskMemory.empty(SHAPES)).check_alone(model)
    with pytest.raises(ValueError, match="layers must be part of the model that is trained, got 'up'"):
        NullSpace(layers, memory).check_alone(mlp())


def test_a_nan_is_not_off_the_memory() -> None:
    _, layers, _, memory = task()
    space = NullSpace(layers, memory)
    space.start()
    layers["skip"].lora_A.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"A U must be zero to .*, got nan at 'skip'"):
        space.check()
