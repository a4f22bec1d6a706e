"""Observation, surgery and refinement on real adapters; ``tests/allocation`` has them on a stand-in."""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from flowra_adapters import LoRA, attach, merge
from flowra_allocation import BottleneckObserver, Breathe, RefinementSchedule, Refiner, balance, grow, keep, rebase
from flowra_allocation.trainer_callback import RefinementCallback
from flowra_testing.explicit_grams import assert_same, explicit, losses
from flowra_testing.stand_in_adapter import hang
from flowra_testing.tiny_models import MLP, batch, bert_classifier, mlp, seeded

RANKS = {"bert.encoder.layer.0.attention.self.query": 3, "bert.encoder.layer.1.output.dense": 2, "bert.pooler.dense": 2}


def attach_lora(model: nn.Module, ranks: Mapping[str, int], **options: Any) -> dict[str, LoRA]:  # noqa: ANN401 - passed on
    return cast(dict[str, LoRA], attach(model, ranks, **options))


def observed_bert(
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,  # noqa: ANN401 - passed on
) -> tuple[BertForSequenceClassification, dict[str, LoRA]]:
    model = bert_classifier().to(dtype)
    layers = attach_lora(model, RANKS, **options)
    with seeded(7):
        for layer in layers.values():
            layer.lora_B.data.normal_()
    return model, layers


# The stand-in.


