"""PEFT's files for every layer and method: the real peft gives our outputs, we give the outputs of what it wrote."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

from flowra_adapters import (
    adapters,
    attach,
    attach_checkpoint,
    checkpoint_of,
    from_loralib,
    load_adapter,
    read_checkpoint,
    save_adapter,
    sites,
    to_lora,
    write_checkpoint,
)
from flowra_adapters.lora import LoRA
from flowra_testing.adapter_table import CONVOLUTIONS, EMBEDDINGS, LINEAR, METHODS, LayerType
from flowra_testing.asserts import Case, build_case, delta_of, randomise
from flowra_testing.tiny_blocks import Mixture
from flowra_testing.tiny_models import seeded

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
PEFT_PAIR = ["adapter_config.json", "adapter_model.safetensors"]
FLOWRA_PAIR = ["flowra_config.json", "flowra_model.safetensors"]
SIMPLE: Mapping[str, LayerType] = {**LINEAR, **CONVOLUTIONS, **EMBEDDINGS}
WRONG_LIVE = {  # layers that PEFT 0.21.2 does not compute in its forward pass
    "conv2d_strided_dilated": "dilation",
    "conv2d_same": "dilation",
    "conv2d_reflect": "padding_mode",
    "conv2d_replicate": "padding_mode",
    "conv2d_circular": "padding_mode",
    "conv_transpose1d": "transposed",
    "conv_transpose2d_grouped": "transposed",
    "conv_transpose3d": "transposed",
}
WRONG_MERGED = {  # and in its merge
    "conv2d_grouped": "grouped",
    "conv2d_depthwise": "grouped",
    "conv_transpose1d": "transposed",
    "conv_transpose2d_grouped": "transposed",
    "conv_transpose3d": "transposed",
}


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        answer = model(x)
    assert isinstance(answer, Tensor)
    return answer


def adapted(kind: str, method: str = "lora", alpha: float | None = None) -> Case:
    layer_type = SIMPLE[kind]
    case = build_case(layer_type, torch.float32)
    for seed, one in enumerate(attach(case.model, {case.site: layer_type.rank}, method=method, alpha=alpha).values()):
        randomise(one, seed=seed)
    return case


def in_peft(kind: str, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(build_case(SIMPLE[kind], torch.float32).model, folder).eval()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out", "ignore:.*groups > 1")
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", [kind for kind in SIMPLE if kind not in WRONG_LIVE])
def test_peft_gives_our_output_of_every_layer_it_has(tmp_path: Path, kind: str, method: str) -> None:
    case = adapted(kind, method)
    if method == "dora" and kind in WRONG_MERGED:
        with pytest.raises(ValueError, match="grouped convolution"):
            save_adapter(case.model, tmp_path, consumer="peft")
        return
    if method == "dora" and kind == "conv2d_unbatched":
        pytest.skip("PEFT's DoRA takes batches only")
    save_adapter(case.model, tmp_path / "checkpoint")
    save_adapter(case.model, tmp_path / "export", consumer="peft")
    for form in ("checkpoint", "export"):
        assert names_in(tmp_path / form) == PEFT_PAIR
        torch.testing.assert_close(
            output_of(in_peft(kind, tmp_path / form), case.x), output_of(case.model, case.x), **TOLERANCE
        )
    fresh = build_case(SIMPLE[kind], torch.float32).model
    load_adapter(fresh, tmp_path / "checkpoint")
    assert torch.equal(output_of(fresh, case.x), output_of(case.model, case.x))


@pytest.mark.parametrize(("kind", "word"), WRONG_LIVE.items())
def test_what_peft_would_compute_otherwise_is_refused_with_the_reason(tmp_path: Path, kind: str, word: str) -> None:
    case = adapted(kind)
    with pytest.raises(ValueError, match=f"at 'layer': PEFT.*{word}"):
        save_adapter(case.model, tmp_path / "export", consumer="peft")
    assert not (tmp_path / "export").exists()
    save_adapter(case.model, tmp_path)
    assert names_in(tmp_path) == FLOWRA_PAIR


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", [kind for kind in SIMPLE if kind not in WRONG_MERGED])
def test_peft_merges_rightly_what_is_written_to_be_merged(tmp_path: Path, kind: str, method: str) -> None:
    case = adapted(kind, method)
    save_adapter(case.model, tmp_path, consumer="peft_merged")
    merged = in_peft(kind, tmp_path).merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(output_of(merged, case.x), output_of(case.model, case.x), **TOLERANCE)


@pytest.mark.parametrize(("kind", "word"), WRONG_MERGED.items())
def test_what_peft_does_not_merge_is_refused_with_the_reason(tmp_path: Path, kind: str, word: str) -> None:
    with pytest.raises(ValueError, match=f"PEFT.*{word}"):
        save_adapter(adapted(kind).model, tmp_path, consumer="peft_merged")


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("kind", [kind for kind in WRONG_LIVE if "transpose" not in kind])
def test_the_refusal_is_justified_peft_fails_or_computes_something_else(tmp_path: Path, kind: str) -> None:
    case = adapted(kind)
    save_adapter(case.model, tmp_path, consumer="peft_merged")
    try:
        answer = output_of(in_peft(kind, tmp_path), case.x)
    except RuntimeError:
        return
    assert not torch.allclose(answer, output_of(case.model, case.x), atol=1e-2)


def written_by_peft(model: nn.Module, folder: Path, config: peft.LoraConfig, *, seed: int = 7) -> nn.Module:
    theirs = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator).abs() + 0.05)
    theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.filterwarnings("ignore:.*invalid shape", "ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d_of_transformers", "conv1d", "conv2d", "conv3d", "embedding"])
def test_what_peft_wrote_gives_equal_outputs_here(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    if kind == "embedding" and "lora_bias" in options:
        pytest.skip("PEFT has no lora_bias of an embedding")
    case = build_case(SIMPLE[kind], torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["layer"], **options)
    theirs = written_by_peft(case.model, tmp_path, config)
    fresh = build_case(SIMPLE[kind], torch.float32)
    load_adapter(fresh.model, tmp_path)
    torch.testing.assert_close(output_of(fresh.model, case.x), output_of(theirs, case.x), **TOLERANCE)
    assert not torch.allclose(output_of(fresh.layer, case.x), fresh.base_output, atol=1e-2)
    if "lora_bias" not in options:
        save_adapter(fresh.model, tmp_path / "again", consumer="peft")
        again = in_peft(kind, tmp_path / "again")
        torch.testing.assert_close(output_of(again, case.x), output_of(theirs, case.x), **TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*groups > 1")
def test_peft_s_own_adapter_of_a_grouped_convolution_is_refused_where_it_mixes_groups(tmp_path: Path) -> None:
    case = build_case(SIMPLE["conv2d_grouped"], torch.float32)
    written_by_peft(case.model, tmp_path, peft.LoraConfig(r=4, target_modules=["layer"]))
    with pytest.raises(ValueError, match="update must be one of the grouped weight"):
        load_adapter(build_case(SIMPLE["conv2d_grouped"], torch.float32).model, tmp_path)


class Biased(nn.Module):
    """Layers with biases, a norm among them, and a layer whose name ends in that of another."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 6)
        self.block = nn.ModuleDict({"up": nn.Linear(6, 6)})
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, 8)`` to ``(…, 5)``."""
        answer: Tensor = self.down(self.norm(self.block["up"](self.up(x))))
        return answer


def biased() -> Biased:
    with seeded(3):
        return Biased().eval()


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_peft_trained_become_offsets(tmp_path: Path, bias: str) -> None:
    config = peft.LoraConfig(r=2, target_modules=["down"], bias=bias)
    theirs = written_by_peft(biased(), tmp_path, config)
    fresh, x = biased(), torch.randn(4, 8)
    found = load_adapter(fresh, tmp_path)
    assert {name for name in found if name.endswith("bias")} == (
        {"down.bias"} if bias == "lora_only" else {"up.bias", "block.up.bias", "norm.bias", "down.bias"}
    )
    torch.testing.assert_close(output_of(fresh, x), output_of(theirs, x), **TOLERANCE)


def headed() -> nn.Module:
    """Build a layer with a norm, and a head of several layers on them."""
    with seeded(4):
        head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))
        return nn.Sequential(OrderedDict(up=nn.Linear(8, 6), norm=nn.LayerNorm(6), head=head)).eval()


@pytest.mark.parametrize(("build", "head", "copies"), [(biased, "down", 2), (biased, "norm", 2), (headed, "head", 4)])
def test_biases_that_peft_saved_again_under_a_trained_module_are_left_out(
    tmp_path: Path, build: Callable[[], nn.Module], head: str, copies: int
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["up"], bias="all", modules_to_save=[head])
    theirs = written_by_peft(build(), tmp_path, config)
    keys = load_file(tmp_path / PEFT_PAIR[1]).keys()
    assert len([key for key in keys if ".modules_to_save." in key or ".original_module." in key]) == copies
    fresh, x = build(), torch.randn(4, 8)
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(output_of(fresh, x), output_of(theirs, x), **TOLERANCE)
    wrapper = theirs.get_submodule(f"base_model.model.{head}")
    saved, ours = wrapper.get_submodule("modules_to_save.default").state_dict(), fresh.get_submodule(head).state_dict()
    assert saved.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in saved.items())


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_offsets_of_biases_are_written_as_peft_s_trained_biases(tmp_path: Path) -> None:
    model, x = biased(), torch.randn(4, 8)
    for seed, one in enumerate(attach(model, {"up": 2, "down": 2}, bias="all").values()):
        randomise(one, seed=seed)
    save_adapter(model, tmp_path, consumer="peft")
    theirs = peft.PeftModel.from_pretrained(biased(), tmp_path)
    torch.testing.assert_close(output_of(theirs, x), output_of(model, x), **TOLERANCE)
    assert names_in(tmp_path) == PEFT_PAIR + FLOWRA_PAIR
    (tmp_path / "flowra_config.json").unlink()
    fresh = biased()
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(output_of(fresh, x), output_of(model, x), **TOLERANCE)


def test_offsets_of_gains_are_refused_for_peft(tmp_path: Path) -> None:
    model = biased()
    attach(model, {"norm": 1}, method="norm")
    with pytest.raises(
        ValueError, match=r"must be at a place that PEFT has, got one of the parameter 'weight' at 'norm'"
    ):
        save_adapter(model, tmp_path, consumer="peft")


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # peft does not know its own keys again
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_adalora_is_read_as_peft_applies_it(tmp_path: Path, kind: str) -> None:
    case = build_case(SIMPLE[kind], torch.float32)
    config = peft.AdaLoraConfig(
        init_r=5, target_r=2, total_step=8, tinit=1, tfinal=2, deltaT=1, lora_alpha=7, target_modules=["layer"]
    )
    theirs = peft.get_peft_model(case.model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.SGD([each for each in theirs.parameters() if each.requires_grad], lr=1e-3)
    for step in range(8):
        theirs(case.x).square().sum().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path)
    stored = load_file(tmp_path / PEFT_PAIR[1])
    assert len(stored["base_model.model.layer.lora_E"]) == 2  # of 5
    fresh = build_case(SIMPLE[kind], torch.float32)
    found = load_adapter(fresh.model, tmp_path)
    assert found["layer"].rank == 2
    assert found["layer"].scaling == 7 / (5 + 1e-5)
    reloaded = peft.PeftModel.from_pretrained(build_case(SIMPLE[kind], torch.float32).model, tmp_path).eval()
    torch.testing.assert_close(output_of(fresh.model, case.x), output_of(reloaded, case.x), **TOLERANCE)
    torch.testing.assert_close(output_of(fresh.model, case.x), output_of(theirs, case.x), **TOLERANCE)


class Attending(nn.Module):
    """An attention block of PyTorch inside a model."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, t, 8)`` to ``(b, t, 3)``."""
        answer: Tensor = self.head(self.attn(x, x, x)[0])
        return answer


