"""One stage as a unit of work on files: run it, or reuse what it made from the same inputs.

A stage writes into a folder with a temporary name; only when it is complete, its record ``stage.json`` included, is the
folder renamed. So a folder with the stage's own name is whole, whatever killed the process before.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flowra_pipelines.data import data_paths
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.same_budget import number_of_same
from flowra_pipelines.sources import content_hash, resolve

__all__ = [
    "STAGES",
    "StageRecord",
    "StageResult",
    "code_hash",
    "earlier_records",
    "read_record",
    "run_once",
    "run_stage",
]

RECORD = "stage.json"
FORMAT_VERSION = 2
PARTS = ("analysis", "allocation", "adapters", "compose", "pipelines")
STAGES = ("calibrate", "allocate", "train", "refine", "merge", "evaluate")
# What may be run beside the chain, and which stages come before it.
BESIDE: Mapping[str, tuple[str, ...]] = {"validate": ("calibrate",)}
# What a stage reads of the configuration, beside everything the stages before it read.
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "calibrate": ("seed", "budget", "model", "data", "adapter", "training", "calibration"),
    "allocate": ("sensitivity_threshold", "allocation"),
    "train": (),
    "refine": ("refinement",),
    "merge": ("merge",),
    "evaluate": ("evaluation",),
    "validate": ("validation", "evaluation"),
}


@dataclass(kw_only=True, slots=True)
class StageResult:
    """What a stage wants logged."""

    metrics: list[tuple[str, float, int]] = field(default_factory=list)
    """(name, value, step)."""
    parameters: dict[str, str | int | float] = field(default_factory=dict)
    """What characterises the stage."""
    figures: dict[str, Figure] = field(default_factory=dict)
    """Name to picture."""
    summary: dict[str, str] = field(default_factory=dict)
    """A few lines for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRecord:
    """A finished stage."""

    stage: str
    reads: str
    """Hash of the configuration, the base and the data that the stage and those before it read."""
    fingerprint: str
    """Hash of everything that decides what it makes: ``reads``, the artifacts before it, our code, versions."""
    artifacts: dict[str, str]
    """File to SHA-256."""
    seconds: float
    """Time the stage took. Not part of any hash."""
    summary: dict[str, str]
    """A few lines for people."""
    mlflow_run_id: str | None = None
    """The tracking run that made it."""


def run_stage(
    name: str,
    work: Callable[[RunConfig, Path], StageResult],
    config: RunConfig,
    *,
    log: Callable[[StageResult, Path], str | None],
    force: bool = False,
) -> tuple[StageRecord, bool]:
    """Run a stage, or reuse its artifacts if nothing it reads has changed.

    Args:
        name: of the stage.
        work: given the configuration and the folder to fill.
        config: of the run.
        log: given the result and the folder, logs them and returns a tracking run id.
        force: run even if the artifacts are there.

    Returns:
        The record, and whether it was reused.

    Raises:
        UserError: if a stage before it has not run.
    """
    reads = _reads(config)
    fingerprint = _fingerprint(name, config, reads)
    return run_once(
        config.folder / name,
        lambda partial: work(config, partial),
        reads=reads[name],
        fingerprint=fingerprint,
        log=log,
        force=force,
    )


