"""GPT-2's ``Conv1D`` is a linear layer with its weight transposed."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from flowra_adapters import (
    adaptable_modules,
    attach,
    linear_size,
    load_adapter,
    merge,
    read_checkpoint,
    save_adapter,
    unmerge,
)
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import VOCABULARY, batch, seeded

RANKS = {"c_attn": 3, "c_fc": 2, "transformer.h.1.mlp.c_proj": 5}


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    with seeded(0):
        return GPT2LMHeadModel(config).eval()


def adapted() -> nn.Module:
    model = gpt2()
    for seed, one in enumerate(attach(model, RANKS, scaling=1.25).values()):
        randomise(one, seed=seed)
    return model


def logits(model: Callable[..., object]) -> Tensor:
    with torch.no_grad():
        found = model(**batch()).logits  # type: ignore[attr-defined]
    assert isinstance(found, Tensor)
    return found


def test_its_size_is_output_by_input() -> None:
    layers = adaptable_modules(gpt2())
    assert linear_size(layers["transformer.h.0.attn.c_attn"]) == (48, 16)
    assert linear_size(layers["transformer.h.0.mlp.c_proj"]) == (16, 64)


def test_merging_gives_the_unmerged_logits_and_unmerging_the_bits() -> None:
    model = adapted()
    base, unmerged = gpt2().transformer.h[0].attn.c_attn.weight, logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(model.get_submodule("transformer.h.0.attn.c_attn").weight, base)


@pytest.mark.filterwarnings("error:fan_in_fan_out")
@pytest.mark.parametrize("unit_scale", [False, True], ids=["checkpoint", "export"])
def test_peft_reads_it_without_correcting_us_and_gives_equal_logits(tmp_path: Path, unit_scale: bool) -> None:
    model = adapted()
    save_adapter(model, tmp_path, task_type="CAUSAL_LM", unit_scale=unit_scale)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), logits(model), rtol=1e-5, atol=1e-5)


def test_we_read_what_peft_writes(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(gpt2(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            randomise(nn.ParameterList([parameter]), seed=len(name))
    theirs.save_pretrained(tmp_path)
    model = gpt2()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert read_checkpoint(tmp_path).fan_in_fan_out


def test_an_adapter_of_the_transposed_size_does_not_fit(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    other = gpt2()
    for block in other.transformer.h:
        block.attn.c_attn = nn.Linear(48, 16)
    with pytest.raises(ValueError, match="adapter must belong to this base"):
        load_adapter(other, tmp_path)
