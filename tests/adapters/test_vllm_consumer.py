"""An export means the same to a reader that follows vLLM's rules."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowra_adapters import AdapterCheckpoint, attach, save_adapter, write_checkpoint
from flowra_adapters.peft_writer import VLLM_RANKS
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import batch, llama_causal_lm
from flowra_testing.vllm_rules import MAX_LORA_RANKS, read_as_vllm, serve

UNEQUAL = {"q_proj": 4, "v_proj": 2, "model.layers.0.mlp.down_proj": 7, "model.layers.1.self_attn.v_proj": 0}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(**batch()).logits
    assert isinstance(found, Tensor)
    return found


@pytest.fixture(params=["lora", "rslora"])
def adapted(request: pytest.FixtureRequest) -> nn.Module:
    model = llama_causal_lm()
    for seed, one in enumerate(attach(model, UNEQUAL, method=request.param, alpha=3.0).values()):
        randomise(one, seed=seed)
    return model


def test_an_export_gives_equal_logits(adapted: nn.Module, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path, task_type="CAUSAL_LM", unit_scale=True)
    base = llama_causal_lm()
    before = logits(base)
    updates = read_as_vllm(tmp_path, modules=MODULES, max_lora_rank=8)
    assert serve(base, updates) == len(updates) == 4
    torch.testing.assert_close(logits(base), logits(adapted), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, logits(adapted), atol=1e-2)


def test_a_checkpoint_would_be_mis_scaled_which_is_why_exports_exist(adapted: nn.Module, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path, task_type="CAUSAL_LM")
    base = llama_causal_lm()
    serve(base, read_as_vllm(tmp_path, modules=MODULES, max_lora_rank=8))
    assert not torch.allclose(logits(base), logits(adapted), atol=1e-3)


def test_the_largest_rank_must_fit_the_server(adapted: nn.Module, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path, unit_scale=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 7
    with pytest.raises(ValueError, match="rank 7 is greater than max_lora_rank 1"):
        read_as_vllm(tmp_path, modules=MODULES, max_lora_rank=1)


@pytest.mark.parametrize("method", ["lora", "rslora", "svd", "svd_masked", "flora"])
def test_what_is_written_for_vllm_has_one_allowed_rank_and_equal_logits(tmp_path: Path, method: str) -> None:
    model = llama_causal_lm()
    ranks = {**UNEQUAL, "embed_tokens": 3, "model.layers.1.mlp.up_proj": 9}
    for seed, one in enumerate(attach(model, ranks, method=method, alpha=3.0).values()):
        randomise(one, seed=seed)
    assert save_adapter(model, tmp_path, task_type="CAUSAL_LM", consumer="vllm") == {}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    base = llama_causal_lm()
    updates = read_as_vllm(tmp_path, modules=(*MODULES, "embed_tokens"), max_lora_rank=16)
    assert {update.lora_a.shape[0] for update in updates.values()} == {16}
    assert serve(base, updates) == len(updates) == 6
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-4)


def test_rank_1_is_not_filled_up_for_vllm_has_buffers_of_it(tmp_path: Path) -> None:
    model = llama_causal_lm()
    for seed, one in enumerate(attach(model, {"q_proj": 1}).values()):
        randomise(one, seed=seed)
    save_adapter(model, tmp_path, consumer="vllm")
    base = llama_causal_lm()
    updates = read_as_vllm(tmp_path, modules=MODULES, max_lora_rank=1)
    assert {update.lora_a.shape[0] for update in updates.values()} == {1}
    assert serve(base, updates) > 0
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-4)


def test_the_ranks_written_for_vllm_are_those_it_takes() -> None:
    assert VLLM_RANKS == MAX_LORA_RANKS


def test_dora_is_cut_for_vllm_and_the_error_is_that_of_the_weights(tmp_path: Path) -> None:
    model = llama_causal_lm()
    for seed, one in enumerate(attach(model, {"q_proj": 4, "v_proj": 2}, method="dora").values()):
        randomise(one, seed=seed)
    with pytest.raises(TypeError, match="Give a rank or an energy"):
        save_adapter(model, tmp_path, consumer="vllm")
    errors = save_adapter(model, tmp_path, consumer="vllm", rank=32)
    assert max(errors.values()) < 1e-5  # 32 is all that there is
    base = llama_causal_lm()
    serve(base, read_as_vllm(tmp_path, modules=MODULES, max_lora_rank=32))
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-4)
    errors = save_adapter(model, tmp_path, consumer="vllm", rank=8)
    assert 0.01 < min(errors.values()) <= max(errors.values()) < 1


class Mixed(nn.Module):
    """A layer of each kind that vLLM has no LoRA of, and one that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3)
        self.attn = nn.MultiheadAttention(6, 2)
        self.experts = nn.ParameterDict({"up": torch.zeros(4, 6)})


@pytest.mark.parametrize(
    ("ranks", "options", "reason"),
    [
        ({"q_proj": 2, "conv": 2}, {}, "'conv': it does not serve convolutions"),
        ({"q_proj": 2, "attn.in_proj_weight": 2}, {}, "'attn': it does not serve raw parameters and attention"),
        ({"q_proj": 2, "experts.up": 2}, {}, "'experts.up': it does not serve raw parameters"),
        ({"q_proj": 2}, {"bias": "adapted"}, "'q_proj.bias': it does not serve biases"),
        ({"q_proj": 2}, {"modules_to_save": ["conv"]}, "'conv': it does not serve trained modules"),
    ],
    ids=["conv", "attention", "parameter", "bias", "trained"],
)
def test_what_vllm_does_not_serve_is_refused_with_the_reason(
    tmp_path: Path, ranks: dict[str, int], options: dict[str, Any], reason: str
) -> None:
    model = Mixed()
    attach(model, ranks, **options)
    saved = options.get("modules_to_save", [])
    with pytest.raises(ValueError, match=f"adapter must be one that vLLM serves, got {reason}"):
        save_adapter(model, tmp_path / "adapter", modules_to_save=saved, consumer="vllm")
    assert not (tmp_path / "adapter").exists()


def test_a_rank_beyond_all_of_vllm_s_is_refused(tmp_path: Path) -> None:
    wide = AdapterCheckpoint(factors={"q_proj": (torch.ones(513, 600), torch.ones(600, 513))}, scalings={"q_proj": 1.0})
    with pytest.raises(ValueError, match="rank must be at most 512 for vLLM, got 513"):
        write_checkpoint(wide, tmp_path, consumer="vllm")


def test_a_trained_head_is_refused(tmp_path: Path) -> None:
    model = llama_causal_lm()
    attach(model, {"q_proj": 2}, modules_to_save=["lm_head"])
    save_adapter(model, tmp_path, modules_to_save=["lm_head"], unit_scale=True)
    with pytest.raises(ValueError, match="modules_to_save"):
        read_as_vllm(tmp_path, modules=MODULES, max_lora_rank=8)
