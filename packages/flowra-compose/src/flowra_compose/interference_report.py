"""What a merge costs each task: numbers of each module, and what they say together.

Of each module the report keeps sums, so that a whole adapter's number is that of its concatenated updates: shares are
ratios of sums, and no means of ratios. All are told of task vectors τᵢ = wᵢ ΔWᵢ, except what asks how far the merged
update M is from what the task had alone: that is told of ΔWᵢ.

Source: docs/methods.md, section 27.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import ClassVar, Literal

__all__ = [
    "InterferenceReport",
    "MeasuredTask",
    "Metric",
    "ModuleInterference",
    "ModulePair",
    "ModuleTask",
    "TaskScores",
    "check_task_names",
]

Metric = Literal["inputs", "inputs_and_outputs"]
PairNumber = Literal["cosine", "row_overlap", "row_angle", "column_overlap", "column_angle", "sign_conflict"]
LARGEST = 1e300
LARGEST_COUNT = 2**53


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleTask:
    """One task at one module.

    Raises:
        ValueError: if a number is out of range, or one of ``missed`` and ``response`` is there without the other.
    """

    weight: float
    """wᵢ of τᵢ = wᵢ ΔWᵢ; 0 where the task leaves the module alone."""
    rank: int
    """Of ΔWᵢ; 0 where the task leaves the module alone."""
    energy: float
    """‖ΔWᵢ‖²."""
    inner: float
    """⟨M, ΔWᵢ⟩."""
    missed: float | None = None
    """‖S^½ (M - ΔWᵢ) C^½‖², how far the merged module answers otherwise than the task's own, in the task's metric.
    None without statistics."""
    response: float | None = None
    """‖S^½ ΔWᵢ C^½‖², the same for no adapter at all."""

    @property
    def cross_talk(self) -> float | None:
        """``missed`` over ``response``: 0 where nothing is missed, 1 where it is as bad as no update; None if none."""
        return None if self.missed is None or not self.response else self.missed / self.response

    def __post_init__(self) -> None:
        _check_count("rank", self.rank)
        _check("weight", self.weight, -math.inf, math.inf)
        if self.rank and not self.weight:
            raise ValueError(f"weight must not be 0 where the task changes the module, got rank {self.rank}")
        _check("energy", self.energy, 0, math.inf)
        _check("inner", self.inner, -math.inf, math.inf)
        if (self.missed is None) != (self.response is None):
            raise ValueError(f"missed and response must be there together, got {self.missed} and {self.response}")
        for name, value in (("missed", self.missed), ("response", self.response)):
            if value is not None:
                _check(name, value, 0, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulePair:
    """Two tasks at a module that both change: :class:`flowra_compose.pair_geometry.PairGeometry`, and signs.

    Raises:
        ValueError: if a number is out of range.
    """

    cosine: float
    row_overlap: float
    row_angle: float
    column_overlap: float
    column_angle: float
    sign_conflict: float | None = None
    """Share of the magnitude of both that stands in entries of opposite sign, in [0, 1]; None where not counted."""

    def __post_init__(self) -> None:
        for name in ("row_overlap", "column_overlap"):
            _check(name, getattr(self, name), 0, 1)
        for name in ("row_angle", "column_angle"):
            _check(name, getattr(self, name), 0, math.pi / 2)
        _check("cosine", self.cosine, -1, 1)
        if self.sign_conflict is not None:
            _check("sign_conflict", self.sign_conflict, 0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleInterference:
    """All tasks at one module.

    Raises:
        ValueError: if a number is out of range.
    """

    shape: tuple[int, int]
    """(m, n)."""
    tasks: tuple[ModuleTask, ...]
    """In the order of the report's tasks."""
    pairs: tuple[ModulePair | None, ...]
    """(0, 1), (0, 2), … (1, 2), …; None where one of both tasks leaves the module alone."""
    merged_rank: int
    """Of the factors of M."""
    merged_energy: float
    """‖M‖²."""
    sum_energy: float
    """‖Σ τᵢ‖²."""
    singular_task_interference: float
    """‖(UᵀU - I) Σ (VᵀV - I)‖₁ over the singular vectors of all τᵢ, in units of the updates."""
    cancelled: float | None = None
    """Share of the magnitude of all entries that opposite signs take away in Σ τᵢ, in [0, 1]; None where not
    counted."""
    truncation_loss: float | None = None
    """Share of the energy that a truncation to M's rank left out, in [0, 1); None where nothing was truncated."""

    def __post_init__(self) -> None:
        for side in self.shape:
            _check_count("shape", side)
            if not side:
                raise ValueError(f"shape must have no empty side, got {self.shape}")
        _check_count("merged_rank", self.merged_rank)
        for name in ("merged_energy", "sum_energy", "singular_task_interference"):
            _check(name, getattr(self, name), 0, math.inf)
        for name, share in (("cancelled", self.cancelled), ("truncation_loss", self.truncation_loss)):
            if share is not None:
                _check(name, share, 0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScores:
    """What a task scored, higher is better: an accuracy, or the negative of a loss. Taken as they are given.

    Raises:
        ValueError: if one is not a finite number.
    """

    base: float
    """Without an adapter (the task's head alone)."""
    single: float
    """With its own adapter."""
    merged: float
    """With the merged one."""

    def __post_init__(self) -> None:
        for name in ("base", "single", "merged"):
            _check(name, getattr(self, name), -math.inf, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredTask:
    """What the merge cost a task by its own scores."""

    interference: float | None
    """1 - (merged - base) / (single - base): the share of the adapter's gain that is lost. Below 0 where the merge
    helps, above 1 where it is worse than no adapter; None where the adapter gains nothing."""
    retention: float | None
    """merged / single; None where single ≤ 0."""
    drop: float
    """single - merged, in units of the score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InterferenceReport:
    """What a merge cost, by module and by task.

    Raises:
        ValueError: if tasks are not distinct names, or another part does not fit them.
    """

    format_version: ClassVar[int] = 2

    tasks: tuple[str, ...]
    """Names, in the order of the adapters that took part."""
    modules: Mapping[str, ModuleInterference]
    """By name."""
    metric: Metric | None = None
    """What C and S of ``missed`` and ``response`` are: with ``inputs`` S = I; None without statistics."""
    scores: Mapping[str, TaskScores] | None = None
    """Of every task, where they were measured."""
    settings: Mapping[str, str | float] = field(default_factory=dict)
    """How it was merged, as plain values by name: ``rule``, and what else was said; empty where that is not known."""

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Indices of two tasks, in the order of :attr:`ModuleInterference.pairs`."""
        return tuple(combinations(range(len(self.tasks)), 2))

    def pair_means(self, number: PairNumber) -> dict[tuple[str, str], float]:
        """Average a number over the modules that both tasks of a pair change; a pair without one is left out."""
        found = {}
        for index, (i, j) in enumerate(self.pairs):
            met = [pair for each in self.modules.values() if (pair := each.pairs[index]) is not None]
            values = [value for pair in met if (value := getattr(pair, number)) is not None]
            if values:
                found[self.tasks[i], self.tasks[j]] = math.fsum(values) / len(values)
        return found

    @property
    def energy_kept(self) -> float | None:
        """‖M‖² over ‖Σ τᵢ‖², of all modules; None where the sum is 0."""
        total = math.fsum(each.sum_energy for each in self.modules.values())
        return math.fsum(each.merged_energy for each in self.modules.values()) / total if total else None

    @property
    def projections(self) -> dict[str, float]:
        """⟨M, ΔWᵢ⟩ / ‖ΔWᵢ‖² of all modules: how much of its own update each task finds in M, 1 for all of it.

        A task whose updates are all 0 is left out, here and in :attr:`distances`.
        """
        return {
            name: math.fsum(each.inner for each in found) / energy
            for name, found in self._by_task().items()
            if (energy := math.fsum(each.energy for each in found))
        }

    @property
    def distances(self) -> dict[str, float]:
        """‖M - ΔWᵢ‖² / ‖ΔWᵢ‖² of all modules: cross-talk as it would be if all inputs were alike."""
        merged = math.fsum(each.merged_energy for each in self.modules.values())
        return {
            name: max(0.0, 1 + (merged - 2 * math.fsum(each.inner for each in found)) / energy)
            for name, found in self._by_task().items()
            if (energy := math.fsum(each.energy for each in found))
        }

    @property
    def predicted(self) -> dict[str, float]:
        """The interference that is to be expected: Σ ``missed`` over Σ ``response``, of all modules with statistics.

        To second order it is the loss that the merge adds to a task's own, over the loss that taking its adapter away
        would add, so it estimates :attr:`MeasuredTask.interference`. A task without statistics is left out.
        """
        found = {}
        for name, modules in self._by_task().items():
            response = math.fsum(each.response for each in modules if each.response is not None)
            if response:
                found[name] = math.fsum(each.missed for each in modules if each.missed is not None) / response
        return found

    @property
    def coverage(self) -> dict[str, float]:
        """For each task the share of ‖M‖², over all modules, that lies where its statistics are known, in [0, 1].

        What is predicted of a task says nothing about the rest.
        """
        whole = math.fsum(module.merged_energy for module in self.modules.values())
        found = {}
        for index, name in enumerate(self.tasks):
            known = [each for each in self.modules.values() if each.tasks[index].missed is not None]
            found[name] = math.fsum(each.merged_energy for each in known) / whole if whole else float(bool(known))
        return found

    @property
    def measured(self) -> dict[str, MeasuredTask]:
        """What the scores say, by task; empty without scores."""
        return {name: _measured(self.scores[name]) for name in self.tasks} if self.scores else {}

    @property
    def worst_task(self) -> tuple[str, float] | None:
        """The task with the largest measured interference, or predicted where none is measured; None if neither is."""
        measured = {name: one.interference for name, one in self.measured.items() if one.interference is not None}
        found = measured or self.predicted
        return max(found.items(), key=lambda item: item[1]) if found else None

    @property
    def largest_drop(self) -> tuple[str, float] | None:
        """The task whose score fell most, and how far; None without scores."""
        drops = {name: one.drop for name, one in self.measured.items()}
        return max(drops.items(), key=lambda item: item[1]) if drops else None

    @property
    def agreement(self) -> float | None:
        """Spearman's correlation of predicted with measured interference, over the tasks that have both.

        None where there are fewer than three, or one side does not vary.
        """
        predicted, measured = self.predicted, self.measured
        known = [
            (predicted[name], one.interference)
            for name, one in measured.items()
            if name in predicted and one.interference is not None
        ]
        return _spearman(*zip(*known, strict=True)) if len(known) >= 3 else None

    def _by_task(self) -> dict[str, list[ModuleTask]]:
        return {name: [each.tasks[i] for each in self.modules.values()] for i, name in enumerate(self.tasks)}

    def __post_init__(self) -> None:
        check_task_names(self.tasks)
        if not self.modules:
            raise ValueError("modules must be at least one, got none")
        for name, module in self.modules.items():
            self._check_module(name, module)
        if self.scores is not None and set(self.scores) != set(self.tasks):
            raise ValueError(f"scores must be those of {list(self.tasks)}, got {sorted(self.scores)}")
        if self.metric not in {None, "inputs", "inputs_and_outputs"}:
            raise ValueError(f"metric must be 'inputs', 'inputs_and_outputs' or None, got {self.metric!r}")
        known = any(one.missed is not None for module in self.modules.values() for one in module.tasks)
        if known != (self.metric is not None):
            raise ValueError(f"metric must be there if and only if something is missed in it, got {self.metric!r}")
        for key, value in self.settings.items():
            plain = type(key) is str and type(value) in {str, int, float}
            if not plain or (not isinstance(value, str) and not math.isfinite(value)):
                raise ValueError(f"settings must be text or finite numbers by name, got {value!r} for {key!r}")

    def _check_module(self, name: str, module: ModuleInterference) -> None:
        count, pairs = len(self.tasks), self.pairs
        if len(module.tasks) != count or len(module.pairs) != len(pairs):
            got = f"{len(module.tasks)} and {len(module.pairs)}"
            raise ValueError(f"module must have {count} tasks and {len(pairs)} pairs, got {got} for {name!r}")
        for (i, j), pair in zip(pairs, module.pairs, strict=True):
            if (pair is None) != (module.tasks[i].rank == 0 or module.tasks[j].rank == 0):
                raise ValueError(
                    f"pair must be there where both tasks have a rank, got {pair} of {i}, {j} for {name!r}"
                )


def _measured(scores: TaskScores) -> MeasuredTask:
    gain = scores.single - scores.base
    return MeasuredTask(
        interference=1 - (scores.merged - scores.base) / gain if gain > 0 else None,
        retention=scores.merged / scores.single if scores.single > 0 else None,
        drop=scores.single - scores.merged,
    )


def _spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Correlate ranks; ties share their mean rank. None where one side does not vary."""
    x, y = _ranks(first), _ranks(second)
    if min(*x) == max(*x) or min(*y) == max(*y):
        return None
    middle = (len(x) - 1) / 2
    product = math.fsum((a - middle) * (b - middle) for a, b in zip(x, y, strict=True))
    sizes = math.hypot(*(a - middle for a in x)) * math.hypot(*(b - middle for b in y))
    return max(-1.0, min(1.0, product / sizes))


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(each < value for each in values) + (sum(each == value for each in values) - 1) / 2 for value in values]


def check_task_names(tasks: Sequence[str]) -> None:
    """Refuse what are not distinct names."""
    if not tasks or not all(isinstance(name, str) and name for name in tasks) or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks must be distinct names, at least one, got {list(tasks)}")


def _check(name: str, value: object, low: float, high: float) -> None:
    """Refuse what is no finite number in [low, high]."""
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or abs(value) > LARGEST
        or not low <= value <= high
    ):
        limits = "" if math.isinf(low) and math.isinf(high) else f" in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a finite number{limits}, got {value!r}")


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
        raise ValueError(f"{name} must be a whole number ≥ 0, got {value!r}")
