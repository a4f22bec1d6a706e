"""``flowra fuse train``: gates learn on a base and adapters that do not, and what they gain is measured.

The recipe is that of LoRA-Flow (Wang et al. 2024, arXiv:2402.11455, section 4.1, and its code): 200 examples, 5 epochs,
batches of 4, Adam with β = (0.9, 0.95) and ε = 10⁻⁵ at a peak of 10⁻³, a cosine after a warm-up of a fifth, weight
decay 0.1, gradients clipped to norm 1. Deviations: the bias does not decay, for it would pull the weights' sum to 1;
adapters and base are in evaluation mode, without dropout, as they are when gates are used.

A training that was killed goes on: its state lies in ``<out>.partial``, with what it was made from.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flowra_analysis import data_hash
from flowra_compose.fusion import (
    Fusion,
    GateOptions,
    Gates,
    StaticWeights,
    adapter_fingerprint,
    gates_for,
    search_static_weights,
    write_gates,
)
from flowra_compose.fusion.gate_files import FILES
from flowra_pipelines.composition import as_user_errors
from flowra_pipelines.config_sections import TrainingConfig
from flowra_pipelines.data import Examples
from flowra_pipelines.errors import UserError
from flowra_pipelines.export import adapter_folder
from flowra_pipelines.fuse_examples import read_examples
from flowra_pipelines.fuse_partial import PartialTraining
from flowra_pipelines.fuse_setting import RECORD, FusedSetting, FuseRecord, open_setting, relative_to, write_record
from flowra_pipelines.merge_job import check_out
from flowra_pipelines.progress import console, meter
from flowra_pipelines.sources import resolve
from flowra_pipelines.stages.record import code_hash
from flowra_pipelines.training import LossCurve, train_phase
from flowra_pipelines.training_state import (
    TrainingState,
    capture_tensors,
    restore_moments,
)

__all__ = ["FuseJob", "TrainSettings", "show_training", "train_gates"]

OURS = (*FILES, RECORD)
SAVE_EVERY = 50
"""Steps between states; four in a short training."""
FEWEST_STEPS = 10
VALUES = "gates/"
"""Prefix of the gates' own values in a state, beside the moments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """How gates are made and trained; the defaults are the recipe."""

    level: Literal["layer", "step", "module"] = "layer"
    initial: Literal["primary", "uniform"] = "primary"
    primary: str | None = None
    """Name of the adapter that has weight 1 at the start; by default the last."""
    gate_input: Literal["residual", "normed"] = "residual"
    rank: int | None = None
    top_k: int | None = None
    temperature: float = 1.0
    steps: int | None = None
    """By default those of the epochs, at least 10."""
    epochs: int = 5
    batch_size: int = 4
    learning_rate: float = 1e-3
    """Peak rate of what gates look at h with, W_g."""
    bias_learning_rate: float | None = None
    """Peak rate of the biases; by default ten times that of W_g. A step of Adam is as long for a bias as for each of
    the d numbers that score h together, so at one rate the biases hardly move."""
    entropy_penalty: float = 0.0
    """λ ≥ 0 of λ times the mean entropy of the shares, in nats, added to the loss: gates that decide."""
    fixed_trials: int = 0
    """Trials of a search for the best fixed weights, on the examples that gates learn from; 0 for none."""
    max_length: int = 512
    """Tokens of an example; longer ones are cut."""
    seed: int = 0
    """Of the order of the examples, and of gates of low rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FuseJob:
    """What is to be trained; the arguments of ``flowra fuse train``."""

    sources: tuple[Path, ...]
    """Folders of adapters or of runs."""
    data: str
    """``FILE[:COLUMN[,COLUMN]]``."""
    out: Path
    names: tuple[str, ...] | None = None
    base: str | None = None
    heads_from: str | None = None
    validation: str | float = 0.2
    """A file with the columns of ``data``, or the share of its rows that is held out."""
    label: str = "label"
    """Column with the class or number, for what is no language model."""
    labels: tuple[str, ...] | None = None
    """Classes, in the order of the head's outputs."""
    settings: TrainSettings = TrainSettings()


