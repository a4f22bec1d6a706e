"""calibrate: train a short probe at a small uniform rank, and measure what it learned.

The gradient at step 0 is a poor guide to rank: modules substitute for one another, and the few with the largest
gradient would absorb the budget. So the probe's *learned* update is measured, by the Grams of its bottlenecks
(docs/methods.md, sections 4 and 9).
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowra_adapters import attach
from flowra_allocation import BottleneckGram, BottleneckObserver, flow_spectrum, mean_rank, sensitivity
from flowra_analysis import FlowProfile, ModuleProfile, fisher_trace, profile_weights, write_profile
from flowra_pipelines import plots
from flowra_pipelines.data import Examples, TextData
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.phase import phase_metrics, save_phase
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.stages.setting import Layers, Setting, base_model, load_setting, lora_layers, survey
from flowra_pipelines.training import build_optimizer, data_order, train_phase

__all__ = ["calibrate", "read_grams"]

GRAMS = "bottleneck_grams.safetensors"


def calibrate(config: RunConfig, folder: Path) -> StageResult:
    """Train the probe; write ``profile.*``, ``bottleneck_grams.safetensors``, ``adapter/`` and the training state."""
    setting = load_setting(config)
    model = base_model(config, setting)
    layers = survey(config, model, setting.task)
    heads = setting.task.heads(model)
    rank = probe_rank(config, layers)
    ranks = {name: min(rank, *layers.shapes[name]) for name in layers.costs}
    attach(
        model,
        ranks,
        scaling=config.adapter.scaling,
        dropout=config.adapter.dropout,
        modules_to_save=heads,
        generator=torch.Generator().manual_seed(config.seed),
    )
    optimizer = build_optimizer(model, config.training, heads=heads, label_unit=setting.data.label_unit)
    curve = train_phase(
        model,
        setting.train,
        optimizer,
        config=config.training,
        collate=setting.collate,
        first_step=0,
        last_step=config.probe_steps,
        seed=config.seed,
        description="calibrate: probe",
    )
    peak = sum(layers.costs[name] * ranks[name] for name in ranks)
    save_phase(config, setting, model, optimizer, folder, step=config.probe_steps)
    batches = _calibration_batches(config, setting)
    grams = _gather(model, setting, batches)
    profile = _profile(config, model, setting, layers, batches, grams)
    write_profile(profile, folder)
    _write_grams({name: sum(each[1:], each[0]) for name, each in grams.items()}, folder)
    psi = {name: module.statistics["psi"] for name, module in profile.modules.items()}
    return StageResult(
        metrics=phase_metrics(curve),
        parameters={"probe_rank": rank, "probe_parameters": peak, "budget": layers.budget},
        figures={
            "sensitivity": plots.module_heatmap(psi, title="Sensitivity ψ", label="ψ", limits=(0, 1)),
            "loss": plots.loss_curve([(step, loss) for step, loss, _ in curve], title="Probe"),
        },
        summary={
            "data": _describe(setting.data),
            "probe": f"rank {rank} on {len(ranks)} modules, {peak:,} parameters, {config.probe_steps} steps",
            "most sensitive": ", ".join(sorted(psi, key=lambda name: -psi[name])[:3]),
        },
    )


def _describe(data: TextData) -> str:
    """Count the examples, and those left out with the reason."""
    out = [f"{count:,} left out because {reason}" for reason, count in data.left_out.items()]
    return "; ".join([f"{len(data.train):,} training and {len(data.test):,} test examples", *out])


def probe_rank(config: RunConfig, layers: Layers) -> int:
    """Return the probe's uniform rank, ⌈κ r̄⌉."""
    return max(1, math.ceil(config.calibration.probe_factor * mean_rank(layers.costs, layers.budget)))


def read_grams(folder: Path) -> dict[str, BottleneckGram]:
    """Read the probe's bottleneck Grams by module name."""
    tensors = load_file(folder / GRAMS)
    names = {key.partition("/")[2] for key in tensors}
    return {
        name: BottleneckGram(
            tensors[f"activations/{name}"],
            tensors[f"gradients/{name}"],
            float(tensors[f"tokens/{name}"]),
            float(tensors[f"examples/{name}"]),
        )
        for name in sorted(names)
    }


