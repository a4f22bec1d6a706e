"""Sequences in which two skills take turns, and what a model loses on each of them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Examples", "Nats", "batch", "bootstrap", "mean_nats", "mean_of_runs", "nats", "read_example"]


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence."""

    tokens: tuple[int, ...]
    """The first is the beginning of a text."""
    first: tuple[bool, ...]
    """Whether each token is of the first skill; the others are of the second."""


Examples = list[Example]
Nats = list[tuple[float, int, float, int]]
"""For each sequence nats and tokens of the first skill, and of the second."""


def read_example(
    tokenizer: PreTrainedTokenizerBase, text: str, first: tuple[int, int], *, longest: int
) -> Example | None:
    """Tokenise a text whose characters from ``first[0]`` to ``first[1]`` are of the first skill; None if too long."""
    made = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    if len(made["input_ids"]) >= longest:
        return None
    assert tokenizer.bos_token_id is not None
    inside = [first[0] <= begin < first[1] for begin, _ in made["offset_mapping"]]
    return Example((tokenizer.bos_token_id, *made["input_ids"]), (False, *inside))


def batch(rows: Examples) -> dict[str, Tensor]:
    """Put rows into one batch, padded on the right; the loss leaves out padding."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[index, : len(row.tokens)] = 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


@torch.inference_mode()
def nats(model: nn.Module, rows: Examples) -> Nats:
    """Return the negative log-likelihood of each row, apart for the two skills."""
    found: dict[int, tuple[float, int, float, int]] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
    for start in range(0, len(order), 8):
        chosen = order[start : start + 8]
        inputs = batch([rows[index] for index in chosen])
        del inputs["labels"]
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        for place, index in enumerate(chosen):
            length = len(rows[index].tokens) - 1
            lost = nn.functional.cross_entropy(
                logits[place, :length].float(), inputs["input_ids"][place, 1 : length + 1], reduction="none"
            )
            found[index] = _by_skill(lost, rows[index])
    return [found[index] for index in range(len(rows))]


def _by_skill(lost: Tensor, row: Example) -> tuple[float, int, float, int]:
    inside = torch.tensor(row.first[1:])
    each = lost.double()
    return float(each[inside].sum()), int(inside.sum()), float(each[~inside].sum()), int((~inside).sum())


def mean_nats(found: Nats, skill: int | None = None) -> float:
    """Return nats per token: of the first skill (0), of the second (1), or of all."""
    at = (0, 2) if skill is None else (2 * skill,)
    return sum(row[index] for row in found for index in at) / sum(row[index + 1] for row in found for index in at)


def mean_of_runs(runs: list[Nats], skill: int | None = None) -> float:
    """Return the mean over runs of their nats per token."""
    return float(np.mean([mean_nats(run, skill) for run in runs]))


def bootstrap(one: list[Nats], other: list[Nats], draws: int = 10_000) -> tuple[float, float, float]:
    """Return the 95 % interval of the difference in nats per token, and a one-sided p of `one` not being better.

    Paired by sequence: nats summed over a sequence, averaged over runs, and sequences drawn again. p is at least
    1/(draws + 1), since what is there is one of the draws.
    """
    sums = [np.mean([[row[0] + row[2] for row in run] for run in runs], axis=0) for runs in (one, other)]
    tokens = np.array([row[1] + row[3] for row in one[0]])
    drawn = np.random.default_rng(0).integers(len(tokens), size=(draws, len(tokens)))
    differences = (sums[0] - sums[1])[drawn].sum(1) / tokens[drawn].sum(1)
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high), (int((differences >= 0).sum()) + 1) / (draws + 1)
