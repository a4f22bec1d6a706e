"""The refiner without a trainer, and inside `transformers.Trainer`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from flowra_allocation import BottleneckObserver, Breathe, RankEvent, RankHistory, RefinementSchedule, Refiner
from flowra_allocation.trainer_callback import RefinementCallback
from flowra_testing.stand_in_adapter import StandInAdapter, hang
from flowra_testing.tiny_models import batch, bert_classifier, mlp, seeded

RANKS = {"up": 2, "down": 2, "skip": 1}
SCHEDULE = RefinementSchedule(start=2, freeze=14, events=4, observe=2)
SHARE = 0.2


# Schedule.


@pytest.mark.parametrize(
    ("start", "freeze", "events", "steps"),
    [
        (0, 8, 4, (2, 4, 6, 8)),
        (2, 14, 4, (5, 8, 11, 14)),
        (0, 10, 4, (2, 5, 7, 10)),
        (5, 7, 2, (6, 7)),
    ],
)
def test_events_are_evenly_spaced_and_the_last_is_the_freeze(
    start: int, freeze: int, events: int, steps: tuple[int, ...]
) -> None:
    assert RefinementSchedule(start=start, freeze=freeze, events=events).steps == steps


@pytest.mark.parametrize("wrong", [{"events": 0}, {"observe": 0}, {"events": -1}])
def test_a_schedule_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="schedule must have events ≥ 1 and observe ≥ 1, got"):
        RefinementSchedule(**{"start": 0, "freeze": 100, **wrong})


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\), got"):
        Breathe(schedule=SCHEDULE, share=share)


@pytest.mark.parametrize(("start", "freeze", "events"), [(0, 3, 4), (5, 5, 2), (9, 5, 2), (-1, 9, 2), (0, 0, 2)])
def test_a_schedule_without_room_for_its_events_is_refused(start: int, freeze: int, events: int) -> None:
    with pytest.raises(ValueError, match="schedule must leave at least one step per event, got"):
        RefinementSchedule(start=start, freeze=freeze, events=events)


def test_breathing_once_is_refused_since_the_last_event_admits_nothing() -> None:
    with pytest.raises(ValueError, match="events must be ≥ 2, for the last admits nothing, got 1"):
        Breathe(schedule=RefinementSchedule(start=0, freeze=10, events=1))


# Refiner.


class Run:
    """A small regression in plain PyTorch with a refiner."""

    def __init__(
        self,
        ranks: Mapping[str, int] = RANKS,
        schedule: RefinementSchedule = SCHEDULE,
        *,
        share: float = SHARE,
        spare: int = 0,
        caps: Mapping[str, int] | None = None,
        train_head: bool = False,
    ) -> None:
        self.model = mlp()
        self.layers = hang(self.model, ranks)
        self.model.head.requires_grad_(train_head)
        self.costs = {name: layer.cost_per_rank for name, layer in self.layers.items()}
        self.budget = sum(self.costs[name] * rank for name, rank in ranks.items()) + spare
        self.optimizer = torch.optim.AdamW([each for each in self.model.parameters() if each.requires_grad], lr=0.02)
        self.refiner = Refiner(
            self.model,
            self.layers,
            costs=self.costs,
            caps=caps or {name: min(layer.lora_A.shape[1], len(layer.lora_B)) for name, layer in self.layers.items()},
            budget=self.budget,
            policy=Breathe(schedule=schedule, share=share),
        )
        with seeded(1):
            self.x, self.target = torch.randn(16, 8), torch.randn(16, 3)
        self.finished = 0

    def step(self) -> RankEvent | None:
        self.refiner.before_step(self.finished)
        self.optimizer.zero_grad()
        (self.model(self.x) - self.target).square().mean().backward()
        self.optimizer.step()
        self.finished += 1
        return self.refiner.after_step(self.finished, self.optimizer)

    def ranks(self) -> dict[str, int]:
        return {name: layer.rank for name, layer in self.layers.items()}

    def train(self, steps: int) -> RankHistory:
        for _ in range(steps):
            self.step()
        return self.refiner.finish()


def test_events_fire_at_the_steps_of_the_schedule_and_ranks_move_and_freeze() -> None:
    run = Run()
    history = run.train(14)
    assert tuple(event.step for event in history.events) == SCHEDULE.steps
    assert history.initial == RANKS
    assert any(event.ranks != RANKS for event in history.events)
    assert history.events[-1].admitted == {}
    frozen = run.ranks()
    assert history.events[-1].ranks == frozen
    for _ in range(5):
        assert run.step() is None
    assert run.ranks() == frozen
    assert all(layer.observer is None for layer in run.layers.values())


@pytest.mark.parametrize("spare", [0, 13, 40])
def test_the_budget_holds_at_every_event(spare: int) -> None:
    run = Run(spare=spare)
    history = run.train(14)
    previous = history.initial
    for event in history.events:
        used = sum(run.costs[name] * rank for name, rank in event.ranks.items())
        assert used == event.parameters <= run.budget
        assert event.kkt_gap is None or event.kkt_gap >= 0
        for name, rank in event.ranks.items():
            assert rank == previous[name] - event.dropped.get(name, 0) + (name in event.admitted)
        if event.step != SCHEDULE.freeze:
            admitted = sum(run.costs[name] for name in event.admitted)
            assert event.parameters - admitted <= run.budget * (1 - SHARE)
        previous = event.ranks


def test_the_optimiser_holds_the_live_parameters_after_every_event() -> None:
    run = Run()
    for _ in range(14):
        run.step()
        held = [id(each) for group in run.optimizer.param_groups for each in group["params"]]
        assert held == [id(each) for layer in run.layers.values() for each in (layer.lora_A, layer.lora_B)]
        assert {id(each) for each in run.optimizer.state} <= set(held)


def test_an_event_observes_as_many_steps_as_asked_for() -> None:
    run = Run(schedule=dataclasses.replace(SCHEDULE, observe=2))
    watched = []
    for _ in range(14):
        run.refiner.before_step(run.finished)
        watched.append(run.layers["up"].observer is not None)
        run.step()
    due = {each for step in SCHEDULE.steps for each in (step - 2, step - 1)}
    assert watched == [step in due for step in range(14)]


def test_caps_hold() -> None:
    run = Run(spare=100, caps={"up": 2, "down": 3, "skip": 1})
    for event in run.train(14).events:
        assert all(event.ranks[name] <= cap for name, cap in {"up": 2, "down": 3, "skip": 1}.items())


def test_a_layer_of_rank_zero_may_grow() -> None:
    run = Run({"up": 3, "down": 0, "skip": 1}, spare=20)
    history = run.train(14)
    assert any("down" in event.admitted for event in history.events)


def test_a_layer_of_rank_zero_in_front_of_all_others_may_grow() -> None:
    run = Run({"up": 0, "down": 2}, spare=60)  # room for one more unit of each
    history = run.train(14)
    assert any("up" in event.admitted for event in history.events)


def test_growing_at_an_event_does_not_change_the_output() -> None:
    run = Run(spare=100)  # so much is free that nothing has to leave
    for _ in range(4):
        run.step()
    run.refiner.before_step(run.finished)
    run.optimizer.zero_grad()
    (run.model(run.x) - run.target).square().mean().backward()
    run.optimizer.step()
    before = run.model(run.x).detach()
    event = run.refiner.after_step(5, run.optimizer)
    assert event is not None
    assert event.admitted
    assert not event.dropped
    assert (run.model(run.x) - before).abs().max() <= 1e-6 * before.abs().max()


def test_two_runs_are_equal_bit_by_bit() -> None:
    first, second = Run(), Run()
    events = [run.train(14).events for run in (first, second)]
    assert events[0] == events[1]
    for name, layer in first.layers.items():
        assert torch.equal(layer.lora_A, second.layers[name].lora_A)
        assert torch.equal(layer.lora_B, second.layers[name].lora_B)


def test_the_history_is_plain_json() -> None:
    history = Run().train(14)
    content = json.loads(json.dumps(history.as_json(), allow_nan=False))
    assert content["format_version"] == 2
    assert content["initial"] == RANKS
    assert [event["step"] for event in content["events"]] == list(SCHEDULE.steps)
    assert content["policy"] == "breathe"
    assert content["settings"] == {"start": 2, "freeze": 14, "events": 4, "share": 0.2, "observe": 2}
    assert content["steps"] == list(SCHEDULE.steps)
    assert content["seconds"] > 0


def test_a_run_that_stopped_early_is_an_error() -> None:
    run = Run()
    with pytest.raises(ValueError, match=r"refinement must fire at steps \(5, 8, 11, 14\), got \(5, 8\)\. Train to"):
        run.train(9)


def test_a_run_that_stopped_early_leaves_no_observer_behind() -> None:
    run = Run()
    with pytest.raises(ValueError, match="refinement must fire"):
        run.train(10)  # the third event is near
    assert all(layer.observer is None for layer in run.layers.values())
    assert not run.model._forward_pre_hooks


def test_a_refinement_that_never_moved_is_an_error() -> None:
    # so little changes hands that no unit has to leave, and none fits
    run = Run(spare=6, share=0.01)
    with pytest.raises(ValueError, match="refinement must move rank, got no move in any event"):
        run.train(14)


def test_an_event_without_statistics_is_an_error() -> None:
    run = Run()
    with pytest.raises(ValueError, match=r"before_step must be called before each step, got an event at step 5"):
        run.refiner.after_step(5, run.optimizer)


def test_names_that_differ_are_refused() -> None:
    run = Run()
    with pytest.raises(
        ValueError, match=r"costs, caps and averages must name the layers, got \['down', 'skip', 'up'\], \['up'\]"
    ):
        Refiner(run.model, run.layers, costs={"up": 20}, caps={"up": 4}, budget=1000, policy=Breathe(schedule=SCHEDULE))


def test_ranks_above_the_budget_are_refused() -> None:
    run = Run()
    with pytest.raises(ValueError, match=rf"ranks must fit the budget of 5 parameters, got {run.budget}"):
        Refiner(run.model, run.layers, costs=run.costs, caps=RANKS, budget=5, policy=Breathe(schedule=SCHEDULE))


def test_a_factor_of_two_layers_is_refused() -> None:
    run = Run()
    run.layers["up"].lora_A = run.layers["skip"].lora_A
    with pytest.raises(ValueError, match=r"factors of their own, got one that '(up|skip)' and '(up|skip)' share"):
        Refiner(
            run.model, run.layers, costs=run.costs, caps=RANKS, budget=run.budget, policy=Breathe(schedule=SCHEDULE)
        )


def test_an_optimiser_that_cannot_follow_is_refused_after_the_first_step_not_at_the_first_event() -> None:
    run = Run()
    run.optimizer = torch.optim.RMSprop([each for each in run.model.parameters() if each.requires_grad])
    with pytest.raises(ValueError, match=r"moments as those of .*, got \['square_avg'\] in RMSprop\. Use AdamW"):
        run.step()


def test_an_optimiser_that_cannot_follow_one_layer_leaves_all_as_they_were() -> None:
    run = Run()
    for _ in range(4):
        run.step()
    before = {name: (layer.rank, layer.lora_A) for name, layer in run.layers.items()}
    run.optimizer.state[run.layers["down"].lora_A]["note"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"got \['note'\] in AdamW"):
        run.step()
    assert all(layer.rank == before[name][0] for name, layer in run.layers.items())
    assert all(layer.lora_A is before[name][1] for name, layer in run.layers.items())


def test_a_layer_that_the_loss_does_not_reach_is_the_first_to_give_its_rank_away() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 6), "unused": nn.Linear(8, 6)})
    layers = hang(model, {"used": 2, "unused": 1})
    costs = dict.fromkeys(layers, 14)
    policy = Breathe(schedule=RefinementSchedule(start=0, freeze=4, events=2, observe=1), share=0.4)
    refiner = Refiner(model, layers, costs=costs, caps=dict.fromkeys(layers, 6), budget=42, policy=policy)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    x = torch.randn(9, 8)
    for step in range(4):
        refiner.before_step(step)
        optimizer.zero_grad()
        (model["used"](x) - 1).square().mean().backward()
        optimizer.step()
        refiner.after_step(step + 1, optimizer)
    assert refiner.finish().events[0].dropped["unused"] == 1


def test_a_model_of_rank_zero_throughout_can_start_to_grow() -> None:
    run = Run(dict.fromkeys(RANKS, 0), spare=100, train_head=True)
    history = run.train(14)
    assert sum(history.events[-1].ranks.values()) > 0


# Inside transformers.Trainer.


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Twenty-four padded rows with labels."""

    def __init__(self) -> None:
        self.data = batch(size=24, length=7, num_labels=3)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: each[index] for key, each in self.data.items()}


