"""Composition on real tasks: what each way of making one update of five adapters keeps of each task.

FLOWRA_DATA=… python benchmarks/bench_composition.py FOLDER [--suites glue,domains] [--threads N] [--finished] [--quick]

Five GLUE tasks, and one task in five domains (``_one_base.py``): the adapters are trained once, frozen, and the same
for all methods; every task keeps its head. A merged update is judged (i) merged into the weights, and (ii) truncated to
the parameters of one adapter. Methods without data get their best scale, and density, by mean retention on 200
validation rows of each task: of five scales, and of up to two more beyond the edge while the best is there. All of them
are proportional to the scale, so they merge once; DARE is drawn once. Methods with data take 64 or 256 unlabelled
training rows of each task, which the adapters have seen, and no scale; their truncation knows the moments of these
rows. Where a rule makes all singular values equal (Iso), what (ii) keeps is decided by rounding. AdaMerging looks at
the entropy of classes, so it is run where all tasks have classes. PEFT's own merges are made by PEFT; those that mix A
with A and B with B have the rank of one adapter in (i), too.

Columns: the mean score ×100; the mean and the least share of its own adapter's score that a task keeps (retention); the
largest drop of a task in points; the mean share of the adapters' gains over the base that is lost (interference); the
parameters beyond the base's weights, in thousands for each task; and each task's retention. Beside each difference
stands its 95 % interval, rows of each task drawn again. Of GLUE's test rows 16 sentences of CoLA and 6 pairs of STS-B
stand in the training rows, too, and of QNLI 523 questions with another sentence: the same for all methods. Beside the
merges: the base under the trained heads, each adapter alone, and LoRA of the same rank trained on all tasks at once, in
turn, as many steps for each as its own adapter got. For `flow` and task arithmetic the interference of each task is
predicted, too, in the metric of its statistics.

A first line says how many hours the machine will need. Every figure is kept in FOLDER and made once; a run that was
broken off goes on where it stopped, and `--finished` reports what is there. Processes that are given the same folder
share the work. `--quick` takes few steps, rows and methods, to try the benchmark, and writes no results.
"""

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from _one_base import (
    MODEL,
    RANK,
    SUITES,
    Score,
    Task,
    TaskModel,
    Updates,
    cost_of,
    joint,
    quick,
    statistics_of,
    trained,
)
from _results import Row, write
from _shared_work import claimed
from scipy import stats
from torch import Tensor
from transformers import AutoModel

from flowra_compose import (
    RULES,
    InterferenceMeter,
    InterferenceReport,
    LowRankUpdate,
    MergeOptions,
    ModuleStatistics,
    ModuleUpdates,
    TaskScores,
    Truncation,
    learn_coefficients,
    merge_updates,
    read_interference,
    write_interference,
)
from flowra_pipelines.sources import resolve

Made = tuple[Updates, Mapping[str, Any]]
"""An update, and what was chosen for it."""
WHOLE = 384
"""The largest rank of a weight: with it PEFT's ``…_svd`` keep all of what they merge."""
ALONE, BASE, JOINTLY = "each adapter alone", "base under the heads", "LoRA trained on all tasks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A rule, and what is tried on the validation rows."""

    rule: str
    options: tuple[MergeOptions, ...] = (MergeOptions(),)

    @property
    def needs_data(self) -> bool:
        """Whether it takes statistics, and then no scale."""
        return bool(RULES[self.rule].needs)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftMethod:
    """A combination type of PEFT, and the densities that are tried."""

    densities: tuple[float | None, ...] = (None,)

    def arguments(self, name: str, density: float | None, form: str) -> dict[str, Any]:
        """Return what ``add_weighted_adapter`` is called with."""
        rank = {"svd_rank": RANK if form == "(ii)" else WHOLE} if name.endswith("svd") else {}
        return {"combination_type": name, **rank, **({} if density is None else {"density": density})}


