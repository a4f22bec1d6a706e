"""Composition on real tasks: what each way of making one update of five adapters keeps of each task.

FLOWRA_DATA=… python benchmarks/bench_composition.py FOLDER [--suites glue,domains] [--threads N] [--finished]

Five GLUE tasks, and one task in five domains (``_one_base.py``): the adapters are trained once, frozen, and the same
for all methods; every task keeps its head. A merged update is judged (i) merged into the weights, and (ii) truncated to the
parameters of one adapter. Methods without data get their best scale from 200 validation rows of each task, and are
shown at scale 1 as well; methods with data take the statistics of 64 or 256 unlabelled training rows of each task, and
no scale. "Average" is the mean over tasks of the task's metric as a share of what its own adapter gets (retention), and
"worst" the least of these. PEFT's own merges are made by PEFT. Beside them: each adapter alone, the base under the
trained heads, and LoRA of the same rank trained on all tasks at once.

Every figure is kept in FOLDER and made once; a run that was broken off goes on where it stopped.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from _one_base import MODEL, SUITES, Score, TaskModel, statistics_of, trained
from _results import Row, write
from transformers import AutoModel

from flowra_compose import RULES, LowRankUpdate, MergeOptions, ModuleStatistics, Truncation, merge_updates
from flowra_pipelines.sources import resolve

SCALES = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5)
"""Of the weights of all adapters; 0.2 is the mean of five."""
EXAMPLES = (64, 256)
Updates = Mapping[str, LowRankUpdate]


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A row of the table."""

    rule: str
    options: tuple[MergeOptions, ...] = (MergeOptions(),)
    """Tried on the validation rows, each at each scale."""

    @property
    def needs_data(self) -> bool:
        """Whether it takes statistics, and then no scale."""
        return bool(RULES[self.rule].needs)


METHODS: Mapping[str, Method] = {
    "task arithmetic": Method(rule="task_arithmetic"),
    "TIES": Method(rule="ties", options=tuple(MergeOptions(density=each) for each in (0.2, 0.3))),
    "DARE, linear": Method(rule="dare_linear", options=tuple(MergeOptions(density=each) for each in (0.3, 0.7))),
    "DARE, TIES": Method(rule="dare_ties", options=tuple(MergeOptions(density=each) for each in (0.3, 0.7))),
    "magnitude prune": Method(rule="magnitude_prune", options=(MergeOptions(density=0.3),)),
    "KnOTS, TIES": Method(rule="knots_ties", options=tuple(MergeOptions(density=each) for each in (0.2, 0.3))),
    "KnOTS, DARE, TIES": Method(rule="knots_dare_ties", options=(MergeOptions(density=0.3),)),
    "TSV-M": Method(rule="tsv_m"),
    "Iso-C": Method(rule="iso_c"),
    "Iso-CTS": Method(rule="iso_cts"),
    "Core Space, task arithmetic": Method(rule="core_task_arithmetic"),
    "Core Space, TIES": Method(rule="core_ties", options=(MergeOptions(density=0.2),)),
    "WUDI": Method(rule="wudi"),
    "Flowra, without data (orth)": Method(rule="orth"),
    "Fisher": Method(rule="fisher"),
    "RegMean": Method(rule="regmean"),
    "Flowra (flow)": Method(rule="flow"),
}
PEFT_TYPES: Mapping[str, Mapping[str, Any]] = {
    "PEFT linear": {"combination_type": "linear"},
    "PEFT svd": {"combination_type": "svd", "svd_rank": 8},
    "PEFT ties": {"combination_type": "ties", "density": 0.2},
    "PEFT dare_ties": {"combination_type": "dare_ties", "density": 0.3},
    "PEFT magnitude_prune": {"combination_type": "magnitude_prune", "density": 0.3},
    "PEFT ties_svd": {"combination_type": "ties_svd", "density": 0.2, "svd_rank": 8},
}
FLOW = "Flowra (flow), 256 examples"
BEATEN = ("task arithmetic", "TIES", "KnOTS, TIES", "TSV-M", "RegMean, 256 examples", "PEFT")