def attending() -> Attending:
    with seeded(5):
        return Attending().eval()


@pytest.mark.parametrize(
    "ranks",
    [
        {"attn.in_proj_weight": 2},
        {"attn.in_proj_weight:q": 1, "attn.in_proj_weight:v": 2, "head": 2},
    ],
    ids=["whole", "parts"],
)
def test_an_attention_block_of_pytorch_gives_equal_outputs_in_peft(tmp_path: Path, ranks: dict[str, int]) -> None:
    model, x = attending(), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    for seed, (name, one) in enumerate(attach(model, ranks).items()):
        randomise(one, seed=seed)
        one.scaling = 0.5 + seed * len(name) / 40  # all different
    save_adapter(model, tmp_path, consumer="peft")
    theirs = peft.PeftModel.from_pretrained(attending(), tmp_path).eval()
    torch.testing.assert_close(output_of(theirs, x), output_of(model, x), **TOLERANCE)
    save_adapter(model, tmp_path, consumer="peft_merged")
    merged = peft.PeftModel.from_pretrained(attending(), tmp_path).merge_and_unload()
    torch.testing.assert_close(output_of(merged, x), output_of(model, x), **TOLERANCE)
    keys = load_file(tmp_path / PEFT_PAIR[1]).keys()
    assert {"base_model.model.attn.lora_A.weight", "base_model.model.attn.base_layer.out_proj.lora_B.weight"} <= keys
    exact = attending()
    load_adapter(exact, tmp_path)
    assert torch.equal(output_of(exact, x), output_of(model, x))
    assert {name: one.rank for name, one in adapters(exact).items()} == ranks
    (tmp_path / "flowra_config.json").unlink()
    combined = attending()
    load_adapter(combined, tmp_path)
    torch.testing.assert_close(output_of(combined, x), output_of(model, x), **TOLERANCE)


