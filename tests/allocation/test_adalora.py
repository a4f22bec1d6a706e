"""The policy `adalora`: written values, PEFT's allocator as judge, ties, budgets in parameters, and whole runs."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig
from peft.tuners.adalora import RankAllocator
from torch import Tensor, nn

from flowra_allocation import AdaLoRA, LayerView, Moves, Snapshot
from flowra_allocation.adalora import cubic_budget
from flowra_testing.policy_run import SLOTS, Form, PolicyRun

FOLDER = Path(__file__).parents[1] / "golden"
SCHEDULES = json.loads((FOLDER / "adalora_schedule.json").read_text())["cases"]
IMPORTANCE = json.loads((FOLDER / "adalora_importance.json").read_text())
FORMS = pytest.mark.parametrize("form", ["triplets", "slots"])


def adalora(**changes: Any) -> AdaLoRA:  # noqa: ANN401 - passed on
    return AdaLoRA(**{"total_steps": 16, "tinit": 2, "tfinal": 3, "delta_t": 3, "kappa": 2.0, **changes})


def view(rank: int, cost: int = 1, **factors: Tensor) -> LayerView:
    born = {"lora_A": torch.ones(rank, 3), "lora_B": torch.ones(2, rank), "lora_E": torch.ones(rank)}
    return LayerView(**{**born, **factors}, cost=cost, cap=99)


def decided(policy: AdaLoRA, step: int, layers: Mapping[str, LayerView], *, budget: int = 10**6) -> Moves:
    return policy.decide(Snapshot(step=step, layers=layers, budget=budget, seed=0))


def with_scores(policy: AdaLoRA, scores: Mapping[str, list[float]]) -> AdaLoRA:
    """Let the policy have seen what makes these scores."""
    policy.restore({
        f"{name}.lora_E.{kind}": torch.tensor(each if kind == "sensitivity" else [1.0] * len(each))
        for name, each in scores.items()
        for kind in ("sensitivity", "uncertainty")
    })
    return policy


# The schedule.


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda case: f"{case['init_r']}_to_{case['target_r']}")
def test_budgets_and_events_are_as_written(case: Any) -> None:  # noqa: ANN401 - parsed JSON
    total, tinit, tfinal, delta = (case[key] for key in ("total_step", "tinit", "tfinal", "deltaT"))
    target = case["target_r"] * case["num_matrices"]
    policy = AdaLoRA(total_steps=total, tinit=tinit, tfinal=tfinal, delta_t=delta, target_rank=target)
    for step, budget, masked in case["step_budget_mask"]:
        initial = case["init_r"] * case["num_matrices"]
        assert cubic_budget(step, initial=initial, target=target, tinit=tinit, last=total - tfinal) == budget
        if step <= total - tfinal:  # after it, everything written is masked: the triplets have left
            assert (step in policy.steps) == masked


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 60), st.integers(1, 12), st.integers(1, 9))
def test_the_schedule_is_peft_s(tinit: int, tfinal: int, between: int, delta: int, target: int) -> None:
    total = tinit + between + tfinal
    config = AdaLoraConfig(target_r=target, init_r=12, tinit=tinit, tfinal=tfinal, deltaT=delta, total_step=total)
    judge = RankAllocator(Shadow({"a": (12, 2, 2), "b": (7, 2, 2)}), config, "default")
    policy = AdaLoRA(total_steps=total, tinit=tinit, tfinal=tfinal, delta_t=delta, target_rank=2 * target)
    last = total - tfinal
    assert policy.steps[-1] == last
    for step in range(last + 1):
        budget, masked = judge.budget_schedule(step)
        assert cubic_budget(step, initial=19, target=2 * target, tinit=tinit, last=last) == budget
        assert (step in policy.steps) == masked or step == last


# PEFT's allocator.


class Shadow(nn.Module):
    """Parameters named as PEFT names those of AdaLoRA."""

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]]) -> None:
        super().__init__()
        for name, (rank, n, m) in shapes.items():
            one = nn.Module()
            for factor, shape in (("lora_A", (rank, n)), ("lora_E", (rank, 1)), ("lora_B", (m, rank))):
                parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
                parameter.grad = torch.zeros_like(parameter)
                one.add_module(factor, nn.ParameterDict({"default": parameter}))
            self.add_module(name, one)

    def of(self, name: str) -> dict[str, nn.Parameter]:
        factors = ("lora_A", "lora_E", "lora_B")
        return {factor: self.get_submodule(f"{name}.{factor}")["default"] for factor in factors}

    def follow(self, layers: Mapping[str, Any]) -> None:
        """Take values and gradients of directions in the first slots."""
        for name, layer in layers.items():
            for factor, held in self.of(name).items():
                value = getattr(layer, factor)
                for mine, its in ((value.detach(), held.data), (value.grad, held.grad)):
                    rank = self.of(name)["lora_E"].numel()
                    its.copy_((mine[:, :rank] if factor == "lora_B" else mine[:rank]).view_as(held))


@FORMS
@pytest.mark.parametrize("delta", [1, 4])
def test_budgets_and_silent_triplets_are_peft_s_at_every_step(form: Form, delta: int) -> None:
    policy = AdaLoRA(total_steps=24, tinit=3, tfinal=4, delta_t=delta, target_rank=4, kappa=3.0)
    run = PolicyRun(policy, form, budget=84)
    shadow = Shadow({
        name: (layer.rank, layer.lora_A.shape[1], len(layer.lora_B)) for name, layer in run.layers.items()
    })
    judge = RankAllocator(shadow, AdaLoraConfig(tinit=3, tfinal=4, deltaT=delta, total_step=24), "default")
    judge.target_bgt = 4  # PEFT has it as a whole number for each module
    silencing = 0
    for step in range(1, 20):
        run.train_one()
        shadow.follow(run.layers)
        budget, pattern = judge.update_and_allocate(shadow, step)
        event = run.refiner.after_step(step, run.optimizer)
        assert (event is None) == (pattern is None)
        if event is not None:
            silencing += 1
            stay = {key.split(".")[0]: torch.tensor(each) for key, each in pattern.items()}
            assert sum(int(each.sum()) for each in stay.values()) == budget
            assert event.silenced == {name: int((~each).sum()) for name, each in stay.items() if not each.all()}
            for name, layer in run.layers.items():
                its = shadow.of(name)["lora_E"].flatten()
                assert torch.equal(layer.lora_E.detach()[: len(its)], its)
    assert silencing == (16 if delta == 1 else 4)
    run.train_one()
    shadow.follow(run.layers)
    judge.update_ipt(shadow)  # ours counts the last step, too
    _, pattern = judge.update_and_allocate(shadow, 20, force_mask=True)
    event = run.refiner.after_step(20, run.optimizer)
    assert event is not None
    assert event.ranks == {key.split(".")[0]: sum(each) for key, each in pattern.items()}
    for name, layer in run.layers.items():
        its = shadow.of(name)["lora_E"].flatten()
        assert torch.equal(layer.lora_E.detach()[layer.slots()], its[its != 0])


# What leaves.


def written(values: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Module name to factor name to values; E is ``(r, 1)`` in the file."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in values.items():
        name, factor = key.split(".")
        tensor = torch.tensor(value)
        found.setdefault(name, {})[factor] = tensor.flatten() if factor == "lora_E" else tensor
    return found


def test_the_written_triplets_leave() -> None:
    layers = {name: view(len(each["lora_E"]), **each) for name, each in written(IMPORTANCE["weights"]).items()}
    policy = adalora(target_rank=IMPORTANCE["budget"])
    for update in IMPORTANCE["updates"]:
        policy.see(layers, written(update["grad"]))
    before_the_last = decided(policy, 12, layers)  # when b(t), rounded down, is the target already
    assert before_the_last.silence == {
        name: tuple(index for index, each in enumerate(values) if each == 0)
        for name, values in IMPORTANCE["E_after"].items()
    }
    assert decided(policy, 13, layers).keep == {
        name: tuple(index for index, each in enumerate(values) if each != 0)
        for name, values in IMPORTANCE["E_after"].items()
    }


def adalora_like(policy: AdaLoRA, **changes: Any) -> AdaLoRA:  # noqa: ANN401 - passed on
    """Return another policy that has seen the same."""
    other = adalora(**changes)
    other.restore(policy.state())
    return other


@st.composite
def ranked(draw: st.DrawFn) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Scores with many ties, and costs."""
    names = draw(st.lists(st.sampled_from("abcde"), min_size=1, unique=True))
    scores = {name: [each / 4 for each in draw(st.lists(st.integers(0, 4), max_size=5))] for name in names}
    return scores, {name: draw(st.integers(1, 9)) for name in names}


