"""A damaged or hostile adapter folder is refused with one clear line, and the model is left as it was."""

import json
import pickle
import time
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
        "use_dora must say whether there are magnitudes",
    ),
    "embedding_beside": ({"up.lora_embedding_A": torch.ones(3, 8)}, "must have one lora_A and one lora_B, got several"),
    "embedding": (
        {
            "up.lora_A.weight": None,
            "up.lora_B.weight": None,
            "up.lora_embedding_A": torch.ones(3, 8),
            "up.lora_embedding_B": torch.ones(12, 3),
        },
        "got one for 'up', no layer of it",
    ),
    "lora_bias": ({"up.lora_B.bias": torch.ones(12)}, "lora_bias must say whether lora_B has biases"),
    "bias": ({"up.base_layer.bias": torch.ones(12)}, "tensors must be LoRA factors or lie in modules_to_save"),
    "wrapped_twice": (
        {"up.base_layer.lora_A.weight": torch.ones(3, 8), "up.base_layer.lora_B.weight": torch.ones(12, 3)},
        "modules must be wrapped once",
    ),
    "path_in_name": (
        {"../../up.lora_A.weight": torch.ones(3, 8), "../../up.lora_B.weight": torch.ones(12, 3)},
        "names must be dotted paths of modules|rank must be",
    ),
    "name_with_slash": (
        {"a/b.lora_A.weight": torch.ones(3, 8), "a/b.lora_B.weight": torch.ones(12, 3)},
        "names must be dotted paths of modules|rank must be",
    ),
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
    "rank_text": ({"r": "3"}, "r must be finite numbers other than 0, got '3'"),
    "rank_missing": ({"r": None}, "r must be finite numbers other than 0, got None"),
    "alpha_nan": ({"lora_alpha": float("nan"), "alpha_pattern": {}}, "alpha_pattern and lora_alpha must be finite"),
    "alpha_zero": ({"lora_alpha": 0, "alpha_pattern": {}}, "must be finite numbers other than 0, got 0"),
    "alpha_bool": ({"lora_alpha": True}, "lora_alpha must be finite numbers other than 0, got True"),
    "pattern_text": ({"rank_pattern": {"up": "3", "down": 2}}, "rank_pattern and r must be"),
    "pattern_list": ({"rank_pattern": ["up"]}, "rank_pattern must be"),
    "pattern_number": ({"alpha_pattern": 7}, "alpha_pattern must be"),
    "pattern_not_a_regex": ({"rank_pattern": {"(": 3}}, "rank_pattern must hold regular expressions"),
    "other_method": ({"peft_type": "LOHA"}, "must be plain LoRA, got .*LOHA"),
    "dora": ({"use_dora": True}, "use_dora must say whether there are magnitudes, got True"),
    "bias_strange": ({"bias": "some"}, "must be plain LoRA, got .*bias"),
    "lora_bias": ({"lora_bias": True}, "lora_bias must say whether lora_B has biases, got True"),
    "adalora_without_e": ({"peft_type": "ADALORA", "alpha_pattern": {}}, "tensors must be LoRA factors"),
    "adalora_and_dora": ({"peft_type": "ADALORA", "use_dora": True}, "must be plain LoRA, got .*use_dora"),
    "replicated_layers": ({"layer_replication": [[0, 2]]}, "must be plain LoRA, got .*layer_replication"),
    "raw_parameters": ({"target_parameters": ["experts"]}, "target_parameters must name parameters with factors"),
    "raw_parameters_text": ({"target_parameters": "up.weight"}, "target_parameters must be a list"),
    "trained_tokens": ({"trainable_token_indices": [1]}, "must be plain LoRA, got .*trainable_token_indices"),
    "residual_base": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_configuration_that_says_otherwise_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, changes)
    assert_refused(folder, message)


def test_as_many_names_as_fit_are_read_at_once_and_the_first_key_still_counts(folder: Path) -> None:
    names = {f"layers\\.{index}": 7 for index in range(200_000)}
    first = {"ot.er": 5, r"block\.up": 5, "up": 3, "u.": 5, ".own": 2, "down": 5}
    edit_config(folder, {"rank_pattern": first | names})
    start = time.process_time()
    found = load_adapter(mlp(), folder)
    assert time.process_time() - start < 8
    assert {name: one.rank for name, one in found.items()} == {"up": 3, "down": 2}


