"""Examples: read through ``datasets``, clean, split, tokenise."""

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets.utils import logging
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from flowra_pipelines.config_sections import DataConfig
from flowra_pipelines.errors import UserError
from flowra_pipelines.sources import resolve

__all__ = ["Examples", "LabelKind", "Spread", "TextData", "load_text_data", "read_columns", "tokenise"]

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
COMPRESSIONS = {".bz2", ".gz", ".xz", ".zst", ".zip"}

# What ``datasets`` says of a table without rows: a csv file with and without a header, a parquet file.
SAID_OF_NO_ROWS = ("corresponds to no data", "No columns to parse from file", "BatchSize must be greater than 0")

Row = dict[str, Any]
LabelKind = Literal["class", "number"]
LARGEST = 1e18
"""Numbers beyond it have no square in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Where the numbers of the training rows lie."""

    mean: float
    deviation: float
    """Standard deviation of the rows as a population, > 0."""
    low: float
    high: float

    def __str__(self) -> str:
        return f"mean {self.mean:.4g}, standard deviation {self.deviation:.4g}, from {self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextData:
    """Cleaned rows: ``text``, perhaps ``text_pair``, and ``label`` as an id or a number."""

    train: list[Row]
    test: list[Row]
    labels: tuple[str, ...]
    """Label names in the order of their ids; empty unless labels are classes."""
    numbers: Spread | None
    """Of the training rows' labels, where they are numbers."""
    left_out: dict[str, int]
    """Why rows were left out, and how many."""

    @property
    def label_unit(self) -> float:
        """Standard deviation of the numbers; 1 for other labels."""
        return 1.0 if self.numbers is None else self.numbers.deviation

    @property
    def label_summary(self) -> str:
        """Training rows of each class, or the spread of the numbers; empty without labels."""
        counts = Counter(row["label"] for row in self.train if self.labels)
        classes = ", ".join(f"{name} {counts[index]:,}" for index, name in enumerate(self.labels))
        return classes if self.numbers is None else str(self.numbers)


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


def load_text_data(config: DataConfig, *, label: LabelKind | None) -> TextData:
    """Read, clean and split.

    Args:
        config: where, and which columns.
        label: whether the label column holds classes or numbers; None if there is none.

    Returns:
        Training and test rows; what was left out is counted.

    Raises:
        UserError: if a source or column is missing or unreadable, a label is of a wrong kind, or too little is left.
    """
    left_out: dict[str, int] = {}
    _refuse_idle_splits(config)
    train = _read(config.train, config.train_split, config, label, left_out)
    test = None if config.test is None else _read(config.test, config.test_split, config, label, left_out)
    labels: tuple[str, ...] = ()
    if label == "class":
        train, test = _whole(train), None if test is None else _whole(test)
        labels = _labels(config, [*train, *(test or [])])
        train = _with_ids(train, labels, left_out)
        test = None if test is None else _with_ids(test, labels, left_out)
    elif label == "number":
        train = _with_numbers(train, config.label, config.train)
        test = None if test is None else _with_numbers(test, config.label, str(config.test))
    if config.drop_duplicates:
        train = _without_duplicates(train, left_out)
    if test is None:
        held_out = [_share(row["text"]) < config.test_fraction for row in train]
        test = [row for row, out in zip(train, held_out, strict=True) if out]
        train = [row for row, out in zip(train, held_out, strict=True) if not out]
    test = test[: config.max_test_examples]
    if len(train) < 1 or len(test) < 2:
        reasons = "; ".join(f"{count:,} because {reason}" for reason, count in left_out.items()) or "none"
        raise UserError(
            f"data must leave at least 1 training and 2 test rows, got {len(train)} and {len(test)}; left out:"
            f" {reasons}"
        )
    absent = [name for index, name in enumerate(labels) if all(row["label"] != index for row in train)]
    if absent:
        raise UserError(f"every class must have training rows, got none of {absent[0]!r}; in {config.train}")
    numbers = _spread(config, train, test) if label == "number" else None
    return TextData(train=train, test=test, labels=labels, numbers=numbers, left_out=left_out)