class Watch(TrainerCallback):
    """Check, after every step, that the optimiser holds the live factors; count the batches observed."""

    def __init__(self, layers: Mapping[str, StandInAdapter]) -> None:
        self.layers = layers
        self.ranks: list[dict[str, int]] = []

    def on_step_end(self, *arguments: object, optimizer: Optimizer | None = None, **kwargs: object) -> None:
        assert optimizer is not None
        held = {id(each) for group in optimizer.param_groups for each in group["params"]}
        assert held == {id(each) for layer in self.layers.values() for each in (layer.lora_A, layer.lora_B)}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(held)
        self.ranks.append({name: layer.rank for name, layer in self.layers.items()})


@dataclasses.dataclass
class Trained:
    """What a Trainer run left behind."""

    model: BertForSequenceClassification
    layers: dict[str, StandInAdapter]
    refiner: Refiner
    trainer: Trainer
    watch: Watch


TRAINER_SCHEDULE = RefinementSchedule(start=2, freeze=10, events=4, observe=2)


def prepare(
    folder: Path,
    schedule: RefinementSchedule = TRAINER_SCHEDULE,
    *,
    first_step: int = 0,
    **arguments: Any,  # noqa: ANN401
) -> Trained:
    model = bert_classifier(training=True)
    names = [name for name, _ in model.named_modules()]
    ranks = {".query": 2, ".value": 2, ".output.dense": 0}
    layers = hang(model, {name: rank for name in names for ending, rank in ranks.items() if name.endswith(ending)})
    costs = {name: layer.cost_per_rank for name, layer in layers.items()}
    refiner = Refiner(
        model,
        layers,
        costs=costs,
        caps=dict.fromkeys(layers, 8),
        budget=sum(costs[name] * layer.rank for name, layer in layers.items()) + 40,
        policy=Breathe(schedule=schedule, share=SHARE),
    )
    watch = Watch(layers)
    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 0,
        **arguments,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Rows(),
        callbacks=[RefinementCallback(refiner, first_step=first_step), watch],
    )
    return Trained(model, layers, refiner, trainer, watch)