def left_by(moves: Moves, scores: Mapping[str, list[float]]) -> set[tuple[str, int]]:
    """Names and indices of the triplets that stay."""
    return {
        (name, index)
        for name, each in scores.items()
        for index in range(len(each))
        if index not in moves.silence.get(name, ()) and index in moves.keep.get(name, range(len(each)))
    }


@given(ranked(), st.integers(1, 20), st.sampled_from([3, 6, 9, 12, 13]))
def test_exactly_the_budget_stays_and_ties_go_by_name_and_index(
    problem: tuple[dict[str, list[float]], dict[str, int]], target: int, step: int
) -> None:
    scores, costs = problem
    total = sum(map(len, scores.values()))
    layers = {name: view(len(each), costs[name]) for name, each in scores.items()}
    policy = with_scores(adalora(target_rank=target), scores)
    stay = left_by(decided(policy, step, layers), scores)
    budget = cubic_budget(step, initial=total, target=min(target, total), tinit=2, last=13)
    rising = sorted((score, name, index) for name, each in scores.items() for index, score in enumerate(each))
    assert stay == {(name, index) for _, name, index in rising[total - budget :]}


@given(ranked(), st.integers(0, 150), st.sampled_from([3, 6, 9, 12, 13]))
def test_without_a_target_rank_the_smallest_scores_leave_until_the_parameters_fit(
    problem: tuple[dict[str, list[float]], dict[str, int]], budget: int, step: int
) -> None:
    scores, costs = problem
    layers = {name: view(len(each), costs[name]) for name, each in scores.items()}
    total = sum(costs[name] * len(each) for name, each in scores.items())
    policy = with_scores(adalora(), scores)
    stay = left_by(decided(policy, step, layers, budget=budget), scores)
    allowed = cubic_budget(step, initial=total, target=min(budget, total), tinit=2, last=13)
    rising = sorted((score, name, index) for name, each in scores.items() for index, score in enumerate(each))
    used, gone = total, 0
    while used > allowed:
        used -= costs[rising[gone][1]]
        gone += 1
    assert stay == {(name, index) for _, name, index in rising[gone:]}
    if step == 13:
        assert used <= budget


