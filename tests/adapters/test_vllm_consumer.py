"""An export means the same to a reader that follows vLLM's rules."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowra_adapters import attach, save_adapter
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import batch, llama_causal_lm
from flowra_testing.vllm_rules import read_as_vllm, serve

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


def test_a_trained_head_is_refused(tmp_path: Path) -> None:
    model = llama_causal_lm()
    attach(model, {"q_proj": 2}, modules_to_save=["lm_head"])
    save_adapter(model, tmp_path, modules_to_save=["lm_head"], unit_scale=True)
    with pytest.raises(ValueError, match="modules_to_save"):
        read_as_vllm(tmp_path, modules=MODULES, max_lora_rank=8)
