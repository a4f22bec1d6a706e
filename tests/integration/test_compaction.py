"""From slots to tensors as large as the ranks, and the optimiser with them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from flowra_adapters import MaskedSVDForm, SVDForm, adapters, attach, compact, disable, merge, unmerge
from flowra_allocation import grow, hand_over, keep
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import MLP, mlp, seeded

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9),
    "plain_sgd": lambda groups: torch.optim.SGD(groups, lr=0.02),
}


def moved() -> tuple[MLP, dict[str, MaskedSVDForm]]:
    """A model whose directions lie in other slots than their order says; ``skip`` has rank 0."""
    model = mlp(dtype=torch.float64)
    layers: Any = attach(model, {"up": 4, "down": 2, "skip": 1}, method="svd_masked", modules_to_save=["head"])
    for seed, layer in enumerate(layers.values()):
        randomise(layer, seed=seed)
    layers["up"].shrink([3, 1, 2])
    layers["up"].grow(torch.eye(8, dtype=torch.float64)[:1])
    with torch.no_grad():
        layers["up"].lora_E[layers["up"].slots()[-1]] = 0.7
    layers["skip"].shrink([])
    assert layers["up"].slots() == [3, 1, 2, 0]
    return model, layers


def data() -> Tensor:
    with seeded(1):
        return torch.randn(9, 8, dtype=torch.float64)


def test_a_compacted_model_answers_and_merges_as_before() -> None:
    (model, _), (other, _) = moved(), moved()
    x = data()
    before = model(x)
    replaced = compact(model)
    assert list(replaced) == ["up", "down", "skip"]
    assert {name: one.rank for name, one in adapters(model).items()} == {"up": 4, "down": 2}
    assert all(type(one) is SVDForm for one in adapters(model).values())
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-13)
    assert sum(each.numel() for each in adapters(model)["up"].parameters()) == 4 * (8 + 12 + 1)
    for each in (model, other):
        merge(each)
    for name in ("up", "down", "skip"):
        weights = (each.get_submodule(name).weight for each in (model, other))
        torch.testing.assert_close(*weights, rtol=0, atol=1e-14)


def test_an_update_of_rank_0_is_taken_off_with_its_hooks() -> None:
    model, _ = moved()
    untouched = dict(vars(mlp().skip))
    compact(model)
    assert not hasattr(model.skip, "adapters")
    assert not model.skip._forward_hooks
    assert not model.skip._forward_pre_hooks
    assert vars(model.skip).keys() == untouched.keys()


def test_what_was_set_on_an_update_stays_and_others_are_left_alone() -> None:
    model, layers = moved()
    lora = attach(model, {"up": 2}, method="lora", adapter="other")["up"]
    layers["up"].lora_A.requires_grad_(False)
    disable(model, "default")
    compact(model.train())
    one = adapters(model)["up"]
    assert not one.enabled
    assert one.training
    frozen = {name: not each.requires_grad for name, each in one.named_parameters()}
    assert frozen == {"lora_A": True, "lora_E": False, "lora_B": False}
    assert int(one.get_buffer("seed")) == int(layers["up"].seed)
    assert adapters(model, "other")["up"] is lora
    with pytest.raises(ValueError, match="adapter must be of method 'svd_masked' to be compacted, got 'other'"):
        compact(model, "other")


def test_a_merged_model_can_be_compacted_and_unmerged() -> None:
    model, _ = moved()
    x = data()
    before = model(x)
    merge(model)
    compact(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-13)
    unmerge(model)
    assert torch.equal(model.up.weight, mlp(dtype=torch.float64).up.weight)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-13)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """``torch.distributed`` with this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_inside_a_wrapper_is_refused(group_of_one: None) -> None:
    model, _ = moved()
    with pytest.raises(ValueError, match="model must not be wrapped to be compacted, got one under DistributedDataPar"):
        compact(DistributedDataParallel(model))
    assert all(isinstance(one, MaskedSVDForm) for one in adapters(model).values())


# The optimiser.


class Run:
    """Training whose directions come and go; the head is the second of three groups."""

    def __init__(self, optimizer: str) -> None:
        self.model, self.layers = moved()
        groups = [
            {"params": list(self.layers["up"].parameters()), "lr": 0.01},
            {"params": list(self.model.head.parameters())},
            {"params": [each for name in ("down", "skip") for each in self.layers[name].parameters()]},
        ]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.5, 10)
        self.train(3)
        keep(self.layers["up"], [1, 3, 0], self.optimizer)
        grow(self.layers["down"], torch.eye(12, dtype=torch.float64)[:1], self.optimizer)
        self.train(2)

    def train(self, steps: int) -> None:
        x = data()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def tensors(self) -> dict[str, Tensor]:
        """Merged weights and the head."""
        merge(self.model)
        return {name: each.detach() for name, each in self.model.named_parameters() if ".adapters." not in name}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("at_once", [False, True], ids=["layer by layer", "whole model"])
def test_training_goes_on_as_it_would_have(optimizer: str, at_once: bool) -> None:
    run, other = Run(optimizer), Run(optimizer)
    if at_once:
        fresh = Run(optimizer).model
        fresh.load_state_dict(run.model.state_dict())
        compact(fresh)
        hand_over(run.optimizer, run.model, fresh)
        run.model = fresh
    else:
        for old, new in compact(run.model).values():
            hand_over(run.optimizer, old, new)
    held = [{id(each) for each in group["params"]} for group in run.optimizer.param_groups]
    assert held == [{id(each) for each in run.model.get_submodule(name).parameters()} for name in
                    ("up.adapters", "head", "down.adapters")]  # fmt: skip
    assert {id(each) for each in run.optimizer.state} <= set().union(*held)
    for each in (run, other):
        each.train(4)
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.01 * 0.55, 0.02 * 0.55, 0.02 * 0.55]
    expected = other.tensors()
    for name, tensor in run.tensors().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-13)


def test_directions_take_their_moments_along_in_their_order() -> None:
    run = Run("adamw")
    slots = run.layers["up"].slots()
    before = {name: run.optimizer.state[each]["exp_avg"] for name, each in run.layers["up"].named_parameters()}
    old, new = compact(run.model)["up"]
    hand_over(run.optimizer, old, new)
    after = {name: run.optimizer.state[each]["exp_avg"] for name, each in new.named_parameters()}
    assert torch.equal(after["lora_A"], before["lora_A"][slots])
    assert torch.equal(after["lora_E"], before["lora_E"][slots])
    assert torch.equal(after["lora_B"], before["lora_B"][:, slots])
    assert run.optimizer.state[new.lora_A]["step"] == 5


def test_a_layer_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    run = Run("adamw")
    held = [[id(each) for each in group["params"]] for group in run.optimizer.param_groups]
    other, _ = moved()
    with pytest.raises(
        ValueError, match=r"new must have the parameters of old, got \[4, 8\] for 'lora_A' of shape \[3, 8"
    ):
        hand_over(run.optimizer, run.layers["up"], compact(other)["up"][1])
    with pytest.raises(ValueError, match=r"new must have the parameters of old, got none for 'lora_A' of shape \[3, 8"):
        hand_over(run.optimizer, run.layers["up"], nn.Linear(8, 12))
    assert [[id(each) for each in group["params"]] for group in run.optimizer.param_groups] == held
