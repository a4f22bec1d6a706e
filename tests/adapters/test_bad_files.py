"""A damaged or hostile adapter folder is refused with one clear line, and the model is left as it was."""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowra_adapters import AdapterCheckpoint, attach, load_adapter, save_adapter, write_checkpoint
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import mlp, nested

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = mlp()
    for one in attach(model, {"up": 3, "down": 2}, modules_to_save=["head"]).values():
        randomise(one)
    save_adapter(model, tmp_path / "adapter", modules_to_save=["head"])
    return tmp_path / "adapter"


def assert_refused(folder: Path, match: str, model: nn.Module | None = None) -> None:
    model = model or mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=match) as caught:
        load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def edit_config(folder: Path, changes: Mapping[str, Any]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999], ids=str)
def test_a_truncated_tensor_file_is_refused(folder: Path, share: float) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: int(len(data) * share)])
    assert_refused(folder, "must be a whole safetensors file")


def test_a_tensor_file_of_noise_is_refused(folder: Path) -> None:
    (folder / TENSORS).write_bytes(bytes(range(256)) * 8)
    assert_refused(folder, "must be a whole safetensors file")


def test_a_header_that_declares_a_huge_rank_is_refused(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [10**9, 8], "data_offsets": [0, 32 * 10**9]}
    header = json.dumps({f"{PREFIX}up.lora_A.weight": entry}).encode()
    (folder / TENSORS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    assert_refused(folder, "must be a whole safetensors file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("key", ["up.lora_A.weight", "down.lora_B.weight", "head.bias"])
def test_a_tensor_that_is_not_finite_is_refused(folder: Path, key: str, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[PREFIX + key].view(-1)[1:2].fill_(value))
    assert_refused(folder, "must be finite, got NaN or infinity")


BAD_TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "input_size": ({"up.lora_A.weight": torch.ones(3, 9)}, r"got an update of \(12, 9\) for 'up' \(\(12, 8\)\)"),
    "output_size": ({"up.lora_B.weight": torch.ones(13, 3)}, r"got an update of \(13, 8\) for 'up'"),
    "ranks_of_factors": ({"up.lora_A.weight": torch.ones(2, 8)}, r"factors must be|rank must be"),
    "rank_not_configured": (
        {"up.lora_A.weight": torch.ones(4, 8), "up.lora_B.weight": torch.ones(12, 4)},
        "rank must be what the configuration says, 3, got 4 for 'up'",
    ),
    "rank_zero": ({"up.lora_A.weight": torch.ones(0, 8), "up.lora_B.weight": torch.ones(12, 0)}, "rank must be|r ≥ 1"),
    "four_dimensions": ({"up.lora_A.weight": torch.ones(3, 8, 1, 1)}, "factors must be A"),
    "scalar": ({"up.lora_A.weight": torch.tensor(1.0)}, "factors must be A|rank must be"),
    "integers": ({"up.lora_A.weight": torch.ones(3, 8, dtype=torch.int64)}, "factors must be floating point"),
    "float8": ({"up.lora_A.weight": torch.ones(3, 8).to(torch.float8_e4m3fn)}, "factors must be"),
    "half_missing": ({"up.lora_B.weight": None}, r"every module must have lora_A and lora_B, got \['up'\]"),
    "unknown_module": (
        {"nowhere.lora_A.weight": torch.ones(3, 8), "nowhere.lora_B.weight": torch.ones(8, 3)},
        r"got one for 'nowhere', no layer of it|rank must be",
    ),
    "unknown_saved": (
        {"nowhere.weight": torch.ones(3)},
        "tensors must be LoRA factors or lie in modules_to_save, got .*nowhere.weight",
    ),
    "shape_of_saved": (
        {"head.weight": torch.ones(3, 7)},
        r"'head.weight' must fit the model \(\(3, 6\)\), got \(3, 7\)",
    ),
    "dora_magnitude": (
        {"up.lora_magnitude_vector": torch.ones(12)},
        "tensors must be LoRA factors or lie in modules_to_save",
    ),
    "embedding": ({"up.lora_embedding_A": torch.ones(3, 8)}, "tensors must be LoRA factors or lie in modules_to_save"),
    "lora_bias": ({"up.lora_B.bias": torch.ones(12)}, "tensors must be LoRA factors or lie in modules_to_save"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_a_tensor_that_does_not_fit_is_refused(folder: Path, changes: dict[str, Tensor | None], message: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for key, tensor in changes.items():
            tensors.pop(PREFIX + key, None)
            if tensor is not None:
                tensors[PREFIX + key] = tensor

    edit_tensors(folder, change)
    assert_refused(folder, message)


def test_a_rank_above_the_layer_s_size_is_refused(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}up.lora_A.weight"] = torch.ones(9, 8)
        tensors[f"{PREFIX}up.lora_B.weight"] = torch.ones(12, 9)

    edit_tensors(folder, change)
    edit_config(folder, {"rank_pattern": {"up": 9, "down": 2}})
    assert_refused(folder, r"rank must be in \[0, 8\] for a weight \(12, 8\), got 9; for module 'up'")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "declared_rank_huge": ({"r": 10**9, "rank_pattern": {}}, "rank must be what the configuration says, 1e"),
    "declared_rank_beyond_float": ({"r": 10**400, "rank_pattern": {}}, "r must be"),
    "pattern_rank_beyond_float": ({"rank_pattern": {"up": 10**400, "down": 2}}, "rank_pattern and r must be"),
    "declared_rank_wrong": ({"r": 5, "rank_pattern": {}}, "rank must be what the configuration says, 5, got"),
    "rank_zero": ({"r": 0, "rank_pattern": {}}, "rank_pattern and r must be finite numbers other than 0, got 0"),
    "rank_text": ({"r": "3"}, "r must be finite numbers other than 0, got 3"),
    "rank_missing": ({"r": None}, "r must be finite numbers other than 0, got None"),
    "alpha_nan": ({"lora_alpha": float("nan"), "alpha_pattern": {}}, "alpha_pattern and lora_alpha must be finite"),
    "alpha_zero": ({"lora_alpha": 0, "alpha_pattern": {}}, "must be finite numbers other than 0, got 0"),
    "alpha_bool": ({"lora_alpha": True}, "lora_alpha must be finite numbers other than 0, got True"),
    "pattern_text": ({"rank_pattern": {"up": "3", "down": 2}}, "rank_pattern and r must be"),
    "pattern_list": ({"rank_pattern": ["up"]}, "rank_pattern must be"),
    "pattern_number": ({"alpha_pattern": 7}, "alpha_pattern must be"),
    "pattern_not_a_regex": ({"rank_pattern": {"(": 3}}, "rank_pattern must hold regular expressions"),
    "other_method": ({"peft_type": "LOHA"}, "must be plain LoRA, got .*LOHA"),
    "dora": ({"use_dora": True}, "must be plain LoRA, got .*use_dora"),
    "bias_all": ({"bias": "all"}, "must be plain LoRA, got .*bias"),
    "lora_bias": ({"lora_bias": True}, "must be plain LoRA, got .*lora_bias"),
    "replicated_layers": ({"layer_replication": [[0, 2]]}, "must be plain LoRA, got .*layer_replication"),
    "raw_parameters": ({"target_parameters": ["experts"]}, "must be plain LoRA, got .*target_parameters"),
    "trained_tokens": ({"trainable_token_indices": [1]}, "must be plain LoRA, got .*trainable_token_indices"),
    "residual_base": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_configuration_that_says_otherwise_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, changes)
    assert_refused(folder, message)


BAD_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "must be JSON"),
    "cut": (b'{"r": 3, ', "must be JSON"),
    "list": (b"[]", "must hold a JSON object, got list"),
    "not_utf8": (b'{"r": "\xff"}', "must be JSON"),
    "deep": (b"[" * 200_000, "must be JSON"),
    "digits": (b'{"r": ' + b"1" * 5000 + b"}", "must be JSON"),
    "too_large": (b" " * (16 * 2**20 + 1), "must be at most 16777216 bytes, got 16777217"),
}


@pytest.mark.parametrize(("data", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_a_configuration_that_is_not_json_is_refused(folder: Path, data: bytes, message: str) -> None:
    (folder / CONFIG).write_bytes(data)
    assert_refused(folder, message)


def test_a_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "adapter must be a folder with adapter_config.json")
    (folder / TENSORS).unlink()
    assert_refused(folder, "adapter must hold adapter_model.safetensors, got none")
    (folder / CONFIG).unlink()
    assert_refused(folder, "adapter must be a folder with adapter_config.json")


class Poison:
    """Creates a marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.marker,))


def test_a_poisoned_pickle_is_never_opened(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    poison = pickle.dumps(Poison(marker))
    pickle.loads(poison)
    assert marker.exists()  # the poison works
    marker.unlink()
    names = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "training_args.bin")
    for name in names:
        (folder / name).write_bytes(poison)
    load_adapter(mlp(), folder)
    (folder / TENSORS).unlink()
    assert_refused(folder, r"got none in .*Found adapter_model\.bin: pickles are never opened; convert it")
    (folder / TENSORS).write_bytes(poison)
    assert_refused(folder, "must be a whole safetensors file")
    assert not marker.exists()


def test_a_module_of_another_kind_with_the_right_shape_is_refused(tmp_path: Path) -> None:
    model = nested("block.q")
    model.q = nn.Embedding(8, 8)
    one = AdapterCheckpoint(factors={"q": (torch.ones(2, 8), torch.ones(8, 2))}, scalings={"q": 1.0})
    write_checkpoint(one, tmp_path)
    assert_refused(tmp_path, "'q'", model)


def test_a_parameter_at_the_root_does_not_unfreeze_the_base(folder: Path) -> None:
    model = mlp()
    model.gain = nn.Parameter(torch.ones(3))
    edit_tensors(folder, lambda tensors: tensors.update({f"{PREFIX}gain": torch.zeros(3)}))
    edit_config(folder, {"modules_to_save": ["head", "gain"]})
    assert_refused(folder, "must be LoRA factors or lie in modules_to_save, got .*gain", model)
    assert model.up.weight.requires_grad


def test_an_adapter_whose_name_is_taken_is_refused_before_anything_is_loaded(folder: Path) -> None:
    model = mlp()
    load_adapter(model, folder)
    head = model.head.weight.detach().clone()
    edit_tensors(folder, lambda tensors: tensors[f"{PREFIX}head.weight"].zero_())
    with pytest.raises(ValueError, match="adapter must be a new name, got 'default'"):
        load_adapter(model, folder)
    assert torch.equal(model.head.weight, head)
    load_adapter(model, folder, adapter="second")
    assert model.head.weight.count_nonzero() == 0


@pytest.mark.parametrize(
    ("factors", "scalings", "message"),
    [
        ({"a": (torch.ones(2, 8), torch.ones(8, 2))}, {}, "scalings must name the modules of factors"),
        ({"a": (torch.ones(2, 8), torch.ones(8, 3))}, {"a": 1.0}, r"factors must be A \(r, n\) and B \(m, r\)"),
        ({"a": (torch.ones(0, 8), torch.ones(8, 0))}, {"a": 1.0}, "with r ≥ 1"),
        ({"a": (torch.ones(2, 8), torch.ones(8, 2))}, {"a": float("inf")}, "factors must be finite"),
    ],
    ids=["no_scaling", "unequal_ranks", "rank_zero", "infinite_scaling"],
)
def test_a_checkpoint_that_makes_no_sense_cannot_be_built(
    factors: dict[str, tuple[Tensor, Tensor]], scalings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterCheckpoint(factors=factors, scalings=scalings)
