"""Penalties against dense oracles in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowra_compose import (
    LowRankUpdate,
    ModuleStatistics,
    TaskMemory,
    kfac_penalty,
    o_lora_penalty,
    orthogonality_penalty,
)
from flowra_testing.past_tasks import moment

SHAPES = {"a": (4, 6), "b": (5, 3)}
PENALTIES = [kfac_penalty, o_lora_penalty, orthogonality_penalty]
Layers = dict[str, Any]


@dataclass
class Pair:
    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.5


def pairs(*, rank: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Layers:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Pair(
            torch.randn(rank, n, generator=generator, dtype=dtype).requires_grad_(),
            torch.randn(m, rank, generator=generator, dtype=dtype).requires_grad_(),
        )
        for name, (m, n) in SHAPES.items()
    }


def remembered(tasks: int, *, seed: int = 50) -> tuple[TaskMemory, list[dict[str, ModuleStatistics]]]:
    """Return a memory of tasks with adapters of rank 1, 2, …, and what it was made of."""
    memory, given_statistics = TaskMemory.empty(SHAPES), []
    for task in range(tasks):
        statistics = {
            name: ModuleStatistics(inputs=moment(n, n, seed=seed + task), outputs=moment(m, m, seed=seed - task))
            for name, (m, n) in SHAPES.items()
        }
        given_statistics.append(statistics)
        memory = memory.after(statistics, past(task))
    return memory, given_statistics


def past(task: int) -> dict[str, LowRankUpdate]:
    generator = torch.Generator().manual_seed(task)
    return {
        name: LowRankUpdate(torch.randn(task + 1, n, generator=generator), torch.ones(m, task + 1))
        for name, (m, n) in SHAPES.items()
    }


# Values.


@given(tasks=st.integers(1, 3), rank=st.integers(1, 3), seed=st.integers(0, 5))
def test_the_kfac_penalty_is_half_the_curvature_of_the_update(tasks: int, rank: int, seed: int) -> None:
    layers, (memory, _) = pairs(rank=rank, seed=seed), remembered(tasks)
    expected = torch.zeros((), dtype=torch.float64)
    for name, layer in layers.items():
        module = memory.modules[name]
        delta = layer.scaling * layer.lora_B @ layer.lora_A
        fisher = torch.kron(module.outputs.double(), module.inputs.double())
        expected = expected + 0.5 * delta.flatten() @ fisher @ delta.flatten()
    torch.testing.assert_close(kfac_penalty(layers, memory), expected, rtol=1e-12, atol=0)


@given(tasks=st.integers(2, 3), seed=st.integers(0, 5))
def test_the_kfac_penalty_bounds_the_sum_of_the_tasks_own(tasks: int, seed: int) -> None:
    layers, (memory, given_statistics) = pairs(seed=seed), remembered(tasks)
    own = 0.0
    for statistics in given_statistics:
        for name, layer in layers.items():
            delta = layer.scaling * layer.lora_B @ layer.lora_A
            own += 0.5 * (delta.T @ statistics[name].outputs @ delta @ statistics[name].inputs).trace().item()
    assert kfac_penalty(layers, memory).item() >= own


@given(tasks=st.integers(1, 3), rank=st.integers(1, 3), seed=st.integers(0, 5))
def test_the_others_sum_inner_products_of_rows_over_past_adapters(tasks: int, rank: int, seed: int) -> None:
    layers, (memory, _) = pairs(rank=rank, seed=seed), remembered(tasks)
    products = [
        old.double() @ new.detach()
        for task in range(tasks)
        for name, layer in layers.items()
        for old in past(task)[name].lora_A
        for new in layer.lora_A
    ]
    absolute, squared = sum(abs(each) for each in products), sum(each**2 for each in products)
    torch.testing.assert_close(o_lora_penalty(layers, memory).detach(), absolute, rtol=1e-12, atol=0)
    torch.testing.assert_close(orthogonality_penalty(layers, memory).detach(), squared, rtol=1e-12, atol=0)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_finite_differences(penalty: Callable[..., Tensor], seed: int) -> None:
    memory, _ = remembered(2)
    layers = pairs(seed=seed)
    leaves = [each for layer in layers.values() for each in (layer.lora_A, layer.lora_B)]

    def value(*factors: Tensor) -> Tensor:
        given_pairs = {name: Pair(*factors[2 * i : 2 * i + 2]) for i, name in enumerate(SHAPES)}
        return penalty(given_pairs, memory)

    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_is_zero_before_the_first_task_has_ended(penalty: Callable[..., Tensor]) -> None:
    assert penalty(pairs(), TaskMemory.empty(SHAPES)).item() == 0.0


@pytest.mark.parametrize("penalty", [o_lora_penalty, orthogonality_penalty])
def test_rows_off_those_of_past_adapters_cost_nothing(penalty: Callable[..., Tensor]) -> None:
    layers, (memory, _) = pairs(), remembered(1)
    for name, layer in layers.items():
        row = torch.nn.functional.normalize(memory.modules[name].rows.double(), dim=1)
        layer.lora_A = layer.lora_A - layer.lora_A @ row.T @ row
    assert penalty(layers, memory).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_half_precision_factors_are_penalised_in_float32(penalty: Callable[..., Tensor]) -> None:
    memory, _ = remembered(1)
    found = penalty(pairs(dtype=torch.bfloat16), memory)
    assert found.dtype == torch.float32
    found.backward()


def test_descending_on_it_makes_adapters_orthogonal() -> None:
    layers, (memory, _) = pairs(rank=1, seed=3), remembered(1)
    factors = [layer.lora_A for layer in layers.values()]
    for _ in range(200):
        for factor, gradient in zip(
            factors, torch.autograd.grad(orthogonality_penalty(layers, memory), factors), strict=True
        ):
            factor.data -= 0.02 * gradient
    assert orthogonality_penalty(layers, memory).item() < 1e-6
    assert min(factor.norm().item() for factor in factors) > 0.1


# What is refused.


def test_a_memory_without_curvature_is_refused() -> None:
    memory = TaskMemory.empty(SHAPES).after({
        name: ModuleStatistics(inputs=torch.eye(n)) for name, (_, n) in SHAPES.items()
    })
    with pytest.raises(ValueError, match=r"memory must hold outputs for the K-FAC penalty, got none\. Give S"):
        kfac_penalty(pairs(), memory)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_layers_that_the_memory_does_not_know_are_refused(penalty: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="layers must be modules of the memory, got 'c'"):
        penalty({"c": pairs()["a"]}, TaskMemory.empty(SHAPES))
    with pytest.raises(ValueError, match="layers must have the shapes of the memory"):
        penalty({"a": pairs()["b"]}, TaskMemory.empty(SHAPES))
