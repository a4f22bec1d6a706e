"""The stages by name, and running one with its tracking."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from flowra_pipelines.progress import console
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.allocate import allocate
from flowra_pipelines.stages.calibrate import calibrate
from flowra_pipelines.stages.evaluate import evaluate
from flowra_pipelines.stages.merge import merge_stage
from flowra_pipelines.stages.record import StageRecord, StageResult, run_stage
from flowra_pipelines.stages.refine import refine
from flowra_pipelines.stages.train import train
from flowra_pipelines.stages.validate import validate
from flowra_pipelines.tracking import Tracker

__all__ = ["WORK", "run_tracked"]

WORK: Mapping[str, Callable[[RunConfig, Path], StageResult]] = MappingProxyType({
    "calibrate": calibrate,
    "allocate": allocate,
    "train": train,
    "refine": refine,
    "merge": merge_stage,
    "evaluate": evaluate,
    "validate": validate,
})


def run_tracked(
    name: str, config: RunConfig, tracker: Tracker, *, force: bool = False, tags: Mapping[str, str] | None = None
) -> StageRecord:
    """Run a stage or reuse its artifacts, log it, and print its summary."""
    console.print(f"[bold]{name}[/bold]")
    record, reused = run_stage(name, WORK[name], config, log=tracker.stage(name, tags=dict(tags or {})), force=force)
    if reused:
        tracker.reused(record)
        console.print("  unchanged: reusing its artifacts")
    for key, line in record.summary.items():
        if not key.startswith(("seconds", "verdict")):
            console.print(f"  {key}: {line}")
    return record
