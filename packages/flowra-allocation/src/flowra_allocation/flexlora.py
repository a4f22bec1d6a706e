"""The policy `flexlora`: directions go to the updates that use all of theirs (docs/methods.md, section 7).

At each event the updates are scored, by default by the entropy of their singular values
(:mod:`flowra_allocation.importance`). Each of the lowest loses its weakest direction, each of the highest gains one
that does not change it (:mod:`flowra_allocation.flexlora_initialisation`), as many as the schedule says.

Source: Liu, Si & Jia (2026), FlexLoRA, arXiv:2601.22905. Where its released code differs from its text this follows
the text, and closes what both leave open; :mod:`flowra_allocation.flexlora_compat` does as the code. Deviations:

- the weakest direction is that of the smallest |E| ‖a‖ ‖b‖, which is |E| where directions are orthonormal;
- no update both loses and gains at one event: those that gain come first, and as many pairs are made as can be;
- an update keeps at least one direction and gets at most ``r_max``;
- parameters stay within the run's budget (the paper counts directions only): of fewer pairs, the most that fit; and
  with ``budget="params"`` they never rise at all, since updates lose until what is gained is paid for.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flowra_allocation.flexlora_initialisation import Initialisation, new_direction
from flowra_allocation.flexlora_schedule import FlexLoRASchedule
from flowra_allocation.importance import RECONSTRUCTED, SPECTRAL_METRICS, Metric
from flowra_allocation.policy import LayerView, Moves, Policy, Snapshot
from flowra_allocation.triplet_sensitivity import TripletSensitivity

__all__ = ["Exchange", "FlexLoRA", "can_exchange", "exchange"]


_DOES = {"both": "exchange", "prune": "prune", "expand": "expand"}
_REMEDY = {
    "both": "One above rank 1 must be there to lose, and another below its largest rank to gain: raise the budget.",
    "prune": "An update must be above rank 1: raise the budget.",
    "expand": "An update below its largest rank must be there, and room in the budget for one more of its directions.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FlexLoRA(Policy):
    """Prune and expand, one direction per update and event. Updates must be triplets.

    Raises:
        ValueError: if ``r_max`` is out of range, or a setting is without effect.
    """

    name = "flexlora"

    schedule: FlexLoRASchedule
    """When, and how many."""
    metric: Metric = "entropy"
    """What updates are scored by. ``elem_energy`` and ``mat_energy`` are reconstructed."""
    moves: Literal["both", "prune", "expand"] = "both"
    """What an event does. With ``expand`` ranks must start below the budget; with ``prune`` they end below."""
    initialisation: Initialisation = "zero_impact"
    """What a new direction is. All but ``zero_impact`` are reconstructed."""
    budget: Literal["ranks", "params"] = "ranks"
    """What an event leaves as it was, if it does both: the sum of ranks, or at most the parameters there were."""
    r_max: int | None = None
    """Largest rank of an update, beside its own cap, ≥ 1; None for four times the largest rank at the start."""
    _start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _sensitivity: TripletSensitivity = field(default_factory=TripletSensitivity, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.r_max is not None and self.r_max < 1:
            raise ValueError(f"r_max must be ≥ 1, got {self.r_max}")
        if self.moves != "both" and self.budget != "ranks":
            raise ValueError(f"budget must be 'ranks' unless moves is 'both', got {self.budget!r} for {self.moves!r}")
        if self.moves == "prune" and self.initialisation != "zero_impact":
            raise ValueError(f"initialisation must be left out where nothing comes, got {self.initialisation!r}")

    @property
    def settings(self) -> dict[str, float | str | bool | None]:
        """All of them; ``reconstructed`` tells whether one of them was published in words only."""
        return {
            **asdict(self.schedule),
            "metric": self.metric,
            "moves": self.moves,
            "initialisation": self.initialisation,
            "budget": self.budget,
            "r_max": self.r_max,
            "reconstructed": self.metric in RECONSTRUCTED or self.initialisation != "zero_impact",
        }

    @property
    def steps(self) -> tuple[int, ...]:
        """Those of the schedule."""
        return self.schedule.steps

    @property
    def follows(self) -> bool:
        """Whether every step is seen: for sensitivity only."""
        return self.metric == "sensitivity"

    def check(self, snapshot: Snapshot) -> None:
        """Start anew with these updates.

        Raises:
            ValueError: if one is not of triplets, or, whatever the scores, nothing could move at the first event.
        """
        Policy.check(self, snapshot)
        check_triplets(snapshot)
        if self.moves == "both" and len(snapshot.layers) < 2:
            raise ValueError(f"layers must hold two updates to move rank between, got {sorted(snapshot.layers)}")
        self._start.clear()
        self._sensitivity.restore({})
        views = snapshot.layers.items()
        if not can_exchange(
            {name: view.cost for name, view in views},
            ranks={name: view.rank for name, view in views},
            limits={name: min(view.cap, self._limit(snapshot)) for name, view in views},
            free=snapshot.budget - snapshot.parameters,
            moves=self.moves,
            budget=self.budget,
        ):
            ranks = dict(sorted(Counter(view.rank for _, view in views).items()))
            raise ValueError(
                f"ranks must leave flexlora something to {_DOES[self.moves]}, got {ranks} (updates by rank),"
                f" {snapshot.parameters} parameters of {snapshot.budget}. {_REMEDY[self.moves]}"
            )

    def see(self, layers: Mapping[str, LayerView], gradients: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take in the sensitivity of a step."""
        self._sensitivity.update(layers, gradients)

    def moved(self, moves: Moves) -> None:
        """Move the sensitivities along."""
        kept = {name: each for name, each in moves.keep.items() if isinstance(each, tuple)}
        self._sensitivity.follow(keep=kept, admitted={name: len(new) for name, new in moves.admit.items()})

    def decide(self, snapshot: Snapshot) -> Moves:
        """Score the updates, choose who loses and who gains, and make what is gained.

        Returns:
            The moves.

        Raises:
            ValueError: if a score is not finite, or no step was seen whose sensitivity it could be.
        """
        layers, scores = snapshot.layers, self._scores(snapshot)
        chosen = exchange(
            scores,
            {name: view.cost for name, view in layers.items()},
            ranks={name: view.rank for name, view in layers.items()},
            limits={name: min(view.cap, self._limit(snapshot)) for name, view in layers.items()},
            directions=self.schedule.directions(snapshot.step),
            free=snapshot.budget - snapshot.parameters,
            moves=self.moves,
            budget=self.budget,
        )
        generator = snapshot.generator()
        keep = {name: _without_the_weakest(layers[name]) for name in chosen.prune}
        admit = {name: new_direction(layers[name], self.initialisation, generator) for name in chosen.expand}
        return Moves(keep=keep, admit=admit, importance=scores)

    def state(self) -> dict[str, Tensor]:
        """Return the largest rank, where it comes from the start, and the sensitivities, where they are gathered."""
        return {**self._start, **self._sensitivity.state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned.

        Raises:
            ValueError: if it is not a state of this policy with these settings.
        """
        start = {key: value for key, value in state.items() if key == "r_max"}
        seen = {key: value for key, value in state.items() if key != "r_max"}
        if bool(start) != (self.r_max is None) or (seen and not self.follows):
            raise ValueError(
                f"state must be of flexlora with the same settings, got {sorted(state)} for {self.settings}"
            )
        self._start.update(start)
        self._sensitivity.restore(seen)

    def _limit(self, snapshot: Snapshot) -> int:
        if self.r_max is not None:
            return self.r_max
        largest = max(view.rank for view in snapshot.layers.values())
        return int(self._start.setdefault("r_max", torch.tensor(4 * largest)))

    def _scores(self, snapshot: Snapshot) -> dict[str, float]:
        if self.metric == "sensitivity":
            seen = self._sensitivity.scores()
            missing = sorted(snapshot.layers.keys() - seen.keys())
            if missing:
                raise ValueError(f"see must be called after every step, got an event without it for {missing}")
            scores = {name: float(seen[name].sum()) / max(view.rank, 1) for name, view in snapshot.layers.items()}
        else:
            score = SPECTRAL_METRICS[self.metric]
            scores = {name: score(_singular_values(view)) for name, view in snapshot.layers.items()}
        wrong = sorted(name for name, value in scores.items() if not math.isfinite(value))
        if wrong:
            raise ValueError(
                f"scores must be finite, got {[scores[name] for name in wrong]}; {wrong}. Training diverged."
            )
        return scores


def check_triplets(snapshot: Snapshot) -> None:
    """Refuse updates that have no singular values.

    Raises:
        ValueError: if there is one.
    """
    pairs = sorted(name for name, view in snapshot.layers.items() if view.lora_E is None)
    if pairs:
        raise ValueError(f"layers must be updates of triplets, got pairs; {pairs}. Attach them in the SVD form.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """Who loses a direction, and who gains one."""

    prune: tuple[str, ...] = ()
    """Lowest score first."""
    expand: tuple[str, ...] = ()
    """Highest score first; none of ``prune``."""


def exchange(
    scores: Mapping[str, float],
    costs: Mapping[str, int],
    *,
    ranks: Mapping[str, int],
    limits: Mapping[str, int],
    directions: int,
    free: int,
    moves: Literal["both", "prune", "expand"] = "both",
    budget: Literal["ranks", "params"] = "ranks",
) -> Exchange:
    """Choose who loses and who gains a direction at one event.

    Args:
        scores: module name to importance.
        costs: module name to parameters per direction.
        ranks: module name to present rank; those above 1 can lose.
        limits: module name to the rank below which it can gain.
        directions: b, how many gain at most.
        free: parameters by which the sum may rise, ≥ 0.
        moves: what is done.
        budget: with ``both``, ``ranks`` lets as many lose as gain, ``params`` as many as pay for the growth.

    Returns:
        The b highest gain, or b - 1, …, the most for which there are losers and room; nobody where not even the highest
        can be paid for, since no dearer update is passed over for a cheaper one. With ``prune`` the b lowest lose. Of
        equal scores the first by name is chosen.
    """
    highest = sorted((name for name in scores if ranks[name] < limits[name]), key=lambda each: (-scores[each], each))
    lowest = sorted((name for name in scores if ranks[name] > 1), key=lambda each: (scores[each], each))
    if moves == "prune":
        return Exchange(prune=tuple(lowest[:directions]))
    for count in range(min(directions, len(highest)), 0, -1):
        expand = highest[:count]
        growth = sum(costs[name] for name in expand)
        others = [name for name in lowest if name not in expand] if moves == "both" else []
        prune = others[:count] if budget == "ranks" else _paying(growth, others, costs)
        rise = growth - sum(costs[name] for name in prune)
        paired = moves == "expand" or budget == "params" or len(prune) == count
        if paired and rise <= (free if budget == "ranks" else 0):
            return Exchange(prune=tuple(prune), expand=tuple(expand))
    return Exchange()


def can_exchange(
    costs: Mapping[str, int],
    *,
    ranks: Mapping[str, int],
    limits: Mapping[str, int],
    free: int,
    moves: Literal["both", "prune", "expand"] = "both",
    budget: Literal["ranks", "params"] = "ranks",
) -> bool:
    """Tell whether there are scores with which :func:`exchange` of these updates moves a direction."""
    losing = {name: costs[name] for name, rank in ranks.items() if rank > 1}
    growing = {name: costs[name] for name, rank in ranks.items() if rank < limits[name]}
    if moves == "prune":
        return bool(losing)
    if moves == "expand":
        return any(cost <= free for cost in growing.values())
    for name, cost in growing.items():
        others = [other for loser, other in losing.items() if loser != name]
        freed = max(others, default=-math.inf) + free if budget == "ranks" else sum(others)
        if cost <= freed:
            return True
    return False


def _paying(growth: int, losers: Sequence[str], costs: Mapping[str, int]) -> list[str]:
    """Return the first of the losers whose parameters together cover the growth; all if they do not."""
    freed, paying = 0, []
    for name in losers:
        if freed >= growth:
            break
        freed += costs[name]
        paying.append(name)
    return paying


def _singular_values(view: LayerView) -> Tensor:
    assert view.lora_E is not None
    return view.lora_E


def _without_the_weakest(view: LayerView) -> tuple[int, ...]:
    norms = view.magnitudes.tolist()
    weakest = min(range(view.rank), key=norms.__getitem__)
    return tuple(index for index in range(view.rank) if index != weakest)
