"""How much rank each module gets, and the plan as a file (docs/formats/plan.md)."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from flowra_allocation.whole_files import replacing

__all__ = ["KINDS", "ModulePlan", "RankPlan", "mean_rank", "read_plan", "write_plan"]

PLAN_NAME = "plan.json"
MAX_PLAN_BYTES = 64 * 2**20
KINDS = ("lora", "dora", "svd", "svd_masked", "flora", "norm", "bitfit")
"""Adapter methods that a plan can name. What :func:`flowra_allocation.allocate` plans is ``lora``
where nothing else is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulePlan:
    """What one module gets, and why."""

    kind: str = "lora"
    """Adapter method, one of :data:`KINDS`."""
    rank: int
    """≥ 0; a module of rank 0 is eligible for growth but holds nothing."""
    alpha: float
    """s · rank, as PEFT counts it."""
    cost_per_rank: int
    """Parameters per unit of rank."""
    psi: float
    """Sensitivity in [0, 1]; modules below the threshold get rank 0."""
    gains: tuple[float, ...]
    """Gain of the first, second, … unit of rank, in units of the loss."""
    parameters: int | None = None
    """At this rank, where it is not cost_per_rank · rank (``flora``)."""

    @property
    def used(self) -> int:
        """Parameters at this rank."""
        return self.rank * self.cost_per_rank if self.parameters is None else self.parameters

    def __post_init__(self) -> None:
        """Check that the values can be what they say.

        Raises:
            ValueError: if a value is of another type or out of range.
        """
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        whole = type(self.rank) is int and type(self.cost_per_rank) is int
        if not whole or self.rank < 0 or self.cost_per_rank < 1:
            raise ValueError(f"module must have whole rank ≥ 0 and cost_per_rank ≥ 1, got {self}")
        if type(self.used) is not int or (self.used > 0) != (self.rank > 0) or self.used < 0:
            raise ValueError(f"parameters must be whole, and 0 where the rank is, got {self}")
        if not all(_is_number(value) for value in (self.alpha, self.psi, *self.gains)) or not 0 <= self.psi <= 1:
            raise ValueError(f"alpha, psi in [0, 1] and gains must be finite numbers, got {self}")
        if any(first < second for first, second in pairwise((*self.gains, 0.0))):
            raise ValueError(f"gains must be ≥ 0 and non-increasing, got {self.gains}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """How much rank each module gets, within a budget."""

    format_version: ClassVar[int] = 2

    modules: Mapping[str, ModulePlan]
    """By exact module name."""
    budget: int
    """P, in adapter parameters; heads are outside."""
    parameters: int
    """Used of it: Σ cost · rank ≤ budget, or what a module says it holds."""
    scaling: float
    """s, the same for all modules and independent of the rank."""
    sensitivity_threshold: float
    """η: modules with ψ < η got rank 0."""
    last_in: tuple[str, float] | None = None
    """Module and gain per parameter of the unit taken, above floors, that is worth least per parameter."""
    first_out: tuple[str, float] | None = None
    """Module and gain per parameter of the unit left out for want of budget that is worth most per parameter."""
    final_budget: int | None = None
    """Parameters that refinement ends within, ≥ 0, where a policy starts the plan elsewhere (``shrink`` at κ times
    them); None for the budget."""

    @property
    def ranks(self) -> dict[str, int]:
        """Exact module name to rank, rank 0 included."""
        return {name: module.rank for name, module in self.modules.items()}

    @property
    def left(self) -> int:
        """Parameters of the budget that are not used."""
        return self.budget - self.parameters

    def __post_init__(self) -> None:
        """Check that the plan keeps its own promise.

        Raises:
            ValueError: if a value is out of range, the count is wrong, or the budget is exceeded.
        """
        if not self.modules or type(self.budget) is not int or not _is_number(self.scaling) or self.scaling == 0:
            raise ValueError(f"plan must have modules, a whole budget and a scaling other than 0, got {self.budget!r}")
        if not _is_number(self.sensitivity_threshold) or not 0 <= self.sensitivity_threshold < 1:
            raise ValueError(f"sensitivity_threshold must be in [0, 1), got {self.sensitivity_threshold!r}")
        for edge in (self.last_in, self.first_out):
            if edge is not None and not (len(edge) == 2 and edge[0] in self.modules and _is_number(edge[1])):
                raise ValueError(f"last_in and first_out must be a module and a gain per parameter, got {edge!r}")
        if self.final_budget is not None and (type(self.final_budget) is not int or self.final_budget < 0):
            raise ValueError(f"final_budget must be whole and ≥ 0, got {self.final_budget!r}")
        used = sum(module.used for module in self.modules.values())
        if used != self.parameters or used > self.budget:
            raise ValueError(f"parameters must be Σ cost · rank = {used} ≤ budget {self.budget}, got {self.parameters}")
        off = [name for name, each in self.modules.items() if not math.isclose(each.alpha, self.scaling * each.rank)]
        if off:
            raise ValueError(f"alpha must be scaling · rank, got {self.modules[off[0]].alpha} for {off[0]!r}")


def _is_number(value: object) -> bool:
    # JSON knows whole numbers beyond the largest float, of which isfinite would not answer
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def mean_rank(costs: Mapping[str, int], budget: int) -> float:
    """Return r̄ = P / Σ cost, the mean rank the budget allows; a real number (docs/methods.md, section 9)."""
    return budget / sum(costs.values())


def write_plan(plan: RankPlan, folder: str | Path) -> Path:
    """Write ``plan.json`` into a folder under a temporary name, rename it, and return its path."""
    path = Path(folder) / PLAN_NAME
    text = json.dumps({"format_version": plan.format_version, **_content(plan)}, indent=1, allow_nan=False) + "\n"
    with replacing(path) as (file,):
        file.write_text(text, encoding="utf-8")
    return path


def _content(plan: RankPlan) -> dict[str, Any]:
    """Return what the file holds: a module says how many parameters it has only where it must."""
    content = asdict(plan)
    for module in content["modules"].values():
        if module["parameters"] is None:
            del module["parameters"]
    return content


def read_plan(folder: str | Path) -> RankPlan:
    """Read ``plan.json`` from a folder.

    Returns:
        The plan, checked.

    Raises:
        ValueError: if the file is missing, damaged, of another version, or breaks its own budget.
    """
    path = Path(folder) / PLAN_NAME
    if not path.is_file() or path.stat().st_size > MAX_PLAN_BYTES:
        raise ValueError(f"plan must be a file of at most {MAX_PLAN_BYTES} bytes, got {path}. Run `allocate` first.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format_version")
        if type(version) is not int or version != RankPlan.format_version:
            raise ValueError(f"format_version must be {RankPlan.format_version}, got {version!r}")
        modules = {
            name: ModulePlan(**{**module, "gains": _as_tuple(module["gains"])})
            for name, module in content.pop("modules").items()
        }
        for edge in ("last_in", "first_out"):
            content[edge] = None if content[edge] is None else _as_tuple(content[edge])
        return RankPlan(modules=modules, final_budget=content.pop("final_budget"), **content)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"plan must follow docs/formats/plan.md, got {problem}; in {path}") from None


def _as_tuple(values: object) -> tuple[Any, ...]:
    if not isinstance(values, list):
        raise TypeError(f"a list is needed, got {values!r}")
    return tuple(values)
