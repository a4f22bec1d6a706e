"""The policy `flexlora_compat`: FlexLoRA as its released code has it, mistakes included (docs/methods.md, section 7).

For comparisons with the published results (Liu, Si & Jia 2026, arXiv:2601.22905; Chongjie-Si/Subspace-Tuning at
2c63d06). Use :class:`~flowra_allocation.flexlora.FlexLoRA` for anything else. What the code does:

- the direction that leaves is that of the smallest E *with its sign*: (0.5, −0.9, 0.1) loses −0.9;
- rows and columns of new ones are N(0, 1), fifty times the spread at birth. The output stays, but the loss does not
  where a penalty keeps directions orthonormal: it rises a thousandfold;
- the lowest and the highest are chosen independently: an update may lose and gain at one event;
- an update of rank 1 scores NaN, as does one whose E is zero, and NaN is the highest score of all: such updates gain.
  Where all are NaN, which one is chosen is up to ``torch.topk``;
- b is never cut down: more than there are updates that can lose, or updates, is an error;
- ranks are counted, not parameters. These drift where shapes differ, above the run's budget if need be: the history
  says how many were allowed.

No largest rank is known either; where one would be exceeded, that is an error here.

Its trainer does more at each event: it drops the optimiser's state of *all* parameters, sets the learning rate back to
its peak, leaves the scheduler on an optimiser that no longer trains anything, and loses weight decay. The first of it
is done with ``optimizer_reset=True``. The rest is not, unless a training loop asks for it: :func:`rebuilt_optimizer`.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from flowra_allocation.flexlora import check_triplets
from flowra_allocation.flexlora_schedule import FlexLoRASchedule
from flowra_allocation.policy import LayerView, Moves, NewTriplets, Policy, RefinementError, Snapshot

__all__ = ["FlexLoRACompat", "rebuilt_optimizer", "released_entropy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlexLoRACompat(Policy):
    """Prune and expand as the released code does. Updates must be triplets of rank ≥ 1, in the model's order."""

    name = "flexlora_compat"

    schedule: FlexLoRASchedule
    """When, and how many; the released launcher has ``decay="constant"`` and b0 = 4."""
    optimizer_reset: bool = False
    """Whether the optimiser forgets all it knows at each event. Groups and schedulers stay."""

    @property
    def settings(self) -> dict[str, float | str | bool | None]:
        """All of them."""
        return {**asdict(self.schedule), "optimizer_reset": self.optimizer_reset}

    @property
    def steps(self) -> tuple[int, ...]:
        """Those of the schedule."""
        return self.schedule.steps

    def check(self, snapshot: Snapshot) -> None:
        """Refuse what the first event could not move.

        Raises:
            ValueError: if an update is not of triplets or of rank 0, or there are fewer than b that can lose.
        """
        Policy.check(self, snapshot)
        check_triplets(snapshot)
        empty = sorted(name for name, view in snapshot.layers.items() if view.rank == 0)
        if empty:
            raise ValueError(f"layers must have rank ≥ 1, got 0; {empty}. Leave them out, or use flexlora.")
        first = self.schedule.directions(self.steps[0])
        if first > len(_prunable(snapshot)):
            raise ValueError(_too_many(first, snapshot))

    def decide(self, snapshot: Snapshot) -> Moves:
        """Choose the b lowest and the b highest, whether they overlap or not.

        Returns:
            The moves.

        Raises:
            RefinementError: if b is larger than the number of updates that can lose, or an update would exceed its
                largest rank.
        """
        names, prunable = list(snapshot.layers), _prunable(snapshot)
        directions = self.schedule.directions(snapshot.step)
        if directions > len(prunable):
            raise RefinementError(_too_many(directions, snapshot))
        scores = {name: released_entropy(_singular_values(view)) for name, view in snapshot.layers.items()}
        lowest = torch.topk(torch.tensor([scores[name] for name in prunable]), directions, largest=False).indices
        highest = torch.topk(torch.tensor(list(scores.values())), directions, largest=True).indices
        prune = [prunable[index] for index in lowest.tolist()]
        expand = [names[index] for index in highest.tolist()]
        full = [name for name in expand if snapshot.layers[name].rank - (name in prune) >= snapshot.layers[name].cap]
        if full:
            raise RefinementError(
                f"caps must leave room for what the released code adds, got {full} at theirs. Raise them, or use"
                " flexlora, which passes such updates over."
            )
        generator = snapshot.generator()
        costs = {name: view.cost for name, view in snapshot.layers.items()}
        after = snapshot.parameters + sum(costs[name] for name in expand) - sum(costs[name] for name in prune)
        return Moves(
            keep={name: _without_the_smallest(snapshot.layers[name]) for name in prune},
            admit={name: _noise(snapshot.layers[name], generator) for name in expand},
            importance={name: score for name, score in scores.items() if not math.isnan(score)},
            budget=max(snapshot.budget, after),
            forget=self.optimizer_reset,
        )


def released_entropy(singular_values: Tensor) -> float:
    """Score an update as the released code does, in the dtype of E.

    Args:
        singular_values: E, ``(r,)``, r ≥ 1.

    Returns:
        −Σ p_i ln(p_i + 1e-8) / ln r with p_i = E_i² / Σ E². NaN at rank 1 (in float32) and where E is zero.
    """
    p = singular_values.square()
    p = p / p.sum()
    return float(-(p * torch.log(p + 1e-8)).sum() / math.log(len(p)))


def rebuilt_optimizer(optimizer: Optimizer) -> Optimizer:
    """Make what the released trainer goes on with after an event: a new optimiser with the defaults of the old one.

    All its parameters are in one group; learning rate and weight decay are those that the old one was built with, not
    those of its groups; nothing is remembered. Schedulers stay with the old one.

    Args:
        optimizer: of torch, or one that is built alike; unchanged.

    Returns:
        A new one of its class.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    rebuilt = type(optimizer)(parameters, lr=optimizer.defaults["lr"])  # type: ignore[call-arg]  # all of them take it
    for group in rebuilt.param_groups:
        group.update(optimizer.defaults)
    return rebuilt


def _prunable(snapshot: Snapshot) -> list[str]:
    return [name for name, view in snapshot.layers.items() if view.rank > 1]


def _too_many(directions: int, snapshot: Snapshot) -> str:
    return (
        f"b must be ≤ {len(_prunable(snapshot))}, the number of updates of rank ≥ 2, got {directions}; step"
        f" {snapshot.step}. The released code stops here, too (selected index k out of range). Lower b0, or use"
        " flexlora, which cuts b down."
    )


def _singular_values(view: LayerView) -> Tensor:
    assert view.lora_E is not None
    return view.lora_E


def _without_the_smallest(view: LayerView) -> tuple[int, ...]:
    smallest = int(_singular_values(view).argmin())
    return tuple(index for index in range(view.rank) if index != smallest)


def _noise(view: LayerView, generator: torch.Generator) -> NewTriplets:
    m, n = len(view.lora_B), view.lora_A.shape[1]
    row, column = torch.randn(1, n, generator=generator), torch.randn(m, 1, generator=generator)
    return NewTriplets(
        lora_A=row.to(view.lora_A), lora_E=_singular_values(view).new_zeros(1), lora_B=column.to(view.lora_B)
    )