def train_gates(job: FuseJob) -> FuseRecord:
    """Train gates, measure what they gain, and write them with the record of it.

    Args:
        job: what is asked for.

    Returns:
        The record, as it is in ``fuse.json``.

    Raises:
        UserError: for what the user can put right.
    """
    check_out(job.out, [adapter_folder(source) for source in job.sources], OURS)
    if len(job.sources) < 2:
        raise UserError(
            f"adapters must be at least two, got {len(job.sources)}: a single one has weight 1, and nothing is to learn"
        )
    if 0 < job.settings.fixed_trials < len(job.sources) + 2:
        raise UserError(
            f"fixed-trials must be 0 or at least {len(job.sources) + 2} with {len(job.sources)} adapters, got"
            f" {job.settings.fixed_trials}"
        )
    setting = open_setting(job.sources, names=job.names, base=job.base, heads_from=job.heads_from)
    training, validation, left_out = read_examples(
        setting,
        job.data,
        validation=job.validation,
        max_length=job.settings.max_length,
        label=job.label,
        labels=job.labels,
    )
    config = _schedule(job.settings, len(training))
    options = _options(job.settings, setting.names)
    with as_user_errors():
        gates = gates_for(setting.model, setting.adapters, options, seed=job.settings.seed)
    inputs: dict[str, Any] = {
        "adapters": [[name, adapter_fingerprint(one)] for name, one in setting.adapters.items()],
        "heads": [setting.heads_from, data_hash([dict(one.modules_to_save) for one in setting.adapters.values()])],
        "base": setting.base_hash,
        "data": data_hash([training[index] for index in range(len(training))]),
        "validation": data_hash([validation[index] for index in range(len(validation))]),
        "settings": {**asdict(job.settings), "steps": config.steps},
        "code": code_hash(),
        "versions": _versions(),
    }
    whole = job.out.resolve()  # for "." has no name
    partial = PartialTraining(whole.with_name(f"{whole.name}.partial"), inputs)
    losses = partial.remembered("before", lambda: _before(setting, training, validation, job.settings))
    with setting.fused(gates) as fusion:
        curve = _train(setting, fusion, gates, training, config, job.settings, partial)
        losses["gates"], weights = _scored(setting, validation, job.settings.batch_size, "gates, validation", fusion)
        learned, _ = _scored(setting, training, job.settings.batch_size, "gates, training")
    record = FuseRecord(
        base=_base(setting.base, job.out),
        base_hash=setting.base_hash,
        task=setting.task.peft_type,
        heads_from=setting.heads_from,
        adapters=tuple(
            {"name": name, "folder": relative_to(folder, job.out)} for name, folder in setting.folders.items()
        ),
        settings=inputs["settings"],
        data={
            "train": job.data,
            "validation": job.validation,
            "examples": [len(training), len(validation)],
            "left_out": left_out,
        },
        curve=tuple(curve),
        losses={"validation": losses, "training": {"gates": learned}},
        weights=weights,
        versions=_versions(),
    )
    (job.out / RECORD).unlink(missing_ok=True)  # where it is, the folder is whole
    write_gates(gates, setting.adapters, job.out)
    write_record(record, job.out)
    partial.remove()
    return record


def show_training(job: FuseJob) -> None:
    """Train gates and print what came out.

    Raises:
        UserError: for what the user can put right.
    """
    record = train_gates(job)
    found = record.losses["validation"]
    names = [each["name"] for each in record.adapters]
    counts = record.data["examples"]
    table = Table()
    table.add_column("weights", overflow="fold")
    table.add_column("validation loss", justify="right")
    for title, loss in found.items():
        table.add_row(Text(title), _number(loss), style="bold" if title == "gates" else "")
    console.print(table, soft_wrap=False)
    fixed = {title: loss for title, loss in found.items() if title != "gates" and loss is not None}
    best, gates = min(fixed, key=fixed.__getitem__), found["gates"]
    if gates is None or gates >= fixed[best]:
        console.print(f"The gates are no better than {best}: take that, or give more examples.", markup=False)
    console.print(f"Examples: {counts[0]} in {record.curve[-1][0]} steps, and {counts[1]} of validation", markup=False)
    for reason, count in record.data["left_out"].items():
        console.print(f"Left out: {count} rows, {reason}", markup=False)
    means = [sum(each[index] for each in record.weights.values()) / len(record.weights) for index in range(len(names))]
    shown = ", ".join(f"{name} {mean:.2f}" for name, mean in zip(names, means, strict=True))
    console.print(f"Average weights over {len(record.weights)} gates: {shown}", markup=False)
    console.print(f"Written: {job.out}", markup=False)


