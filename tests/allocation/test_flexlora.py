"""FlexLoRA: who loses and who gains, what new directions are, and whole runs in plain PyTorch."""

import copy
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flowra_allocation import (
    FlexLoRA,
    FlexLoRACompat,
    FlexLoRASchedule,
    LayerView,
    Moves,
    NewTriplets,
    Policy,
    RankEvent,
    Refiner,
    Snapshot,
)
from flowra_allocation.flexlora import Exchange, can_exchange, exchange
from flowra_testing.policy_run import PolicyRun
from flowra_testing.stand_in_triplets import hang_triplets
from flowra_testing.tiny_models import mlp, seeded

SCHEDULE = FlexLoRASchedule(total_steps=20, warmup=4, final=4, interval=2, b0=1)  # 6, 8, 10, 12
ONCE = FlexLoRASchedule(total_steps=2, warmup=0, final=0, interval=1, b0=1, decay="constant")


# Who loses and who gains.


@st.composite
def events(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True))
    ranks = {name: draw(st.integers(0, 5)) for name in names}
    return {
        "scores": {name: draw(st.integers(0, 4)) / 4 for name in names},
        "costs": {name: draw(st.integers(1, 9)) for name in names},
        "ranks": ranks,
        "limits": {name: draw(st.integers(0, 7)) for name in names},
        "directions": draw(st.integers(1, 5)),
        "free": draw(st.integers(0, 12)),
        "moves": draw(st.sampled_from(["both", "prune", "expand"])),
    }


@given(events(), st.sampled_from(["ranks", "params"]))
def test_no_update_falls_below_one_or_rises_above_its_limit_and_none_does_both(event: Any, budget: Any) -> None:  # noqa: ANN401
    chosen = exchange(**event, budget=budget)
    assert len({*chosen.prune, *chosen.expand}) == len(chosen.prune) + len(chosen.expand)
    assert all(event["ranks"][name] > 1 for name in chosen.prune)
    assert all(event["ranks"][name] < event["limits"][name] for name in chosen.expand)
    assert len(chosen.expand) <= event["directions"]


@given(events(), st.sampled_from(["ranks", "params"]))
def test_parameters_rise_by_what_is_free_at_most_and_not_where_they_are_budgeted(event: Any, budget: Any) -> None:  # noqa: ANN401
    event["moves"] = "both" if budget == "params" else event["moves"]
    chosen = exchange(**event, budget=budget)
    rise = sum(event["costs"][name] for name in chosen.expand) - sum(event["costs"][name] for name in chosen.prune)
    assert rise <= (0 if budget == "params" else event["free"])


@given(events())
def test_the_sum_of_ranks_stays_if_ranks_are_what_is_budgeted(event: Any) -> None:  # noqa: ANN401
    chosen = exchange(**{**event, "moves": "both"})
    assert len(chosen.prune) == len(chosen.expand)


@given(events())
def test_the_highest_gain_and_of_the_others_the_lowest_lose(event: Any) -> None:  # noqa: ANN401
    chosen = exchange(**event)
    scores = event["scores"]
    able = [name for name in scores if event["ranks"][name] < event["limits"][name]]
    best = sorted(able, key=lambda name: (-scores[name], name))
    assert list(chosen.expand) == best[: len(chosen.expand)]
    losing = [name for name in scores if event["ranks"][name] > 1 and name not in chosen.expand]
    worst = sorted(losing, key=lambda name: (scores[name], name))
    assert list(chosen.prune) == worst[: len(chosen.prune)]


@given(events())
def test_one_more_pair_would_not_fit(event: Any) -> None:  # noqa: ANN401
    event["moves"] = "both"
    chosen = exchange(**event)
    best = sorted(
        (name for name in event["scores"] if event["ranks"][name] < event["limits"][name]),
        key=lambda name: (-event["scores"][name], name),
    )
    for count in range(len(chosen.expand) + 1, min(event["directions"], len(best)) + 1):
        others = sorted(
            (name for name in event["scores"] if event["ranks"][name] > 1 and name not in best[:count]),
            key=lambda name: (event["scores"][name], name),
        )
        costs = event["costs"]
        rise = sum(costs[name] for name in best[:count]) - sum(costs[name] for name in others[:count])
        assert len(others) < count or rise > event["free"]


