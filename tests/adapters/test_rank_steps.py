"""Ranks filled up to a ladder: the same products, and the real peft gives the same outputs."""

from pathlib import Path

import peft
import pytest
import torch

from flowra_adapters import AdapterCheckpoint, attach, checkpoint_of, pad_ranks, write_checkpoint
from flowra_testing.adapter_table import BLOCKS, CONVOLUTIONS, EMBEDDINGS, LINEAR
from flowra_testing.asserts import build_case, randomise

KINDS = {**LINEAR, **CONVOLUTIONS, **EMBEDDINGS, **BLOCKS}


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out", "ignore:.*groups > 1")
@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("linear", 4),
        ("conv1d_of_transformers", 4),
        ("conv2d", 4),
        ("conv2d_grouped", 8),
        ("conv2d_depthwise", 24),
        ("embedding", 4),
        ("attention", 4),
        ("mixtral_expert", 4),
    ],
)
def test_peft_gives_the_same_output_at_the_longer_rank(tmp_path: Path, kind: str, rank: int) -> None:
    case = build_case(KINDS[kind], torch.float32)
    for one in attach(case.model, {case.site: KINDS[kind].rank}, scaling=1.5).values():
        randomise(one)
    padded = pad_ranks(checkpoint_of(case.model), 4)
    assert [padded.rank(name) for name in padded.factors] == [rank]
    write_checkpoint(padded, tmp_path, consumer="peft")
    theirs = peft.PeftModel.from_pretrained(build_case(KINDS[kind], torch.float32).model, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(case.x), case.model(case.x), rtol=2e-5, atol=2e-5)


def test_a_rank_on_the_ladder_stays_and_a_step_below_1_is_refused() -> None:
    checkpoint = AdapterCheckpoint(factors={"q": (torch.ones(4, 3), torch.ones(2, 4))}, scalings={"q": 1.0})
    for step in (1, 2, 4):
        assert pad_ranks(checkpoint, step).rank("q") == 4
    assert pad_ranks(checkpoint, 3).rank("q") == 6
    with pytest.raises(ValueError, match="step must be at least 1, got 0"):
        pad_ranks(checkpoint, 0)