def tokenise(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Examples:
    """Turn rows into ``input_ids``, ``attention_mask``, what else the tokenizer gives, and ``labels`` where known."""
    pairs = [row["text_pair"] for row in rows] if rows and "text_pair" in rows[0] else None
    encoded = tokenizer([row["text"] for row in rows], pairs, truncation=True, max_length=max_length)
    examples = [{key: values[index] for key, values in encoded.items()} for index in range(len(rows))]
    for row, example in zip(rows, examples, strict=True):
        if "label" in row:
            example["labels"] = row["label"]
    return Examples(examples)


def _refuse_idle_splits(config: DataConfig) -> None:
    """A file has no splits, so naming one would have no effect."""
    for source, key in ((config.train, "train_split"), (config.test, "test_split")):
        split = getattr(config, key)
        if source is not None and resolve(source) is not None and split != DataConfig.model_fields[key].default:
            raise UserError(f"split must be left out for a file, got {split!r} for {source!r}: it has no effect")


def _read(source: str, split: str, config: DataConfig, label: LabelKind | None, left_out: dict[str, int]) -> list[Row]:
    """Read the rows whose columns are all filled."""
    wanted = {"text": config.text, "text_pair": config.text_pair, "label": config.label if label else None}
    columns = {key: column for key, column in wanted.items() if column is not None}
    values = read_columns(source, split, columns)
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    kept = [row for row in rows if all(row[key] is not None and row[key] != "" for key in columns)]
    if not kept:
        wanted_columns = " and ".join(map(repr, columns.values()))
        raise UserError(f"data must hold rows with {wanted_columns}, got none in {len(rows)} rows; in {source}")
    _count(left_out, "a column is empty", len(rows) - len(kept))
    for key in ("text", "text_pair"):
        strange = next((row[key] for row in kept if key in row and not isinstance(row[key], str)), None)
        if strange is not None:
            raise UserError(f"column {columns[key]!r} must hold text, got {_short(strange)}; in {source}")
    return kept


def read_columns(source: str, split: str, columns: Mapping[str, str]) -> dict[str, list[Any]]:
    """Read columns as they are.

    Args:
        source: see :class:`DataConfig`.
        split: of a Hub data set.
        columns: key to the name of a column.

    Returns:
        Key to the values of every row; a class is read by its name.

    Raises:
        UserError: if the source is missing or unreadable, or lacks a column.
    """
    path = resolve(source)
    kind = None if path is None else _format(path)
    try:
        with _silence():
            table = _open(source, split, path, kind)
            missing = [column for column in columns.values() if column not in table.column_names]
            if missing:
                raise UserError(
                    f"column must be one of {table.column_names}, got {missing[0]!r}; in {source}. Map it in `data`."
                )
            values = {key: list(table[column]) for key, column in columns.items()}
    except UserError:
        raise
    except Exception as error:  # the parsers of many formats raise what they like
        if path is None:
            raise UserError(
                f"data must be a file that exists or a data set of the Hub, got {source!r}: {_first_line(error)}"
            ) from None
        if _empty(path, error):
            raise UserError(f"data must hold rows, got none; in {source}") from None
        remedy = ". Save it as UTF-8" if isinstance(error.__cause__ or error, UnicodeDecodeError) else ""
        raise UserError(f"data file must be readable {kind}, got {_first_line(error)}; in {source}{remedy}") from None
    for key, column in columns.items():
        feature = table.features[column]
        if isinstance(feature, datasets.ClassLabel):  # -1 is a row without a label
            values[key] = [None if value is None or value < 0 else feature.names[value] for value in values[key]]
    return values


def _format(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    kind = FORMATS.get(suffixes[-1] if suffixes else "")
    if kind is None or not path.is_file():
        raise UserError(f"data must be a file ending in one of {sorted(FORMATS)}, perhaps compressed, got {path}")
    return kind


def _open(source: str, split: str, path: Path | None, kind: str | None) -> datasets.Dataset:
    if path is None or kind is None:
        return datasets.load_dataset(source, split=split)
    options = {"sep": "\t"} if ".tsv" in path.suffixes else {}
    return datasets.load_dataset(kind, data_files=str(path), split="train", **options)


def _empty(path: Path, error: Exception) -> bool:
    """Tell whether a file that ``datasets`` cannot read is only empty: it has no error of its own for that."""
    said = any(words in str(error.__cause__ or error) for words in SAID_OF_NO_ROWS)
    return said or path.stat().st_size == 0 or isinstance(error, StopIteration)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep ``datasets`` from logging an error that is shown in one line anyway."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _whole(rows: Sequence[Row]) -> list[Row]:
    """Turn 1.0 into 1, where all labels are whole numbers: a column of integers with gaps is read as floats."""
    if not all(type(row["label"]) is float and row["label"].is_integer() for row in rows):
        return list(rows)
    return [{**row, "label": int(row["label"])} for row in rows]


def _labels(config: DataConfig, rows: Sequence[Row]) -> tuple[str, ...]:
    strange = next((row["label"] for row in rows if not isinstance(row["label"], str | int | bool)), None)
    if strange is not None:
        raise UserError(
            f"column {config.label!r} must hold classes, got {_short(strange)}; in {config.train}. Choose another"
            " `data.label`, or model.task=regression for numbers."
        )
    found = sorted({row["label"] for row in rows}, key=lambda label: (str(type(label)), label))
    if len(found) < 2:
        raise UserError(f"column {config.label!r} must hold at least two classes, got only {found}; in {config.train}")
    labels = config.labels or tuple(str(label) for label in found)
    absent = [label for label in labels if label not in {str(each) for each in found}]
    if absent or len(labels) < 2:
        raise UserError(
            f"data.labels must be at least two of {_short([str(each) for each in found])}, got {list(labels)}"
        )
    return labels


def _with_numbers(rows: Sequence[Row], column: str, source: str) -> list[Row]:
    return [{**row, "label": _number(row["label"], column, source)} for row in rows]


def _number(value: object, column: str, source: str) -> float:
    """Read a label as a number; text that is one, such as ``3.5``, is taken, truth values are not."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise UserError(
            f"column {column!r} must hold numbers within ±{LARGEST:.0e}, got {_short(value)}; in {source}."
            " Correct or leave out such rows, or choose another `data.label`."
        )
    return number


def _spread(config: DataConfig, train: Sequence[Row], test: Sequence[Row]) -> Spread:
    for part, rows in (("training", train), ("test", test)):
        if len({row["label"] for row in rows}) < 2:
            raise UserError(
                f"column {config.label!r} must hold different numbers, got only {rows[0]['label']:g} in the {part} rows"
            )
    labels = [row["label"] for row in train]
    return Spread(mean=statistics.fmean(labels), deviation=statistics.pstdev(labels), low=min(labels), high=max(labels))


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
    text = str(error.__cause__ or error).strip().split("\n")[0].rstrip(".")
    return text or type(error).__name__


def _short(value: object) -> str:
    """Show a value in one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def data_paths(config: DataConfig) -> list[Path]:
    """Return the local files that the data come from."""
    found = [resolve(source) for source in (config.train, config.test) if source is not None]
    return [path for path in found if path is not None]
