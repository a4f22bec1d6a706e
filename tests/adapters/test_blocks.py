"""Adapters inside blocks that read their layers' parameters themselves, share them, or call them in unusual ways."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from flowra_adapters import LoRA, adapters, attach, create_missing_biases, detach, merge, sites, unmerge
from flowra_testing.tiny_blocks import MIXTURES, ExpertList, Mixture, SelfAttention
from flowra_testing.tiny_models import VOCABULARY, batch, llama_causal_lm, seeded


def fill(model: nn.Module) -> None:
    """Give every adapter tensor values of its own."""
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters(model).values():
        for parameter in adapter.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)


def merged_by_hand(model: nn.Module) -> nn.Module:
    """A copy without adapters, with their updates in its parameters."""
    copy = deepcopy(model)
    found = adapters(copy)
    places = sites(copy)
    detach(copy)
    with torch.no_grad():
        for name, adapter in found.items():
            site = places[name]
            weight = site.owner._parameters[site.parameter]
            assert weight is not None
            part = weight if site.part is None else site.part.of(weight)
            part.add_(site.operator.to_stored(adapter.delta_weight()))
    return copy


# Attention.


def test_the_same_update_of_an_attention_s_input_projection_gives_the_same_output_as_peft_s() -> None:
    with seeded(0):
        ours, x = SelfAttention().eval(), torch.randn(2, 5, 8)
    theirs = get_peft_model(deepcopy(ours), LoraConfig(target_modules=["attention"], r=3, lora_alpha=6))
    block = theirs.base_model.model.attention  # B of its out_proj stays zero: peft 0.21.2 adds that update twice
    one = attach(ours, {"attention.in_proj_weight": 3}, scaling=2.0)["attention.in_proj_weight"]
    assert isinstance(one, LoRA)
    fill(ours)
    block.lora_A["default"].weight.data.copy_(one.lora_A)
    block.lora_B["default"].weight.data.copy_(one.lora_B)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-6)
        detach(ours)
        assert not torch.allclose(ours(x), expected, atol=1e-2)


def test_three_parts_of_a_projection_are_one_update_of_the_whole() -> None:
    with seeded(0):
        model, x = SelfAttention().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    names = [f"attention.in_proj_weight:{part}" for part in "qkv"]
    found = attach(model, dict(zip(names, (1, 2, 3), strict=True)))
    fill(model)
    expected = merged_by_hand(model)(x).detach()
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-12)
    merge(model)
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-12)
    whole = torch.cat([found[name].delta_weight() for name in names]).detach()
    unmerge(model)
    before = model.attention.in_proj_weight.detach().clone()
    merge(model)
    torch.testing.assert_close(model.attention.in_proj_weight.detach(), before + whole, rtol=0, atol=1e-15)


@pytest.mark.parametrize("fast", [True, False], ids=["fast_path", "slow_path"])
@pytest.mark.parametrize("site", ["in_proj_weight", "in_proj_weight:v", "out_proj", "in_proj_bias", "out_proj.bias"])
def test_attention_s_fast_path_sees_the_update(site: str, fast: bool) -> None:
    with seeded(0):
        model, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 5, 8)
    attach(model, {site: 1}, method="bitfit" if site.endswith("bias") else "lora")
    fill(model)
    assert list(adapters(model)) == [site]
    with torch.no_grad():
        base = merged_by_hand(model)(x, x, x)[0]
        torch.backends.mha.set_fastpath_enabled(fast)
        try:
            torch.testing.assert_close(model(x, x, x)[0], base, rtol=0, atol=1e-6)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    detach(model)
    assert not torch.allclose(model(x, x, x)[0], base, atol=1e-3)


ENCODER_SITES = {
    "in_proj": ("layers.0.self_attn.in_proj_weight", "lora"),
    "keys": ("layers.1.self_attn.in_proj_weight:k", "lora"),
    "out_proj": ("layers.1.self_attn.out_proj", "lora"),
    "first_layer": ("layers.0.linear1", "lora"),
    "last_layer": ("layers.1.linear2", "lora"),
    "gain": ("layers.1.norm2", "norm"),
    "shift": ("layers.0.norm1.bias", "bitfit"),
    "bias": ("layers.0.linear2.bias", "bitfit"),
    "attention_bias": ("layers.0.self_attn.in_proj_bias", "bitfit"),
}


def encoder() -> tuple[nn.TransformerEncoder, Tensor, Tensor]:
    """Two layers that take PyTorch's fast path in evaluation, a batch, and its padding mask."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    with seeded(0):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8), mask


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "nested"])
@pytest.mark.parametrize("place", ENCODER_SITES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_in_evaluation_sees_the_update(place: str, padded: bool) -> None:
    model, x, mask = encoder()
    padding = {"src_key_padding_mask": mask} if padded else {}
    site, method = ENCODER_SITES[place]
    with torch.no_grad():
        base = model(x, **padding)
        attach(model, {site: 1}, method=method)
        torch.testing.assert_close(model(x, **padding), base, rtol=0, atol=2e-6)
        fill(model)
        expected = merged_by_hand(model)(x, **padding)
        torch.testing.assert_close(model(x, **padding), expected, rtol=0, atol=2e-6)
        merge(model)
        torch.testing.assert_close(model(x, **padding), expected, rtol=0, atol=2e-6)
    assert not torch.allclose(base, expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_gradients_through_a_nested_batch_are_refused_by_torch_and_given_without_nesting() -> None:
    model, x, mask = encoder()
    found = attach(model, {"layers.0.self_attn.in_proj_weight": 1})
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        model(x, src_key_padding_mask=mask)
    model.use_nested_tensor = False
    model(x, src_key_padding_mask=mask).square().sum().backward()
    gradients = [parameter.grad for parameter in next(iter(found.values())).parameters()]
    assert any(gradient is not None and gradient.count_nonzero() > 0 for gradient in gradients)


# Experts.


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_every_back_end_of_a_mixture_sees_the_update_of_its_experts(kind: str, backend: str) -> None:
    with seeded(7):
        model, x = Mixture(kind, backend=backend).eval(), torch.randn(2, 5, 8)
    ranks = {f"block.experts.{name}:{index}": index + 1 for name in ("gate_up_proj", "down_proj") for index in (1, 3)}
    found = attach(model, ranks)
    assert [one.rank for one in found.values()] == list(ranks.values())
    base = model(x).detach()
    fill(model)
    expected = merged_by_hand(model)(x).detach()
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-2)
    model.train()
    model(x).square().sum().backward()
    gradients = [parameter.grad for one in found.values() for parameter in one.parameters()]
    assert all(gradient is not None and gradient.count_nonzero() > 0 for gradient in gradients)


def test_an_expert_without_tokens_learns_nothing_and_disturbs_nothing() -> None:
    with seeded(0):
        model, x = ExpertList(), torch.randn(9, 8)
    found = attach(model, {"experts.?": 2})
    model(x).square().sum().backward()
    idle = found.pop("experts.3")
    assert all(parameter.grad is None or not parameter.grad.count_nonzero() for parameter in idle.parameters())
    assert all(one.lora_B.grad is not None and one.lora_B.grad.count_nonzero() for one in found.values())
    fill(model)
    torch.testing.assert_close(model(x), merged_by_hand(model)(x), rtol=0, atol=1e-6)


def test_a_parameter_and_its_parts_may_both_be_adapted() -> None:
    with seeded(0):
        model, x = SelfAttention().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    attach(model, {"attention.in_proj_weight": 2, "attention.in_proj_weight:q": 1})
    fill(model)
    torch.testing.assert_close(model(x), merged_by_hand(model)(x), rtol=0, atol=1e-12)


# Shared weights, and modules that are called more than once.


@pytest.mark.parametrize("site", ["model.embed_tokens", "lm_head"])
def test_either_side_of_tied_embeddings_is_adapted_alone_and_merging_names_both(site: str) -> None:
    model, x = llama_causal_lm(tied=True), batch()
    untied, other = llama_causal_lm(tied=True), "lm_head" if site == "model.embed_tokens" else "model.embed_tokens"
    untied.get_submodule(site).weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    adapter = attach(model, {site: 2})[site]
    fill(model)
    place = sites(untied)[site]
    untied.get_parameter(f"{site}.weight").data += place.operator.to_stored(adapter.delta_weight().detach())
    with torch.no_grad():
        torch.testing.assert_close(model(**x).logits, untied(**x).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"got model.embed_tokens.weight = lm_head.weight\. Untie it"):
        merge(model)
    assert torch.equal(model.get_parameter(f"{site}.weight"), untied.get_parameter(f"{other}.weight"))


def deberta() -> DebertaV2ForSequenceClassification:
    """DeBERTa-v3 in small: queries and keys of tokens, and, without a batch axis, of relative positions."""
    config = DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        num_labels=3,
    )
    with seeded(0):
        model = DebertaV2ForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.ndim == 2 else 1
    return model


