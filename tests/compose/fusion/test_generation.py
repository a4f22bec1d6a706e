"""Generation with a cache gives what full forward passes give: one row or many, padded or not, greedy or by beams."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.fusion.families import DECODERS, PAD, family, ids
from compose.fusion.stacks import LEVELS, adapters_of, randomised
from flowra_compose.fusion import Arrow, Fusion, GateOptions, Routing, SpectR, StaticWeights, fuse, gates_for

NEW = 6
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@contextmanager
def fused(kind: str, routing: str) -> Iterator[tuple[Any, Fusion]]:
    model = family(kind)
    adapters = adapters_of(model, kind)
    updates = [one.updates for one in adapters.values()]
    chosen: Routing
    if routing == "static":
        chosen = StaticWeights([0.4, 0.9])
    elif routing in LEVELS:
        chosen = randomised(gates_for(model, adapters, GateOptions(level=routing)), size=1.0)
    else:
        chosen = Arrow(updates) if routing == "arrow" else SpectR(updates)
    with fuse(model, adapters, chosen) as fusion, torch.no_grad():
        yield model, fusion


def generated(model: Any, prompt: Tensor, mask: Tensor | None = None, **options: Any) -> Any:  # noqa: ANN401 - transformers
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt) if mask is None else mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **options,
    )


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows of ids, padded on the left to the longest, and their mask."""
    length = max(len(row) for row in rows)
    prompt = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=PAD) for row in rows])
    return prompt, (prompt != PAD).long()


@pytest.mark.parametrize("routing", [*LEVELS, "static", "arrow", "spectr"])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoding_with_a_cache_gives_the_logits_of_one_full_pass(kind: str, routing: str) -> None:
    with fused(kind, routing) as (model, _):
        found = generated(model, ids())
        full = model(found.sequences[:, :-1], use_cache=False).logits[:, -NEW:]
        uncached = generated(model, ids(), use_cache=False)
    torch.testing.assert_close(torch.stack(found.logits, dim=1).double(), full, **CLOSE)  # kept as float32
    assert torch.equal(found.sequences, uncached.sequences)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoding_with_a_cache_weighs_as_one_full_pass_does(kind: str, level: str) -> None:
    with fused(kind, level) as (model, fusion):
        with fusion.recording() as step_by_step:
            found = generated(model, ids())
        with fusion.recording() as at_once:
            model(found.sequences[:, :-1])
    assert [each.shape[1] for each in next(iter(step_by_step.weights.values()))] == [7] + [1] * (NEW - 1)
    torch.testing.assert_close(step_by_step.stacked(), at_once.stacked(), **CLOSE)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", DECODERS)
def test_a_row_alone_and_in_a_batch_padded_on_the_left_is_continued_alike(kind: str, level: str) -> None:
    rows = [ids(size=1, length=length, seed=length)[0] for length in (3, 8, 5)]
    with fused(kind, level) as (model, _):
        prompt, mask = padded(rows)
        together = generated(model, prompt, mask)
        for index, row in enumerate(rows):
            alone = generated(model, row[None])
            assert torch.equal(together.sequences[index, -NEW:], alone.sequences[0, -NEW:])
            logits = torch.stack(together.logits, dim=1)[index : index + 1]
            torch.testing.assert_close(logits, torch.stack(alone.logits, dim=1), **CLOSE)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_of_beams_are_those_of_full_passes(kind: str, level: str) -> None:
    with fused(kind, level) as (model, _):
        found = generated(model, ids(size=2), num_beams=3, num_return_sequences=3, length_penalty=0.0)
        logits = model(found.sequences[:, :-1], use_cache=False).logits[:, -NEW:]
    chosen = torch.log_softmax(logits, dim=-1).gather(-1, found.sequences[:, -NEW:, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores.double(), chosen, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found.sequences[0], found.sequences[1])


def test_an_empty_prompt_begins_with_the_first_token_of_the_model() -> None:
    with fused("llama", "layer") as (model, fusion), fusion.recording() as record:
        found = model.generate(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert found.shape == (1, 4)
    assert [each.shape for each in next(iter(record.weights.values()))] == [(1, 1, 2)] * 3


def test_generation_leaves_the_model_as_it_was() -> None:
    model = family("llama")
    before = model(ids()).logits
    adapters = adapters_of(model, "llama")
    with fuse(model, adapters, gates_for(model, adapters)), torch.no_grad():
        generated(model, ids())
    assert torch.equal(model(ids()).logits, before)
