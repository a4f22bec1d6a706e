"""The policy `adalora`: a budget that falls by a cubic, and triplets that fall silent (docs/methods.md, section 7).

Zhang et al. 2023 (arXiv:2303.10512) with the released code's schedule. T steps, t of them finished:

    t ≤ tᵢ              all b₀ triplets
    tᵢ < t < T − t_f    b(t) = ⌊b + (b₀ − b)(1 − (t − tᵢ)/(T − t_f − tᵢ))³⌋, applied where Δ divides t
    t = T − t_f         b

At an event all triplets of all modules are ranked by their smoothed sensitivity
(:mod:`flowra_allocation.triplet_sensitivity`), and the E of all but b(t) becomes zero. Their A and B and what the
optimiser holds of them stay, so the next steps move E again, and a triplet that has fallen silent may return at a later
event. At the last event they leave for good. The scale of an update is its own constant and stays.

Deviations from the released code:

- b counts triplets if ``target_rank`` is given, as there. By default b is the run's budget in parameters and b₀ what
  the triplets take, so that methods can be compared at equal budgets where modules differ in size; the path, the score
  and who leaves first (the smallest score, whatever it costs) stay.
- Of equal scores the first by (module name, index) leaves, and never more than asked for: a threshold takes all of
  them. Where b(t) = b₀ nothing happens; the code fails there.
- The last event is at T − t_f, whatever Δ is, and what is silent then leaves the tensors (or the mask). The code goes
  on setting it to zero after every step. The gradient of that step still counts; the code leaves it out.

Parameters fall at the last event alone, so the peak is the start. The history has an event for every masking, so Δ = 1
makes a long one: each names the modules with silent triplets and how many; scores come with the last alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from flowra_allocation.policy import LayerView, Moves, Policy, Snapshot
from flowra_allocation.triplet_sensitivity import TripletSensitivity

__all__ = ["AdaLoRA", "cubic_budget"]


@dataclass(kw_only=True, eq=False)
class AdaLoRA(Policy):
    """Silence the triplets with the smallest sensitivity x uncertainty, then drop them.

    For updates of triplets, with or without slots. Remembers what it has seen: one object for one run.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "adalora"
    follows = True

    total_steps: int
    """T: optimiser steps of the whole run."""
    tinit: int
    """tᵢ: all triplets stay until here, ≥ 0."""
    tfinal: int
    """t_f: steps at final ranks, ≥ 0; tᵢ + t_f < T."""
    delta_t: int
    """Δ: steps between events, ≥ 1."""
    target_rank: int | None = None
    """b: triplets at the end, in all modules together, ≥ 1; None: as many as the run's budget holds."""
    kappa: float = 1.5
    """Parameters that the triplets may take at the start, as a multiple of the budget, ≥ 1. The paper starts at 1.5;
    its GLUE scripts, with two or three triplets for one, at 2 and 3."""
    beta1: float = 0.85
    """Of the smoothed sensitivity, in (0, 1)."""
    beta2: float = 0.85
    """Of the uncertainty, in (0, 1)."""

    _sensitivity: TripletSensitivity = field(init=False, repr=False)
    _steps: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.delta_t < 1:
            raise ValueError(f"delta_t must be ≥ 1, got {self.delta_t}")
        if self.tinit < 0 or self.tfinal < 0 or self.tinit + self.tfinal >= self.total_steps:
            raise ValueError(
                f"tinit and tfinal must be ≥ 0 and leave steps in between, got {self.tinit} and {self.tfinal} of"
                f" {self.total_steps} steps"
            )
        if self.target_rank is not None and self.target_rank < 1:
            raise ValueError(f"target_rank must be ≥ 1 or None, got {self.target_rank}")
        if not self.kappa >= 1:
            raise ValueError(f"kappa must be ≥ 1, got {self.kappa}")
        self._sensitivity = TripletSensitivity(self.beta1, self.beta2)
        last = self.total_steps - self.tfinal
        first = (self.tinit // self.delta_t + 1) * self.delta_t
        self._steps = (*range(first, last, self.delta_t), last)

    @property
    def settings(self) -> dict[str, float | str | bool | None]:
        """All that is given."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    @property
    def steps(self) -> tuple[int, ...]:
        """Multiples of Δ between tᵢ and T − t_f, and T − t_f."""
        return self._steps

    @property
    def peak(self) -> float:
        """κ."""
        return self.kappa

    def check(self, snapshot: Snapshot) -> None:
        """Refuse updates without E, a budget that nothing must leave for, and more triplets at the end than it holds.

        Raises:
            ValueError: if that is so.
        """
        super().check(snapshot)
        pairs = sorted(name for name, view in snapshot.layers.items() if view.lora_E is None)
        if pairs:
            raise ValueError(
                f"layers must be of triplets for AdaLoRA, got pairs: {', '.join(pairs)}. Attach SVD forms."
            )
        if self.target_rank is None:
            if snapshot.parameters <= snapshot.budget:
                raise ValueError(
                    f"ranks must start above the budget of {snapshot.budget} parameters for triplets to leave, got"
                    f" {snapshot.parameters}. Raise them, or lower the budget."
                )
            return
        total = sum(view.rank for view in snapshot.layers.values())
        if self.target_rank >= total:
            raise ValueError(f"target_rank must be below the {total} triplets that are there, got {self.target_rank}")
        costs = sorted((view.cost for view in snapshot.layers.values() for _ in range(view.rank)), reverse=True)
        dearest = sum(costs[: self.target_rank])
        if dearest > snapshot.budget:
            raise ValueError(
                f"budget must hold any {self.target_rank} triplets, up to {dearest} parameters, got {snapshot.budget}."
                " Raise it, or leave target_rank out to stop at parameters."
            )

    def see(self, layers: Mapping[str, LayerView], gradients: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Smooth the step's sensitivities."""
        self._sensitivity.update(layers, gradients)

    def decide(self, snapshot: Snapshot) -> Moves:
        """Silence what does not fit the present budget; at the last event, drop it.

        Before the last, nothing is silenced where all scores are 0, as while ``GradScaler`` skips the first steps.

        Returns:
            What to silence, or what stays.

        Raises:
            ValueError: if no step was seen before.
        """
        scores = self._sensitivity.scores()
        if scores.keys() != snapshot.layers.keys():
            raise ValueError(
                f"before_zero_grad must be called after each step, got an event at step {snapshot.step} without it"
            )
        last = snapshot.step == self._steps[-1]
        if not last and not any(each.any() for each in scores.values()):
            return Moves(budget=snapshot.parameters)
        leaving = self._leaving(snapshot, scores)
        if not last:
            return Moves(silence=leaving, budget=snapshot.parameters)
        return Moves(
            keep={
                name: tuple(index for index in range(snapshot.layers[name].rank) if index not in gone)
                for name, gone in leaving.items()
            },
            importance={name: float(each.mean()) for name, each in scores.items() if len(each)},
        )

    def _leaving(self, snapshot: Snapshot, scores: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Find the triplets, smallest score first, without which the rest fits the present budget.

        Returns:
            Module name to indices, for modules that lose any.
        """
        names = sorted(snapshot.layers)
        views = [snapshot.layers[name] for name in names]
        ranks = torch.tensor([view.rank for view in views])
        units = torch.tensor([view.cost if self.target_rank is None else 1 for view in views]).repeat_interleave(ranks)
        total = int(units.sum())
        allowed = cubic_budget(
            snapshot.step,
            initial=total,
            target=min(total, snapshot.budget if self.target_rank is None else self.target_rank),
            tinit=self.tinit,
            last=self._steps[-1],
        )
        order = torch.argsort(torch.cat([scores[name] for name in names]), stable=True)
        before = total - units[order].cumsum(0) + units[order]  # what there is before each of them goes
        count = int((before > allowed).sum())
        gone = torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[:count], True)
        modules = zip(names, gone.split(ranks.tolist()), strict=True)
        return {name: tuple(each.nonzero().flatten().tolist()) for name, each in modules if each.any()}

    def moved(self, moves: Moves) -> None:
        """Let go of what was seen, once triplets have been dropped: nothing is decided any more."""
        if moves.keep:
            self._sensitivity.restore({})

    def state(self) -> dict[str, Tensor]:
        """Return the smoothed sensitivities and uncertainties."""
        return self._sensitivity.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned."""
        self._sensitivity.restore(state)


def cubic_budget(step: int, *, initial: int, target: int, tinit: int, last: int) -> int:
    """Return b(t), between ``initial`` until ``tinit`` and ``target`` from ``last`` on."""
    if step <= tinit:
        return initial
    if step >= last:
        return target
    share = 1 - (step - tinit) / (last - tinit)
    return int((initial - target) * share**3 + target)
