"""Surgery on real adapters and on PEFT's, under the optimisers and groups that people train them with."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowra_adapters import adapters, attach
from flowra_allocation import balance, grow, keep, rebase
from flowra_allocation.forms import factors
from flowra_allocation.peft_layers import peft_layers
from flowra_testing.tiny_models import MLP, mlp, seeded

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02),
    "sgd_momentum": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.02),
    "adafactor_transformers": lambda groups: transformers.Adafactor(
        groups, lr=0.02, relative_step=False, scale_parameter=False
    ),
    "adamw8bit": lambda groups: bnb.optim.AdamW8bit(groups, lr=0.02, min_8bit_size=8),
}
METHODS = {"lora": "pair", "dora": "pair", "svd": "triplets", "svd_masked": "slots"}
ROWS = torch.linspace(-1, 1, 16).view(2, 8)
OPERATIONS: dict[str, Callable[..., None]] = {
    "keep": lambda layer, optimizer, **averages: keep(layer, [2, 0], optimizer, **averages),
    "keep_none": lambda layer, optimizer, **averages: keep(layer, [], optimizer, **averages),
    "grow": lambda layer, optimizer, **averages: grow(layer, ROWS, optimizer, **averages),
    "rebase": lambda layer, optimizer, **averages: rebase(
        layer, *balance(layer.lora_A, layer.lora_B), optimizer, **averages
    ),
}


def data() -> tuple[Tensor, Tensor]:
    with seeded(1):
        return torch.randn(9, 8), torch.randn(9, 3)


def step(model: nn.Module, optimizer: Optimizer) -> float:
    x, target = data()
    optimizer.zero_grad()
    loss = (model(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def held(optimizer: Optimizer) -> list[int]:
    return [id(each) for group in optimizer.param_groups for each in group["params"]]


def live(model: nn.Module) -> list[int]:
    return [id(each) for each in model.parameters() if each.requires_grad]


def trained(method: str, optimizer: str = "adamw") -> tuple[MLP, Any, Optimizer]:
    model = mlp()
    layers = attach(model, {"up": 3, "skip": 2}, method=method, scaling=2.0, modules_to_save=["head"])
    built = OPTIMIZERS[optimizer]([each for each in model.parameters() if each.requires_grad])
    for _ in range(3):
        step(model, built)
    return model, layers["up"], built


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("method", "operation"),
    [(method, each) for method, form in METHODS.items() for each in OPERATIONS if each != "rebase" or form == "pair"],
)
def test_the_optimiser_follows_and_training_goes_on(method: str, operation: str, optimizer: str) -> None:
    model, layer, built = trained(method, optimizer)
    OPERATIONS[operation](layer, built)
    assert sorted(held(built)) == sorted(live(model))
    assert {id(each) for each in built.state} <= set(live(model))
    losses = [step(model, built) for _ in range(4)]
    assert losses[-1] < losses[0]
    if operation == "keep_none":
        grow(layer, ROWS, built)
        assert sorted(held(built)) == sorted(live(model))
        assert not any(built.state.get(each) for each in factors(layer).values())
        before = {name: each.detach().clone() for name, each in layer.named_parameters()}
        step(model, built)
        step(model, built)
        assert all(not torch.equal(each, before[name]) for name, each in layer.named_parameters())


def test_the_magnitude_of_dora_is_forgotten_at_rank_0_and_trained_again_afterwards() -> None:
    model, layer, _ = trained("dora")
    optimizer = torch.optim.AdamW([(name, each) for name, each in model.named_parameters() if each.requires_grad])
    names = set(optimizer.param_groups[0]["param_names"])
    step(model, optimizer)
    magnitude = layer.lora_magnitude
    keep(layer, [], optimizer)
    assert id(magnitude) not in held(optimizer)
    assert magnitude not in optimizer.state
    grow(layer, ROWS, optimizer)
    assert sorted(held(optimizer)) == sorted(live(model))
    assert set(optimizer.param_groups[0]["param_names"]) == names
    named = dict(zip(optimizer.param_groups[0]["param_names"], held(optimizer), strict=True))
    assert named == {name: id(each) for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_with_a_frozen_a_the_rest_is_trained_on(method: str) -> None:
    model = mlp()
    layer: Any = attach(model, {"up": 3}, method=method, scaling=2.0)["up"]
    layer.lora_A.requires_grad_(False)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    step(model, optimizer)
    for operation in ("grow", "keep"):
        OPERATIONS[operation](layer, optimizer)
        assert not layer.lora_A.requires_grad
        assert layer.lora_B.requires_grad
        assert sorted(held(optimizer)) == sorted(live(model))
        step(model, optimizer)


@pytest.mark.parametrize(
    ("method", "operation"),
    [(method, each) for method, form in METHODS.items() for each in OPERATIONS if each != "rebase" or form == "pair"],
)
def test_an_average_of_the_whole_model_follows(method: str, operation: str) -> None:
    model, layer, optimizer = trained(method)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    OPERATIONS[operation](layer, optimizer, averages=[adapters(average.module)["up"]])
    names = {name: each.shape for name, each in model.named_parameters()}
    assert {name: each.shape for name, each in average.module.named_parameters()} == names
    x, _ = data()
    torch.testing.assert_close(average(x), model(x), rtol=1e-5, atol=1e-6)  # there has been one value so far
    for _ in range(2):
        step(model, optimizer)
        average.update_parameters(model)
    assert not torch.equal(average(x), model(x))


# PEFT.


def peft_mlp() -> PeftModel:
    with seeded(0):
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["up", "skip"])
        model = get_peft_model(mlp(), config)
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("cls", [torch.optim.AdamW, bnb.optim.AdamW8bit], ids=["adamw", "adamw8bit"])
def test_the_groups_of_lora_plus_stay(cls: type[Optimizer], operation: str) -> None:
    model = peft_mlp()
    optimizer = create_loraplus_optimizer(model, cls, lr=0.01, loraplus_lr_ratio=8.0)
    layer = peft_layers(model)["up"]
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.01, 1e-6, 0.08, 0.08]
    for _ in range(2):
        step(model, optimizer)
    OPERATIONS[operation](layer, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    groups = [[id(each) for each in group["params"]] for group in optimizer.param_groups]
    others = peft_layers(model)["skip"]
    assert groups == [[id(layer.lora_A), id(others.lora_A)], [], [id(layer.lora_B), id(others.lora_B)], []]
    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("operation", ["keep", "grow", "rebase"])
def test_the_optimiser_of_lora_fa_goes_on(operation: str) -> None:
    model = peft_mlp()
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=0.01)
    layer, other = (peft_layers(model)[name] for name in ("up", "skip"))
    step(model, optimizer)
    names, keys = list(optimizer.param_groups[0]["names"]), set(optimizer.state)
    state = optimizer.state[next(key for key in keys if "skip" in key)]
    before = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
    OPERATIONS[operation](layer, optimizer)
    assert optimizer.param_groups[0]["names"] == names
    assert set(optimizer.state) == keys
    by_name = dict(zip(names, held(optimizer), strict=True))
    assert by_name == {name: id(each) for name, each in model.named_parameters()}
    assert not layer.lora_A.requires_grad
    carried = optimizer.state[next(key for key in keys if "up" in key)]
    assert carried["exp_avg_B"].shape == carried["exp_avg_sq_B"].shape == layer.lora_B.shape
    assert all(torch.equal(value, state[key]) for key, value in before.items())
    frozen, moved, others = (each.detach().clone() for each in (layer.lora_A, layer.lora_B, other.lora_B))
    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert torch.equal(layer.lora_A, frozen)
    assert not torch.equal(layer.lora_B, moved)
    assert not torch.equal(other.lora_B, others)
