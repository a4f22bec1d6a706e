"""calibrate: train a short probe at a small uniform rank, and measure what it learned.

The gradient at step 0 is a poor guide to rank: modules substitute for one another, and the few with the largest
gradient would absorb the budget. So the probe's *learned* update is measured, by the Grams of its bottlenecks
(docs/methods.md, sections 4 and 9). What else is asked of it is reported beside that.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from flowra_adapters import attach
from flowra_allocation import BottleneckGram, flow_spectrum
from flowra_analysis import (
    ActivationSpectra,
    FlowProfile,
    ModuleProfile,
    base_hash,
    block_jacobians,
    data_hash,
    find_blocks,
    profile_weights,
    provenance_of,
    spectrum_statistics,
    update_spectrum,
    write_profile,
)
from flowra_pipelines import loss_figure, report_figures
from flowra_pipelines.data import Examples, TextData
from flowra_pipelines.errors import UserError
from flowra_pipelines.estimators import Estimates, estimate, profiled
from flowra_pipelines.learning_rate import propose, with_rate
from flowra_pipelines.report import profile_report
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.phase import phase_metrics, save_phase
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.stages.setting import Layers, Setting, base_model, load_setting, lora_layers, probe_rank, survey
from flowra_pipelines.training import build_optimizer, data_order, train_phase

__all__ = ["activation_spectra", "calibrate", "read_grams", "spectra_of"]

GRAMS = "bottleneck_grams.safetensors"
ACTIVATION_SKETCH = 64
"""Columns of the sketch of a layer's inputs; a quarter of them are good, and the trace is exact."""


def calibrate(config: RunConfig, folder: Path) -> StageResult:
    """Train the probe and measure it; write the profile, its report, the Grams, ``adapter/`` and the training state."""
    setting = load_setting(config)
    model = base_model(config, setting)
    layers = survey(config, model, setting.task)
    heads = setting.task.heads(model)
    base = base_hash(model, without=heads)
    rank = probe_rank(config, layers.costs, layers.budget)
    ranks = {name: min(rank, *layers.shapes[name]) for name in layers.costs}
    attach(
        model,
        ranks,
        scaling=config.adapter.scaling,
        dropout=config.adapter.dropout,
        modules_to_save=heads,
        generator=torch.Generator().manual_seed(config.seed),
    )
    proposal: dict[str, float] = {}
    if config.training.learning_rate == "auto":
        proposed = propose(config, setting, model, heads)
        proposal = {"learning_rate": proposed.rate, "learning_rate_stderr": proposed.standard_error}
        config = with_rate(config, proposed.rate)
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
    save_phase(config, setting, model, optimizer, folder, step=config.probe_steps)
    batches = _calibration_batches(config, setting)
    found = _measure(config, model, setting, layers, batches)
    profile = _profile(config, model, layers, batches, found, base)
    blocks = _blocks(model, batches, examples=config.calibration.jacobian_examples, seed=config.seed)
    profile = replace(profile, blocks=blocks, provenance={**profile.provenance, **proposal})
    write_profile(profile, folder)
    _write_grams(found.states["probe"].grams, folder)
    pictures: Mapping[str, Figure] = {}
    if config.calibration.report:
        pictures, page = profile_report(profile)
        (folder / "report.html").write_text(page, encoding="utf-8")
    sensitivity = {name: module.statistics["psi"] for name, module in profile.modules.items()}
    errors = {
        name: module.statistics["psi_stderr"]
        for name, module in profile.modules.items()
        if "psi_stderr" in module.statistics
    }
    peak = sum(layers.costs[name] * ranks[name] for name in ranks)
    return StageResult(
        metrics=phase_metrics(curve),
        parameters={"probe_rank": rank, "probe_parameters": peak, "budget": layers.budget, **proposal},
        figures={
            "sensitivity": report_figures.sensitivity_map(sensitivity, errors),
            **pictures,
            "loss": loss_figure.loss_curve([(step, loss) for step, loss, _ in curve], title="Probe"),
        },
        summary={
            "data": _describe(setting.data),
            "probe": f"rank {rank} on {len(ranks)} modules, {peak:,} parameters, {config.probe_steps} steps",
            **({"learning rate": f"{proposal['learning_rate']:.2g} proposed"} if proposal else {}),
            "most sensitive": ", ".join(sorted(sensitivity, key=lambda name: -sensitivity[name])[:3]),
        },
    )


def _describe(data: TextData) -> str:
    """Count the examples, and those left out with the reason."""
    out = [f"{count:,} left out because {reason}" for reason, count in data.left_out.items()]
    return "; ".join([f"{len(data.train):,} training and {len(data.test):,} test examples", *out])


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