@given(events(), st.sampled_from(["ranks", "params"]))
def test_what_no_scores_would_move_is_known_before(event: Any, budget: Any) -> None:  # noqa: ANN401
    event["moves"] = "both" if budget == "params" else event["moves"]
    names = sorted(event["scores"])[:4]
    known = {key: {name: event[key][name] for name in names} for key in ("costs", "ranks", "limits")}
    known |= {"free": event["free"], "moves": event["moves"], "budget": budget}
    orders = itertools.permutations(range(len(names)))
    moved = any(exchange(dict(zip(names, order, strict=True)), directions=1, **known) != Exchange() for order in orders)
    assert can_exchange(**known) == moved


@pytest.mark.parametrize(
    ("policy", "ranks", "budget", "message"),
    [
        (
            FlexLoRA(schedule=SCHEDULE),
            {"up": 1, "down": 1},
            None,
            "something to exchange, got {1: 2} (updates by rank)",
        ),
        (FlexLoRA(schedule=SCHEDULE, moves="prune"), {"up": 1, "down": 0}, None, "must be above rank 1: raise"),
        (FlexLoRA(schedule=SCHEDULE, moves="expand"), {"up": 2, "down": 2}, None, "and room in the budget for one"),
        (FlexLoRA(schedule=SCHEDULE, r_max=2), {"up": 2, "down": 2}, 1000, "another below its largest rank to gain"),
    ],
)
def test_ranks_that_cannot_move_are_refused_before_training(
    policy: FlexLoRA, ranks: Mapping[str, int], budget: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PolicyRun(policy, "triplets", ranks=ranks, budget=budget)


@given(events())
def test_the_order_of_updates_does_not_matter(event: Any) -> None:  # noqa: ANN401
    turned = {key: dict(reversed(each.items())) if isinstance(each, dict) else each for key, each in event.items()}
    assert exchange(**turned) == exchange(**event)


FLAT = {"scores": dict.fromkeys("abcd", 0.5), "costs": dict.fromkeys("abcd", 3), "ranks": dict.fromkeys("abcd", 2)}
ROOM = {"limits": dict.fromkeys("abcd", 8), "free": 0}


def test_ties_go_by_name_and_those_that_gain_come_first() -> None:
    chosen = exchange(**FLAT, **ROOM, directions=1)
    assert (chosen.prune, chosen.expand) == (("b",), ("a",))


@pytest.mark.parametrize("directions", [2, 3, 99])
def test_a_b_above_half_the_updates_makes_as_many_pairs_as_can_be(directions: int) -> None:
    chosen = exchange(**FLAT, **ROOM, directions=directions)
    assert (chosen.prune, chosen.expand) == (("c", "d"), ("a", "b"))


def test_updates_that_cannot_lose_cut_b_down() -> None:
    event = {**FLAT, "ranks": {"a": 2, "b": 1, "c": 1, "d": 2}}
    chosen = exchange(**event, **ROOM, directions=2)
    assert (chosen.prune, chosen.expand) == (("d",), ("a",))


def test_updates_lose_until_the_growth_is_paid_for() -> None:
    event = {
        "scores": {"dear": 0.9, "a": 0.1, "b": 0.2, "c": 0.3},
        "costs": {"dear": 10, "a": 4, "b": 4, "c": 4},
        "ranks": dict.fromkeys(("dear", "a", "b", "c"), 2),
        "limits": dict.fromkeys(("dear", "a", "b", "c"), 8),
        "directions": 1,
    }
    paid = exchange(**event, free=50, budget="params")
    assert (paid.prune, paid.expand) == (("a", "b", "c"), ("dear",))
    counted = exchange(**event, free=50)
    assert (counted.prune, counted.expand) == (("a",), ("dear",))
    assert exchange(**event, free=5) == exchange(**event, free=0)
    assert exchange(**event, free=5).expand == ()  # six more parameters do not fit
    too_dear = {**event, "costs": {**event["costs"], "dear": 13}}
    assert exchange(**too_dear, free=50, budget="params").expand == ()


def test_pruning_alone_and_expanding_alone() -> None:
    alone = exchange(**FLAT, **ROOM, directions=2, moves="prune")
    assert (alone.prune, alone.expand) == (("a", "b"), ())
    grown = exchange(**FLAT, **{**ROOM, "free": 7}, directions=3, moves="expand")
    assert (grown.prune, grown.expand) == ((), ("a", "b"))  # the third would not fit


# One event.


def view_of(values: list[float], *, seed: int = 0, cap: int = 9, lengths: list[float] | None = None) -> LayerView:
    """Orthonormal directions, or some of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    basis_A, basis_B = (torch.linalg.qr(torch.randn(size, 8, generator=generator)).Q for size in (12, 10))
    long = torch.tensor(lengths or [1.0] * len(values))[:, None]
    return LayerView(
        lora_A=long * basis_A.T[: len(values)],
        lora_B=basis_B[:, : len(values)],
        lora_E=torch.tensor(values),
        cost=23,
        cap=cap,
    )


def snapshot_of(layers: Mapping[str, LayerView], *, step: int = 1, budget: int = 9999, seed: int = 0) -> Snapshot:
    return Snapshot(step=step, layers=layers, budget=budget, seed=seed)


def decided(layers: Mapping[str, LayerView], **settings: Any) -> Moves:  # noqa: ANN401 - passed on
    policy = FlexLoRA(schedule=ONCE, **settings)
    policy.check(snapshot_of(layers, step=0))
    return policy.decide(snapshot_of(layers))


# Appendix C of the paper says that the direction with the smallest term −p ln p of the entropy leaves, p its share of
# the energy. So it is while no share exceeds 1/e, where terms rise with p; beyond it the largest can have the smallest.


def lost(values: list[float]) -> int:
    """Return the direction that an update loses, alone with the policy."""
    kept = FlexLoRA(schedule=ONCE, moves="prune").decide(snapshot_of({"x": view_of(values)})).keep["x"]
    assert isinstance(kept, tuple)
    return next(iter({*range(len(values))} - {*kept}))


def terms(values: list[float]) -> list[float]:
    shares = [value**2 / sum(each**2 for each in values) for value in values]
    return [-share * math.log(share) for share in shares]


@given(st.lists(st.floats(0.8, 1.0), min_size=4, max_size=8))
def test_the_smallest_term_of_the_entropy_leaves_where_no_share_exceeds_one_over_e(values: list[float]) -> None:
    assert terms(values)[lost(values)] == pytest.approx(min(terms(values)), abs=1e-6)


def test_the_smallest_value_leaves_where_the_largest_has_the_smallest_term() -> None:
    values = [math.sqrt(0.95), math.sqrt(0.05)]
    assert terms(values)[0] < terms(values)[1]
    assert lost(values) == 1


def test_the_weakest_direction_leaves_whatever_its_sign_and_the_flattest_update_gains_a_row() -> None:
    moves = decided({"sharp": view_of([0.5, -0.9, 0.1]), "flat": view_of([0.5, 0.5, 0.5])})
    assert moves.keep == {"sharp": (0, 1)}
    assert list(moves.admit) == ["flat"]
    row = moves.admit["flat"]
    assert isinstance(row, Tensor)
    assert row.shape == (1, 12)
    assert row.dtype == torch.float32
    assert moves.importance["sharp"] == pytest.approx(0.5407876, abs=1e-6)
    assert not moves.forget


def test_the_lengths_of_rows_and_columns_count() -> None:
    layers = {"sharp": view_of([0.9, 0.5, 0.4], lengths=[1.0, 0.1, 1.0]), "flat": view_of([0.5, 0.5, 0.5])}
    assert decided(layers).keep == {"sharp": (0, 2)}


@given(st.lists(st.floats(-9, 9, width=32).filter(lambda each: abs(each) > 1e-3), min_size=2, max_size=5))
def test_what_leaves_changes_the_update_least_and_by_its_own_norm(values: list[float]) -> None:
    view = view_of(values)
    moves = decided({"a": view, "b": view_of([1.0], cap=1)}, moves="prune")
    kept = moves.keep["a"]
    assert isinstance(kept, tuple)
    (gone,) = set(range(len(values))) - set(kept)
    assert view.lora_E is not None
    change = [float((view.lora_B[:, [k]] * view.lora_E[k] @ view.lora_A[[k]]).norm()) for k in range(len(values))]
    assert change[gone] == pytest.approx(min(change), rel=1e-5)
    assert change[gone] == pytest.approx(float(view.magnitudes[gone]), rel=1e-5)


@pytest.mark.parametrize(
    ("metric", "gains"),
    [
        ("entropy", "flat"),
        ("nuclear", "large"),
        ("frobenius", "large"),
        ("elem_energy", "large"),
        ("mat_energy", "large"),
    ],
)
def test_the_metric_decides_who_gains(metric: Any, gains: str) -> None:  # noqa: ANN401
    moves = decided({"flat": view_of([0.1, 0.1]), "large": view_of([9.0, 1.0])}, metric=metric)
    assert list(moves.admit) == [gains]


def test_an_update_at_its_cap_or_at_four_times_the_first_rank_is_passed_over() -> None:
    layers = {"a": view_of([1.0, 1.0], cap=2), "b": view_of([1.0, 0.9]), "c": view_of([1.0, 0.1])}
    assert list(decided(layers).admit) == ["b"]
    policy = FlexLoRA(schedule=ONCE)
    policy.check(snapshot_of({"a": view_of([1.0, 1.0]), "b": view_of([1.0])}, step=0))
    later = {"a": view_of([1.0] * 8), "b": view_of([1.0, 0.9, 0.1])}
    assert list(policy.decide(snapshot_of(later)).admit) == ["b"]
    assert list(decided(later, r_max=9).admit) == ["a"]
    assert list(decided({**later, "c": view_of([1.0, 0.1])}, r_max=3).admit) == ["c"]


def test_updates_without_a_score_gain_last_and_one_at_rank_one_stays() -> None:
    layers = {"one": view_of([5.0]), "zero": view_of([0.0, 0.0]), "live": view_of([1.0, 0.2])}
    moves = decided(layers)
    assert list(moves.admit) == ["live"]
    assert list(moves.keep) == ["zero"]


def test_the_same_seed_and_step_draw_the_same_and_others_do_not() -> None:
    layers = {"a": view_of([1.0, 1.0]), "b": view_of([1.0, 0.1])}
    policy = FlexLoRA(schedule=ONCE)
    rows = [policy.decide(snapshot_of(layers, step=step, seed=seed)).admit["a"] for step, seed in
            ((1, 0), (1, 0), (1, 1), (0, 0))]  # fmt: skip
    first, again, seeded_otherwise, other_step = (each for each in rows if isinstance(each, Tensor))
    assert torch.equal(first, again)
    assert not torch.equal(first, seeded_otherwise)
    assert not torch.equal(first, other_step)


# Refusals.


def test_what_cannot_be_moved_is_refused_before_training() -> None:
    policy = FlexLoRA(schedule=ONCE)
    pair = LayerView(lora_A=torch.ones(2, 3), lora_B=torch.ones(4, 2), cost=7, cap=3)
    with pytest.raises(
        ValueError, match=r"layers must be updates of triplets, got pairs; \['x'\]\. Attach them in the"
    ):
        policy.check(snapshot_of({"x": pair, "y": view_of([1.0])}))
    with pytest.raises(ValueError, match=r"layers must hold two updates to move rank between, got \['x'\]"):
        policy.check(snapshot_of({"x": view_of([1.0])}))
    with pytest.raises(ValueError, match="layers must hold at least one update"):
        policy.check(snapshot_of({}))


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="r_max must be ≥ 1, got 0"):
        FlexLoRA(schedule=ONCE, r_max=0)
    with pytest.raises(ValueError, match="budget must be 'ranks' unless moves is 'both', got 'params' for 'expand'"):
        FlexLoRA(schedule=ONCE, moves="expand", budget="params")
    with pytest.raises(ValueError, match="initialisation must be left out where nothing comes, got 'small'"):
        FlexLoRA(schedule=ONCE, moves="prune", initialisation="small")


def test_a_score_that_is_not_finite_names_its_update() -> None:
    with pytest.raises(ValueError, match=r"scores must be finite, got \[nan\]; \['bad'\]\. Training diverged"):
        decided({"bad": view_of([float("nan"), 1.0]), "good": view_of([1.0, 1.0])})


def test_sensitivity_without_steps_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"see must be called after every step, got an event without it for \['a', 'b'\]"
    ):
        decided({"a": view_of([1.0, 1.0]), "b": view_of([1.0, 1.0])}, metric="sensitivity")


# State.


def test_the_largest_rank_and_the_sensitivities_survive_a_restart() -> None:
    layers = {"a": view_of([1.0, 1.0]), "b": view_of([1.0, 0.1], seed=1)}
    gradients = {name: {key: torch.ones_like(getattr(view, key)) for key in ("lora_A", "lora_E", "lora_B")}
                 for name, view in layers.items()}  # fmt: skip
    first, second = (FlexLoRA(schedule=ONCE, metric="sensitivity") for _ in range(2))
    first.check(snapshot_of(layers))
    first.see(layers, gradients)
    second.check(snapshot_of({"a": view_of([1.0, 1.0, 1.0]), "b": view_of([1.0])}))
    second.restore(first.state())
    assert int(first.state()["r_max"]) == 8
    assert first.decide(snapshot_of(layers)).importance == second.decide(snapshot_of(layers)).importance
    assert second.state().keys() == first.state().keys()


def test_a_state_of_other_settings_is_refused() -> None:
    policy = FlexLoRA(schedule=ONCE, r_max=3)
    assert policy.state() == {}
    with pytest.raises(ValueError, match=r"state must be of flexlora with the same settings, got \['r_max'\]"):
        policy.restore({"r_max": torch.tensor(4)})
    with pytest.raises(ValueError, match=r"state must be of flexlora with the same settings, got \[\]"):
        FlexLoRA(schedule=ONCE).restore({})


# Whole runs.


class Run:
    """A small regression in plain PyTorch with a refiner."""

    def __init__(
        self, policy: Policy, ranks: Mapping[str, int], *, spare: int = 0, slots: int | None = None, seed: int = 0
    ) -> None:
        self.model = mlp()
        self.layers = hang_triplets(self.model, ranks, slots=slots)
        self.costs = {name: layer.cost_per_rank for name, layer in self.layers.items()}
        self.budget = sum(self.costs[name] * rank for name, rank in ranks.items()) + spare
        self.optimizer = torch.optim.AdamW([each for each in self.model.parameters() if each.requires_grad], lr=0.02)
        self.refiner = Refiner(
            self.model,
            self.layers,
            policy=policy,
            costs=self.costs,
            caps=dict.fromkeys(self.layers, 6),
            budget=self.budget,
            seed=seed,
        )
        with seeded(1):
            self.x, self.target = torch.randn(16, 8), torch.randn(16, 3)
        self.finished = 0

    def step(self) -> RankEvent | None:
        self.refiner.before_step(self.finished)
        self.optimizer.zero_grad()
        (self.model(self.x) - self.target).square().mean().backward()
        self.optimizer.step()
        self.refiner.before_zero_grad()
        self.finished += 1
        with seeded(self.finished):  # the stand-in draws its columns from the global generator
            return self.refiner.after_step(self.finished, self.optimizer)

    def train(self, steps: int = 20) -> list[RankEvent]:
        for _ in range(steps):
            self.step()
        return self.refiner.finish().events


RANKS = {"up": 3, "down": 2, "skip": 2}
POLICIES: dict[str, Any] = {
    **{metric: {"metric": metric} for metric in
       ("entropy", "nuclear", "frobenius", "sensitivity", "elem_energy", "mat_energy")},
    **{name: {"initialisation": name} for name in ("small", "zero", "orthogonal")},
    "params": {"budget": "params"},
}  # fmt: skip


@pytest.mark.parametrize("slots", [None, 6], ids=["resized", "slots"])
@pytest.mark.parametrize("settings", POLICIES.values(), ids=POLICIES)
def test_rank_moves_as_scheduled_within_the_budget_and_then_stays(settings: Any, slots: int | None) -> None:  # noqa: ANN401
    run = Run(FlexLoRA(schedule=SCHEDULE, **settings), RANKS, spare=30, slots=slots)
    events = run.train()
    assert tuple(event.step for event in events) == SCHEDULE.steps == (6, 8, 10, 12)
    ranks = run.refiner.history.initial
    for event in events:
        assert event.parameters <= run.budget
        assert all(1 <= rank <= 6 for rank in event.ranks.values())
        assert not event.dropped.keys() & event.admitted.keys()
        if "budget" not in settings:
            assert sum(event.ranks.values()) == sum(ranks.values())
        ranks = event.ranks
    assert {name: layer.rank for name, layer in run.layers.items()} == ranks
    assert any(event.admitted for event in events)
    held = [id(each) for group in run.optimizer.param_groups for each in group["params"]]
    assert held == [id(each) for layer in run.layers.values() for each in layer.parameters()]
    assert all(torch.isfinite(each).all() for each in run.model.parameters())
    json.dumps(run.refiner.history.as_json(), allow_nan=False)


def test_pruning_alone_ends_below_and_expanding_alone_grows_up_to_the_budget() -> None:
    pruned = Run(FlexLoRA(schedule=SCHEDULE, moves="prune"), RANKS).train()
    assert [sum(event.ranks.values()) for event in pruned] == [6, 5, 4, 3]
    grown = Run(FlexLoRA(schedule=SCHEDULE, moves="expand"), dict.fromkeys(RANKS, 1), spare=45)
    events = grown.train()
    assert all(not event.dropped for event in events)
    assert grown.budget - 45 < events[-1].parameters <= grown.budget


def test_a_layer_of_rank_zero_can_gain() -> None:
    ranks = {"up": 2, "down": 0, "skip": 2}
    policy = FlexLoRA(schedule=SCHEDULE, moves="expand", metric="nuclear", r_max=2)
    events = Run(policy, ranks, spare=60).train()
    assert events[-1].ranks["down"] > 0


@pytest.mark.parametrize("metric", ["entropy", "sensitivity"])
def test_two_runs_are_equal_bit_by_bit(metric: Any) -> None:  # noqa: ANN401
    runs = [Run(FlexLoRA(schedule=SCHEDULE, metric=metric), RANKS, spare=30) for _ in range(2)]
    events = [run.train() for run in runs]
    assert events[0] == events[1]
    first, second = ([*run.model.parameters()] for run in runs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_one_policy_serves_one_run_after_another() -> None:
    policy = FlexLoRA(schedule=SCHEDULE, metric="sensitivity")
    events = [Run(policy, RANKS, spare=30).train() for _ in range(2)]
    assert events[0] == events[1]


def test_the_published_policy_runs_to_its_end() -> None:
    run = Run(FlexLoRACompat(schedule=SCHEDULE, optimizer_reset=True), RANKS, spare=30)
    events = run.train()
    assert tuple(event.step for event in events) == SCHEDULE.steps
    assert all(sum(event.ranks.values()) == 7 for event in events)
    history = json.loads(json.dumps(run.refiner.history.as_json(), allow_nan=False))
    assert history["policy"] == "flexlora_compat"
    assert history["settings"]["b0"] == 1


@pytest.mark.parametrize(
    ("settings", "reconstructed"),
    [({}, False), ({"metric": "nuclear"}, False), ({"metric": "elem_energy"}, True), ({"metric": "mat_energy"}, True),
     ({"initialisation": "orthogonal"}, True)],
)  # fmt: skip
def test_the_history_says_what_was_reconstructed(settings: Any, reconstructed: bool) -> None:  # noqa: ANN401
    run = Run(FlexLoRA(schedule=SCHEDULE, **settings), RANKS)
    assert run.refiner.history.policy == "flexlora"
    assert run.refiner.history.settings["reconstructed"] is reconstructed


# Appendix B of the paper: a new direction changes nothing, and yet it learns.


def grown(initialisation: Any, *, slots: int | None) -> tuple[Run, dict[str, float]]:  # noqa: ANN401
    """Return a run just after its first event, and how much that changed the output and the update."""
    run = Run(FlexLoRA(schedule=SCHEDULE, moves="expand", initialisation=initialisation), RANKS, spare=30, slots=slots)
    for _ in range(5):
        run.step()
    run.refiner.before_step(5)
    before = run.model(run.x).detach()
    deltas = {name: delta_of(layer) for name, layer in run.layers.items()}
    run.refiner.after_step(6, run.optimizer)
    (name,) = run.refiner.history.events[0].admitted
    change = {"output": (run.model(run.x) - before).abs().max().item() / before.abs().max().item()}
    change["delta"] = float((delta_of(run.layers[name]) - deltas[name]).norm())
    return run, change


def delta_of(layer: Any) -> Tensor:  # noqa: ANN401 - a stand-in of either form
    live = layer.slots()
    delta: Tensor = layer.scaling * layer.lora_B[:, live] @ torch.diag(layer.lora_E[live]) @ layer.lora_A[live]
    return delta.detach()


@pytest.mark.parametrize("slots", [None, 6], ids=["resized", "slots"])
@pytest.mark.parametrize("initialisation", ["zero_impact", "orthogonal", "zero", "small"])
def test_a_new_direction_changes_nothing_and_only_its_value_learns_at_first(
    initialisation: str, slots: int | None
) -> None:
    run, change = grown(initialisation, slots=slots)
    small = initialisation == "small"
    if slots is not None and not small:
        assert change["output"] == 0  # not a bit
    assert (change["output"] > 1e-6) == small
    assert (change["delta"] > 1e-6) == small
    (name,) = run.refiner.history.events[0].admitted
    layer, slot = run.layers[name], run.layers[name].slots()[-1]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)

    run.model.get_submodule(name).register_forward_hook(look)
    run.optimizer.zero_grad()
    loss = (run.model(run.x) - run.target).square().mean()
    (seen,) = torch.autograd.grad(loss, outputs[0], retain_graph=True)
    loss.backward()
    gradient = seen.T @ inputs[0]  # G of the weight
    expected = layer.scaling * layer.lora_B[:, slot] @ gradient @ layer.lora_A[slot]
    assert layer.lora_E.grad is not None
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    assert layer.lora_E.grad[slot].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-7)
    assert (abs(expected.item()) > 1e-7) == (initialisation != "zero")
    for zero in (layer.lora_A.grad[slot], layer.lora_B.grad[:, slot]):
        assert bool((zero == 0).all()) != small


def test_a_direction_of_zero_never_learns() -> None:
    run = Run(FlexLoRA(schedule=SCHEDULE, initialisation="zero"), RANKS, spare=30)
    run.train()
    newcomers = {name for event in run.refiner.history.events for name in event.admitted}
    dead = [name for name in newcomers if (run.layers[name].lora_E[-1] == 0).item()]
    assert dead


def test_new_vectors_are_as_long_as_the_others_and_orthogonal_ones_are_off_their_span() -> None:
    layers = {"a": view_of([1.0, 1.0], lengths=[2.0, 4.0]), "b": view_of([1.0, 0.1])}
    for initialisation in ("orthogonal", "small"):
        new = decided(layers, initialisation=initialisation).admit["a"]
        assert isinstance(new, NewTriplets)
        assert len(new) == 1
        assert float(new.lora_A.norm()) == pytest.approx(3, rel=1e-5)
        assert float(new.lora_B.norm()) == pytest.approx(1, rel=1e-5)
        overlap = float((layers["a"].lora_A @ new.lora_A.T).abs().max())
        assert (overlap < 1e-5) == (initialisation == "orthogonal")
        assert (float((layers["a"].lora_B.T @ new.lora_B).abs().max()) < 1e-5) == (initialisation == "orthogonal")
        assert float(new.lora_E) == pytest.approx(0.01 if initialisation == "small" else 0)
    empty = {"a": view_of([]), "b": view_of([0.0])}
    new = decided(empty, initialisation="orthogonal", moves="expand", r_max=2).admit["a"]
    assert isinstance(new, NewTriplets)
    assert float(new.lora_A.norm()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("slots", [None, 6], ids=["resized", "slots"])
@pytest.mark.parametrize("settings", [{"metric": "sensitivity"}, {"initialisation": "orthogonal"}])
def test_a_run_that_was_broken_off_between_events_goes_on_bit_by_bit(
    settings: Any,  # noqa: ANN401
    slots: int | None,
    tmp_path: Path,
) -> None:
    whole, first, second = (
        Run(FlexLoRA(schedule=SCHEDULE, **settings), RANKS, spare=30, slots=slots) for _ in range(3)
    )
    whole.train()
    for _ in range(9):
        first.step()
    first.refiner.save(tmp_path)
    second.finished = second.refiner.restore(tmp_path)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer = torch.optim.AdamW([each for each in second.model.parameters() if each.requires_grad], lr=0.02)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.train(11)
    assert second.refiner.history.events == whole.refiner.history.events
    states = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(each, states[1][name]) for name, each in states[0].items())
