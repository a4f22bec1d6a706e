"""Fused projections: that the rows called q, k and v are what the real modules use as queries, keys and values."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flowra_adapters import attach, merge, sites
from flowra_adapters.layouts import LAYOUTS, Layout, layout_of
from flowra_testing.tiny_models import seeded

TOKENS = 5
"""Per sequence; the middle one is changed."""


@dataclass(frozen=True)
class Fused:
    """A small model with a fused projection, and how its attention is watched."""

    build: Callable[[], nn.Module]
    layer: str
    """Name of the fused projection."""
    after: str
    """Name of the projection that the attention's result goes into."""
    run: Callable[[nn.Module], object]


def tokens() -> Tensor:
    return torch.tensor([[3, 7, 1, 9, 4]])


def text(kind: str, config: str, layer: str, after: str, **options: object) -> Fused:
    def build() -> nn.Module:
        model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(vocab_size=32, **options))
        return model

    return Fused(build, layer, after, lambda model: model(input_ids=tokens(), use_cache=False))


def image(kind: str, config: object, after: str = "proj", *, shape: tuple[int, ...], **options: object) -> Fused:
    """An attention module alone."""
    *place, name = kind.split(".")
    module = importlib.import_module(f"transformers.models.{place[0]}.modeling_{place[0]}")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inputs: dict[str, object] = {}
    if len(shape) == 2:  # a packed sequence of patches
        angles = torch.linspace(0, 1, TOKENS)[:, None].expand(TOKENS, 4)
        inputs = {"cu_seqlens": torch.tensor([0, TOKENS]), "position_embeddings": (angles.cos(), angles.sin())}
    return Fused(
        lambda: nn.ModuleDict({"attn": getattr(module, name)(config, **options)}),
        "attn.qkv",
        f"attn.{after}" if after else "",
        lambda model: model.get_submodule("attn")(x, **inputs),
    )


