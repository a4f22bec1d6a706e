"""What a task needs of each module, measured on its own model (base and adapter) with a few unlabelled inputs.

C is the second moment of what enters a layer, S that of the gradients at what leaves it, with labels drawn from the
model: K-FAC's factors of the Fisher, which need no labels (docs/methods.md, sections 4 and 11). Both are kept as whole
matrices, for that is what rules of composition take. A bias has the S of its layer, and C = 1.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from flowra_adapters import load_adapter
from flowra_adapters.json_files import read_json_object
from flowra_analysis import (
    KFAC,
    DiagonalFisher,
    KroneckerFactors,
    base_hash,
    data_hash,
    is_measurable_layer,
    measure,
    provenance_of,
)
from flowra_compose import ModuleStatistics
from flowra_pipelines.config_sections import DataConfig, ModelConfig
from flowra_pipelines.data import Examples, Spread, TextData, load_text_data, tokenise
from flowra_pipelines.errors import UserError
from flowra_pipelines.export import CONFIGS, PREFIX, TENSORS
from flowra_pipelines.progress import meter
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.sources import content_hash, resolve
from flowra_pipelines.stages.setting import base_model, load_setting
from flowra_pipelines.statistics_files import write_task_statistics
from flowra_pipelines.tasks import TASKS, Batch, Task, load_model, load_tokenizer
from flowra_pipelines.training import data_order

__all__ = [
    "AdaptedModel",
    "MeasureSettings",
    "adapted_model",
    "adapted_run",
    "adapter_hash",
    "bare_model",
    "data_source",
    "measure_adapter",
    "measure_run",
    "measure_task_statistics",
    "statistics_batches",
]

EVERY_SIZE = 2**31
"""Factors are never sketched: a rule solves with whole matrices."""
UNLIKELY = 7919
"""Classes that no model has, to see which tensor grows with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureSettings:
    """How statistics are measured."""

    examples: int = 128
    """Inputs that are looked at, or all if there are fewer."""
    batch_size: int = 16
    """Inputs at a time."""
    max_length: int = 128
    """Tokens of an input; longer ones are cut."""
    seed: int = 0
    """Decides which inputs are looked at, and the labels that are drawn."""
    fisher: bool = False
    """Whether the Fisher's diagonal is measured, too, m n numbers for each module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedModel:
    """A base with an adapter on it, and what its task needs."""

    model: PreTrainedModel
    task: Task
    tokenizer: PreTrainedTokenizerBase
    base: str
    """Hash of the base, without heads."""


def adapter_hash(folder: Path) -> str:
    """Hash the files that are the adapter in a folder, whatever else is there."""
    names = sorted({*CONFIGS, *TENSORS.values()})
    hashes = [f"{name} {content_hash(folder / name)}" for name in names if (folder / name).is_file()]
    return sha256("\n".join(hashes).encode()).hexdigest()


def adapted_model(folder: Path, base: str | None = None) -> AdaptedModel:
    """Load a base with its task's head, and put an adapter on it.

    Args:
        folder: of the adapter.
        base: model folder, ``package://NAME/path`` or Hub name; by default what the adapter says.

    Returns:
        The model, in evaluation mode, on the accelerator if there is one.

    Raises:
        UserError: if base or task are not known, the head is neither in the adapter nor in the base, or the two do not
            fit.
    """
    bare = bare_model(folder, base)
    try:
        load_adapter(bare.model, folder)
    except ValueError as error:
        raise UserError(str(error)) from None
    nn.Module.to(bare.model, torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return bare


def bare_model(folder: Path, base: str | None = None) -> AdaptedModel:
    """Load the base of an adapter with a head for its task, and leave the adapter off.

    Args:
        folder: of the adapter.
        base: see :func:`adapted_model`.

    Returns:
        The model, on the CPU; a head that the adapter brings still has fresh values.

    Raises:
        UserError: if base or task are not known, or the head is neither in the adapter nor in the base.
    """
    config = next((folder / name for name in CONFIGS if (folder / name).is_file()), folder / CONFIGS[-1])
    try:
        said = read_json_object(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    name = base or said.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"base must be known, got an adapter that does not name one: {folder}. Give --base.")
    saved = _saved_shapes(folder / TENSORS[config.name])
    kind, data = _task(str(said.get("task_type")), name, saved, folder)
    settings, task = ModelConfig(path=name, task=kind), TASKS[kind]
    model = load_model(settings, data=data, seed=0)
    heads = task.heads(model)
    if any(not _within(saved, head) for head in heads):
        other = load_model(settings, data=data, seed=1).state_dict()
        new = [key for key, value in model.state_dict().items() if not torch.equal(value, other[key])]
        bare = [key for key in new if key not in saved]
        if bare:
            raise UserError(f"adapter must bring its head, or the base must, got none for {bare[0]!r}; in {folder}")
    hashed = base_hash(model, without=heads)
    return AdaptedModel(model=model, task=task, tokenizer=load_tokenizer(settings), base=hashed)


def adapted_run(config: RunConfig, folder: Path) -> tuple[AdaptedModel, Examples]:
    """Load a run's base, put an adapter of the run on it, and give the run's training examples beside it."""
    setting = load_setting(config)
    model = base_model(config, setting)
    hashed = base_hash(model, without=setting.task.heads(model))
    try:
        load_adapter(model, folder)
    except ValueError as error:
        raise UserError(str(error)) from None
    model.eval()
    adapted = AdaptedModel(model=model, task=setting.task, tokenizer=setting.tokenizer, base=hashed)
    return adapted, setting.train


def data_source(text: str) -> DataConfig:
    """Read ``FILE`` or ``FILE:COLUMN`` or ``FILE:COLUMN,SECOND COLUMN``; by default the column is ``text``.

    Returns:
        The section ``data`` that means all rows of it.
    """
    source, colon, columns = text.rpartition(":")
    if not colon or "/" in columns or "\\" in columns:  # package://NAME/path, C:\file
        source, columns = text, "text"
    first, _, second = columns.partition(",")
    return DataConfig(train=source, test=source, text=first, text_pair=second or None)


def statistics_batches(adapted: AdaptedModel, examples: Examples, settings: MeasureSettings) -> list[Batch]:
    """Draw examples, or take all if there are fewer, and pad them to batches; labels are not looked at."""
    count = min(settings.examples, len(examples))
    order = data_order(len(examples), needed=count, seed=settings.seed)
    padding = {"input_ids": int(adapted.tokenizer.pad_token_id or 0), "token_type_ids": 0}
    rows = [{**examples[index], "labels": 0} for index in order]
    size = settings.batch_size
    return [adapted.task.collate(rows[start : start + size], padding) for start in range(0, count, size)]


def measure_task_statistics(
    model: nn.Module,
    task: Task,
    batches: Sequence[Batch],
    names: Iterable[str],
    *,
    settings: MeasureSettings,
    description: str = "statistics",
) -> dict[str, ModuleStatistics]:
    """Measure C and S, and if wanted the Fisher's diagonal, of modules of a model that carries its adapter.

    Args:
        model: base and adapter, the head included. Left as it is.
        task: of the model.
        batches: unlabelled inputs.
        names: of modules, or of their biases (``fc.bias``); what is no layer or bias of the model's own is left out.
        settings: seed, and whether the diagonal is wanted.
        description: of the progress.

    Returns:
        By name, on the CPU. Modules that see the same input share one C.

    Raises:
        UserError: if a module is not reached by the loss, or a statistic is not finite.
    """
    layers = _layers(model, names)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)

    def losses(module: nn.Module, batch: Batch) -> Tensor:
        return task.drawn_losses(module, {key: value.to(device) for key, value in batch.items()}, generator)

    states: dict[str, KFAC | DiagonalFisher] = {"kfac": KFAC.init(dense_limit=EVERY_SIZE)}
    if settings.fisher:
        states["fisher"] = DiagonalFisher.init()
    measured = sorted(set(layers.values()))
    if not measured:
        return {}
    try:
        with meter(description, len(batches)) as progress:
            for batch in batches:
                states = measure(model, [batch], losses, measured, states, mask=lambda each: each["attention_mask"])
                progress.advance()
        kfac, fisher = states["kfac"], states.get("fisher")
        assert isinstance(kfac, KFAC)
        here: dict[int, Tensor] = {}  # what modules share stays shared
        moments = {name: _plain(each, here) for name, each in kfac.finalise().items()}
        diagonals = {}
        if isinstance(fisher, DiagonalFisher):
            diagonals = {name: each.values.float().cpu() for name, each in fisher.finalise().items()}
    except ValueError as error:
        raise UserError(f"statistics must be measurable, got: {error}") from None
    found = {}
    for name, layer in layers.items():
        inputs, outputs = moments[layer]
        if name == layer:
            found[name] = ModuleStatistics(inputs=inputs, outputs=outputs, fisher=diagonals.get(layer))
        else:
            fisher_of_bias = None
            if settings.fisher:  # of a bias it is the diagonal of S, tokens of an example taken to be independent
                fisher_of_bias = (outputs if outputs.ndim == 1 else outputs.diagonal())[:, None].float().clone()
            found[name] = ModuleStatistics(inputs=inputs.new_ones(1, 1), outputs=outputs, fisher=fisher_of_bias)
    return found


def measure_adapter(
    folder: Path,
    data: DataConfig,
    out: Path,
    *,
    names: Iterable[str],
    base: str | None = None,
    settings: MeasureSettings | None = None,
) -> list[str]:
    """Measure an adapter's statistics and write them.

    Args:
        folder: of the adapter.
        data: its inputs; labels are not looked at.
        out: folder to write.
        names: of the modules: its own, and those of what it is to be merged with.
        base: see :func:`adapted_model`.
        settings: how.

    Returns:
        Names for which nothing could be measured, as they are no layers or biases.
    """
    settings = settings or MeasureSettings()
    adapted = adapted_model(folder, base)
    rows = load_text_data(data, label=None).train
    examples = tokenise(rows, adapted.tokenizer, max_length=settings.max_length)
    return _measure_and_write(adapted, examples, folder, out, names, settings, data.train)


def measure_run(
    config: RunConfig, folder: Path, out: Path, *, names: Iterable[str], settings: MeasureSettings | None = None
) -> list[str]:
    """Measure a run's statistics on its training examples, as :func:`measure_adapter` does, and write them.

    Returns:
        Names for which nothing could be measured.
    """
    adapted, examples = adapted_run(config, folder)
    settings = settings or MeasureSettings()
    return _measure_and_write(adapted, examples, folder, out, names, settings, config.data.train)


def _measure_and_write(
    adapted: AdaptedModel,
    examples: Examples,
    folder: Path,
    out: Path,
    names: Iterable[str],
    settings: MeasureSettings,
    source: str,
) -> list[str]:
    batches, wanted = statistics_batches(adapted, examples, settings), sorted(set(names))
    found = measure_task_statistics(
        adapted.model, adapted.task, batches, wanted, settings=settings, description=f"statistics: {_label(folder)}"
    )
    provenance = {
        **provenance_of(
            base=adapted.base,
            data=data_hash(batches),
            seed=settings.seed,
            examples=sum(len(batch["input_ids"]) for batch in batches),
            estimators=["inputs", "outputs", *(["fisher"] if settings.fisher else [])],
        ),
        "adapter_hash": adapter_hash(folder),
        "adapter": str(folder),
        "data": source,
        "labels": "model",
    }
    write_task_statistics(found, out, provenance=provenance)
    return [name for name in wanted if name not in found]


def _label(folder: Path) -> str:
    """Call an adapter by its own folder, or by that of the run it is in."""
    parts = [part for part in folder.resolve().parts if part not in ("adapter", "merge", "refine")]
    return parts[-1]


def _layers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Map names to the layers they are measured at: a module to itself, a bias to its owner."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name in names:
        layer = name.removesuffix(".bias")
        if layer in modules and is_measurable_layer(modules[layer]):
            found[name] = layer
    return found


def _plain(factors: KroneckerFactors, here: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Return C and S as plain matrices; groups of a convolution share the mean C, and S is block diagonal."""
    inputs, outputs = (each.diagonal if each.dense is None else each.dense for each in factors)
    if factors.groups is not None:
        return inputs.mean(0).cpu(), torch.block_diag(*outputs).cpu()
    return here.setdefault(id(inputs), inputs.cpu()), outputs.cpu()