def test_more_expressions_than_a_reader_can_try_are_refused(folder: Path) -> None:
    edit_config(folder, {"alpha_pattern": {f"layers.{index}.*": 7 for index in range(2000)}})
    load_adapter(mlp(), folder)
    edit_config(folder, {"alpha_pattern": {f"layers.{index}.*": 7 for index in range(2001)}})
    assert_refused(folder, r"alpha_pattern must hold at most 2000 expressions, got more\. Write names")


BAD_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "must be JSON"),
    "cut": (b'{"r": 3, ', "must be JSON"),
    "list": (b"[]", "must hold a JSON object, got list"),
    "not_utf8": (b'{"r": "\xff"}', "must be JSON"),
    "deep": (b"[" * 200_000, "must be JSON"),
    "digits": (b'{"r": ' + b"1" * 5000 + b"}", "must be JSON"),
    "a_key_twice": (b'{"r": 3, "lora_alpha": 3, "r": 4}', "must be JSON, got the key 'r' twice"),
    "a_key_twice_inside": (b'{"rank_pattern": {"up": 3, "up": 4}}', "must be JSON, got the key 'up' twice"),
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


def test_what_was_loaded_does_not_change_with_the_file(folder: Path) -> None:
    model = mlp()
    load_adapter(model, folder)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (folder / TENSORS).open("r+b") as file:
        file.write(bytes((folder / TENSORS).stat().st_size))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


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