NEOX = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
FALCON = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 4}
PHI3 = {**NEOX, "num_key_value_heads": 2, "pad_token_id": 0}
VISION = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
PACKED = {"depth": 1, "num_heads": 4, "attn_implementation": "eager"}
MAP, SEQUENCE, PATCHES = (1, 1, TOKENS, 16), (1, TOKENS, 16), (TOKENS, 16)
CASES = {
    "GPT2Attention.c_attn": text("GPT2Model", "GPT2Config", "h.0.attn.c_attn", "h.0.attn.c_proj", **GPT2),
    "GPTBigCodeAttention.c_attn": text(
        "GPTBigCodeModel", "GPTBigCodeConfig", "h.0.attn.c_attn", "h.0.attn.c_proj", **GPT2
    ),
    "GPTBigCodeAttention.c_attn, a key for each head": text(
        "GPTBigCodeModel", "GPTBigCodeConfig", "h.0.attn.c_attn", "h.0.attn.c_proj", multi_query=False, **GPT2
    ),
    "Phi3Attention.qkv_proj": text(
        "Phi3Model", "Phi3Config", "layers.0.self_attn.qkv_proj", "layers.0.self_attn.o_proj", **PHI3
    ),
    "CodeGenAttention.qkv_proj": text(
        "CodeGenModel", "CodeGenConfig", "h.0.attn.qkv_proj", "h.0.attn.out_proj", rotary_dim=2, n_ctx=8, **GPT2
    ),
    "GPTNeoXAttention.query_key_value": text(
        "GPTNeoXModel", "GPTNeoXConfig", "layers.0.attention.query_key_value", "layers.0.attention.dense", **NEOX
    ),
    "GPTNeoXJapaneseAttention.query_key_value": text(
        "GPTNeoXJapaneseModel",
        "GPTNeoXJapaneseConfig",
        "layers.0.attention.query_key_value",
        "layers.0.attention.dense",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
    ),
    "BloomAttention.query_key_value": text(
        "BloomModel",
        "BloomConfig",
        "h.0.self_attention.query_key_value",
        "h.0.self_attention.dense",
        hidden_size=16,
        n_layer=1,
        n_head=4,
    ),
    "PersimmonAttention.query_key_value": text(
        "PersimmonModel",
        "PersimmonConfig",
        "layers.0.self_attn.query_key_value",
        "layers.0.self_attn.dense",
        qk_layernorm=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **NEOX,
    ),
    **{
        f"FalconAttention.query_key_value, {case}": text(
            "FalconModel",
            "FalconConfig",
            "h.0.self_attention.query_key_value",
            "h.0.self_attention.dense",
            **options,
            **FALCON,
        )
        for case, options in (
            ("one key for all", {"multi_query": True}),
            ("a key for each group", {"new_decoder_architecture": True, "num_kv_heads": 2}),
            ("a key for each head", {"multi_query": False, "alibi": True}),
        )
    },
    "ModernBertAttention.Wqkv": text(
        "ModernBertModel",
        "ModernBertConfig",
        "layers.0.attn.Wqkv",
        "layers.0.attn.Wo",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        **NEOX,
    ),
    "MptAttention.Wqkv": text(
        "MptModel", "MptConfig", "blocks.0.attn.Wqkv", "blocks.0.attn.out_proj", d_model=16, n_layers=1, n_heads=4
    ),
    "DbrxAttention.Wqkv": text(
        "DbrxModel",
        "DbrxConfig",
        "blocks.0.norm_attn_norm.attn.Wqkv",
        "blocks.0.norm_attn_norm.attn.out_proj",
        d_model=16,
        n_layers=1,
        n_heads=4,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 100.0},
        ffn_config={"hidden_size": 16, "ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1},
    ),
    "SamVisionAttention.qkv": image(
        "sam.SamVisionAttention", transformers.SamVisionConfig(**VISION), shape=MAP, window_size=5
    ),
    "SamHQVisionAttention.qkv": image(
        "sam_hq.SamHQVisionAttention", transformers.SamHQVisionConfig(**VISION), shape=MAP, window_size=5
    ),
    "VitDetAttention.qkv": image("vitdet.VitDetAttention", transformers.VitDetConfig(**VISION), shape=MAP),
    "BlipAttention.qkv": image(
        "blip.BlipAttention", transformers.BlipVisionConfig(**VISION), "projection", shape=SEQUENCE
    ),
    "Blip2Attention.qkv": image(
        "blip_2.Blip2Attention",
        transformers.Blip2VisionConfig(attn_implementation="eager", **VISION),
        "projection",
        shape=SEQUENCE,
    ),
    "InstructBlipAttention.qkv": image(
        "instructblip.InstructBlipAttention",
        transformers.InstructBlipVisionConfig(attn_implementation="eager", **VISION),
        "projection",
        shape=SEQUENCE,
    ),
    "TimesformerSelfAttention.qkv": image(
        "timesformer.TimesformerSelfAttention", transformers.TimesformerConfig(**VISION), "", shape=SEQUENCE
    ),
    "VisionAttention.qkv": image(
        "qwen2_vl.VisionAttention",
        transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(embed_dim=16, **PACKED),
        shape=PATCHES,
    ),
    "Qwen2_5_VLVisionAttention.qkv": image(
        "qwen2_5_vl.Qwen2_5_VLVisionAttention",
        transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(hidden_size=16, **PACKED),
        shape=PATCHES,
    ),
    "Qwen3VLVisionAttention.qkv": image(
        "qwen3_vl.Qwen3VLVisionAttention",
        transformers.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig(hidden_size=16, **PACKED),
        shape=PATCHES,
    ),
    "Glm4vVisionAttention.qkv": image(
        "glm4v.Glm4vVisionAttention",
        transformers.models.glm4v.configuration_glm4v.Glm4vVisionConfig(hidden_size=16, **PACKED),
        shape=PATCHES,
    ),
}
SHARED_CODE = {
    "DecisionTransformerGPT2Attention.c_attn": ("decision_transformer", "GPT2Attention.c_attn", "gpt2"),
    "Phi4MultimodalAttention.qkv_proj": ("phi4_multimodal", "Phi3Attention.qkv_proj", "phi3"),
}
"""Classes whose forward splits as another's does, letter by letter: where they are, and the other."""


def built(case: Fused) -> nn.Module:
    with seeded(0):
        model = case.build().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)  # tiny initial weights would make every softmax flat
    return model


def rows_of(model: nn.Module, case: Fused) -> dict[str, list[int]]:
    """Return the output channels of each part."""
    found = {}
    for name, site in sites(model).items():
        if name.startswith(f"{case.layer}:") and site.part is not None:
            channels = torch.arange(site.whole.shape[0])
            found[site.part.name] = site.part.of(channels).tolist()
    return found


@contextmanager
def output_changed(layer: nn.Module, change: Tensor) -> Iterator[None]:
    """Add to a layer's output, tokens times channels."""
    hook = layer.register_forward_hook(lambda _, args, output: output + change.view_as(output))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def attended(model: nn.Module, case: Fused, change: Tensor) -> Tensor:
    """Return what the attention makes of its queries, keys and values, tokens times channels."""
    seen: list[Tensor] = []
    if case.after:
        hook = model.get_submodule(case.after).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        reader = model.get_submodule(case.layer.rpartition(".")[0])
        hook = reader.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    with output_changed(model.get_submodule(case.layer), change):
        case.run(model)
    hook.remove()
    return seen[0].reshape(TOKENS, -1).double()


