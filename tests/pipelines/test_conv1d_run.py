"""A run on GPT-2, whose layers are ``Conv1D`` and whose query, key and value are one layer."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.stages.record import STAGES, StageResult, run_stage
from flowra_pipelines.stages.setting import base_model, load_setting
from flowra_pipelines.stages.table import WORK
from flowra_testing.tiny_models import seeded
from flowra_testing.tiny_runs import tiny_language_config


def unlogged(result: StageResult, folder: Path) -> None:
    return None


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("gpt2")
    content = tiny_language_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "eos_token_id": 2, "bos_token_id": 2}
    with seeded(0):
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    made = load_config({
        **content,
        "model": {"path": str(folder / "gpt2"), "task": "causal_lm"},
        "budget": "like r=2 on q,v",
        "training": {"steps": 10, "batch_size": 8, "learning_rate": 0.01},
        "allocation": {"solver": "exact"},
    })
    for name in STAGES:
        run_stage(name, WORK[name], made, log=unlogged)
    return made


def test_the_budget_is_that_of_the_fused_layers(config: RunConfig) -> None:
    plan = json.loads((config.folder / "allocate" / "plan.json").read_text())
    assert plan["budget"] == 2 * 2 * (96 + 32)
    assert plan["parameters"] <= plan["budget"]
    assert any(module["rank"] for module in plan["modules"].values())


def test_the_uniform_baseline_is_on_the_fused_layers(config: RunConfig) -> None:
    rows = json.loads((config.folder / "evaluate" / "metrics.json").read_text())["rows"]
    assert rows["uniform"]["title"] == "uniform LoRA r=2 on c_attn"
    assert rows["uniform"]["parameters"] == 512


def test_peft_gives_the_logits_of_the_merged_model(config: RunConfig) -> None:
    setting = load_setting(config)
    batch = setting.collate([setting.test[index] for index in range(4)])
    batch.pop("labels")
    theirs = PeftModel.from_pretrained(base_model(config, setting), config.folder / "merge" / "adapter").eval()
    merged = GPT2LMHeadModel.from_pretrained(config.folder / "merge" / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, merged(**batch).logits, rtol=1e-4, atol=1e-4)