METHODS: Mapping[str, Method] = {
    "task arithmetic": Method(rule="task_arithmetic"),
    "TIES": Method(rule="ties", options=tuple(MergeOptions(density=each) for each in (0.2, 0.5))),
    "TIES, by tensor": Method(
        rule="ties", options=tuple(MergeOptions(density=each, trim="tensor") for each in (0.2, 0.5))
    ),
    "DARE, linear": Method(rule="dare_linear", options=tuple(MergeOptions(density=each) for each in (0.3, 0.7))),
    "DARE, TIES": Method(rule="dare_ties", options=tuple(MergeOptions(density=each) for each in (0.3, 0.7))),
    "magnitude prune": Method(rule="magnitude_prune", options=tuple(MergeOptions(density=each) for each in (0.2, 0.5))),
    "KnOTS, TIES": Method(rule="knots_ties", options=tuple(MergeOptions(density=each) for each in (0.2, 0.5))),
    "KnOTS, DARE, linear": Method(rule="knots_dare_linear", options=(MergeOptions(density=0.7),)),
    "KnOTS, DARE, TIES": Method(
        rule="knots_dare_ties", options=tuple(MergeOptions(density=each) for each in (0.3, 0.7))
    ),
    "TSV-M": Method(rule="tsv_m"),
    "Iso-C": Method(rule="iso_c"),
    "Iso-CTS": Method(rule="iso_cts"),
    "Core Space, task arithmetic": Method(rule="core_task_arithmetic"),
    "Core Space, TIES": Method(rule="core_ties", options=tuple(MergeOptions(density=each) for each in (0.2, 0.5))),
    "WUDI": Method(rule="wudi"),
    "Flowra without data (orth)": Method(rule="orth"),
    "Fisher": Method(rule="fisher"),
    "RegMean": Method(rule="regmean"),
    "Flowra (flow)": Method(rule="flow"),
}
PEFT_METHODS: Mapping[str, PeftMethod] = {
    "cat": PeftMethod(),
    "linear": PeftMethod(),
    "svd": PeftMethod(),
    **{
        name: PeftMethod(densities=(0.2, 0.5))
        for kind in ("ties", "dare_linear", "dare_ties", "magnitude_prune")
        for name in (kind, f"{kind}_svd")
    },
}
ENTROPY = "AdaMerging"


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much is run."""

    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    peft_methods: Mapping[str, PeftMethod] = field(default_factory=lambda: PEFT_METHODS)
    scales: tuple[float, ...] = (0.2, 0.35, 0.6, 1.0, 1.6)
    """Of the weights of all adapters; 0.2 is the mean of five."""
    further: int = 2
    """Scales beyond the edge of these, at most."""
    examples: tuple[int, ...] = (64, 256)
    entropy_steps: int = 500


QUICK = Extent(
    methods={name: METHODS[name] for name in METHODS if name not in {"WUDI", "Iso-C", "Iso-CTS"}},
    scales=(0.4, 1.0),
    further=0,
    examples=(32,),
    entropy_steps=3,
)


@dataclass
class Suite:
    """Five tasks with their adapters, and what has been found out of them."""

    name: str
    specifications: Sequence[Task]
    folder: Path
    extent: Extent

    @cached_property
    def tasks(self) -> list[TaskModel]:
        """The tasks; adapters are trained where they are missing, and nobody else does it."""
        for task in self.specifications:
            with claimed(self.folder / task.name / "adapter") as mine:
                if mine:
                    trained(task, self.folder)
        made = []
        for task in self.specifications:
            with claimed(self.folder / task.name / "adapter", wait=True):
                made.append(trained(task, self.folder))
        return made

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return [task.name for task in self.specifications]

    @cached_property
    def updates(self) -> list[Updates]:
        """What is merged."""
        return [made.updates for made in self.tasks]

    @property
    def parameters(self) -> int:
        """Of one adapter."""
        return sum(each.parameters for each in self.updates[0].values())

    @cached_property
    def _statistics(self) -> dict[int, list[dict[str, ModuleStatistics]]]:
        return {}

    def known(self, examples: int) -> list[dict[str, ModuleStatistics]]:
        """Statistics of every task, on its own model."""
        if examples not in self._statistics:
            self._statistics[examples] = []
            for made in self.tasks:
                made.wear(made.updates)
                self._statistics[examples].append(statistics_of(made, examples, fisher=True))
        return self._statistics[examples]

    def scored(self, updates: Updates, *, validation: bool = False) -> dict[str, Score]:
        """Score every task under one update."""
        found = {}
        for made in self.tasks:
            made.wear(updates)
            found[made.task.name] = made.choose() if validation else made.score(made.setting.test)
        return found

    def file(self, name: str) -> Path:
        """Return where the scores of a way are kept."""
        return self.folder / "scores" / f"{_slug(name)}.json"

    def kept(self, name: str, make: Callable[[], Made]) -> None:
        """Make and score an update, once, unless somebody else does it now."""
        with claimed(self.file(name)) as mine:
            if mine:
                self._make(name, make)

    def _make(self, name: str, make: Callable[[], Made]) -> None:
        same = self.file(name.replace("(ii)", "(i)"))
        if "PEFT" in name and not name.endswith("svd") and same.exists():  # of the rank of one adapter in both forms
            shutil.copy(same, self.file(name))
            return
        began = time.perf_counter()
        updates, chosen = make()
        made_in = time.perf_counter() - began
        if name in PREDICTED:
            write_interference(self.interference(updates), self.file(name).parent / _slug(name))
        self.keep(name, self.scored(updates), updates, chosen=chosen, seconds=made_in)

    def keep(
        self, name: str, scores: Mapping[str, Score], updates: Updates, *, chosen: Mapping[str, Any], seconds: float = 0
    ) -> None:
        """Write what was found of a way."""
        content = {
            "chosen": dict(chosen),
            "seconds": round(seconds, 2),
            "parameters": sum(each.parameters for each in updates.values()),
            "scores": {task: [score.answers, score.targets, score.metric] for task, score in scores.items()},
        }
        self.file(name).parent.mkdir(parents=True, exist_ok=True)
        self.file(name).write_text(json.dumps(content), encoding="utf-8")
        print(f"{self.name}: {name}, made in {seconds:.0f} s", flush=True)

    def interference(self, merged: Updates) -> InterferenceReport:
        """Measure what a merged update does to each task, in the metric of its statistics."""
        meter, known = InterferenceMeter(tasks=tuple(self.names)), self.known(max(self.extent.examples))
        for name in self.updates[0]:
            module = ModuleUpdates(
                name=name,
                updates=tuple(one[name] for one in self.updates),
                statistics=tuple(each[name] for each in known),
            )
            meter.add(module, merged.get(name))
        return meter.report()

    def references(self) -> None:
        """Score each adapter alone, the base, and the adapter that was trained on all tasks."""
        for name, find in ((ALONE, self._alone), (JOINTLY, self._jointly)):
            with claimed(self.file(name)) as mine:
                if mine:
                    find()
        self.kept(BASE, lambda: ({}, {}))

    def _alone(self) -> None:
        scores = {}
        for made in self.tasks:
            made.wear(made.updates)
            scores[made.task.name] = made.score(made.setting.test)
        self.keep(ALONE, scores, self.updates[0], chosen={})

    def _jointly(self) -> None:
        updates, heads = joint(self.tasks, self.folder / "jointly")
        for made in self.tasks:
            made.wear_head(heads[made.task.name])
        self.keep(JOINTLY, self.scored(updates), updates, chosen={})
        for made in self.tasks:
            made.wear_head(made.head)

    def merged(
        self,
        rule: str,
        form: str,
        options: MergeOptions | None = None,
        *,
        examples: int | None = None,
        weights: Sequence[float | Mapping[str, float]] | None = None,
    ) -> dict[str, LowRankUpdate]:
        """Merge by a rule of ours."""
        return merge_updates(
            self.updates,
            weights or [1.0] * len(self.updates),
            rule=rule,
            options=options,
            truncation=Truncation(parameters=self.parameters) if form == "(ii)" else None,
            statistics=None if examples is None else self.known(examples),
        )

    def at_best_scale(self, candidates: Iterable[Made]) -> Made:
        """Try every candidate on the validation rows at every scale, and beyond while the best is at the edge."""
        found: list[tuple[float, Made]] = []
        for merged, chosen in candidates:
            tried: dict[float, float] = {}
            scales = list(self.extent.scales)
            for further in range(self.extent.further + 1):
                for scale in scales[len(tried) :]:
                    tried[scale] = self._validated(_scaled(merged, scale))
                best = max(tried, key=tried.__getitem__)
                if further == self.extent.further or min(tried) < best < max(tried):
                    break
                scales.append(round(best * 1.6 if best == max(tried) else best / 1.6, 4))
            found.append((tried[best], (_scaled(merged, best), {"scale": best, **chosen})))
        return max(found, key=lambda each: each[0])[1]

    def _validated(self, updates: Updates) -> float:
        """Return the mean retention on the validation rows."""
        scores = self.scored(updates, validation=True)
        return statistics.fmean(_share(score.value, self.alone_validated[name]) for name, score in scores.items())

    @cached_property
    def alone_validated(self) -> dict[str, float]:
        """What each adapter alone gets on the validation rows."""
        found = {}
        for made in self.tasks:
            made.wear(made.updates)
            found[made.task.name] = made.choose().value
        return found

    def ways(self) -> dict[str, Callable[[], Made]]:
        """Return every way to merge, and how it is made."""
        found: dict[str, Callable[[], Made]] = {}
        for form in ("(i)", "(ii)"):
            for name, method in self.extent.methods.items():
                if method.needs_data:
                    for count in self.extent.examples:
                        found[f"{form} {name}, {count} examples"] = partial(self._by_data, method.rule, form, count)
                else:
                    found[f"{form} {name}"] = partial(self._tuned, method, form)
            found[f"{form} {self.flow}, scale tuned"] = partial(self._flow_tuned, form)
            if form == "(ii)":
                found[f"{form} {self.flow}, rank {RANK} everywhere"] = self._flow_at_one_rank
            if all(task.metric != "spearman" for task in self.specifications):
                for count in self.extent.examples:
                    found[f"{form} {ENTROPY}, {count} examples"] = partial(self._by_entropy, form, count)
            for name, method in self.extent.peft_methods.items():
                if name != "cat" or form == "(i)":
                    found[f"{form} PEFT {name}"] = partial(self._by_peft, name, method, form)
        return found

    @property
    def flow(self) -> str:
        """The name of what is judged."""
        return f"Flowra (flow), {max(self.extent.examples)} examples"

    def _by_data(self, rule: str, form: str, count: int) -> Made:
        return self.merged(rule, form, examples=count), {}

    def _tuned(self, method: Method, form: str) -> Made:
        return self.at_best_scale((self.merged(method.rule, form, each), each.given()) for each in method.options)

    def _flow_tuned(self, form: str) -> Made:
        return self.at_best_scale([self._by_data("flow", form, max(self.extent.examples))])

    def _flow_at_one_rank(self) -> Made:
        """Merge by flow, without an allocation of the budget."""
        count = max(self.extent.examples)
        merged = merge_updates(
            self.updates,
            [1.0] * len(self.updates),
            rule="flow",
            truncation=Truncation(rank=RANK),
            statistics=self.known(count),
        )
        return merged, {}

    def _by_entropy(self, form: str, count: int) -> Made:
        """Weights by task and module, of the least entropy; the same for both forms."""
        file = self.folder / f"coefficients-{count}.json"
        with claimed(file, wait=True) as mine:
            if mine:
                self._learn_coefficients(file, count)
        weights = json.loads(file.read_text(encoding="utf-8"))
        return self.merged("task_arithmetic", form, examples=count, weights=weights), {}

    def _learn_coefficients(self, file: Path, count: int) -> None:
        first = self.tasks[0]
        first.wear({})
        first.model.eval()
        batches = [
            [
                made.setting.collate([made.training[index] for index in range(begin, begin + 8)])
                for begin in range(0, count, 8)
            ]
            for made in self.tasks
        ]
        learned = learn_coefficients(
            first.model,
            self.updates,
            batches,
            _logits,
            heads=[made.head for made in self.tasks],
            steps=self.extent.entropy_steps,
        )
        file.write_text(json.dumps(learned.weights), encoding="utf-8")

    def _by_peft(self, name: str, method: PeftMethod, form: str) -> Made:
        return self.at_best_scale(
            (self._in_peft(method.arguments(name, density, form)), {} if density is None else {"density": density})
            for density in method.densities
        )

    def _in_peft(self, arguments: Mapping[str, Any]) -> Updates:
        """Let PEFT merge, heads left out."""
        base = AutoModel.from_pretrained(str(resolve(MODEL)))
        prefix = self.tasks[0].model.base_model_prefix
        layers = [name.removeprefix(f"{prefix}.") for name in self.updates[0]]
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers)
        model = peft.PeftModel(base, config, adapter_name=self.names[0])
        for name in self.names[1:]:
            model.add_adapter(name, config)
        hosts = {f"{prefix}.{layer}": base.get_submodule(layer) for layer in layers}
        for task, updates in zip(self.names, self.updates, strict=True):
            for name, host in hosts.items():
                host.lora_A[task].weight.data = updates[name].lora_A.clone()
                host.lora_B[task].weight.data = updates[name].scaling * updates[name].lora_B
        torch.manual_seed(0)  # of DARE
        model.base_model.add_weighted_adapter(self.names, [1.0] * len(self.names), "merged", **arguments)
        return {
            name: LowRankUpdate(
                host.lora_A["merged"].weight.detach(),
                host.lora_B["merged"].weight.detach(),
                float(host.scaling["merged"]),
            )
            for name, host in hosts.items()
        }


PREDICTED = frozenset(
    f"{form} {name}"
    for form in ("(i)", "(ii)")
    for name in ("task arithmetic", *(f"Flowra (flow), {count} examples" for count in (32, 64, 256)))
)
"""The ways whose interference is predicted."""
BEATEN = {"task arithmetic": "task arithmetic", "TIES": "TIES", "KnOTS": "KnOTS", "TSV-M": "TSV-M", "PEFT": "PEFT"}
"""What is said, and how the names of these ways begin."""


NO_SCALE = 0.01
"""Average retention that a tuned scale may add to flow, which is said to need none."""


def _scaled(updates: Updates, scale: float) -> Updates:
    return {name: replace(each, scaling=scale * each.scaling) for name, each in updates.items()}


def _logits(call: Callable[..., Any], batch: Mapping[str, Tensor], task: int) -> Tensor:
    return call(**{key: value for key, value in batch.items() if key != "labels"}).logits


def _share(value: float, alone: float) -> float:
    """Return a score as a share; NaN where the adapter has learned nothing, as with few steps."""
    return value / alone if alone > 0 else math.nan


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a way got, beside the adapters alone and the base."""

    scores: Mapping[str, Score]
    alone: Mapping[str, float]
    base: Mapping[str, float]
    parameters: int
    chosen: Mapping[str, Any]

    @property
    def retention(self) -> dict[str, float]:
        """Each task's score as a share of what its own adapter gets."""
        return {name: _share(score.value, self.alone[name]) for name, score in self.scores.items()}

    @property
    def average(self) -> float:
        """Mean retention."""
        return float(np.mean([*self.retention.values()]))

    @property
    def worst(self) -> float:
        """Least retention."""
        return min(self.retention.values())

    @property
    def points(self) -> float:
        """Mean score × 100."""
        return 100 * statistics.mean(score.value for score in self.scores.values())

    @property
    def largest_drop(self) -> float:
        """In points."""
        return 100 * max(self.alone[name] - score.value for name, score in self.scores.items())

    @property
    def interference(self) -> float:
        """Mean share of the adapters' gains that is lost."""
        gains = {name: self.alone[name] - self.base[name] for name in self.scores}
        lost = [
            (self.alone[name] - score.value) / gains[name] for name, score in self.scores.items() if gains[name] > 0
        ]
        return statistics.mean(lost) if lost else math.nan


