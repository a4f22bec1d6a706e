"""What differs between kinds of tasks: model class, head, batch, loss of one example, and measures of success."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from flowra_analysis import drawn_class_losses, drawn_target_losses, drawn_token_losses
from flowra_pipelines.config_sections import ModelConfig
from flowra_pipelines.data import LabelKind, TextData
from flowra_pipelines.errors import UserError
from flowra_pipelines.sources import resolve
from flowra_pipelines.statistics import ACCURACY, LANGUAGE_LOSS, LOSS, R_SQUARED, SPEARMAN, SQUARED_ERROR, Measure

__all__ = ["TASKS", "CausalLM", "Regression", "SequenceClassification", "Task", "load_model", "load_tokenizer"]

Batch = dict[str, Tensor]


class Task(Protocol):
    """A kind of task."""

    peft_type: str
    """PEFT's name for it."""
    label: LabelKind | None
    """What the label column holds; None if there is none."""
    model_class: Any
    """One of transformers' Auto classes."""
    measures: Sequence[Measure]
    """How good a model is, in the order of the table. The first is what verdicts and the paired test are about."""

    def options(self, data: TextData) -> dict[str, Any]:
        """Return what the model's configuration must say."""

    def start_head(self, model: PreTrainedModel, data: TextData) -> None:
        """Give a new head the values from which training starts, beyond the model's own initialisation."""

    def heads(self, model: nn.Module) -> list[str]:
        """Name the modules that are new and trained in full; they are outside the budget."""

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Mapping[str, int]) -> Batch:
        """Pad examples to one batch, ``labels`` included."""

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return each example's loss (a sum over its targets), its number of targets, and its answer.

        The answer is whether the example is correct, the number predicted, or None.
        """

    def drawn_losses(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return each example's loss under labels drawn from the model; ``labels`` only say where there are any."""


class SequenceClassification:
    """One class for each text or pair."""

    peft_type = "SEQ_CLS"
    label: LabelKind | None = "class"
    model_class = AutoModelForSequenceClassification
    measures: Sequence[Measure] = (ACCURACY, LOSS)

    def options(self, data: TextData) -> dict[str, Any]:
        """Name the classes."""
        return {
            "id2label": dict(enumerate(data.labels)),
            "label2id": {label: index for index, label in enumerate(data.labels)},
        }

    def start_head(self, model: PreTrainedModel, data: TextData) -> None:
        """Leave the head as it is."""

    def heads(self, model: nn.Module) -> list[str]:
        """Name the classification head."""
        return _new_heads(model)

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Mapping[str, int]) -> Batch:
        """Pad to the longest text of the batch."""
        batch = _pad(rows, padding)
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cross-entropy of each example."""
        labels, logits = batch["labels"], _logits(model, batch)
        loss = F.cross_entropy(logits, labels, reduction="none")
        return loss, torch.ones_like(labels), logits.argmax(-1) == labels

    def drawn_losses(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Cross-entropy of each example with a class drawn from the model."""
        return drawn_class_losses(_logits(model, batch), generator=generator)


class Regression:
    """One number for each text or pair; the loss is the squared error.

    The head predicts in the labels' own unit, at every stage; nothing is folded in at the end. What training on
    standardised labels (y - mean) / deviation would do is done to the last layer of a new head instead: its bias starts
    at the mean of the training labels, its weights at deviation times their usual start, and its learning rate is
    multiplied by the deviation. With Adam, which does not see the scale of a gradient, the two are the same but for
    the clipping of gradients. Heads without a bias (``score`` of decoders) start near 0.
    """

    peft_type = "SEQ_CLS"
    label: LabelKind | None = "number"
    model_class = AutoModelForSequenceClassification
    measures: Sequence[Measure] = (SQUARED_ERROR, R_SQUARED, SPEARMAN)

    def options(self, data: TextData) -> dict[str, Any]:
        """One output, which transformers takes for a number."""
        return {"num_labels": 1, "problem_type": "regression"}

    def start_head(self, model: PreTrainedModel, data: TextData) -> None:
        """Put the last layer into the labels' unit, and its bias at their mean."""
        assert data.numbers is not None
        layers = [layer for name in self.heads(model) for layer in model.get_submodule(name).modules()]
        for layer in layers:
            if isinstance(layer, nn.Linear) and layer.out_features == 1:
                layer.weight.detach().mul_(data.label_unit)
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, data.numbers.mean)

    def heads(self, model: nn.Module) -> list[str]:
        """Name the head."""
        return _new_heads(model)

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Mapping[str, int]) -> Batch:
        """Pad to the longest text of the batch; labels are float32."""
        batch = _pad(rows, padding)
        batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=torch.float32)
        return batch

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Squared error of each example, and the number predicted."""
        labels, predicted = batch["labels"], _logits(model, batch).squeeze(-1)
        return (predicted - labels).square(), torch.ones_like(labels, dtype=torch.long), predicted

    def drawn_losses(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Squared error of each example from a number drawn around the prediction, scaled to the loss's curvature."""
        return math.sqrt(2) * drawn_target_losses(_logits(model, batch), generator=generator)


