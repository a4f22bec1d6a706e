"""What comes after the runs of several tasks: statistics, the merge, and every task with its own head on what came out.

Three stages on files, as those of a run: ``statistics/TASK`` (only for a rule that looks at data), ``compose`` and
``evaluate`` in the folder of the whole; the tasks' runs lie in ``tasks/``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.table import Table

from flowra_adapters import load_adapter
from flowra_compose import AdapterState, MergeOptions, read_adapter, write_adapter
from flowra_compose.interference_files import read_interference, write_interference
from flowra_compose.interference_report import TaskScores
from flowra_compose.recommendation import recommend
from flowra_pipelines.composition import Merged, as_user_errors, check_provenance, compose, truncation_of
from flowra_pipelines.composition_config import ComposedTask, CompositionConfig
from flowra_pipelines.merge_budget import check_merge
from flowra_pipelines.merge_rules import OPTIONS
from flowra_pipelines.progress import console
from flowra_pipelines.report_interference import write_interference_page
from flowra_pipelines.same_budget import number_of_same
from flowra_pipelines.stages.evaluate import score
from flowra_pipelines.stages.record import STAGES, StageRecord, StageResult, code_hash, read_record, run_once
from flowra_pipelines.stages.setting import base_model, check_inputs, load_setting, survey
from flowra_pipelines.stages.table import run_tracked
from flowra_pipelines.statistics_files import read_task_statistics
from flowra_pipelines.task_statistics import MeasureSettings, measure_run
from flowra_pipelines.tasks import TASKS
from flowra_pipelines.tracking import Tracker

__all__ = ["check_tasks", "compose_tasks", "composition_as_markdown", "run_task", "show_composition"]

METRICS = "metrics.json"


def run_task(config: CompositionConfig, name: str, tracker: Tracker, *, force: bool = False) -> None:
    """Run all stages of one task without the orchestrator, or reuse their artifacts.

    Args:
        config: of the whole.
        name: of the task.
        tracker: of the whole; the task's tracking run becomes a child of its.
        force: run them even if the artifacts are up to date.
    """
    run = config.tasks[name].run
    console.print(f"[bold]task {name}[/bold]")
    check_inputs(run)
    with Tracker(run, under=tracker.parent_run_id) as own:
        for stage in STAGES:
            run_tracked(stage, run, own, force=force)


def check_tasks(config: CompositionConfig) -> None:
    """Look at what every task and their merge are asked for, before the first is trained.

    Raises:
        UserError: for what the user can put right.
    """
    for each in config.tasks.values():
        check_inputs(each.run)
    if config.merge.budget is not None:
        first = next(iter(config.tasks.values())).run
        setting = load_setting(first)
        layers = survey(first, base_model(first, setting), setting.task)
        check_merge(config.merge.budget, (), layers.shapes, base_parameters=layers.base_parameters)


def compose_tasks(
    config: CompositionConfig, tracker: Tracker, *, force: bool = False, tags: Mapping[str, str] | None = None
) -> dict[str, StageRecord]:
    """Merge the tasks that have been trained, and evaluate each on what came out; what is unchanged is reused.

    Args:
        config: of the whole.
        tracker: of the whole.
        force: do it even if the artifacts are up to date.
        tags: of the tracking runs.

    Returns:
        Stage to record.
    """
    done: dict[str, StageRecord] = {}
    if config.merge.needs:
        for name in config.tasks:
            done[f"statistics/{name}"] = _stage(config, f"statistics/{name}", None, tags, force)
    for stage in ("compose", "evaluate"):
        done[stage] = _stage(config, stage, tracker, tags, force)
    return done


def _stage(
    config: CompositionConfig, name: str, tracker: Tracker | None, tags: Mapping[str, str] | None, force: bool
) -> StageRecord:
    """Run or reuse one stage; without a tracker it is not logged, for statistics are large and can be made again."""
    console.print(f"[bold]{name}[/bold]")
    kind, _, task = name.partition("/")
    work: dict[str, Callable[[Path], StageResult]] = {
        "statistics": lambda folder: _measure(config, task, folder),
        "compose": lambda folder: _compose(config, folder),
        "evaluate": lambda folder: _evaluate(config, folder),
    }
    reads, fingerprint = _hashes(config, kind)
    record, reused = run_once(
        config.folder / name,
        work[kind],
        reads=reads,
        fingerprint=fingerprint,
        log=(lambda result, folder: None) if tracker is None else tracker.stage(kind, tags=dict(tags or {})),
        force=force,
    )
    if reused:
        if tracker is not None:
            tracker.reused(record)
        console.print("  unchanged: reusing its artifacts")
    for key, line in record.summary.items():
        console.print(f"  {key}: {line}", markup=False)
    return record


def _hashes(config: CompositionConfig, kind: str) -> tuple[str, str]:
    """Hash what a stage reads of the configuration, and everything that decides what it makes."""
    merge = config.merge.model_dump(mode="json")
    if config.merge.budget is not None:
        merge["budget"] = number_of_same(config.merge.budget)
    reads: dict[str, Any] = {"seed": config.seed, "examples": config.merge.examples, "needs": config.merge.needs}
    if kind != "statistics":
        reads |= {"merge": merge, "weights": {name: each.weight for name, each in config.tasks.items()}}
    runs = {name: read_record(each.run.folder / "evaluate") for name, each in config.tasks.items()}
    reads["tasks"] = {name: None if record is None else record.fingerprint for name, record in runs.items()}
    made: dict[str, Any] = {
        "reads": reads,
        "code": code_hash(),
        "adapters": {name: _artifacts(each.run.folder / "merge") for name, each in config.tasks.items()},
    }
    if kind != "statistics":
        made["statistics"] = {name: _artifacts(config.folder / "statistics" / name) for name in config.tasks}
    if kind == "evaluate":
        made["compose"] = _artifacts(config.folder / "compose")
    return _digest({"kind": kind, **reads}), _digest({"kind": kind, **made})


def _artifacts(folder: Path) -> dict[str, str] | None:
    record = read_record(folder)
    return None if record is None else record.artifacts


def _digest(content: Mapping[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _own(task: ComposedTask) -> Path:
    return task.run.folder / "merge" / "adapter"


def _measure(config: CompositionConfig, name: str, folder: Path) -> StageResult:
    """Measure one task on its training texts, at all modules that a task updates."""
    inputs = {each: read_adapter(_own(task)) for each, task in config.tasks.items()}
    modules = {module for one in inputs.values() for module in one.updates}
    settings = MeasureSettings(examples=config.merge.examples, seed=config.seed, fisher="fisher" in config.merge.needs)
    run = config.tasks[name].run
    with as_user_errors():
        measure_run(run, _own(config.tasks[name]), folder, names=modules, settings=settings)
    known = read_task_statistics(folder)
    return StageResult(summary={"statistics": f"{len(known)} modules, {known.provenance['examples']} inputs"})


def _compose(config: CompositionConfig, folder: Path) -> StageResult:
    """Write ``adapter/``, for each task the same with its head, and ``interference.json``."""
    names, chosen = tuple(config.tasks), config.merge
    folders = [_own(task) for task in config.tasks.values()]
    with as_user_errors():
        inputs = [read_adapter(each) for each in folders]
        statistics = []
        if chosen.needs:
            statistics = [read_task_statistics(config.folder / "statistics" / name) for name in names]
            check_provenance(statistics, folders)
        heads = [index for index, one in enumerate(inputs) if one.modules_to_save]
        done = compose(
            folders,
            folder / "adapter",
            names=names,
            weights=[task.weight for task in config.tasks.values()],
            rule=chosen.rule,
            options=MergeOptions(**{key: getattr(chosen, key) for key in OPTIONS}),
            truncation=truncation_of(
                rank=chosen.rank,
                energy=chosen.energy,
                budget=chosen.budget,
                inputs=inputs,
                base_parameters=_base_parameters(config),
            ),
            statistics=statistics,
            heads_from=heads[0] if heads else None,
        )
    for name, own in zip(names, inputs, strict=True):
        write_adapter(_with_head(done.state, own), folder / "tasks" / name)
    write_interference(done.report, folder)
    return _result(done)


def _with_head(merged: AdapterState, own: AdapterState) -> AdapterState:
    return replace(
        merged, modules_to_save=own.modules_to_save, trained_modules=own.trained_modules, task_type=own.task_type
    )


def _base_parameters(config: CompositionConfig) -> int | None:
    """Count the base's parameters for a budget in per cent."""
    if not str(config.merge.budget).strip().endswith("%"):
        return None
    first = next(iter(config.tasks.values())).run
    setting = load_setting(first)
    model = base_model(first, setting)
    heads = tuple(f"{head}." for head in setting.task.heads(model))
    return sum(value.numel() for name, value in model.named_parameters() if not name.startswith(heads))


