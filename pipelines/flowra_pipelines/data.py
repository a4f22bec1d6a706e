"""Examples: read through ``datasets``, clean, split, tokenise."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import DataConfig
from flowra_pipelines.sources import resolve

__all__ = ["Examples", "TextData", "load_text_data", "tokenise"]

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
COMPRESSIONS = {".bz2", ".gz", ".xz", ".zst", ".zip"}

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextData:
    """Cleaned rows: ``text``, perhaps ``text_pair``, and ``label`` as an id."""

    train: list[Row]
    test: list[Row]
    labels: tuple[str, ...]
    """Label names in the order of their ids; empty without labels."""
    left_out: dict[str, int]
    """Why rows were left out, and how many."""


class Examples(Dataset[Row]):
    """Tokenised rows in a given order."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def select(self, indices: Sequence[int]) -> "Examples":
        """Return the rows with these indices, in this order; rows are shared, not copied."""
        return Examples([self._rows[index] for index in indices])


def load_text_data(config: DataConfig, *, labelled: bool) -> TextData:
    """Read, clean and split.

    Args:
        config: where, and which columns.
        labelled: whether a label column is needed.

    Returns:
        Training and test rows; what was left out is counted.

    Raises:
        UserError: if a source or column is missing, a label is of a wrong kind, or nothing is left.
    """
    left_out: dict[str, int] = {}
    train = _read(config.train, config.train_split, config, labelled, left_out)
    test = None if config.test is None else _read(config.test, config.test_split, config, labelled, left_out)
    labels: tuple[str, ...] = ()
    if labelled:
        labels = _labels(config, [*train, *(test or [])])
        train = _with_ids(train, labels, left_out)
        test = None if test is None else _with_ids(test, labels, left_out)
    if config.drop_duplicates:
        train = _without_duplicates(train, left_out)
    if test is None:
        held_out = [_share(row["text"]) < config.test_fraction for row in train]
        test = [row for row, out in zip(train, held_out, strict=True) if out]
        train = [row for row, out in zip(train, held_out, strict=True) if not out]
    test = test[: config.max_test_examples]
    if not train or not test:
        raise UserError(
            f"data must leave training and test rows, got {len(train)} and {len(test)}; left out: {left_out}"
        )
    return TextData(train=train, test=test, labels=labels, left_out=left_out)


def tokenise(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Examples:
    """Turn rows into ``input_ids``, ``attention_mask``, what else the tokenizer gives, and ``labels`` where known."""
    pairs = [row["text_pair"] for row in rows] if rows and "text_pair" in rows[0] else None
    encoded = tokenizer([row["text"] for row in rows], pairs, truncation=True, max_length=max_length)
    examples = [{key: values[index] for key, values in encoded.items()} for index in range(len(rows))]
    for row, example in zip(rows, examples, strict=True):
        if "label" in row:
            example["labels"] = row["label"]
    return Examples(examples)


def _read(source: str, split: str, config: DataConfig, labelled: bool, left_out: dict[str, int]) -> list[Row]:
    table = _open(source, split)
    wanted = {"text": config.text, "text_pair": config.text_pair, "label": config.label if labelled else None}
    columns = {key: column for key, column in wanted.items() if column is not None}
    missing = [column for column in columns.values() if column not in table.column_names]
    if missing:
        raise UserError(
            f"column must be one of {table.column_names}, got {missing[0]!r}; in {source}. Map it in `data`."
        )
    if labelled and isinstance(table.features[config.label], datasets.ClassLabel):
        names = table.features[config.label].names
        table = table.map(lambda row: {config.label: names[row[config.label]]}, features=None)
    values = {key: table[column] for key, column in columns.items()}
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    kept = [row for row in rows if all(row[key] is not None and row[key] != "" for key in columns)]
    _count(left_out, "a column is empty", len(rows) - len(kept))
    for key in ("text", "text_pair"):
        strange = next((row[key] for row in kept if key in row and not isinstance(row[key], str)), None)
        if strange is not None:
            raise UserError(f"column {columns[key]!r} must hold text, got {strange!r}; in {source}")
    return kept


def _open(source: str, split: str) -> datasets.Dataset:
    path = resolve(source)
    if path is None:
        return datasets.load_dataset(source, split=split)
    if split not in ("train", "test"):
        raise UserError(f"split must be left out for a file, got {split!r} for {source!r}: it has no effect")
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    kind = FORMATS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise UserError(f"data file must end in one of {sorted(FORMATS)}, perhaps compressed, got {path.name!r}")
    try:
        options = {"sep": "\t"} if ".tsv" in path.suffixes else {}
        return datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"data file must be readable {kind}, got {_first_line(error)}; in {path}") from None


def _labels(config: DataConfig, rows: Sequence[Row]) -> tuple[str, ...]:
    strange = next((row["label"] for row in rows if not isinstance(row["label"], str | int | bool)), None)
    if strange is not None:
        raise UserError(f"column {config.label!r} must hold classes, got {strange!r}. Choose another `data.label`.")
    found = sorted({row["label"] for row in rows}, key=lambda label: (str(type(label)), label))
    labels = config.labels or tuple(str(label) for label in found)
    absent = [label for label in labels if label not in {str(each) for each in found}]
    if absent or len(labels) < 2:
        raise UserError(f"data.labels must be at least two of {[str(each) for each in found]}, got {list(labels)}")
    return labels


def _with_ids(rows: Sequence[Row], labels: tuple[str, ...], left_out: dict[str, int]) -> list[Row]:
    ids = {label: index for index, label in enumerate(labels)}
    kept = [{**row, "label": ids[str(row["label"])]} for row in rows if str(row["label"]) in ids]
    _count(left_out, f"the label is not one of {', '.join(labels)}", len(rows) - len(kept))
    return kept


def _without_duplicates(rows: Sequence[Row], left_out: dict[str, int]) -> list[Row]:
    first = {(row["text"], row.get("text_pair")): row for row in reversed(rows)}
    kept = [row for row in rows if first[row["text"], row.get("text_pair")] is row]
    _count(left_out, "the text has been seen before", len(rows) - len(kept))
    return kept


def _share(text: str) -> float:
    """Map a text to [0, 1) by its SHA-1."""
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:8], 16) / 2**32


def _count(left_out: dict[str, int], reason: str, number: int) -> None:
    if number:
        left_out[reason] = left_out.get(reason, 0) + number


def _first_line(error: BaseException) -> str:
    return str(error.__cause__ or error).strip().split("\n")[0]


def data_paths(config: DataConfig) -> list[Path]:
    """Return the local files that the data come from."""
    found = [resolve(source) for source in (config.train, config.test) if source is not None]
    return [path for path in found if path is not None]