def _write_grams(grams: Mapping[str, BottleneckGram], folder: Path) -> None:
    tensors = {}
    for name, gram in sorted(grams.items()):
        tensors[f"activations/{name}"] = gram.activations
        tensors[f"gradients/{name}"] = gram.gradients
        tensors[f"tokens/{name}"] = torch.tensor(gram.tokens, dtype=torch.float64)
        tensors[f"examples/{name}"] = torch.tensor(gram.examples, dtype=torch.float64)
    save_file(tensors, folder / GRAMS)


def _calibration_batches(config: RunConfig, setting: Setting) -> list[dict[str, Tensor]]:
    """Draw training examples, in an order of their own, or take all if there are fewer."""
    count = min(config.calibration.examples, len(setting.train))
    chosen: Examples = setting.train.select(data_order(len(setting.train), needed=count, seed=config.seed + 1))
    size = config.calibration.batch_size
    rows = [chosen[index] for index in range(count)]
    return [setting.collate(rows[start : start + size]) for start in range(0, count, size)]


def _gather(model: nn.Module, setting: Setting, batches: list[dict[str, Tensor]]) -> dict[str, list[BottleneckGram]]:
    """Collect the Grams batch by batch, dropout off, each example's own loss."""
    model.eval()
    device = next(model.parameters()).device
    with BottleneckObserver(model, lora_layers(model), loss="sum") as observer:
        for batch in batches:
            moved = {key: value.to(device) for key, value in batch.items()}
            losses, _, _ = setting.task.losses(model, moved)
            losses.sum().backward()
            model.zero_grad(set_to_none=True)
    unreached = observer.unreached()
    if unreached:
        raise UserError(f"every layer must take part in the loss, got no gradient at {unreached[0]!r}. Exclude it.")
    return observer.grams


def _profile(
    config: RunConfig,
    model: nn.Module,
    setting: Setting,
    layers: Layers,
    batches: list[dict[str, Tensor]],
    grams: dict[str, list[BottleneckGram]],
) -> FlowProfile:
    gains = {name: flow_spectrum(sum(each[1:], each[0])).gains for name, each in grams.items()}
    psi = sensitivity({name: each.tolist() for name, each in gains.items()}, layers.costs)
    psi_error = _jackknife(grams, layers)
    traces = fisher_trace(
        model,
        batches,
        lambda module, batch: setting.task.losses(module, batch)[0],
        list(layers.costs),
        mask=lambda batch: batch["attention_mask"],
    )
    weight_statistics, weight_spectra = profile_weights(model, list(layers.costs))
    modules = {
        name: ModuleProfile(
            shape=layers.shapes[name],
            cost_per_rank=layers.costs[name],
            statistics={
                "psi": psi[name],
                "psi_stderr": psi_error[name],
                "fisher_trace": traces[name].mean,
                "fisher_trace_stderr": traces[name].standard_error,
                **weight_statistics[name],
            },
        )
        for name in layers.costs
    }
    return FlowProfile(
        modules=modules,
        spectra={"flow_gains": gains, "weight": weight_spectra},
        base_parameters=layers.base_parameters,
        provenance={
            "model": config.model.path,
            "data": config.data.train,
            "seed": config.seed,
            "examples": sum(len(batch["input_ids"]) for batch in batches),
            "probe_steps": config.probe_steps,
            "budget_parameters": layers.budget,
            "estimators": "bottleneck Grams of the probe; empirical Fisher trace at the probe; weight spectrum",
        },
    )


def _jackknife(grams: Mapping[str, list[BottleneckGram]], layers: Layers) -> dict[str, float]:
    """Estimate the standard error of ψ by leaving out one batch at a time; 0 where there is only one."""
    count = min(len(each) for each in grams.values())
    if count < 2:
        return dict.fromkeys(grams, 0.0)
    replicates = []
    for left_out in range(count):
        rest = {name: [*each[:left_out], *each[left_out + 1 :]] for name, each in grams.items()}
        gains = {name: flow_spectrum(sum(each[1:], each[0])).gains.tolist() for name, each in rest.items()}
        replicates.append(sensitivity(gains, layers.costs))
    errors = {}
    for name in grams:
        values = torch.tensor([each[name] for each in replicates], dtype=torch.float64)
        errors[name] = float(((count - 1) * values.var(correction=0)).sqrt())
    return errors