class Zoo(nn.Module):
    """A convolution, a grouped one, an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.words = nn.Embedding(7, 6)
        self.fc = nn.Linear(6, 5)


ZOO_RANKS = {"conv": 3, "grouped": 2, "words": 3, "fc": 3}


def zoo(folder: Path, *, method: str = "lora") -> Path:
    model = Zoo()
    ranks = {name: rank for name, rank in ZOO_RANKS.items() if method != "dora" or name != "grouped"}
    for one in attach(model, ranks, method=method).values():
        randomise(one)
    save_adapter(model, folder)
    return folder


BAD_ZOO: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "kernel": ({"conv.lora_A.weight": torch.ones(3, 4, 3, 2)}, "must belong to this base, .*'conv'"),
    "channels": ({"conv.lora_A.weight": torch.ones(3, 5, 3, 3)}, "must belong to this base, .*'conv'"),
    "outputs": ({"conv.lora_B.weight": torch.ones(7, 3, 1, 1)}, "must belong to this base, .*'conv'"),
    "b_with_a_kernel": ({"conv.lora_B.weight": torch.ones(6, 3, 3, 3)}, "factors must be"),
    "conv_of_one_axis": ({"conv.lora_A.weight": torch.ones(3)}, "factors must be|rank must be"),
    "five_axes": (
        {"conv.lora_A.weight": torch.ones(3, 4, 3, 3, 3), "conv.lora_B.weight": torch.ones(6, 3, 1, 1, 1)},
        "must belong to this base, .*'conv'",
    ),
    "seven_axes": (
        {"conv.lora_A.weight": torch.ones(3, *(1,) * 6), "conv.lora_B.weight": torch.ones(6, *(3, 1, 1, 1, 1, 1))},
        "must belong to this base, .*'conv'",
    ),
    "other_groups": ({"grouped.lora_B.weight": torch.ones(6, 4, 1, 1)}, "rank must be 2 times that of B"),
    "mixed_groups": ({"grouped.lora_A.weight": torch.ones(4, 4, 3, 3)}, "update must be one of the grouped weight"),
    "no_multiple": ({"grouped.lora_B.weight": torch.ones(6, 3, 1, 1)}, "factors must be"),
    "not_finite": ({"conv.lora_A.weight": torch.full((3, 4, 3, 3), torch.nan)}, "must be finite, got NaN"),
    "vocabulary": ({"words.lora_embedding_A": torch.ones(3, 8)}, "must belong to this base, .*'words'"),
    "embedding_of_four_axes": ({"words.lora_embedding_A": torch.ones(3, 7, 1, 1)}, "factors must be"),
    "embedding_not_finite": ({"words.lora_embedding_B": torch.full((6, 3), torch.inf)}, "must be finite"),
    "embedding_alone": ({"words.lora_embedding_B": None}, "every module must have lora_A and lora_B"),
    "embedding_as_linear": (
        {
            "words.lora_embedding_A": None,
            "words.lora_embedding_B": None,
            "words.lora_A.weight": torch.ones(3, 7),
            "words.lora_B.weight": torch.ones(6, 3),
        },
        "got one for 'words', no layer of it",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ZOO.values(), ids=BAD_ZOO)
def test_tensors_of_other_layers_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    folder = zoo(tmp_path)
    edit_tensors(folder, lambda tensors: change_keys(tensors, changes))
    assert_refused(folder, message, Zoo())


def change_keys(tensors: dict[str, Tensor], changes: Mapping[str, Tensor | None]) -> None:
    for key, tensor in changes.items():
        tensors.pop(PREFIX + key, None)
        if tensor is not None:
            tensors[PREFIX + key] = tensor


BAD_MAGNITUDES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "length": ({"fc.lora_magnitude_vector": torch.ones(6)}, "must have one value for each of 5 rows"),
    "axes": ({"fc.lora_magnitude_vector": torch.ones(5, 2)}, "must have one value for each of 5 rows"),
    "scalar": ({"fc.lora_magnitude_vector": torch.tensor(1.0)}, "must have one value for each of 5 rows"),
    "not_finite": ({"fc.lora_magnitude_vector": torch.full((5,), torch.nan)}, "magnitudes must be finite"),
    "missing": ({"fc.lora_magnitude_vector": None}, "magnitudes must be there for all modules or none, got 'fc'"),
    "alone": ({"no.lora_magnitude_vector": torch.ones(5)}, r"got others alone for \['no'\]"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_MAGNITUDES.values(), ids=BAD_MAGNITUDES)
def test_magnitudes_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    folder = zoo(tmp_path, method="dora")
    edit_tensors(folder, lambda tensors: change_keys(tensors, changes))
    assert_refused(folder, message, Zoo())


OWN_CONFIG, OWN_TENSORS = "flowra_config.json", "flowra_model.safetensors"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    model = mlp()
    for one in attach(model, {"up": 3, "down": 2}, method="svd_masked", modules_to_save=["head"]).values():
        randomise(one)
    save_adapter(model, tmp_path / "own", modules_to_save=["head"])
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [OWN_CONFIG, OWN_TENSORS]
    return tmp_path / "own"


BAD_SITES: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "nothing"}, "method must be one of"),
    "method_list": ({"method": ["svd"]}, "method must be one of"),
    "method_of_another_kind": ({"method": "norm", "arguments": {}}, "method must be one that adapts such a parameter"),
    "rank_huge": ({"rank": 10**9}, r"rank must be in \[0, 8\]"),
    "rank_negative": ({"rank": -1}, "rank must be"),
    "rank_text": ({"rank": "3"}, "rank and dtype must be a whole number"),
    "rank_true": ({"rank": True}, "rank and dtype must be a whole number"),
    "slots_huge": ({"arguments": {"max_rank": 10**9}}, "max_rank must be in"),
    "slots_text": ({"arguments": {"max_rank": "8"}}, "not supported|must be"),
    "argument": ({"arguments": {"generator": 1}}, "arguments must be those of 'svd_masked'"),
    "dtype": ({"dtype": "int8"}, "rank and dtype must be a whole number and one of floating point"),
    "scaling_nan": ({"scaling": float("nan")}, "scaling and dropout must be finite"),
    "scaling_text": ({"scaling": "1"}, "scaling and dropout must be finite"),
    "dropout": ({"dropout": 2.0}, r"dropout must be in \[0, 1\)"),
    "extra_key": ({"code": "print(1)"}, "a site must have the keys"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_SITES.values(), ids=BAD_SITES)
def test_a_site_that_makes_no_sense_is_refused(own: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((own / OWN_CONFIG).read_text())
    config["sites"]["up"] |= changes
    (own / OWN_CONFIG).write_text(json.dumps(config))
    assert_refused(own, message)


BAD_OWN_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"format_version": 2}, "format_version must be 1, got 2"),
    "extra": ({"more": 1}, "must have the keys"),
    "no_sites": ({"sites": {}}, "sites must be an object that names at least one site"),
    "sites_list": ({"sites": ["up"]}, "sites must be an object"),
    "site_text": ({"sites": {"up": "svd"}}, "a site must have the keys"),
    "unknown_site": ({"sites": {"../up": {}}}, "adapter must fit the model, got one for '../up', no site of it"),
    "trained_text": ({"modules_to_save": "head"}, "modules_to_save must be names"),
    "trained_other": ({"modules_to_save": ["skip"]}, "tensors must belong to a site or to modules_to_save"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_OWN_CONFIGS.values(), ids=BAD_OWN_CONFIGS)
def test_an_own_configuration_that_makes_no_sense_is_refused(own: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((own / OWN_CONFIG).read_text())
    (own / OWN_CONFIG).write_text(json.dumps({**config, **changes}))
    assert_refused(own, message)


BAD_OWN_TENSORS: dict[str, tuple[str, Tensor | None, str]] = {
    "shape": ("site/up/lora_A", torch.ones(8, 9), r"lora_A must have shape \(8, 8\), got \(8, 9\)"),
    "axes": ("site/up/lora_A", torch.ones(8), "lora_A must have shape"),
    "missing": ("site/up/lora_E", None, "tensors must be all of the adapter's, got none called 'lora_E'"),
    "nan": ("site/up/lora_B", torch.full((12, 8), torch.nan), "tensors must be finite"),
    "integers": ("site/up/lora_B", torch.ones(12, 8, dtype=torch.int64), "lora_B must be floating point"),
    "mask_of_floats": ("site/up/mask", torch.ones(8), "mask must be floating point of ≥ 16 bits, or what it was"),
    "strange": ("site/up/forward", torch.ones(8), "tensors must be the adapter's"),
    "nested": ("site/up/a.b", torch.ones(8), "tensors must be the adapter's"),
    "stray": ("site/skip/lora_A", torch.ones(8), "tensors must belong to a site or to modules_to_save"),
    "saved_shape": ("saved/head.weight", torch.ones(3, 7), r"'head.weight' must fit the model \(\(3, 6\)\)"),
    "saved_elsewhere": ("saved/up.weight", torch.ones(12, 8), "tensors must belong to a site or to modules_to_save"),
}


@pytest.mark.parametrize(("key", "tensor", "message"), BAD_OWN_TENSORS.values(), ids=BAD_OWN_TENSORS)
def test_an_own_tensor_that_does_not_fit_is_refused(own: Path, key: str, tensor: Tensor | None, message: str) -> None:
    tensors = load_file(own / OWN_TENSORS)
    tensors.pop(key, None)
    if tensor is not None:
        tensors[key] = tensor
    save_file(tensors, own / OWN_TENSORS)
    assert_refused(own, message)


@pytest.mark.parametrize(("data", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_an_own_configuration_that_is_not_json_is_refused(own: Path, data: bytes, message: str) -> None:
    (own / OWN_CONFIG).write_bytes(data)
    assert_refused(own, message)


def test_an_own_tensor_file_that_is_damaged_or_missing_is_refused(own: Path) -> None:
    data = (own / OWN_TENSORS).read_bytes()
    (own / OWN_TENSORS).write_bytes(data[: len(data) // 2])
    assert_refused(own, "must be a whole safetensors file")
    (own / OWN_TENSORS).unlink()
    assert_refused(own, "adapter must hold flowra_model.safetensors, got none")


def test_a_start_that_does_not_fit_the_layer_is_refused(tmp_path: Path) -> None:
    model = mlp()
    one = attach(model, {"up": 2})["up"]
    one.start_from(torch.ones(2, 8), torch.ones(12, 2))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / OWN_TENSORS)
    for key, tensor in (("offset_A", torch.ones(2, 9)), ("offset_B", torch.ones(2, 12)), ("offset_B", torch.ones(12))):
        save_file({**tensors, f"site/up/{key}": tensor}, tmp_path / OWN_TENSORS)
        assert_refused(tmp_path, "tensors must fit a weight|must be")
