"""Tasks one after another, no old data: what is learned, and what is forgotten, beside composing independent adapters.

FLOWRA_DATA=… python benchmarks/bench_sequential.py FOLDER [--threads N] [--finished] [--quick]

CoLA, SST-2, QNLI and MNLI on one MiniLM (``_one_base.py``), in three orders. Every task is trained on its own rows
alone, brings a head and keeps it; the encoder is shared. All methods but full fine-tuning train LoRA of rank 8 on every
linear layer of it, for the same steps, at the rate at which the task learns best alone:

sequential LoRA             one adapter, trained on from task to task
flow null space             an adapter for each task, A U = 0 of what past inputs span (0.95 of their energy, and 0.99)
soft K-FAC penalty, O-LoRA  an adapter for each task, one λ of three by the validation rows of the first order
InfLoRA                     an adapter for each task
sequential full fine-tuning all of the encoder; the rate is the one at which the task learns best alone, of two
composition (flow)          no sequence: adapters trained apart; those of the tasks so far, merged into one by `flow`
independent adapters        no sharing: what a task gets alone

What is remembered of a task is measured after it, on 256 of its rows, labels drawn from the model. Scores are in
points: Matthews' correlation for CoLA, accuracy for the others. ACC is the mean score of all tasks after the last one,
BWT the mean change of a task's score since it was learned, forgetting the mean fall from its best (Lopez-Paz & Ranzato
2017, Chaudhry et al. 2018); the table has the means over the orders.

A first line says how many hours the machine will need. Every step of every sequence is kept in FOLDER and made once,
its adapter included; a run that was broken off goes on where it stopped, and `--finished` reports what is there.
Processes that are given the same folder share the work. In the FOLDER of ``bench_composition.py`` the adapters that it
trained are taken. `--quick` takes few steps, rows and orders, to try the benchmark, and writes no results.
"""

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from _one_base import (
    RATES,
    SUITES,
    Task,
    TaskModel,
    Updates,
    best_rate,
    cost_of,
    fit,
    lora_of,
    quick,
    statistics_of,
    trained,
)
from _results import Row, write
from _shared_work import Elsewhere, claimed, share
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from flowra_adapters import LoRA, save_adapter
from flowra_compose import (
    ModuleStatistics,
    NullSpace,
    SequentialMetrics,
    TaskMemory,
    kfac_penalty,
    merge_updates,
    o_lora_penalty,
    read_adapter,
    read_task_memory,
    sequential_metrics,
    start_inflora,
    write_task_memory,
)
from flowra_compose.trainer_callback import NullSpaceCallback, PenaltyCallback

ORDERS = (("cola", "sst2", "qnli", "mnli"), ("mnli", "qnli", "sst2", "cola"), ("qnli", "cola", "mnli", "sst2"))
FULL_RATES = (3e-5, 1e-4)
COMPOSITION, INDEPENDENT = "composition (flow)", "independent adapters"
PLAIN, NULL_SPACE = "sequential LoRA", "flow null space"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A task about to be trained, on top of what was learned before."""

    made: TaskModel
    """The task; its own model wears what was learned before."""
    model: PreTrainedModel
    """Likewise, with a new head: it is to be trained."""
    place: int
    """In the order, from 0."""
    past: Sequence[Updates]
    """The adapters of the tasks before."""
    memory: TaskMemory
    examples: int
    """Of which statistics are measured."""
    strength: float

    def lora(self) -> dict[str, LoRA]:
        """Put a new adapter on."""
        return lora_of(self.made, self.model, seed=self.place)

    @property
    def head(self) -> list[nn.Parameter]:
        """The parameters of the new head."""
        return [each for name in self.made.heads for each in self.model.get_submodule(name).parameters()]


def _plain(step: Step) -> list[TrainerCallback]:
    layers = step.lora()
    if step.past:
        with torch.no_grad():
            for name, layer in layers.items():
                update = step.past[-1][name]
                layer.lora_A.copy_(update.lora_A)
                layer.lora_B.copy_(update.scaling / layer.scaling * update.lora_B)
    return []


def _null_space(step: Step) -> list[TrainerCallback]:
    space = NullSpace(step.lora(), step.memory)
    space.start()
    return [NullSpaceCallback(space, also_trained=step.head)]


def _soft(step: Step) -> list[TrainerCallback]:
    layers = step.lora()
    return [PenaltyCallback(lambda: step.strength * kfac_penalty(layers, step.memory))]


def _o_lora(step: Step) -> list[TrainerCallback]:
    layers = step.lora()
    return [PenaltyCallback(lambda: step.strength * o_lora_penalty(layers, step.memory))]


def _inflora(step: Step) -> list[TrainerCallback]:
    start_inflora(step.lora(), step.memory, statistics_of(step.made, step.examples))
    return []


def _full(step: Step) -> list[TrainerCallback]:
    return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to train tasks one after another."""

    start: Callable[[Step], list[TrainerCallback]]
    """Makes a step's model ready, and returns what shall be called while it trains."""
    leaves: Literal["an adapter more", "one adapter", "weights"] = "an adapter more"
    first_alone: bool = True
    """Whether the first task is trained as if it were alone."""
    remembers: bool = False
    energy: float = 0.95
    """ε of the memory."""
    strengths: tuple[float, ...] = (1.0,)
    """λ: where there are several, the first order decides by validation rows."""