@pytest.mark.parametrize("name", CASES)
def test_q_k_and_v_are_what_the_real_attention_uses_as_such(name: str) -> None:
    case = CASES[name]
    model = built(case)
    rows = rows_of(model, case)
    layer = model.get_submodule(case.layer)
    channels = sum(map(len, rows.values()))
    assert set(rows) == {"q", "k", "v"}
    assert sorted(row for part in rows.values() for row in part) == list(range(channels))
    assert len(rows["k"]) == len(rows["v"]) <= len(rows["q"])
    noise = torch.randn(channels, generator=torch.Generator().manual_seed(1))
    none = torch.zeros(TOKENS, channels)
    base = attended(model, case, none)

    def at_the_middle(part: str, size: float) -> Tensor:
        change = none.clone()
        change[TOKENS // 2, rows[part]] = size * noise[rows[part]]
        return attended(model, case, change) - base

    # a query decides what its own token sees, and nothing else does so only
    moved = at_the_middle("q", 1.0).norm(dim=1) > 1e-4
    assert moved.nonzero().flatten().tolist() == [TOKENS // 2]
    # values enter linearly, and nothing else does
    torch.testing.assert_close(at_the_middle("v", 2.0), 2 * at_the_middle("v", 1.0), rtol=1e-3, atol=1e-5)
    # keys are the rest: they reach other tokens, but not linearly
    once, twice = at_the_middle("k", 1.0), at_the_middle("k", 2.0)
    assert (once.norm(dim=1) > 1e-4).sum() > 1
    assert (twice - 2 * once).norm() > 1e-3 * once.norm()
    assert layer.weight.shape in {(channels, 16), (16, channels)}


def test_every_known_layout_of_attention_is_tried() -> None:
    tried = {name.partition(",")[0] for name in CASES} | set(SHARED_CODE)
    assert tried == {name for name in LAYOUTS if not name.endswith(".gate_up_proj")}


INTERFACE = ["GPT2Attention.c_attn", "Phi3Attention.qkv_proj", "GPTNeoXAttention.query_key_value"]
INTERFACE += ["ModernBertAttention.Wqkv", "DbrxAttention.Wqkv", "GPTBigCodeAttention.c_attn"]
INTERFACE += ["PersimmonAttention.query_key_value", "Blip2Attention.qkv", "Qwen3VLVisionAttention.qkv"]


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", INTERFACE)
def test_rows_of_zeros_are_queries_keys_or_values_of_zeros(
    name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    model = built(case)
    seen: list[Tensor] = []

    def zeroed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> object:
        given = {"q": query, "k": key, "v": value}
        seen.append(given[part])
        given[part] = torch.zeros_like(given[part])
        return sdpa_attention_forward(module, given["q"], given["k"], given["v"], *args, **kwargs)

    for interface, function in ((ALL_ATTENTION_FUNCTIONS, zeroed), (ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask)):
        monkeypatch.setitem(interface._local_mapping, "zeroed", function)
    reader = model.get_submodule(case.layer.rpartition(".")[0])
    reader.config._attn_implementation = "zeroed"
    rows = rows_of(model, case)[part]
    none = torch.zeros(TOKENS, model.get_submodule(case.layer)(torch.zeros(1, TOKENS, 16)).shape[-1])
    expected = attended(model, case, none)
    with torch.no_grad():
        layer = model.get_submodule(case.layer)
        weight = layer.weight if len(layer.weight) == none.shape[1] else layer.weight.T
        weight[rows] = 0
        if layer.bias is not None:
            layer.bias[rows] = 0
    seen.clear()
    actual = attended(model, case, none)
    assert seen[0].abs().max() == 0  # so it was the whole of the part
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)  # and nothing but the part


GATED = {
    "Phi3MLP": ("phi3", transformers.Phi3Config(pad_token_id=0, **NEOX)),
    "Phi4MultimodalMLP": ("phi4_multimodal", transformers.Phi4MultimodalConfig(pad_token_id=0, **NEOX)),
    "GlmMLP": ("glm", transformers.GlmConfig(pad_token_id=0, **NEOX)),
    "Glm4MLP": ("glm4", transformers.Glm4Config(pad_token_id=0, **NEOX)),
    "Glm4vTextMLP": ("glm4v", transformers.models.glm4v.configuration_glm4v.Glm4vTextConfig(pad_token_id=0, **NEOX)),
}


@pytest.mark.parametrize("name", GATED)
def test_gate_and_up_are_what_the_real_mlp_uses_as_such(name: str) -> None:
    place, config = GATED[name]
    kind = getattr(importlib.import_module(f"transformers.models.{place}.modeling_{place}"), name)
    with seeded(0):
        model = nn.ModuleDict({"mlp": kind(config)})
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    rows = {part: sites(model)[f"mlp.gate_up_proj:{part}"].part for part in ("gate", "up")}
    layer = model.get_submodule("mlp.gate_up_proj")
    noise = torch.randn(48, generator=torch.Generator().manual_seed(1))

    def out(part: str, size: float) -> Tensor:
        change = torch.zeros(3, 48)
        where = rows[part].index if rows[part] is not None else None
        change[:, where] = size * noise[where]
        with torch.no_grad(), output_changed(layer, change):
            return model.get_submodule("mlp")(x)

    base = out("up", 0.0)
    torch.testing.assert_close(out("up", 2.0) - base, 2 * (out("up", 1.0) - base))  # linear in up,
    assert (out("gate", 2.0) - base - 2 * (out("gate", 1.0) - base)).norm() > 1e-3  # not in the gate


def test_every_known_layout_of_a_gated_mlp_is_tried() -> None:
    assert {f"{name}.gate_up_proj" for name in GATED} == {name for name in LAYOUTS if name.endswith("gate_up_proj")}


@pytest.mark.parametrize("other", SHARED_CODE)
def test_classes_said_to_share_code_share_it(other: str) -> None:
    place, same, place_of_same = SHARED_CODE[other]

    def splits(place: str, name: str) -> list[str]:
        module = importlib.import_module(f"transformers.models.{place}.modeling_{place}")
        lines = inspect.getsource(getattr(module, name.partition(".")[0]).forward).split("\n")
        return [line for line in lines if re.search(r"c_attn|qkv", line)]

    assert splits(place, other) == splits(place_of_same, same) != []
    assert LAYOUTS[other] is LAYOUTS[same]


def test_cross_attention_of_gpt2_has_keys_and_values_only() -> None:
    config = transformers.GPT2Config(vocab_size=32, add_cross_attention=True, **GPT2)
    with seeded(0):
        found = sites(transformers.GPT2Model(config))
    assert [name for name in found if name.startswith("h.0.crossattention.c_attn:")] == [
        "h.0.crossattention.c_attn:k",
        "h.0.crossattention.c_attn:v",
    ]


class Attention(nn.Module):
    """Somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)


class SamVisionAttention(Attention):
    """Somebody's own, of a name that is known elsewhere."""


@pytest.mark.parametrize("kind", [Attention, SamVisionAttention])
def test_where_the_layout_is_not_known_there_are_no_parts(kind: type[Attention]) -> None:
    assert [name for name in sites(nn.ModuleDict({"attn": kind()})) if ":" in name] == []


def test_a_layer_that_somebody_has_cut_has_no_parts() -> None:
    case = CASES["Phi3Attention.qkv_proj"]
    model = built(case)
    reader = model.get_submodule("layers.0.self_attn")
    reader.qkv_proj = nn.Linear(16, 20)
    assert rows_of(model, case) == {}
    assert layout_of(reader, "qkv_proj", 20) is None


def test_rows_of_blocks_are_indices_and_rows_of_one_block_are_a_slice() -> None:
    assert Layout({"q": 2, "k": 1}).rows() == {"q": slice(0, 2), "k": slice(2, 3)}
    assert Layout({"q": 2, "k": 1}, 2).rows() == {"q": (0, 1, 3, 4), "k": (2, 5)}


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_a_part_changes_its_rows_only_and_merges(name: str) -> None:
    case = CASES[name]
    model = built(case)
    rows = rows_of(model, case)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    layer = model.get_submodule(case.layer)
    before = layer(x)
    attached = attach(model, {f"{case.layer}:q": 2, f"{case.layer}:v": 1})
    with torch.no_grad(), seeded(1):
        for one in attached.values():
            one.lora_B.normal_()
    after = layer(x)
    changed = (after - before).abs().amax(0) > 1e-6
    assert changed.nonzero().flatten().tolist() == sorted([*rows["q"], *rows["v"]])
    merge(model)
    torch.testing.assert_close(layer(x), after, rtol=1e-5, atol=1e-5)