def _task(
    task_type: str, base: str, saved: Mapping[str, tuple[int, ...]], folder: Path
) -> tuple[Literal["sequence_classification", "regression", "causal_lm"], TextData]:
    """Tell the task by PEFT's name for it and, of classifiers, by the outputs of the head."""
    nothing = TextData(train=[], test=[], labels=(), numbers=None, left_out={})
    if task_type == "CAUSAL_LM":
        return "causal_lm", nothing
    if task_type != "SEQ_CLS":
        raise UserError(
            f"task type must be SEQ_CLS or CAUSAL_LM, got {task_type}; in {folder}. Set `task_type` in"
            " its configuration."
        )
    path = resolve(base)
    try:
        config = AutoConfig.from_pretrained(str(path or base), local_files_only=path is not None)
        brought, names = int(config.num_labels), dict(config.id2label)
        config.num_labels = UNLIKELY
        with torch.device("meta"):
            state = AutoModelForSequenceClassification.from_config(config).state_dict()
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"base must be a model that transformers can load, got {reason}; from {base}") from None
    outputs = [key for key, value in state.items() if value.ndim and value.shape[0] == UNLIKELY]
    count = next((saved[key][0] for key in outputs if saved.get(key)), brought)
    if count == 1:
        return "regression", replace(nothing, numbers=Spread(mean=0.0, deviation=1.0, low=0.0, high=0.0))
    labels = tuple(str(names.get(index, index)) for index in range(count))
    return "sequence_classification", replace(nothing, labels=labels)


def _saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors, under the names that those of trained heads have in the model."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return {}  # the reader of adapters says what is wrong with it
    return {key.removeprefix("saved/").removeprefix(PREFIX): shape for key, shape in shapes.items()}


def _within(saved: Mapping[str, tuple[int, ...]], head: str) -> bool:
    return any(key.startswith(f"{head}.") for key in saved)