@dataclass
class Suite:
    """Five tasks with their adapters, and what has been found out of them."""

    name: str
    folder: Path
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)

    @cached_property
    def tasks(self) -> list[TaskModel]:
        """The tasks; adapters are trained where they are missing."""
        return [trained(task, self.folder / self.name) for task in SUITES[self.name]]

    @cached_property
    def updates(self) -> list[Updates]:
        """What is merged."""
        return [dict(each.updates) for each in self.tasks]

    def known(self, examples: int) -> list[dict[str, ModuleStatistics]]:
        """Statistics of every task."""
        if examples not in self._statistics:
            self._statistics[examples] = [statistics_of(each, examples) for each in self.tasks]
        return self._statistics[examples]

    @cached_property
    def _statistics(self) -> dict[int, list[dict[str, ModuleStatistics]]]:
        return {}

    @property
    def parameters(self) -> int:
        """Of one adapter."""
        return sum(each.parameters for each in self.updates[0].values())

    def scored(self, updates: Updates, *, validation: bool = False) -> dict[str, Score]:
        """Score every task under one update."""
        found = {}
        for each in self.tasks:
            each.wear(updates)
            found[each.task.name] = each.score(each.validation if validation else each.setting.test)
        return found

    def kept(self, name: str, make: Callable[[], tuple[Updates, Mapping[str, Any]]]) -> dict[str, Any]:
        """Return the scores of a way, found once."""
        slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
        file = self.folder / self.name / "scores" / f"{slug}.json"
        if not file.exists():
            began = time.perf_counter()
            updates, chosen = make()
            made_in = time.perf_counter() - began
            content = {
                "chosen": dict(chosen),
                "seconds": round(made_in, 2),
                "parameters": sum(each.parameters for each in updates.values()),
                "scores": {task: [*score.answers] for task, score in self.scored(updates).items()},
            }
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content), encoding="utf-8")
            print(f"{self.name}: {name}, {time.perf_counter() - began:.0f} s", flush=True)
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def score_of(self, task: TaskModel, answers: Sequence[float]) -> Score:
        """Put answers beside the test rows' labels again."""
        labels = tuple(float(task.setting.test[index]["labels"]) for index in range(len(task.setting.test)))
        return Score(tuple(answers), labels, task.task.metric)

    def values(self, content: Mapping[str, Any]) -> dict[str, Score]:
        """Return the scores in what was kept."""
        return {each.task.name: self.score_of(each, content["scores"][each.task.name]) for each in self.tasks}

    def alone(self) -> dict[str, Score]:
        """Score every task under its own adapter."""

        def nothing() -> tuple[Updates, Mapping[str, Any]]:
            return {}, {}

        file = self.folder / self.name / "scores" / "alone.json"
        if not file.exists():
            scores = {}
            for each, update in zip(self.tasks, self.updates, strict=True):
                each.wear(update)
                scores[each.task.name] = [*each.score(each.setting.test).answers]
            self.kept("base", nothing)
            file.write_text(json.dumps({"scores": scores}), encoding="utf-8")
        return self.values(json.loads(file.read_text(encoding="utf-8")))


def retention(suite: Suite, scores: Mapping[str, Score], alone: Mapping[str, Score]) -> dict[str, float]:
    """Return each task's metric as a share of what its own adapter gets."""
    return {name: score.value / alone[name].value for name, score in scores.items()}


def chosen(suite: Suite, method: Method, truncation: Truncation | None) -> tuple[Updates, Mapping[str, Any]]:
    """Tune a method without data on the validation rows."""
    best: tuple[float, Updates, Mapping[str, Any]] | None = None
    for options in method.options:
        for scale in SCALES:
            merged = merge_updates(
                suite.updates, [scale] * len(suite.tasks), rule=method.rule, options=options, truncation=truncation
            )
            found = statistics.mean(each.value for each in suite.scored(merged, validation=True).values())
            if best is None or found > best[0]:
                best = (found, merged, {"scale": scale, **options.given()})
    assert best is not None
    return best[1], best[2]


def by_peft(suite: Suite, arguments: Mapping[str, Any]) -> tuple[Updates, Mapping[str, Any]]:
    """Let PEFT merge, and take its ΔW; the scale is tuned like that of others."""
    names = [task.task.name for task in suite.tasks]
    model = _in_peft(suite)
    best: tuple[float, Updates, Mapping[str, Any]] | None = None
    for scale in SCALES:
        torch.manual_seed(0)  # of DARE
        model.add_weighted_adapter(names, [scale] * len(names), f"merged-{scale}", **arguments)
        merged = {
            name: LowRankUpdate.of_delta_weight(layer.get_delta_weight(f"merged-{scale}").detach())
            for name, layer in _peft_layers(model)
        }
        found = statistics.mean(each.value for each in suite.scored(merged, validation=True).values())
        if best is None or found > best[0]:
            best = (found, merged, {"scale": scale})
    assert best is not None
    return best[1], best[2]


def _in_peft(suite: Suite) -> Any:  # noqa: ANN401
    """Load the adapters into PEFT, heads left out."""
    base = AutoModel.from_pretrained(str(resolve(MODEL)))
    names = [name.removeprefix("bert.") for name in suite.updates[0]]
    ranks = {update.rank for update in suite.updates[0].values()}
    config = peft.LoraConfig(r=max(ranks), lora_alpha=max(ranks), target_modules=names)
    model = peft.PeftModel(base, config, adapter_name=suite.tasks[0].task.name)
    for task in suite.tasks[1:]:
        model.add_adapter(task.task.name, config)
    for task, updates in zip(suite.tasks, suite.updates, strict=True):
        for name, layer in _peft_layers(model):
            layer.lora_A[task.task.name].weight.data = updates[name].lora_A.clone()
            layer.lora_B[task.task.name].weight.data = updates[name].scaling * updates[name].lora_B
    return model.base_model


