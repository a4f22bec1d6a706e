"""Bottlenecks of real adapters that are no plain linear layers."""

import pytest
import torch
from torch import nn

from flowra_adapters import attach
from flowra_allocation import BottleneckObserver, Breathe, RefinementSchedule, Refiner, Shrink


def grouped() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(8, 12, 3, groups=2)), torch.randn(4, 8, 10)


def test_the_groups_of_a_convolution_are_tokens_of_one_gram() -> None:
    model, x = grouped()
    layers = attach(model, {"0": 2}, scaling=1.0)
    layer = layers["0"]
    layer.lora_B.data.normal_()
    with BottleneckObserver(model, layers, loss="sum") as observer:
        model(x).square().sum().backward()
    gram = observer.total()["0"]
    assert gram.activations.shape == (2, 2)
    assert gram.tokens == 4 * 8 * 2  # examples, positions, groups
    z = layer.operator.down(x, layer.lora_A).unflatten(1, (2, 2)).movedim(2, -1).flatten(0, -2).double()
    torch.testing.assert_close(gram.activations, z.T @ z, rtol=1e-5, atol=1e-5)


def test_a_grouped_convolution_shrinks_by_flow() -> None:
    model, x = grouped()
    layers = attach(model, {"0": 3}, scaling=1.0)
    costs = {"0": layers["0"].cost_per_rank}
    policy = Shrink(schedule=RefinementSchedule(start=0, freeze=4, events=2, observe=1), measure="flow", kappa=3.0)
    refiner = Refiner(model, layers, policy=policy, costs=costs, caps={"0": 3}, budget=costs["0"])
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    for step in range(4):
        refiner.before_step(step)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        refiner.after_step(step + 1, optimizer)
    assert refiner.finish().events[-1].ranks == {"0": 1}


def test_an_update_in_the_weight_s_place_is_not_taken_for_worthless() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    layers = attach(model, {"in_proj_weight:q": 2, "in_proj_weight:v": 2}, scaling=1.0)
    x = torch.randn(3, 5, 8)
    with BottleneckObserver(model, layers, loss="mean") as observer:
        model(x, x, x)[0].square().mean().backward()
    with pytest.raises(ValueError, match=r"layers must show their bottleneck .* got none from 'in_proj_weight:q'"):
        observer.total()


def test_breathing_refuses_a_convolution_before_training() -> None:
    model, _ = grouped()
    layers = attach(model, {"0": 2}, scaling=1.0)
    policy = Breathe(schedule=RefinementSchedule(start=0, freeze=8, events=2))
    with pytest.raises(ValueError, match="layers must be linear where new directions follow the gradient, got Conv1d"):
        Refiner(model, layers, policy=policy, costs={"0": 24}, caps={"0": 3}, budget=48)
