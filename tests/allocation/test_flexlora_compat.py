"""FlexLoRA as published: golden decisions, its mistakes included, and what its trainer does to the optimiser."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowra_allocation import (
    FlexLoRACompat,
    FlexLoRASchedule,
    LayerView,
    NewTriplets,
    RefinementError,
    Refiner,
    Snapshot,
    rebuilt_optimizer,
)
from flowra_testing.stand_in_triplets import StandInTriplets

FOLDER = Path(__file__).parents[1] / "golden"
CASES = {case["name"]: case for case in json.loads((FOLDER / "flexlora_step.json").read_text())["cases"]}
RESET = json.loads((FOLDER / "flexlora_optimizer_reset.json").read_text())
THAT_RUN = [name for name, case in CASES.items() if case["error"] is None]


def policy_of(b: int, *, optimizer_reset: bool = False, events: int = 1) -> FlexLoRACompat:
    schedule = FlexLoRASchedule(total_steps=events + 1, warmup=0, final=0, interval=1, b0=b, decay="constant")
    return FlexLoRACompat(schedule=schedule, optimizer_reset=optimizer_reset)


class Golden:
    """The updates of one case, under a refiner."""

    def __init__(self, name: str) -> None:
        self.case: Any = CASES[name]
        self.layers: dict[str, StandInTriplets] = {}
        for index, given in enumerate(self.case["inputs"]):
            lora_A, lora_E, lora_B = (torch.tensor(given[key]) for key in "AEB")
            scaling = self.case["lora_alpha"] / (len(lora_E) + 1e-5)
            self.layers[str(index)] = StandInTriplets(lora_A, lora_E, lora_B, scaling=scaling)
        self.x = torch.tensor(self.case["x"])

    def refiner(self, *, policy: FlexLoRACompat | None = None, budget: int = 1000, cap: int = 9) -> Refiner:
        return Refiner(
            nn.ModuleDict(self.layers),
            self.layers,
            costs={name: layer.cost_per_rank for name, layer in self.layers.items()},
            caps=dict.fromkeys(self.layers, cap),
            budget=budget,
            policy=policy or policy_of(self.case["b"]),
        )

    def snapshot(self, *, step: int = 1, seed: int = 0) -> Snapshot:
        return snapshot_of(
            {
                name: (each.lora_A.detach(), each.lora_E.detach(), each.lora_B.detach())
                for name, each in self.layers.items()
            },
            step=step,
            seed=seed,
        )


def snapshot_of(layers: Mapping[str, tuple[Tensor, Tensor, Tensor]], *, step: int = 1, seed: int = 0) -> Snapshot:
    views = {
        name: LayerView(lora_A=a, lora_E=e, lora_B=b, cost=a.shape[1] + len(b) + 1, cap=99)
        for name, (a, e, b) in layers.items()
    }
    return Snapshot(step=step, layers=views, budget=10_000, seed=seed)


# Decisions.


@pytest.mark.parametrize("name", THAT_RUN)
def test_an_event_ends_with_the_written_values_and_changes_outputs_as_written(name: str) -> None:
    golden = Golden(name)
    before = {key: layer(golden.x) for key, layer in golden.layers.items()}
    refiner = golden.refiner()
    event = refiner.after_step(1, None)
    assert event is not None
    for written in golden.case["per_matrix"]:
        key = str(written["index"])
        layer = golden.layers[key]
        assert layer.rank == written["rank_after"]
        assert layer.lora_E.tolist() == pytest.approx(written["E_after"], abs=1e-9)
        change = (layer(golden.x) - before[key]).abs().max().item()
        assert change == pytest.approx(written["forward_max_abs_change"], abs=1e-6)
        score = event.importance.get(key, math.nan)  # those without a score are left out
        assert score == pytest.approx(float(written["importance"]), abs=1e-6, nan_ok=True)


def test_the_signed_smallest_leaves_even_if_it_is_the_largest() -> None:
    golden = Golden("negative_E_pruned_wrongly")
    moves = policy_of(1).decide(golden.snapshot())
    assert moves.keep == {"0": (0, 2)}


def test_one_update_can_lose_and_gain_at_one_event() -> None:
    moves = policy_of(2).decide(Golden("b2_overlap").snapshot())
    assert set(moves.keep) == {"0", "1"}
    assert set(moves.admit) == {"2", "1"}


def test_an_update_of_rank_one_scores_nan_and_gains() -> None:
    moves = policy_of(1).decide(Golden("rank1_nan").snapshot())
    assert list(moves.admit) == ["0"]
    assert "0" not in moves.importance


def test_where_all_are_zero_the_same_update_loses_and_gains() -> None:
    moves = policy_of(1).decide(Golden("all_zero_init").snapshot())
    assert moves.keep.keys() == moves.admit.keys()
    assert moves.importance == {}


def test_a_b_above_the_number_of_updates_is_an_error_at_the_event_and_before_training() -> None:
    golden = Golden("b_too_large")
    assert golden.case["error"] == "RuntimeError: selected index k out of range"
    with pytest.raises(RefinementError, match=r"b must be ≤ 2, .* got 3; step 1\. .*selected index k out of range"):
        policy_of(3).decide(golden.snapshot())
    with pytest.raises(ValueError, match=r"b must be ≤ 2, the number of updates of rank ≥ 2, got 3; step 0\."):
        golden.refiner()


def test_new_vectors_are_standard_normal_and_fixed_by_seed_and_step() -> None:
    torch.manual_seed(0)
    wide = {name: (torch.randn(2, 4000), torch.tensor(values), torch.randn(3000, 2)) for name, values in
            {"a": [1.0, 0.1], "b": [1.0, 1.0]}.items()}  # fmt: skip
    found = [policy_of(1).decide(snapshot_of(wide, step=1, seed=seed)).admit["b"] for seed in (0, 0, 1)]
    assert all(isinstance(each, NewTriplets) for each in found)
    first, again, other = (each for each in found if isinstance(each, NewTriplets))
    assert torch.equal(first.lora_A, again.lora_A)
    assert not torch.equal(first.lora_A, other.lora_A)
    assert first.lora_E.tolist() == [0.0]
    assert float(first.lora_A.std()) == pytest.approx(1, abs=0.05)
    assert float(first.lora_B.std()) == pytest.approx(1, abs=0.05)


# What the released code does not ask.


def test_parameters_drift_above_the_budget_and_the_history_says_so() -> None:
    golden = Golden("all_positive")
    dear = golden.layers["2"]  # it scores highest
    lora_A = torch.cat([dear.lora_A.detach()] * 2, 1)
    golden.layers["2"] = StandInTriplets(lora_A, dear.lora_E.detach(), dear.lora_B.detach(), scaling=1.0)
    budget = sum(layer.cost_per_rank * layer.rank for layer in golden.layers.values())
    refiner = golden.refiner(budget=budget)
    event = refiner.after_step(1, None)
    assert event is not None
    assert sum(event.ranks.values()) == sum(refiner.history.initial.values())
    assert event.parameters == event.budget == budget + 5


def test_exceeding_a_largest_rank_is_an_error() -> None:
    golden = Golden("all_positive")
    with pytest.raises(
        ValueError, match=r"caps must leave room for what the released code adds, got \['2'\] at theirs"
    ):
        golden.refiner(cap=3).after_step(1, None)


def test_pairs_and_updates_of_rank_zero_are_refused() -> None:
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    pair = LayerView(lora_A=a, lora_B=b, cost=7, cap=3)
    empty = LayerView(lora_A=a[:0], lora_E=a[:0, 0], lora_B=b[:, :0], cost=8, cap=3)
    policy = policy_of(1)
    with pytest.raises(ValueError, match=r"layers must be updates of triplets, got pairs; \['x'\]\. Attach them in"):
        policy.check(Snapshot(step=0, layers={"x": pair}, budget=99, seed=0))
    with pytest.raises(ValueError, match=r"layers must have rank ≥ 1, got 0; \['y'\]\. Leave them out, or"):
        policy.check(Snapshot(step=0, layers={"y": empty}, budget=99, seed=0))
    with pytest.raises(ValueError, match="layers must hold at least one update"):
        policy.check(Snapshot(step=0, layers={}, budget=99, seed=0))


# Its trainer.


class Fifty:
    """Two updates and a head after fifty steps of AdamW under a falling learning rate, as when the facts were taken."""

    def __init__(self, *, optimizer_reset: bool) -> None:
        golden = Golden("all_positive")
        self.layers = {name: golden.layers[name] for name in ("0", "2")}
        self.head = nn.Linear(4, 1)
        groups = [
            {"params": [each for layer in self.layers.values() for each in layer.parameters()], "weight_decay": 0.05},
            {"params": list(self.head.parameters()), "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)  # what that fork's AdamW has by default
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / 100)
        self.x = golden.x
        self.refiner = Refiner(
            nn.ModuleDict(self.layers),
            self.layers,
            costs={name: layer.cost_per_rank for name, layer in self.layers.items()},
            caps=dict.fromkeys(self.layers, 9),
            budget=1000,
            policy=FlexLoRACompat(
                schedule=FlexLoRASchedule(total_steps=52, warmup=49, final=0, interval=1, b0=1, decay="constant"),
                optimizer_reset=optimizer_reset,
            ),
        )
        for step in range(50):
            self.refiner.before_step(step)
            self.optimizer.zero_grad()
            self.head(sum(layer(self.x) for layer in self.layers.values())).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            if step < 49:
                self.refiner.after_step(step + 1, self.optimizer)
        self.with_state = len(self.optimizer.state)
        self.factors = nn.ModuleDict(self.layers)
        self.named = dict(self.factors.named_parameters())

    def learning_rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


def test_before_the_event_all_is_as_when_the_facts_were_taken() -> None:
    run = Fifty(optimizer_reset=False)
    assert run.with_state == RESET["params_with_state_before"]
    assert run.learning_rates() == pytest.approx(RESET["group_lr_before"])
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == RESET["group_weight_decay_before"]


def test_with_the_reset_all_parameters_lose_their_state_but_groups_and_scheduler_go_on() -> None:
    run = Fifty(optimizer_reset=True)
    run.refiner.after_step(50, run.optimizer)
    assert len(run.optimizer.state) == RESET["params_with_state_after"]
    assert run.learning_rates() == pytest.approx(RESET["group_lr_before"])
    run.scheduler.step()
    assert run.learning_rates() == pytest.approx([0.0049, 0.0049])
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == RESET["group_weight_decay_before"]


def test_without_the_reset_the_state_moves_along() -> None:
    run = Fifty(optimizer_reset=False)
    run.refiner.after_step(50, run.optimizer)
    assert len(run.optimizer.state) == RESET["params_with_state_before"]


def test_the_event_replaces_the_factors_of_both_updates() -> None:
    run = Fifty(optimizer_reset=True)
    run.refiner.after_step(50, run.optimizer)
    replaced = {name for name, each in run.factors.named_parameters() if each is not run.named[name]}
    assert {name.replace("2.", "1.") for name in replaced} == set(RESET["params_replaced_by_adjustment"])


def test_a_rebuilt_optimiser_is_what_the_released_trainer_goes_on_with() -> None:
    run = Fifty(optimizer_reset=True)
    run.refiner.after_step(50, run.optimizer)
    rebuilt = rebuilt_optimizer(run.optimizer)
    assert type(rebuilt) is type(run.optimizer)
    assert len(rebuilt.state) == RESET["params_with_state_after"]
    assert [group["lr"] for group in rebuilt.param_groups] == RESET["group_lr_after_rebuild"]
    assert [group["weight_decay"] for group in rebuilt.param_groups] == RESET["group_weight_decay_after"]
    run.scheduler.step()
    assert [group["lr"] for group in rebuilt.param_groups] == RESET["group_lr_after_next_scheduler_step"]
    assert (run.scheduler.optimizer is run.optimizer) == RESET["scheduler_still_bound_to_old_optimizer"]
    held = [id(each) for group in rebuilt.param_groups for each in group["params"]]
    assert held == [id(each) for group in run.optimizer.param_groups for each in group["params"]]


@pytest.mark.parametrize("make", [lambda held: torch.optim.SGD(held, lr=0.1, momentum=0.9), torch.optim.Adafactor])
def test_other_optimisers_are_rebuilt_with_their_own_settings(make: Any) -> None:  # noqa: ANN401
    optimizer = make([nn.Parameter(torch.ones(2))])
    rebuilt = rebuilt_optimizer(optimizer)
    for key, value in optimizer.defaults.items():
        assert rebuilt.param_groups[0][key] == value
