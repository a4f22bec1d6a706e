"""Every key of a run's configuration changes what comes out, or is refused: none is without effect.

A row of the table names a key, another value for it, and the outcome that must differ. Outcomes are artifacts and
numbers, never ``reads`` and ``fingerprint`` of ``stage.json``: those differ by construction. Stages run without
``force`` on a copy of the unchanged run, so a key that the fingerprint forgets gives old artifacts, and fails, too.
"""

import csv
import dataclasses
import gc
import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import datasets
import pytest
import torch
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowra_allocation import read_plan
from flowra_analysis import read_profile, write_profile
from flowra_compose import read_adapter
from flowra_pipelines.errors import UserError
from flowra_pipelines.merge_rules import MERGE_RULES
from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.stages.calibrate import read_grams
from flowra_pipelines.stages.record import STAGES, StageResult, read_record, run_stage
from flowra_pipelines.stages.table import WORK
from flowra_pipelines.task_statistics import MeasureSettings, measure_run
from flowra_pipelines.tasks import SequenceClassification
from flowra_pipelines.tracking import Tracker
from flowra_testing.no_pictures import draw_nothing
from flowra_testing.tiny_runs import BAD, FILLER, GOOD, write_tiny_bert, write_tiny_llama

HUB = "somebody/reviews"
"""A data set of the Hub; the tests have no network, so its splits are the files below."""

BASE: Mapping[str, object] = {
    "name": "tiny",
    "output_root": "runs",
    "budget": 700,
    "model.path": "bert",
    "data.train": "reviews.csv",
    "training.steps": 20,
    "training.batch_size": 8,
    "training.learning_rate": 0.01,
    "calibration.examples": 32,
    "calibration.batch_size": 8,
    "calibration.report": False,
    "refinement.policy": "breathe",
    "refinement.events": 2,
    "refinement.observe": 2,
    "refinement.share": 0.3,
}


@dataclass(frozen=True)
class Run:
    """What is there after some stages have run in the working directory."""

    config: RunConfig
    scored: tuple[int, ...]
    """Sizes of the batches that a loss was taken of, outside training."""

    def artifact(self, stage: str, name: str) -> str:
        record = read_record(self.config.folder / stage)
        assert record is not None
        return record.artifacts[name]

    def read(self, name: str) -> dict[str, Any]:
        content = json.loads((self.config.folder / name).read_text())
        assert isinstance(content, dict)
        return content


# outcomes


def probe(run: Run) -> str:
    return run.artifact("calibrate", "adapter/adapter_model.safetensors")


def trained(run: Run) -> str:
    return run.artifact("train", "adapter/adapter_model.safetensors")


def refined(run: Run) -> str:
    return run.artifact("refine", "adapter/adapter_model.safetensors")


def merged(run: Run) -> str:
    return run.artifact("merge", "adapter/adapter_model.safetensors")


