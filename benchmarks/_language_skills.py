"""Language × task: a problem in one language, and its solution worked out in English.

A sequence is a problem of MGSM, in its translation, and below it the solution of the same problem in GSM8K's test
split; the problem is the first skill, the solution the second. The adapter for the language has read short texts in it
(fortunes), the one for the task problems and solutions of GSM8K's train split, all in English.
"""

import hashlib
import os
import re
from pathlib import Path

import pandas as pd
from _segments import Examples, read_example
from transformers import PreTrainedTokenizerBase

__all__ = ["language", "mathematics", "problems"]

DATA = Path(os.environ.get("FLOWRA_DATA", ".")) / "gen"
CALCULATOR = re.compile(r"<<[^>]*>>")
LONGEST_TEXT, LONGEST_SOLUTION, LONGEST = 128, 192, 256
GATES, TUNING = 110, 20
"""Problems to train gates on and to choose settings with; the rest is the test."""


def language(tokenizer: PreTrainedTokenizerBase, code: str) -> Examples:
    """Read texts in a language: ``de``, ``es``, ``it``, ``ru`` or ``zh``."""
    table = pd.read_parquet(DATA / "fortunes_multilingual" / "train.parquet")
    texts = sorted({str(text) for text in table[table.lang == code].text}, key=_digest)
    rows = [read_example(tokenizer, text, (0, len(text)), longest=LONGEST_TEXT) for text in texts]
    return [row for row in rows if row is not None and len(row.tokens) > 8]


def mathematics(tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Read English problems with their solutions."""
    table = pd.read_parquet(DATA / "gsm8k" / "train.parquet")
    pairs = sorted(zip(table.question.map(str), table.answer.map(str), strict=True), key=lambda pair: _digest(pair[0]))
    rows = [
        read_example(tokenizer, _together(question, answer), (0, len(question)), longest=LONGEST_SOLUTION)
        for question, answer in pairs
    ]
    return [row for row in rows if row is not None]


def problems(tokenizer: PreTrainedTokenizerBase, code: str) -> dict[str, Examples]:
    """Read problems in a language with English solutions: ``both``, ``tuning`` and ``test``, of different problems."""
    questions = pd.read_parquet(DATA / "mgsm" / "test.parquet")
    questions = questions[questions.lang == code].sort_values("idx")
    solved = pd.read_parquet(DATA / "gsm8k" / "test.parquet").head(len(questions))
    order = sorted(range(len(solved)), key=lambda index: _digest(str(solved.question.iloc[index])))
    rows: dict[str, Examples] = {"both": [], "tuning": [], "test": []}
    for place, index in enumerate(order):  # a problem is in the same part in every language
        question, answer = str(questions.question.iloc[index]), str(solved.answer.iloc[index])
        given = [text.replace(",", "") for text in (str(questions.answer.iloc[index]), str(solved.final.iloc[index]))]
        if given[0] != given[1]:
            raise SystemExit(f"problem {index} of MGSM must be that of GSM8K, got the answers {given}")
        row = read_example(tokenizer, _together(question, answer), (0, len(question)), longest=LONGEST)
        if row is not None:
            rows["both" if place < GATES else "tuning" if place < GATES + TUNING else "test"].append(row)
    return rows


def _together(question: str, answer: str) -> str:
    return f"{question}\n{CALCULATOR.sub('', answer)}"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