def test_an_attention_block_that_peft_wrote_gives_equal_outputs_here(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attn", "head"], rank_pattern={"head": 1})
    theirs = written_by_peft(attending(), tmp_path, config)
    with pytest.raises(ValueError, match=r"out_proj of an attention block must have no update"):
        load_adapter(attending(), tmp_path)
    theirs.base_model.model.attn.base_layer.out_proj.lora_B["default"].weight.data.zero_()
    theirs.save_pretrained(tmp_path)
    fresh, x = attending(), torch.randn(2, 4, 8)
    assert set(load_adapter(fresh, tmp_path)) == {"attn.in_proj_weight", "head"}
    torch.testing.assert_close(output_of(fresh, x), output_of(theirs, x), **TOLERANCE)


def test_the_update_of_an_output_projection_which_peft_adds_twice_is_refused(tmp_path: Path) -> None:
    theirs = written_by_peft(attending(), tmp_path, peft.LoraConfig(r=2, target_modules=["attn"]))
    twice, x = attending(), torch.randn(2, 4, 8)
    layer = theirs.base_model.model.attn
    twice.attn.in_proj_weight.data += layer.get_delta_weight("default")
    twice.attn.out_proj.weight.data += 2 * layer.base_layer.out_proj.get_delta_weight("default")
    torch.testing.assert_close(output_of(theirs, x), output_of(twice, x), **TOLERANCE)
    model = attending()
    attach(model, {"attn.out_proj": 2})
    with pytest.raises(ValueError, match=r"at 'attn.out_proj': PEFT adds the update .* twice"):
        save_adapter(model, tmp_path, consumer="peft")


class Experts(nn.Module):
    """Stacks of matrices, in PEFT's order ``(E, m, n)`` or transposed, and a raw matrix."""

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 8, 6) if is_transposed else torch.randn(3, 6, 8))
        self.down = nn.Parameter(torch.randn(3, 6, 8) if is_transposed else torch.randn(3, 8, 6))
        self.router = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, 8)`` to ``(b, 8)``."""
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        weights = torch.softmax(x @ self.router.T, -1)
        inner = torch.tanh(torch.einsum("bi,eih->ebh", x, up))
        return torch.einsum("ebh,eho,be->bo", inner, down, weights)


def mixture(*, is_transposed: bool) -> nn.Module:
    with seeded(6):
        model = nn.Sequential()
        model.add_module("first", nn.Linear(8, 8))
        model.add_module("experts", Experts(is_transposed=is_transposed))
        return model.eval()


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # which peft says and then obeys them
@pytest.mark.parametrize("is_transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize(
    "ranks",
    [
        {"experts.up:0": 2, "experts.up:2": 1, "first": 3},
        {"experts.up:0": 2, "experts.down:1": 3, "experts.router": 1},
    ],
    ids=["one_stack", "three_parameters"],
)
def test_single_experts_give_equal_outputs_in_peft(tmp_path: Path, ranks: dict[str, int], is_transposed: bool) -> None:
    model, x = mixture(is_transposed=is_transposed), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for seed, one in enumerate(attach(model, ranks).values()):
        randomise(one, seed=seed)
    before = output_of(mixture(is_transposed=is_transposed), x)
    save_adapter(model, tmp_path, consumer="peft")
    theirs = peft.PeftModel.from_pretrained(mixture(is_transposed=is_transposed), tmp_path).eval()
    torch.testing.assert_close(output_of(theirs, x), output_of(model, x), **TOLERANCE)
    assert not torch.allclose(before, output_of(model, x), atol=1e-2)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(output_of(merged, x), output_of(model, x), **TOLERANCE)
    (tmp_path / "flowra_config.json").unlink()
    fresh = mixture(is_transposed=is_transposed)
    if "first" in ranks:
        load_adapter(fresh, tmp_path)
        torch.testing.assert_close(output_of(fresh, x), output_of(model, x), **TOLERANCE)
    else:
        with pytest.raises(ValueError, match="several"):
            load_adapter(fresh, tmp_path)


def test_parts_of_a_fused_projection_become_one_update_of_equal_output(tmp_path: Path) -> None:
    def build() -> GPT2LMHeadModel:
        config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        with seeded(1):
            return GPT2LMHeadModel(config).eval()

    model, ids = build(), torch.randint(0, 32, (2, 5), generator=torch.Generator().manual_seed(0))
    for seed, one in enumerate(attach(model, {"c_attn:q": 2, "c_attn:v": 3, "mlp.c_fc": 1}).values()):
        randomise(one, seed=seed)
        one.scaling = 1.0 + seed / 10
    save_adapter(model, tmp_path, consumer="peft", task_type="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, **TOLERANCE)
    a = load_file(tmp_path / PEFT_PAIR[1])["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"]
    assert a.shape == (5, 16)


def test_a_residual_start_is_written_as_twice_the_rank_exactly(tmp_path: Path) -> None:
    case = adapted("linear")
    one = adapters(case.model)["layer"]
    assert isinstance(one, LoRA)
    generator = torch.Generator().manual_seed(1)
    one.start_from(torch.randn(3, 8, generator=generator), torch.randn(6, 3, generator=generator))
    randomise(one, seed=9)
    save_adapter(case.model, tmp_path, consumer="peft")
    assert read_checkpoint(tmp_path).factors["layer"][0].shape == (6, 8)
    torch.testing.assert_close(
        output_of(in_peft("linear", tmp_path), case.x), output_of(case.model, case.x), **TOLERANCE
    )
    fresh = build_case(SIMPLE["linear"], torch.float32).model
    loaded = load_adapter(fresh, tmp_path)["layer"]
    assert loaded.rank == 3
    assert torch.equal(output_of(fresh, case.x), output_of(case.model, case.x))


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out", "ignore:.*groups > 1")
@pytest.mark.parametrize(
    "kind", ["linear", "linear_to_one_output", "conv1d_of_transformers", "conv2d_grouped", "embedding"]
)
def test_a_start_of_more_directions_than_the_weight_has_is_written_with_as_many(tmp_path: Path, kind: str) -> None:
    case = build_case(SIMPLE[kind], torch.float32)
    one = attach(case.model, {"layer": sites(case.model)["layer"].operator.max_rank}, scaling=0.7)["layer"]
    assert isinstance(one, LoRA)
    generator = torch.Generator().manual_seed(1)
    shapes = one.lora_A.shape, one.lora_B.shape
    one.start_from(*(torch.randn(shape, generator=generator) for shape in shapes))
    randomise(one, seed=9)
    save_adapter(case.model, tmp_path, consumer="peft")
    torch.testing.assert_close(output_of(in_peft(kind, tmp_path), case.x), output_of(case.model, case.x), **TOLERANCE)
    (tmp_path / FLOWRA_PAIR[0]).unlink()
    fresh = build_case(SIMPLE[kind], torch.float32).model
    assert load_adapter(fresh, tmp_path)["layer"].rank == one.rank
    torch.testing.assert_close(output_of(fresh, case.x), output_of(case.model, case.x), **TOLERANCE)


def test_starts_of_single_experts_are_written_with_as_many_directions_as_a_matrix_has(tmp_path: Path) -> None:
    with seeded(0):
        model, again = (Mixture("mixtral").eval() for _ in range(2))
    again.load_state_dict(model.state_dict())
    ranks = {f"block.experts.down_proj:{expert}": 8 for expert in range(4)}
    for seed, one in enumerate(attach(model, ranks).values()):
        assert isinstance(one, LoRA)
        with seeded(seed):
            one.start_from(torch.randn(8, 12), torch.randn(8, 8))  # of 16 directions where a matrix has 8
        randomise(one, seed=seed)
    save_adapter(model, tmp_path, consumer="peft")
    for name in FLOWRA_PAIR:
        (tmp_path / name).unlink()
    assert {one.rank for one in load_adapter(again, tmp_path).values()} == {8}
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x), model(x), **TOLERANCE)


def test_a_start_that_is_not_finite_is_still_refused_by_name(tmp_path: Path) -> None:
    model = biased()
    one = attach(model, {"down": 4})["down"]
    assert isinstance(one, LoRA)
    one.start_from(torch.full((4, 6), torch.nan), torch.ones(5, 4))
    with pytest.raises(ValueError, match="must be finite"):
        save_adapter(model, tmp_path, consumer="peft")


@pytest.mark.parametrize("kind", ["linear", "conv1d_of_transformers", "conv2d", "conv2d_grouped", "embedding"])
@pytest.mark.parametrize("method", ["svd", "svd_masked", "flora", "rslora"])
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out", "ignore:.*groups > 1")
def test_methods_that_are_lora_in_other_words_are_exact_in_peft(tmp_path: Path, kind: str, method: str) -> None:
    case = adapted(kind, method, alpha=3.0)
    assert save_adapter(case.model, tmp_path, consumer="peft") == {}
    torch.testing.assert_close(output_of(in_peft(kind, tmp_path), case.x), output_of(case.model, case.x), **TOLERANCE)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # of block.up, whose name ends in up
def test_lora_beside_dora_gets_the_magnitude_it_has(tmp_path: Path) -> None:
    model, x = biased(), torch.randn(4, 8)
    attach(model, {"up": 2}, method="dora")
    attach(model, {"down": 2}, method="lora")
    for seed, one in enumerate(adapters(model).values()):
        randomise(one, seed=seed)
    save_adapter(model, tmp_path, consumer="peft")
    theirs = peft.PeftModel.from_pretrained(biased(), tmp_path)
    torch.testing.assert_close(output_of(theirs, x), output_of(model, x), **TOLERANCE)


def test_to_lora_states_the_error_of_what_it_cuts() -> None:
    case = adapted("linear", "dora")
    one, weight = adapters(case.model)["layer"], case.weight.detach()
    delta = one.delta_weight(weight).detach()
    whole = to_lora(one, weight)
    assert whole.error < 1e-6
    values = torch.linalg.svdvals(delta.double())
    for rank in (1, 2, 4):
        cut = to_lora(one, weight, rank=rank)
        product = cut.scaling * cut.lora_B.double() @ cut.lora_A.double()
        stated = ((product - delta.double()).norm() / delta.double().norm()).item()
        assert cut.error == pytest.approx(stated, abs=1e-12)
        assert cut.error == pytest.approx((values[rank:].norm() / values.norm()).item(), rel=1e-4)
    share = ((values[:2].square().sum() - 1e-9) / values.square().sum()).item()
    assert to_lora(one, weight, energy=share).lora_A.shape == (2, 8)
    assert to_lora(one, weight, energy=share, rank=1).lora_A.shape == (1, 8)


@pytest.mark.parametrize("kind", ["conv2d_grouped", "conv_transpose2d_grouped", "conv2d", "embedding"])
@pytest.mark.parametrize("method", ["lora", "svd", "flora", "dora"])
def test_to_lora_gives_the_update_of_every_layer(kind: str, method: str) -> None:
    case = adapted(kind, method)
    one = adapters(case.model)["layer"]
    found = to_lora(one, one.operator.to_standard(case.weight.detach()))
    again = found.scaling * one.operator.product(found.lora_B, found.lora_A)
    torch.testing.assert_close(again, delta_of(case, one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"energy": 0.0}, "energy must be in"),
        ({"energy": 1.1}, "energy"),
    ],
    ids=str,
)
def test_to_lora_refuses_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_lora(adapters(adapted("linear").model)["layer"], **options)


def test_an_offset_has_no_rank() -> None:
    model = biased()
    one = attach(model, {"norm": 1}, method="norm")["norm"]
    with pytest.raises(ValueError, match=r"must be a matrix or a stack of filters to have a rank, got shape \(6,\)"):
        to_lora(one)


def test_a_cut_is_asked_for_and_its_error_returned(tmp_path: Path) -> None:
    case = adapted("linear", "dora")
    with pytest.raises(TypeError, match=r"got DoRA at 'layer'\. Give a rank or an energy"):
        save_adapter(case.model, tmp_path, consumer="vllm")
    errors = save_adapter(case.model, tmp_path, consumer="vllm", rank=2)
    one, weight = adapters(case.model)["layer"], case.weight.detach()
    assert errors == {"layer": to_lora(one, weight, rank=2).error}
    assert 0 < errors["layer"] < 1
    with pytest.raises(ValueError, match="rank and energy must be given with a consumer"):
        save_adapter(case.model, tmp_path, rank=2)


def test_a_folder_never_holds_two_adapters(tmp_path: Path) -> None:
    tucker, plain = adapted("conv2d", "flora"), adapted("linear")
    save_adapter(tucker.model, tmp_path)
    assert names_in(tmp_path) == FLOWRA_PAIR
    save_adapter(tucker.model, tmp_path, consumer="peft")
    assert names_in(tmp_path) == PEFT_PAIR + FLOWRA_PAIR
    save_adapter(plain.model, tmp_path)
    assert names_in(tmp_path) == PEFT_PAIR
    save_adapter(tucker.model, tmp_path)
    assert names_in(tmp_path) == FLOWRA_PAIR


def test_the_layout_is_that_of_peft_s_own_file(tmp_path: Path) -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "peft_save_format.json").read_text())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)
            self.conv, self.emb, self.head = nn.Conv2d(2, 3, 3), nn.Embedding(7, 4), nn.Linear(4, 2)

    for method, ranks, saved in (
        ("lora", {"q_proj": 2, "v_proj": 4, "conv": 4, "emb": 4}, ["head"]),
        ("dora", {"q_proj": 2}, []),
    ):
        model = Net()
        if method == "lora":
            ranks = {**ranks, "conv": 3}  # ours is at most min(m, n·∏k); PEFT's file has 4 for 3 channels
        attach(model, ranks, method=method, modules_to_save=saved)
        save_adapter(model, tmp_path / method, modules_to_save=saved)
        ours = {key: list(each.shape) for key, each in load_file(tmp_path / method / PEFT_PAIR[1]).items()}
        expected = golden[f"{method}_keys_shapes"]
        if method == "lora":
            expected["base_model.model.conv.lora_A.weight"][0] = expected["base_model.model.conv.lora_B.weight"][1] = 3
        assert ours == expected


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d_grouped", "embedding"])
def test_values_survive_write_and_read(tmp_path: Path, kind: str) -> None:
    made = checkpoint_of(adapted(kind).model)
    write_checkpoint(made, tmp_path)
    read = read_checkpoint(tmp_path)
    assert read.kinds == made.kinds
    assert read.scalings == pytest.approx(made.scalings)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(read.factors["layer"], made.factors["layer"], strict=True)
    )


ROBERTA_RANK = 8


def roberta(*, layers: int, size: int) -> nn.Module:
    config = RobertaConfig(
        vocab_size=100,
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * size,
        max_position_embeddings=40,
        num_labels=3,
    )
    with seeded(2):
        return RobertaForSequenceClassification(config).eval()


def as_loralib_publishes(*, layers: int, size: int) -> dict[str, Tensor]:
    """Make a state dict of the layout of Microsoft's adapter of roberta-base for MNLI."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (ROBERTA_RANK, size), "lora_B": (size, ROBERTA_RANK)}
    made = {
        f"roberta.encoder.layer.{layer}.attention.self.{which}.{half}": torch.randn(shape, generator=generator) / 8
        for layer in range(layers)
        for which in ("query", "value")
        for half, shape in shapes.items()
    }
    head = {"dense.weight": (size, size), "dense.bias": (size,), "out_proj.weight": (3, size), "out_proj.bias": (3,)}
    return made | {f"classifier.{name}": torch.randn(shape, generator=generator) / 8 for name, shape in head.items()}


