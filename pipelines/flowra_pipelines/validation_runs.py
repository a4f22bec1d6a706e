"""What a module's rank is really worth: the loss on held-out examples with it and without it.

Three ways to take rank away, and they differ, because modules substitute for one another:

- from a trained probe, one unit of rank or one module at a time, by forward passes alone;
- by training the probe again without the module, so that the others can take its part;
- by training the module alone, against a model with no rank at all.

A loss change is always the loss without less the loss with, in nats (or squared error) per example, summed over the
example's targets as the gains are; positive where the rank helped. Its standard error is that of the paired difference
over examples; for trainings it does not know how much another seed would change.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flowra_adapters import attach
from flowra_allocation import FlowSpectrum
from flowra_pipelines.progress import Meter, meter
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.setting import Setting, base_model, lora_layers
from flowra_pipelines.tasks import Batch
from flowra_pipelines.training import build_optimizer, data_order, train_phase

__all__ = [
    "LossChange",
    "Removed",
    "alone",
    "held_out_batches",
    "held_out_losses",
    "leave_one_rank_out",
    "loss_change",
    "retrain_without",
    "run_ablations",
    "sample_modules",
    "train_probe",
]

Removed = Literal["first", "last", "module"]
ABLATIONS: dict[Removed, str] = {
    "first": "leave_one_rank_out",
    "last": "leave_last_rank_out",
    "module": "leave_module_out",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LossChange:
    """How much the loss rises without a module's rank, or a part of it."""

    loss_change: float
    """Mean over held-out examples of the loss without less the loss with."""
    stderr: float
    """Of that mean, from the paired differences."""
    parameters: int
    """What was taken away."""
    halves: tuple[float, float]
    """The mean over every other example, from the first and from the second on: how far two halves agree says how well
    the loss changes themselves are known."""


def run_ablations(
    config: RunConfig,
    setting: Setting,
    model: PreTrainedModel,
    spectra: Mapping[str, FlowSpectrum],
    sensitivity: Mapping[str, float],
    *,
    removed: Sequence[Removed] = ("first", "last", "module"),
    examples: int = 256,
    retrained: int = 8,
) -> dict[str, dict[str, LossChange]]:
    """Do all the ablations of a trained probe.

    Args:
        config: of the run.
        setting: of the run.
        model: the base with the trained probe on it, as the stage calibrate leaves it; bitwise the same afterwards.
        spectra: flow spectrum of each module's update.
        sensitivity: ψ by module name; modules to be trained without and alone are sampled over its range.
        removed: what forward passes alone tell, see :func:`leave_one_rank_out`; each costs a pass for each module.
        examples: held-out examples, at most all there are.
        retrained: number of modules that are trained without and alone; 0 leaves both out.

    Returns:
        ``leave_one_rank_out`` (the first unit), ``leave_last_rank_out`` and ``leave_module_out`` as far as asked for,
        and ``retrain_without`` and ``alone``, each by module name.
    """
    batches = held_out_batches(config, setting, examples=examples)
    found = {}
    for way in removed:
        with meter(f"validate: {ABLATIONS[way]}", len(spectra) + 1) as progress:
            losses = partial(_counted_losses, model, setting, batches, progress)
            found[ABLATIONS[way]] = leave_one_rank_out(model, spectra, losses, removed=way)
    chosen = sample_modules(sensitivity, retrained, seed=config.seed)
    if not chosen:
        return found
    ranks = {name: layer.rank for name, layer in lora_layers(model).items()}
    full, bare = held_out_losses(model, setting, batches), alone(config, setting, None, ranks, batches)
    sizes = {name: layer.num_parameters() for name, layer in lora_layers(model).items()}
    without = {name: retrain_without(config, setting, name, ranks, batches) for name in chosen}
    only = {name: alone(config, setting, name, ranks, batches) for name in chosen}
    found["retrain_without"] = {name: loss_change(without[name], full, parameters=sizes[name]) for name in chosen}
    found["alone"] = {name: loss_change(bare, only[name], parameters=sizes[name]) for name in chosen}
    return found


def leave_one_rank_out(
    model: nn.Module,
    spectra: Mapping[str, FlowSpectrum],
    losses: Callable[[], Tensor],
    *,
    removed: Removed = "first",
) -> dict[str, LossChange]:
    """Take rank from one module of a trained adapter at a time, and look at the loss; nothing is trained.

    Direction i of the flow order leaves by B ← B (I − p qᵀ), with p column i of ``to_B`` and qᵀ row i of ``to_A``: an
    oblique projection that takes just B' [:, i] A'[i, :] out of the update.

    Args:
        model: with LoRA adapters; bitwise the same afterwards, also after an error.
        spectra: flow spectrum by module name, of the modules to be asked.
        losses: loss of each held-out example with the model as it now is, ``(N,)``; called once for each module, and
            once before.
        removed: ``"first"`` the unit of rank with the largest gain; ``"last"`` that with the smallest;
            ``"module"`` the whole update.

    Returns:
        Module name to loss change.

    Raises:
        ValueError: if a spectrum is not that of the module's update.
    """
    layers = lora_layers(model)
    for name, spectrum in spectra.items():
        if name not in layers or not 1 <= layers[name].rank == len(spectrum.gains):
            rank = layers[name].rank if name in layers else None
            raise ValueError(
                f"spectra must have one gain for each unit, got {len(spectrum.gains)} for {rank} at {name!r}"
            )
    before = losses()
    found = {}
    for name, spectrum in spectra.items():
        layer = layers[name]
        kept = layer.lora_B.detach().clone()
        try:
            with torch.no_grad():
                layer.lora_B.copy_(_without(kept, spectrum, removed))
            after = losses()
        finally:
            with torch.no_grad():
                layer.lora_B.copy_(kept)
        units = layer.rank if removed == "module" else 1
        found[name] = loss_change(after, before, parameters=units * layer.cost_per_rank)
    return found