METHODS: Mapping[str, Method] = {
    PLAIN: Method(start=_plain, leaves="one adapter"),
    NULL_SPACE: Method(start=_null_space, remembers=True),
    f"{NULL_SPACE}, ε = 0.99": Method(start=_null_space, remembers=True, energy=0.99),
    "soft K-FAC penalty": Method(start=_soft, remembers=True, strengths=(1.0, 10.0, 100.0)),
    "O-LoRA": Method(start=_o_lora, remembers=True, strengths=(0.5, 0.1, 5.0)),  # 0.5 as published
    "InfLoRA": Method(start=_inflora, remembers=True, first_alone=False),
    "sequential full fine-tuning": Method(start=_full, leaves="weights"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much is run."""

    tasks: Mapping[str, Task]
    orders: Sequence[tuple[str, ...]] = ORDERS
    examples: int = 256
    most_strengths: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The tasks, and where everything is kept."""

    folder: Path
    extent: Extent
    made: dict[str, TaskModel]
    """By name, filled when asked for."""

    def task(self, name: str) -> TaskModel:
        """Return a task with its own adapter, trained if it is not there yet."""
        if name not in self.made:
            with claimed(self.folder / "glue" / name / "adapter", wait=True):
                self.made[name] = trained(self.extent.tasks[name], self.folder / "glue")
        return self.made[name]

    def rate(self, name: str) -> float:
        """Return the rate at which a task learns best alone, of LoRA."""
        return best_rate(self.task(name).folder, RATES, _unreachable)

    def full(self, name: str) -> tuple[float, Path]:
        """Fine-tune a task alone, in full; return its best rate and the folder of the weights."""
        made, folder = self.task(name), self.folder / "full" / name

        def train(rate: float) -> float:
            model = made.fresh()
            fit(made, model, rate)
            _save_weights(model, folder / f"rate-{rate:g}")
            return made.choose(model).value

        with claimed(folder / "rates.json", wait=True):
            rate = best_rate(folder, FULL_RATES, train)
        return rate, folder / f"rate-{rate:g}"


@dataclass(frozen=True, kw_only=True)
class Course:
    """One method on one order."""

    bench: Bench
    name: str
    order: tuple[str, ...]
    strength: float

    @property
    def method(self) -> Method:
        """The method."""
        return METHODS[self.name]

    @cached_property
    def folder(self) -> Path:
        """Where its steps are kept."""
        slug = "".join(letter if letter.isalnum() else "-" for letter in f"{self.name} {self.strength:g}".lower())
        return self.bench.folder / "sequential" / slug / "-".join(self.order)

    def step_folder(self, place: int) -> Path:
        """Where a step is kept."""
        return self.folder / f"{place}-{self.order[place]}"

    def scores(self, place: int) -> dict[str, Any] | None:
        """Return what was found after a step; None if it was not run."""
        file = self.step_folder(place) / "scores.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    @property
    def left(self) -> list[int]:
        """The places of the steps that are still to be run."""
        return [place for place in range(len(self.order)) if self.scores(place) is None]

    def run(self) -> None:
        """Run the steps that are missing; raise Elsewhere if another process is at them."""
        with claimed(self.step_folder(len(self.order) - 1) / "scores.json") as mine:
            if mine:
                self._run()
        if self.left:
            raise Elsewhere

    def _run(self) -> None:
        for place in self.left:
            began = time.perf_counter()
            self.train(place)
            content: dict[str, Any] = {"seconds_of_training": round(time.perf_counter() - began, 1)}
            content |= self.judged(place)
            if self.method.remembers and place + 1 < len(self.order):
                began = time.perf_counter()
                content |= self.remember(place)
                content["seconds_of_memory"] = round(time.perf_counter() - began, 1)
            self.step_folder(place).mkdir(parents=True, exist_ok=True)
            (self.step_folder(place) / "scores.json").write_text(json.dumps(content), encoding="utf-8")
            shutil.rmtree(self.folder / f"memory-{place - 1}", ignore_errors=True)
            points = ", ".join(f"{name} {100 * value:.1f}" for name, value in content["test"].items())
            print(f"{self.name}, λ {self.strength:g}, {' '.join(self.order)}: after {place + 1}: {points}", flush=True)

    def train(self, place: int) -> None:
        """Train a task on top of what was learned before, and keep what came out."""
        name = self.order[place]
        made, folder = self.bench.task(name), self.step_folder(place)
        in_full = self.method.leaves == "weights"
        rate, alone = self.bench.full(name) if in_full else (self.bench.rate(name), made.folder / "adapter")
        if place == 0 and self.method.first_alone:
            shutil.copytree(alone, folder, dirs_exist_ok=True)
            return
        model = made.fresh()
        if in_full:
            model.load_state_dict(self.encoder(place - 1, model), strict=False)
        else:
            made.wear(self.total(place - 1))
            if self.method.leaves == "an adapter more":
                made.wear(self.total(place - 1), model)
        step = Step(
            made=made,
            model=model,
            place=place,
            past=[self.updates(each) for each in range(place)] if not in_full else [],
            memory=self.memory(place - 1),
            examples=self.bench.extent.examples,
            strength=self.strength,
        )
        fit(made, model, rate, self.method.start(step))
        if in_full:
            _save_weights(model, folder)
        else:
            save_adapter(model, folder, modules_to_save=made.heads, consumer="peft")

    def judged(self, place: int) -> dict[str, dict[str, float]]:
        """Score the tasks so far, each under its own head, on test and validation rows."""
        found: dict[str, dict[str, float]] = {"test": {}, "validation": {}}
        for each in range(place + 1):
            made = self.bench.task(self.order[each])
            model = self.worn(each, place)
            found["test"][made.task.name] = made.score(made.setting.test, model).value
            found["validation"][made.task.name] = made.choose(model).value
        return found

    def worn(self, each: int, place: int) -> PreTrainedModel:
        """Return the model of a task as it is after a step."""
        made = self.bench.task(self.order[each])
        if self.method.leaves == "weights":
            model = made.fresh()
            model.load_state_dict({**self.weights(each), **self.encoder(place, model)})
            return model
        made.wear_head(read_adapter(self.step_folder(each)).modules_to_save)
        made.wear(self.total(place))
        return made.model

    def remember(self, place: int) -> dict[str, float]:
        """Measure a task that has just been trained, and keep what later ones need of it."""
        self.worn(place, place)
        known = statistics_of(self.bench.task(self.order[place]), self.bench.extent.examples)
        memory = self.memory(place - 1).after(known, self.updates(place), energy=self.method.energy)
        write_task_memory(memory, self.folder / f"memory-{place}")
        modules = memory.modules.values()
        return {
            "kept": statistics.mean(each.kept[-1] for each in modules),
            "share_of_directions": statistics.mean(each.rank / each.shape[1] for each in modules),
        }

    def memory(self, place: int) -> TaskMemory:
        """Return what is remembered after a step; of methods that do not remember, and before the first, nothing."""
        if place >= 0 and self.method.remembers:
            return read_task_memory(self.folder / f"memory-{place}")
        base = self.bench.task(self.order[0]).base
        return TaskMemory.empty({name: (each.shape[0], each.shape[1]) for name, each in base.items()})

    def updates(self, place: int) -> Updates:
        """Return the adapter that a step left."""
        return dict(read_adapter(self.step_folder(place)).updates)

    def total(self, place: int) -> Updates:
        """Return ΔW after a step."""
        first = place if self.method.leaves == "one adapter" else 0
        past = [self.updates(each) for each in range(first, place + 1)]
        return merge_updates(past, [1.0] * len(past)) if past else {}

    def weights(self, place: int) -> dict[str, Tensor]:
        """Return all weights that a step left, head included."""
        return dict(load_file(self.step_folder(place) / "weights.safetensors"))

    def encoder(self, place: int, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the weights of the encoder that a step left."""
        inside = f"{model.base_model_prefix}."
        return {name: each for name, each in self.weights(place).items() if name.startswith(inside)}

    @property
    def matrix(self) -> list[list[float]] | None:
        """Scores in points, a row after each step; None if a step is missing."""
        return _matrix([self.scores(place) for place in range(len(self.order))], self.order, "test")

    @property
    def validation(self) -> float:
        """Mean score on the validation rows of all tasks, after the last."""
        found = self.scores(len(self.order) - 1)
        return -math.inf if found is None else statistics.mean(found["validation"].values())


def _matrix(found: Sequence[Mapping[str, Any] | None], order: Sequence[str], rows: str) -> list[list[float]] | None:
    if any(each is None for each in found):
        return None
    return [[100 * each[rows].get(name, math.nan) for name in order] for each in found if each is not None]


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: each.contiguous() for name, each in model.state_dict().items()}, folder / "weights.safetensors")


def _unreachable(rate: float) -> float:
    raise RuntimeError(f"rate {rate:g} must have been tried with the adapters")


@dataclass(kw_only=True)
class Composition:
    """Adapters that were trained apart, and those of the tasks so far merged by flow."""

    bench: Bench

    @cached_property
    def _known(self) -> dict[str, dict[str, ModuleStatistics]]:
        return {}

    def known(self, name: str) -> dict[str, ModuleStatistics]:
        """Statistics of a task on its own model."""
        if name not in self._known:
            made = self.bench.task(name)
            made.wear_head(made.head)
            made.wear(made.updates)
            self._known[name] = statistics_of(made, self.bench.extent.examples)
        return self._known[name]

    def file(self, names: Sequence[str]) -> Path:
        """Where the scores of a set of tasks are kept, whatever their order."""
        return self.bench.folder / "composition" / f"{'-'.join(sorted(names))}.json"

    def scores(self, names: Sequence[str]) -> dict[str, Any] | None:
        """Return the scores of a set of tasks; None if there are none."""
        file = self.file(names)
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def run(self, order: Sequence[str]) -> None:
        """Merge and score what is missing."""
        for count in range(1, len(order) + 1):
            with claimed(self.file(order[:count]), wait=True) as mine:
                if mine:
                    self._merge(order[:count])

    def _merge(self, names: Sequence[str]) -> None:
        tasks = [self.bench.task(name) for name in names]
        began = time.perf_counter()
        merged = merge_updates(
            [made.updates for made in tasks],
            [1.0] * len(tasks),
            rule="flow",
            statistics=[self.known(name) for name in names],
        )
        content = {"seconds_of_merging": round(time.perf_counter() - began, 1), "test": {}}
        for made in tasks:
            made.wear_head(made.head)
            made.wear(merged)
            content["test"][made.task.name] = made.score(made.setting.test).value
        self.file(names).write_text(json.dumps(content), encoding="utf-8")
        print(f"{COMPOSITION}: {', '.join(names)}: {content['test']}", flush=True)

    def matrix(self, order: Sequence[str]) -> list[list[float]] | None:
        """Scores in points, a row for each task more; None if one is missing."""
        return _matrix([self.scores(order[:count]) for count in range(1, len(order) + 1)], order, "test")

    def alone(self, order: Sequence[str]) -> list[list[float]] | None:
        """Scores of tasks that share nothing."""
        found = [self.scores([name]) for name in order]
        if any(each is None for each in found):
            return None
        row = [100 * each["test"][name] for each, name in zip(found, order, strict=True) if each is not None]
        return [row] * len(order)


def chosen(bench: Bench, name: str) -> float:
    """Return the strength that did best on the validation rows of the first order."""
    tried = METHODS[name].strengths[: bench.extent.most_strengths]
    sequences = {each: Course(bench=bench, name=name, order=bench.extent.orders[0], strength=each) for each in tried}
    return max(tried, key=lambda each: sequences[each].validation)


def sequences(bench: Bench, name: str) -> list[Course]:
    """Return a method's sequences that count."""
    strength = chosen(bench, name)
    return [Course(bench=bench, name=name, order=order, strength=strength) for order in bench.extent.orders]


def fill(bench: Bench) -> None:
    """Run what is missing: compositions, every strength on the first order, then the best strength on the others."""
    composition, orders = Composition(bench=bench), bench.extent.orders
    merges = [partial(composition.run, order) for order in [*([name] for name in orders[0]), *orders]]
    first = {
        name: [
            Course(bench=bench, name=name, order=orders[0], strength=strength)
            for strength in method.strengths[: bench.extent.most_strengths]
        ]
        for name, method in METHODS.items()
    }
    others = [partial(_at_best_strength, bench, name, order, first[name]) for name in METHODS for order in orders[1:]]
    share([*merges, *(course.run for courses in first.values() for course in courses), *others])


def _at_best_strength(bench: Bench, name: str, order: tuple[str, ...], tried: Sequence[Course]) -> None:
    if any(course.left for course in tried):
        raise Elsewhere
    Course(bench=bench, name=name, order=order, strength=chosen(bench, name)).run()


def report(bench: Bench) -> list[Row]:
    """Print the tables and return the rows."""
    composition = Composition(bench=bench)
    matrices = {name: [each.matrix for each in sequences(bench, name)] for name in METHODS}
    matrices[COMPOSITION] = [composition.matrix(order) for order in bench.extent.orders]
    matrices[INDEPENDENT] = [composition.alone(order) for order in bench.extent.orders]
    rows: list[Row] = []
    means: dict[str, SequentialMetrics] = {}
    print(f"\n{'mean over orders, points':<32}{'ACC':>8}{'BWT':>8}{'forget':>8}  forgetting by order")
    for name, each in matrices.items():
        found = [sequential_metrics(matrix) for matrix in each if matrix is not None]
        if not found:
            continue
        means[name] = _mean(found)
        strength = f", λ = {chosen(bench, name):g}" if name in METHODS and len(METHODS[name].strengths) > 1 else ""
        print(f"{name + strength:<32}{means[name].accuracy:>8.2f}{means[name].backward_transfer:>8.2f}"
              f"{means[name].forgetting:>8.2f}  " + ", ".join(f"{one.forgetting:.2f}" for one in found))  # fmt: skip
        rows.append(Row(what=f"{name}{strength}: ACC, mean of {len(found)} orders (peer: BWT)",
                        ours=round(means[name].accuracy, 2), peer=round(means[name].backward_transfer, 2)))  # fmt: skip
        rows.append(Row(what=f"{name}{strength}: forgetting in points, mean of {len(found)} orders (peer: worst order)",
                        ours=round(means[name].forgetting, 2),
                        peer=round(max(one.forgetting for one in found), 2)))  # fmt: skip
    for name, each in matrices.items():
        for order, matrix in zip(bench.extent.orders, each, strict=True):
            if matrix is not None:
                print(f"\n{name}\n{'after':<8}" + "".join(f"{task:>8}" for task in order))
                for task, scores in zip(order, matrix, strict=True):
                    print(
                        f"{task:<8}" + "".join(f"{'' if math.isnan(one) else format(one, '.1f'):>8}" for one in scores)
                    )
    whole = {name for name, each in matrices.items() if None not in each}
    return rows + bars({name: each for name, each in means.items() if name in whole})


def bars(means: Mapping[str, SequentialMetrics]) -> list[Row]:
    """Return what shall hold, of the means over all orders."""
    forgetting, accuracy = ({name: getattr(each, figure) for name, each in means.items()}
                            for figure in ("forgetting", "accuracy"))  # fmt: skip
    gained = accuracy[NULL_SPACE] - accuracy[PLAIN] if {NULL_SPACE, PLAIN} <= means.keys() else None
    return [
        Row(what=f"{NULL_SPACE}: forgetting", ours=forgetting.get(NULL_SPACE), limit=1.7, sense="<="),
        Row(what=f"{NULL_SPACE}: ACC less that of {PLAIN}", ours=gained, limit=0, sense=">="),
        Row(what=f"{COMPOSITION}: forgetting", ours=forgetting.get(COMPOSITION), limit=0.5, sense="<="),
    ]


def _mean(found: Sequence[SequentialMetrics]) -> SequentialMetrics:
    return SequentialMetrics(
        accuracy=statistics.mean(each.accuracy for each in found),
        backward_transfer=statistics.mean(each.backward_transfer for each in found),
        forgetting=statistics.mean(each.forgetting for each in found),
        forgotten=(),
    )


def hours(bench: Bench) -> float:
    """Guess the machine hours of what is still to be run, from a few steps and rows of each task.

    Args:
        bench: what shall be run.

    Returns:
        Hours; half a minute is allowed to measure and remember a task, or to merge.
    """
    extent, seconds, runs = bench.extent, 0.0, 0
    costs = {name: cost_of(task, bench.folder / "glue") for name, task in extent.tasks.items()}
    training = {name: task.steps * costs[name].step for name, task in extent.tasks.items()}
    scoring = {name: (task.test_rows + task.validation) * costs[name].row for name, task in extent.tasks.items()}
    for name in extent.tasks:
        seconds += 0 if (bench.folder / "glue" / name / "adapter").exists() else 2 * training[name]
        seconds += 0 if (bench.folder / "full" / name).exists() else 2 * 1.3 * training[name]
    for name, method in METHODS.items():
        tried = method.strengths[: extent.most_strengths]
        for index, order in enumerate(extent.orders):
            for strength in tried if index == 0 else tried[:1]:
                for place in Course(bench=bench, name=name, order=order, strength=strength).left:
                    alone = place == 0 and method.first_alone
                    seconds += 0 if alone else training[order[place]] * (1.3 if method.leaves == "weights" else 1.1)
                    seconds += sum(scoring[task] for task in order[: place + 1]) + 30 * method.remembers
                    runs += 1
    sets = {frozenset(order[:count]) for order in extent.orders for count in range(1, len(order) + 1)}
    merges = [each for each in sets if not Composition(bench=bench).file(sorted(each)).exists()]
    seconds += sum(30 + sum(scoring[task] for task in each) for each in merges)
    told = ", ".join(f"{name} {each.step:.2f} s a step, {1000 * each.row:.1f} ms a row" for name, each in costs.items())
    print(f"{runs} steps of sequences and {len(merges)} merges to go; {told}")
    return seconds / 3600


def main() -> None:
    """Run what is missing and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--finished", action="store_true", help="report what is there, run nothing")
    parser.add_argument("--quick", action="store_true", help="few steps, rows and orders; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tasks = {task.name: task for task in SUITES["glue"] if task.name in ORDERS[0]}
    extent = Extent(tasks=tasks)
    if arguments.quick:
        small = {name: quick(task) for name, task in tasks.items()}
        extent = Extent(tasks=small, orders=[ORDERS[0][:3], ORDERS[2][:2]], examples=32, most_strengths=2)
    bench = Bench(folder=arguments.folder / "quick" if arguments.quick else arguments.folder, extent=extent, made={})
    if not arguments.finished:
        print(f"about {hours(bench):.1f} machine hours to go", flush=True)
        fill(bench)
    rows = report(bench)
    if arguments.quick:
        print(json.dumps([(row.what, row.ours, row.peer, row.holds) for row in rows], indent=1, ensure_ascii=False))
        return
    print(write("sequential", rows, command="python benchmarks/bench_sequential.py FOLDER"))


if __name__ == "__main__":
    main()
