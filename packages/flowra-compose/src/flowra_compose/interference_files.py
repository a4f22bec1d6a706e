"""An interference report as a file (docs/formats/interference.md)."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowra_compose.interference_report import (
    InterferenceReport,
    ModuleInterference,
    ModulePair,
    ModuleTask,
    TaskScores,
)
from flowra_compose.whole_files import replacing

__all__ = ["INTERFERENCE_NAME", "from_json", "read_interference", "to_json", "write_interference"]

INTERFERENCE_NAME = "interference.json"
MAX_BYTES = 64 * 2**20


def to_json(report: InterferenceReport) -> str:
    """Return a report as JSON; equal reports give equal text."""
    scores = None if report.scores is None else {name: asdict(report.scores[name]) for name in report.tasks}
    content = {
        "format_version": report.format_version,
        "tasks": list(report.tasks),
        "metric": report.metric,
        "scores": scores,
        "settings": dict(report.settings),
        "modules": {name: asdict(module) for name, module in report.modules.items()},
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> InterferenceReport:
    """Return the report that :func:`to_json` wrote, equal to what it was.

    Raises:
        ValueError: if the text is not JSON, of another version, or holds what a report cannot: an unknown or missing
            key, another type, a number that is not finite or out of range.
    """
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
        version = content.pop("format_version")
        if type(version) is not int or version != InterferenceReport.format_version:
            raise ValueError(f"format_version must be {InterferenceReport.format_version}, got {version!r}")
        scores = content.pop("scores")
        return InterferenceReport(
            tasks=_as_tuple(content.pop("tasks")),
            modules={name: _module(each) for name, each in content.pop("modules").items()},
            metric=content.pop("metric"),
            settings=_as_object(content.pop("settings")),
            scores=None if scores is None else {name: TaskScores(**each) for name, each in scores.items()},
            **content,
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"interference report must follow docs/formats/interference.md, got {problem}") from None


def write_interference(report: InterferenceReport, folder: str | Path) -> Path:
    """Write ``interference.json`` into a folder under a temporary name, rename it, and return its path."""
    path = Path(folder) / INTERFERENCE_NAME
    with replacing(path) as (file,):
        file.write_text(to_json(report), encoding="utf-8")
    return path


def read_interference(folder: str | Path) -> InterferenceReport:
    """Read ``interference.json`` from a folder.

    Returns:
        The report, checked in itself.

    Raises:
        ValueError: if the file is missing, too large, damaged or of another version.
    """
    path = Path(folder) / INTERFERENCE_NAME
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ValueError(f"interference report must be a file of at most {MAX_BYTES} bytes, got {path}. Merge first.")
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{error}; in {path}") from None


def _module(value: object) -> ModuleInterference:
    content = dict(_as_object(value))
    m, n = _as_tuple(content.pop("shape"))
    tasks = tuple(ModuleTask(**_as_object(each)) for each in _as_tuple(content.pop("tasks")))
    pairs = tuple(None if each is None else ModulePair(**_as_object(each)) for each in _as_tuple(content.pop("pairs")))
    return ModuleInterference(**content, shape=(m, n), tasks=tasks, pairs=pairs)


def _as_tuple(values: object) -> tuple[Any, ...]:
    if not isinstance(values, list):
        raise TypeError(f"a list is needed, got {values!r}")
    return tuple(values)


def _as_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"an object is needed, got {value!r}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"numbers must be finite, got {name}")