@given(ranked(), st.integers(1, 12))
def test_where_all_cost_the_same_a_budget_in_parameters_is_a_budget_in_triplets_at_the_end(
    problem: tuple[dict[str, list[float]], dict[str, int]], target: int
) -> None:
    scores, _ = problem
    layers = {name: view(len(each), 7) for name, each in scores.items()}
    in_triplets = decided(with_scores(adalora(target_rank=target), scores), 13, layers)
    in_parameters = decided(with_scores(adalora(), scores), 13, layers, budget=7 * target + 6)
    assert in_triplets.keep == in_parameters.keep


@pytest.mark.parametrize("budgeted", [False, True], ids=["triplets", "parameters"])
def test_a_start_at_the_target_moves_nothing(budgeted: bool) -> None:
    scores = {"a": [0.0, 0.0], "b": [0.0]}
    policy = with_scores(adalora(target_rank=None if budgeted else 3), scores)
    layers = {name: view(len(each), 5) for name, each in scores.items()}
    for step in policy.steps:
        moves = decided(policy, step, layers, budget=15)
        assert not moves.keep
        assert not moves.silence


def test_nothing_falls_silent_before_the_last_event_where_every_step_so_far_was_skipped() -> None:
    policy, layers = adalora(target_rank=1), {"a": view(3)}
    overflowed = {
        name: torch.full_like(getattr(layers["a"], name), torch.inf) for name in ("lora_A", "lora_E", "lora_B")
    }
    policy.see(layers, {"a": overflowed})
    assert [decided(policy, step, layers).silence for step in policy.steps] == [{}] * len(policy.steps)
    assert decided(policy, policy.steps[-1], layers).keep == {"a": (2,)}


def test_a_silent_triplet_returns_when_its_score_has_risen() -> None:
    policy, layers = adalora(target_rank=2), {"a": view(3)}
    assert decided(with_scores(policy, {"a": [1.0, 2.0, 3.0]}), 9, layers).silence == {"a": (0,)}
    assert decided(with_scores(policy, {"a": [9.0, 2.0, 3.0]}), 12, layers).silence == {"a": (1,)}


def test_only_the_last_event_drops_and_tells_scores() -> None:
    policy = with_scores(adalora(target_rank=2), {"a": [1.0, 2.0], "b": [4.0], "none": []})
    layers = {"a": view(2, 3), "b": view(1, 5), "none": view(0, 5)}
    for step in policy.steps[:-1]:
        moves = decided(policy, step, layers)
        assert (moves.keep, moves.importance, moves.budget) == ({}, {}, 11)
    moves = decided(policy, 13, layers)
    assert (moves.keep, moves.silence, moves.budget) == ({"a": (1,)}, {}, None)
    assert moves.importance == {"a": 1.5, "b": 4.0}


# Refusals.


