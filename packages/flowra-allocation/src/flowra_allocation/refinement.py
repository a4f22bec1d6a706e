"""Refinement: rank moves between modules while training goes on (docs/methods.md, section 7).

A :class:`~flowra_allocation.policy.Policy` says what moves; :class:`Refiner` does the rest, for every policy and every
form of update. It knows nothing of trainers: call it before and after every optimiser step, or hand it to
:class:`flowra_allocation.trainer_callback.RefinementCallback`.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_allocation.bottleneck_gram import BottleneckGram
from flowra_allocation.forms import AnyLayer, changed_together, directions_of, factors, has_slots, live_factors
from flowra_allocation.growth import leading_directions
from flowra_allocation.observe import BottleneckObserver, check_growable
from flowra_allocation.optimizer_state import check_optimizer, held_by
from flowra_allocation.policy import (
    LayerView,
    Moves,
    NewTriplets,
    Policy,
    Rebasing,
    RefinementError,
    Snapshot,
    event_generator,
)
from flowra_allocation.processes import added_up, decided_once, of_each, rank_and_size, several
from flowra_allocation.rank_history import RankEvent, RankHistory
from flowra_allocation.refinement_files import read_refinement_state, write_refinement_state
from flowra_allocation.refinement_state import Gathered, RefinementState, check_same_run, form_of, take_rank
from flowra_allocation.sharding import whole
from flowra_allocation.surgery import append, grow, keep, rebase, silence
from flowra_allocation.wrapping import refuse_wrapped, reshard

__all__ = ["Refiner"]


class Refiner:
    """Move rank between layers during training.

    Args:
        model: that carries the layers.
        layers: exact module name to the layer's low-rank update, rank 0 included.
        policy: when rank moves, and where to.
        costs: module name to parameters per unit of rank.
        caps: module name to its largest rank.
        floors: module name to a rank below which it does not fall, 0 where not named; a module whose floor is its cap
            stays as it is. For policies that keep to them.
        budget: P, in parameters; the present ranks must fit the policy's peak.
        averages: running averages of the updates (of an EMA of the model), module name to layer, changed alike.
        loss: whether the training loss is a mean or a sum over the examples of a batch.
        seed: of what is drawn at events.
        group: processes that train together, each on its part of every batch; None for all that there are.

    Attributes:
        history: what happened so far.

    Raises:
        ValueError: if names differ, the present ranks exceed the policy's peak, the policy cannot move the layers,
            floors are above the present ranks or the budget or not for the policy, layers share a factor, or ranks
            would change by new Parameters in a model that is wrapped (see :meth:`check_wrapping`).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, AnyLayer],
        *,
        policy: Policy,
        costs: Mapping[str, int],
        caps: Mapping[str, int],
        budget: int,
        floors: Mapping[str, int] | None = None,
        averages: Sequence[Mapping[str, AnyLayer]] = (),
        loss: Literal["mean", "sum"] = "mean",
        seed: int = 0,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        if not all(layers.keys() == each.keys() for each in (costs, caps, *averages)):
            raise ValueError(
                f"costs, caps and averages must name the layers, got {sorted(layers)}, {sorted(costs)}, {sorted(caps)}"
            )
        _check_own_factors(layers)
        self._model, self._layers, self._costs, self._caps = model, layers, costs, caps
        self._policy, self._budget, self._averages = policy, budget, averages
        self._floors = {name: (floors or {}).get(name, 0) for name in layers}
        self._loss, self._seed, self._group = loss, seed, group
        self._observer: BottleneckObserver | None = None
        self._begun = False
        self._held = 0  # events held
        self._step: int | None = None  # finished optimiser steps, once known
        self._gathered: Gathered | None = None  # before the restart, for the event to come
        self._restored = False  # whether the optimiser after a restart is still to be looked at
        self._unseen = True  # whether what the optimiser holds is still to be looked at
        allowed = int(budget * policy.peak)
        if self._parameters() > allowed:
            raise ValueError(f"ranks must fit the budget of {allowed} parameters, got {self._parameters()}")
        self._check_floors(floors or {})
        self.check_wrapping()
        policy.check(self._snapshot(0))
        if policy.watches == "grams and gradients":
            check_growable(model, layers)
        self.history = RankHistory(
            initial=self._ranks(),
            budget=budget,
            policy=policy.name,
            settings=dict(policy.settings),
            steps=policy.steps,
            peak=self._parameters(),
        )

    @property
    def policy(self) -> Policy:
        """What decides."""
        return self._policy

    @property
    def frozen(self) -> bool:
        """Whether all events have been held: ranks stay from now on."""
        return self._held == len(self._policy.steps)

    @property
    def next_event(self) -> int | None:
        """Finished optimiser steps after which the next event is due; None if ranks are frozen."""
        return None if self.frozen else self._policy.steps[self._held]

    @property
    def layers(self) -> Mapping[str, AnyLayer]:
        """Module name to the update that is moved."""
        return self._layers

    @property
    def model(self) -> nn.Module:
        """What carries the layers."""
        return self._model

    @property
    def step(self) -> int | None:
        """Finished optimiser steps of the run; None before the first."""
        return self._step

    def check_wrapping(self, *, compiled: bool = False) -> None:
        """Refuse to move rank by new Parameters where something else holds the old ones, as far as can be known.

        That is under ``DistributedDataParallel``, ``fully_shard`` or ``torch.compile``, and in several processes.
        Called when the refiner is made, before its first step and at events.

        Args:
            compiled: whether the model is known to be compiled.

        Raises:
            ValueError: if the model is wrapped, and a layer has no slots.
        """
        refuse_wrapped(self._model, self._layers, compiled=compiled, group=self._group)

    def check_holds(self, optimizer: Optimizer) -> None:
        """Refuse an optimiser of other parameters, such as one built before the ranks were restored.

        Raises:
            ValueError: if it lacks a factor that is trained.
        """
        held = held_by(optimizer)
        for name, layer in self._layers.items():
            if not all(id(each) in held for each in factors(layer).values() if each.requires_grad):
                raise ValueError(
                    f"optimizer must hold the layers' factors, got one that lacks those of {name!r}. Build it after"
                    " attaching, and after restore when training is resumed."
                )

    def before_step(self, step: int) -> None:
        """Watch, if an event comes soon. Call before the forward pass of each optimiser step.

        Args:
            step: finished optimiser steps of the run.
        """
        if not self._begun:
            self.check_wrapping()  # again: models are often wrapped last
            self._begun = True
        if self._observer is not None or self.frozen or self._policy.watches == "nothing":
            return
        event = self._policy.steps[self._held]
        if event - step <= self._policy.observe:
            self._observer = self._watch(event)
            if self._gathered is not None:
                self._observer.go_on(self._gathered)
                self._gathered = None
            self._observer.__enter__()

    def before_zero_grad(self) -> None:
        """Show the policy the step's gradients, if it follows them. Call between the step and ``zero_grad``."""
        if not self._policy.follows or self.frozen:
            return
        gradients: dict[str, dict[str, Tensor]] = {}
        for name, layer in self._layers.items():
            found = {
                factor: whole(torch.zeros_like(each) if each.grad is None else each.grad)
                for factor, each in factors(layer).items()
            }
            gradients[name] = directions_of(layer, found)
        self._policy.see({name: self._view(name) for name in self._layers}, gradients)

    def after_step(self, step: int, optimizer: Optimizer | None) -> RankEvent | None:
        """Hold an event if one is due. Call after each optimiser step, when its gradients are no longer needed.

        Args:
            step: finished optimiser steps of the run, this one included.
            optimizer: that holds the layers' factors.

        Returns:
            The event, or None.

        Raises:
            ValueError: if an event is due but nothing was watched before it, the optimiser was built before the ranks
                were restored, or, after the first step already, what it holds cannot follow a change of rank.
            RefinementError: if one was due and was not held, or the policy cannot go on.
        """
        self._step = step
        if self._restored and optimizer is not None:
            self.check_holds(optimizer)
            self._restored = False
        if self._unseen and optimizer is not None and optimizer.state:  # none while a scaler skips the first steps
            self._check_carries(optimizer)
            self._unseen = False
        if self.frozen or step < self._policy.steps[self._held]:
            return None
        if step > self._policy.steps[self._held]:
            raise RefinementError(
                f"refinement must hold its event at step {self._policy.steps[self._held]}, got step {step}."
                " Call after_step after each step, and restore the refinement's state when training is resumed."
            )
        started = time.perf_counter()
        if self._policy.watches != "nothing" and self._observer is None:
            raise ValueError(f"before_step must be called before each step, got an event at step {step} without it")
        self.check_wrapping()
        reshard(self._model)
        self._add_up()
        snapshot = self._snapshot(step)
        moves = decided_once(lambda: self._policy.decide(snapshot), device=self._device, group=self._group)
        self._stop_watching()
        if optimizer is not None:
            self._check_carries(optimizer)
        with changed_together(self._with_averages()):
            event = self._apply(moves, step, optimizer)
        self._policy.moved(moves)
        self._held += 1
        self.history.add(event)
        self.history.seconds += time.perf_counter() - started
        return self.history.events[-1]

    def save(self, folder: str | Path) -> None:
        """Write what is needed to go on from here (docs/formats/refinement_state.md); call between two steps.

        Values of the factors are not part of it: save the model beside it. With several processes, call it on all of
        them; the first one writes.

        Args:
            folder: made if missing; one for each checkpoint.
        """
        gathered = self._observer.gathered() if self._observer is not None else self._gathered
        watched = () if gathered is None else of_each(gathered, device=self._device, group=self._group)
        state = self._state(watched)
        if rank_and_size(self._group)[0] == 0:
            write_refinement_state(state, folder)

    def restore(self, folder: str | Path) -> int:
        """Take up what :meth:`save` wrote, in this process or another. Then load the model, then build its optimiser.

        Layers and averages get the ranks that they had; their values are NaN until they are loaded. Nothing is changed
        if the files are refused.

        Args:
            folder: as given to :meth:`save`.

        Returns:
            Finished optimiser steps of the run.

        Raises:
            ValueError: if the files are damaged, or of other layers, another policy or other settings, or the model is
                wrapped already and a layer has no slots.
        """
        process, processes = rank_and_size(self._group)
        found = read_refinement_state(folder)
        self.check_wrapping()
        check_same_run(found, self._state(), processes)
        self._policy.restore(found.policy)
        self._stop_watching()
        with changed_together(self._with_averages()):
            for name, rank in found.ranks.items():
                for layer in (self._layers[name], *(each[name] for each in self._averages)):
                    take_rank(layer, rank, found.slots.get(name))
        self._step, self.history, self._held = found.step, found.history, len(found.history.events)
        self._gathered = found.watched[process] if found.watched else None
        self._restored = True
        return found.step

    def finish(self) -> RankHistory:
        """Check after training that the schedule fired as planned.

        Returns:
            The history.

        Raises:
            RefinementError: if an event is missing or no rank ever moved.
        """
        self._stop_watching()  # training may have stopped while it was watching
        if not self.frozen:
            happened = self._policy.steps[: self._held]
            raise RefinementError(
                f"refinement must fire at steps {self._policy.steps}, got {happened}. Train to the freeze."
            )
        if not any(event.dropped or event.admitted for event in self.history.events):
            raise RefinementError(
                "refinement must move rank, got no move in any event. Raise what it may move, or switch it off."
            )
        return self.history

    def _state(self, watched: tuple[Gathered, ...] = ()) -> RefinementState:
        return RefinementState(
            step=self._step or 0,
            seed=self._seed,
            loss=self._loss,
            layers={
                name: form_of(layer, cost=self._costs[name], cap=self._caps[name], floor=self._floors[name])
                for name, layer in self._layers.items()
            },
            history=self.history,
            slots={name: (layer.mask, layer.order) for name, layer in self._layers.items() if has_slots(layer)},
            policy=self._policy.state(),
            watched=watched,
        )

    def _check_carries(self, optimizer: Optimizer) -> None:
        """Refuse an optimiser that cannot follow new Parameters, before any layer is changed."""
        resized = [layer for layer in self._layers.values() if not has_slots(layer)]
        check_optimizer(optimizer, [each for layer in resized for each in factors(layer).values()])

    def _check_floors(self, floors: Mapping[str, int]) -> None:
        if not any(floors.values()):
            return
        ranks = self._ranks()
        wrong = {name: least for name, least in floors.items() if not 0 <= least <= ranks.get(name, -1)}
        needed = sum(self._costs[name] * least for name, least in self._floors.items())
        if wrong or needed > self._budget:
            raise ValueError(
                "floors must be ranks ≥ 0 of the layers, none above the present one, and fit the budget of"
                f" {self._budget} parameters, got {wrong or needed}. Lower them, or raise the budget."
            )
        if not self._policy.keeps_floors:
            raise ValueError(
                f"floors must be left out with the policy {self._policy.name}, which does not keep to them,"
                f" got {dict(floors)}"
            )

    def _watch(self, event: int) -> BottleneckObserver:
        sketch = self._policy.watches == "grams and gradients" and event != self._policy.steps[-1]
        generator = event_generator(self._seed, event)
        return BottleneckObserver(self._model, self._layers, loss=self._loss, sketch=sketch, generator=generator)

    def _stop_watching(self) -> None:
        if self._observer is not None:
            self._observer.__exit__(None, None, None)
            self._observer = None

    @property
    def _device(self) -> torch.device:
        return next(iter(self._layers.values())).lora_A.device

    def _add_up(self) -> None:
        """Give the observer what those of all processes have seen."""
        if self._observer is not None and several(self._group):
            gathered = self._observer.gathered()
            self._observer.go_on(added_up(gathered, loss=self._loss, device=self._device, group=self._group))

    def _snapshot(self, step: int) -> Snapshot:
        grams = self._observer.total() if self._observer else {}
        sketches = self._observer.sketches if self._observer else {}
        growth = dict(zip(sketches, leading_directions(list(sketches.values())), strict=True))
        views = {name: self._view(name, gram=grams.get(name), growth=growth.get(name)) for name in self._layers}
        return Snapshot(step=step, layers=views, budget=self._budget, seed=self._seed)

    def _view(
        self, name: str, *, gram: BottleneckGram | None = None, growth: tuple[float, Tensor] | None = None
    ) -> LayerView:
        layer = self._layers[name]
        return LayerView(
            **live_factors(layer),
            scaling=layer.scaling,
            cost=self._costs[name],
            cap=self._caps[name],
            floor=self._floors[name],
            gram=gram,
            growth=growth,
        )

    def _apply(self, moves: Moves, step: int, optimizer: Optimizer | None) -> RankEvent:
        before = self._ranks()
        for name, kept in moves.keep.items():
            layer, averages = self._layers[name], [each[name] for each in self._averages]
            if isinstance(kept, Rebasing):
                rebase(layer, kept.lora_A, kept.lora_B, optimizer, averages=averages)
            else:
                keep(layer, kept, optimizer, averages=averages)
        between = self._ranks()
        for name, new in moves.admit.items():
            layer, averages = self._layers[name], [each[name] for each in self._averages]
            if isinstance(new, NewTriplets):
                append(layer, new.lora_A, new.lora_E, new.lora_B, optimizer, averages=averages)
            else:
                grow(layer, new, optimizer, averages=averages)
        for name, indices in moves.silence.items():
            silence(self._layers[name], indices)
        if moves.forget and optimizer is not None:
            optimizer.state.clear()
        return RankEvent(
            step=step,
            ranks=self._ranks(),
            parameters=self._parameters(),
            budget=self._budget if moves.budget is None else moves.budget,
            dropped={name: before[name] - rank for name, rank in between.items() if rank < before[name]},
            admitted={name: len(new) for name, new in moves.admit.items()},
            silenced={name: len(indices) for name, indices in moves.silence.items() if indices},
            importance=moves.importance,
            kkt_gap=moves.kkt_gap,
        )

    def _with_averages(self) -> list[AnyLayer]:
        return [layer for layers in (self._layers, *self._averages) for layer in layers.values()]

    def _ranks(self) -> dict[str, int]:
        return {name: layer.rank for name, layer in self._layers.items()}

    def _parameters(self) -> int:
        return sum(self._costs[name] * rank for name, rank in self._ranks().items())


def _check_own_factors(layers: Mapping[str, AnyLayer]) -> None:
    """Refuse a factor that two layers have: it cannot have two ranks."""
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        for each in factors(layer).values():
            first = owners.setdefault(id(each), name)
            if first != name:
                raise ValueError(f"layers must hold factors of their own, got one that {first!r} and {name!r} share")