def test_inside_a_trainer_ranks_move_inside_the_budget_and_freeze(tmp_path: Path) -> None:
    run = prepare(tmp_path)
    assert run.trainer.train().global_step == 12
    history = run.refiner.history
    assert tuple(event.step for event in history.events) == (4, 6, 8, 10)
    assert all(event.parameters <= history.budget for event in history.events)
    assert any(event.admitted for event in history.events)
    assert any(event.dropped for event in history.events)
    json.dumps(history.as_json(), allow_nan=False)
    assert run.watch.ranks[:3] == [history.initial] * 3
    for event in history.events:
        assert run.watch.ranks[event.step - 1] == event.ranks
    assert run.watch.ranks[9:] == [history.events[-1].ranks] * 3
    assert all(layer.observer is None for layer in run.layers.values())
    assert all(torch.isfinite(each).all() for layer in run.layers.values() for each in layer.parameters())


def test_two_trainer_runs_are_equal_bit_by_bit(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        runs.append(prepare(tmp_path / name))  # building a Trainer seeds the run
        runs[-1].trainer.train()
    assert runs[0].refiner.history.events == runs[1].refiner.history.events
    first, second = (run.model.state_dict() for run in runs)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(("rows", "parts"), [(2, 3 + 3), (5, 3 + 2)], ids=["whole", "the last of an epoch incomplete"])
def test_gradient_accumulation_fires_on_optimiser_steps_and_sees_every_micro_batch(
    rows: int, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = []
    leave = BottleneckObserver.__exit__

    def count(self: BottleneckObserver, *reason: Any) -> None:  # noqa: ANN401 - passed on
        leave(self, *reason)
        observed.append(max(len(grams) for grams in self.grams.values()))

    monkeypatch.setattr(BottleneckObserver, "__exit__", count)
    run = prepare(tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=rows)
    run.trainer.train()
    assert tuple(event.step for event in run.refiner.history.events) == (4, 6, 8, 10)
    assert all(event.parameters <= run.refiner.history.budget for event in run.refiner.history.events)
    assert observed == [parts] * 4  # two steps each


def test_a_schedule_that_cannot_fire_is_an_error_before_training_starts(tmp_path: Path) -> None:
    run = prepare(tmp_path, max_steps=9)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"training must reach the freeze at step 10, got 9 steps\. Train longer"):
        run.trainer.train()
    assert run.watch.ranks == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


@pytest.mark.parametrize("first_step", [4, 5])
def test_training_that_begins_after_the_first_event_is_an_error_before_it(first_step: int, tmp_path: Path) -> None:
    run = prepare(tmp_path, first_step=first_step)
    with pytest.raises(ValueError, match=f"the first event must come after step {first_step}, .* got step 4"):
        run.trainer.train()
    assert run.watch.ranks == []


def test_steps_of_an_earlier_stage_count(tmp_path: Path) -> None:
    schedule = RefinementSchedule(start=102, freeze=110, events=4, observe=2)
    run = prepare(tmp_path, schedule, first_step=100)
    run.trainer.train()
    assert tuple(event.step for event in run.refiner.history.events) == schedule.steps


def test_training_that_stops_before_the_freeze_is_an_error_at_its_end(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
            control.should_training_stop = state.global_step >= 6

    run = prepare(tmp_path)
    run.trainer.add_callback(Stop())
    with pytest.raises(ValueError, match=r"refinement must fire at steps \(4, 6, 8, 10\), got \(4, 6\)\. Train to"):
        run.trainer.train()


def test_the_learning_rate_schedule_still_drives_the_trainer_s_groups(tmp_path: Path) -> None:
    run = prepare(tmp_path)
    run.trainer.train()
    groups = run.trainer.optimizer.param_groups
    assert all(group["lr"] == 0 for group in groups)  # linear decay has reached its end
    assert sum(len(group["params"]) for group in groups) == 2 * len(run.layers)


def test_events_share_the_ranks_that_did_not_change() -> None:
    ranks = [{"a": 2}, {"a": 1}, {"a": 1}]
    history = RankHistory(initial={"a": 2}, budget=9, policy="p", settings={}, steps=(1, 2, 3), peak=0)
    for step, each in enumerate(ranks, 1):
        history.add(RankEvent(step=step, ranks=each, parameters=1, budget=9))
    assert [event["ranks"] for event in history.as_json()["events"]] == ranks
    assert history.events[0].ranks is history.initial
    assert history.events[2].ranks is history.events[1].ranks