def test_pairs_are_refused_by_name() -> None:
    layers = {"q": LayerView(lora_A=torch.ones(1, 2), lora_B=torch.ones(2, 1), cost=4, cap=2), "v": view(1)}
    with pytest.raises(ValueError, match=r"layers must be of triplets for AdaLoRA, got pairs: q\. Attach"):
        adalora().check(Snapshot(step=0, layers=layers, budget=9, seed=0))


def test_nothing_to_move_is_refused() -> None:
    with pytest.raises(ValueError, match="layers must hold at least one update"):
        adalora().check(Snapshot(step=0, layers={}, budget=9, seed=0))


@pytest.mark.parametrize("target", [3, 4])
def test_no_fewer_triplets_at_the_end_than_there_are_are_refused(target: int) -> None:
    with pytest.raises(ValueError, match=f"target_rank must be below the 3 triplets that are there, got {target}"):
        adalora(target_rank=target).check(Snapshot(step=0, layers={"a": view(3)}, budget=9, seed=0))


def test_triplets_that_fit_the_budget_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="ranks must start above the budget of 12 parameters for triplets to leave"):
        adalora(target_rank=None).check(Snapshot(step=0, layers={"a": view(3, 4)}, budget=12, seed=0))


def test_a_target_rank_that_may_break_the_budget_is_refused() -> None:
    layers = {"a": view(2, 4), "b": view(1, 9)}
    adalora(target_rank=2).check(Snapshot(step=0, layers=layers, budget=13, seed=0))
    with pytest.raises(ValueError, match="budget must hold any 2 triplets, up to 13 parameters, got 12"):
        adalora(target_rank=2).check(Snapshot(step=0, layers=layers, budget=12, seed=0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delta_t": 0}, "delta_t must be ≥ 1, got 0"),
        ({"tinit": -1}, "tinit and tfinal must be ≥ 0 and leave steps in between, got -1 and 3 of 16 steps"),
        ({"tfinal": -1}, "tinit and tfinal must be ≥ 0 and leave steps in between, got 2 and -1 of 16 steps"),
        ({"tinit": 13}, "tinit and tfinal must be ≥ 0 and leave steps in between, got 13 and 3 of 16 steps"),
        ({"target_rank": 0}, "target_rank must be ≥ 1 or None, got 0"),
        ({"kappa": 0.9}, "kappa must be ≥ 1, got 0.9"),
        ({"kappa": float("nan")}, "kappa must be ≥ 1, got nan"),
        ({"beta1": 1.0}, r"beta1 must be in \(0, 1\), got 1.0"),
        ({"beta2": 0.0}, r"beta2 must be in \(0, 1\), got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adalora(**wrong)


def test_an_event_without_gradients_is_an_error() -> None:
    with pytest.raises(ValueError, match="before_zero_grad must be called after each step, got an event at step 3"):
        decided(adalora(), 3, {"a": view(2)})


def test_a_start_above_the_peak_is_refused() -> None:
    with pytest.raises(ValueError, match="ranks must fit the budget of 150 parameters, got"):
        PolicyRun(adalora(kappa=1.5), "triplets", budget=100)


def test_the_settings_are_plain_and_say_all() -> None:
    assert adalora(target_rank=5).settings == {
        "total_steps": 16,
        "tinit": 2,
        "tfinal": 3,
        "delta_t": 3,
        "target_rank": 5,
        "kappa": 2.0,
        "beta1": 0.85,
        "beta2": 0.85,
    }
    assert adalora().settings["target_rank"] is None
    assert (adalora().name, adalora().watches, adalora().follows, adalora().peak) == ("adalora", "nothing", True, 2.0)


# Whole runs.


@FORMS
def test_a_run_falls_silent_then_shrinks_to_the_budget_and_freezes(form: Form) -> None:
    run = PolicyRun(adalora(), form)
    before = run.loss()
    scales = {name: layer.scaling for name, layer in run.layers.items()}
    history = run.train(16)
    assert tuple(event.step for event in history.events) == (3, 6, 9, 12, 13)
    *silencing, last = history.events
    for event in silencing:
        assert event.ranks == history.initial
        assert (event.parameters, event.budget, event.importance) == (run.start, run.start, {})
        assert not event.dropped
        assert event.silenced
    costs = [sum(run.costs[name] * count for name, count in event.silenced.items()) for event in silencing]
    assert costs == sorted(costs)
    assert last.dropped
    assert not last.silenced
    assert run.budget - max(run.costs.values()) < last.parameters <= last.budget == run.budget
    assert last.parameters == run.parameters()
    assert history.peak == run.start <= 2 * run.budget
    assert {name: layer.scaling for name, layer in run.layers.items()} == scales
    assert run.loss() < before
    assert run.step() is None
    json.dumps(history.as_json(), allow_nan=False)


@FORMS
def test_silencing_touches_e_alone_and_the_optimiser_not_at_all(form: Form) -> None:
    run = PolicyRun(adalora(), form)
    for _ in range(5):
        run.step()
    run.train_one()
    before = copy.deepcopy([run.optimizer.state_dict(), *(layer.state_dict() for layer in run.layers.values())])
    held = list(run.model.parameters())
    event = run.refiner.after_step(6, run.optimizer)
    assert event is not None
    assert all(one is other for one, other in zip(held, run.model.parameters(), strict=True))
    assert_same(before[0], run.optimizer.state_dict())
    for name, layer, was in zip(run.layers, run.layers.values(), before[1:], strict=True):
        now = layer.state_dict()
        assert all(torch.equal(now[key], was[key]) for key in now if key != "lora_E")
        changed = now["lora_E"] != was["lora_E"]
        assert int(changed.sum()) == event.silenced.get(name, 0)
        assert not now["lora_E"][changed].any()


def assert_same(one: Any, other: Any) -> None:  # noqa: ANN401 - nested state
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


@FORMS
def test_compaction_is_silencing_for_good(form: Form) -> None:
    run = PolicyRun(adalora(), form)
    while run.finished < 12:
        run.step()
    run.train_one()
    policy = run.refiner.policy
    moves = policy.decide(run.refiner._snapshot(13))
    assert moves.keep
    silenced = copy.deepcopy(run.layers)
    for name, kept in moves.keep.items():
        assert isinstance(kept, tuple)
        gone = [index for index in range(silenced[name].rank) if index not in kept]
        silenced[name].lora_E.data[gone] = 0
    run.refiner.after_step(13, run.optimizer)
    for name, layer in run.layers.items():
        assert layer.rank == len(moves.keep.get(name, range(silenced[name].rank)))
        assert len(layer.lora_E) == (SLOTS if form == "slots" else layer.rank)
        x = torch.randn(7, layer.lora_A.shape[1], dtype=torch.float64)
        torch.testing.assert_close(layer(x), silenced[name](x), rtol=1e-12, atol=1e-15)


def test_a_silent_triplet_is_trained_on() -> None:
    run = PolicyRun(adalora(), "triplets")
    while run.finished < 6:
        run.step()
    silent = {name: layer.lora_E.detach() == 0 for name, layer in run.layers.items()}
    assert sum(int(each.sum()) for each in silent.values()) > 0
    run.step()
    for name, layer in run.layers.items():
        assert layer.lora_E.detach()[silent[name]].all()


@FORMS
def test_two_runs_are_equal_bit_by_bit(form: Form) -> None:
    runs = [PolicyRun(adalora(), form) for _ in range(2)]
    events = [run.train(16).events for run in runs]
    assert events[0] == events[1]
    assert torch.equal(*(run.output() for run in runs))


def test_a_policy_that_takes_up_another_s_state_decides_alike() -> None:
    run = PolicyRun(adalora(), "triplets")
    for _ in range(8):
        run.step()
    run.train_one()
    snapshot = run.refiner._snapshot(9)
    other = adalora_like(run.refiner.policy)
    mine, its = (policy.decide(snapshot).silence for policy in (run.refiner.policy, other))
    assert mine
    assert mine == its


def test_a_target_rank_is_the_number_of_triplets_at_the_end() -> None:
    run = PolicyRun(adalora(target_rank=3, kappa=3.0), "triplets", budget=66)
    ranks = run.train(16).events[-1].ranks
    assert sum(ranks.values()) == 3


@FORMS
@pytest.mark.parametrize("stop", [8, 14], ids=["before_the_cut", "after_the_cut"])
def test_a_resumed_run_is_the_same_bit_by_bit(form: Form, stop: int, tmp_path: Path) -> None:
    whole, resumed = PolicyRun(adalora(), form), PolicyRun(adalora(), form)
    saved: list[Any] = []
    while whole.finished < 16:
        whole.step()
        if whole.finished == stop:
            whole.refiner.save(tmp_path)
            saved = copy.deepcopy([whole.model.state_dict(), whole.optimizer.state_dict()])
    resumed.finished = resumed.refiner.restore(tmp_path)
    resumed.model.load_state_dict(saved[0])
    trained = [each for each in resumed.model.parameters() if each.requires_grad]
    resumed.optimizer = torch.optim.AdamW(trained, lr=0.02)
    resumed.optimizer.load_state_dict(saved[1])
    while resumed.finished < 16:
        resumed.step()
    assert resumed.refiner.history.events == whole.refiner.history.events
    assert torch.equal(resumed.output(), whole.output())
