"""What a run found: a table for the terminal, the same as Markdown for the orchestrator's page."""

import json
import shlex
import sys
from pathlib import Path
from shutil import which
from typing import Any

from rich.table import Table

from flowra_pipelines.progress import console
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.record import STAGES, read_record
from flowra_pipelines.tasks import TASKS

__all__ = ["results_as_markdown", "show_results"]


def show_results(config: RunConfig) -> None:
    """Print the comparison, the verdicts, the time of each stage, and where everything is."""
    metrics = _metrics(config)
    headings, rows = _cells(config, metrics)
    table = Table(title=f"{config.name}: {metrics['test_examples']:,} held-out examples", title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for name, cells in rows.items():
        table.add_row(*cells, style="bold" if name == "flowra" else "")
    console.print()
    console.print(table)
    console.print("Parameters are the adapters'; heads are outside the budget.", style="dim")
    for line in [*metrics["verdicts"], *metrics["notes"]]:
        console.print(line)
    records = {stage: read_record(config.folder / stage) for stage in STAGES}
    times = ", ".join(f"{stage} {record.seconds:.0f} s" for stage, record in records.items() if record)
    console.print(f"\nTime per stage: {times}")
    console.print(f"Artifacts: {config.folder}")
    console.print(f"Adapter for PEFT and vLLM: {config.folder / 'merge' / 'adapter'}")
    beside = Path(sys.executable).with_name("flowra")  # in an environment that is not activated
    flowra = "flowra" if which("flowra") or not beside.exists() else str(beside)
    console.print(f"Compare runs: {shlex.join([flowra, 'ui', '--uri', config.tracking_uri])}")


def results_as_markdown(config: RunConfig) -> str:
    """Return the comparison and the verdicts as Markdown."""
    metrics = _metrics(config)
    headings, rows = _cells(config, metrics)
    lines = [headings, ["---"] * len(headings), *rows.values()]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    said = "\n".join(f"- {line}" for line in [*metrics["verdicts"], *metrics["notes"]])
    return f"{metrics['test_examples']:,} held-out examples\n\n{table}\n\n{said}\n\nArtifacts: `{config.folder}`\n"


def _metrics(config: RunConfig) -> dict[str, Any]:
    content = json.loads((config.folder / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def _cells(config: RunConfig, metrics: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the headings, and the cells of each method."""
    evaluated = read_record(config.folder / "evaluate")
    times = {} if evaluated is None else evaluated.summary
    measures = TASKS[metrics["task"]].measures
    headings = ["", *(measure.heading for measure in measures), "parameters", "peak", "training"]
    rows = {}
    for name, row in metrics["rows"].items():
        cells = [measure.shown.format(**row[measure.key]) if row[measure.key] else "–" for measure in measures]
        counts = [f"{row['parameters']:,}", f"{row['peak_parameters']:,}"]
        time = f"{times.get(f'seconds {name}', '–')} s"
        rows[name] = [row["title"], *cells, *counts, time]
    return headings, rows