def _result(done: Merged) -> StageResult:
    ranks = [each.rank for each in done.state.updates.values()]
    return StageResult(
        metrics=done.metrics,
        parameters={"rule": done.rule, "tasks": len(done.report.tasks), "parameters": done.merged_parameters},
        summary={"rule": f"{done.rule}: {len(ranks)} modules, largest rank {max(ranks)}", **done.summary},
    )


def _evaluate(config: CompositionConfig, folder: Path) -> StageResult:
    """Score every task on the merged update with its own head; write ``metrics.json`` and the interference with it."""
    rows: dict[str, dict[str, Any]] = {}
    scores: dict[str, TaskScores] = {}
    for name, task in config.tasks.items():
        run, setting = task.run, load_setting(task.run)
        measure = setting.task.measures[0]
        own = json.loads((run.folder / "evaluate" / METRICS).read_text(encoding="utf-8"))["rows"]
        found = {}
        for kind, where in (("single", _own(task)), ("merged", config.folder / "compose" / "tasks" / name)):
            model = base_model(run, setting)
            load_adapter(model, where)
            found[kind] = score(model, run, setting, f"evaluate: {name}, {kind}")
        assert measure.p_value is not None
        base = own["base"][measure.key]["value"] if own.get("base", {}).get(measure.key) else None
        estimates = [measure.estimate(found[kind]) for kind in ("single", "merged")]
        single, merged = (0.0 if each is None else each.value for each in estimates)  # the first is always there
        sign = 1.0 if measure.more_is_better else -1.0
        if base is not None:
            scores[name] = TaskScores(base=sign * base, single=sign * single, merged=sign * merged)
        rows[name] = {
            "task": run.model.task,
            "measure": measure.key,
            "test_examples": len(setting.test),
            "base": base,
            "single": single,
            "merged": merged,
            "p_value_merged_against_single": measure.p_value(found["merged"], found["single"]),
            "weight": task.weight,
        }
    report = read_interference(config.folder / "compose")
    if all(name in scores for name in report.tasks):
        report = replace(report, scores={name: scores[name] for name in report.tasks})
    write_interference(report, folder)
    write_interference_page(report, folder / "interference.html", title=config.name)
    advice = recommend(report)
    content = {
        "format_version": 1,
        "rule": config.merge.rule,
        "tasks": rows,
        "measured": {name: asdict(each) for name, each in report.measured.items()},
        "worst_task": report.worst_task,
        "recommendation": {"advice": advice.advice, "basis": advice.basis, "reasons": list(advice.reasons)},
    }
    (folder / METRICS).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    metrics = [
        (f"test/{row['measure']}/{name}/{kind}", row[kind], 0)
        for name, row in rows.items()
        for kind in ("base", "single", "merged")
        if row[kind] is not None
    ]
    metrics += [
        (f"interference/measured/{name}", each.interference, 0)
        for name, each in report.measured.items()
        if each.interference is not None
    ]
    return StageResult(metrics=metrics, summary={"recommendation": f"{advice.advice}, by {advice.basis}"})


