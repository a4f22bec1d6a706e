"""FlexLoRA, corrected and as published, on real adapters of the SVD form; ``tests/allocation`` has it on a stand-in."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from flowra_adapters import MaskedSVDForm, SVDForm, attach, merge, orthogonality
from flowra_allocation import FlexLoRA, FlexLoRACompat, FlexLoRASchedule, Policy, RankEvent, Refiner
from flowra_testing.tiny_models import mlp, seeded

WRITTEN = json.loads((Path(__file__).parents[1] / "golden" / "flexlora_orth_reg.json").read_text())
SCHEDULE = FlexLoRASchedule(total_steps=20, warmup=4, final=4, interval=2, b0=1)  # 6, 8, 10, 12
ONCE = FlexLoRASchedule(total_steps=2, warmup=0, final=0, interval=1, b0=1, decay="constant")
FORMS = pytest.mark.parametrize("method", ["svd", "svd_masked"])
POLICIES: dict[str, Any] = {
    "corrected": lambda: FlexLoRA(schedule=SCHEDULE),
    "params": lambda: FlexLoRA(schedule=SCHEDULE, budget="params"),
    "sensitivity": lambda: FlexLoRA(schedule=SCHEDULE, metric="sensitivity"),
    "orthogonal": lambda: FlexLoRA(schedule=SCHEDULE, initialisation="orthogonal"),
    "published": lambda: FlexLoRACompat(schedule=SCHEDULE),
}


def refiner_of(model: nn.Module, layers: dict[str, SVDForm], policy: Policy, *, spare: int = 0) -> Refiner:
    costs = {name: layer.cost(1) for name, layer in layers.items()}
    return Refiner(
        model,
        layers,
        policy=policy,
        costs=costs,
        caps={name: layer.max_rank for name, layer in layers.items()},
        budget=sum(layer.cost(layer.rank) for layer in layers.values()) + spare,
    )


class Run:
    """A small regression whose loss keeps directions orthonormal."""

    def __init__(self, method: str, policy: Policy, *, spare: int = 40) -> None:
        self.model = mlp()
        self.layers = cast(dict[str, SVDForm], attach(self.model, {"up": 3, "down": 2, "skip": 2}, method=method))
        self.refiner = refiner_of(self.model, self.layers, policy, spare=spare)
        self.optimizer = torch.optim.AdamW([each for each in self.model.parameters() if each.requires_grad], lr=0.02)
        with seeded(1):
            self.x, self.target = torch.randn(16, 8), torch.randn(16, 3)
        self.finished = 0

    def loss(self) -> Tensor:
        return (self.model(self.x) - self.target).square().mean()

    def step(self) -> RankEvent | None:
        self.refiner.before_step(self.finished)
        self.optimizer.zero_grad()
        (self.loss() + 0.1 * orthogonality(self.layers.values())).backward()
        self.optimizer.step()
        self.refiner.before_zero_grad()
        self.finished += 1
        return self.refiner.after_step(self.finished, self.optimizer)


@FORMS
@pytest.mark.parametrize("name", POLICIES)
def test_a_run_moves_rank_learns_and_merges(method: str, name: str) -> None:
    run = Run(method, POLICIES[name]())
    first = run.loss().item()
    for _ in range(20):
        run.step()
        held = [id(each) for group in run.optimizer.param_groups for each in group["params"]]
        assert sorted(held) == sorted(id(each) for each in run.model.parameters() if each.requires_grad)
        assert {id(each) for each in run.optimizer.state} <= set(held)
    history = run.refiner.finish()
    assert tuple(event.step for event in history.events) == SCHEDULE.steps
    assert history.events[-1].ranks == {key: layer.rank for key, layer in run.layers.items()}
    assert all(event.parameters <= event.budget for event in history.events)
    if name != "published":
        assert all(event.parameters <= history.budget for event in history.events)
    assert run.loss().item() < first
    unmerged = run.model(run.x).detach()
    merge(run.model)
    torch.testing.assert_close(run.model(run.x), unmerged)


@FORMS
@pytest.mark.parametrize("initialisation", ["zero_impact", "orthogonal", "zero"])
def test_growth_changes_no_bit_in_slots_and_outputs_by_rounding_if_resized(method: str, initialisation: Any) -> None:  # noqa: ANN401
    run = Run(method, FlexLoRA(schedule=SCHEDULE, moves="expand", initialisation=initialisation), spare=60)
    events = []
    for _ in range(12):
        run.refiner.before_step(run.finished)
        run.optimizer.zero_grad()
        run.loss().backward()
        run.optimizer.step()
        run.finished += 1
        before = run.model(run.x).detach()
        events.append(run.refiner.after_step(run.finished, run.optimizer))
        after = run.model(run.x).detach()
        if method == "svd_masked":
            assert torch.equal(after, before)
        else:
            assert (after - before).abs().max() <= 1e-6 * before.abs().max()
    assert sum(len(event.admitted) for event in events if event) >= 2


@FORMS
def test_the_published_noise_changes_no_bit_in_slots_and_outputs_by_rounding_if_resized(method: str) -> None:
    run = Run(method, FlexLoRACompat(schedule=SCHEDULE))
    for _ in range(5):
        run.step()
    run.refiner.before_step(5)
    names = {name: layer.rank for name, layer in run.layers.items()}
    event = run.refiner.after_step(6, run.optimizer)
    assert event is not None
    (grown,) = event.admitted
    layer = run.layers[grown]
    assert layer.rank == names[grown] + 1 - event.dropped.get(grown, 0)
    lora_A, lora_E, lora_B = layer.triplets()
    assert lora_E[-1] == 0
    assert lora_A[-1].norm() > 1  # N(0, 1) where the others are N(0, 0.02²)
    before = layer.delta_weight().detach()
    layer.shrink(range(layer.rank - 1))
    torch.testing.assert_close(layer.delta_weight().detach(), before, rtol=1e-6, atol=1e-7)
    assert lora_B.shape[1] == layer.rank + 1


@FORMS
@pytest.mark.parametrize(
    ("policy", "low", "high"),
    [
        (FlexLoRA(schedule=ONCE), 1e-3, 0.1),
        (FlexLoRA(schedule=ONCE, initialisation="orthogonal"), -1e-6, 1e-5),
        (FlexLoRACompat(schedule=ONCE), 0.95 * 81.8, 1.05 * 81.8),
    ],
    ids=["corrected", "orthogonal", "published"],
)
def test_what_a_new_direction_costs_where_directions_are_kept_orthonormal(
    policy: Policy, low: float, high: float, method: str
) -> None:
    model = nn.ModuleDict({"sharp": nn.Linear(768, 768), "flat": nn.Linear(768, 768)})
    layers = cast(dict[str, SVDForm], attach(model, {"sharp": 8, "flat": 8}, method=method))
    with seeded(0):
        for layer, values in zip(layers.values(), (torch.arange(1.0, 9.0).square(), torch.ones(8)), strict=True):
            lora_A, lora_B = (torch.linalg.qr(torch.randn(768, 8)).Q for _ in range(2))
            layer.replace_factors(lora_A.T, lora_B, values)
    before = 0.1 * orthogonality([layers["flat"]]).item()
    assert before == pytest.approx(WRITTEN["jump_on_expansion"]["reg_before"], abs=1e-6)
    event = refiner_of(model, layers, policy).after_step(1, None)
    assert event is not None
    assert event.ranks == {"sharp": 7, "flat": 9}
    assert low < 0.1 * orthogonality([layers["flat"]]).item() - before < high
    assert WRITTEN["jump_on_expansion"]["reg_after"] == pytest.approx(81.8, abs=0.01)
    if method == "svd_masked":
        assert isinstance(layers["flat"], MaskedSVDForm)
        assert layers["flat"].slots() == list(range(9))


def test_a_direction_s_length_is_what_the_update_loses_with_it() -> None:
    run = Run("svd", FlexLoRA(schedule=SCHEDULE, moves="prune"))
    for _ in range(5):
        run.step()
    run.refiner.before_step(5)
    run.optimizer.zero_grad()
    norms = {name: layer.scaling * layer.triplet_norms() for name, layer in run.layers.items()}
    before = {name: layer.delta_weight().detach() for name, layer in run.layers.items()}
    event = run.refiner.after_step(6, run.optimizer)
    assert event is not None
    (name,) = event.dropped
    lost = (before[name] - run.layers[name].delta_weight().detach()).norm()
    torch.testing.assert_close(lost, norms[name].min().abs(), rtol=1e-4, atol=1e-7)