def retrain_without(
    config: RunConfig, setting: Setting, module: str, ranks: Mapping[str, int], batches: Sequence[Batch]
) -> Tensor:
    """Train the probe again with one module left out; seed, data order and the others' start are as they were.

    Args:
        config: of the run.
        setting: of the run.
        module: the name of the module to leave out.
        ranks: the probe's, by module name.
        batches: held-out examples.

    Returns:
        Loss of each held-out example, ``(N,)``, float64.
    """
    return _trained_losses(config, setting, ranks, ranks.keys() - {module}, batches, f"without {module}")


def alone(
    config: RunConfig, setting: Setting, module: str | None, ranks: Mapping[str, int], batches: Sequence[Batch]
) -> Tensor:
    """Train one module's adapter and the head alone; see :func:`retrain_without`.

    Args:
        config: of the run.
        setting: of the run.
        module: the only module with rank; None for the head alone.
        ranks: the probe's, by module name; those of the others are used to give this one its start.
        batches: held-out examples.

    Returns:
        Loss of each held-out example, ``(N,)``, float64.
    """
    kept = set() if module is None else {module}
    return _trained_losses(config, setting, ranks, kept, batches, f"{module or 'no module'} alone")


def train_probe(
    config: RunConfig,
    setting: Setting,
    model: PreTrainedModel,
    ranks: Mapping[str, int],
    *,
    kept: Collection[str],
    description: str,
) -> None:
    """Attach and train the run's probe, with rank on some modules only.

    All adapters are drawn, so that those kept start as in the whole probe; then the others are emptied.

    Args:
        config: of the run.
        setting: of the run.
        model: a base without adapters; trained in place for the probe's steps.
        ranks: the probe's, by module name.
        kept: names of the modules that keep their rank.
        description: shown with the progress.
    """
    heads = setting.task.heads(model)
    made = attach(
        model,
        ranks,
        scaling=config.adapter.scaling,
        dropout=config.adapter.dropout,
        modules_to_save=heads,
        generator=torch.Generator().manual_seed(config.seed),
    )
    for name in made.keys() - set(kept):
        made[name].shrink([])
    if not heads and not kept:
        return
    train_phase(
        model,
        setting.train,
        build_optimizer(model, config.training, heads=heads, label_unit=setting.data.label_unit),
        config=config.training,
        collate=setting.collate,
        first_step=0,
        last_step=config.probe_steps,
        seed=config.seed,
        description=description,
    )


def held_out_batches(config: RunConfig, setting: Setting, *, examples: int) -> list[Batch]:
    """Draw test examples by the run's seed, or take all if there are fewer; those of like length share a batch."""
    count = min(examples, len(setting.test))
    rows = [setting.test[index] for index in data_order(len(setting.test), needed=count, seed=config.seed + 2)]
    rows.sort(key=lambda row: len(row["input_ids"]))
    size = config.evaluation.batch_size
    return [setting.collate(rows[start : start + size]) for start in range(0, count, size)]


@torch.no_grad()
def held_out_losses(model: nn.Module, setting: Setting, batches: Sequence[Batch]) -> Tensor:
    """Compute each example's loss, dropout off.

    Returns:
        ``(N,)``, float64, on the CPU.
    """
    model.eval()
    device = next(model.parameters()).device
    moved = ({key: value.to(device) for key, value in batch.items()} for batch in batches)
    return torch.cat([setting.task.losses(model, batch)[0].double().cpu() for batch in moved])


def loss_change(without: Tensor, with_it: Tensor, *, parameters: int) -> LossChange:
    """Compare two losses of the same examples ``(N,)``, N ≥ 2."""
    difference = without - with_it
    error = float(difference.std()) / math.sqrt(len(difference))
    halves = (float(difference[::2].mean()), float(difference[1::2].mean()))
    return LossChange(loss_change=float(difference.mean()), stderr=error, parameters=parameters, halves=halves)


def sample_modules(sensitivity: Mapping[str, float], count: int, *, seed: int) -> list[str]:
    """Draw modules from the whole range of ψ: one from each of ``count`` parts of equal size, sorted by ψ.

    Args:
        sensitivity: ψ by module name.
        count: how many; all if there are not more.
        seed: of the draw.

    Returns:
        Names, in the order of ψ.
    """
    ordered = sorted(sensitivity, key=lambda name: (sensitivity[name], name))
    count = min(count, len(ordered))
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for part in range(count):
        first, end = part * len(ordered) // count, (part + 1) * len(ordered) // count
        chosen.append(ordered[int(torch.randint(first, end, (), generator=generator))])
    return chosen


def _counted_losses(model: nn.Module, setting: Setting, batches: Sequence[Batch], progress: Meter) -> Tensor:
    progress.advance()
    return held_out_losses(model, setting, batches)


def _without(lora_B: Tensor, spectrum: FlowSpectrum, removed: Removed) -> Tensor:
    if removed == "module":
        return torch.zeros_like(lora_B)
    index = 0 if removed == "first" else -1
    b = lora_B.to("cpu", torch.float64)
    return (b - torch.outer(b @ spectrum.to_B[:, index], spectrum.to_A[index])).to(lora_B)


def _trained_losses(
    config: RunConfig,
    setting: Setting,
    ranks: Mapping[str, int],
    kept: Collection[str],
    batches: Sequence[Batch],
    what: str,
) -> Tensor:
    model = base_model(config, setting)
    train_probe(config, setting, model, ranks, kept=kept, description=f"validate: {what}")
    return held_out_losses(model, setting, batches)