def fill(suite: Suite) -> None:
    """Make what is missing."""
    suite.references()
    for name, make in suite.ways().items():
        suite.kept(name, make)


def outcomes(suite: Suite) -> dict[str, Outcome]:
    """Read what there is of a suite."""
    contents = {
        name: json.loads(suite.file(name).read_text(encoding="utf-8"))
        for name in (ALONE, BASE, JOINTLY, *suite.ways())
        if suite.file(name).exists()
    }
    scores = {
        name: {
            task: Score(tuple(answers), tuple(targets), metric)
            for task, (answers, targets, metric) in content["scores"].items()
        }
        for name, content in contents.items()
    }
    if ALONE not in scores or BASE not in scores:
        return {}
    alone, base = ({task: score.value for task, score in scores[name].items()} for name in (ALONE, BASE))
    return {
        name: Outcome(
            scores=scores[name], alone=alone, base=base, parameters=content["parameters"], chosen=content["chosen"]
        )
        for name, content in contents.items()
    }


def interval(first: Outcome, second: Outcome, figure: str = "average") -> tuple[float, float]:
    """Return a 95 % interval of the difference of average or worst retention, rows of each task drawn again."""
    generator, over = np.random.default_rng(0), np.mean if figure == "average" else min
    found = []
    for _ in range(1000):
        kept: list[list[float]] = [[], []]
        for name, score in first.scores.items():
            rows = generator.integers(len(score.answers), size=len(score.answers))
            for shares, each in zip(kept, (score, second.scores[name]), strict=True):
                shares.append(_share(each.drawn(rows), first.alone[name]))
        found.append(float(over(kept[0]) - over(kept[1])))
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


