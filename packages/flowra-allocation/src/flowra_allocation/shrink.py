"""The policy `shrink`: start above the budget, and give back what is worth least (docs/methods.md, section 7).

The parameters allowed after step t fall from κP at the start to P at the freeze,

    P(t) = P + (κ − 1) P (1 − p)³        p = (t − start)/(freeze − start)

and at each event the directions with the smallest gain per parameter leave until the rest fits. Gains within a module
fall, so dropping from the tail of each module loses the least for what is freed, up to less than one unit: the KKT gap
says by how much the worst direction that might have left beats the best one dropped. Where units are not equally dear,
the last one to leave may free more than was asked for; of what would leave, the best per parameter that still fits then
stays. No module falls below its floor, and nothing comes back later, so parameters never rise.

Gains are those of :mod:`flowra_allocation.directions`, measured anew at each event: of the batches watched before it
(``flow``), or of the update alone (``magnitude``). The final count is ≤ P; the peak is κP, and both are reported.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from flowra_allocation.directions import best_of, densities, measure_directions
from flowra_allocation.greedy import greedy
from flowra_allocation.policy import Moves, Policy, Snapshot
from flowra_allocation.schedule import RefinementSchedule
from flowra_allocation.shedding import shed

__all__ = ["Shrink"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shrink(Policy):
    """Drop the directions worth least per parameter until P(t) holds.

    Raises:
        ValueError: if κ or the measure is out of range.
    """

    name = "shrink"
    keeps_floors = True

    schedule: RefinementSchedule
    """When."""
    measure: Literal["magnitude", "flow"] = "magnitude"
    """What a direction is worth: the squared norm of its part of ΔW, or what the K-FAC model of the loss loses."""
    kappa: float = 2.0
    """κ: parameters at the start, as a multiple of the budget, > 1."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.measure not in ("flow", "magnitude"):
            raise ValueError(f'measure must be "flow" or "magnitude", got {self.measure!r}')
        if not self.kappa > 1:
            raise ValueError(f"kappa must be > 1, for otherwise there is nothing to shrink, got {self.kappa}")

    @property
    def watches(self) -> Literal["nothing", "grams"]:
        """Grams, if they are what a direction is measured by."""
        return "grams" if self.measure == "flow" else "nothing"

    @property
    def settings(self) -> Mapping[str, float | str | bool | None]:
        """Schedule, measure and κ."""
        return {**asdict(self.schedule), "measure": self.measure, "kappa": self.kappa}

    @property
    def steps(self) -> tuple[int, ...]:
        """Those of the schedule."""
        return self.schedule.steps

    @property
    def observe(self) -> int:
        """That of the schedule."""
        return self.schedule.observe

    @property
    def peak(self) -> float:
        """κ."""
        return self.kappa

    def allowed(self, step: int, budget: int) -> int:
        """Count the parameters ⌊P(t)⌋ allowed after a step, between ⌊κP⌋ until the start and P from the freeze on."""
        progress = (step - self.schedule.start) / (self.schedule.freeze - self.schedule.start)
        return int(budget + (self.kappa - 1) * budget * (1 - min(max(progress, 0.0), 1.0)) ** 3)

    def check(self, snapshot: Snapshot) -> None:
        """Refuse, before training, updates that fit the budget already: nothing would ever be dropped.

        Raises:
            ValueError: if there are no updates, or they fit.
        """
        Policy.check(self, snapshot)
        if snapshot.parameters <= snapshot.budget:
            raise ValueError(
                f"ranks must start above the budget of {snapshot.budget} parameters to shrink, got"
                f" {snapshot.parameters}. Raise them, or lower the budget."
            )

    def decide(self, snapshot: Snapshot) -> Moves:
        """Drop what does not fit P(t)."""
        directions = measure_directions(snapshot.layers, self.measure)
        costs = {name: view.cost for name, view in snapshot.layers.items()}
        floors = {name: view.floor for name, view in snapshot.layers.items()}
        allowed = self.allowed(snapshot.step, snapshot.budget)
        gains = {name: each.gains for name, each in directions.items()}
        shedding = shed(gains, costs, budget=allowed, floors=floors)
        filled = greedy(gains, costs, allowed, floors=shedding.keep)
        return Moves(
            keep=best_of(directions, filled.ranks, snapshot.layers),
            importance=densities(directions, snapshot.layers),
            budget=allowed,
            kkt_gap=shedding.kkt_gap,
        )
