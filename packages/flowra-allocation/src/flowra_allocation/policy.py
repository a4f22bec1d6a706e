"""The contract of a refinement policy: it is shown what the updates look like, and says what moves.

A policy decides and touches nothing: the :class:`~flowra_allocation.refinement.Refiner` watches, adds statistics up
over processes, changes layers, optimiser and averages, and keeps the history. So a policy is tested on plain values.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowra_allocation.bottleneck_gram import BottleneckGram

__all__ = [
    "Keep",
    "LayerView",
    "Moves",
    "NewTriplets",
    "Policy",
    "Rebasing",
    "RefinementError",
    "Snapshot",
    "event_generator",
]


class RefinementError(ValueError):
    """Refinement cannot go on, or did not do what it was asked for: a schedule that was not followed, or no move."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerView:
    """One update as a policy sees it: the directions that are there, in their order, detached."""

    lora_A: Tensor
    """``(r, n)``."""
    lora_B: Tensor
    """``(m, r)``."""
    lora_E: Tensor | None = None
    """``(r,)``; None where the update is a pair."""
    scaling: float = 1.0
    """s."""
    cost: int
    """Parameters per direction."""
    cap: int
    """Largest rank."""
    floor: int = 0
    """Least rank; 0 for a policy that does not keep to floors."""
    gram: BottleneckGram | None = None
    """Of the batches that were watched; None if the policy does not watch, or the rank is 0."""
    growth: tuple[float, Tensor] | None = None
    """σ₁(N)² and the leading right singular vector ``(n,)`` of the part N of the gradient that the update cannot
    follow; None if the policy does not sketch."""

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.lora_A)

    @property
    def magnitudes(self) -> Tensor:
        """Frobenius norms of the directions' parts of ΔW, s |E_k| ‖a_k‖ ‖b_k‖, ``(r,)``, float64.

        Of a convolution in groups it is an upper bound: ΔW has the blocks of groups alone.
        """
        lengths = self.lora_A.double().norm(dim=1) * self.lora_B.double().norm(dim=0)
        lengths = lengths if self.lora_E is None else lengths * self.lora_E.double().abs()
        return torch.mul(lengths, abs(self.scaling))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Snapshot:
    """All updates at one event."""

    step: int
    """Finished optimiser steps of the whole run."""
    layers: Mapping[str, LayerView]
    """Module name to view."""
    budget: int
    """P, in parameters."""
    seed: int
    """Of the run. With ``step`` it fixes all that is drawn, so a resumed run draws the same."""

    @property
    def parameters(self) -> int:
        """Σ cost · rank now."""
        return sum(layer.cost * layer.rank for layer in self.layers.values())

    def generator(self) -> torch.Generator:
        """Return a generator of this event alone."""
        return event_generator(self.seed, self.step)


def event_generator(seed: int, step: int) -> torch.Generator:
    """Return the source of all that is drawn at the event after ``step``: it depends on the run's seed and it alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rebasing:
    """Factors in the span of the old ones, for an update that is a pair."""

    lora_A: Tensor
    """``(k, n)``."""
    lora_B: Tensor
    """``(m, k)``."""


Keep = tuple[int, ...] | Rebasing
"""Which directions stay: their indices, or fewer directions made of the old ones."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NewTriplets:
    """New directions with exactly these values, for an update of triplets; it changes unless E is zero."""

    lora_A: Tensor
    """``(k, n)``."""
    lora_E: Tensor
    """``(k,)``."""
    lora_B: Tensor
    """``(m, k)``."""

    def __len__(self) -> int:
        """Return k."""
        return len(self.lora_E)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moves:
    """What one event does: first some directions leave, then new ones come, then some are set to zero."""

    keep: Mapping[str, Keep] = field(default_factory=dict)
    """Module name to what stays; modules that are not named keep all."""
    admit: Mapping[str, Tensor | NewTriplets] = field(default_factory=dict)
    """Module name to new directions, best first: rows ``(k, n)`` of some that do not change the update (where it has
    an E, rows and columns are made as long as those that are there), or all their values."""
    silence: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Module name to the indices, after the moves above, of directions whose E becomes zero. They stay, and may
    come back. Triplets only."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """Module name to the score that decided, for the history."""
    budget: int | None = None
    """Parameters allowed after this event, if not the run's budget."""
    kkt_gap: float | None = None
    """Smallest gain per parameter kept minus largest dropped; None if nothing was dropped or kept."""
    forget: bool = False
    """Drop the optimiser's state of all parameters (what some published code does)."""


class Policy(ABC):
    """When rank moves, and where to."""

    name: ClassVar[str]
    """Of the policy, for the history."""
    keeps_floors: ClassVar[bool] = False
    """Whether no module falls below its floor. A refiner refuses floors for a policy that does not keep to them."""

    @property
    def watches(self) -> Literal["nothing", "grams", "grams and gradients"]:
        """What is gathered on the steps before an event; the gradients serve growth."""
        return "nothing"

    @property
    def follows(self) -> bool:
        """Whether :meth:`see` is called after every step until the last event."""
        return False

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, float | str | bool | None]:
        """What defines the policy, as plain values, for the history."""

    @property
    @abstractmethod
    def steps(self) -> tuple[int, ...]:
        """Finished optimiser steps after which an event happens, increasing; from the last on ranks are frozen."""

    @property
    def observe(self) -> int:
        """Steps before an event on which statistics are gathered, ≥ 1, if the policy watches."""
        return 1

    @property
    def peak(self) -> float:
        """Largest Σ cost · rank that the policy allows at any time, as a multiple of the budget, ≥ 1."""
        return 1.0

    @abstractmethod
    def decide(self, snapshot: Snapshot) -> Moves:
        """Decide one event."""

    def check(self, snapshot: Snapshot) -> None:
        """Refuse, before training, what the policy cannot move.

        Raises:
            ValueError: if there is nothing to move, or an update of a form that the policy does not know.
        """
        if not snapshot.layers:
            raise ValueError("layers must hold at least one update to move rank between, got none. Attach adapters.")

    def see(self, layers: Mapping[str, LayerView], gradients: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Look at factors and gradients after a step of the optimiser, if the policy :attr:`follows`.

        Args:
            layers: module name to view, after the step.
            gradients: module name to factor name to the gradient of that step, shaped as the factor in the view.

        Raises:
            NotImplementedError: if the policy follows and does not say how.
        """
        raise NotImplementedError(f"{type(self).__name__} must define see, as it follows every step")

    def moved(self, moves: Moves) -> None:  # noqa: B027 - not every policy listens
        """Hear what an event did, on every process: what has been gathered of directions moves along with them."""

    def state(self) -> dict[str, Tensor]:
        """Return what :meth:`see` has gathered, so that training can be resumed."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned.

        Raises:
            ValueError: if it is not a state of this policy.
        """
        if state:
            raise ValueError(f"state of policy {self.name} must be empty, got {sorted(state)}")