def report(suite: Suite) -> list[Row]:
    """Print a suite's table and return its rows."""
    found = outcomes(suite)
    if not found:
        return []
    rows = table(suite, found)
    for form in ("(i)", "(ii)"):
        flow = found.get(f"{form} {suite.flow}")
        rows += bars(suite, form, found)
        if flow is not None:
            rows += [*nearest(suite, form, flow, found), *untuned(suite, form, flow, found)]
    flow = found.get(f"(i) {suite.flow}")
    if suite.name == "domains":
        share = None if flow is None else round(flow.points / found[ALONE].points, 4)
        rows.append(Row(what="domains (i): average of flow as a share of that of the adapters alone",
                        ours=share, limit=0.97, sense=">="))  # fmt: skip
    return rows + predictions(suite, found)


def table(suite: Suite, found: Mapping[str, Outcome]) -> list[Row]:
    """Print everything, best first."""
    rows: list[Row] = []
    alone = ", ".join(f"{name} {score.value:.3f}" for name, score in found[ALONE].scores.items())
    print(f"\n{suite.name}: each adapter alone: {alone}")
    print(f"{'':<46}{'score':>7}{'avg':>7}{'worst':>7}{'drop':>7}{'lost':>7}{'par/task':>9} " +
          "".join(f"{name:>12}" for name in suite.names))  # fmt: skip
    for name, each in sorted(found.items(), key=lambda item: -item[1].average):
        in_weights = name.startswith("(i)") or name == BASE
        beyond = 0 if in_weights else each.parameters / (1 if name == ALONE else len(suite.names))
        print(f"{name:<46}{each.points:>7.2f}{each.average:>7.3f}{each.worst:>7.3f}{each.largest_drop:>7.2f}"
              f"{each.interference:>7.3f}{beyond / 1000:>8.0f}k " +
              "".join(f"{each.retention[task]:>12.3f}" for task in suite.names) +
              "  " + ", ".join(f"{key} {value}" for key, value in each.chosen.items()))  # fmt: skip
        rows.append(Row(what=f"{suite.name}: {name}: average retention (peer: worst task)",
                        ours=round(each.average, 4), peer=round(each.worst, 4)))  # fmt: skip
        rows.append(Row(what=f"{suite.name}: {name}: largest drop in points (peer: interference)",
                        ours=round(each.largest_drop, 2), peer=round(each.interference, 4)))  # fmt: skip
    return rows


