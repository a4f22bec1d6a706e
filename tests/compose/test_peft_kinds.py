"""Every kind of adapter that PEFT saves is read as PEFT computes it, and what is written PEFT computes alike."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from flowra_compose import AdapterState, LowRankUpdate, base_weights, merge_folders, read_adapter, write_adapter

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
TOKENS = torch.arange(24).remainder(11).reshape(2, 12)


class Net(nn.Module):
    """A layer of every type: tokens (2, 12) to logits (2, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.line = nn.Conv1d(8, 6, 3, padding=1, stride=2)
        self.plane = nn.Conv2d(1, 4, (3, 2), padding=1)
        self.point = nn.Conv2d(4, 3, 1)
        self.space = nn.Conv3d(3, 2, (1, 2, 2), bias=False)
        self.norm = nn.LayerNorm(60)
        self.block = nn.Sequential(nn.Linear(60, 7), nn.Tanh(), nn.Linear(7, 7, bias=False))
        self.head = nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.line(self.emb(tokens).transpose(1, 2)).tanh()
        x = self.point(self.plane(x[:, None]).tanh()).tanh()
        x = self.space(x[:, :, None]).flatten(1)[:, :60]
        logits: Tensor = self.head(self.block(self.norm(x)))
        return logits


def net() -> Net:
    model, generator = Net(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return model.eval()


def save_with_peft(folder: Path, config: LoraConfig, seed: int = 1) -> nn.Module:
    """Save an adapter of random values; return the wrapped model."""
    model = get_peft_model(net(), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" in name:
            parameter.data = parameter.data * (1 + torch.rand(parameter.shape, generator=generator))
        elif parameter.requires_grad and "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        elif parameter.requires_grad:
            parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) / 4
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def with_updates(model: nn.Module, states: Mapping[float, AdapterState]) -> nn.Module:
    """Add weighted updates to a model's parameters, and put trained modules in."""
    for weight, state in states.items():
        for name, update in state.updates.items():
            parameter = model.get_parameter(name if update.layout == "vector" else f"{name}.weight")
            delta = update.delta_weight()
            delta = delta.T if update.layout == "embedding" else delta.reshape(update.parameter_shape)
            parameter += weight * (delta if delta.shape == parameter.shape else delta.T)
        for name, tensor in state.modules_to_save.items():
            model.get_parameter(name).copy_(tensor)
    return model


def assert_alike(first: nn.Module, second: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(first(TOKENS), second(TOKENS), rtol=1e-4, atol=1e-4)
        assert float((net()(TOKENS) - first(TOKENS)).abs().max()) > 1e-2


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / TENSORS)
    for key, tensor in changes.items():
        tensors.pop(PREFIX + key, None)
        if tensor is not None:
            tensors[PREFIX + key] = tensor
    save_file(tensors, folder / TENSORS)


LAYERS = ["emb", "line", "plane", "point", "space", "block.0", "block.2"]
WITH_BIAS = ["line", "plane", "point", "block.0"]
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["block.0", "block.2"]},
    "embedding": {"target_modules": ["emb"], "use_rslora": True},
    "conv1d": {"target_modules": ["line"]},
    "conv2d": {"target_modules": ["plane", "point"], "rank_pattern": {"point": 1}, "alpha_pattern": {"plane": 5}},
    "conv3d": {"target_modules": ["space"]},
    "all_layers": {"target_modules": LAYERS, "rank_pattern": {"line": 2}},
    "lora_bias": {"target_modules": WITH_BIAS, "lora_bias": True, "use_rslora": True},
    "bias_all": {"target_modules": LAYERS, "bias": "all"},
    "bias_all_and_head": {"target_modules": ["block.0"], "bias": "all", "modules_to_save": ["head"]},
    "bias_of_adapted": {"target_modules": LAYERS, "bias": "lora_only"},
    "both_biases": {"target_modules": WITH_BIAS, "bias": "lora_only", "lora_bias": True},
    "dora": {"target_modules": ["emb", "line", "plane", "block.0", "block.2"], "use_dora": True},
    "dora_and_bias": {"target_modules": ["block.0"], "use_dora": True, "use_rslora": True, "bias": "all"},
    "head": {"target_modules": LAYERS, "modules_to_save": ["head"]},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*invalid shape", "ignore:.*the targeted layer of type")


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A folder that PEFT has written, and the model that it was written from; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / request.param
    return folder, save_with_peft(folder, LoraConfig(r=3, lora_alpha=4, **KINDS[request.param]))


def test_a_kind_is_read_as_peft_computes_it(saved: tuple[Path, nn.Module]) -> None:
    folder, model = saved
    state = read_adapter(folder, net().state_dict())
    assert_alike(with_updates(net(), {1.0: state}), model)


def test_a_kind_is_written_as_peft_reads_it(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, model = saved
    base = net().state_dict()
    write_adapter(read_adapter(folder, base), tmp_path / "out", base)
    assert_alike(PeftModel.from_pretrained(net(), str(tmp_path / "out")).eval(), model)
    again = read_adapter(tmp_path / "out", base)
    assert_alike(with_updates(net(), {1.0: again}), model)
    write_adapter(again, tmp_path / "again", base)
    assert (tmp_path / "out" / CONFIG).read_bytes() == (tmp_path / "again" / CONFIG).read_bytes()


def test_a_kind_merges_with_another_into_what_peft_reads(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, _ = saved
    other = tmp_path / "other"
    save_with_peft(other, LoraConfig(r=2, target_modules=["plane", "block.0"], lora_alpha=3), seed=2)
    base = net().state_dict()
    merge_folders([folder, other], [0.6, -1.5], tmp_path / "out", base=base)
    states = {0.6: read_adapter(folder, base), -1.5: read_adapter(other)}
    merged = PeftModel.from_pretrained(net(), str(tmp_path / "out")).eval()
    assert_alike(merged, with_updates(net(), states))


@pytest.mark.parametrize("left", [(3, 3), (2, 1), (3, 0)], ids=str)
def test_adalora_is_read_as_peft_computes_it(tmp_path: Path, left: tuple[int, int]) -> None:
    ranks = dict(zip(["block.0", "block.2"], left, strict=True))
    config = AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, target_modules=list(ranks), total_step=10, tinit=1)
    model = get_peft_model(net(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    model.save_pretrained(tmp_path / "a")
    masks = {f"{name}.lora_E": [each < rank for each in range(3)] for name, rank in ranks.items()}
    tensors = load_file(tmp_path / "a" / TENSORS)
    for name, rank in ranks.items():
        for part in "AE":
            tensors[f"{PREFIX}{name}.lora_{part}"] = tensors[f"{PREFIX}{name}.lora_{part}"][:rank].clone()
        tensors[f"{PREFIX}{name}.lora_B"] = tensors[f"{PREFIX}{name}.lora_B"][:, :rank].clone()
        model.get_submodule(f"base_model.model.{name}").lora_E["default"].data[rank:] = 0
    save_file(tensors, tmp_path / "a" / TENSORS)
    edit_config(tmp_path / "a", rank_pattern=masks)
    state = read_adapter(tmp_path / "a")
    assert {name: update.rank for name, update in state.updates.items()} == {k: v for k, v in ranks.items() if v}
    assert_alike(with_updates(net(), {1.0: state}), model.eval())
    write_adapter(state, tmp_path / "out")
    assert_alike(PeftModel.from_pretrained(net(), str(tmp_path / "out")).eval(), model)
    edit_config(tmp_path / "a", rank_pattern={"block.0.lora_E": [True]})
    with pytest.raises(ValueError, match="rank_pattern must hold init_r booleans for each key"):
        read_adapter(tmp_path / "a")
    edit_config(tmp_path / "a", rank_pattern={"block.0.lora_E": [False] * 2 + [True]}, init_r=3)
    if left != (3, 0):
        with pytest.raises(ValueError, match="rank must be the configured 1, got"):
            read_adapter(tmp_path / "a")


@torch.no_grad()
def test_dora_of_transposed_layers_is_read_as_peft_computes_it(tmp_path: Path) -> None:
    shape = {"vocab_size": 23, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    base = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=6, use_dora=True, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + torch.rand(parameter.shape) / 2
    model.save_pretrained(tmp_path / "a")
    state = read_adapter(tmp_path / "a", base.state_dict())
    assert state.updates["transformer.h.0.attn.c_proj"].shape == (8, 8)  # square: transposed, as the configuration says
    tokens = torch.arange(12).reshape(2, 6)
    expected = model.eval()(tokens).logits
    torch.testing.assert_close(with_updates_of_gpt2(base, state)(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    merge_folders([tmp_path / "a"], [1], tmp_path / "out", base=base.state_dict())
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out")).eval()
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert float((base(tokens).logits - expected).abs().max()) > 0.01


@torch.no_grad()
def with_updates_of_gpt2(base: nn.Module, state: AdapterState) -> nn.Module:
    model = copy.deepcopy(base)
    for name, update in state.updates.items():
        model.get_parameter(f"{name}.weight").add_(update.delta_weight().T)
    return model


# what needs the base


@pytest.mark.parametrize("kind", ["dora", "bias_all"])
def test_what_means_nothing_without_its_base_says_what_to_do(kind: str, tmp_path: Path) -> None:
    save_with_peft(tmp_path / "a", LoraConfig(r=3, **KINDS[kind]))
    with pytest.raises(ValueError, match=r"base must be given for .*, got none for .* Give base=base_weights"):
        read_adapter(tmp_path / "a")
    some = net().state_dict()
    del some["block.0.weight"], some["block.0.bias"]
    with pytest.raises(ValueError, match=r"base must hold 'block\.0\.(weight|bias)', got .* Give base=<function"):
        read_adapter(tmp_path / "a", some)
    name = "block.0" if kind == "dora" else "block.0.bias"
    wrong = net().state_dict() | {"block.0.weight": torch.ones(2, 2), "block.0.bias": torch.ones(2)}
    state = read_adapter(tmp_path / "a", wrong)
    with pytest.raises(ValueError, match=rf"base must hold .* as a floating tensor .*, got \(2,.*; for '{name}'"):
        state.updates[name]


def test_a_base_may_be_a_function_of_the_name(tmp_path: Path) -> None:
    save_with_peft(tmp_path / "a", LoraConfig(r=3, **KINDS["dora"]))
    renamed = {f"model.{name}": tensor for name, tensor in net().state_dict().items()}
    state = read_adapter(tmp_path / "a", lambda name: renamed[f"model.{name}"])
    expected = read_adapter(tmp_path / "a", net().state_dict())
    assert torch.equal(state.updates["line"].delta_weight(), expected.updates["line"].delta_weight())
    from_model = read_adapter(tmp_path / "a", net().get_parameter).updates["line"]
    assert torch.equal(from_model.delta_weight(), expected.updates["line"].delta_weight())
    assert not from_model.lora_B.requires_grad


def shards(folder: Path) -> Callable[..., None]:
    tensors = net().state_dict()
    first = {name: tensor for name, tensor in tensors.items() if name < "head"}
    second = {name: tensor for name, tensor in tensors.items() if name >= "head"}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    places = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    places |= dict.fromkeys(second, "model-00002-of-00002.safetensors")

    def write(**changes: object) -> None:
        index = {"metadata": {}, "weight_map": places | changes}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def test_base_weights_are_those_of_one_file_or_of_several(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    save_file(net().state_dict(), tmp_path / "one" / "model.safetensors")
    shards(tmp_path / "many")()
    expected = net().state_dict()
    for folder in ("one", "many"):
        weights = base_weights(tmp_path / folder)
        assert weights.keys() == expected.keys()
        assert len(weights) == len(expected)
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        with pytest.raises(KeyError):
            weights["other"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head.bias": "../secret.safetensors"}, r"weight_map must name safetensors files beside it, got \['\.\./"),
        ({"head.bias": "model.bin"}, r"weight_map must name safetensors files beside it, got \['model\.bin'\]"),
        ({"head.bias": 3}, "weight_map must give a file for each tensor"),
        ({"more": "model-00001-of-00002.safetensors"}, r"got a file without \['more'\]"),
        ({"head.bias": "lost.safetensors"}, r"lost\.safetensors must be a whole safetensors file"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, dict) else "",
)
def test_a_hostile_index_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    shards(tmp_path)(**changes)
    with pytest.raises(ValueError, match=message):
        base_weights(tmp_path)


def test_a_model_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ValueError, match=r"folder must hold model\.safetensors or .*, got .*Save the model"):
        base_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json must be JSON"):
        base_weights(tmp_path)


def test_the_base_s_own_weight_beside_an_embedding_is_dropped_where_it_is_the_base_s(tmp_path: Path) -> None:
    model = save_with_peft(tmp_path / "a", LoraConfig(r=2, target_modules=["emb"]))
    own = net().emb.weight.data
    edit_tensors(tmp_path / "a", **{"emb.base_layer.weight": own.half()})  # as saved by who trains in float16
    with pytest.raises(ValueError, match=r"base must be given for .*, got none for \['emb\.weight'\]"):
        read_adapter(tmp_path / "a")
    state = read_adapter(tmp_path / "a", net().state_dict())
    assert_alike(with_updates(net(), {1.0: state}), model)
    edit_tensors(tmp_path / "a", **{"emb.base_layer.weight": own + 1})
    with pytest.raises(ValueError, match=r"base_layer\.weight must be the base's own weight, got another.*'emb'"):
        read_adapter(tmp_path / "a", net().state_dict()).updates["emb"]


# what is refused


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_a_grouped_convolution_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), LoraConfig(r=4, target_modules=["0"]))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"one group, got 2: PEFT's lora_A reads the channels of all groups.*for '0'"):
        read_adapter(tmp_path / "a")


def test_an_attention_block_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.MultiheadAttention(4, 2)), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"modules must be wrapped once, got \['0\.base_layer\.out_proj'\]"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("dora", {"line.lora_magnitude_vector": None}, r"got line \(lora_A, lora_B\)"),
        ("dora", {"line.lora_magnitude_vector": torch.ones(5)}, r"must have 6 values, got \(5,\); for 'line'"),
        ("dora", {"line.lora_magnitude_vector": torch.ones(2, 3)}, r"must have 6 values, got \(2, 3\); for 'line'"),
        ("lora_bias", {"line.lora_B.bias": torch.ones(2, 3)}, r"vectors, got \(2, 3\); for 'line\.bias'"),
        ("lora_bias", {"line.lora_B.bias": None}, r"got line \(lora_A, lora_B\)"),
        ("lora_bias", {"norm.bias": torch.ones(60)}, r"belong to modules_to_save, got \['base_model\.model\.norm"),
        ("both_biases", {"line.base_layer.bias": torch.ones(5)}, r"got 6 and 5 values; for 'line\.bias'"),
        ("conv1d", {"line.lora_B.weight": torch.ones(6, 3, 2)}, r"got \(3, 8, 3\) and \(6, 3, 2\); for 'line'"),
        ("conv1d", {"line.lora_A.weight": torch.ones(3, 8, 0)}, "for 'line'"),
        ("embedding", {"emb.lora_embedding_B": torch.ones(8, 2)}, r"got \(3, 11\) and \(8, 2\); for 'emb'"),
        ("embedding", {"emb.lora_A.weight": torch.ones(3, 8)}, r"got emb \(lora_A, lora_embedding_A"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit_are_refused(
    kind: str, changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    save_with_peft(tmp_path / "a", LoraConfig(r=3, **KINDS[kind]))
    edit_tensors(tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / "a", net().state_dict())


PAIR = LowRankUpdate(torch.ones(2, 4), torch.ones(3, 2))
VECTOR = LowRankUpdate(torch.ones(1, 1), torch.ones(3, 1), 2.0, layout="vector")


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"fc": PAIR, "norm.weight": VECTOR}, r"got vectors that are no biases: \['norm\.weight'\]\. Add their"),
        ({"fc": PAIR, "norm.bias": VECTOR}, r"got \['norm\.bias'\]\. Give base="),
        ({"fc.bias": VECTOR}, "got vectors only.*PEFT has no adapter of biases alone"),
        ({"fc": PAIR, "fc.bias": VECTOR, "emb": replace(PAIR, layout="embedding")}, r"got \['fc\.bias'\]\. Give base="),
    ],
    ids=["norm", "not adapted", "alone", "beside an embedding"],
)
def test_what_peft_has_no_word_for_is_refused(updates: dict[str, LowRankUpdate], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_adapter(AdapterState(updates=updates), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_of_an_adapted_layer_is_written_as_lora_bias_with_zeros_for_the_others(tmp_path: Path) -> None:
    updates = {"fc": PAIR, "fc.bias": VECTOR, "other": replace(PAIR, lora_B=PAIR.lora_B.bfloat16())}
    write_adapter(AdapterState(updates=updates), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    assert tensors[f"{PREFIX}fc.lora_B.bias"].tolist() == [2, 2, 2]
    assert tensors[f"{PREFIX}other.lora_B.bias"].tolist() == [0, 0, 0]
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["lora_bias"], config["bias"], config["target_modules"]) == (True, "none", ["fc", "other"])
    again = read_adapter(tmp_path)
    assert torch.equal(again.updates["fc.bias"].delta_weight(), VECTOR.delta_weight())
    assert again.updates["fc.bias"].parameter_shape == (3,)
