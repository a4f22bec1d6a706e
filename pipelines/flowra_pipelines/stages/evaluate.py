"""evaluate: held-out results of the adapter, against base and uniform LoRA at the same budget, steps and data order."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from flowra_adapters import attach, load_adapter
from flowra_pipelines.learning_rate import with_learning_rate
from flowra_pipelines.progress import meter
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.record import StageResult, read_record
from flowra_pipelines.stages.setting import (
    Setting,
    base_model,
    load_setting,
    lora_layers,
    shape_of,
    survey,
    uniform_layers,
)
from flowra_pipelines.statistics import Interval, Measure, Scores, concatenate
from flowra_pipelines.training import build_optimizer, train_phase
from flowra_pipelines.training_state import read_training_state

__all__ = ["evaluate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    title: str
    """What was trained."""
    measures: dict[str, Interval | None]
    """The task's measures by key, each with its 95 % interval; None where one is not defined."""
    parameters: int
    """Final adapter parameters; heads are not counted."""
    peak_parameters: int
    """Largest number of adapter parameters during training."""
    seconds: float
    """Training time, calibration and refinement included."""


def evaluate(config: RunConfig, folder: Path) -> StageResult:
    """Score the final adapter and the baselines; write ``metrics.json`` and per-example ``scores.safetensors``."""
    config = with_learning_rate(config, folder.parent)
    setting = load_setting(config)
    rows: dict[str, Row] = {}
    scores: dict[str, Scores] = {}
    notes: list[str] = []
    for name in config.evaluation.baselines:
        made = _baseline(name, config, setting)
        if isinstance(made, str):
            notes.append(made)
        else:
            rows[name], scores[name] = made
    rows["flowra"], scores["flowra"] = _flowra(config, setting, folder.parent)
    first = setting.task.measures[0]
    assert first.p_value is not None
    p_values = {name: first.p_value(scores["flowra"], scores[name]) for name in scores if name != "flowra"}
    level = config.evaluation.significance
    verdicts = [_verdict(first, rows[name], rows["flowra"], p_value, level) for name, p_value in p_values.items()]
    content = {
        "format_version": 1,
        "task": config.model.task,
        "test_examples": len(setting.test),
        "rows": {name: _content(row) for name, row in rows.items()},
        "p_values_against_flowra": p_values,
        "verdicts": verdicts,
        "notes": notes,
    }
    (folder / "metrics.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    save_file(_tensors(scores), folder / "scores.safetensors")
    metrics = [
        (f"test/{key}/{name}", interval.value, 0)
        for name, row in rows.items()
        for key, interval in row.measures.items()
        if interval is not None
    ]
    metrics += [(f"test/parameters/{name}", float(row.parameters), 0) for name, row in rows.items()]
    metrics += [(f"test/p_value/{name}", value, 0) for name, value in p_values.items()]
    timings = {f"seconds {name}": f"{row.seconds:.1f}" for name, row in rows.items()}
    lines = {f"verdict {index}": line for index, line in enumerate([*verdicts, *notes])}
    return StageResult(metrics=metrics, summary={**timings, **lines})


def _baseline(name: str, config: RunConfig, setting: Setting) -> tuple[Row, Scores] | str:
    """Train a baseline for all T steps, or say why it does not apply."""
    model = base_model(config, setting)
    heads = setting.task.heads(model)
    layers = survey(config, model, setting.task)
    parameters, title = 0, "base, trained head" if heads else "base"
    model.requires_grad_(False)
    if name == "uniform":
        targets = uniform_layers(config, model)
        shapes = {target: shape_of(model, target) for target in targets}
        cost = sum(sum(shape) for shape in shapes.values())
        rank = min(layers.budget // cost, *(min(shape) for shape in shapes.values()))
        if rank < 1:
            return f"uniform LoRA does not fit: rank 1 on {len(targets)} modules needs {cost:,} of {layers.budget:,}"
        attach(
            model,
            dict.fromkeys(targets, rank),
            scaling=config.adapter.scaling,
            dropout=config.adapter.dropout,
            modules_to_save=heads,
            generator=torch.Generator().manual_seed(config.seed),
        )
        parameters, title = rank * cost, f"uniform LoRA r={rank} on {_kinds(targets)}"
    for head in heads:
        model.get_submodule(head).requires_grad_(True)
    seconds = _train(model, config, setting, heads, f"evaluate: training {name}") if heads or parameters else 0.0
    scores = score(model, config, setting, f"evaluate: scoring {name}")
    return _row(title, setting, scores, parameters, parameters, seconds), scores


def _train(model: PreTrainedModel, config: RunConfig, setting: Setting, heads: list[str], description: str) -> float:
    started = time.perf_counter()
    train_phase(
        model,
        setting.train,
        build_optimizer(model, config.training, heads=heads, label_unit=setting.data.label_unit),
        config=config.training,
        collate=setting.collate,
        first_step=0,
        last_step=config.training.steps,
        seed=config.seed,
        description=description,
    )
    return time.perf_counter() - started


def _flowra(config: RunConfig, setting: Setting, run: Path) -> tuple[Row, Scores]:
    model = base_model(config, setting)
    load_adapter(model, run / "merge" / "adapter")
    scores = score(model, config, setting, "evaluate: scoring flowra")
    layers = lora_layers(model).values()
    parameters = sum(layer.num_parameters() for layer in layers)
    if config.refinement.method != "lora" and not config.merge.extra and config.merge.rule == "cat":
        parameters += sum(layer.rank for layer in layers)  # E of each triplet was trained, too; it is in B now
    records = [read_record(run / stage) for stage in ("calibrate", "allocate", "train", "refine")]
    seconds = sum(record.seconds for record in records if record is not None)
    peak = read_training_state(run / "refine").peak_parameters
    title = "Flowra" if config.allocation.plan == "flow" else f"Flowra, plan {config.allocation.plan}"
    return _row(title, setting, scores, parameters, peak, seconds), scores


@torch.inference_mode()
def score(model: torch.nn.Module, config: RunConfig, setting: Setting, description: str) -> Scores:
    """Score every test example, dropout off; texts of like length share a batch."""
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(setting.test)), key=lambda index: len(setting.test[index]["input_ids"]))
    size = config.evaluation.batch_size
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
    with meter(description, len(order)) as progress:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = setting.collate([setting.test[index] for index in chosen])
            moved = {key: value.to(device) for key, value in batch.items()}
            loss, targets, answers = setting.task.losses(model, moved)
            parts.append((loss.cpu(), targets.cpu(), None if answers is None else answers.cpu()))
            progress.advance(len(chosen))
    expected = None
    if setting.task.label == "number":
        expected = torch.tensor([row["label"] for row in setting.data.test], dtype=torch.float32)
    return concatenate(parts, order, expected=expected)