def bars(suite: Suite, form: str, found: Mapping[str, Outcome]) -> list[Row]:
    """Compare flow with what it shall beat: of several ways of a method, with the best by each figure."""
    flow_name = f"{form} {suite.flow}"
    others = {
        said: (flow_name, [name for name in suite.ways() if name.startswith(f"{form} {begins}")])
        for said, begins in BEATEN.items()
    }
    for count in suite.extent.examples:
        ours, peer = (f"{form} {rule}, {count} examples" for rule in ("Flowra (flow)", "RegMean"))
        others[f"RegMean, both with {count} examples"] = (ours, [peer])
    rows: list[Row] = []
    for said, (ours, peers) in others.items():
        for figure in ("average", "worst"):
            what, more = f"{suite.name} {form}: {figure} retention of flow less that of {said}", None
            if {ours, *peers} <= found.keys():
                best = max(peers, key=lambda name: getattr(found[name], figure))
                more = getattr(found[ours], figure) - getattr(found[best], figure)
                low, high = interval(found[ours], found[best], figure)
                what += f", 95 % [{low:+.4f}, {high:+.4f}]"
            rows.append(Row(what=what, ours=None if more is None else round(more, 6), limit=0, sense=">="))
    return rows


def nearest(suite: Suite, form: str, flow: Outcome, found: Mapping[str, Outcome]) -> list[Row]:
    """Say how sure the difference to the best other way is."""
    rows: list[Row] = []
    rivals = {name: each for name, each in found.items() if name.startswith(form) and "Flowra" not in name}
    if rivals:
        best_name = max(rivals, key=lambda name: rivals[name].average)
        low, high = interval(flow, rivals[best_name])
        print(f"{form} flow less the best other ({best_name.removeprefix(form).strip()}), average retention:"
              f" {flow.average - rivals[best_name].average:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}]")  # fmt: skip
        rows.append(Row(what=f"{suite.name} {form}: lower end of flow less the best other way (peer: upper end)",
                        ours=round(low, 4), peer=round(high, 4)))  # fmt: skip
    return rows


