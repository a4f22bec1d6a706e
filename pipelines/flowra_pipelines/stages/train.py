"""train: the probe's kept directions go on training at the planned ranks; no step is wasted."""

from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from flowra_adapters import load_adapter, save_adapter
from flowra_allocation import flow_spectrum, read_plan, rebase, truncate
from flowra_pipelines import plots
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.calibrate import read_grams
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.stages.setting import Setting, base_model, load_setting, lora_layers
from flowra_pipelines.training import LossCurve, build_optimizer, train_phase
from flowra_pipelines.training_state import (
    TrainingState,
    capture_tensors,
    read_training_state,
    restore_moments,
    write_training_state,
)

__all__ = ["train"]


def train(config: RunConfig, folder: Path) -> StageResult:
    """Cut the probe to the plan, train on, and write ``adapter/`` and the training state."""
    setting = load_setting(config)
    model = base_model(config, setting)
    calibrated = folder.parent / "calibrate"
    load_adapter(model, calibrated / "adapter")
    for one in lora_layers(model).values():
        one.dropout = config.adapter.dropout
    optimizer = build_optimizer(model, config.training, heads=setting.task.heads(model))
    state = read_training_state(calibrated)
    restore_moments(state, model, optimizer)
    plan = read_plan(folder.parent / "allocate")
    cut_to_ranks(model, plan.ranks, calibrated, optimizer)
    curve = train_phase(
        model,
        setting.train,
        optimizer,
        config=config.training,
        collate=setting.collate,
        first_step=state.step,
        last_step=config.refinement_start,
        seed=state.seed,
        description="train: at planned ranks",
        rng=state.rng,
    )
    save_phase(config, setting, model, optimizer, state, config.refinement_start, folder)
    return StageResult(
        metrics=phase_metrics(curve),
        parameters={"first_step": state.step, "last_step": config.refinement_start},
        figures={"loss": plots.loss_curve([(step, loss) for step, loss, _ in curve], title="Training")},
        summary={"loss": f"{curve[0][1]:.3f} → {curve[-1][1]:.3f} in steps {state.step}–{config.refinement_start}"},
    )


def cut_to_ranks(model: nn.Module, ranks: dict[str, int], calibrated: Path, optimizer: Optimizer) -> None:
    """Truncate every adapter to its planned rank, in the K-FAC metric, with the optimiser's moments."""
    grams = read_grams(calibrated)
    for name, layer in lora_layers(model).items():
        a, b = truncate(layer.lora_A, layer.lora_B, flow_spectrum(grams[name]), ranks[name])
        rebase(layer, a, b, optimizer)


def save_phase(
    config: RunConfig,
    setting: Setting,
    model: PreTrainedModel,
    optimizer: Optimizer,
    before: TrainingState,
    step: int,
    folder: Path,
) -> None:
    """Write the adapter and the training state at the end of a phase."""
    parameters = sum(one.num_parameters() for one in lora_layers(model).values())
    save_adapter(
        model,
        folder / "adapter",
        modules_to_save=setting.task.heads(model),
        base_model_name_or_path=config.model.path,
        task_type=setting.task.peft_type,
    )
    state = TrainingState(
        step=step,
        total_steps=before.total_steps,
        schedule=before.schedule,
        seed=before.seed,
        examples_seen=step * config.training.batch_size * config.training.gradient_accumulation,
        peak_parameters=max(before.peak_parameters, parameters),
        tensors=capture_tensors(model, optimizer),
    )
    write_training_state(state, folder)


def phase_metrics(curve: LossCurve) -> list[tuple[str, float, int]]:
    """Return the stepped metrics of a phase."""
    losses = [("train/loss", loss, step) for step, loss, _ in curve]
    return losses + [("train/learning_rate", rate, step) for step, _, rate in curve]