def _row(title: str, setting: Setting, scores: Scores, parameters: int, peak: int, seconds: float) -> Row:
    return Row(
        title=title,
        measures={measure.key: measure.estimate(scores) for measure in setting.task.measures},
        parameters=parameters,
        peak_parameters=peak,
        seconds=seconds,
    )


def _content(row: Row) -> dict[str, Any]:
    """Return a row of ``metrics.json``: its measures by name, no times; accuracy is always there."""
    measures = {key: None if interval is None else asdict(interval) for key, interval in row.measures.items()}
    counts = {"parameters": row.parameters, "peak_parameters": row.peak_parameters}
    return {"title": row.title, "accuracy": None, **measures, **counts}


def _tensors(scores: Mapping[str, Scores]) -> dict[str, Tensor]:
    """Return the scores of each example by name."""
    tensors = {f"{name}/loss": each.loss for name, each in scores.items()}
    for name, each in scores.items():
        if each.expected is not None:
            tensors["expected"] = each.expected
        if each.answers is not None:
            tensors[f"{name}/{'correct' if each.answers.dtype == torch.bool else 'predicted'}"] = each.answers
    return tensors


def _verdict(measure: Measure, other: Row, mine: Row, p_value: float, level: float) -> str:
    """Say in words how Flowra compares; a tie is called a tie."""
    ours, theirs = mine.measures[measure.key], other.measures[measure.key]
    assert ours is not None
    assert theirs is not None
    difference = ours.value - theirs.value
    amount = measure.difference.format(measure.scale * difference)
    if p_value >= level:
        return f"Tie: Flowra against {other.title}, {amount}, p = {p_value:.3f} (paired)."
    word = "better" if (difference > 0) == measure.more_is_better else "worse"
    return f"Flowra is {word} than {other.title}: {amount}, p = {p_value:.2g} (paired)."


def _kinds(targets: list[str]) -> str:
    return ", ".join(dict.fromkeys(target.rsplit(".", 1)[-1] for target in targets))