def untuned(suite: Suite, form: str, flow: Outcome, found: Mapping[str, Outcome]) -> list[Row]:
    """Say what a tuned scale would add to flow."""
    tuned = found.get(f"{form} {suite.flow}, scale tuned")
    if tuned is None:
        return []
    what = f"{suite.name} {form}: average retention that a tuned scale adds to flow (peer: the scale)"
    more = round(tuned.average - flow.average, 4)
    return [Row(what=what, ours=more, peer=tuned.chosen["scale"], limit=NO_SCALE, sense="<=")]


def predictions(suite: Suite, found: Mapping[str, Outcome]) -> list[Row]:
    """Print predicted against measured interference, and how far their orders agree over all tasks and ways."""
    rows: list[Row] = []
    points: list[tuple[float, float]] = []
    for name in sorted(PREDICTED & found.keys()):
        each = found[name]
        scores = {
            task: TaskScores(base=each.base[task], single=each.alone[task], merged=score.value)
            for task, score in each.scores.items()
        }
        told = replace(read_interference(suite.file(name).parent / _slug(name)), scores=scores)
        for task, predicted in told.predicted.items():
            measured = told.measured[task].interference
            if measured is not None:
                points.append((predicted, measured))
                rows.append(Row(what=f"{suite.name}: {name}: interference of {task} measured (peer: predicted)",
                                ours=round(measured, 4), peer=round(predicted, 4)))  # fmt: skip
        agreement = "unknown" if told.agreement is None else f"{told.agreement:.2f}"
        print(f"{name}: rank correlation of predicted and measured interference over the tasks {agreement}")
    if len(points) > 2:
        over_all = float(stats.spearmanr(*zip(*points, strict=True)).statistic)
        rows.append(Row(what=f"{suite.name}: rank correlation of predicted and measured interference, tasks × ways",
                        ours=round(over_all, 3)))  # fmt: skip
    return rows


