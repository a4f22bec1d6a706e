"""A small regression in plain PyTorch that a policy refines, for every form of update."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from flowra_allocation import Policy, RankEvent, RankHistory, Refiner
from flowra_testing.stand_in_adapter import StandInAdapter, hang
from flowra_testing.stand_in_triplets import StandInTriplets, hang_triplets
from flowra_testing.tiny_models import mlp, seeded

Form = Literal["pair", "triplets", "slots"]
RANKS = {"up": 4, "down": 3, "skip": 2}
SLOTS = 6


class PolicyRun:
    """Train an MLP on random targets with AdamW; step k of two runs is the same.

    Args:
        policy: to refine with.
        form: of the updates.
        ranks: module name to rank at the start.
        budget: in parameters; by default what the policy's peak needs for these ranks.
        floors: module name to least rank.
        caps: module name to largest rank; by default the number of slots.
    """

    def __init__(
        self,
        policy: Policy,
        form: Form,
        *,
        ranks: Mapping[str, int] = RANKS,
        budget: int | None = None,
        floors: Mapping[str, int] | None = None,
        caps: Mapping[str, int] | None = None,
    ) -> None:
        self.model = mlp(dtype=torch.float64)
        self.layers: Mapping[str, StandInAdapter | StandInTriplets] = (
            hang(self.model, ranks)
            if form == "pair"
            else hang_triplets(self.model, ranks, slots=SLOTS if form == "slots" else None)
        )
        self.costs = {name: layer.cost_per_rank for name, layer in self.layers.items()}
        self.start = self.parameters()
        self.budget = math.ceil(self.start / policy.peak) if budget is None else budget
        self.optimizer = torch.optim.AdamW([each for each in self.model.parameters() if each.requires_grad], lr=0.02)
        self.refiner = Refiner(
            self.model,
            self.layers,
            policy=policy,
            costs=self.costs,
            caps=dict.fromkeys(ranks, SLOTS) if caps is None else caps,
            floors=floors,
            budget=self.budget,
        )
        with seeded(1):
            self.x, self.target = torch.randn(16, 8, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
        self.finished = 0

    def parameters(self) -> int:
        """Count Σ cost · rank."""
        return sum(self.costs[name] * layer.rank for name, layer in self.layers.items())

    def output(self) -> Tensor:
        """Return what the model says."""
        with torch.no_grad():
            answer: Tensor = self.model(self.x)
        return answer

    def loss(self) -> float:
        """Return the mean squared error."""
        return float((self.output() - self.target).square().mean())

    def train_one(self) -> None:
        """Take a step of the optimiser, up to the event that may follow it."""
        self.refiner.before_step(self.finished)
        self.optimizer.zero_grad()
        (self.model(self.x) - self.target).square().mean().backward()
        self.optimizer.step()
        self.refiner.before_zero_grad()
        self.finished += 1

    def step(self) -> RankEvent | None:
        """Take a step, and hold the event that may follow it."""
        self.train_one()
        return self.refiner.after_step(self.finished, self.optimizer)

    def train(self, steps: int) -> RankHistory:
        """Train and finish."""
        for _ in range(steps):
            self.step()
        return self.refiner.finish()
