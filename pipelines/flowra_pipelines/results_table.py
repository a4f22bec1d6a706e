"""What a run found, for a terminal."""

import json
import shlex
import sys
from typing import Any

from rich.table import Table

from flowra_pipelines.progress import console
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.record import STAGES, read_record

__all__ = ["show_results"]


def show_results(config: RunConfig) -> None:
    """Print the comparison, the verdicts, the time of each stage, and where everything is."""
    metrics = json.loads((config.folder / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
    records = {stage: read_record(config.folder / stage) for stage in STAGES}
    evaluated = records["evaluate"]
    times = {} if evaluated is None else evaluated.summary
    rows: dict[str, Any] = metrics["rows"]
    classifies = any(row["accuracy"] for row in rows.values())
    table = Table(title=f"{config.name}: {metrics['test_examples']:,} held-out examples", title_justify="left")
    for heading in (
        "",
        *(["accuracy (95 % interval)"] if classifies else []),
        "loss",
        "parameters",
        "peak",
        "training",
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in rows.items():
        cells = [row["title"]]
        if classifies:
            cells.append("{value:.1%} ({low:.1%} – {high:.1%})".format(**row["accuracy"]))
        cells += [f"{row['loss']['value']:.4f}", f"{row['parameters']:,}", f"{row['peak_parameters']:,}"]
        table.add_row(*cells, f"{times.get(f'seconds {name}', '–')} s", style="bold" if name == "flowra" else "")
    console.print()
    console.print(table)
    console.print("Parameters are the adapters'; heads are outside the budget.", style="dim")
    for line in [*metrics["verdicts"], *metrics["notes"]]:
        console.print(line)
    stage_times = ", ".join(f"{stage} {record.seconds:.0f} s" for stage, record in records.items() if record)
    console.print(f"\nTime per stage: {stage_times}")
    console.print(f"Artifacts: {config.folder}")
    console.print(f"Adapter for PEFT and vLLM: {config.folder / 'merge' / 'adapter'}")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", config.tracking_uri]
    console.print(f"Compare runs: {shlex.join(command)}")
