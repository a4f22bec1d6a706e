import math

import pytest

from flowra_analysis import LAYER_TYPES, FlowProfile, ModuleProfile, layer_type, summarise

BERT = {
    "attention.self.query": "Q",
    "attention.self.key": "K",
    "attention.self.value": "V",
    "attention.output.dense": "O",
    "crossattention.output.dense": "O",
    "intermediate.dense": "up",
    "output.dense": "down",
}
ARCHITECTURES: dict[str, dict[str, str]] = {  # the names of transformers 5, of timm and of torch's own attention
    "BERT": {
        "bert.embeddings.word_embeddings": "embedding",
        "bert.embeddings.position_embeddings": "embedding",
        **{f"bert.encoder.layer.0.{name}": kind for name, kind in BERT.items()},
        "bert.pooler.dense": "other",
        "cls.predictions.transform.dense": "other",
        "cls.predictions.decoder": "other",
        "classifier": "other",
    },
    "RoBERTa": {
        **{f"roberta.encoder.layer.11.{name}": kind for name, kind in BERT.items()},
        "lm_head.dense": "other",
        "classifier.dense": "other",
        "classifier.out_proj": "other",
    },
    "DistilBERT": {
        "distilbert.transformer.layer.0.attention.q_lin": "Q",
        "distilbert.transformer.layer.0.attention.k_lin": "K",
        "distilbert.transformer.layer.0.attention.v_lin": "V",
        "distilbert.transformer.layer.0.attention.out_lin": "O",
        "distilbert.transformer.layer.0.ffn.lin1": "up",
        "distilbert.transformer.layer.0.ffn.lin2": "down",
        "pre_classifier": "other",
    },
    "DeBERTa": {
        "deberta.encoder.layer.0.attention.self.query_proj": "Q",
        "deberta.encoder.layer.0.attention.self.key_proj": "K",
        "deberta.encoder.layer.0.attention.self.value_proj": "V",
        "deberta.encoder.layer.0.attention.self.in_proj": "QKV",
        "deberta.encoder.layer.0.attention.self.pos_key_proj": "other",
        "deberta.encoder.layer.0.attention.self.pos_q_proj": "other",
        "deberta.encoder.layer.0.attention.output.dense": "O",
        "deberta.encoder.rel_embeddings": "embedding",
    },
    "ALBERT": {
        "encoder.albert_layer_groups.0.albert_layers.0.attention.query": "Q",
        "encoder.albert_layer_groups.0.albert_layers.0.attention.dense": "O",
        "encoder.albert_layer_groups.0.albert_layers.0.ffn": "up",
        "encoder.albert_layer_groups.0.albert_layers.0.ffn_output": "down",
        "encoder.embedding_hidden_mapping_in": "other",
    },
    "ModernBERT": {
        "embeddings.tok_embeddings": "embedding",
        "layers.0.attn.Wqkv": "QKV",
        "layers.0.attn.Wo": "O",
        "layers.0.mlp.Wi": "gate+up",
        "layers.0.mlp.Wo": "down",
    },
    "Llama": {
        "model.embed_tokens": "embedding",
        "model.layers.29.self_attn.q_proj": "Q",
        "model.layers.29.self_attn.k_proj": "K",
        "model.layers.29.self_attn.v_proj": "V",
        "model.layers.29.self_attn.o_proj": "O",
        "model.layers.29.mlp.gate_proj": "gate",
        "model.layers.29.mlp.up_proj": "up",
        "model.layers.29.mlp.down_proj": "down",
        "lm_head": "other",
    },
    "Phi-3, Mixtral": {
        "model.layers.0.self_attn.qkv_proj": "QKV",
        "model.layers.0.mlp.gate_up_proj": "gate+up",
        "model.layers.0.block_sparse_moe.experts.3.w1": "gate",
        "model.layers.0.block_sparse_moe.experts.3.w2": "down",
        "model.layers.0.block_sparse_moe.experts.3.w3": "up",
        "model.layers.0.block_sparse_moe.gate": "other",
    },
    "GPT-2": {
        "transformer.wte": "embedding",
        "transformer.wpe": "embedding",
        "transformer.h.0.attn.c_attn": "QKV",
        "transformer.h.0.attn.c_proj": "O",
        "transformer.h.0.crossattention.q_attn": "Q",
        "transformer.h.0.crossattention.c_proj": "O",
        "transformer.h.0.mlp.c_fc": "up",
        "transformer.h.0.mlp.c_proj": "down",
    },
    "parts of fused layers": {
        "transformer.h.0.attn.c_attn:q": "Q",
        "transformer.h.0.attn.c_attn:k": "K",
        "gpt_neox.layers.0.attention.query_key_value:v": "V",
        "model.layers.0.mlp.gate_up_proj:gate": "gate",
        "model.layers.0.mlp.gate_up_proj:up": "up",
        "model.layers.0.mlp.experts.down_proj:7": "down",
    },
    "GPT-NeoX, BLOOM, GPT-J": {
        "gpt_neox.embed_in": "embedding",
        "gpt_neox.layers.0.attention.query_key_value": "QKV",
        "gpt_neox.layers.0.attention.dense": "O",
        "gpt_neox.layers.0.mlp.dense_h_to_4h": "up",
        "gpt_neox.layers.0.mlp.dense_4h_to_h": "down",
        "embed_out": "other",
        "h.0.self_attention.dense": "O",
        "h.0.attn.out_proj": "O",
        "h.0.mlp.fc_in": "up",
        "h.0.mlp.fc_out": "down",
    },
    "OPT, BART": {
        "model.decoder.embed_positions": "embedding",
        "model.decoder.layers.0.self_attn.k_proj": "K",
        "model.decoder.layers.0.self_attn.out_proj": "O",
        "model.decoder.layers.0.encoder_attn.out_proj": "O",
        "model.decoder.layers.0.fc1": "up",
        "model.decoder.layers.0.fc2": "down",
        "model.decoder.project_in": "other",
        "classification_head.out_proj": "other",
        "model.shared": "embedding",
    },
    "T5": {
        "shared": "embedding",
        "encoder.block.0.layer.0.SelfAttention.q": "Q",
        "encoder.block.0.layer.0.SelfAttention.o": "O",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "embedding",
        "decoder.block.0.layer.1.EncDecAttention.v": "V",
        "decoder.block.0.layer.1.EncDecAttention.o": "O",
        "encoder.block.0.layer.1.DenseReluDense.wi": "up",
        "encoder.block.0.layer.1.DenseReluDense.wi_0": "gate",
        "encoder.block.0.layer.1.DenseReluDense.wi_1": "up",
        "encoder.block.0.layer.1.DenseReluDense.wo": "down",
    },
    "ViT": {
        "vit.embeddings.patch_embeddings.projection": "embedding",
        "vit.layers.0.attention.q_proj": "Q",
        "vit.layers.0.attention.o_proj": "O",
        "vit.encoder.layer.0.attention.attention.query": "Q",
        "vit.encoder.layer.0.attention.output.dense": "O",
        "vit.layers.0.mlp.fc1": "up",
        "vit.layers.0.mlp.fc2": "down",
        "patch_embed.proj": "embedding",
        "blocks.0.attn.qkv": "QKV",
        "blocks.0.attn.proj": "O",
        "layers.0.self_attn.in_proj_weight": "QKV",
    },
    "no transformer": {
        "layer1.0.conv1": "other",
        "fc1": "other",
        "0": "other",
        "": "other",
        "mixer.in_proj": "other",
        "monkey": "other",
        "norm_q": "other",
    },
}
NAMES = [(family, name, kind) for family, names in ARCHITECTURES.items() for name, kind in names.items()]


