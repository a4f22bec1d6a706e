"""Refinement inside ``transformers.Trainer`` (extra ``flowra-allocation[transformers]``)."""

from torch import nn
from torch.optim import Optimizer

from flowra_allocation.refinement import Refiner

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:  # an optional dependency: say how to get it
    raise ImportError("RefinementCallback needs transformers: pip install 'flowra-allocation[transformers]'") from error

__all__ = ["RefinementCallback"]


class RefinementCallback(TrainerCallback):
    """Let a :class:`Refiner` take part in training.

    Args:
        refiner: what to call; its schedule counts steps of the whole run.
        first_step: finished optimiser steps of the run when this training begins, ≥ 0.

    Raises:
        ValueError: at the beginning, if training stops before the schedule freezes; at the end, if it did not fire.
    """

    def __init__(self, refiner: Refiner, *, first_step: int = 0) -> None:
        self._refiner = refiner
        self._first_step = first_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Refuse a schedule that cannot fire."""
        last, freeze = self._first_step + state.max_steps, self._refiner.policy.steps[-1]
        if last < freeze:
            raise ValueError(f"training must reach the freeze at step {freeze}, got {last} steps. Train longer.")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Gather statistics before an event."""
        self._refiner.before_step(self._first_step + state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Let the policy see the gradients of the step."""
        self._refiner.before_zero_grad()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Hold an event if one is due; gradients of this step have been used."""
        self._refiner.after_step(self._first_step + state.global_step, optimizer)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Raise if the schedule did not fire."""
        self._refiner.finish()