def test_the_stand_in_of_the_unit_tests_answers_and_learns_as_lora_does() -> None:
    ranks = {"up": 2, "down": 0, "skip": 1}
    real, stand_in = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    layers, others = attach_lora(real, ranks), hang(stand_in, ranks)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A, others[name].lora_A)
        assert torch.equal(layer.lora_B, others[name].lora_B)
        assert (layer.scaling, layer.cost_per_rank) == (others[name].scaling, others[name].cost_per_rank)
        layer.lora_B.data.normal_()
        others[name].replace_factors(layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
    x = torch.randn(5, 8, dtype=torch.float64)
    outputs = [model(x) for model in (real, stand_in)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for name in ("up", "skip"):
        torch.testing.assert_close(layers[name].lora_A.grad, others[name].lora_A.grad)
        torch.testing.assert_close(layers[name].lora_B.grad, others[name].lora_B.grad)
    assert layers["down"].lora_B.grad is others["down"].lora_B.grad is None


# Observation.


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("options", [{"scaling": 1.5}, {"method": "rslora", "alpha": 4.0}], ids=["lora", "rslora"])
def test_grams_are_those_of_each_example_s_own_loss_without_padding(options: dict[str, Any], loss: Any) -> None:  # noqa: ANN401
    model, layers = observed_bert(**options)
    data = batch(num_labels=3)
    with BottleneckObserver(model, layers, loss=loss) as observer:
        getattr(losses(model, data), loss)().backward()
    assert_same(observer.total(), explicit(model, layers, data))


@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_gradient_checkpointing_counts_once(reentrant: bool) -> None:
    model, layers = observed_bert()
    data = batch(num_labels=3)
    expected = explicit(model, layers, data)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # transformers 5 renames it
    model.enable_input_require_grads()
    with BottleneckObserver(model, layers, loss="mean") as observer:
        losses(model, data).mean().backward()
    assert_same(observer.total(), expected)


@pytest.mark.parametrize("sketch", [False, True], ids=["grams", "with_sketch"])
def test_observing_changes_loss_and_gradient_by_rounding_alone(sketch: bool) -> None:
    data, found = batch(num_labels=3), []
    for observed in (False, True):  # unobserved, the update is fused into the layer, or folded into its weight
        model, layers = observed_bert(dtype=torch.float32, scaling=1.5)
        generator = torch.Generator().manual_seed(0)
        observer = BottleneckObserver(model, layers, loss="mean", sketch=sketch, generator=generator)
        with observer if observed else nullcontext():
            loss = model(**data).loss
            loss.backward()
        found.append([loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)])
    assert len(found[0]) == 1 + 2 * len(RANKS)
    for plain, watched in zip(*found, strict=True):
        assert (plain - watched).abs().max() <= 1e-5 * plain.abs().max()


# Surgery.

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups),
    "adamw_fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "sgd_momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
}
ROWS = torch.linspace(-1, 1, 16).view(2, 8)
OPERATIONS: dict[str, Callable[[LoRA, Optimizer | None], None]] = {
    "grow": lambda layer, optimizer: grow(layer, ROWS, optimizer),
    "keep": lambda layer, optimizer: keep(layer, [2, 0], optimizer),
    "keep_none": lambda layer, optimizer: keep(layer, [], optimizer),
    "rebase": lambda layer, optimizer: rebase(layer, *balance(layer.lora_A, layer.lora_B), optimizer),
}
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Trained:
    """An MLP after three steps: its head is the first of two parameter groups, its adapters are the second."""

    def __init__(self, optimizer: str = "adamw") -> None:
        self.model = mlp()
        self.layers = attach_lora(self.model, {"up": 3, "skip": 2}, modules_to_save=["head"])
        self.layer = self.layers["up"]
        with seeded(1):
            self.x, self.target = torch.randn(9, 8), torch.randn(9, 3)
        groups = [{"params": list(self.model.head.parameters())}, {"params": self.factors(), "lr": 0.02}]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        for _ in range(3):
            self.step()

    def factors(self) -> list[nn.Parameter]:
        """The live factors, in order."""
        return [each for layer in self.layers.values() for each in (layer.lora_A, layer.lora_B)]

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = (self.model(self.x) - self.target).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_surgery_keeps_the_optimiser_on_the_live_factors_and_training_goes_on(operation: str, optimizer: str) -> None:
    run = Trained(optimizer)
    before, scaling = run.model(run.x).detach(), run.layer.scaling
    state = [
        {key: value.clone() for key, value in run.optimizer.state[each].items() if key in MOMENTS}
        for each in run.factors()
    ]
    OPERATIONS[operation](run.layer, run.optimizer)
    assert [id(each) for each in run.optimizer.param_groups[1]["params"]] == [id(each) for each in run.factors()]
    assert {id(each) for each in run.optimizer.state} <= {id(each) for each in run.model.parameters()}
    assert run.layer.scaling == scaling
    moments = [{key: run.optimizer.state[each][key] for key in state[0]} for each in run.factors()]
    for key, old in state[0].items():
        assert [held[key].shape for held in moments] == [each.shape for each in run.factors()]
        if operation == "keep":
            assert torch.equal(moments[0][key], old[[2, 0]])
            assert torch.equal(moments[1][key], state[1][key][:, [2, 0]])
        if operation == "grow":
            assert torch.equal(moments[0][key][:3], old)
            assert torch.equal(moments[1][key][:, :3], state[1][key])
        assert torch.equal(moments[2][key], state[2][key])  # the other layer's
    if operation in ("grow", "rebase"):
        assert (run.model(run.x) - before).abs().max() <= 1e-6 * before.abs().max()
    old = [each.detach().clone() for each in run.factors()]
    run.step()
    assert all(each.numel() == 0 or not torch.equal(each, was) for each, was in zip(run.factors(), old, strict=True))


def test_surgery_resizes_as_the_adapter_itself_does() -> None:
    one = Trained().layer
    for by_surgery, by_itself in (
        (OPERATIONS["grow"], lambda layer: layer.grow(ROWS)),
        (OPERATIONS["keep"], lambda layer: layer.shrink([2, 0])),
    ):
        first, second = copy.deepcopy(one), copy.deepcopy(one)
        by_surgery(first, None)
        by_itself(second)
        assert torch.equal(first.lora_A, second.lora_A)
        assert torch.equal(first.lora_B, second.lora_B)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_frozen_adapter_stays_frozen(operation: str) -> None:
    layer = Trained().layer.requires_grad_(False)
    OPERATIONS[operation](layer, None)
    assert not any(each.requires_grad for each in layer.parameters())


# Refinement.

SCHEDULE = RefinementSchedule(start=2, freeze=14, events=4, observe=2)


