"""AdaLoRA on real adapters: step by step beside PEFT's, and the cut at the end; ``tests/allocation`` has stand-ins."""

import copy
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from flowra_adapters import SVDForm, attach, orthogonality
from flowra_allocation import AdaLoRA, Refiner, silence
from flowra_testing.stand_in_triplets import hang_triplets
from flowra_testing.tiny_models import batch, bert_classifier, mlp

TARGETS = ("query", "output.dense")
RANK, ALPHA, WEIGHT, LEARNING_RATE = 3, 6.0, 0.3, 0.02
T, INITIAL, FINAL, DELTA = 24, 3, 6, 3
METHODS = pytest.mark.parametrize("method", ["svd", "svd_masked"])


class Ours:
    """A tiny BERT with our updates, a refiner and an optimiser."""

    def __init__(self, method: str, dtype: torch.dtype, target_rank: int | None) -> None:
        self.model = bert_classifier().to(dtype)
        ranks = {name: RANK for name, _ in self.model.named_modules() if name.endswith(TARGETS)}
        self.layers = cast(dict[str, SVDForm], attach(self.model, ranks, method=method, alpha=ALPHA))
        costs = {name: layer.cost(1) for name, layer in self.layers.items()}
        self.refiner = Refiner(
            self.model,
            self.layers,
            policy=AdaLoRA(
                total_steps=T, tinit=INITIAL, tfinal=FINAL, delta_t=DELTA, target_rank=target_rank, kappa=3.0
            ),
            costs=costs,
            caps=dict.fromkeys(ranks, RANK),
            budget=target_rank * max(costs.values()) if target_rank else sum(costs.values()),
        )
        trained = [each for layer in self.layers.values() for each in layer.parameters()]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def train_one(self, data: dict[str, Tensor], weight: float) -> float:
        """Take a step up to the event that may follow it, and return its loss."""
        self.optimizer.zero_grad()
        loss = self.model(**data).loss + weight * orthogonality(self.layers.values())
        loss.backward()
        self.optimizer.step()
        self.refiner.before_zero_grad()
        return float(loss.detach())

    def train(self, data: dict[str, Tensor], weight: float, *, until: int = T) -> Iterator[float]:
        """Yield the loss of each step, its event held."""
        for step in range(1, until + 1):
            loss = self.train_one(data, weight)
            self.refiner.after_step(step, self.optimizer)
            yield loss


class Judge:
    """The same with PEFT's AdaLoRA."""

    def __init__(self, like: Ours, target_rank: int) -> None:
        config = AdaLoraConfig(
            init_r=RANK,
            lora_alpha=ALPHA,
            target_modules=list(like.layers),
            tinit=INITIAL,
            tfinal=FINAL,
            deltaT=DELTA,
            total_step=T,
            orth_reg_weight=WEIGHT,
        )
        self.tuner = get_peft_model(bert_classifier().double(), config).double().base_model
        self.tuner.rankallocator.target_bgt = target_rank  # PEFT has it as a whole number for each module
        self.layers: dict[str, nn.Module] = {name: self.tuner.model.get_submodule(name) for name in like.layers}
        for name, layer in like.layers.items():
            lora_A, lora_E, lora_B = (each.detach()[: len(each)] for each in layer.triplets())
            for factor, value in (("lora_A", lora_A), ("lora_E", lora_E[:, None]), ("lora_B", lora_B)):
                getattr(self.layers[name], factor)["default"].data.copy_(value)
        # unless the base is float32, PEFT also trains the number that divides the scale; ours is a constant
        trained = [each for name, each in self.tuner.model.named_parameters() if "lora_" in name]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def train(self, data: dict[str, Tensor], weight: float) -> Iterator[float]:
        """Yield the loss of each step, with PEFT's own regulariser or without."""
        for step in range(1, T + 1):
            loss = (self.tuner if weight else self.tuner.model)(**data).loss  # the outer one adds it
            loss.backward()
            self.optimizer.step()
            if step == T - FINAL:
                self.tuner.rankallocator.update_ipt(self.tuner.model)  # ours counts the last step, too
            self.tuner.rankallocator.update_and_allocate(self.tuner.model, step)
            self.optimizer.zero_grad()
            yield float(loss.detach())

    def ranks(self) -> dict[str, int]:
        """Count the triplets that are not silent."""
        return {name: int(layer.lora_E["default"].count_nonzero()) for name, layer in self.layers.items()}


