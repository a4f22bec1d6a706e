"""Refinement, and penalties, inside ``transformers.Trainer`` (extra ``flowra-allocation[transformers]``).

The Trainer writes a checkpoint folder for model and optimiser (with pickles of its own); the callback adds the
refinement's state, without pickle, once the rest is complete. To resume, the ranks must be in place before the Trainer
loads the model, which refuses other shapes, and before it builds the optimiser, so there is one call of your own::

    checkpoint = last_checkpoint(output_dir)
    callback.resume(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint))
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_allocation.forms import factors
from flowra_allocation.refinement import Refiner
from flowra_allocation.refinement_files import FILES

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    from flowra_allocation.penalty_callback import PenaltyCallback
except ImportError as error:  # an optional dependency: say how to get it
    raise ImportError("RefinementCallback needs transformers: pip install 'flowra-allocation[transformers]'") from error

__all__ = ["PenaltyCallback", "RefinementCallback", "last_checkpoint"]

RESUME = "To resume, call callback.resume(checkpoint) before trainer.train(resume_from_checkpoint=checkpoint)."


class RefinementCallback(TrainerCallback):
    """Let a :class:`Refiner` take part in training, and in the Trainer's checkpoints.

    Args:
        refiner: what to call; its schedule counts steps of the whole run.
        first_step: finished optimiser steps of the run when this training begins, ≥ 0. The Trainer's own steps count
            from there, also when it resumes.

    Raises:
        ValueError: at the beginning, if training stops before the schedule freezes, begins after its first event, does
            not train the refiner's layers, is at another step than the refiner, or will exchange the model for its best
            checkpoint at the end; at the end, if the schedule did not fire.
    """

    def __init__(self, refiner: Refiner, *, first_step: int = 0) -> None:
        self._refiner = refiner
        self._first_step = first_step
        self._before_training = refiner.model.register_load_state_dict_pre_hook(_explaining(refiner))

    def resume(self, checkpoint: str | Path) -> None:
        """Put the ranks of a checkpoint in place; call before ``trainer.train(resume_from_checkpoint=checkpoint)``.

        Args:
            checkpoint: folder of a checkpoint that the Trainer wrote with this callback.

        Raises:
            ValueError: if it holds no whole state of this refinement; nothing is changed then.
        """
        self._refiner.restore(checkpoint)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Refuse a schedule that cannot fire, and a refiner that is not where training is."""
        self._before_training.remove()
        last, freeze = self._first_step + state.max_steps, self._refiner.policy.steps[-1]
        if last < freeze:
            raise ValueError(f"training must reach the freeze at step {freeze}, got {last} steps. Train longer.")
        self._refiner.check_wrapping(compiled=args.torch_compile)
        now, known = self._first_step + state.global_step, self._refiner.step
        if known != now and (known is not None or state.global_step > 0):
            raise ValueError(f"refinement must be where training is, at step {now}, got step {known or 0}. {RESUME}")
        event = self._refiner.next_event
        if event is not None and event <= now:
            raise ValueError(f"the first event must come after step {now}, where training begins, got step {event}")
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end must be False, for an earlier checkpoint has other ranks. After training, take"
                " the model from the checkpoint that you want."
            )
        trained = {id(each) for each in model.parameters()} if model is not None else set()
        for name, layer in self._refiner.layers.items():
            if model is not None and not all(id(each) in trained for each in factors(layer).values()):
                raise ValueError(
                    f"layers must be part of the model that is trained, got {name!r}, which is not. Give the Trainer"
                    " the model itself, not model_init."
                )
        if optimizer is not None:
            self._refiner.check_holds(optimizer)

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

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Write the refinement's state into the checkpoint, whose other files are complete now."""
        assert args.output_dir is not None  # the Trainer has written to it
        self._refiner.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Raise if the schedule did not fire."""
        self._refiner.finish()


def _explaining(refiner: Refiner) -> Callable[..., None]:
    """Return a hook that says what to do where torch would only see that sizes differ."""

    def check(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *details: object) -> None:
        names = {id(each): name for name, each in module.named_parameters()}
        for parameter in (each for layer in refiner.layers.values() for each in factors(layer).values()):
            name = prefix + names.get(id(parameter), "")
            if name in state_dict and state_dict[name].shape != parameter.shape:
                raise ValueError(
                    f"ranks must be those of the model, got {tuple(state_dict[name].shape)} for {name!r} of"
                    f" {tuple(parameter.shape)}. {RESUME}"
                )

    return check


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a run with a :class:`RefinementCallback`; None if there is none.

    The refinement's state is written last, so where it is, the rest of the checkpoint is complete. A process that was
    killed while it wrote may leave a folder without it: the Trainer would take that, this does not.

    Args:
        output_dir: that of the Trainer.
    """
    whole: dict[int, Path] = {}
    for file in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{FILES[-1]}"):
        number = file.parent.name.rpartition("-")[2]
        if number.isdecimal():
            whole[int(number)] = file.parent
    return whole[max(whole)] if whole else None
