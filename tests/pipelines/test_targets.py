import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    GPT2Config,
    MixtralConfig,
    ResNetConfig,
)

from flowra_adapters import attach, detach, match_modules, sites
from flowra_pipelines.errors import UserError
from flowra_pipelines.layer_names import layers_called
from flowra_pipelines.progress import console
from flowra_pipelines.targets import show_targets, targets_of
from flowra_testing.tiny_models import bert_classifier, llama_causal_lm
from flowra_testing.tiny_runs import write_tiny_bert, write_tiny_llama


def write_tiny_resnet(folder: Path) -> Path:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3)
    config.architectures = ["ResNetForImageClassification"]
    config.save_pretrained(folder)
    return folder


def write_tiny_mixtral(folder: Path) -> Path:
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=30,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("targets") / "bert")


def test_layers_of_one_name_and_size_are_one_row(bert: Path) -> None:
    found = targets_of(str(bert))
    rows = {target.title: (len(target.names), target.out_features, target.in_features) for target in found.targets}
    assert rows["bert.encoder.layer.0–1.attention.self.query"] == (2, 32, 32)
    assert rows["bert.encoder.layer.0–1.intermediate.dense"] == (2, 64, 32)
    assert rows["bert.pooler.dense"] == (1, 32, 32)
    assert found.heads == ("classifier",)
    assert found.others == {}


def test_the_cost_is_what_an_adapter_of_rank_one_holds(bert: Path) -> None:
    found = targets_of(str(bert))
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    attached = attach(model, dict.fromkeys((name for target in found.targets for name in target.names), 1))
    assert sum(one.num_parameters() for one in attached.values()) == found.cost_per_rank
    for target in found.targets:
        assert {attached[name].cost_per_rank for name in target.names} == {target.cost_per_rank}


@pytest.mark.parametrize("write", [write_tiny_bert, write_tiny_llama, write_tiny_resnet, write_tiny_mixtral])
def test_every_parameter_is_in_one_place(write: Callable[[Path], Path], tmp_path: Path) -> None:
    found = targets_of(str(write(tmp_path / "model")))
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    held: dict[str, int] = {}
    for name, site in sites(model).items():
        held[name] = math.prod(site.operator.shape)
    prefix = f"{model.base_model_prefix}."
    whole = [name for target in (*found.targets, *found.more) if not target.part for name in target.names]
    assert len(whole) == len(set(whole))
    inside = [name.removeprefix(prefix) for name in whole if name.removeprefix(prefix) in held]
    stacks = {name.rpartition(":")[0] for name in held if ":" in name}
    assert {name for name in held if name not in stacks} == set(inside)


def test_the_output_layer_of_a_language_model_is_not_offered(tmp_path: Path) -> None:
    found = targets_of(str(write_tiny_llama(tmp_path / "llama")))
    names = [name for target in found.targets for name in target.names]
    assert "model.layers.0.mlp.down_proj" in names
    assert "lm_head" not in names
    assert found.heads == ()


def test_a_norm_is_one_item_and_costs_its_gain_and_shift(bert: Path) -> None:
    found = targets_of(str(bert))
    norm = next(target for target in found.more if target.title == "bert.encoder.layer.0–1.output.LayerNorm")
    assert (norm.method, norm.applied, norm.items, norm.cost_per_rank) == ("norm", "materialised", 2, 64)
    at = "bert.encoder.layer.{}.output.LayerNorm{}"
    assert norm.names == tuple(at.format(block, end) for block in (0, 1) for end in ("", ".bias"))


def test_embeddings_are_offered_and_biases_are_one_item(bert: Path) -> None:
    found = {target.title: target for target in targets_of(str(bert)).more}
    words = found["bert.embeddings.word_embeddings"]
    assert (words.method, words.applied, words.cost_per_rank) == ("lora", "added", sum(words.shape))
    biases = found["*.bias"]
    assert (biases.method, biases.items, len(biases.names)) == ("bitfit", 1, 13)