@METHODS
def test_the_stand_ins_of_the_unit_tests_answer_and_learn_as_the_adapters_do(method: str) -> None:
    real, stand_in, ranks = mlp(dtype=torch.float64), mlp(dtype=torch.float64), {"up": 2, "down": 0, "skip": 1}
    layers = cast(dict[str, SVDForm], attach(real, ranks, method=method, scaling=2.0))
    others = hang_triplets(stand_in, ranks, slots=5 if method == "svd_masked" else None)
    generator = torch.Generator().manual_seed(3)
    for name, layer in layers.items():
        assert (layer.scaling, layer.cost(1)) == (others[name].scaling, others[name].cost_per_rank)
        lora_A, _, lora_B = (each.detach().clone() for each in layer.triplets())
        lora_E = torch.randn(layer.rank, generator=generator, dtype=torch.float64)
        layer.replace_factors(lora_A, lora_B, lora_E)
        for factor, value in (("lora_A", lora_A), ("lora_E", lora_E), ("lora_B", lora_B)):
            free = getattr(others[name], factor).data
            (free[:, : layer.rank] if factor == "lora_B" else free[: layer.rank]).copy_(value)
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(real(x), stand_in(x))
    for model in (real, stand_in):
        model(x).square().sum().backward()
    for name in ("up", "skip"):
        for factor in ("lora_A", "lora_E", "lora_B"):
            mine, its = (getattr(each[name], factor).grad for each in (layers, others))
            cut = tuple(slice(size) for size in map(min, mine.shape, its.shape))
            torch.testing.assert_close(mine[cut], its[cut])
            assert its.abs().sum() == pytest.approx(its[cut].abs().sum())


@METHODS
def test_losses_of_every_step_are_peft_s_before_and_after_the_cut(method: str) -> None:
    ours, data = Ours(method, torch.float64, target_rank=5), batch(num_labels=3, size=8)
    judge = Judge(ours, target_rank=5)
    losses = list(zip(ours.train(data, 0.0), judge.train(data, 0.0), strict=True))
    assert losses[0][0] > losses[-1][0]
    for mine, its in losses:
        assert mine == pytest.approx(its, rel=1e-9)
    events = ours.refiner.history.events
    assert events[-1].step == T - FINAL
    assert all(event.silenced for event in events[:-1])
    assert {name: layer.rank for name, layer in ours.layers.items()} == judge.ranks()


def test_losses_with_the_regulariser_are_peft_s_until_the_cut() -> None:
    ours, data = Ours("svd", torch.float64, target_rank=5), batch(num_labels=3, size=8)
    judge = Judge(ours, target_rank=5)
    steps = zip(range(T - FINAL), ours.train(data, WEIGHT), judge.train(data, WEIGHT), strict=False)
    for _, mine, its in steps:  # afterwards PEFT's still holds the silent rows orthogonal to the others
        assert mine == pytest.approx(its, rel=1e-9)
    assert ours.refiner.frozen
    assert {name: layer.rank for name, layer in ours.layers.items()} == judge.ranks()


@METHODS
def test_the_cut_leaves_the_output_of_the_silenced_model_unchanged(method: str) -> None:
    ours, data = Ours(method, torch.float32, target_rank=None), batch(num_labels=3, size=8)
    list(ours.train(data, WEIGHT, until=T - FINAL - 1))
    ours.train_one(data, WEIGHT)
    moves = ours.refiner.policy.decide(ours.refiner._snapshot(T - FINAL))
    silenced = copy.deepcopy(ours)
    for name, kept in moves.keep.items():
        layer = silenced.layers[name]
        silence(layer, [index for index in range(layer.rank) if index not in kept])
    event = ours.refiner.after_step(T - FINAL, ours.optimizer)
    assert event is not None
    assert event.dropped
    assert event.parameters <= event.budget < event.parameters + max(layer.cost(1) for layer in ours.layers.values())
    with torch.no_grad():
        expected, found = (each.model(**data).logits for each in (silenced, ours))
    assert (expected - found).abs().max() <= 1e-6 * expected.abs().max()
    for layer in ours.layers.values():
        assert len(layer.lora_E) == (layer.max_rank if method == "svd_masked" else layer.rank)
