"""Two skills that alternate inside one sequence: English docstrings, and the code around them.

Functions of Python's standard library, split by file, of at most 128 tokens and with a docstring of at least 8. The
skills' own examples hold one of the two: docstrings alone, and functions without theirs.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["Row", "Rows", "skills"]

DATA = Path(os.environ.get("FLOWRA_DATA", ".")) / "gen" / "stdlib_py"
DOCSTRING = re.compile(r'[ \t]*[rR]?""".*?"""[^\n]*\n?', re.DOTALL)
LONGEST = 128


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence."""

    tokens: tuple[int, ...]
    """The first is the beginning of a text."""
    is_docstring: tuple[bool, ...]
    """Of each token."""


Rows = list[Row]


def skills(tokenizer: PreTrainedTokenizerBase) -> dict[str, Rows]:
    """Read all examples.

    Returns:
        ``docs`` and ``code``, to train one adapter each; ``both``, functions of other files to train gates; ``tuning``,
        functions of these files to choose settings with; ``test``, functions of files that nothing else has seen.
    """
    train, test = (_functions(pd.read_parquet(DATA / f"{part}.parquet")) for part in ("train", "dev"))
    held = {file for file, _ in train if int(hashlib.sha256(file.encode()).hexdigest(), 16) % 4 == 0}
    own = _shuffled([source for file, source in train if file not in held])
    mixed = _shuffled([source for file, source in train if file in held])
    rows = {
        "docs": [_row(tokenizer, found.group()) for source in own if (found := DOCSTRING.search(source))],
        "code": [_row(tokenizer, DOCSTRING.sub("", source, count=1)) for source in own],
        "mixed": [_row(tokenizer, source) for source in mixed],
        "test": [_row(tokenizer, source) for _, source in test],
    }
    fitting = {name: [row for row in each if row is not None and len(row.tokens) > 8] for name, each in rows.items()}
    mixed_rows = fitting.pop("mixed")
    return {**fitting, "both": mixed_rows[60:], "tuning": mixed_rows[:60]}


def batch(rows: Rows) -> dict[str, Tensor]:
    """Put rows into one batch, padded on the right; the loss leaves out padding."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[index, : len(row.tokens)] = 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def _functions(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return file and source of every function with a docstring, dedented as it stands in the file."""
    kept = table[(table.doc_tokens >= 8) & (table.src_tokens <= LONGEST)]
    return [(str(row.file), str(row.source)) for row in kept.itertuples() if DOCSTRING.search(str(row.source))]


def _shuffled(sources: list[str]) -> list[str]:
    return sorted(sources, key=lambda source: hashlib.sha256(source.encode()).digest())


def _row(tokenizer: PreTrainedTokenizerBase, text: str) -> Row | None:
    """Tokenise a text and tell which tokens begin in its docstring; None if it is too long."""
    found = DOCSTRING.search(text)
    start, end = found.span() if found else (0, 0)
    made = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    if len(made["input_ids"]) >= LONGEST:
        return None
    assert tokenizer.bos_token_id is not None
    inside = [start <= begin < end for begin, _ in made["offset_mapping"]]
    return Row((tokenizer.bos_token_id, *made["input_ids"]), (False, *inside))
