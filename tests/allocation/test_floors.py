"""Floors while rank moves: no module falls below its own, and one whose floor is its cap stays bit by bit."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowra_allocation import (
    AdaLoRA,
    BottleneckGram,
    Breathe,
    LayerView,
    Policy,
    RefinementSchedule,
    Shrink,
    Snapshot,
)
from flowra_testing.policy_run import SLOTS, Form, PolicyRun

SCHEDULE = RefinementSchedule(start=2, freeze=14, events=4, observe=2)
KEEPING: dict[str, Policy] = {
    "shrink by flow": Shrink(schedule=SCHEDULE, measure="flow"),
    "shrink by magnitude": Shrink(schedule=SCHEDULE, measure="magnitude"),
    "breathe": Breathe(schedule=SCHEDULE, share=0.5),
}
POLICIES = pytest.mark.parametrize("policy", KEEPING.values(), ids=KEEPING)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Modules with floors that the budget pays for."""
    layers = {}
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True)):
        rank, generator = draw(st.integers(0, 4)), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        shapes = ((rank, 6), (5, rank), (9, rank), (9, rank), (6,))
        a, b, z, g, row = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
        layers[name] = LayerView(
            lora_A=a,
            lora_B=b,
            cost=draw(st.integers(1, 30)),
            cap=draw(st.integers(rank, 5)),
            floor=draw(st.integers(0, rank)),
            gram=BottleneckGram.of(z, g, examples=9) if rank else None,
            growth=(draw(st.floats(0, 10)), row / row.norm()),
        )
    used, least = (
        sum(view.cost * value for view, value in zip(layers.values(), values, strict=True))
        for values in ([view.rank for view in layers.values()], [view.floor for view in layers.values()])
    )
    step = draw(st.sampled_from(SCHEDULE.steps))
    return Snapshot(step=step, layers=layers, budget=draw(st.integers(least, used)), seed=0)


def kept(policy: Policy, snapshot: Snapshot) -> dict[str, int]:
    """Ranks before anything new comes."""
    keep = policy.decide(snapshot).keep
    return {
        name: view.rank
        if name not in keep
        else len(keep[name])
        if isinstance(keep[name], tuple)
        else len(keep[name].lora_A)
        for name, view in snapshot.layers.items()
    }


@POLICIES
@given(snapshots())
def test_no_module_falls_below_its_floor_and_the_rest_fits_as_far_as_floors_let_it(
    policy: Policy, snapshot: Snapshot
) -> None:
    ranks, moves = kept(policy, snapshot), policy.decide(snapshot)
    assert all(ranks[name] >= view.floor for name, view in snapshot.layers.items())
    used = sum(view.cost * ranks[name] for name, view in snapshot.layers.items())
    new = sum(snapshot.layers[name].cost for name in moves.admit)
    assert used + new <= (snapshot.budget if moves.budget is None else moves.budget)
    assert moves.kkt_gap is None or moves.kkt_gap >= 0


@POLICIES
@pytest.mark.parametrize("form", ["pair", "triplets", "slots"])
def test_a_whole_run_keeps_to_floors_and_leaves_a_frozen_module_alone(policy: Policy, form: Form) -> None:
    ranks, caps = {"up": 2, "down": 4, "skip": 3}, {"up": 2, "down": SLOTS, "skip": SLOTS}
    run = PolicyRun(policy, form, ranks=ranks, floors={"up": 2, "skip": 1}, caps=caps)
    touched: list[Tensor] = []

    def factors() -> list[Tensor]:
        return [each.detach().clone() for each in (run.layers["up"].lora_A, run.layers["up"].lora_B)]

    for _ in range(14):
        run.train_one()
        before = factors()
        run.refiner.after_step(run.finished, run.optimizer)
        touched += [one - other for one, other in zip(before, factors(), strict=True)]
    history = run.refiner.finish()
    assert all(not each.any() for each in touched)
    assert all(event.ranks["up"] == 2 and event.ranks["skip"] >= 1 for event in history.events)
    assert history.events[-1].parameters <= run.budget


@pytest.mark.parametrize("measure", ["flow", "magnitude"])
def test_floors_decide_where_the_policy_alone_would_have_taken_more(measure: str) -> None:
    policy = Shrink(schedule=SCHEDULE, measure="flow" if measure == "flow" else "magnitude", kappa=4.0)
    free = PolicyRun(policy, "pair", budget=41).train(14).events[-1].ranks
    lowest = min(free, key=lambda name: free[name])
    held = PolicyRun(policy, "pair", budget=41, floors={lowest: free[lowest] + 1}).train(14).events[-1].ranks
    assert held[lowest] == free[lowest] + 1
    assert held != free


@pytest.mark.parametrize(
    ("floors", "got"),
    [({"up": 5}, r"\{'up': 5\}"), ({"up": -1}, r"\{'up': -1\}"), ({"left": 1}, r"\{'left': 1\}"), ({"up": 4}, r"\d+")],
)
def test_floors_that_cannot_be_kept_are_refused_before_training(floors: dict[str, int], got: str) -> None:
    with pytest.raises(ValueError, match=rf"^floors must be ranks ≥ 0 of the layers, .* 55 parameters, got {got}\."):
        PolicyRun(Shrink(schedule=SCHEDULE, measure="magnitude", kappa=4.0), "pair", budget=55, floors=floors)


def test_a_policy_that_does_not_keep_to_floors_refuses_them() -> None:
    policy = AdaLoRA(total_steps=20, tinit=2, tfinal=4, delta_t=2, kappa=2.0)
    with pytest.raises(ValueError, match=r"^floors must be left out with the policy adalora, .*, got \{'up': 1\}"):
        PolicyRun(policy, "triplets", floors={"up": 1})
    PolicyRun(policy, "triplets", floors={"up": 0})


def test_a_run_goes_on_with_the_floors_that_it_began_with(tmp_path: Path) -> None:
    policy = Shrink(schedule=SCHEDULE, measure="magnitude")
    run = PolicyRun(policy, "pair", floors={"up": 2})
    for _ in range(6):
        run.step()
    run.refiner.save(tmp_path)
    assert PolicyRun(policy, "pair", floors={"up": 2}).refiner.restore(tmp_path) == 6
    with pytest.raises(ValueError, match=r"got layer 'up' LayerForm\(.*floor=2\) where it is LayerForm\(.*floor=1\)"):
        PolicyRun(policy, "pair", floors={"up": 1}).refiner.restore(tmp_path)