def show_composition(config: CompositionConfig) -> None:
    """Print each task's scores alone and merged, the advice, and where everything is."""
    headings, rows, lines = _cells(config)
    table = Table(title=f"{config.name}: {len(rows)} tasks, one adapter", title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for cells in rows:
        table.add_row(*cells)
    console.print()
    console.print(table)
    for line in lines:
        console.print(line, markup=False)
    console.print(f"\nArtifacts: {config.folder}", markup=False)
    console.print(f"Adapter, with the head of each task: {config.folder / 'compose' / 'tasks'}", markup=False)


def composition_as_markdown(config: CompositionConfig) -> str:
    """Return the same as Markdown."""
    headings, rows, lines = _cells(config)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [headings, ["---"] * len(headings), *rows])
    said = "\n".join(f"- {line}" for line in lines)
    return f"{table}\n\n{said}\n\nArtifacts: `{config.folder}`\n"


def _cells(config: CompositionConfig) -> tuple[list[str], list[list[str]], list[str]]:
    content = json.loads((config.folder / "evaluate" / METRICS).read_text(encoding="utf-8"))
    rows = []
    for name, row in content["tasks"].items():
        measure = TASKS[row["task"]].measures[0]
        scale, unit = (100, " %") if measure.key == "accuracy" else (1, "")
        shown = [
            "–" if row[kind] is None else f"{scale * row[kind]:.4g}{unit}" for kind in ("base", "single", "merged")
        ]
        lost = content["measured"].get(name, {}).get("interference")
        p_value = row["p_value_merged_against_single"]
        rows.append([name, measure.key, *shown, "–" if lost is None else f"{lost:.1%}", f"{p_value:.2g}"])
    headings = ["", "measure", "no adapter", "its own", "merged", "gain lost", "p"]
    advice = content["recommendation"]
    lines = [
        f"Rule: {content['rule']}",
        f"Recommendation: {advice['advice']}, by {advice['basis']}",
        *advice["reasons"],
    ]
    return headings, rows, lines