def activation_spectra() -> ActivationSpectra:
    """Return the statistic of the layers' inputs before the first batch."""
    return ActivationSpectra.init(dense_limit=ACTIVATION_SKETCH, size=ACTIVATION_SKETCH)


def _measure(
    config: RunConfig,
    model: PreTrainedModel,
    setting: Setting,
    layers: Layers,
    batches: list[dict[str, Tensor]],
) -> Estimates:
    """Ask all estimators in one pass over the examples, each example's own loss, dropout off."""
    kinds = dict.fromkeys(("probe", *config.calibration.estimators))
    return estimate(
        model,
        setting,
        layers,
        batches,
        tuple(kinds),
        labels=config.calibration.labels,
        seed=config.seed,
        also={"activation": activation_spectra()} if config.calibration.activations else {},
    )


def _profile(
    config: RunConfig,
    model: PreTrainedModel,
    layers: Layers,
    batches: list[dict[str, Tensor]],
    found: Estimates,
    base: str,
) -> FlowProfile:
    statistics: dict[str, dict[str, float]] = {name: {} for name in layers.costs}
    for kind, gains in found.gains.items():
        for name, known in profiled(kind, gains, layers.costs).items():
            statistics[name] |= known
            if kind == "probe":  # the run's own
                statistics[name] |= {
                    key.replace("_probe", ""): value for key, value in known.items() if key[:3] == "psi"
                }
    spectra, ranks = spectra_of(model, layers, found)
    for name, own in statistics.items():
        own |= ranks[name]
    examples = sum(len(batch["input_ids"]) for batch in batches)
    return FlowProfile(
        modules={
            name: ModuleProfile(shape=layers.shapes[name], cost_per_rank=layers.costs[name], statistics=own)
            for name, own in statistics.items()
        },
        spectra=spectra,
        base_parameters=layers.base_parameters,
        provenance={
            **provenance_of(
                base=base, data=data_hash(batches), seed=config.seed, examples=examples, estimators=list(found.gains)
            ),
            "model": config.model.path,
            "data": config.data.train,
            "labels": config.calibration.labels,
            "probe_steps": config.probe_steps,
            "budget_parameters": layers.budget,
            **{f"cost_{kind}": gains.cost for kind, gains in found.gains.items()},
        },
    )


def spectra_of(
    model: nn.Module, layers: Layers, found: Estimates
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, float]]]:
    """Return all spectra by kind and module, and by module the rank measures of those that are of matrices."""
    statistics, weights = profile_weights(model, list(layers.costs))
    flow = {name: flow_spectrum(gram).gains for name, gram in found.states["probe"].grams.items()}
    spectra: dict[str, dict[str, Tensor]] = {"flow_gains": flow, "weight": weights, "update": {}}
    for name, layer in lora_layers(model).items():
        sigma = spectra["update"][name] = layer.scaling * update_spectrum(layer.lora_A, layer.lora_B).cpu()
        statistics[name] |= spectrum_statistics("update", sigma, layers.shapes[name])
    if "gradient" in found.states:
        known = found.states["gradient"].finalise()
        spectra["gradient"] = {name: each.singular_values.cpu() for name, each in known.items()}
        for name, each in known.items():
            statistics[name] |= each.statistics()
    if "activation" in found.states:
        inputs = found.states["activation"].finalise()
        spectra["activation"] = {name: each.singular_values for name, each in inputs.items()}
        for name, each in inputs.items():
            statistics[name] |= each.statistics()
    if "kfac_gradient" in found.gains:
        gains = found.gains["kfac_gradient"].spectra
        assert gains is not None
        spectra["kfac_gradient"] = {name: (2 * each).sqrt() for name, each in gains.items()}
    return spectra, statistics


def _blocks(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], *, examples: int, seed: int
) -> dict[str, dict[str, float]]:
    """Measure the Jacobians of the model's blocks on the first examples."""
    if not examples:
        return {}
    device = next(model.parameters()).device
    first: list[dict[str, Tensor]] = []
    for batch in batches:
        left = examples - sum(len(each["input_ids"]) for each in first)
        if left > 0:
            first.append({key: value[:left].to(device) for key, value in batch.items() if key != "labels"})
    caches = getattr(model.config, "use_cache", False)
    try:
        model.config.use_cache = False
        found = block_jacobians(
            model,
            first,
            lambda module, batch: module(**batch),
            find_blocks(model),
            mask=lambda batch: batch["attention_mask"],
            seed=seed,
        )
    except ValueError as error:
        raise UserError(f"{error} Or set calibration.jacobian_examples to 0.") from None
    finally:
        model.config.use_cache = caches
    return {name: each.statistics() for name, each in found.items()}