def _peft_layers(model: Any) -> Iterable[tuple[str, Any]]:  # noqa: ANN401
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            yield f"bert.{name.removeprefix('model.').removeprefix('base_model.model.')}", module


def ways(suite: Suite) -> dict[str, dict[str, Any]]:
    """Merge in every way, (i) into the weights and (ii) truncated; return what was kept of each."""
    found: dict[str, dict[str, Any]] = {}
    ones = [1.0] * len(suite.tasks)
    for form, truncation in (("(i)", None), ("(ii)", Truncation(parameters=suite.parameters))):
        for name, method in METHODS.items():
            if method.needs_data:
                for count in EXAMPLES:
                    title = f"{name}, {count} examples"
                    found[f"{form} {title}"] = suite.kept(
                        f"{form} {title}",
                        lambda method=method, count=count, truncation=truncation: (
                            merge_updates(
                                suite.updates, ones, rule=method.rule, statistics=suite.known(count),
                                truncation=truncation,
                            ),
                            {},
                        ),
                    )  # fmt: skip
                continue
            found[f"{form} {name}"] = suite.kept(
                f"{form} {name}", lambda method=method, truncation=truncation: chosen(suite, method, truncation)
            )
            found[f"{form} {name}, scale 1"] = suite.kept(
                f"{form} {name}, scale 1",
                lambda method=method, truncation=truncation: (
                    merge_updates(
                        suite.updates, ones, rule=method.rule, options=method.options[0], truncation=truncation
                    ),
                    {},
                ),
            )
    for name, arguments in PEFT_TYPES.items():
        found[f"(ii) {name}"] = suite.kept(f"(ii) {name}", lambda arguments=arguments: by_peft(suite, arguments))
    return found


def drawn_difference(
    suite: Suite, first: Mapping[str, Score], second: Mapping[str, Score], alone: Mapping[str, Score]
) -> tuple[float, float]:
    """Return a 95 % interval of the difference of average retention, rows of each task drawn again."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(1000):
        total = 0.0
        for name, score in first.items():
            rows = generator.integers(len(score.answers), size=len(score.answers))
            total += (score.drawn(rows) - second[name].drawn(rows)) / alone[name].value
        found.append(total / len(first))
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


def report(suite: Suite) -> list[Row]:
    """Print a suite's table and return its rows."""
    alone = suite.alone()
    found = {name: suite.values(content) for name, content in ways(suite).items()}
    found["base under the heads"] = suite.values(suite.kept("base", lambda: ({}, {})))
    rows: list[Row] = []
    shares = {name: retention(suite, scores, alone) for name, scores in found.items()}
    names = [each.task.name for each in suite.tasks]
    print(f"\n{suite.name}: each adapter alone", {name: round(alone[name].value, 3) for name in names})
    print(f"{'':<44}{'average':>8}{'worst':>8}  " + "".join(f"{name:>12}" for name in names))
    for name, share in sorted(shares.items(), key=lambda each: -statistics.mean(each[1].values())):
        average, worst = statistics.mean(share.values()), min(share.values())
        print(f"{name:<44}{average:>8.3f}{worst:>8.3f}  " + "".join(f"{share[each]:>12.3f}" for each in names))
        rows.append(Row(what=f"{suite.name}: {name}: average retention (peer: worst task)",
                        ours=round(average, 4), peer=round(worst, 4)))  # fmt: skip
    for form in ("(i)", "(ii)"):
        flow = shares[f"{form} {FLOW}"]
        for beaten in BEATEN:
            peers = [name for name in shares if name.startswith(f"{form} {beaten}") and not name.endswith("scale 1")]
            for figure, judge in (("average", statistics.mean), ("worst task", min)):
                if peers:
                    best = max(float(judge(list(shares[name].values()))) for name in peers)
                    ours = round(float(judge(list(flow.values()))) - best, 4)
                    what = f"{suite.name} {form}: {figure} of flow less that of {beaten}"
                    rows.append(Row(what=what, ours=ours, limit=0, sense=">="))
        best_peer = max(
            (name for name in shares if name.startswith(form) and "Flowra" not in name),
            key=lambda name: statistics.mean(shares[name].values()),
        )
        low, high = drawn_difference(suite, found[f"{form} {FLOW}"], found[best_peer], alone)
        print(f"{form} flow less the best other ({best_peer}): 95 % interval of the average [{low:+.4f}, {high:+.4f}]")
    if suite.name == "domains":
        rows.append(Row(what="domains (i): average retention of flow", limit=0.97, sense=">=",
                        ours=round(statistics.mean(shares[f"(i) {FLOW}"].values()), 4)))  # fmt: skip
    return rows


def main() -> None:
    """Make what is missing, print the tables, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for name in arguments.suites.split(",") for row in report(Suite(name, arguments.folder))]
    print(write("composition", rows, command="python benchmarks/bench_composition.py FOLDER"))


if __name__ == "__main__":
    main()
