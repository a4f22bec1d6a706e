"""The policy `shrink`: the budget path, what leaves, and whole runs on every form of update."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowra_allocation import BottleneckGram, LayerView, RefinementSchedule, Shrink, Snapshot
from flowra_allocation.directions import measure_directions
from flowra_testing.policy_run import Form, PolicyRun

REFINEMENT = json.loads((Path(__file__).parents[1] / "golden" / "flowra_refinement.json").read_text())
SCHEDULE = RefinementSchedule(start=2, freeze=14, events=4, observe=2)
Measure = Literal["flow", "magnitude"]
MEASURES = pytest.mark.parametrize("measure", ["flow", "magnitude"])
FORMS = pytest.mark.parametrize("form", ["pair", "triplets", "slots"])


# The budget path.


@st.composite
def schedules(draw: st.DrawFn) -> RefinementSchedule:
    start, events = draw(st.integers(0, 50)), draw(st.integers(1, 12))
    return RefinementSchedule(start=start, freeze=start + events * draw(st.integers(1, 30)), events=events)


@given(schedules(), st.floats(1.01, 8), st.integers(0, 10**9))
def test_the_path_falls_from_kappa_times_the_budget_to_the_budget(
    schedule: RefinementSchedule, kappa: float, budget: int
) -> None:
    policy = Shrink(schedule=schedule, measure="flow", kappa=kappa)
    path = [policy.allowed(step, budget) for step in range(schedule.freeze + 5)]
    assert path == sorted(path, reverse=True)
    assert path[: schedule.start + 1] == [path[0]] * (schedule.start + 1)
    assert path[0] == pytest.approx(kappa * budget, abs=1, rel=1e-12)
    assert path[schedule.freeze :] == [budget] * 5
    assert all(each <= policy.peak * budget for each in path)


def test_the_path_is_the_cubic_of_the_steps_that_are_left() -> None:
    policy = Shrink(schedule=RefinementSchedule(start=10, freeze=50), measure="flow", kappa=3.0)
    assert [policy.allowed(step, 1000) for step in (10, 20, 30, 40, 50)] == [3000, 1843, 1250, 1031, 1000]


# What leaves.


def tensor(values: Any) -> Tensor:  # noqa: ANN401 - parsed JSON
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def snapshots(draw: st.DrawFn, names: str = "abcd") -> Snapshot:
    """Modules of several forms, ranks and costs, with positive semi-definite Grams."""
    layers = {}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, unique=True)):
        rank, generator = draw(st.integers(0, 4)), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        a, b, e, z, g = (
            torch.randn(shape, dtype=torch.float64, generator=generator)
            for shape in ((rank, 6), (5, rank), (rank,), (9, rank), (9, rank))
        )
        layers[name] = LayerView(
            lora_A=a,
            lora_B=b,
            lora_E=e if draw(st.booleans()) else None,
            cost=draw(st.integers(1, 30)),
            cap=9,
            gram=BottleneckGram.of(z, g, examples=9) if rank else None,
        )
    step = draw(st.sampled_from(SCHEDULE.steps))
    return Snapshot(step=step, layers=layers, budget=draw(st.integers(0, 200)), seed=0)


def kept(snapshot: Snapshot, policy: Shrink) -> dict[str, int]:
    """Ranks after an event."""
    moves = policy.decide(snapshot)
    assert not moves.admit
    assert not moves.silence
    ranks = {name: view.rank for name, view in snapshot.layers.items()}
    return ranks | {
        name: len(each) if isinstance(each, tuple) else len(each.lora_A) for name, each in moves.keep.items()
    }


@MEASURES
@given(snapshots())
def test_the_rest_fits_and_nothing_that_left_would_fit_beside_it(measure: Measure, snapshot: Snapshot) -> None:
    policy = Shrink(schedule=SCHEDULE, measure=measure)
    ranks, moves = kept(snapshot, policy), policy.decide(snapshot)
    used = sum(view.cost * ranks[name] for name, view in snapshot.layers.items())
    assert moves.budget == policy.allowed(snapshot.step, snapshot.budget)
    assert used <= moves.budget
    assert all(ranks[name] < snapshot.layers[name].rank for name in moves.keep)
    assert all(moves.budget - used < snapshot.layers[name].cost for name in moves.keep)
    assert moves.keep or used == snapshot.parameters


@MEASURES
@given(snapshots())
def test_what_is_worth_less_than_something_dropped_stays_only_where_that_does_not_fit(
    measure: Measure, snapshot: Snapshot
) -> None:
    policy = Shrink(schedule=SCHEDULE, measure=measure)
    ranks = kept(snapshot, policy)
    staying, leaving = [], []
    for name, each in measure_directions(snapshot.layers, measure).items():
        cost = snapshot.layers[name].cost
        units = [(gain / cost, cost) for gain in each.gains]
        staying += units[: ranks[name]]
        leaving += units[ranks[name] :]
    assert all(cost < dropped for worth, cost in staying for lost, dropped in leaving if worth < lost)
    gap, most = policy.decide(snapshot).kkt_gap, max(leaving, default=(0, 0))[0]
    above = [worth for worth, _ in staying if worth >= most]
    if leaving and above:
        assert gap == min(above) - most
    else:
        assert gap is None


@pytest.mark.parametrize(("budget", "stay"), [(22, 3), (18, 2), (17, 1), (14, 1)])
def test_where_the_last_to_leave_is_dear_the_best_that_fits_stays_in_its_place(budget: int, stay: int) -> None:
    def view(cost: int, *densities: float) -> LayerView:
        eye = torch.eye(len(densities), dtype=torch.float64)
        sigma = tensor([(2 * cost * each) ** 0.5 for each in densities])
        return LayerView(lora_A=eye, lora_B=eye, lora_E=sigma, cost=cost, cap=3)

    layers = {"cheap": view(4, 5, 2, 1), "dear": view(10, 4, 3)}
    moves = Shrink(schedule=SCHEDULE).decide(Snapshot(step=14, layers=layers, budget=budget, seed=0))
    assert moves.keep == {"dear": (0,)} | ({} if stay == 3 else {"cheap": tuple(range(stay))})
    assert moves.kkt_gap == pytest.approx(4 - 3)


@MEASURES
@given(snapshots(), st.randoms(use_true_random=False))
def test_the_order_of_the_modules_does_not_matter(measure: Measure, snapshot: Snapshot, random: Any) -> None:  # noqa: ANN401
    policy, names = Shrink(schedule=SCHEDULE, measure=measure), list(snapshot.layers)
    random.shuffle(names)
    shuffled = Snapshot(
        step=snapshot.step,
        layers={name: snapshot.layers[name] for name in names},
        budget=snapshot.budget,
        seed=1,
    )
    assert kept(shuffled, policy) == kept(snapshot, policy)


@MEASURES
def test_of_equals_the_first_module_by_name_loses_its_last_direction(measure: Measure) -> None:
    ones = torch.ones(3, 3, dtype=torch.float64)
    gram = BottleneckGram.of(ones, ones, examples=3)
    eye = torch.eye(3, dtype=torch.float64)
    view = LayerView(lora_A=eye, lora_B=eye, lora_E=eye[0] * 0 + 2, cost=10, cap=3, gram=gram)
    policy = Shrink(schedule=SCHEDULE, measure=measure)
    moves = policy.decide(Snapshot(step=14, layers={"b": view, "a": view}, budget=50, seed=0))
    assert moves.keep == {"a": (0, 1)}
    assert moves.kkt_gap == 0


def test_magnitude_needs_no_statistics_and_flow_watches_grams_alone() -> None:
    assert Shrink(schedule=SCHEDULE, measure="magnitude").watches == "nothing"
    assert Shrink(schedule=SCHEDULE, measure="flow").watches == "grams"


@pytest.mark.parametrize("form", ["pair", "triplets"])
def test_of_the_written_update_the_direction_that_costs_less_leaves_and_the_gap_is_as_written(form: Form) -> None:
    a, b, c, s = (tensor(REFINEMENT[key]) for key in ("A", "B", "C", "S"))
    # the written costs have a first-order part, which the K-FAC model of a converged loss leaves out
    linear = (b.T @ tensor(REFINEMENT["G"]) @ a.T).diagonal()
    gains = tensor(REFINEMENT["shrink_cost"][::-1]) + linear  # A = diag(1, 2): written in the other order
    view = LayerView(
        lora_A=a,
        lora_B=b,
        lora_E=None if form == "pair" else torch.ones(2, dtype=torch.float64),
        cost=7,
        cap=3,
        gram=BottleneckGram(a @ c @ a.T, b.T @ s @ b, 1.0, 1.0),
    )
    moves = Shrink(schedule=SCHEDULE, measure="flow").decide(Snapshot(step=14, layers={"m": view}, budget=7, seed=0))
    assert moves.kkt_gap == pytest.approx((gains[1] - gains[0]).item() / 7, abs=1e-8)
    left = moves.keep["m"]
    if isinstance(left, tuple):
        assert left == (1,)
    else:
        torch.testing.assert_close(left.lora_B @ left.lora_A, b[:, 1:] @ a[1:], rtol=0, atol=1e-8)


# Settings.


def test_the_settings_are_plain_and_say_all() -> None:
    policy = Shrink(schedule=SCHEDULE, measure="magnitude", kappa=1.34)
    assert policy.name == "shrink"
    assert policy.settings == {
        "start": 2,
        "freeze": 14,
        "events": 4,
        "observe": 2,
        "measure": "magnitude",
        "kappa": 1.34,
    }
    assert policy.peak == 1.34
    assert (policy.steps, policy.observe) == (SCHEDULE.steps, 2)


@pytest.mark.parametrize("kappa", [1.0, 0.5, float("nan")])
def test_a_kappa_that_leaves_nothing_to_shrink_is_refused(kappa: float) -> None:
    with pytest.raises(ValueError, match="kappa must be > 1, for otherwise there is nothing to shrink, got"):
        Shrink(schedule=SCHEDULE, kappa=kappa)


def test_an_unknown_measure_is_refused() -> None:
    measure: Any = "entropy"
    with pytest.raises(ValueError, match='measure must be "flow" or "magnitude", got \'entropy\''):
        Shrink(schedule=SCHEDULE, measure=measure)


# Whole runs.


@MEASURES
@FORMS
def test_a_run_shrinks_to_the_budget_and_freezes(form: Form, measure: Measure) -> None:
    run = PolicyRun(Shrink(schedule=SCHEDULE, measure=measure), form)
    before = run.loss()
    history = run.train(14)
    used = [run.start, *(event.parameters for event in history.events)]
    assert used == sorted(used, reverse=True)
    assert history.peak == run.start <= 2 * run.budget
    assert tuple(event.step for event in history.events) == SCHEDULE.steps
    for event in history.events:
        assert event.parameters == sum(run.costs[name] * rank for name, rank in event.ranks.items()) <= event.budget
        assert event.budget - event.parameters < max(run.costs.values())
        assert not event.admitted
        assert event.kkt_gap is None or event.kkt_gap >= 0
    assert history.events[-1].budget == run.budget
    assert run.loss() < before
    frozen = history.events[-1].ranks
    for _ in range(3):
        assert run.step() is None
    assert {name: layer.rank for name, layer in run.layers.items()} == frozen
    json.dumps(history.as_json(), allow_nan=False)


@pytest.mark.parametrize("form", ["triplets", "slots"])
def test_an_event_takes_from_the_output_what_it_drops_and_no_more(form: Form) -> None:
    run = PolicyRun(Shrink(schedule=SCHEDULE, measure="magnitude"), form)
    while run.finished < 4:
        run.step()
    run.train_one()
    snapshot = run.refiner._snapshot(5)
    moves = run.refiner.policy.decide(snapshot)
    expected = {}
    for name, layer in run.layers.items():
        live = snapshot.layers[name]
        stay = list(moves.keep.get(name, range(live.rank)))
        expected[name] = layer.scaling * (live.lora_B[:, stay] * live.lora_E[stay]) @ live.lora_A[stay]
    run.refiner.after_step(5, run.optimizer)
    assert moves.keep
    for name, layer in run.layers.items():
        eye = torch.eye(layer.lora_A.shape[1], dtype=torch.float64)
        torch.testing.assert_close(layer(eye).T, expected[name], rtol=1e-9, atol=1e-12)


@FORMS
def test_two_runs_are_equal_bit_by_bit(form: Form) -> None:
    runs = [PolicyRun(Shrink(schedule=SCHEDULE, measure="flow"), form) for _ in range(2)]
    events = [run.train(14).events for run in runs]
    assert events[0] == events[1]
    assert torch.equal(*(run.output() for run in runs))


def test_a_start_above_the_peak_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ranks must fit the budget of 100 parameters, got"):
        PolicyRun(Shrink(schedule=SCHEDULE, measure="flow"), "pair", budget=50)


def test_updates_that_fit_the_budget_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="ranks must start above the budget of 1000 parameters to shrink, got "):
        PolicyRun(Shrink(schedule=SCHEDULE, measure="flow"), "pair", budget=1000)


@pytest.mark.parametrize("triplets", [False, True])
@MEASURES
def test_what_is_not_finite_is_refused_and_not_ranked(measure: Measure, triplets: bool) -> None:
    rows = torch.full((2, 5), float("nan")) if measure == "magnitude" else torch.randn(2, 5)
    broken = torch.full((2, 2), float("nan"), dtype=torch.float64)
    view = LayerView(
        lora_A=rows,
        lora_B=torch.randn(4, 2),
        lora_E=torch.ones(2) if triplets else None,
        cost=9,
        cap=4,
        gram=BottleneckGram(torch.eye(2, dtype=torch.float64), broken, 3.0, 3.0),
    )
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity"):
        measure_directions({"up": view}, measure)
