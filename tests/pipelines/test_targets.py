import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, GPT2Config

from flowra_adapters import attach, match_modules
from flowra_pipelines.errors import UserError
from flowra_pipelines.layer_names import layers_called
from flowra_pipelines.progress import console
from flowra_pipelines.targets import show_targets, targets_of
from flowra_testing.tiny_models import bert_classifier, llama_causal_lm
from flowra_testing.tiny_runs import write_tiny_bert, write_tiny_llama


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
    assert set(found.others) == {"Embedding", "LayerNorm"}


def test_the_cost_is_what_an_adapter_of_rank_one_holds(bert: Path) -> None:
    found = targets_of(str(bert))
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    attached = attach(model, dict.fromkeys((name for target in found.targets for name in target.names), 1))
    assert sum(one.num_parameters() for one in attached.values()) == found.cost_per_rank
    for target in found.targets:
        assert {attached[name].cost_per_rank for name in target.names} == {target.cost_per_rank}


def test_every_parameter_is_in_one_place(bert: Path) -> None:
    found = targets_of(str(bert))
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    linear = sum(p.numel() for t in found.targets for n in t.names for p in model.get_submodule(n).parameters())
    assert linear + sum(found.others.values()) == found.base_parameters


def test_the_output_layer_of_a_language_model_is_not_offered(tmp_path: Path) -> None:
    found = targets_of(str(write_tiny_llama(tmp_path / "llama")))
    names = [name for target in found.targets for name in target.names]
    assert "model.layers.0.mlp.down_proj" in names
    assert "lm_head" not in names
    assert found.heads == ()


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
    assert "Cannot carry an adapter yet: Embedding" in text


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
