"""What is read of ``validation.json``: how estimators agree with taking modules away. Every part may be missing."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short_repr
from typing import NamedTuple

from flowra_pipelines.errors import UserError

__all__ = ["ABLATIONS", "LossChange", "Validation", "parse_validation", "read_validation"]

ABLATIONS: Mapping[str, str] = {
    "leave_one_rank_out": "first rank left out",
    "leave_last_rank_out": "last rank left out",
    "leave_module_out": "module left out",
    "retrain_without": "retrained without it",
    "alone": "it alone",
}
"""Key to what it is called; by the first that was made estimators are put in order."""
NAME = "validation.json"
MAX_BYTES = 64 * 2**20


class LossChange(NamedTuple):
    """What taking something of a module away did to the loss."""

    value: float
    stderr: float | None
    parameters: float | None
    """How many were taken away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Ablations, and what they say of estimators."""

    ablations: Mapping[str, Mapping[str, LossChange]] = field(default_factory=dict)
    """Key of :data:`ABLATIONS` to module name to change of the loss."""
    reliability: Mapping[str, float] = field(default_factory=dict)
    """Key of an ablation to its agreement with itself."""
    correlations: Mapping[str, Mapping[str, tuple[float, float, float]]] = field(default_factory=dict)
    """Estimator to key of an ablation to Spearman's ρ and the ends of its interval."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """Estimator to cost."""


def read_validation(folder: Path) -> Mapping[str, object] | None:
    """Read the file that lies beside a profile, or where the stage validate of the same run has left it.

    Returns:
        What it holds, or None if there is none.

    Raises:
        UserError: if it is damaged.
    """
    path = folder / NAME
    if not path.is_file() and folder.name == "calibrate":
        path = folder.parent / "validate" / NAME
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{NAME} must be at most {MAX_BYTES} bytes, got {path.stat().st_size}; {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be JSON, got {' '.join(str(error).split())}") from None
    return _object(content, NAME)


def parse_validation(content: Mapping[str, object]) -> Validation:
    """Take what a report needs, and leave what it does not know.

    Args:
        content: as in the file (docs/formats/validation.md): ``ablations`` by key and module with ``loss_change``,
            ``stderr`` and ``parameters``, their ``reliability``, and ``estimators`` by name with ``spearman`` (by
            ablation: ``value``, ``low``, ``high``) and ``cost``.

    Returns:
        The values.

    Raises:
        UserError: if a part that is there is something else.
    """
    ablations = {}
    for key, modules in _object(content.get("ablations", {}), "ablations").items():
        if key in ABLATIONS:
            entries = {name: _object(entry, key) for name, entry in _object(modules, key).items()}
            ablations[key] = {
                name: LossChange(
                    _number(entry["loss_change"], name),
                    _optional(entry.get("stderr"), name),
                    _optional(entry.get("parameters"), name),
                )
                for name, entry in entries.items()
                if entry.get("loss_change") is not None
            }
    correlations, costs = {}, {}
    for name, each in _object(content.get("estimators", {}), "estimators").items():
        entry = _object(each, name)
        cost = _optional(entry.get("cost"), name)
        if cost is not None:
            costs[name] = cost
        found = {}
        for key, interval in _object(entry.get("spearman", {}), name).items():
            ends = _object(interval, key)
            if key in ABLATIONS and ends.get("value") is not None:
                value = _number(ends["value"], name)
                low, high = (_optional(ends.get(end), name) for end in ("low", "high"))
                found[key] = (value, value if low is None else low, value if high is None else high)
        correlations[name] = found
    reliability = {
        key: _number(value, key)
        for key, value in _object(content.get("reliability", {}), "reliability").items()
        if key in ABLATIONS and value is not None
    }
    return Validation(ablations=ablations, reliability=reliability, correlations=correlations, costs=costs)


def _object(value: object, what: str) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{NAME} must hold objects, got {type(value).__name__} for {short_repr(what)}")
    return value


def _optional(value: object, what: str) -> float | None:
    return None if value is None else _number(value, what)


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not math.isfinite(value):
        raise UserError(f"{NAME} must hold finite numbers, got {short_repr(value)} for {short_repr(what)}")
    return float(value)