class CausalLM:
    """Predict the next token."""

    peft_type = "CAUSAL_LM"
    label: LabelKind | None = None
    model_class = AutoModelForCausalLM
    measures: Sequence[Measure] = (LANGUAGE_LOSS,)

    def options(self, data: TextData) -> dict[str, Any]:
        """Leave the model's configuration as it is."""
        return {}

    def start_head(self, model: PreTrainedModel, data: TextData) -> None:
        """Leave the head as it is."""

    def heads(self, model: nn.Module) -> list[str]:
        """A language model brings its head."""
        return []

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Mapping[str, int]) -> Batch:
        """Pad to the longest text of the batch; padding is no target."""
        batch = _pad(rows, padding)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sum of the cross-entropy over the tokens of each example."""
        logits, labels = _logits(model, batch)[:, :-1], batch["labels"][:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        return loss.view(labels.shape).sum(1), (labels != -100).sum(1), None

    def drawn_losses(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Sum of the cross-entropy over the tokens of each example, each drawn given the text as it is."""
        logits, real = _logits(model, batch)[:, :-1], batch["labels"][:, 1:] != -100
        return drawn_token_losses(logits, real, reduction="sum", generator=generator)


TASKS: Mapping[str, Task] = {
    "sequence_classification": SequenceClassification(),
    "regression": Regression(),
    "causal_lm": CausalLM(),
}


def load_model(config: ModelConfig, *, data: TextData, seed: int) -> PreTrainedModel:
    """Load a model for its task; a new head is initialised from the seed, and where the task says so from the labels.

    Returns:
        The model, on the CPU.

    Raises:
        UserError: if the folder holds no loadable model.
    """
    path, task = resolve(config.path), TASKS[config.task]
    _require_weights(path)
    with torch.random.fork_rng(devices=[]), _without_load_report():
        torch.manual_seed(seed)
        try:
            model, report = task.model_class.from_pretrained(
                str(path or config.path),
                local_files_only=path is not None,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below
                dtype=getattr(torch, config.dtype),
                **task.options(data),
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"model must load as {config.task}, got {_first_line(error)}; from {config.path}") from None
    assert isinstance(model, PreTrainedModel)
    if _is_head_new(report, task.heads(model), config):
        task.start_head(model, data)
    if model.config.pad_token_id is None and model.config.eos_token_id is not None:
        eos = model.config.eos_token_id
        model.config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; one without padding pads with its end token.

    Returns:
        The tokenizer.

    Raises:
        UserError: if there is none.
    """
    path = resolve(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path or config.path), local_files_only=path is not None)
    except (OSError, ValueError) as error:
        raise UserError(f"model must bring a tokenizer, got {_first_line(error)}; from {config.path}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return logits.float()


def _is_head_new(report: Mapping[str, Any], heads: Sequence[str], config: ModelConfig) -> bool:
    """Tell whether the checkpoint lacks the head, and check that it lacks nothing else.

    Returns:
        False if the checkpoint brings a head that fits: it stays as it is.

    Raises:
        UserError: if a weight of the base is missing, or one has another shape. It would be random here, and in every
            process that loads the exported adapter another one.
    """
    if report["mismatched_keys"]:
        key, there, here = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"model must fit the task, got {key!r} of shape {tuple(there)} for {tuple(here)}; from {config.path}. Save"
            " the base alone, with AutoModel, and use that."
        )
    inside = tuple(f"{head}." for head in heads)
    missing = sorted(report["missing_keys"])
    absent = [key for key in missing if not key.startswith(inside)]
    if absent:
        raise UserError(
            f"model must bring all weights but its head's, got none for {absent[0]!r}; from {config.path}. Load it once"
            " with transformers, save it with this layer, and use that."
        )
    return bool(missing)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Leave out the report that a head is new: it is meant to be."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _new_heads(model: nn.Module) -> list[str]:
    """Name what transformers puts on an encoder or decoder to classify or to regress: all that is not the base."""
    base = getattr(model, "base_model_prefix", None)
    return [name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())]


def _require_weights(path: Path | None) -> None:
    if path is not None and not (path.is_dir() and any(path.glob("*.safetensors"))):
        raise UserError(
            f"model must be a folder with *.safetensors weights, got {path}. Pickled weights are never read."
        )


def _pad(rows: Sequence[Mapping[str, Any]], padding: Mapping[str, int]) -> Batch:
    length = max(len(row["input_ids"]) for row in rows)
    return {
        key: torch.tensor([[*row[key], *[padding.get(key, 0)] * (length - len(row[key]))] for row in rows])
        for key in rows[0]
        if key != "labels"
    }


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
