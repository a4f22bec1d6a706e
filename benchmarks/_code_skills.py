"""Two skills that alternate inside one sequence: English docstrings, and the code around them.

Functions of Python's standard library, split by file, of at most 128 tokens and with a docstring of at least 8. The
skills' own examples hold one of the two: docstrings alone, and functions without theirs. The files of ``dev.parquet``
are left out: the recipe of the gates was found after a look at them, and is judged on others.
"""

import hashlib
import os
import re
from pathlib import Path

import pandas as pd
from _segments import Example, Examples, read_example
from transformers import PreTrainedTokenizerBase

__all__ = ["skills"]

DATA = Path(os.environ.get("FLOWRA_DATA", ".")) / "gen" / "stdlib_py"
DOCSTRING = re.compile(r'[ \t]*[rR]?""".*?"""[^\n]*\n?', re.DOTALL)
LONGEST = 128


def skills(tokenizer: PreTrainedTokenizerBase) -> dict[str, Examples]:
    """Read all examples.

    Returns:
        ``docs`` and ``code``, to train one adapter each; ``both``, functions of other files to train gates; ``tuning``,
        functions of these files to choose settings with; ``test``, functions of files that nothing else has seen. The
        docstring is the first skill.
    """
    sources: dict[str, list[str]] = {"own": [], "mixed": [], "test": []}
    for file, source in _functions(pd.read_parquet(DATA / "train.parquet")):
        part = int(hashlib.sha256(file.encode()).hexdigest(), 16) % 8
        sources["mixed" if part in (0, 2) else "test" if part in (4, 6) else "own"].append(source)
    own, mixed, test = (_shuffled(each) for each in sources.values())
    rows = {
        "docs": [_row(tokenizer, found.group()) for source in own if (found := DOCSTRING.search(source))],
        "code": [_row(tokenizer, DOCSTRING.sub("", source, count=1)) for source in own],
        "mixed": [_row(tokenizer, source) for source in mixed],
        "test": [_row(tokenizer, source) for source in test],
    }
    fitting = {name: [row for row in each if row is not None and len(row.tokens) > 8] for name, each in rows.items()}
    mixed_rows = fitting.pop("mixed")
    return {**fitting, "both": mixed_rows[60:], "tuning": mixed_rows[:60]}


def _functions(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return file and source of every function with a docstring, dedented as it stands in the file."""
    kept = table[(table.doc_tokens >= 8) & (table.src_tokens <= LONGEST)]
    return [(str(row.file), str(row.source)) for row in kept.itertuples() if DOCSTRING.search(str(row.source))]


def _shuffled(sources: list[str]) -> list[str]:
    return sorted(sources, key=lambda source: hashlib.sha256(source.encode()).digest())


def _row(tokenizer: PreTrainedTokenizerBase, text: str) -> Example | None:
    """Tokenise a text and tell which tokens begin in its docstring; None if it is too long."""
    found = DOCSTRING.search(text)
    return read_example(tokenizer, text, found.span() if found else (0, 0), longest=LONGEST)