def _schedule(settings: TrainSettings, examples: int) -> TrainingConfig:
    for option, rate in (
        ("learning rate", settings.learning_rate),
        ("bias learning rate", settings.bias_learning_rate),
    ):
        if rate is not None and not 0 < rate < math.inf:
            raise UserError(f"{option} must be a finite number > 0, got {rate}")
    if not 0 <= settings.entropy_penalty < math.inf:
        raise UserError(f"entropy penalty must be a finite number ≥ 0, got {settings.entropy_penalty}")
    steps = settings.steps
    if steps is None:
        steps = max(FEWEST_STEPS, math.ceil(settings.epochs * examples / settings.batch_size))
    try:
        return TrainingConfig(
            steps=steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            schedule="cosine",
            warmup=0.2,
            weight_decay=0.1,
            max_grad_norm=1.0,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}: {first['msg']}, got {first['input']}") from None


def _options(settings: TrainSettings, names: Sequence[str]) -> GateOptions:
    if settings.primary is not None and settings.primary not in names:
        raise UserError(f"primary must be one of the adapters, {', '.join(names)}, got {settings.primary}")
    if settings.primary is not None and settings.initial == "uniform":
        raise UserError(f"primary must be left out with a uniform start, where all are alike, got {settings.primary}")
    with as_user_errors():
        return GateOptions(
            level=settings.level,
            initial=settings.initial,
            primary=-1 if settings.primary is None else names.index(settings.primary),
            temperature=settings.temperature,
            gate_input=settings.gate_input,
            rank=settings.rank,
            top_k=settings.top_k,
        )


def _before(
    setting: FusedSetting, training: Examples, validation: Examples, settings: TrainSettings
) -> dict[str, float | None]:
    """Measure what needs no gates: base, each adapter alone, mean and sum, and if wanted the best fixed weights."""
    count = len(setting.names)
    fixed: dict[str, tuple[float, ...]] = {"base": (0.0,) * count}
    for which, name in enumerate(setting.names):
        fixed[f"{name} alone"] = tuple(float(index == which) for index in range(count))
    fixed |= {"mean": (1 / count,) * count, "sum": (1.0,) * count}
    if settings.fixed_trials:
        best = _best_fixed(setting, training, settings)
        fixed[f"fixed at {','.join(f'{each:.3g}' for each in best)}"] = best
    found = {}
    for title, weights in fixed.items():
        with setting.fused(StaticWeights(weights)):
            found[title], _ = _scored(setting, validation, settings.batch_size, title)
    return found


def _best_fixed(setting: FusedSetting, training: Examples, settings: TrainSettings) -> tuple[float, ...]:
    """Search for the weights that are best everywhere, as LoraHub does."""
    trials = iter(range(1, settings.fixed_trials + 1))

    def loss(weights: tuple[float, ...]) -> float:
        with setting.fused(StaticWeights(weights)):
            found, _ = _scored(setting, training, settings.batch_size, f"fixed weights, trial {next(trials)}")
        return math.inf if found is None else found

    return search_static_weights(loss, len(setting.names), evaluations=settings.fixed_trials).weights


@torch.no_grad()
def _scored(
    setting: FusedSetting, examples: Examples, batch_size: int, description: str, fusion: Fusion | None = None
) -> tuple[float | None, dict[str, tuple[float, ...]]]:
    """Return the mean loss over all targets, None where it is not finite, and the average weights at each place."""
    setting.model.eval()
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
    loss, targets = 0.0, 0
    sums: dict[str, Tensor] = {}
    counted: dict[str, int] = {}
    with meter(f"loss: {description}", len(order)) as progress:
        for start in range(0, len(order), batch_size):
            batch = setting.collate([examples[index] for index in order[start : start + batch_size]])
            if fusion is None:
                losses, numbers, _ = setting.losses(batch)
            else:
                with fusion.recording() as record:
                    losses, numbers, _ = setting.losses(batch)
                for place, calls in record.weights.items():
                    real = torch.cat([_real(each.cpu(), batch["attention_mask"]) for each in calls])
                    sums[place] = sums.get(place, torch.zeros(real.shape[-1])) + real.double().sum(0)
                    counted[place] = counted.get(place, 0) + len(real)
            loss, targets = loss + float(losses.double().sum()), targets + int(numbers.sum())
            progress.advance(min(batch_size, len(order) - start))
    mean = loss / targets
    weights = {place: tuple((each / counted[place]).tolist()) for place, each in sums.items()}
    return mean if math.isfinite(mean) else None, weights


