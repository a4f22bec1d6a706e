"""What a phase of training leaves for the next one, and how the next one takes it up. Both are files."""

from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback

from flowra_adapters import SVDForm, orthogonality, save_adapter
from flowra_allocation.trainer_callback import PenaltyCallback
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.setting import Setting, low_rank_layers
from flowra_pipelines.training import LossCurve, build_optimizer
from flowra_pipelines.training_state import (
    TrainingState,
    capture_tensors,
    read_training_state,
    restore_moments,
    write_training_state,
)

__all__ = ["penalties", "phase_metrics", "resume_phase", "save_phase"]


def resume_phase(
    config: RunConfig, setting: Setting, model: nn.Module, before: Path, *, new_factors: bool = False
) -> tuple[Optimizer, TrainingState]:
    """Build the optimiser of a model whose adapters are loaded, with the moments an earlier phase left.

    Args:
        config: of the run.
        setting: of the run.
        model: that carries the adapters.
        before: folder of the phase before.
        new_factors: pairs have become triplets since. Then the moments of the pairs say nothing of them, and theirs
            start anew; those of heads go on.

    Returns:
        The optimiser, and what the earlier phase left.
    """
    for layer in low_rank_layers(model).values():
        layer.dropout = config.adapter.dropout
    heads = setting.task.heads(model)
    optimizer = build_optimizer(model, config.training, heads=heads, label_unit=setting.data.label_unit)
    state = read_training_state(before)
    kept = state
    if new_factors:
        trained = tuple(f"{head}." for head in heads)
        names = {key: key.partition("/")[2] for key in state.tensors}
        kept = replace(state, tensors={key: state.tensors[key] for key in names if names[key].startswith(trained)})
    restore_moments(kept, model, optimizer)
    return optimizer, state


def penalties(config: RunConfig, model: nn.Module) -> list[TrainerCallback]:
    """Return what keeps the directions of triplets near orthonormal while they train; nothing for pairs."""
    weight = config.refinement.penalty
    if not weight:
        return []
    layers = low_rank_layers(model)
    return [PenaltyCallback(lambda: weight * orthogonality(layers.values()))]


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

    Triplets are written as they are, to be trained on, and beside that for PEFT, E in B.

    Args:
        config: of the run.
        setting: of the run.
        model: that carries the adapters.
        optimizer: that trained them.
        folder: to write into.
        step: finished optimiser steps.
        peak_before: largest number of adapter parameters in the phases before.
    """
    layers = low_rank_layers(model).values()
    parameters = sum(layer.num_parameters() for layer in layers)
    save_adapter(
        model,
        folder / "adapter",
        modules_to_save=setting.task.heads(model),
        base_model_name_or_path=config.model.path,
        task_type=setting.task.peft_type,
        consumer="peft" if any(isinstance(layer, SVDForm) for layer in layers) else None,
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