@pytest.mark.parametrize(("family", "name", "kind"), NAMES, ids=[f"{family} {name}" for family, name, _ in NAMES])
def test_a_layer_has_the_type_its_architecture_gives_it(family: str, name: str, kind: str) -> None:
    assert layer_type(name) == kind


def test_every_type_is_listed_and_met() -> None:
    assert {kind for _, _, kind in NAMES} == set(LAYER_TYPES)


def test_a_name_of_any_length_is_told_at_once() -> None:
    assert layer_type("attn" * 10**6) == "other"
    assert layer_type("0." * 10**6 + "q_proj") == "Q"


def profile(**values: float) -> FlowProfile:
    modules = {
        name.replace("_0_", ".0.").replace("_1_", ".1."): ModuleProfile(
            shape=(2, 2), cost_per_rank=4, statistics={"psi": value}
        )
        for name, value in values.items()
    }
    return FlowProfile(modules=modules, base_parameters=4)


def test_summaries_are_mean_population_spread_count_and_share_in_the_listed_order() -> None:
    found = summarise(profile(h_0_fc2=0.5, h_0_q_proj=0.25, h_1_q_proj=0.75, head=0.5), "psi")
    assert list(found) == ["Q", "down", "other"]
    assert (found["Q"].mean, found["Q"].spread, found["Q"].count, found["Q"].share) == (0.5, 0.25, 2, 0.5)
    assert (found["down"].mean, found["down"].spread, found["down"].count, found["down"].share) == (0.5, 0, 1, 0.25)
    assert math.fsum(each.share or 0 for each in found.values()) == 1


def test_modules_without_the_statistic_do_not_count() -> None:
    bare = {"h.0.k_proj": ModuleProfile(shape=(2, 2), cost_per_rank=4)}
    whole = profile(h_0_q_proj=0.5)
    found = summarise(FlowProfile(modules={**whole.modules, **bare}, base_parameters=4), "psi")
    assert {kind: each.count for kind, each in found.items()} == {"Q": 1}


def test_there_are_no_shares_of_nothing() -> None:
    assert [each.share for each in summarise(profile(h_0_q_proj=0.0, head=0.0), "psi").values()] == [None, None]
    assert summarise(profile(h_0_q_proj=1e308, head=1.7e308), "psi")["Q"].share is None


def test_an_unknown_statistic_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="statistic must be one of the profile's, got 'ps'; nearest: psi"):
        summarise(profile(head=0.5), "ps")
