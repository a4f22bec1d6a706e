"""One phase of training: from one step of the schedule to another, on ``transformers.Trainer``."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flowra_pipelines.config_sections import TrainingConfig
from flowra_pipelines.data import Examples
from flowra_pipelines.errors import UserError
from flowra_pipelines.progress import Meter, meter

__all__ = ["LossCurve", "LossOfBatch", "build_optimizer", "data_order", "learning_rate_factor", "train_phase"]

LossCurve = list[tuple[int, float, float]]
"""(finished steps, loss, learning rate)."""
LossOfBatch = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
"""Given the model and a batch on its device, the loss to descend."""


def data_order(
    examples: int,
    *,
    needed: int,
    seed: int,
    lengths: Sequence[int] | None = None,
    batch_size: int = 1,
    window: int = 1,
) -> list[int]:
    """Return the order in which a run sees its examples: one seeded permutation per epoch, as many as needed.

    With lengths, the examples of each ``window`` batches are sorted by length and cut into batches, and the batches
    shuffled: the same examples in the same window, with less padding. A shorter order is a prefix of a longer one.

    Args:
        examples: number of examples.
        needed: length of the order.
        seed: of permutations and shuffles.
        lengths: tokens of each example.
        batch_size: examples per micro-batch.
        window: micro-batches that are formed together.

    Returns:
        Indices, ``needed`` of them.
    """
    generator = torch.Generator().manual_seed(seed)
    size = batch_size * window if lengths is not None else 1
    order: list[int] = []
    while len(order) < -(-needed // size) * size:  # whole windows
        order.extend(torch.randperm(examples, generator=generator).tolist())
    if lengths is None or window == 1:
        return order[:needed]
    shuffles = torch.Generator().manual_seed(seed)
    grouped: list[int] = []
    for start in range(0, needed, size):
        ranked = sorted(order[start : start + size], key=lengths.__getitem__)
        for batch in torch.randperm(window, generator=shuffles).tolist():
            grouped.extend(ranked[batch * batch_size : (batch + 1) * batch_size])
    return grouped[:needed]


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Return the learning rate after ``step`` finished steps, as a share of its peak."""
    warmup = math.ceil(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return max(0.0, shapes[config.schedule])


def build_optimizer(
    model: nn.Module, config: TrainingConfig, *, heads: Sequence[str], label_unit: float = 1.0
) -> AdamW:
    """Build AdamW over what is trainable: adapters in one group, heads in another, what maps to a number in a third.

    Adam's steps are as long as the learning rate, whatever the size of the gradient. So weights that map to a label
    need a learning rate in the label's unit; then the unit does not matter.

    Args:
        model: whose trainable parameters are taken.
        config: learning rates and weight decay.
        heads: modules trained in full.
        label_unit: for regression the labels' standard deviation: factor of the learning rate of a head's last layer,
            the one with a single output.

    Returns:
        The optimiser.
    """
    inside = tuple(f"{head}." for head in heads)
    last = tuple(
        f"{name}."
        for name, layer in model.named_modules()
        if label_unit != 1.0 and f"{name}.".startswith(inside) and getattr(layer, "out_features", None) == 1
    )
    rate = config.learning_rate
    assert rate != "auto", "the stages put the proposed rate in its place"
    head_rate = config.head_learning_rate or rate
    rates = (rate, head_rate, head_rate * label_unit)
    groups: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith(inside) + name.startswith(last)].append(parameter)
    return AdamW(
        [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True) if group],
        weight_decay=config.weight_decay,
    )


def train_phase(
    model: PreTrainedModel,
    examples: Examples,
    optimizer: Optimizer,
    *,
    config: TrainingConfig,
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
    first_step: int,
    last_step: int,
    seed: int,
    description: str,
    rng: torch.Tensor | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    loss: LossOfBatch | None = None,
) -> LossCurve:
    """Train from ``first_step`` to ``last_step`` of a schedule of ``config.steps``.

    Learning rate and data order depend only on the step and the seed, and the generator continues from ``rng``, so
    that two phases in two processes do what one phase would.

    Args:
        model: trained in place.
        examples: all training examples; the phase takes its part of the run's order.
        optimizer: with its moments.
        config: the run's schedule.
        collate: rows to a batch.
        first_step: finished steps before the phase.
        last_step: finished steps after it.
        seed: of the data order, and of dropout if there is no ``rng``.
        description: shown with the progress.
        rng: state of torch's CPU generator to continue from.
        callbacks: such as the refinement.
        loss: of a batch; by default the model's own.

    Returns:
        Loss and learning rate after each step.

    Raises:
        UserError: if the loss is not finite.
    """
    per_step = config.batch_size * config.gradient_accumulation
    order = data_order(
        len(examples),
        needed=last_step * per_step,
        seed=seed,
        lengths=[len(examples[index]["input_ids"]) for index in range(len(examples))],
        batch_size=config.batch_size,
        window=config.length_window,
    )
    scheduler = LambdaLR(optimizer, lambda done: learning_rate_factor(first_step + done, config))
    with meter(description, last_step - first_step) as progress, tempfile.TemporaryDirectory() as scratch:
        watch = _Watch(progress, first_step, rng)
        trainer = _Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=last_step - first_step,
                per_device_train_batch_size=config.batch_size,
                gradient_accumulation_steps=config.gradient_accumulation,
                max_grad_norm=config.max_grad_norm,
                seed=seed,
                train_sampling_strategy="sequential",
                remove_unused_columns=False,
                dataloader_drop_last=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            data_collator=collate,
            train_dataset=examples.select(order[first_step * per_step :]),
            optimizers=(optimizer, scheduler),
            callbacks=[*callbacks, watch],
        )
        trainer.loss = loss
        for printer in [
            each for each in trainer.callback_handler.callbacks if type(each).__name__ == "PrinterCallback"
        ]:
            trainer.remove_callback(printer)
        trainer.train()
    return watch.curve


class _Trainer(Trainer):
    """A trainer that may be told the loss."""

    loss: LossOfBatch | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401 - as the trainer declares it
        """Return the loss of a batch."""
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.loss(model, inputs)


@dataclass
class _Watch(TrainerCallback):
    """Progress, the loss curve, the generator's state, and the end of a run that diverged."""

    progress: Meter
    first_step: int
    rng: torch.Tensor | None
    curve: LossCurve = field(default_factory=list)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Continue the generator: the trainer has seeded it, and the loader has drawn from it."""
        if state.global_step == 0:
            if self.rng is None:
                torch.manual_seed(args.seed)
            else:
                torch.set_rng_state(self.rng)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Record the loss of a step."""
        if logs is None or "loss" not in logs:
            return
        step, loss = self.first_step + state.global_step, float(logs["loss"])
        if not math.isfinite(loss):
            raise UserError(f"loss must be finite, got {loss} at step {step}. Lower training.learning_rate.")
        self.curve.append((step, loss, float(logs.get("learning_rate", 0.0))))
        self.progress.advance(note=f"loss {loss:.3f}")