@pytest.mark.parametrize("bias", ["none", "adapted"])
def test_a_projection_that_is_also_called_on_relative_positions_is_adapted_in_both(bias: Any) -> None:  # noqa: ANN401
    model, x = deberta(), batch()
    attach(model, {"query_proj": 2, "key_proj": 2}, bias=bias)
    calls: list[int] = []
    key_proj = model.get_submodule("deberta.encoder.layer.0.attention.self.key_proj")
    key_proj.register_forward_hook(lambda layer, args, output: calls.append(args[0].shape[0]))
    base = model(**x).logits.detach()
    assert calls == [3, 1]  # rows of the batch, and of the positions
    fill(model)
    adapted = model(**x).logits
    expected = merged_by_hand(model)(**x).logits
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-3)
    adapted.square().sum().backward()
    assert all(each.grad is not None for one in adapters(model).values() for each in one.parameters())


# What cannot be adapted.


def test_embedding_bags_that_rewrite_their_weight_are_no_sites() -> None:
    model = nn.ModuleDict({"free": nn.EmbeddingBag(7, 4), "bound": nn.EmbeddingBag(7, 4, max_norm=1.0)})
    assert list(sites(model)) == ["free"]
    with pytest.raises(ValueError, match="'bound' is a EmbeddingBag"):
        attach(model, {"bound": 1})


def test_dropout_of_an_input_that_nobody_sees_is_refused() -> None:
    for model, site in ((SelfAttention(), "attention.out_proj"), (Mixture("olmoe"), "block.experts.down_proj:1")):
        with pytest.raises(ValueError, match=r"dropout must be 0 on a parameter .* got 0\.1; for module"):
            attach(model, {site: 1}, dropout=0.1)


def test_biases_are_created_for_the_experts_of_a_list_too() -> None:
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 6, bias=False) for _ in range(2)])})
    assert create_missing_biases(model, ["experts.1"]) == ["experts.1"]
    assert list(attach(model, {"experts.1": 1}, bias="adapted")) == ["experts.1", "experts.1.bias"]