def assert_loralib_gives_equal_logits_in_peft(
    tensors: dict[str, Tensor], folder: Path, *, layers: int, size: int
) -> None:
    checkpoint = from_loralib(tensors, alpha=16, trained_modules=["classifier"], task_type="SEQ_CLS")
    assert len(checkpoint.factors) == 2 * layers
    model = roberta(layers=layers, size=size)
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        attach_checkpoint(model, checkpoint)
        ours = model(ids).logits
        save_adapter(model, folder, modules_to_save=["classifier"], task_type="SEQ_CLS", consumer="peft")
        theirs = peft.PeftModel.from_pretrained(roberta(layers=layers, size=size), folder).eval()
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-4)
    name = "roberta.encoder.layer.1.attention.self.query"
    layer, base = model.get_submodule(name), roberta(layers=layers, size=size).get_submodule(name)
    x = torch.randn(3, size)
    by_hand = base(x) + 16 / ROBERTA_RANK * x @ tensors[f"{name}.lora_A"].T @ tensors[f"{name}.lora_B"].T
    torch.testing.assert_close(layer(x), by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, ours, atol=1e-2)


def test_an_adapter_of_loralib_gives_equal_logits_in_peft(tmp_path: Path) -> None:
    tensors = as_loralib_publishes(layers=2, size=16)
    assert_loralib_gives_equal_logits_in_peft(tensors, tmp_path, layers=2, size=16)


