"""A tiny model folder, a tiny data set and a run configuration, for tests of the application."""

import csv
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

GOOD = ("brilliant", "moving", "funny", "warm", "clever", "lovely")
BAD = ("dull", "tired", "clumsy", "cold", "empty", "flat")
FILLER = ("the", "film", "is", "a", "story", "with", "and", "cast", "plot", "of", "its", "director", "very", "rather")


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ("[PAD]", "[UNK]", "[EOS]", *GOOD, *BAD, *FILLER)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", model_max_length=32
    )


def write_tiny_bert(folder: Path) -> Path:
    """Write an encoder without a head, and its tokenizer."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny_llama(folder: Path) -> Path:
    """Write a decoder and its tokenizer."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            pad_token_id=0,
            eos_token_id=2,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_reviews(path: Path, *, rows: int = 240, seed: int = 0) -> Path:
    """Write reviews with a label that their words decide, a few plots, and a few duplicates."""
    rng = random.Random(seed)
    written = []
    for index in range(rows):
        label = ("fresh", "rotten")[index % 2]
        words = [*rng.choices(FILLER, k=6), *rng.choices(GOOD if label == "fresh" else BAD, k=2)]
        rng.shuffle(words)
        written.append((label, " ".join(words)))
    written += [("plot", "the plot of the film"), written[0], written[1]]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["category", "text"])
        writer.writerows(written)
    return path


def write_scores(path: Path, *, rows: int = 240, seed: int = 0, unit: float = 1.0, zero: float = 3.0) -> Path:
    """Write texts with a number that their words decide: one ``unit`` for each good word more than bad ones."""
    rng = random.Random(seed)
    written = []
    for _ in range(rows):
        good = rng.randrange(4)
        words = [*rng.choices(FILLER, k=5), *rng.choices(GOOD, k=good), *rng.choices(BAD, k=3 - good)]
        rng.shuffle(words)
        written.append((zero + unit * (2 * good - 3 + rng.gauss(0, 0.3)), " ".join(words)))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["score", "text"])
        writer.writerows(written)
    return path


def tiny_config(folder: Path, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - sections of a YAML file
    """Return a classification run of 40 steps in a folder, its model and data written there."""
    if not (folder / "bert").exists():
        write_tiny_bert(folder / "bert")
        write_reviews(folder / "reviews.csv")
    return {
        "name": "tiny",
        "output_root": str(folder / "runs"),
        "budget": 700,
        "model": {"path": str(folder / "bert")},
        "data": {"train": str(folder / "reviews.csv"), "label": "category", "labels": ["rotten", "fresh"]},
        "training": {"steps": 40, "batch_size": 8, "learning_rate": 0.01},
        "calibration": {"examples": 32, "batch_size": 8, "report": False},
        "validation": {"examples": 24, "retrained": 1},
        "refinement": {"policy": "breathe", "events": 2, "observe": 2, "share": 0.3},
        **changes,
    }


def tiny_language_config(folder: Path) -> dict[str, Any]:
    """Return a causal language model run of 40 steps in a folder."""
    if not (folder / "llama").exists():
        write_tiny_llama(folder / "llama")
        write_reviews(folder / "reviews.csv")
    config = tiny_config(folder, name="language", model={"path": str(folder / "llama"), "task": "causal_lm"})
    config["data"] = {"train": str(folder / "reviews.csv")}
    return config


def tiny_regression_config(folder: Path, *, unit: float = 1.0, zero: float = 3.0) -> dict[str, Any]:
    """Return a regression run of 80 steps in a folder; its numbers lie around ``zero``, in steps of ``unit``."""
    config = tiny_config(folder, name="regression", model={"path": str(folder / "bert"), "task": "regression"})
    config["data"] = {
        "train": str(write_scores(folder / "scores.csv", unit=unit, zero=zero)),
        "label": "score",
        "test_fraction": 0.3,
    }
    config["training"] = {"steps": 80, "batch_size": 8, "learning_rate": 0.02}
    return config