def run_once(
    final: Path,
    work: Callable[[Path], StageResult],
    *,
    reads: str,
    fingerprint: str,
    log: Callable[[StageResult, Path], str | None],
    force: bool = False,
) -> tuple[StageRecord, bool]:
    """Fill a folder, or reuse it if it was filled from the same; it is called by its name only when it is whole.

    Args:
        final: the folder, called like the stage.
        work: given the folder to fill.
        reads: hash of what the stage and those before it read.
        fingerprint: hash of everything that decides what it makes.
        log: given the result and the folder, logs them and returns a tracking run id.
        force: run even if the artifacts are there.

    Returns:
        The record, and whether it was reused.
    """
    if not force and final.is_dir():
        record = read_record(final)
        if record is not None and record.fingerprint == fingerprint and record.artifacts == _hashes(final):
            return record, True
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        started = time.perf_counter()
        result = work(partial)
        for title, figure in result.figures.items():
            figure.savefig(partial / f"{title}.png", dpi=120, metadata={"Software": None})
        seconds = time.perf_counter() - started
        artifacts = _hashes(partial)
        record = StageRecord(
            stage=final.name,
            reads=reads,
            fingerprint=fingerprint,
            artifacts=artifacts,
            seconds=seconds,
            summary=result.summary,
            mlflow_run_id=log(result, partial),
        )
        _write(record, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return record, False


def read_record(folder: Path) -> StageRecord | None:
    """Read a stage's record; None if the folder holds none that is whole and of this version."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if content.pop("format_version") != FORMAT_VERSION:
            return None
        return StageRecord(**content)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def earlier_records(name: str, config: RunConfig) -> dict[str, StageRecord]:
    """Return the records of the stages before one.

    Raises:
        UserError: if one of them has not run.
    """
    records = {earlier: read_record(config.folder / earlier) for earlier in _before(name)}
    for earlier, record in records.items():
        if record is None:
            raise UserError(
                f"{name} needs the artifacts of {earlier}, got none in {config.folder}. Run `flowra {earlier}`."
            )
    return {earlier: record for earlier, record in records.items() if record is not None}


def _before(name: str) -> tuple[str, ...]:
    """Name the stages whose artifacts a stage needs."""
    return BESIDE[name] if name in BESIDE else STAGES[: STAGES.index(name)]


def _reads(config: RunConfig) -> dict[str, str]:
    """Hash what each stage and those before it read of the configuration, and of the files outside the run."""
    values = {**config.model_dump(mode="json"), "budget": number_of_same(config.budget)}
    if config.merge.budget is not None:
        values["merge"] = {**values["merge"], "budget": number_of_same(config.merge.budget)}
    base_and_data = [content_hash(path) for path in _base_and_data(config)]
    others = [path for each in config.merge.extra for path in (each.path, each.statistics) if path is not None]
    extra = [content_hash(Path(path)) for path in others if Path(path).exists()]
    hashes = {}
    for name in (*STAGES, *BESIDE):
        chain = (*_before(name), name)
        sections = [section for stage in chain for section in SECTIONS[stage]]
        reads: dict[str, Any] = {section: values[section] for section in sections}
        reads |= {"files": base_and_data, "probe_factor": config.probe_factor}
        if "allocate" in chain:
            reads["plan"] = [config.refinement.method, config.refinement.plan_factor]
        if "train" in chain:
            reads["refinement_start"] = config.refinement_start
            reads["penalty"] = config.refinement.penalty
        if "merge" in chain:
            reads["extra"] = extra
        hashes[name] = sha256(json.dumps(reads, sort_keys=True).encode()).hexdigest()
    return hashes


def _fingerprint(name: str, config: RunConfig, reads: Mapping[str, str]) -> str:
    """Hash everything that decides what the stage makes.

    Artifacts before it count as they are now: a plan may be edited by hand. But they must be of this base, data and
    configuration: an adapter of another base may fit and mean nothing.

    Returns:
        A SHA-256 as hex.

    Raises:
        UserError: if a stage before it has not run, or ran for something else.
    """
    content: dict[str, Any] = {"reads": reads[name], "code": code_hash()}
    content["versions"] = {package: version(package) for package in ("torch", "transformers")}
    for earlier, record in earlier_records(name, config).items():
        if record.reads != reads[earlier]:
            raise UserError(
                f"{name} needs artifacts of {earlier} for this base, data and configuration, got others in"
                f" {config.folder}. Run `flowra {earlier}`."
            )
        content[earlier] = _hashes(config.folder / earlier)
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def code_hash() -> str:
    """Hash our own source, so that artifacts of other code are never taken for this code's."""
    folders = [resolve(f"package://flowra_{part}/") for part in PARTS]
    return sha256("".join(content_hash(folder) for folder in folders if folder is not None).encode()).hexdigest()


def _base_and_data(config: RunConfig) -> list[Path]:
    """List the files outside the run that every stage reads."""
    model = resolve(config.model.path)
    return [*([] if model is None else [model]), *data_paths(config.data)]


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD)
    return {path.relative_to(folder).as_posix(): content_hash(path) for path in files}


def _write(record: StageRecord, folder: Path) -> None:
    content = {
        "format_version": FORMAT_VERSION,
        "stage": record.stage,
        "reads": record.reads,
        "fingerprint": record.fingerprint,
        "artifacts": record.artifacts,
        "seconds": record.seconds,
        "summary": record.summary,
        "mlflow_run_id": record.mlflow_run_id,
    }
    (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
