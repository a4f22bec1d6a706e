"""train: the probe's kept directions go on training at the planned ranks; no step is wasted.

They are pairs, or, where the policy of refine moves triplets, the same updates as triplets.
"""

from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from flowra_adapters import load_adapter
from flowra_allocation import flow_spectrum, read_plan, rebase, truncate
from flowra_pipelines import plots
from flowra_pipelines.errors import UserError
from flowra_pipelines.learning_rate import with_learning_rate
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.calibrate import read_grams
from flowra_pipelines.stages.phase import penalties, phase_metrics, resume_phase, save_phase
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.stages.setting import base_model, load_setting, lora_layers
from flowra_pipelines.training import train_phase
from flowra_pipelines.triplets import as_triplets

__all__ = ["train"]


def train(config: RunConfig, folder: Path) -> StageResult:
    """Cut the probe to the plan, train on, and write ``adapter/`` and the training state."""
    config = with_learning_rate(config, folder.parent)
    setting = load_setting(config)
    model = base_model(config, setting)
    calibrated = folder.parent / "calibrate"
    load_adapter(model, calibrated / "adapter")
    plan, method = read_plan(folder.parent / "allocate"), config.refinement.method
    others = [name for name, module in plan.modules.items() if module.kind != method]
    if others:
        raise UserError(
            f"kind must be {method!r} in this run's plan, got {plan.modules[others[0]].kind!r} for {others[0]!r}."
            " Attach other kinds with flowra_adapters.attach_plan."
        )
    if method == "lora":
        optimizer, state = resume_phase(config, setting, model, calibrated)
        cut_to_ranks(model, plan.ranks, calibrated, optimizer)
    else:
        cut_to_ranks(model, plan.ranks, calibrated)
        as_triplets(model, method, heads=setting.task.heads(model), seed=config.seed)
        optimizer, state = resume_phase(config, setting, model, calibrated, new_factors=True)
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
        callbacks=penalties(config, model),
    )
    save_phase(
        config, setting, model, optimizer, folder, step=config.refinement_start, peak_before=state.peak_parameters
    )
    return StageResult(
        metrics=phase_metrics(curve),
        parameters={"first_step": state.step, "last_step": config.refinement_start},
        figures={"loss": plots.loss_curve([(step, loss) for step, loss, _ in curve], title="Training")},
        summary={"loss": f"{curve[0][1]:.3f} → {curve[-1][1]:.3f} in steps {state.step}–{config.refinement_start}"},
    )


def cut_to_ranks(model: nn.Module, ranks: dict[str, int], calibrated: Path, optimizer: Optimizer | None = None) -> None:
    """Truncate every adapter to its planned rank, in the K-FAC metric, with the optimiser's moments."""
    grams = read_grams(calibrated)
    for name, layer in lora_layers(model).items():
        a, b = truncate(layer.lora_A, layer.lora_B, flow_spectrum(grams[name]), ranks[name])
        rebase(layer, a, b, optimizer)