def test_parts_of_a_fused_projection_are_offered_beside_it(tmp_path: Path) -> None:
    GPT2Config(n_embd=16, n_layer=2, n_head=2, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    parts = [target for target in targets_of(str(tmp_path)).more if target.part]
    assert [target.title for target in parts] == [f"transformer.h.0–1.attn.c_attn:{part}" for part in "qkv"]
    assert {(target.shape, target.cost_per_rank) for target in parts} == {((16, 16), 32)}


def test_experts_are_one_line_and_each_has_an_adapter_of_its_own(tmp_path: Path) -> None:
    found = targets_of(str(write_tiny_mixtral(tmp_path)))
    experts = next(target for target in found.more if "gate_up_proj" in target.title)
    assert experts.title == "model.layers.0–1.mlp.experts.gate_up_proj:0–29"
    assert (experts.items, experts.method, experts.applied, experts.part) == (60, "lora", "materialised", False)
    assert experts.shape == (48, 16)


def test_a_model_of_no_task_of_ours_is_listed_too(tmp_path: Path) -> None:
    found = targets_of(str(write_tiny_resnet(tmp_path)))
    methods = {target.method for target in found.more}
    assert methods == {"flora", "lora", "norm", "bitfit"}
    first = next(target for target in found.more if target.title == "resnet.embedder.embedder.convolution")
    assert (first.shape, first.method, first.applied) == ((8, 3, 7, 7), "flora", "added")
    assert found.heads == ()


@pytest.mark.parametrize("write", [write_tiny_bert, write_tiny_resnet, write_tiny_mixtral])
def test_the_adapter_that_is_named_is_the_one_that_is_attached_and_costs_what_is_said(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    found = targets_of(str(write(tmp_path)))
    config = AutoConfig.from_pretrained(tmp_path)
    text = config.architectures == ["BertModel"]
    kind = transformers.BertForSequenceClassification if text else getattr(transformers, config.architectures[0])
    model = kind(config)
    for target in (*found.targets, *found.more):
        method = "bitfit" if target.method == "bitfit" else "polymorphic"
        attached = attach(model, dict.fromkeys(target.names, 1), method=method)
        assert sum(one.num_parameters() for one in attached.values()) == target.items * target.cost_per_rank
        detach(model)


def test_json_has_what_the_table_has(
    bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = targets_of(str(bert))
    monkeypatch.setattr(console, "file", sys.stdout)
    show_targets(str(bert), None, as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["cost_per_rank"] == found.cost_per_rank
    assert [target["title"] for target in content["more"]] == [target.title for target in found.more]
    assert content["targets"][0]["method"] == "lora"


def test_gpt2_needs_no_weights_and_its_conv1d_is_listed_output_by_input(tmp_path: Path) -> None:
    GPT2Config(n_embd=16, n_layer=2, n_head=2, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    fused = next(target for target in targets_of(str(tmp_path)).targets if "c_attn" in target.title)
    assert (fused.type, fused.out_features, fused.in_features) == ("Conv1D", 48, 16)


def test_the_table_says_how_much_everything_costs(
    bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = targets_of(str(bert))
    monkeypatch.setattr(console, "file", sys.stdout)
    show_targets(str(bert), None, as_json=False)
    text = " ".join(capsys.readouterr().out.split())
    assert f"One unit of rank everywhere: {found.cost_per_rank:,} parameters" in text
    assert "bitfit *" in text
    assert "* Materialised: " in text


def test_mistakes_are_one_line(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(UserError, match=r"task must be one of .*, got 'translation'"):
        targets_of(str(bert), "translation")
    with pytest.raises(UserError, match="model must bring a configuration"):
        targets_of(str(tmp_path))


@pytest.mark.parametrize(("wanted", "tails"), [(["q", "v"], {"query", "value"}), (["o"], {"attention.output.dense"})])
def test_roles_mean_the_architecture_s_own_layers(wanted: list[str], tails: set[str]) -> None:
    found = layers_called(bert_classifier(), wanted)
    assert len(found) == 2 * len(tails)
    assert all(any(name.endswith(f".{tail}") for tail in tails) for name in found)


def test_roles_work_on_decoders_and_patterns_go_through() -> None:
    model = llama_causal_lm()
    assert layers_called(model, ["q", "k", "v", "o"]) == match_modules(model, ["*self_attn.*"])
    assert layers_called(model, ["down_proj"]) == match_modules(model, ["down_proj"])


def test_a_role_without_a_layer_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"layer 'q' must have a usual name .*Layers here: .*dense"):
        layers_called(bert_classifier().bert.encoder.layer[0].intermediate, ["q"])
