"""What ``flowra merge`` and ``flowra statistics`` say when they are done."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from flowra_compose import read_adapter
from flowra_compose.module_updates import Weight
from flowra_compose.recommendation import Recommendation, recommend
from flowra_pipelines.composition import Merged, as_user_errors
from flowra_pipelines.errors import UserError
from flowra_pipelines.export import adapter_folder
from flowra_pipelines.merge_job import MergeJob, reader_of, run_merge
from flowra_pipelines.progress import console
from flowra_pipelines.run_config import load_config
from flowra_pipelines.statistics_files import JSON_NAME, TENSORS_NAME, read_task_statistics
from flowra_pipelines.task_statistics import MeasureSettings, data_source, measure_adapter, measure_run

__all__ = ["show_merge", "show_statistics"]

BASIS = {"measured": "what was measured", "predicted": "the statistics", "geometry": "the geometry of the updates"}
SHOWN = 5


def show_merge(job: MergeJob, *, report: Path | None, as_json: bool, track: bool = False) -> None:
    """Merge, write a page and log to MLflow if wanted, and print what came out.

    Raises:
        UserError: for what the user can put right.
    """
    if report is not None and report.suffix != ".html":
        raise UserError(f"report must be a path that ends in .html, got {report}")
    done = run_merge(job)
    if report is not None:
        from flowra_pipelines.report_interference import write_interference_page

        write_interference_page(done.report, report)
    run = None
    if track:
        from flowra_pipelines.merge_tracking import track_merge

        run = track_merge(job, done)
    advice = recommend(done.report)
    if as_json:
        sys.stdout.write(json.dumps(_content(done, advice, report), indent=2, allow_nan=False) + "\n")
        return
    console.print(_table(done), soft_wrap=False)
    modules = done.state.updates
    ranks = sorted(each.rank for each in modules.values())
    console.print(f"Rule: {done.rule}, {done.why}")
    console.print(f"Modules: {len(modules)}, of rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[-1] > ranks[0] else ""))
    if done.loss is not None:
        console.print(f"Cut: at most {done.loss[1]:.2%} of a module's squared size was lost, at {done.loss[0]}")
    worst = done.report.worst_task
    if worst is not None:
        console.print(f"Worst task: {worst[0]}, which loses about {worst[1]:.1%} of what its adapter gains")
    console.print(f"Recommendation: [bold]{advice.advice}[/bold], by {BASIS[advice.basis]}")
    for line in (*advice.reasons, *advice.would_change):
        console.print(f"  {line}", markup=False)
    if done.state.modules_to_save:
        console.print(f"Heads: {', '.join(done.state.trained_modules)}")
    console.print(f"Written: {done.path}" + (f", {report}" if report is not None else ""), markup=False)
    if run is not None:
        console.print(f"Logged: run {run}. Look at it with: flowra ui", markup=False)


def show_statistics(
    adapter: Path,
    out: Path,
    *,
    data: str | None,
    others: Sequence[Path],
    base: str | None,
    settings: MeasureSettings,
) -> None:
    """Measure a task's statistics, write them, and say what they are.

    Args:
        adapter: folder of an adapter or of a run, or a run's YAML file.
        out: folder to write.
        data: inputs, unless a YAML file says them.
        others: adapters whose modules are measured, too.
        base: of the adapter; by default what it says.
        settings: how.

    Raises:
        UserError: for what the user can put right.
    """
    folder = adapter_folder(adapter)
    if out.exists() and (not out.is_dir() or {each.name for each in out.iterdir()} - {JSON_NAME, TENSORS_NAME}):
        raise UserError(f"out must be a new folder or one with statistics, got {out}")
    config = load_config(adapter) if adapter.suffix in (".yaml", ".yml") else None
    if config is None and data is None:
        raise UserError(f"data must be given with an adapter, got none for {adapter}. Give --data FILE.")
    if config is not None and (data is not None or base is not None):
        raise UserError("data and base must be left out with a YAML file, which says them")
    with as_user_errors():
        reader = reader_of(base or (config.model.path if config else None), [folder])
        names = {
            name for each in (folder, *map(adapter_folder, others)) for name in read_adapter(each, base=reader).updates
        }
        if config is None:
            assert data is not None
            left = measure_adapter(folder, data_source(data), out, names=names, base=base, settings=settings)
        else:
            left = measure_run(config, folder, out, names=names, settings=settings)
    known = read_task_statistics(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(
        f"{len(known)} modules, {known.provenance['examples']} inputs of {known.provenance['data']}", markup=False
    )
    if left:
        shown = ", ".join(left[:SHOWN]) + (" …" if len(left) > SHOWN else "")
        console.print(f"Not measured, as they are no layers or biases of layers: {len(left)} ({shown})", markup=False)
    console.print(f"Written: {out}, {size / 2**20:.1f} MiB", markup=False)


def _content(done: Merged, advice: Recommendation, page: Path | None) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    report = done.report
    return {
        "out": str(done.path),
        "rule": done.rule,
        "why": done.why,
        "tasks": [
            {
                "name": name,
                "weight": dict(weight) if isinstance(weight, Mapping) else weight,
                "parameters": done.parameters[name],
                "projection": report.projections.get(name),
                "predicted_interference": report.predicted.get(name),
            }
            for name, weight in done.weights.items()
        ],
        "parameters": done.merged_parameters,
        "modules": {
            name: {"rank": each.rank, "parameters": each.parameters, "loss": report.modules[name].truncation_loss}
            for name, each in sorted(done.state.updates.items())
        },
        "energy_kept": report.energy_kept,
        "recommendation": asdict(advice),
        "heads": list(done.state.trained_modules),
        "report": None if page is None else str(page),
    }


def _table(done: Merged) -> Table:
    """Put the tasks and the result side by side."""
    report = done.report
    predicted = bool(report.predicted)
    table = Table(title=f"{len(report.tasks)} adapters become one", title_justify="left")
    headings = ["", "weight", "parameters", "finds of its update", *(["predicted loss"] if predicted else [])]
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for name, weight in done.weights.items():
        share = report.projections.get(name)
        cells = [_shown(weight), f"{done.parameters[name]:,}", "–" if share is None else f"{share:.1%}"]
        if predicted:
            cells.append(f"{report.predicted[name]:.1%}" if name in report.predicted else "–")
        table.add_row(Text(name), *cells)
    table.add_row(Text("merged"), "", f"{done.merged_parameters:,}", "", *([""] if predicted else []), style="bold")
    return table


def _shown(weight: Weight) -> str:
    """Return a weight as it is, or of those by module their mean, least and largest."""
    if not isinstance(weight, Mapping):
        return f"{weight:g}"
    return f"{statistics.fmean(weight.values()):.2f} ({min(weight.values()):.2f} to {max(weight.values()):.2f})"
