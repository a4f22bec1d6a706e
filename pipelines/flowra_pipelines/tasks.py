"""What differs between kinds of tasks: the model class, a batch, the loss of one example, and what is reported."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import ModelConfig
from flowra_pipelines.sources import resolve

__all__ = ["TASKS", "CausalLM", "Scores", "SequenceClassification", "Task", "load_model", "load_tokenizer"]

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Test results, example by example."""

    loss: Tensor
    """Sum of the loss over an example's targets, ``(N,)``, in nats."""
    targets: Tensor
    """Number of targets of each example, ``(N,)``: 1, or its tokens."""
    correct: Tensor | None
    """Whether each example was classified correctly, ``(N,)`` bool; None for language models."""


class Task(Protocol):
    """A kind of task."""

    peft_type: str
    """PEFT's name for it."""
    labelled: bool
    """Whether examples carry a class."""
    model_class: Any
    """One of transformers' Auto classes."""

    def heads(self, model: nn.Module) -> list[str]:
        """Name the modules that are new and trained in full; they are outside the budget."""

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Mapping[str, int]) -> Batch:
        """Pad examples to one batch, ``labels`` included."""

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return each example's loss (a sum over its targets), its number of targets, and whether it is correct."""


class SequenceClassification:
    """One class for each text or pair."""

    peft_type = "SEQ_CLS"
    labelled = True
    model_class = AutoModelForSequenceClassification

    def heads(self, model: nn.Module) -> list[str]:
        """Name the classification head."""
        return [name for name, _ in model.named_children() if name in ("classifier", "score")]

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Mapping[str, int]) -> Batch:
        """Pad to the longest text of the batch."""
        batch = _pad(rows, padding)
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cross-entropy of each example."""
        labels = batch["labels"]
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
        loss = F.cross_entropy(logits, labels, reduction="none")
        return loss, torch.ones_like(labels), logits.argmax(-1) == labels


class CausalLM:
    """Predict the next token."""

    peft_type = "CAUSAL_LM"
    labelled = False
    model_class = AutoModelForCausalLM

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
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits.float()[:, :-1]
        labels = batch["labels"][:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        return loss.view(labels.shape).sum(1), (labels != -100).sum(1), None


TASKS: Mapping[str, Task] = {"sequence_classification": SequenceClassification(), "causal_lm": CausalLM()}


def load_model(config: ModelConfig, *, labels: Sequence[str], seed: int) -> PreTrainedModel:
    """Load a model for its task; a new head is initialised from the seed.

    Returns:
        The model, on the CPU.

    Raises:
        UserError: if the folder holds no loadable model.
    """
    path = resolve(config.path)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if labels:
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    _require_weights(path)
    with torch.random.fork_rng(devices=[]), _without_load_report():
        torch.manual_seed(seed)
        try:
            model = TASKS[config.task].model_class.from_pretrained(
                str(path or config.path), local_files_only=path is not None, use_safetensors=True, **options
            )
        except (OSError, ValueError) as error:
            raise UserError(f"model must load as {config.task}, got {_first_line(error)}; from {config.path}") from None
    assert isinstance(model, PreTrainedModel)
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


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Leave out the report that a head is new: it is meant to be."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


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
