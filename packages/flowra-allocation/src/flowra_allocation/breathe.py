"""The policy `breathe`: move rank inside the budget (docs/methods.md, section 7).

At each event the directions with the smallest flow gain per parameter leave until a share of the budget is free, and
the free share goes to new directions *on probation*: chosen by the gradient that their module cannot follow, but kept
only if, trained until the next event, they hold their own against everything else. A predicted gain decides who is
tried, not who stays, but for those of the last event that admits any. Parameters never exceed the budget, neither
finally nor at the peak.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from flowra_allocation.directions import best_of, densities, measure_directions
from flowra_allocation.policy import Moves, Policy, Snapshot
from flowra_allocation.schedule import RefinementSchedule
from flowra_allocation.shedding import shed

__all__ = ["Breathe", "admit"]

FRESH_ROW = 3**-0.5  # the norm of a row of A in a fresh LoRA


@dataclass(frozen=True, kw_only=True, slots=True)
class Breathe(Policy):
    """Shrink by flow gains, then grow on probation.

    Raises:
        ValueError: if the share is out of range, or nothing could ever be tried.
    """

    name = "breathe"
    keeps_floors = True
    watches = "grams and gradients"

    schedule: RefinementSchedule
    """When. The last event admits nothing, and what came at the one before it stays: without it, its part of the
    budget would be idle."""
    share: float = 0.1
    """Part of the budget that changes hands at an event, in (0, 1); less where the modules that may grow, by one
    direction each, cannot take so much: what nobody could take up is not taken away."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0 < self.share < 1:
            raise ValueError(f"share must be in (0, 1), got {self.share}")
        if self.schedule.events < 2:
            raise ValueError(f"events must be ≥ 2, for the last admits nothing, got {self.schedule.events}")

    @property
    def settings(self) -> dict[str, float | str | bool | None]:
        """Schedule and share."""
        return {**asdict(self.schedule), "share": self.share}

    @property
    def steps(self) -> tuple[int, ...]:
        """Those of the schedule."""
        return self.schedule.steps

    @property
    def observe(self) -> int:
        """That of the schedule."""
        return self.schedule.observe

    def check(self, snapshot: Snapshot) -> None:
        """Refuse, before training, updates that may not grow: what left could go nowhere.

        Raises:
            ValueError: if there are no updates, or all have their largest rank.
        """
        Policy.check(self, snapshot)
        if all(view.rank >= view.cap for view in snapshot.layers.values()):
            raise ValueError(
                f"caps must leave an update room to grow, got {len(snapshot.layers)} updates, all of their largest"
                " rank. Raise caps, or lower the ranks."
            )

    def decide(self, snapshot: Snapshot) -> Moves:
        """Free a share of the budget, and give it to the modules with the best predictions."""
        directions = measure_directions(snapshot.layers, "flow")
        costs = {name: view.cost for name, view in snapshot.layers.items()}
        last = snapshot.step == self.schedule.freeze
        rows = {name: view.growth for name, view in snapshot.layers.items() if view.growth is not None}
        growing = [name for name, (energy, _) in rows.items() if energy > 0]
        room = sum(costs[name] for name in growing if snapshot.layers[name].rank < snapshot.layers[name].cap)
        free = 0.0 if last else min(self.share * snapshot.budget, room)
        shedding = shed(
            {name: each.gains for name, each in directions.items()},
            costs,
            budget=snapshot.budget - free,
            floors={name: view.floor for name, view in snapshot.layers.items()},
        )
        admitted = (
            ()
            if last
            else admit(
                {name: energy / 2 for name, (energy, _) in rows.items()},
                costs,
                ranks=shedding.keep,
                caps={name: view.cap for name, view in snapshot.layers.items()},
                budget=snapshot.budget,
            )
        )
        return Moves(
            keep=best_of(directions, shedding.keep, snapshot.layers),
            admit={name: FRESH_ROW * rows[name][1][None] for name in admitted},
            importance=densities(directions, snapshot.layers),
            kkt_gap=shedding.kkt_gap,
        )


def admit(
    predictions: Mapping[str, float],
    costs: Mapping[str, int],
    *,
    ranks: Mapping[str, int],
    caps: Mapping[str, int],
    budget: int,
) -> tuple[str, ...]:
    """Choose the modules that get one direction on probation: the best prediction per parameter first.

    Args:
        predictions: module name to the predicted gain of one more direction, ≥ 0.
        costs: module name to parameters per direction.
        ranks: module name to its present rank.
        caps: module name to its largest rank.
        budget: parameters allowed afterwards.

    Returns:
        Module names, best first; ties are broken by name.
    """
    used = sum(costs[name] * rank for name, rank in ranks.items())
    chosen: list[str] = []
    for name in sorted(predictions, key=lambda each: (-predictions[each] / costs[each], each)):
        if predictions[name] > 0 and ranks[name] < caps[name] and used + costs[name] <= budget:
            chosen.append(name)
            used += costs[name]
    return tuple(chosen)
