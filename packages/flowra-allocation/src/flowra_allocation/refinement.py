"""Refinement: rank moves between modules while training goes on, inside one budget (docs/methods.md, section 7).

:class:`Refiner` knows nothing of trainers: call it before and after every optimiser step, or hand it to
:class:`flowra_allocation.trainer_callback.RefinementCallback`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_allocation.bottleneck_gram import flow_spectrum, truncate
from flowra_allocation.breathe import breathe
from flowra_allocation.observe import BottleneckObserver
from flowra_allocation.surgery import grow, rebase

__all__ = ["RankEvent", "RankHistory", "RefinableLayer", "RefinementSchedule", "Refiner"]


class RefinableLayer(Protocol):
    """A low-rank update that can be observed and resized; ``flowra_adapters.LoRA`` is one."""

    scaling: float
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    observer: Callable[[Tensor], None] | None

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Install new factors of a common rank as new Parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefinementSchedule:
    """When rank moves. Steps count finished optimiser steps of the whole run."""

    start: int
    """Rank is as planned until this step, ≥ 0."""
    freeze: int
    """Ranks are frozen from this step on; the last event happens there."""
    events: int = 4
    """Number of events, evenly spaced, ≥ 2: rank moves at all but the last, which is the freeze."""
    share: float = 0.1
    """Part of the budget that changes hands at an event, in (0, 1)."""
    observe: int = 4
    """Steps before each event on which statistics are gathered, ≥ 1."""

    def __post_init__(self) -> None:
        """Check that the schedule can fire.

        Raises:
            ValueError: if there is no room for the events between start and freeze.
        """
        if self.events < 2 or self.observe < 1 or not 0 < self.share < 1:
            raise ValueError(f"schedule must have events ≥ 2, observe ≥ 1 and share in (0, 1), got {self}")
        if self.start < 0 or (self.freeze - self.start) // self.events < 1:
            raise ValueError(
                f"schedule must leave at least one step per event, got {self.events} events in steps"
                f" {self.start}–{self.freeze}. Train longer or ask for fewer events."
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps after which an event happens; the last is ``freeze``."""
        span = self.freeze - self.start
        return tuple(self.start + span * (index + 1) // self.events for index in range(self.events))


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEvent:
    """One event, as it happened."""

    step: int
    """Finished optimiser steps."""
    ranks: Mapping[str, int]
    """Ranks after the event."""
    parameters: int
    """Σ cost · rank after the event."""
    dropped: Mapping[str, int]
    """Module name to directions removed."""
    admitted: tuple[str, ...]
    """Modules that gained a direction on probation."""
    kkt_gap: float | None
    """Smallest gain per parameter kept minus largest dropped; None if nothing was dropped."""


@dataclass(kw_only=True, slots=True)
class RankHistory:
    """Ranks over a run (docs/formats/rank_history.md)."""

    format_version: ClassVar[int] = 1

    initial: dict[str, int]
    """Ranks before the first event."""
    budget: int
    """P, in parameters."""
    schedule: RefinementSchedule
    """When rank was to move."""
    events: list[RankEvent] = field(default_factory=list)
    """What happened, in order."""
    seconds: float = 0.0
    """Time spent in events. Not part of any hash."""

    def as_json(self) -> dict[str, Any]:
        """Return plain values, ``seconds`` included."""
        return {"format_version": self.format_version, **asdict(self)}


class Refiner:
    """Move rank between layers during training.

    Args:
        model: that carries the layers.
        layers: exact module name to the layer's low-rank update, rank 0 included.
        costs: module name to parameters per unit of rank.
        caps: module name to its largest rank.
        budget: P, in parameters; the present ranks must fit.
        schedule: when.
        loss: whether the training loss is a mean or a sum over the examples of a batch.
        seed: of the gradient sketches.

    Raises:
        ValueError: if names differ or the present ranks exceed the budget.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, RefinableLayer],
        *,
        costs: Mapping[str, int],
        caps: Mapping[str, int],
        budget: int,
        schedule: RefinementSchedule,
        loss: Literal["mean", "sum"] = "mean",
        seed: int = 0,
    ) -> None:
        if not layers.keys() == costs.keys() == caps.keys():
            raise ValueError(
                f"costs and caps must name the layers, got {sorted(layers)}, {sorted(costs)}, {sorted(caps)}"
            )
        self._model, self._layers, self._costs, self._caps = model, layers, costs, caps
        self._budget, self._schedule, self._loss = budget, schedule, loss
        self._generator = torch.Generator().manual_seed(seed)
        self._observer: BottleneckObserver | None = None
        if self._parameters() > budget:
            raise ValueError(f"ranks must fit the budget of {budget} parameters, got {self._parameters()}")
        self.history = RankHistory(initial=self._ranks(), budget=budget, schedule=schedule)

    def before_step(self, step: int) -> None:
        """Start gathering statistics if an event is near. ``step``: finished optimiser steps."""
        upcoming = next((each for each in self._schedule.steps if each > step), None)
        if self._observer is None and upcoming is not None and upcoming - step <= self._schedule.observe:
            self._observer = BottleneckObserver(
                self._model, self._layers, loss=self._loss, sketch=True, generator=self._generator
            ).__enter__()

    def after_step(self, step: int, optimizer: Optimizer | None) -> RankEvent | None:
        """Hold an event if one is due. ``step``: finished optimiser steps, this one included.

        Args:
            step: finished optimiser steps.
            optimizer: whose state moves with the factors.

        Returns:
            What happened, or None.

        Raises:
            ValueError: if an event is due and no statistics were gathered.
        """
        if step not in self._schedule.steps:
            return None
        started = time.perf_counter()
        if self._observer is None:
            raise ValueError(f"before_step must be called on the steps before an event, got an event at step {step}")
        observer, self._observer = self._observer, None
        observer.__exit__(None, None, None)
        event = self._event(step, observer, optimizer)
        self.history.events.append(event)
        self.history.seconds += time.perf_counter() - started
        return event

    def finish(self) -> RankHistory:
        """Check after training that the schedule fired as planned.

        Returns:
            The history.

        Raises:
            ValueError: if an event is missing or no rank ever moved.
        """
        if self._observer is not None:  # training stopped while it was watching
            self._observer.__exit__(None, None, None)
            self._observer = None
        happened = tuple(event.step for event in self.history.events)
        if happened != self._schedule.steps:
            raise ValueError(
                f"refinement must fire at steps {self._schedule.steps}, got {happened}. Train to the freeze."
            )
        if not any(event.dropped or event.admitted for event in self.history.events):
            raise ValueError("refinement must move rank, got no move in any event. Raise `share`, or switch it off.")
        return self.history

    def _event(self, step: int, observer: BottleneckObserver, optimizer: Optimizer | None) -> RankEvent:
        before = self._ranks()
        spectra = {name: flow_spectrum(gram) for name, gram in observer.total().items()}
        directions = {name: sketch.leading_direction() for name, sketch in observer.sketches.items()}
        final = step == self._schedule.freeze
        moves = breathe(
            {name: spectra[name].gains.tolist() if name in spectra else [] for name in self._layers},
            self._costs,
            budget=self._budget,
            share=0.0 if final else self._schedule.share,
            predictions={name: energy / 2 for name, (energy, _) in directions.items()},
            caps=self._caps,
        )
        for name, rank in moves.keep.items():
            if rank < before[name]:
                layer = self._layers[name]
                a, b = truncate(layer.lora_A, layer.lora_B, spectra[name], rank)
                rebase(layer, a, b, optimizer)
        for name in moves.admit:
            row = directions[name][1] * 3**-0.5  # the norm of a fresh adapter's rows
            grow(self._layers[name], row[None], optimizer)
        return RankEvent(
            step=step,
            ranks=self._ranks(),
            parameters=self._parameters(),
            dropped={name: before[name] - rank for name, rank in moves.keep.items() if rank < before[name]},
            admitted=moves.admit,
            kkt_gap=moves.kkt_gap if moves.kkt_gap != float("inf") else None,
        )

    def _ranks(self) -> dict[str, int]:
        return {name: len(layer.lora_A) for name, layer in self._layers.items()}

    def _parameters(self) -> int:
        return sum(self._costs[name] * rank for name, rank in self._ranks().items())