def _real(weights: Tensor, mask: Tensor) -> Tensor:
    """Return the weights ``(positions, k)`` at positions that are no padding."""
    flat = weights.flatten(0, -2)
    if len(flat) == mask.numel():  # batch and positions, apart or as one
        return flat[mask.flatten().bool()]
    return flat  # of a module that sees one position of each example, such as a pooler


def _train(
    setting: FusedSetting,
    fusion: Fusion,
    gates: Gates,
    examples: Examples,
    config: TrainingConfig,
    settings: TrainSettings,
    partial: PartialTraining,
) -> LossCurve:
    """Train from the last state there is to the end."""
    optimizer = _optimizer(gates, config, settings.bias_learning_rate)
    curve: LossCurve = []
    step, rng = 0, None
    restored = partial.state()
    if restored is not None:
        state, curve = restored
        values = {key: each for key, each in state.tensors.items() if key.startswith(VALUES)}
        gates.load_state_dict({key.removeprefix(VALUES): each for key, each in values.items()})
        moments = {key: each for key, each in state.tensors.items() if key not in values}
        restore_moments(replace(state, tensors=moments), setting.model, optimizer)
        step, rng = state.step, state.rng
        console.print(f"  continuing after step {step} of {config.steps}")

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        model.eval()  # the trainer says otherwise at every step; dropout is none of the gates' business
        with fusion.recording() as record:
            losses, targets, _ = setting.task.losses(model, batch)
        mean = losses.sum() / targets.sum()
        return (
            mean + settings.entropy_penalty * record.entropy(batch["attention_mask"])
            if settings.entropy_penalty
            else mean
        )

    if step < config.steps:
        saver = _Saver(setting.model, gates, optimizer, config, settings.seed, step, curve, partial)
        try:
            train_phase(
                setting.model,
                examples,
                optimizer,
                config=config,
                collate=setting.collate,
                first_step=step,
                last_step=config.steps,
                seed=settings.seed,
                description="gates",
                rng=rng,
                callbacks=[saver],
                loss=loss,
            )
        except UserError as error:
            raise UserError(str(error).replace("training.learning_rate", "--learning-rate")) from None
    return curve


def _optimizer(gates: Gates, config: TrainingConfig, bias_rate: float | None) -> Optimizer:
    named = dict(gates.named_parameters())
    biases = [each for name, each in named.items() if name.endswith("bias")]
    weights = [each for name, each in named.items() if not name.endswith("bias")]
    rate = config.learning_rate
    assert rate != "auto"
    bias_rate = 10 * rate if bias_rate is None else bias_rate
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "lr": bias_rate, "weight_decay": 0.0}]
    return AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=config.weight_decay)


@dataclass
class _Saver(TrainerCallback):
    """Keeps the loss curve, and writes a state now and then."""

    model: nn.Module
    gates: Gates
    optimizer: Optimizer
    config: TrainingConfig
    seed: int
    first_step: int
    curve: LossCurve
    partial: PartialTraining

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Note the loss of a step, and after some write the state."""
        if logs is None or "loss" not in logs:
            return
        step = self.first_step + state.global_step
        loss = float(logs["loss"])
        self.curve.append((step, loss, float(logs.get("learning_rate", 0.0))))
        every = max(1, min(SAVE_EVERY, self.config.steps // 4))
        if step % every == 0 and step < self.config.steps and math.isfinite(loss):
            values = {f"{VALUES}{key}": each.cpu().clone() for key, each in self.gates.state_dict().items()}
            written = TrainingState(
                step=step,
                total_steps=self.config.steps,
                schedule=self.config.schedule,
                seed=self.seed,
                examples_seen=step * self.config.batch_size,
                peak_parameters=self.gates.num_parameters(),
                tensors=capture_tensors(self.model, self.optimizer) | values,
            )
            self.partial.save(written, self.curve)


def _base(name: str, out: Path) -> str:
    """Return where the base is, seen from the gates, or the name that it goes by anywhere."""
    path = None if name.startswith("package://") else resolve(name)
    return name if path is None else relative_to(path, out)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("flowra-compose", "flowra-pipelines", "torch", "transformers")}


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
