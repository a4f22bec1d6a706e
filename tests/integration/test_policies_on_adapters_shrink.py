"""Shrinking real adapters of every form; ``tests/allocation`` has stand-ins."""

from typing import Any, Literal

import pytest
import torch

from flowra_adapters import attach
from flowra_allocation import RefinementSchedule, Refiner, Shrink
from flowra_testing.tiny_models import batch, bert_classifier

SCHEDULE = RefinementSchedule(start=1, freeze=9, events=4, observe=2)
RANK = 3


@pytest.mark.parametrize("measure", ["flow", "magnitude"])
@pytest.mark.parametrize("method", ["lora", "dora", "svd", "svd_masked"])
def test_real_adapters_shrink_to_the_budget(method: str, measure: Literal["flow", "magnitude"]) -> None:
    model, data = bert_classifier().double(), batch(num_labels=3, size=8)
    ranks = {name: RANK for name, _ in model.named_modules() if name.endswith(("query", "output.dense"))}
    layers: dict[str, Any] = dict(attach(model, ranks, method=method))
    costs = {name: layer.cost(RANK) - layer.cost(RANK - 1) for name, layer in layers.items()}
    budget = RANK * sum(costs.values()) // 2
    refiner = Refiner(
        model,
        layers,
        policy=Shrink(schedule=SCHEDULE, measure=measure),
        costs=costs,
        caps=dict.fromkeys(ranks, RANK),
        budget=budget,
    )
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    for step in range(10):
        refiner.before_step(step)
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
        refiner.before_zero_grad()
        refiner.after_step(step + 1, optimizer)
    events = refiner.finish().events
    used = [event.parameters for event in events]
    assert used == sorted(used, reverse=True)
    assert all(event.parameters <= event.budget < event.parameters + max(costs.values()) for event in events)
    assert used[-1] <= budget == events[-1].budget
    assert used[-1] == sum(costs[name] * layer.rank for name, layer in layers.items())
    model(**data).loss.backward()
    assert all(torch.isfinite(each).all() for layer in layers.values() for each in layer.parameters())
