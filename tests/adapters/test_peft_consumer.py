"""The real peft reads what we write, and we read what it writes."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from flowra_adapters import attach, load_adapter, save_adapter
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import batch, bert_classifier, llama_causal_lm, mlp, nested

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
FORMS = pytest.mark.parametrize("unit_scale", [False, True], ids=["checkpoint", "export"])
BERT_RANKS = {"query": 2, "value": 3, "bert.encoder.layer.1.attention.self.query": 5, "intermediate.dense": 1}
LLAMA_RANKS = {"q_proj": 4, "v_proj": 2, "model.layers.0.mlp.down_proj": 7, "model.layers.1.self_attn.v_proj": 0}


def logits(model: Callable[..., object]) -> Tensor:
    with torch.no_grad():
        found = model(**batch()).logits  # type: ignore[attr-defined]
    assert isinstance(found, Tensor)
    return found


def adapt(model: nn.Module, ranks: Mapping[str, int], *, modules_to_save: tuple[str, ...] = ()) -> None:
    for seed, one in enumerate(attach(model, ranks, scaling=1.25, modules_to_save=modules_to_save).values()):
        randomise(one, seed=seed)
    for name in modules_to_save:
        randomise(model.get_submodule(name), seed=99)


def scalings_in(model: nn.Module) -> dict[str, float]:
    return {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@FORMS
def test_peft_gives_equal_logits_for_a_bert_classifier(tmp_path: Path, unit_scale: bool) -> None:
    model = bert_classifier()
    base = logits(model)
    adapt(model, BERT_RANKS, modules_to_save=("classifier",))
    save_adapter(model, tmp_path, modules_to_save=["classifier"], task_type="SEQ_CLS", unit_scale=unit_scale)
    assert not torch.allclose(logits(model), base, atol=1e-2)
    theirs = peft.PeftModel.from_pretrained(bert_classifier(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), **TOLERANCE)


@FORMS
def test_peft_gives_equal_logits_for_a_llama(tmp_path: Path, unit_scale: bool) -> None:
    model = llama_causal_lm()
    base = logits(model)
    adapt(model, LLAMA_RANKS)
    save_adapter(model, tmp_path, task_type="CAUSAL_LM", unit_scale=unit_scale)
    assert not torch.allclose(logits(model), base, atol=1e-2)
    theirs = peft.PeftModel.from_pretrained(llama_causal_lm(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), **TOLERANCE)


def test_an_export_has_scaling_one_everywhere_in_peft(tmp_path: Path) -> None:
    model = llama_causal_lm()
    adapt(model, LLAMA_RANKS)
    save_adapter(model, tmp_path, task_type="CAUSAL_LM", unit_scale=True)
    found = scalings_in(peft.PeftModel.from_pretrained(llama_causal_lm(), tmp_path))
    assert len(found) == 4
    assert set(found.values()) == {1.0}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 7


def test_a_checkpoint_keeps_each_scaling_in_peft(tmp_path: Path) -> None:
    model = llama_causal_lm()
    adapt(model, LLAMA_RANKS)
    save_adapter(model, tmp_path, task_type="CAUSAL_LM")
    found = scalings_in(peft.PeftModel.from_pretrained(llama_causal_lm(), tmp_path))
    assert set(found.values()) == {1.25}


@FORMS
@pytest.mark.parametrize("names", [("q", "block.q"), ("b.q", "z.b.q", "k"), ("a.q", "b.q", "b.a.q")], ids=str)
def test_a_name_that_ends_another_keeps_its_own_rank_and_scaling_in_peft(
    tmp_path: Path, names: tuple[str, ...], unit_scale: bool
) -> None:
    model = nested(*names)
    found = attach(model, {name: index + 1 for index, name in enumerate(names)})
    for index, one in enumerate(found.values()):
        randomise(one, seed=index)
        one.scaling = index + 0.5
    save_adapter(model, tmp_path, unit_scale=unit_scale)
    theirs = peft.PeftModel.from_pretrained(nested(*names), tmp_path)
    for name, one in found.items():
        layer = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.get_delta_weight("default"), one.delta_weight(), **TOLERANCE)
        if not unit_scale:
            assert layer.scaling["default"] == one.scaling


def test_a_module_whose_name_merely_ends_in_an_adapted_one_gets_an_update_of_zero_in_peft(tmp_path: Path) -> None:
    model = nested("q", "block.q")
    for one in attach(model, {"q": 2}).values():
        randomise(one)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # PEFT's target_modules mean name endings
        theirs = peft.PeftModel.from_pretrained(nested("q", "block.q"), tmp_path)
    layer = theirs.base_model.model.get_submodule("block.q")
    if isinstance(layer, LoraLayer):
        assert layer.get_delta_weight("default").count_nonzero() == 0


def written_by_peft(model: nn.Module, folder: Path, config: peft.LoraConfig) -> nn.Module:
    theirs = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha_over_r", "rslora"])
def test_an_adapter_written_by_peft_gives_equal_logits(tmp_path: Path, use_rslora: bool) -> None:
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=6,
        target_modules=["query", "value", "attention.output.dense"],
        rank_pattern={"layer.0.attention.self.query": 2, "value": 3},
        alpha_pattern={"layer.1.attention.self.query": 9, "attention.output.dense": 1},
        use_rslora=use_rslora,
    )
    theirs = written_by_peft(bert_classifier(), tmp_path, config)
    model = bert_classifier(seed=0)
    base = logits(model)
    found = load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), **TOLERANCE)
    assert not torch.allclose(logits(model), base, atol=1e-3)
    assert {name: one.scaling for name, one in found.items()} == pytest.approx(scalings_in(theirs))


def test_what_peft_wrote_and_we_wrote_again_still_gives_equal_logits_in_peft(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, rank_pattern={"q_proj": 2}, use_rslora=True)
    config.target_modules = {"q_proj", "o_proj"}
    theirs = written_by_peft(llama_causal_lm(), tmp_path / "theirs", config)
    ours = llama_causal_lm()
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours", task_type="CAUSAL_LM")
    again = peft.PeftModel.from_pretrained(llama_causal_lm(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs), **TOLERANCE)
    mine, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_an_adapter_of_a_changed_base_is_refused(tmp_path: Path, initialisation: str) -> None:
    theirs = peft.get_peft_model(
        mlp(), peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=initialisation)
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="init_lora_weights"):
        load_adapter(mlp(), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("layer_replication", [[0, 1]]), ("alora_invocation_tokens", [1]), ("use_qalora", True)],
    ids=lambda value: str(value),
)
def test_an_option_that_changes_the_meaning_is_refused(tmp_path: Path, key: str, value: object) -> None:
    theirs = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["up"]))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert key in config
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=rf"must be plain LoRA, got .*{key}"):
        load_adapter(mlp(), tmp_path)
