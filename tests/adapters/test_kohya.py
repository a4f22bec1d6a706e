"""kohya's and LyCORIS' files: the real LyCORIS gives our outputs, we give the outputs of what it wrote."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import lycoris
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM

from flowra_adapters import Adapter, AdapterMethod, adapters, attach, load_kohya, save_kohya
from flowra_adapters.dora import DoRA
from flowra_adapters.lora import LoRA
from flowra_adapters.operators import Operator
from flowra_adapters.tucker_conv import TuckerConv
from flowra_testing.adapter_table import BIASES, BLOCKS, CONVOLUTIONS, EMBEDDINGS, LINEAR, NORMS
from flowra_testing.asserts import Case, build_case, delta_of, randomise
from flowra_testing.tiny_models import nested, seeded

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
REFUSED = {
    "conv1d_of_transformers": "Conv1D",
    "conv2d_reflect": "padding_mode='reflect'",
    "conv2d_replicate": "padding_mode='replicate'",
    "conv2d_circular": "padding_mode='circular'",
    "conv_transpose1d": "ConvTranspose1d",
    "conv_transpose2d_grouped": "ConvTranspose2d",
    "conv_transpose3d": "ConvTranspose3d",
    "embedding": "Embedding",
    "embedding_with_padding": "Embedding",
    "attention": "in_proj_weight",
    "attention_output": "NonDynamicallyQuantizableLinear",
    "mixtral_expert": "gate_up_proj",
    "standardised_conv1d": "StandardisedConv1d",
    "bias_of_linear": "bias",
    "layer_norm_gain": "LayerNorm",
}
KINDS = {**LINEAR, **CONVOLUTIONS, **EMBEDDINGS, **BLOCKS, **NORMS, **BIASES}
SERVED = [kind for kind in {**LINEAR, **CONVOLUTIONS} if kind not in REFUSED]


def adapted(kind: str, method: str = "lora", dtype: torch.dtype = torch.float32, **options: float) -> Case:
    case = build_case(KINDS[kind], dtype)
    scale = {} if method in ("norm", "bitfit") else {"scaling": -1.5}
    for seed, one in enumerate(
        attach(case.model, {case.site: KINDS[kind].rank}, method=method, **scale, **options).values()
    ):
        randomise(one, seed=seed)
    return case


def in_lycoris(model: nn.Module, file: Path, *, modules: int = 1) -> None:
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model)
    assert len(network.loras) == modules
    network.apply_to()
    network.eval()


def wrapped_by_lycoris(model: nn.Module, **options: Any) -> lycoris.LycorisNetwork:  # noqa: ANN401
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv1d", "Conv2d", "Conv3d"], "target_name": []})
    network = lycoris.create_lycoris(model, 1.0, **options)
    network.apply_to()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        spread = torch.rand(parameter.shape, generator=generator) + 0.5
        parameter.data.copy_(spread if "dora" in name else spread - 1.0)
    return network.eval()


@pytest.mark.parametrize("method", ["lora", "dora", "svd", "flora"])
@pytest.mark.parametrize("kind", SERVED)
def test_lycoris_gives_our_output_of_every_layer_it_has(tmp_path: Path, kind: str, method: str) -> None:
    case, file = adapted(kind, method), tmp_path / "adapter.safetensors"
    assert save_kohya({"lycoris": case.model}, file) == {}
    fresh = build_case(KINDS[kind], torch.float32)
    assert not torch.allclose(fresh.output(), case.output(), atol=1e-3)
    in_lycoris(fresh.model, file)
    torch.testing.assert_close(fresh.output(), case.output(), **TOLERANCE)


@pytest.mark.parametrize("method", ["lora", "dora", "svd", "flora"])
@pytest.mark.parametrize("kind", SERVED)
def test_what_was_written_is_read_back(tmp_path: Path, kind: str, method: str) -> None:
    case, file = adapted(kind, method, torch.float64), tmp_path / "adapter.safetensors"
    save_kohya({"lora_unet": case.model}, file)
    fresh = build_case(KINDS[kind], torch.float64)
    (one,) = load_kohya({"lora_unet": fresh.model}, file)["lora_unet"].values()
    torch.testing.assert_close(fresh.output(), case.output(), rtol=1e-12, atol=1e-12)
    assert one.scaling == 1.0
    tucker = (
        method == "flora" and len(KINDS[kind].inputs(torch.float32).shape) > 2 and "lora_mid" in str([*load_file(file)])
    )
    assert type(one) is (DoRA if method == "dora" else TuckerConv if tucker else LoRA)


@pytest.mark.parametrize(("kind", "word"), REFUSED.items())
def test_what_lycoris_would_compute_otherwise_is_refused_with_the_reason(tmp_path: Path, kind: str, word: str) -> None:
    method = "bitfit" if kind in BIASES else "norm" if kind in NORMS else "lora"
    with pytest.raises(ValueError, match=f"got one at .*{word}"):
        save_kohya({"lycoris": adapted(kind, method).model}, tmp_path / "new" / "adapter.safetensors")
    assert not (tmp_path / "new").exists()


def test_the_refusal_of_padding_is_justified(tmp_path: Path) -> None:
    """The same weights on a convolution that pads with zeros give the file that LyCORIS then computes wrongly."""
    case, file = adapted("conv2d_reflect"), tmp_path / "adapter.safetensors"
    case.layer.padding_mode = "zeros"  # type: ignore[assignment]
    twin = build_case(KINDS["conv2d_reflect"], torch.float32)
    twin.layer.padding_mode = "zeros"  # type: ignore[assignment]
    (one,) = attach(twin.model, {"layer": 3}, scaling=-1.5).values()
    randomise(one, seed=0)
    save_kohya({"lycoris": twin.model}, file)
    fresh = build_case(KINDS["conv2d_reflect"], torch.float32)
    in_lycoris(fresh.model, file)
    assert not torch.allclose(fresh.output(), adapted("conv2d_reflect").output(), atol=1e-2)


def test_the_file_has_unit_scale_and_the_names_of_kohya(tmp_path: Path) -> None:
    case, file = adapted("conv2d"), tmp_path / "adapter.safetensors"
    save_kohya({"lora_unet": case.model}, file)
    tensors = load_file(file)
    shapes = {key: tuple(each.shape) for key, each in tensors.items()}
    assert shapes == {
        "lora_unet_layer.alpha": (),
        "lora_unet_layer.lora_down.weight": (3, 3, 3, 3),
        "lora_unet_layer.lora_up.weight": (5, 3, 1, 1),
    }
    assert float(tensors["lora_unet_layer.alpha"]) == 3.0
    up, down = tensors["lora_unet_layer.lora_up.weight"].flatten(1), tensors["lora_unet_layer.lora_down.weight"]
    one = adapters(case.model)["layer"]
    torch.testing.assert_close((up @ down.flatten(1)).view(5, 3, 3, 3), delta_of(case, one).detach())


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_kohya({"lycoris": adapted("conv2d", "flora").model}, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.mixed_up = nn.ModuleDict({"grouped": nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)})
        self.point = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.point(torch.tanh(self.mixed_up["grouped"](torch.tanh(self.stem(x))))))
        output: Tensor = self.head(hidden.mean((-1, -2)))
        return output


def net() -> Net:
    with seeded(2):
        return Net().eval()


def image() -> Tensor:
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(image())
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, {"stem": LoRA, "mixed_up.grouped": LoRA, "point": LoRA, "head": LoRA}),
        ({"use_tucker": True}, {"stem": LoRA, "mixed_up.grouped": LoRA, "point": LoRA, "head": LoRA}),
        (
            {"use_tucker": True, "conv_dim": 2},
            {"stem": TuckerConv, "mixed_up.grouped": TuckerConv, "point": LoRA, "head": LoRA},
        ),
        ({"dora_wd": True}, {"stem": DoRA, "mixed_up.grouped": DoRA, "point": DoRA, "head": DoRA}),
        (
            {"dora_wd": True, "use_tucker": True},
            {"stem": DoRA, "mixed_up.grouped": DoRA, "point": DoRA, "head": DoRA},
        ),
        ({"rs_lora": True}, {"stem": LoRA, "mixed_up.grouped": LoRA, "point": LoRA, "head": LoRA}),
        ({"use_scalar": True}, {"stem": LoRA, "mixed_up.grouped": LoRA, "point": LoRA, "head": LoRA}),
    ],
    ids=str,
)
def test_what_lycoris_wrote_gives_its_outputs_here(
    tmp_path: Path, options: dict[str, Any], kinds: dict[str, type[Adapter]]
) -> None:
    theirs, file = net(), tmp_path / "theirs.safetensors"
    network = wrapped_by_lycoris(theirs, linear_dim=6, linear_alpha=3, algo="lora", **{"conv_dim": 5, **options})
    network.save_weights(str(file), None, {})
    ours = net()
    before = answer(ours)
    found = load_kohya({"lycoris": ours}, file)["lycoris"]
    assert {name: type(one) for name, one in found.items()} == kinds
    assert all(one.rank <= one.operator.max_rank for one in found.values())
    torch.testing.assert_close(answer(ours), answer(theirs), **TOLERANCE)
    assert not torch.allclose(before, answer(ours), atol=1e-2)


def test_lycoris_reads_again_what_it_wrote_and_we_rewrote(tmp_path: Path) -> None:
    theirs, ours, last = net(), net(), net()
    network = wrapped_by_lycoris(theirs, linear_dim=2, linear_alpha=1, conv_dim=2, algo="lora", use_tucker=True)
    network.save_weights(str(tmp_path / "1.safetensors"), None, {})
    load_kohya({"lycoris": ours}, tmp_path / "1.safetensors")
    save_kohya({"lycoris": ours}, tmp_path / "2.safetensors")
    in_lycoris(last, tmp_path / "2.safetensors", modules=4)
    torch.testing.assert_close(answer(last), answer(theirs), **TOLERANCE)
    assert load_file(tmp_path / "1.safetensors").keys() == load_file(tmp_path / "2.safetensors").keys()


@given(
    groups=st.sampled_from([1, 2, 3, 6]),
    outputs=st.integers(1, 3),
    inputs=st.integers(1, 3),
    size=st.integers(1, 2),
    rank=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_any_rank_of_any_grouped_product_is_read_and_written_exactly(
    groups: int, outputs: int, inputs: int, size: int, rank: int, seed: int
) -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"layer": nn.Conv1d(groups * inputs, groups * outputs, size, groups=groups).double()})

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    down, up = drawn(rank, inputs, size), drawn(groups * outputs, rank, 1)
    expected = (up.flatten(1) @ down.flatten(1)).view(-1, inputs, size) * (2 / rank)
    with tempfile.TemporaryDirectory() as folder:
        file, ours = Path(folder) / "x.safetensors", model()
        save_file(tensors_of("p_layer", down, up, alpha=2), file)
        one = load_kohya({"p": ours}, file)["p"]["layer"]
        assert one.rank <= one.operator.max_rank
        torch.testing.assert_close(one.delta_weight(), expected, rtol=1e-12, atol=1e-12)
        save_kohya({"p": ours}, file)
        written = load_file(file)
        assert len(written["p_layer.lora_down.weight"]) <= min(groups * outputs, inputs * size, groups * rank)
        product = written["p_layer.lora_up.weight"].flatten(1) @ written["p_layer.lora_down.weight"].flatten(1)
        torch.testing.assert_close(product.view(-1, inputs, size), expected, rtol=1e-12, atol=1e-12)
        again = load_kohya({"p": model()}, file)["p"]["layer"]
        assert again.rank <= again.operator.max_rank


def tensors_of(name: str, down: Tensor, up: Tensor, *, alpha: float | None = None) -> dict[str, Tensor]:
    found = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return found if alpha is None else found | {f"{name}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_rank_of_each_group_survives_the_file(tmp_path: Path, groups: int, rank: int) -> None:
    def model() -> nn.Module:
        with seeded(3):
            return nn.ModuleDict({"layer": nn.Conv2d(12, 12, 3, groups=groups)})

    ours, fresh = model(), model()
    randomise(attach(ours, {"layer": rank}, scaling=1.0)["layer"])
    save_kohya({"lycoris": ours}, tmp_path / "x.safetensors")
    one, two = adapters(ours)["layer"], load_kohya({"lycoris": fresh}, tmp_path / "x.safetensors")["lycoris"]["layer"]
    assert two.rank == rank
    torch.testing.assert_close(two.delta_weight(), one.delta_weight(), rtol=1e-6, atol=1e-6)


def test_one_file_holds_the_adapters_of_several_models(tmp_path: Path) -> None:
    unet, encoder, file = net(), nested("layers.0.q_proj"), tmp_path / "both.safetensors"
    randomise(attach(unet, {"stem": 2}, scaling=0.5)["stem"])
    randomise(attach(encoder, {"q_proj": 2}, scaling=0.5)["layers.0.q_proj"])
    save_kohya({"lora_unet": unet, "lora_te": encoder}, file)
    assert {key.partition(".")[0] for key in load_file(file)} == {"lora_unet_stem", "lora_te_layers_0_q_proj"}
    fresh, fresh_encoder = net(), nested("layers.0.q_proj")
    found = load_kohya({"lora_unet": fresh, "lora_te": fresh_encoder}, file)
    assert {prefix: list(group) for prefix, group in found.items()} == {
        "lora_unet": ["stem"],
        "lora_te": ["layers.0.q_proj"],
    }
    torch.testing.assert_close(answer(fresh), answer(unet), **TOLERANCE)
    alone = net()
    with pytest.raises(ValueError, match="'lora_te_layers_0_q_proj', no module of these models"):
        load_kohya({"lora_unet": alone}, file)
    load_kohya({"lora_unet": alone}, file, ignore=["lora_te"])
    torch.testing.assert_close(answer(alone), answer(unet), **TOLERANCE)


def test_a_name_that_means_two_modules_is_refused_in_both_directions(tmp_path: Path) -> None:
    """LyCORIS takes the last of them without a word."""
    model, file = nested("a.b_c", "a_b.c", "other"), tmp_path / "x.safetensors"
    attach(model, {"a.b_c": 2})
    with pytest.raises(ValueError, match=r"got 'lycoris_a_b_c' for .*'a.b_c'.*'a_b.c'"):
        save_kohya({"lycoris": model}, file)
    assert not file.exists()
    save_file(tensors_of("lycoris_a_b_c", torch.ones(2, 8), torch.ones(8, 2)), file)
    fresh = nested("a.b_c", "a_b.c", "other")
    with pytest.raises(ValueError, match=r"'lycoris_a_b_c', one of \['a.b_c', 'a_b.c'\]"):
        load_kohya({"lycoris": fresh}, file)
    save_file(tensors_of("lora_unet_x", torch.ones(2, 8), torch.ones(8, 2)), file)
    with pytest.raises(ValueError, match="'lora_unet_x', one of"):
        load_kohya({"lora": nested("unet.x"), "lora_unet": nested("x")}, file)


def test_ranks_are_filled_up_to_a_ladder_and_lycoris_sees_no_difference(tmp_path: Path) -> None:
    for kind, method in (("linear", "lora"), ("conv2d", "lora"), ("conv2d", "flora"), ("conv2d_grouped", "dora")):
        case, file = adapted(kind, method), tmp_path / "x.safetensors"
        save_kohya({"lycoris": case.model}, file, rank_step=4)
        tensors = load_file(file)
        ranks = {len(tensors["lycoris_layer.lora_down.weight"]), tensors["lycoris_layer.lora_up.weight"].shape[1]}
        assert ranks == {4 if kind != "conv2d_grouped" else 8} == {int(tensors["lycoris_layer.alpha"])}
        fresh = build_case(KINDS[kind], torch.float32)
        in_lycoris(fresh.model, file)
        torch.testing.assert_close(fresh.output(), case.output(), **TOLERANCE)


def test_without_alpha_the_scale_is_1_as_old_files_mean_it(tmp_path: Path) -> None:
    model, file = nested("layer"), tmp_path / "x.safetensors"
    save_file(tensors_of("lora_unet_layer", torch.ones(2, 8), torch.ones(8, 2)), file)
    one = load_kohya({"lora_unet": model}, file)["lora_unet"]["layer"]
    torch.testing.assert_close(one.delta_weight(), torch.full((8, 8), 2.0))


def test_the_dtype_is_the_files_unless_another_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(tensors_of("p_layer", torch.ones(2, 8).half(), torch.ones(8, 2).half(), alpha=1), file)
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32)):
        one = load_kohya({"p": nested("layer")}, file, dtype=dtype)["p"]["layer"]
        assert {each.dtype for each in one.parameters()} == {expected}


def test_adapters_of_rank_0_are_left_out_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    model, file = net(), tmp_path / "x.safetensors"
    attach(model, {"head": 0})
    with pytest.raises(ValueError, match="at least one module of rank ≥ 1"):
        save_kohya({"lycoris": model}, file)
    attach(model, {"stem": 2, "point": 0}, adapter="other")
    save_kohya({"lycoris": model}, file, adapter="other")
    assert {key.partition(".")[0] for key in load_file(file)} == {"lycoris_stem"}


class Cut(Adapter):
    """An update of full rank."""

    def __init__(self, operator: Operator, **_: object) -> None:
        super().__init__(operator)
        self.update = nn.Parameter(torch.randn(operator.shape, generator=torch.Generator().manual_seed(0)))

    rank = 1  # type: ignore[assignment]

    def forward(self, x: Tensor, base: object = None) -> Tensor:
        return self.operator.apply(x, self.update)

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        return self.update

    def grow(self, rows: Tensor) -> None:
        raise NotImplementedError

    def shrink(self, keep: object) -> None:
        raise NotImplementedError

    def cost(self, rank: int) -> int:
        return self.update.numel()


def test_what_is_not_lora_is_cut_with_the_stated_error_or_refused(tmp_path: Path) -> None:
    method = AdapterMethod(name="full", adapter=Cut, scaling=None)
    model, file = nested("layer"), tmp_path / "x.safetensors"
    delta = attach(model, {"layer": 1}, method=method)["layer"].delta_weight().detach()
    with pytest.raises(TypeError, match=r"got Cut at 'layer'.*Give a rank"):
        save_kohya({"lycoris": model}, file)
    errors = save_kohya({"lycoris": model}, file, rank=3)
    one = load_kohya({"lycoris": nested("layer")}, file)["lycoris"]["layer"]
    assert one.rank == 3
    error = float((one.delta_weight().detach() - delta).norm() / delta.norm())
    assert errors == {"lycoris_layer": pytest.approx(error, rel=1e-5)}
    assert error == pytest.approx(float(torch.linalg.svdvals(delta)[3:].norm() / delta.norm()), rel=1e-5)


def test_updates_of_parts_of_a_layer_become_one(tmp_path: Path) -> None:

    with seeded(0):
        config = FalconConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        ours = FalconForCausalLM(config).eval()
    name = "transformer.h.0.self_attention.query_key_value"
    for seed, one in enumerate(attach(ours, {f"{name}:q": 2, f"{name}:v": 3}, scaling=0.5).values()):
        randomise(one, seed=seed)
    save_kohya({"lycoris": ours}, tmp_path / "x.safetensors")
    with seeded(0):
        fresh = FalconForCausalLM(config).eval()
    found = load_kohya({"lycoris": fresh}, tmp_path / "x.safetensors")["lycoris"]
    assert {key: one.rank for key, one in found.items()} == {name: 5}
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, ours(ids).logits, **TOLERANCE)


GOOD = {
    "p_stem.lora_down.weight": torch.ones(2, 3, 3, 3),
    "p_stem.lora_up.weight": torch.ones(8, 2, 1, 1),
    "p_stem.alpha": torch.tensor(2.0),
    "p_head.lora_down.weight": torch.ones(2, 4),
    "p_head.lora_up.weight": torch.ones(5, 2),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_head.lora_up.weight": None}, "lora_down and lora_up, got \\['lora_down'\\] for 'p_head'"),
        ({"p_stem.lora_down.weight": None}, "lora_down and lora_up, got \\['alpha', 'lora_up'\\]"),
        ({"p_other.alpha": torch.tensor(1.0)}, "lora_down and lora_up, got \\['alpha'\\] for 'p_other'"),
        ({"p_head.hada_w1_a": torch.ones(2)}, "got 'p_head.hada_w1_a'.*LoHa"),
        ({"head.lora_down": torch.ones(2)}, "got 'head.lora_down'"),
        ({"lora_te_x.lora_down.weight": torch.ones(2, 4), "lora_te_x.lora_up.weight": torch.ones(5, 2)}, "no module"),
        ({"p_head.lora_up.weight": torch.full((5, 2), float("nan"))}, "finite.*'p_head.lora_up.weight'"),
        ({"p_head.lora_up.weight": torch.ones(5, 2, dtype=torch.int64)}, "floating point"),
        ({"p_head.lora_up.weight": torch.ones(5, 2, 1, 1)}, "lora_up must have shape \\(5, 2\\)"),
        ({"p_head.lora_up.weight": torch.ones(5, 3)}, "lora_up must have shape \\(5, 2\\)"),
        ({"p_head.lora_down.weight": torch.ones(0, 4)}, "with rank ≥ 1"),
        ({"p_head.lora_down.weight": torch.tensor(1.0)}, "with rank ≥ 1"),
        ({"p_head.lora_down.weight": torch.ones(2, 5)}, "lora_down must have shape \\(2, 4\\)"),
        ({"p_head.lora_mid.weight": torch.ones(2, 2)}, "lora_mid must be of a convolution"),
        ({"p_stem.lora_down.weight": torch.ones(2, 3, 1, 1)}, "lora_down must have shape \\(2, 3, 3, 3\\)"),
        ({"p_stem.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "lora_down must have shape \\(2, 3, 1, 1\\)"),
        ({"p_head.dora_scale": torch.ones(1, 4)}, "dora_scale must have shape \\(5, 1\\)"),
        ({"p_head.alpha": torch.tensor(0.0)}, "alpha must be one finite number other than 0"),
        ({"p_head.alpha": torch.ones(3)}, "alpha must be one finite number"),
        ({"p_head.alpha": torch.tensor(float("inf"))}, "must be finite"),
        ({"p_mixed_up.lora_down.weight": torch.ones(2, 4), "p_mixed_up.lora_up.weight": torch.ones(5, 2)}, "no layer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_file_is_refused_and_the_model_left_as_it_was(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {key: each for key, each in {**GOOD, **change}.items() if each is not None}
    save_file(tensors, tmp_path / "x.safetensors")
    model = net()
    before = {key: each.clone() for key, each in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_kohya({"p": model}, tmp_path / "x.safetensors")
    assert before.keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="attached"):
        adapters(model)
    assert all(each.requires_grad for each in model.parameters())


def test_the_good_file_of_that_table_is_read(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "x.safetensors")
    assert list(load_kohya({"p": net()}, tmp_path / "x.safetensors")["p"]) == ["stem", "head"]


def test_nothing_but_safetensors_is_opened(tmp_path: Path) -> None:
    for name in ("x.pt", "x.ckpt"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(ValueError, match=r"must be a .safetensors file.*never opened"):
            load_kohya({"p": net()}, tmp_path / name)
    (tmp_path / "y.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="whole safetensors file"):
        load_kohya({"p": net()}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="none in"):
        load_kohya({"p": net()}, tmp_path / "z.safetensors")
    for folder in ("nowhere", "y.safetensors"):  # no folder, and a file
        with pytest.raises(ValueError, match=rf"^adapter must hold z.safetensors, got none in .*{folder}\.$"):
            load_kohya({"p": net()}, tmp_path / folder / "z.safetensors")


def test_a_scale_that_leaves_the_dtype_is_refused(tmp_path: Path) -> None:
    model = nested("layer")
    one = attach(model, {"layer": 2}, scaling=1e7, dtype=torch.float16)["layer"]
    randomise(one)
    with pytest.raises(ValueError, match="finite at unit scale"):
        save_kohya({"lycoris": model}, tmp_path / "x.safetensors")


def test_if_one_model_refuses_the_others_lose_what_they_got(tmp_path: Path) -> None:
    file, one, two = tmp_path / "x.safetensors", nested("layer"), nested("layer")
    save_file(
        {
            **tensors_of("a_layer", torch.ones(2, 8), torch.ones(8, 2)),
            **tensors_of("b_layer", torch.ones(2, 8), torch.ones(8, 2)),
        },
        file,
    )
    attach(two, {"layer": 1})
    with pytest.raises(ValueError, match="already attached"):
        load_kohya({"a": one, "b": two}, file)
    with pytest.raises(ValueError, match="attached"):
        adapters(one)
    assert adapters(two)["layer"].rank == 1
