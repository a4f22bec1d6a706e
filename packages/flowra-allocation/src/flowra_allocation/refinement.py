"""Refinement: rank moves between modules while training goes on (docs/methods.md, section 7).

A :class:`~flowra_allocation.policy.Policy` says what moves; :class:`Refiner` does the rest, for every policy and every
form of update. It knows nothing of trainers: call it before and after every optimiser step, or hand it to
:class:`flowra_allocation.trainer_callback.RefinementCallback`.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_allocation.bottleneck_gram import BottleneckGram
from flowra_allocation.forms import RANK_AXIS, AnyLayer, factors, live_factors, live_slots
from flowra_allocation.observe import BottleneckObserver
from flowra_allocation.policy import LayerView, Moves, Policy, Rebasing, Snapshot
from flowra_allocation.rank_history import RankEvent, RankHistory
from flowra_allocation.surgery import grow, keep, rebase, silence

__all__ = ["Refiner"]


class Refiner:
    """Move rank between layers during training.

    Args:
        model: that carries the layers.
        layers: exact module name to the layer's low-rank update, rank 0 included.
        policy: when rank moves, and where to.
        costs: module name to parameters per unit of rank.
        caps: module name to its largest rank.
        budget: P, in parameters; the present ranks must fit the policy's peak.
        averages: running averages of the updates (of an EMA of the model), module name to layer, changed alike.
        loss: whether the training loss is a mean or a sum over the examples of a batch.
        seed: of what is drawn at events.

    Attributes:
        history: what happened so far.

    Raises:
        ValueError: if names differ, the present ranks exceed the policy's peak, or the policy cannot move the layers.
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
        averages: Sequence[Mapping[str, AnyLayer]] = (),
        loss: Literal["mean", "sum"] = "mean",
        seed: int = 0,
    ) -> None:
        if not all(layers.keys() == each.keys() for each in (costs, caps, *averages)):
            raise ValueError(
                f"costs, caps and averages must name the layers, got {sorted(layers)}, {sorted(costs)}, {sorted(caps)}"
            )
        self._model, self._layers, self._costs, self._caps = model, layers, costs, caps
        self._policy, self._budget, self._averages = policy, budget, averages
        self._loss, self._seed = loss, seed
        self._observer: BottleneckObserver | None = None
        self._held = 0  # events held
        allowed = int(budget * policy.peak)
        if self._parameters() > allowed:
            raise ValueError(f"ranks must fit the budget of {allowed} parameters, got {self._parameters()}")
        policy.check(self._snapshot(0))
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

    def before_step(self, step: int) -> None:
        """Watch, if an event comes soon. Call before the forward pass of each optimiser step.

        Args:
            step: finished optimiser steps of the run.
        """
        if self._observer is not None or self.frozen or self._policy.watches == "nothing":
            return
        event = self._policy.steps[self._held]
        if event - step <= self._policy.observe:
            self._observer = self._watch(event)
            self._observer.__enter__()

    def before_zero_grad(self) -> None:
        """Show the policy the step's gradients, if it follows them. Call between the step and ``zero_grad``."""
        if not self._policy.follows or self.frozen:
            return
        gradients: dict[str, dict[str, Tensor]] = {}
        for name, layer in self._layers.items():
            live = torch.tensor(live_slots(layer), device=layer.lora_A.device)
            gradients[name] = {
                factor: (torch.zeros_like(each) if each.grad is None else each.grad).index_select(
                    RANK_AXIS[factor], live
                )
                for factor, each in factors(layer).items()
            }
        self._policy.see({name: self._view(name) for name in self._layers}, gradients)

    def after_step(self, step: int, optimizer: Optimizer | None) -> RankEvent | None:
        """Hold an event if one is due. Call after each optimiser step, when its gradients are no longer needed.

        Args:
            step: finished optimiser steps of the run, this one included.
            optimizer: that holds the layers' factors.

        Returns:
            The event, or None.

        Raises:
            ValueError: if an event is due but nothing was watched before it.
        """
        if self.frozen or step != self._policy.steps[self._held]:
            return None
        started = time.perf_counter()
        if self._policy.watches != "nothing" and self._observer is None:
            raise ValueError(f"before_step must be called before each step, got an event at step {step} without it")
        snapshot = self._snapshot(step)
        moves = self._policy.decide(snapshot)
        self._stop_watching()
        event = self._apply(moves, step, optimizer)
        self._held += 1
        self.history.add(event)
        self.history.seconds += time.perf_counter() - started
        return event

    def finish(self) -> RankHistory:
        """Check after training that the schedule fired as planned.

        Returns:
            The history.

        Raises:
            ValueError: if an event is missing or no rank ever moved.
        """
        self._stop_watching()  # training may have stopped while it was watching
        if not self.frozen:
            happened = self._policy.steps[: self._held]
            raise ValueError(
                f"refinement must fire at steps {self._policy.steps}, got {happened}. Train to the freeze."
            )
        if not any(event.dropped or event.admitted for event in self.history.events):
            raise ValueError(
                "refinement must move rank, got no move in any event. Raise what it may move, or switch it off."
            )
        return self.history

    def _watch(self, event: int) -> BottleneckObserver:
        sketch = self._policy.watches == "grams and gradients" and event != self._policy.steps[-1]
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + event) % 2**63)
        return BottleneckObserver(self._model, self._layers, loss=self._loss, sketch=sketch, generator=generator)

    def _stop_watching(self) -> None:
        if self._observer is not None:
            self._observer.__exit__(None, None, None)
            self._observer = None

    def _snapshot(self, step: int) -> Snapshot:
        grams = self._observer.total() if self._observer else {}
        sketches = self._observer.sketches if self._observer else {}
        views = {
            name: self._view(
                name, gram=grams.get(name), growth=sketches[name].leading_direction() if sketches else None
            )
            for name in self._layers
        }
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
        for name, rows in moves.admit.items():
            grow(self._layers[name], rows, optimizer, averages=[each[name] for each in self._averages])
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
            admitted={name: len(rows) for name, rows in moves.admit.items()},
            silenced={name: len(indices) for name, indices in moves.silence.items() if indices},
            importance=moves.importance,
            kkt_gap=moves.kkt_gap,
        )

    def _ranks(self) -> dict[str, int]:
        return {name: layer.rank for name, layer in self._layers.items()}

    def _parameters(self) -> int:
        return sum(self._costs[name] * rank for name, rank in self._ranks().items())