@pytest.mark.slow
@pytest.mark.skipif("FLOWRA_DATA" not in os.environ, reason="FLOWRA_DATA does not say where real checkpoints lie")
def test_the_published_adapter_of_roberta_base_gives_equal_logits_in_peft(tmp_path: Path) -> None:
    file = Path(os.environ["FLOWRA_DATA"]) / "ckpt" / "roberta_base_lora_mnli" / "lora_mnli.safetensors"
    if not file.exists():
        pytest.skip(f"no {file}")
    tensors = load_file(file)
    synthetic = as_loralib_publishes(layers=12, size=768)
    assert {key: each.shape for key, each in tensors.items()} == {key: each.shape for key, each in synthetic.items()}
    assert_loralib_gives_equal_logits_in_peft(tensors, tmp_path, layers=12, size=768)


def test_a_fused_projection_of_loralib_has_an_update_of_its_own_for_each_block() -> None:
    a, b = torch.randn(2 * 3, 8), torch.randn(2 * 4, 3)  # queries and values of q, k, v, rank 3
    found = from_loralib({"c_attn.lora_A": a, "c_attn.lora_B": b}, alpha=6, adapted_blocks=(True, False, True))
    lora_A, lora_B = found.factors["c_attn"]
    expected = torch.cat([b[:4] @ a[:3], torch.zeros(4, 8), b[4:] @ a[3:]])
    torch.testing.assert_close(lora_B @ lora_A, expected)
    assert found.scalings == {"c_attn": 2.0}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"up.lora_A": torch.ones(2, 8)}, r"every module must have lora_A and lora_B, got \['up'\]"),
        ({"up.lora_A": torch.ones(4, 8), "up.lora_B": torch.ones(8, 2)}, "adapted_blocks must say which blocks 'up'"),
        ({"up.weight": torch.ones(2)}, "tensors must be lora_A, lora_B or lie in trained_modules"),
        ({"up.lora_A": torch.ones(8), "up.lora_B": torch.ones(8, 2)}, "factors must be A"),
        ({"../x.lora_A": torch.ones(2, 8), "../x.lora_B": torch.ones(8, 2)}, "names must be dotted paths"),
    ],
    ids=["alone", "blocks", "stray", "ndim", "name"],
)
def test_a_state_dict_that_is_not_loralib_s_is_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_loralib(tensors, alpha=1.0)


def scalings_in(model: nn.Module) -> dict[str, float]:
    return {name: each.scaling["default"] for name, each in model.named_modules() if isinstance(each, LoraLayer)}


@pytest.mark.parametrize("kind", ["conv2d_grouped", "conv2d", "embedding"])
@pytest.mark.filterwarnings("ignore:.*groups > 1")
def test_an_export_has_scaling_one_in_peft(tmp_path: Path, kind: str) -> None:
    save_adapter(adapted(kind).model, tmp_path, consumer="peft")
    assert set(scalings_in(in_peft(kind, tmp_path)).values()) == {1.0}


def test_tables_of_exceptions_name_layers_of_the_table() -> None:
    assert WRONG_LIVE.keys() | WRONG_MERGED.keys() <= SIMPLE.keys()
    assert {"lora", "dora", "svd", "svd_masked", "flora", "rslora"} <= {method.key for method in METHODS}
