"""train: the probe's kept directions go on training at the planned ranks; no step is wasted.

They are pairs, or, where the policy of refine moves triplets, the same updates as triplets.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from flowra_adapters import load_adapter
from flowra_allocation import flow_spectrum, grow, read_plan, rebase, truncate
from flowra_pipelines import loss_figure
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
        bring_to_ranks(model, plan.ranks, calibrated, optimizer, seed=config.seed)
    else:
        bring_to_ranks(model, plan.ranks, calibrated, seed=config.seed)
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
        figures={"loss": loss_figure.loss_curve([(step, loss) for step, loss, _ in curve], title="Training")},
        summary={"loss": f"{curve[0][1]:.3f} → {curve[-1][1]:.3f} in steps {state.step}–{config.refinement_start}"},
    )


def bring_to_ranks(
    model: nn.Module, ranks: Mapping[str, int], calibrated: Path, optimizer: Optimizer | None = None, *, seed: int
) -> None:
    """Give every adapter its planned rank.

    Below the probe's rank it is truncated, in the K-FAC metric, with the optimiser's moments. Above it gets fresh
    directions, A drawn as in a new adapter and B zero, so that the model goes on as it was.

    Args:
        model: that carries the probe.
        ranks: module name to rank.
        calibrated: folder of calibrate.
        optimizer: of the probe.
        seed: of fresh directions.

    Raises:
        UserError: if a planned rank exceeds what the weight allows.
    """
    grams, generator = read_grams(calibrated), torch.Generator().manual_seed(seed)
    for name, layer in lora_layers(model).items():
        n, largest = layer.lora_A.shape[1], min(layer.lora_A.shape[1], layer.lora_B.shape[0])
        if ranks[name] > largest:
            raise UserError(f"rank must be at most {largest} for {name!r}, got {ranks[name]} in the plan")
        fresh = ranks[name] - layer.rank
        if fresh > 0:
            rows = torch.empty(fresh, n).uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=generator)
            grow(layer, rows.to(layer.lora_A), optimizer)
            continue
        a, b = truncate(layer.lora_A, layer.lora_B, flow_spectrum(grams[name]), ranks[name])
        rebase(layer, a, b, optimizer)