def ranks(stage: str, run: Run) -> dict[str, int]:
    with safe_open(run.config.folder / stage / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        return {key: file.get_slice(key).get_shape()[0] for key in file.keys() if ".lora_A" in key}  # noqa: SIM118


def outputs_of_the_head(run: Run) -> list[int]:
    tensors = load_file(run.config.folder / "calibrate" / "adapter" / "adapter_model.safetensors")
    return [len(tensor) for key, tensor in tensors.items() if key.endswith(("classifier.weight", "score.weight"))]


def surveyed_layers(run: Run) -> set[str]:
    return set(read_profile(run.config.folder / "calibrate").modules)


def examples_in_the_statistics(run: Run) -> set[float]:
    return {gram.examples for gram in read_grams(run.config.folder / "calibrate").values()}


def standard_errors_of_sensitivity(run: Run) -> list[float]:
    modules = read_profile(run.config.folder / "calibrate").modules
    return [module.statistics["psi_stderr"] for module in modules.values()]


def estimators_asked(run: Run) -> set[str]:
    modules = read_profile(run.config.folder / "calibrate").modules
    return {key for module in modules.values() for key in module.statistics if key.startswith("gain_")}


def fisher_traces(run: Run) -> list[float]:
    modules = read_profile(run.config.folder / "calibrate").modules
    return [module.statistics["gain_fisher"] for module in modules.values()]


def kinds_of_spectra(run: Run) -> set[str]:
    return set(read_profile(run.config.folder / "calibrate").spectra)


def pages(run: Run) -> bool:
    return (run.config.folder / "calibrate" / "report.html").exists()


def measured_blocks(run: Run) -> set[str]:
    return set(read_profile(run.config.folder / "calibrate").blocks)


def loss_changes(run: Run) -> object:
    return run.read("validate/validation.json")["ablations"]["leave_one_rank_out"]


def modules_trained_alone(run: Run) -> int:
    return len(run.read("validate/validation.json")["ablations"].get("alone", {}))


def planned_ranks(run: Run) -> dict[str, int]:
    return dict(read_plan(run.config.folder / "allocate").ranks)


def steps_of_events(run: Run) -> list[int]:
    return [event["step"] for event in run.read("refine/rank_history.json")["events"]]


def directions_dropped(run: Run) -> list[int]:
    events = run.read("refine/rank_history.json")["events"]
    return [sum(event["dropped"].values()) for event in events]


def parameters_over_time(run: Run) -> list[int]:
    found = run.read("refine/rank_history.json")
    return [found["peak"], *(event["parameters"] for event in found["events"])]


def scores_of_modules(run: Run) -> object:
    return run.read("refine/rank_history.json")["events"][0]["importance"]


def files_to_train_on(run: Run) -> set[str]:
    return {path.name for path in (run.config.folder / "refine" / "adapter").iterdir()}


def kinds_of_updates(run: Run) -> set[str]:
    sites = run.read("train/adapter/flowra_config.json")["sites"]
    return {site["method"] for site in sites.values()}


def rank_moves(run: Run) -> bool:
    return (run.config.folder / "refine" / "rank_history.json").exists()


def merged_model(run: Run) -> bool:
    return (run.config.folder / "merge" / "model" / "model.safetensors").exists()


def held_out_examples(run: Run) -> object:
    return run.read("evaluate/metrics.json")["test_examples"]


def compared_methods(run: Run) -> list[str]:
    return list(run.read("evaluate/metrics.json")["rows"])


def uniform_baseline(run: Run) -> object:
    return run.read("evaluate/metrics.json")["rows"]["uniform"]["title"]


def ties(run: Run) -> list[bool]:
    return [line.startswith("Tie: ") for line in run.read("evaluate/metrics.json")["verdicts"]]


def batches_scored(run: Run) -> int:
    return max(run.scored)


def folders_of_runs(run: Run) -> set[str]:
    return {path.parents[1].as_posix() for path in Path().rglob("stage.json")}


def experiments_by_database(run: Run) -> dict[str, list[str]]:
    found = {}
    for path in sorted(Path().rglob("*.db")):
        with closing(sqlite3.connect(path)) as database:
            names = database.execute(
                "select e.name from experiments e join runs r on r.experiment_id = e.experiment_id"
            )
            found[path.as_posix()] = sorted({name for (name,) in names})
    return found


def known_gains(run: RunConfig, *, budget: int) -> None:
    """Put into the profile that two layers are worth much: the denser one costs 64 a unit, the better one 96."""
    profile = read_profile(run.folder / "calibrate")
    worth = {"bert.encoder.layer.0.attention.self.query": 65.0, "bert.encoder.layer.0.intermediate.dense": 95.0}
    gains = {name: torch.zeros(2, dtype=torch.float64) for name in profile.modules}
    for name, each in gains.items():
        each[0] = worth.get(name, 1.0)
    changed = dataclasses.replace(
        profile,
        spectra={**profile.spectra, "flow_gains": gains},
        provenance={**profile.provenance, "budget_parameters": budget},
    )
    write_profile(changed, run.folder / "calibrate")


def rank_to_exchange(run: RunConfig, *, budget: int = 700) -> None:
    """Put into the profile that both directions of six layers are worth much, so that the plan gives them rank 2."""
    profile = read_profile(run.folder / "calibrate")
    cheapest = sorted(profile.modules, key=lambda name: (profile.modules[name].cost_per_rank, name))[:6]
    gains = {name: torch.full((2,), 2.0 if name in cheapest else 1.0, dtype=torch.float64) for name in profile.modules}
    changed = dataclasses.replace(
        profile,
        spectra={**profile.spectra, "flow_gains": gains},
        provenance={**profile.provenance, "budget_parameters": budget},
    )
    write_profile(changed, run.folder / "calibrate")


def rank_for_one(run: RunConfig) -> None:
    """Put into the profile that twelve directions of one layer are worth all, so that its rank is more than 8."""
    profile = read_profile(run.folder / "calibrate")
    gains = {name: torch.zeros(2, dtype=torch.float64) for name in profile.modules}
    gains["bert.encoder.layer.0.attention.self.query"] = torch.ones(12, dtype=torch.float64)
    write_profile(
        dataclasses.replace(profile, spectra={**profile.spectra, "flow_gains": gains}), run.folder / "calibrate"
    )


# the table


@dataclass(frozen=True)
class Row:
    """Another value of a key, and where it shows."""

    key: str
    value: object
    shows: Callable[[Run], object] | None = None
    """The outcome that must differ."""
    refused: str | None = None
    """Or the message with which the value is refused."""
    stages: Sequence[str] = ("calibrate",)
    """That run; ``track`` opens and closes a tracking run."""
    beside: Mapping[str, object] = field(default_factory=dict)
    """What must be set for the key to apply; in the unchanged run, too."""
    along: Mapping[str, object] = field(default_factory=dict)
    """What cannot but change together with the key."""
    without: Sequence[str] = ()
    """Keys of ``BASE`` that would have no effect with these; left out of both runs."""
    prepare: Callable[[RunConfig], None] | None = None
    """Puts inputs of the stages into a known state; of the unchanged run's, too."""


ALONE = {"evaluation.baselines": []}
EXTRA = {"merge.extra": [{"path": "first"}]}
FLOW = {"merge.rule": "flow", "merge.extra": [{"path": "first", "statistics": "first-statistics"}]}
NO_EFFECT = "no effect"
LANGUAGE = {"model.path": "llama", "model.task": "causal_lm", "evaluation.baselines": ["base"]}

TO_REFINE = ("allocate", "train", "refine")
OF_BREATHE = ("refinement.events", "refinement.observe", "refinement.share")
NOT_OF_SHRINK = ("refinement.observe", "refinement.share")
SHRINK = {"refinement.policy": "shrink"}
FLEXLORA = {"refinement.policy": "flexlora", "refinement.interval": 2, "refinement.b0": 2}
NO_MOVES = {"refinement.policy": "none"}
STAYING: dict[str, Any] = {
    "stages": ("allocate",),
    "beside": NO_MOVES,
    "without": OF_BREATHE,
    "prepare": rank_to_exchange,
}
IN_FLEXLORA: dict[str, Any] = {
    "stages": TO_REFINE,
    "beside": FLEXLORA,
    "without": OF_BREATHE,
    "prepare": rank_to_exchange,
}
IN_COMPAT: dict[str, Any] = IN_FLEXLORA | {"beside": {**FLEXLORA, "refinement.policy": "flexlora_compat"}}

ROWS = (
    Row("name", "another", folders_of_runs),
    Row("output_root", "elsewhere", folders_of_runs),
    Row("seed", 1, probe),
    Row("budget", 300, planned_ranks, stages=("calibrate", "allocate")),
    Row(
        "sensitivity_threshold",
        0.9,
        planned_ranks,
        stages=("allocate",),
        prepare=partial(known_gains, budget=300),
    ),
    Row("model.path", "other-bert", probe),
    Row("model.task", "regression", outputs_of_the_head, beside={"data.label": "stars"}),
    Row("model.task", "causal_lm", outputs_of_the_head, beside={"model.path": "llama"}),
    Row("model.dtype", "bfloat16", probe),
    Row("data.train", "other.csv", probe),
    Row("data.train_split", "validation", probe, beside={"data.train": HUB}),
    Row("data.train_split", "validation", refused=NO_EFFECT),
    Row("data.train_split", "test", refused=NO_EFFECT),
    Row("data.test", "test.csv", held_out_examples, stages=STAGES, beside=ALONE),
    Row("data.test_split", "validation", held_out_examples, stages=STAGES, beside={"data.test": HUB, **ALONE}),
    Row(
        "data.test_split",
        "validation",
        refused=NO_EFFECT,
        beside={"data.test": "test.csv"},
    ),
    Row(
        "data.test_split",
        "train",
        refused=NO_EFFECT,
        beside={"data.test": "test.csv"},
    ),
    Row("data.test_fraction", 0.5, held_out_examples, stages=STAGES, beside=ALONE),
    Row("data.text", "summary", probe),
    Row("data.text_pair", "summary", probe),
    Row("data.label", "tone", probe),
    Row("data.labels", ["rotten", "fresh"], outputs_of_the_head),
    Row("data.drop_duplicates", False, probe),
    Row("data.max_length", 3, probe),
    Row("data.max_test_examples", 5, held_out_examples, stages=STAGES, beside=ALONE),
    Row("adapter.targets", ["query", "value"], surveyed_layers),
    Row("adapter.exclude", ["key"], surveyed_layers),
    Row("adapter.scaling", 4.0, probe),
    Row("adapter.dropout", 0.5, probe),
    Row("training.steps", 30, probe),
    Row("training.batch_size", 4, probe),
    Row("training.length_window", 1, probe),
    Row("training.gradient_accumulation", 2, probe),
    Row("training.learning_rate", 0.02, probe),
    Row("training.learning_rate", "auto", probe),
    Row("training.head_learning_rate", 0.05, probe),
    Row("training.schedule", "cosine", probe),
    Row("training.schedule", "constant", probe),
    Row("training.warmup", 0.5, probe),
    Row("training.weight_decay", 0.5, probe),
    Row("training.max_grad_norm", 0.01, probe),
    Row("calibration.probe_fraction", 0.3, probe),
    Row("calibration.probe_factor", 8.0, partial(ranks, "calibrate")),
    Row("calibration.examples", 16, examples_in_the_statistics),
    Row("calibration.batch_size", 4, standard_errors_of_sensitivity),
    Row("calibration.estimators", ["snr"], estimators_asked),
    Row("calibration.estimators", ["probe", "fisher", "gradient", "kfac_gradient", "magnitude"], estimators_asked),
    Row("calibration.labels", "model", fisher_traces, beside={"calibration.estimators": ["fisher"]}),
    Row("calibration.labels", "model", refused="the mean gradient at labels drawn from the model is zero", stages=()),
    Row("calibration.activations", False, kinds_of_spectra),
    Row("calibration.report", True, pages),
    Row("calibration.jacobian_examples", 4, measured_blocks),
    Row("validation.examples", 16, loss_changes, stages=("validate",), beside={"validation.retrained": 0}),
    Row("validation.retrained", 1, modules_trained_alone, stages=("validate",), beside={"validation.retrained": 0}),
    Row("allocation.solver", "exact", planned_ranks, stages=("allocate",), prepare=partial(known_gains, budget=96)),
    *(
        Row("allocation.plan", plan, planned_ranks, stages=("allocate",))
        for plan in ("uniform", "random", "q,v", "attention", "mlp")
    ),
    Row(
        "allocation.plan",
        "all",
        planned_ranks,
        stages=("allocate",),
        prepare=partial(rank_to_exchange, budget=1000),
    ),
    Row("allocation.cap", 1, planned_ranks, stages=("allocate",), prepare=rank_to_exchange),
    Row("allocation.caps", {"query": 0}, planned_ranks, stages=("allocate",), prepare=rank_to_exchange),
    Row("allocation.floor", 1, planned_ranks, **STAYING | {"prepare": partial(rank_to_exchange, budget=1000)}),
    Row("allocation.floors", {"intermediate.dense": 1}, planned_ranks, **STAYING),
    Row("allocation.frozen", {"layer.0.intermediate.dense": 3}, planned_ranks, **STAYING),
    Row("allocation.rank_steps", [1], planned_ranks, **STAYING),
    Row("allocation.rank_steps", "vllm", planned_ranks, **STAYING | {"prepare": rank_for_one}),
    Row("refinement.policy", "none", rank_moves, stages=("refine",), without=OF_BREATHE),
    Row("refinement.policy", "shrink", parameters_over_time, stages=TO_REFINE, without=NOT_OF_SHRINK),
    Row("refinement.policy", "adalora", files_to_train_on, stages=TO_REFINE, without=OF_BREATHE),
    Row(
        "refinement.policy",
        "flexlora",
        files_to_train_on,
        stages=TO_REFINE,
        without=OF_BREATHE,
        along={"refinement.interval": 2},
        prepare=rank_to_exchange,
    ),
    Row(
        "refinement.policy",
        "flexlora_compat",
        refined,
        stages=TO_REFINE,
        without=OF_BREATHE,
        beside=FLEXLORA,
        prepare=rank_to_exchange,
    ),
    Row("refinement.start", 0.5, trained, stages=("train",)),
    Row("refinement.freeze", 0.9, steps_of_events, stages=("refine",)),
    Row("refinement.events", 3, steps_of_events, stages=("refine",)),
    Row("refinement.share", 0.7, directions_dropped, stages=("refine",)),
    Row("refinement.share", 0.5, planned_ranks, **IN_FLEXLORA | {"beside": {**FLEXLORA, "refinement.moves": "expand"}}),
    Row("refinement.observe", 1, refined, stages=("refine",)),
    Row(
        "refinement.measure",
        "flow",
        refined,
        stages=TO_REFINE,
        beside=SHRINK,
        without=NOT_OF_SHRINK,
    ),
    Row("refinement.kappa", 1.3, planned_ranks, stages=("allocate",), beside=SHRINK, without=NOT_OF_SHRINK),
    Row("refinement.interval", 3, steps_of_events, **IN_FLEXLORA),
    Row("refinement.b0", 1, directions_dropped, **IN_FLEXLORA),
    Row(
        "refinement.decay",
        "constant",
        steps_of_events,
        **IN_FLEXLORA | {"beside": {**FLEXLORA, "refinement.interval": 1, "refinement.b0": 1}},
    ),
    Row("refinement.r_max", 1, refined, **IN_FLEXLORA),
    Row("refinement.optimizer_reset", True, refined, **IN_COMPAT),
    Row("refinement.metric", "nuclear", scores_of_modules, **IN_FLEXLORA),
    Row("refinement.metric", "frobenius", scores_of_modules, **IN_FLEXLORA),
    Row("refinement.metric", "sensitivity", scores_of_modules, **IN_FLEXLORA),
    Row("refinement.metric", "elem_energy", scores_of_modules, **IN_FLEXLORA),
    Row("refinement.metric", "mat_energy", scores_of_modules, **IN_FLEXLORA),
    Row("refinement.moves", "prune", parameters_over_time, **IN_FLEXLORA),
    Row("refinement.moves", "expand", directions_dropped, **IN_FLEXLORA),
    Row("refinement.initialisation", "small", refined, **IN_FLEXLORA),
    Row("refinement.initialisation", "zero", refined, **IN_FLEXLORA),
    Row("refinement.initialisation", "orthogonal", refined, **IN_FLEXLORA),
    Row("refinement.back_end", "masked", kinds_of_updates, **IN_FLEXLORA),
    Row("refinement.orthogonality", 0.5, trained, **IN_FLEXLORA | {"stages": ("allocate", "train")}),
    Row("refinement.orthogonality", 0, refined, **IN_FLEXLORA),
    Row("merge.extra", [{"path": "first"}], merged, stages=("merge",)),
    Row("merge.extra[].path", "second", merged, stages=("merge",), beside=EXTRA),
    Row("merge.extra[].weight", 0.5, merged, stages=("merge",), beside=EXTRA),
    Row("merge.extra[].statistics", "first-again", merged, stages=("merge",), beside=FLOW),
    Row("merge.rule", "cat", merged, stages=("merge",), beside={**EXTRA, "merge.rule": "ties"}),
    Row("merge.rule", "task_arithmetic", merged, stages=("merge",), beside={**EXTRA, "merge.rule": "ties"}),
    Row(
        "merge.rule",
        "truncated_svd",
        partial(ranks, "merge"),
        stages=("merge",),
        beside={"merge.extra": [{"path": "last"}]},  # the run's own, so that the sum has the rank of one
        along={"merge.rank": 64},
    ),
    *(
        Row("merge.rule", name, merged, stages=("merge",), beside=EXTRA)
        for name, text in MERGE_RULES.items()
        if name not in {"cat", "task_arithmetic"} and not text.needs and not text.truncates
    ),
    *(
        Row("merge.rule", name, merged, stages=("merge",), beside=EXTRA, along={"merge.extra": FLOW["merge.extra"]})
        for name, text in MERGE_RULES.items()
        if text.needs
    ),
    Row("merge.density", 0.5, merged, stages=("merge",), beside={**EXTRA, "merge.rule": "ties"}),
    Row("merge.trim", "tensor", merged, stages=("merge",), beside={**EXTRA, "merge.rule": "ties"}),
    Row(
        "merge.trim",
        "global",
        merged,
        stages=("merge",),
        beside={**EXTRA, "merge.rule": "ties", "merge.trim": "tensor"},
    ),
    Row("merge.seed", 1, merged, stages=("merge",), beside={**EXTRA, "merge.rule": "dare_linear"}),
    Row("merge.common", 0.1, merged, stages=("merge",), beside={**EXTRA, "merge.rule": "iso_cts"}),
    Row("merge.shrinkage", 0.5, merged, stages=("merge",), beside=FLOW),
    Row("merge.examples", 16, merged, stages=("merge",), beside=FLOW),
    Row(
        "merge.rank",
        1,
        partial(ranks, "merge"),
        stages=("merge",),
        beside={**EXTRA, "merge.rule": "truncated_svd", "merge.rank": 2},
    ),
    Row(
        "merge.energy",
        0.5,
        partial(ranks, "merge"),
        stages=("merge",),
        beside={**EXTRA, "merge.rule": "truncated_svd", "merge.energy": 1.0},
    ),
    Row(
        "merge.budget",
        300,
        partial(ranks, "merge"),
        stages=("merge",),
        beside={**EXTRA, "merge.rule": "truncated_svd", "merge.budget": "2k"},
    ),
    Row("merge.tolerance", 1e-12, refused="merged logits must equal unmerged ones within 1e-12", stages=("merge",)),
    Row("merge.save_model", False, merged_model, stages=("merge",)),
    Row("evaluation.baselines", ["base"], compared_methods, stages=("evaluate",)),
    Row("evaluation.baselines", ["uniform"], compared_methods, stages=("evaluate",)),
    Row("evaluation.uniform_targets", ["q"], uniform_baseline, stages=("evaluate",)),
    Row("evaluation.batch_size", 4, batches_scored, stages=("evaluate",), beside=ALONE),
    Row("evaluation.significance", 1e-300, ties, stages=STAGES, beside=LANGUAGE),  # a level that no p-value reaches
    Row("tracking.uri", "sqlite:///tracked.db", experiments_by_database, stages=("track",)),
    Row("tracking.experiment", "another", experiments_by_database, stages=("track",)),
    # switched off by another key: refused when the configuration is read
    Row("refinement.kappa", 1.5, refused=NO_EFFECT, stages=()),
    Row("refinement.interval", 5, refused=NO_EFFECT, stages=()),
    Row("refinement.share", 0.2, refused=NO_EFFECT, stages=(), beside=FLEXLORA, without=OF_BREATHE),
    Row("refinement.events", 3, refused=NO_EFFECT, stages=(), beside={"refinement.policy": "none"}, without=OF_BREATHE),
    Row(
        "refinement.observe",
        3,
        refused=NO_EFFECT,
        stages=(),
        beside={**SHRINK, "refinement.measure": "magnitude"},
        without=OF_BREATHE,
    ),
    Row(
        "refinement.initialisation",
        "small",
        refused=NO_EFFECT,
        stages=(),
        beside={**FLEXLORA, "refinement.moves": "prune"},
        without=OF_BREATHE,
    ),
    Row("data.test_split", "dev", refused=NO_EFFECT, stages=()),
    Row("data.test_fraction", 0.5, refused=NO_EFFECT, stages=(), beside={"data.test": "test.csv"}),
    Row("data.label", "tone", refused=NO_EFFECT, stages=(), beside=LANGUAGE),
    Row("data.labels", ["rotten", "fresh"], refused=NO_EFFECT, stages=(), beside=LANGUAGE),
    Row("data.labels", ["1", "2"], refused=NO_EFFECT, stages=(), beside={"model.task": "regression"}),
    Row("data.text_pair", "summary", refused=NO_EFFECT, stages=(), beside=LANGUAGE),
    Row("training.head_learning_rate", 0.05, refused=NO_EFFECT, stages=(), beside=LANGUAGE),
    Row("merge.rank", 1, refused=NO_EFFECT, stages=()),
    Row("merge.energy", 0.5, refused=NO_EFFECT, stages=()),
    Row("merge.budget", 300, refused=NO_EFFECT, stages=()),
    Row("merge.density", 0.5, refused=NO_EFFECT, stages=()),
    Row("merge.trim", "tensor", refused=NO_EFFECT, stages=(), beside={"merge.rule": "orth"}),
    Row("merge.seed", 1, refused=NO_EFFECT, stages=(), beside={"merge.rule": "ties"}),
    Row("merge.common", 0.5, refused=NO_EFFECT, stages=(), beside={"merge.rule": "iso_c"}),
    Row("merge.shrinkage", 0.5, refused=NO_EFFECT, stages=()),
    Row("merge.examples", 64, refused=NO_EFFECT, stages=()),
    Row(
        "merge.extra[].statistics",
        "first-statistics",
        refused=NO_EFFECT,
        stages=(),
        beside={**EXTRA, "merge.rule": "cat"},
    ),
)


def title(each: Row) -> str:
    """Name a row by its key, and by the value where there are several."""
    alike = [other for other in ROWS if other.key == each.key and (other.refused is None) == (each.refused is None)]
    return each.key if len(alike) == 1 else f"{each.key}={each.value}"


def base_of(each: Row) -> dict[str, object]:
    """Return the unchanged run of a row."""
    return {**{key: value for key, value in BASE.items() if key not in each.without}, **each.beside}


def in_training(each: Row) -> bool:
    return each.key.startswith("training.") and each.refused is None


def trains_anew(each: Row) -> bool:
    """Tell whether nothing of the unchanged run can be reused from the plan on."""
    return each.stages == TO_REFINE


CHANGING = [
    pytest.param(each, id=title(each), marks=[pytest.mark.slow] if trains_anew(each) else [])
    for each in ROWS
    if each.refused is None
]
LATER = [
    pytest.param(stage, each, id=f"{stage}-{title(each)}")
    for stage, others in {
        "train": ("adapter.dropout",),
        "refine": ("adapter.dropout",),
        "evaluate": ("adapter.dropout", "adapter.scaling", "seed"),
    }.items()
    for each in ROWS
    if (in_training(each) or each.key in others) and each.value != "auto"  # calibrate alone finds the rate
]
REFUSED = [pytest.param(each, id=title(each)) for each in ROWS if each.refused is not None]


# the table is whole


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """List the keys of a section and of the sections inside, ``[]`` for those of a list, with their types."""
    for name, information in section.model_fields.items():
        annotation = information.annotation
        inner = get_args(annotation)[0] if get_origin(annotation) is tuple else annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            listed = inner is not annotation
            if listed:
                yield prefix + name, annotation
            yield from keys(inner, f"{prefix}{name}{'[]' if listed else ''}.")
        else:
            yield prefix + name, annotation


def choices(annotation: object) -> set[object]:
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {choice for part in get_args(annotation) for choice in choices(part)}


def test_every_key_has_a_row_and_every_row_a_key() -> None:
    known = [key for key, _ in keys(RunConfig)]
    assert len(known) > 50
    assert len(set(known)) == len(known)
    assert {each.key for each in ROWS} == set(known)


def test_every_key_has_a_row_that_changes_an_outcome_unless_it_only_checks() -> None:
    checks = {"merge.tolerance"}
    assert {each.key for each in ROWS if each.refused is None} == {key for key, _ in keys(RunConfig)} - checks


def test_every_choice_of_a_key_is_tried() -> None:
    tried: dict[str, set[object]] = {}
    for each in ROWS:
        others = each.value if isinstance(each.value, list) else [each.value]
        tried.setdefault(each.key, {default_of(each.key)}).update(str(other) for other in others)
    several = {key: choices(annotation) for key, annotation in keys(RunConfig) if choices(annotation)}
    assert {"model.task", "training.schedule", "evaluation.baselines"} <= several.keys()
    for key, every in several.items():
        assert every <= tried[key], key


def default_of(key: str) -> object:
    value: object = load_config(nested(BASE))
    for part in key.partition("[]")[0].split("."):
        value = getattr(value, part)
    return value if isinstance(value, str) else None


# files and runs


def nested(flat: Mapping[str, object]) -> dict[str, Any]:
    """Turn dotted keys into sections; ``list[].key`` sets the key of the list's first section."""
    content: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        inner = content
        for name in sections:
            if name.endswith("[]"):
                first, *others = inner[name[:-2]]
                inner[name[:-2]] = [inside := dict(first), *others]
            else:
                inside = inner.setdefault(name, {})
            inner = inside
        inner[last] = value
    return content


def values(section: BaseModel, prefix: str = "") -> dict[str, object]:
    """Turn sections into dotted keys."""
    flat: dict[str, object] = {}
    for key, value in section:
        flat |= values(value, f"{prefix}{key}.") if isinstance(value, BaseModel) else {prefix + key: value}
    return flat


def write_texts(path: Path, *, rows: int, seed: int) -> None:
    """Write texts of many lengths with three kinds of labels, the first of three classes, and some twice."""
    rng = random.Random(seed)
    written = []
    for index in range(rows):
        label = ("fresh", "rotten", "plot")[index % 3]
        words = [
            *rng.choices(FILLER, k=2 + index % 7),
            *rng.choices({"fresh": GOOD, "rotten": BAD}.get(label, FILLER), k=2),
        ]
        summary = " ".join(rng.choices(FILLER, k=3))
        written.append([" ".join(words), label, summary, rng.choice(("calm", "loud")), 1 + index % 4])
    written += written[:5]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([["text", "label", "summary", "tone", "stars"], *written])


def write_inputs() -> None:
    write_tiny_bert(Path("bert"))
    write_tiny_llama(Path("llama"))
    shutil.copytree("bert", "other-bert")
    weights = load_file("bert/model.safetensors")
    save_file({name: 1.1 * each for name, each in weights.items()}, "other-bert/model.safetensors", {"format": "pt"})
    for name, rows, seed in (("reviews", 120, 0), ("other", 120, 1), ("test", 60, 2)):
        write_texts(Path(f"{name}.csv"), rows=rows, seed=seed)


def measure_first() -> None:
    """Measure what rules need of the adapter in ``first``, twice."""
    config, modules = load_config(nested(BASE)), read_adapter("first").updates
    for folder, seed in (("first-statistics", 0), ("first-again", 1)):
        settings = MeasureSettings(examples=24, seed=seed, fisher=True)
        measure_run(config, Path("first"), Path(folder), names=modules, settings=settings)


def unlogged(result: StageResult, folder: Path) -> None:
    return None


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the inputs of all rows and the unchanged run, finished."""
    folder = tmp_path_factory.mktemp("origin")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        for name in ("calibrate", "validate"):
            patch.setattr(import_module(f"flowra_pipelines.stages.{name}"), "profile_report", lambda *_: ({}, "a page"))
        torch.set_num_threads(1)
        with patch.context() as inside:
            inside.chdir(folder)
            write_inputs()
            run(BASE, (*STAGES, "track"))
            shutil.copy("runs/mlflow.db", "tracked.db")
            with closing(sqlite3.connect("tracked.db")) as database, database:
                database.execute("update experiments set name = 'older' where name = 'flowra'")
            for name, stage in {"first": "train", "second": "calibrate", "last": "refine"}.items():
                shutil.copytree(Path("runs", "tiny", stage, "adapter"), name)
            measure_first()
        gc.collect()
        gc.freeze()  # the trainer collects garbage after each phase: leave it little to look through
        yield folder
        gc.unfreeze()


@pytest.fixture
def scored(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Work in a copy of the origin; gives the sizes of the batches that are scored from now on."""
    for path in origin.iterdir():
        if path.name == "runs":
            shutil.copytree(path, tmp_path / "runs")
        elif path.suffix == ".db":
            shutil.copy(path, tmp_path)
        else:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    load_dataset, losses = datasets.load_dataset, SequenceClassification.losses
    hub = {"train": "reviews.csv", "validation": "other.csv", "test": "test.csv"}
    sizes: list[int] = []

    def with_hub(name: str, **options: object) -> datasets.Dataset:
        if name == HUB:
            name, options = "csv", {"data_files": hub, **options}
        return load_dataset(name, **options)

    def counted(self: SequenceClassification, model: nn.Module, batch: dict[str, Tensor]) -> object:
        sizes.append(len(batch["input_ids"]))
        return losses(self, model, batch)

    monkeypatch.setattr(datasets, "load_dataset", with_hub)
    monkeypatch.setattr(SequenceClassification, "losses", counted)
    return sizes


def run(flat: Mapping[str, object], stages: Sequence[str], scored: list[int] | None = None) -> Run:
    """Run stages in the working directory, or reuse what is there."""
    config = load_config(nested(flat))
    sizes = [] if scored is None else scored
    sizes.clear()
    for stage in stages:
        if stage == "track":
            with Tracker(config):
                pass
        else:
            run_stage(stage, WORK[stage], config, log=unlogged)
    return Run(config, tuple(sizes))


# every key does something


@pytest.mark.parametrize("row", CHANGING)
def test_a_key_changes_an_outcome(row: Row, scored: list[int]) -> None:
    assert row.shows is not None
    unchanged = base_of(row)
    if row.prepare is not None:
        row.prepare(load_config(nested(unchanged)))
    first = run(unchanged, row.stages, scored)
    before = row.shows(first)
    second = run({**unchanged, **row.along, row.key: row.value}, row.stages, scored)
    after = row.shows(second)
    were, are = values(first.config), values(second.config)
    different = {key for key in were if were[key] != are[key]}
    assert different == {row.key.partition("[]")[0], *row.along}, "a row must change its key alone"
    assert after != before, f"{row.key} must have an effect, got the same outcome for {row.value!r}"


@pytest.mark.parametrize(("stage", "row"), LATER)
def test_a_key_of_training_counts_in_every_stage_that_trains(stage: str, row: Row, scored: list[int]) -> None:
    """Between the files of the unchanged run, so that the stage alone makes the difference."""
    config = load_config(nested({**BASE, "evaluation.baselines": ["uniform"], row.key: row.value}))
    again = config.folder / "again"
    again.mkdir()
    WORK[stage](config, again)
    if stage == "evaluate":  # the baseline is trained as Flowra is
        before, after = (load_file(folder / "scores.safetensors") for folder in (config.folder / stage, again))
        assert torch.equal(after["flowra/loss"], before["flowra/loss"])
        assert not torch.equal(after["uniform/loss"], before["uniform/loss"]), f"{row.key} has no effect on {stage}"
    else:
        tensors = Path("adapter", "adapter_model.safetensors")
        before, after = ((folder / tensors).read_bytes() for folder in (config.folder / stage, again))
        assert after != before, f"{row.key} has no effect on {stage}"


def test_later_stages_train_at_the_rate_that_calibrate_proposed(scored: list[int]) -> None:
    auto = {**BASE, "training.learning_rate": "auto"}
    run(auto, ("calibrate", "allocate", "train"))
    proposed = read_profile(Path("runs", "tiny", "calibrate")).provenance["learning_rate"]
    trained_at = Path("runs", "tiny", "train", "adapter", "adapter_model.safetensors").read_bytes()
    run({**BASE, "training.learning_rate": proposed}, ("calibrate", "allocate", "train"))
    assert Path("runs", "tiny", "train", "adapter", "adapter_model.safetensors").read_bytes() == trained_at


def test_a_stage_after_a_calibration_without_a_proposal_is_refused(scored: list[int]) -> None:
    config = load_config(nested({**BASE, "training.learning_rate": "auto"}))
    with pytest.raises(UserError, match=r"learning_rate must be in the profile's provenance, got None\. Run `flowra"):
        WORK["train"](config, config.folder / "again")


@pytest.mark.parametrize("row", REFUSED)
def test_a_key_is_refused_where_it_cannot_apply(row: Row, scored: list[int]) -> None:
    run(base_of(row), row.stages)
    with pytest.raises(UserError, match=row.refused):
        run_what_should_be_refused(row)


def run_what_should_be_refused(row: Row) -> None:
    run({**base_of(row), row.key: row.value}, row.stages)
    pytest.fail(f"{row.key} must be refused where it cannot apply, got {row.value!r} accepted, beside {row.beside}")


def test_an_unchanged_configuration_gives_the_same_artifacts_again(scored: list[int]) -> None:
    again = run({**BASE, "output_root": "again"}, STAGES).config
    for stage in STAGES:
        first, second = read_record(Path("runs", "tiny", stage)), read_record(again.folder / stage)
        assert first is not None
        assert second is not None
        assert second.artifacts == first.artifacts
        assert second.artifacts
