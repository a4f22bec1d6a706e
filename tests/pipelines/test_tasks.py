"""What differs between kinds of tasks, on small models of several architectures."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)

from flowra_adapters import attach, save_adapter
from flowra_pipelines.config_sections import ModelConfig
from flowra_pipelines.data import TextData
from flowra_pipelines.errors import UserError
from flowra_pipelines.tasks import TASKS, load_model
from flowra_testing.tiny_runs import write_tiny_bert

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 40,
    "max_position_embeddings": 20,
}
ARCHITECTURES: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "bert": (BertConfig(**SMALL), ["classifier"]),
    "roberta": (RobertaConfig(**SMALL), ["classifier"]),
    "distilbert": (
        DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=40),
        ["pre_classifier", "classifier"],
    ),
    "deberta": (DebertaV2Config(**SMALL), ["pooler", "classifier"]),
    "bart": (
        BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            vocab_size=40,
        ),
        ["classification_head"],
    ),
    "llama": (LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0), ["score"]),
    "gpt2": (
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        ["score"],
    ),
}
DATA = TextData(train=[], test=[], labels=("no", "perhaps", "yes"), numbers=None, left_out={})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_is_all_that_is_not_the_base(name: str) -> None:
    config, expected = ARCHITECTURES[name]
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    for task in ("sequence_classification", "regression"):
        assert TASKS[task].heads(model) == expected


@pytest.mark.parametrize("name", ["distilbert", "roberta"])
def test_a_head_of_several_layers_is_exported_whole(name: str, tmp_path: Path) -> None:
    config, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    AutoModel.from_config(config, **({"add_pooling_layer": False} if name == "roberta" else {})).save_pretrained(
        tmp_path / "base"
    )
    run = ModelConfig(path=str(tmp_path / "base"))
    ours = load_model(run, data=DATA, seed=1)
    heads = TASKS[run.task].heads(ours)
    attach(ours, {"*q_lin" if name == "distilbert" else "*query": 1}, modules_to_save=heads)
    save_adapter(ours, tmp_path / "adapter", modules_to_save=heads, task_type="SEQ_CLS")
    torch.manual_seed(2)  # another random head
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokens = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(input_ids=tokens).logits, ours.eval()(input_ids=tokens).logits)


def test_a_base_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    BertModel(BertConfig(**SMALL), add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"all weights but its head's, got none for 'bert\.pooler\.dense\.bias'"
    ) as caught:
        load_model(ModelConfig(path=str(tmp_path)), data=DATA, seed=0)
    assert "\n" not in str(caught.value)


def test_a_head_for_other_classes_is_refused(tmp_path: Path) -> None:
    write_tiny_bert(tmp_path)
    BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"got 'classifier\.bias' of shape \(5,\) for \(3,\)") as caught:
        load_model(ModelConfig(path=str(tmp_path)), data=DATA, seed=0)
    assert "\n" not in str(caught.value)
