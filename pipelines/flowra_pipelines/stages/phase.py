"""What a phase of training leaves for the next one, and how the next one takes it up. Both are files."""

from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from flowra_adapters import save_adapter
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.setting import Setting, lora_layers
from flowra_pipelines.training import LossCurve, build_optimizer
from flowra_pipelines.training_state import (
    TrainingState,
    capture_tensors,
    read_training_state,
    restore_moments,
    write_training_state,
)

__all__ = ["phase_metrics", "resume_phase", "save_phase"]


def resume_phase(
    config: RunConfig, setting: Setting, model: nn.Module, before: Path
) -> tuple[Optimizer, TrainingState]:
    """Build the optimiser of a model whose adapters are loaded, with the moments an earlier phase left."""
    for layer in lora_layers(model).values():
        layer.dropout = config.adapter.dropout
    heads = setting.task.heads(model)
    optimizer = build_optimizer(model, config.training, heads=heads, label_unit=setting.data.label_unit)
    state = read_training_state(before)
    restore_moments(state, model, optimizer)
    return optimizer, state


def save_phase(
    config: RunConfig,
    setting: Setting,
    model: PreTrainedModel,
    optimizer: Optimizer,
    folder: Path,
    *,
    step: int,
    peak_before: int = 0,
) -> None:
    """Write ``adapter/`` and the training state after ``step`` finished steps of the run.

    Args:
        config: of the run.
        setting: of the run.
        model: that carries the adapters.
        optimizer: that trained them.
        folder: to write into.
        step: finished optimiser steps.
        peak_before: largest number of adapter parameters in the phases before.
    """
    parameters = sum(layer.num_parameters() for layer in lora_layers(model).values())
    save_adapter(
        model,
        folder / "adapter",
        modules_to_save=setting.task.heads(model),
        base_model_name_or_path=config.model.path,
        task_type=setting.task.peft_type,
    )
    state = TrainingState(
        step=step,
        total_steps=config.training.steps,
        schedule=config.training.schedule,
        seed=config.seed,
        examples_seen=step * config.training.batch_size * config.training.gradient_accumulation,
        peak_parameters=max(peak_before, parameters),
        tensors=capture_tensors(model, optimizer),
    )
    write_training_state(state, folder)


def phase_metrics(curve: LossCurve) -> list[tuple[str, float, int]]:
    """Return the stepped metrics of a phase."""
    losses = [("train/loss", loss, step) for step, loss, _ in curve]
    return losses + [("train/learning_rate", rate, step) for step, _, rate in curve]