def hours(suite: Suite) -> float:
    """Guess the machine hours of what is still to be done, from a few steps and rows of each task.

    Args:
        suite: of tasks.

    Returns:
        Hours; 20 seconds are allowed for each merge.
    """
    costs = {task.name: cost_of(task, suite.folder) for task in suite.specifications}
    training, testing, validating = 0.0, 0.0, 0.0
    for task in suite.specifications:
        cost = costs[task.name]
        alone = 0 if (suite.folder / task.name / "adapter").exists() else 2
        jointly = 0 if suite.file(JOINTLY).exists() else 2
        training += (alone + jointly) * task.steps * cost.step
        testing += cost.row * task.test_rows
        validating += cost.row * task.validation
    missing = [name for name in suite.ways() if not suite.file(name).exists()]
    scoring = 0.0
    for name in missing:
        short = name.split(" ", 1)[1]
        ours, theirs = suite.extent.methods.get(short), suite.extent.peft_methods.get(short.removeprefix("PEFT "))
        tries = len(ours.options) if ours and not ours.needs_data else len(theirs.densities) if theirs else 0
        tries = 1 if "tuned" in short else tries
        scoring += testing + tries * len(suite.extent.scales) * validating + 20
    left = [name for name in missing if name.startswith(f"(i) {ENTROPY}")]
    learning = len(left) * suite.extent.entropy_steps * sum(0.6 * each.step for each in costs.values())
    total = (training + scoring + learning) / 3600
    print(f"{suite.name}: training {training / 60:.0f} min, {len(missing)} ways {scoring / 60:.0f} min, entropy"
          f" {learning / 60:.0f} min; " + ", ".join(f"{name} {each.step:.2f} s a step, {1000 * each.row:.1f} ms a row"
          for name, each in costs.items()), flush=True)  # fmt: skip
    return total


def main() -> None:
    """Make what is missing, print the tables, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--finished", action="store_true", help="report what is there, run nothing")
    parser.add_argument("--quick", action="store_true", help="few steps, rows and methods; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.folder / "quick" if arguments.quick else arguments.folder
    extent = QUICK if arguments.quick else Extent()

    def suite(name: str) -> Suite:
        tasks = [quick(task) if arguments.quick else task for task in SUITES[name]]
        return Suite(name=name, specifications=tasks, folder=folder / name, extent=extent)

    names = arguments.suites.split(",")
    if not arguments.finished:
        print(f"about {sum(hours(suite(name)) for name in names):.1f} machine hours to go", flush=True)
        for name in names:
            fill(suite(name))
    rows = [row for name in names for row in report(suite(name))]
    if arguments.quick:
        print(json.dumps([(row.what, row.ours, row.peer, row.holds) for row in rows], indent=1, ensure_ascii=False))
        return
    command = f"python benchmarks/bench_composition.py FOLDER --suites {arguments.suites}"
    print(write("composition", rows, command=command))


if __name__ == "__main__":
    main()