def refiner_of(
    model: nn.Module, layers: Mapping[str, LoRA], *, spare: int, schedule: RefinementSchedule = SCHEDULE
) -> Refiner:
    costs = {name: layer.cost_per_rank for name, layer in layers.items()}
    caps = {name: min(layer.delta_weight().shape) for name, layer in layers.items()}
    budget = sum(costs[name] * layer.rank for name, layer in layers.items()) + spare
    return Refiner(model, layers, costs=costs, caps=caps, budget=budget, policy=Breathe(schedule=schedule, share=0.2))


@pytest.mark.parametrize("fresh_head", [False, True], ids=["adapters_alone", "with_a_head"])
@pytest.mark.parametrize(
    ("ranks", "spare"),
    [
        ({"up": 2, "down": 2, "skip": 1}, 0),
        ({"up": 0, "down": 2, "skip": 1}, 40),  # the first layer starts without a graph in front of it
        ({"up": 3, "down": 0}, 20),
    ],
)
def test_refinement_moves_rank_inside_the_budget_and_the_result_merges(
    ranks: dict[str, int], spare: int, fresh_head: bool
) -> None:
    model: MLP = mlp()
    layers = attach_lora(model, ranks, modules_to_save=["head"] if fresh_head else [])
    refiner = refiner_of(model, layers, spare=spare)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    with seeded(1):
        x, target = torch.randn(16, 8), torch.randn(16, 3)
    first = (model(x) - target).square().mean().item()
    for step in range(14):
        refiner.before_step(step)
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        before = model(x).detach()
        event = refiner.after_step(step + 1, optimizer)
        if event and not event.dropped:
            assert (model(x) - before).abs().max() <= 1e-6 * before.abs().max()
        held = [id(each) for group in optimizer.param_groups for each in group["params"]]
        assert sorted(held) == sorted(id(each) for each in model.parameters() if each.requires_grad)
        assert {id(each) for each in optimizer.state} <= set(held)
    history = refiner.finish()
    assert tuple(event.step for event in history.events) == SCHEDULE.steps
    assert any(event.ranks != ranks for event in history.events)
    assert history.events[-1].ranks == {name: layer.rank for name, layer in layers.items()}
    assert history.events[-1].admitted == {}
    for event in history.events:
        used = sum(layer.cost_per_rank * event.ranks[name] for name, layer in layers.items())
        assert used == event.parameters <= history.budget
    assert all(layer.observer is None for layer in layers.values())
    unmerged = model(x).detach()
    assert (unmerged - target).square().mean() < first
    merge(model)
    torch.testing.assert_close(model(x), unmerged)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Twenty-four padded rows with labels."""

    def __init__(self) -> None:
        self.data = batch(size=24, length=7, num_labels=3)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: each[index] for key, each in self.data.items()}


def test_inside_a_trainer_ranks_move_inside_the_budget_and_the_optimiser_follows(tmp_path: Path) -> None:
    model = bert_classifier(training=True)
    layers = attach_lora(model, {"*.query": 2, "*.value": 2, "*.output.dense": 0})
    schedule = RefinementSchedule(start=2, freeze=10, events=4, observe=2)
    refiner = refiner_of(model, layers, spare=40, schedule=schedule)
    ranks = []

    class Watch(TrainerCallback):
        def on_step_end(self, *arguments: object, optimizer: Optimizer | None = None, **kwargs: object) -> None:
            assert optimizer is not None
            held = {id(each) for group in optimizer.param_groups for each in group["params"]}
            assert held == {id(each) for layer in layers.values() for each in (layer.lora_A, layer.lora_B)}
            ranks.append({name: layer.rank for name, layer in layers.items()})

    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, seed=0,
        save_strategy="no", logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callbacks = [RefinementCallback(refiner), Watch()]
    Trainer(model=model, args=settings, train_dataset=Rows(), callbacks=callbacks).train()
    history = refiner.history
    assert tuple(event.step for event in history.events) == schedule.steps
    assert all(event.parameters <= history.budget for event in history.events)
    assert any(event.admitted for event in history.events)
    assert any(event.dropped for event in history.events)
    assert ranks[:3] == [history.initial] * 3
    for event in history.events:
        assert ranks[event.step - 1] == event.ranks
    assert ranks[9:] == [history.events[-1].ranks] * 3
