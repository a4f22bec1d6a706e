import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from flowra_compose import AdapterState, LowRankUpdate, merge_folders, read_adapter, write_adapter
from flowra_compose.lazy_updates import LazyUpdates
from flowra_compose.whole_tensors import TensorFile, write_tensors

PREFIX = "base_model.model."
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def update(m: int = 3, n: int = 4, rank: int = 2, scaling: float = 1.0, seed: int = 0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    return LowRankUpdate(torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator), scaling)


def network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3)))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return net


def save_with_peft(folder: Path, **options: Any) -> nn.Module:  # noqa: ANN401 - forwarded to LoraConfig
    """Save an adapter whose every factor is random; return the wrapped model."""
    model = get_peft_model(network(), LoraConfig(**options))
    generator = torch.Generator().manual_seed(len(folder.name))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter, for a test to damage."""
    state = AdapterState(
        updates={"fc": update(scaling=3.0), "block.fc": update(rank=1)}, modules_to_save={"head.weight": torch.ones(2)}
    )
    write_adapter(state, tmp_path / "adapter")
    return tmp_path / "adapter"


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


# peft as the judge


@torch.no_grad()
def test_peft_loads_the_merge_of_its_own_unequal_adapters(tmp_path: Path) -> None:
    first = save_with_peft(
        tmp_path / "a",
        r=4,
        lora_alpha=6,
        target_modules=["0", "2.0"],
        rank_pattern={r"2\.0": 2},
        alpha_pattern={"0": 3},
    )
    second = save_with_peft(
        tmp_path / "bb", r=3, lora_alpha=5, target_modules=["2.0", "2.1"], rank_pattern={"1": 1}, use_rslora=True
    )
    weights = [0.7, -1.3]
    merge_folders([tmp_path / "a", tmp_path / "bb"], weights, tmp_path / "out")
    expected = network()
    for weight, model in zip(weights, (first, second), strict=True):
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                expected.get_submodule(name).weight.data += weight * module.get_delta_weight("default")
    loaded = PeftModel.from_pretrained(network(), str(tmp_path / "out")).eval()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    y = expected(x)
    assert float((loaded(x) - y).abs().max() / y.abs().max()) < 1e-5
    assert float((network()(x) - y).abs().max() / y.abs().max()) > 1e-2
    scalings = [module.scaling["default"] for module in loaded.modules() if hasattr(module, "get_delta_weight")]
    assert scalings == [1.0, 1.0, 1.0]


def test_copies_of_biases_of_a_head_whose_tensors_lie_deeper_are_left_out(tmp_path: Path) -> None:
    save_with_peft(tmp_path / "a", r=2, target_modules=["0"], modules_to_save=["2"], bias="all")
    state = read_adapter(tmp_path / "a", base=network().get_parameter)
    assert set(state.modules_to_save) == {"2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias"}


def test_peft_loads_a_head_whose_tensors_lie_deeper(tmp_path: Path) -> None:
    model = save_with_peft(tmp_path / "a", r=2, target_modules=["0"], modules_to_save=["2"])
    state = read_adapter(tmp_path / "a")
    assert state.trained_modules == ("2",)
    assert set(state.modules_to_save) == {"2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias"}
    merge_folders([tmp_path / "a"], [1], tmp_path / "out")
    loaded = PeftModel.from_pretrained(network(), str(tmp_path / "out")).eval()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_peft_loads_the_merge_of_its_own_adapters_of_gpt2(tmp_path: Path) -> None:
    shape = {"vocab_size": 23, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    base = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    tokens = torch.arange(12).reshape(2, 6)
    expected = copy.deepcopy(base)
    for name, weight in (("a", 0.7), ("bb", -1.3)):
        # c_attn and c_proj are Conv1D: PEFT wants fan_in_fan_out, and the weight of the base is (in, out)
        options = LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        model = get_peft_model(copy.deepcopy(base), options)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / name)
        for module_name, module in model.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                expected.get_submodule(module_name).weight.data += weight * module.get_delta_weight("default")
    state = read_adapter(tmp_path / "a")
    assert state.fan_in_fan_out
    assert state.updates["transformer.h.0.attn.c_attn"].shape == (24, 8)  # (out, in), as for any layer
    merge_folders([tmp_path / "a", tmp_path / "bb"], [0.7, -1.3], tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out")).eval()  # a warning is an error
    torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-5)
    assert float((base(tokens).logits - expected(tokens).logits).abs().max()) > 0.1


@pytest.mark.parametrize(("written", "read"), [(True, True), (False, False), (None, False)])
def test_transposed_storage_is_read_and_written_again(folder: Path, written: bool | None, read: bool) -> None:
    plain = read_adapter(folder)
    edit_config(folder, fan_in_fan_out=written)
    state = read_adapter(folder)
    assert state.fan_in_fan_out is read
    assert all(
        torch.equal(state.updates[name].delta_weight(), plain.updates[name].delta_weight()) for name in plain.updates
    )
    write_adapter(state, folder)
    assert json.loads((folder / CONFIG).read_text())["fan_in_fan_out"] is read


def test_a_configuration_that_does_not_name_the_storage_means_rows_of_outputs(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config["fan_in_fan_out"]
    (folder / CONFIG).write_text(json.dumps(config))
    assert read_adapter(folder).fan_in_fan_out is False


def test_what_peft_starts_from_the_base_weight_is_refused(tmp_path: Path) -> None:
    save_with_peft(tmp_path / "a", r=2, target_modules=["0"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"must be plain LoRA, got \{'init_lora_weights'"):
        read_adapter(tmp_path / "a")


# writing


def test_what_is_written_reads_back_at_unit_scale(tmp_path: Path) -> None:
    state = AdapterState(
        updates={"fc": update(scaling=3.0), "block.fc": update(rank=1, scaling=-0.5)},
        modules_to_save={"head.out.weight": torch.ones(2, 2), "head.count": torch.tensor(3)},
        base_model_name_or_path="some/base",
        task_type="SEQ_CLS",
        trained_modules=("head",),
    )
    write_adapter(state, tmp_path)
    again = read_adapter(tmp_path)
    for name, one in state.updates.items():
        assert again.updates[name].scaling == 1.0
        torch.testing.assert_close(again.updates[name].delta_weight(), one.delta_weight())
    assert {name: t.tolist() for name, t in again.modules_to_save.items()} == {
        "head.out.weight": [[1, 1], [1, 1]],
        "head.count": 3,
    }
    assert again.trained_modules == ("head",)
    assert (again.base_model_name_or_path, again.task_type) == ("some/base", "SEQ_CLS")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 2, ["block.fc", "fc"])
    assert sorted(each.name for each in tmp_path.iterdir()) == [CONFIG, TENSORS]


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    names = ["fc", "block.fc", "a.fc"]
    for target, order in (("one", names), ("two", names[::-1])):
        write_adapter(
            AdapterState(updates={name: update(rank=len(name), seed=len(name)) for name in order}), tmp_path / target
        )
    write_adapter(read_adapter(tmp_path / "one"), tmp_path / "three")
    for name in (CONFIG, TENSORS):
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.lists(st.sampled_from(["fc", "f.c", "f+c", "b", "0", "x-y"]), min_size=1, max_size=4).map(".".join),
        st.integers(1, 3),
        min_size=1,
        max_size=6,
    )
)
def test_every_rank_is_found_again_whatever_the_names(
    tmp_path_factory: pytest.TempPathFactory, ranks: dict[str, int]
) -> None:
    target = tmp_path_factory.mktemp("adapter")
    write_adapter(AdapterState(updates={name: update(rank=rank) for name, rank in ranks.items()}), target)
    assert {name: one.rank for name, one in read_adapter(target).updates.items()} == ranks


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    shared = update(m=4, n=4)
    one = LowRankUpdate(shared.lora_A, shared.lora_A.T)
    write_adapter(AdapterState(updates={"a": one, "b": one}), tmp_path)
    assert torch.equal(read_adapter(tmp_path).updates["b"].lora_B, shared.lora_A.T)


def test_nothing_is_touched_when_writing_is_refused(folder: Path) -> None:
    before = {each: each.read_bytes() for each in folder.iterdir()}
    half = torch.full((1, 2), 6e4, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"must fit torch\.float16, got infinity for 'fc'"):
        write_adapter(AdapterState(updates={"fc": LowRankUpdate(half, half.T, 2.0)}), folder)
    with pytest.raises(ValueError, match="must hold at least one module"):
        write_adapter(AdapterState(updates={}), folder)
    assert {each: each.read_bytes() for each in folder.iterdir()} == before


# reading


def test_first_matching_key_sets_rank_and_alpha(folder: Path) -> None:
    edit_config(
        folder, r=9, lora_alpha=8, rank_pattern={"block.*": 1, "fc": 2}, alpha_pattern={"c": 5, r"block\.fc": 7}
    )
    updates = read_adapter(folder).updates
    assert {name: one.scaling for name, one in updates.items()} == {"fc": 8 / 2, "block.fc": 7 / 1}
    edit_config(folder, use_rslora=True)
    assert read_adapter(folder).updates["fc"].scaling == 8 / math.sqrt(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "plain LoRA, got {'peft_type': 'IA3'}"),
        ({"peft_type": None}, "plain LoRA, got {'peft_type': None}"),
        ({"use_dora": True}, r"and lora_B, lora_magnitude_vector, got block.fc \(lora_A, lora_B\)"),
        ({"fan_in_fan_out": "true"}, "plain LoRA, got {'fan_in_fan_out': 'true'}"),
        ({"lora_bias": True}, r"and lora_B, lora_B.bias, got block.fc \(lora_A, lora_B\)"),
        ({"use_dora": "yes"}, "plain LoRA, got {'use_dora': 'yes'}"),
        ({"use_dora": True, "lora_bias": True}, "plain LoRA, got {'lora_bias': True}"),
        ({"target_parameters": ["fc.weight"]}, "plain LoRA, got {'target_parameters'"),
        ({"peft_type": "ADALORA", "init_r": 2}, "plain LoRA, got {'alpha_pattern'"),
        ({"bias": "some"}, "plain LoRA, got {'bias': 'some'}"),
        ({"use_rslora": "false"}, "plain LoRA, got {'use_rslora': 'false'}"),
        ({"init_lora_weights": "pissa_niter_4"}, "plain LoRA, got {'init_lora_weights'"),
        ({"layer_replication": [[0, 4]]}, "plain LoRA, got {'layer_replication'"),
        ({"r": 3, "rank_pattern": {}}, "rank must be the configured 3, got 1; for 'block.fc'"),
        ({"r": 0, "rank_pattern": {}}, "r and rank_pattern must be finite numbers other than 0, got 0"),
        ({"r": None, "rank_pattern": {}}, "got None for 'block.fc'"),
        ({"r": True, "rank_pattern": {}}, "got True for 'block.fc'"),
        ({"r": "2", "rank_pattern": {}}, "got '2' for 'block.fc'"),
        ({"lora_alpha": float("nan"), "alpha_pattern": {}}, "lora_alpha and alpha_pattern must be finite"),
        ({"lora_alpha": 10**400, "alpha_pattern": {}}, "lora_alpha and alpha_pattern must be finite"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern must hold regular expressions, got '\('"),
        ({"rank_pattern": [2]}, "rank_pattern must be a dict or null"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list or null"),
        ({"modules_to_save": [""]}, "modules_to_save must be names"),
        ({"modules_to_save": None}, "belong to modules_to_save, got .'base_model.model.head.weight'"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a str or null"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_hostile_configurations_are_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.lora_A.weight": torch.ones(5, 4)}, r"got \(5, 4\) and \(3, 2\); for 'fc'"),
        ({"fc.lora_A.weight": torch.ones(2, 4, 1, 1)}, r"got \(2, 4, 1, 1\) and \(3, 2\); for 'fc'"),
        ({"fc.lora_A.weight": torch.ones(2, 4).int()}, "got torch.int32 and torch.float32; for 'fc'"),
        ({"fc.lora_A.weight": None}, r"must have lora_A and lora_B, got fc \(lora_B\)"),
        ({"head.weight": torch.full((2,), torch.inf)}, "NaN or infinity in 'head.weight'"),
        ({"fc.bias": torch.ones(3)}, r"belong to modules_to_save, got \['base_model.model.fc.bias'\]"),
        ({"fc.lora_magnitude_vector": torch.ones(3)}, "lora_magnitude_vector"),
        ({"fc.lora_embedding_A": torch.ones(2, 4)}, "lora_embedding_A"),
        ({"lora_A.weight": torch.ones(2, 4)}, "base_model.model.lora_A.weight"),
        ({"a\n.lora_A.weight": torch.ones(2, 4)}, "got"),
        ({"head.lora_A.weight": torch.ones(2, 4), "head.lora_B.weight": torch.ones(3, 2)}, r"both: \['head'\]"),
    ],
    ids=lambda value: next(iter(value)).strip() if isinstance(value, dict) else "",
)
def test_hostile_tensors_are_refused(folder: Path, changes: dict[str, Tensor | None], message: str) -> None:
    edit_tensors(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "bytes", "deep", "digits"],
)
def test_a_damaged_configuration_is_refused(folder: Path, content: bytes) -> None:
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json must be JSON"):
        read_adapter(folder)


def test_a_configuration_that_is_no_object_or_too_long_is_refused(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        read_adapter(folder)
    (folder / CONFIG).write_bytes(b" " * (16 * 2**20 + 1))
    with pytest.raises(ValueError, match="must be at most 16777216 bytes"):
        read_adapter(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_tensors_are_refused(folder: Path, keep: int) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:keep])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        read_adapter(folder)


def test_missing_files_are_named_and_a_pickle_is_never_opened(folder: Path, tmp_path: Path) -> None:
    (folder / TENSORS).unlink()
    with pytest.raises(ValueError, match=r"must hold adapter_model\.safetensors, got none in .*adapter\.$"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle, never opened"):
        read_adapter(folder)
    with pytest.raises(ValueError, match=r"must be a folder with adapter_config\.json, got .*nowhere"):
        read_adapter(tmp_path / "nowhere")


def test_a_tensor_outside_the_peft_prefix_is_refused(folder: Path) -> None:
    save_file(load_file(folder / TENSORS) | {"fc.lora_A.weight": torch.ones(2, 4)}, folder / TENSORS)
    with pytest.raises(ValueError, match=r"got \['fc\.lora_A\.weight'\]"):
        read_adapter(folder)


# one module at a time


def test_a_nan_is_found_when_its_module_is_read_and_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    edit_tensors(folder, **{"fc.lora_A.weight": torch.full((2, 4), torch.nan)})
    state = read_adapter(folder)
    assert state.updates["block.fc"].rank == 1
    message = "must be finite, got NaN or infinity; for 'fc'; in .*adapter"
    with pytest.raises(ValueError, match=message):
        state.updates["fc"]
    with pytest.raises(ValueError, match=message):
        write_adapter(state, tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())
    with pytest.raises(ValueError, match=message):
        merge_folders([folder], [1], tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "copy"]


def test_shapes_are_known_without_reading_values(folder: Path) -> None:
    updates = read_adapter(folder).updates
    assert isinstance(updates, LazyUpdates)
    assert list(updates) == ["block.fc", "fc"]
    for name, outline in updates.outlines.items():
        assert outline.lora_A.is_meta
        assert (outline.shape, outline.rank, outline.dtype) == (updates[name].shape, updates[name].rank, torch.float32)
    with pytest.raises(KeyError):
        updates["other"]


@pytest.mark.parametrize("change", ["replaced", "cut", "removed"])
def test_a_file_that_changes_after_it_was_opened_is_refused(folder: Path, change: str) -> None:
    state = read_adapter(folder)
    if change == "replaced":
        write_adapter(read_adapter(folder), folder)
    elif change == "cut":
        (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1])
    else:
        (folder / TENSORS).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors must stay as it was when it was opened, got another"):
        state.updates["fc"]


@pytest.mark.parametrize("name", ["fc", "block.fc", "head.weight"])
def test_what_is_read_is_memory_of_its_own(folder: Path, name: str) -> None:
    state = read_adapter(folder)

    def read() -> Tensor:
        return state.modules_to_save[name] if name in state.modules_to_save else state.updates[name].lora_B

    read().zero_()
    assert read().abs().sum() > 0


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        st.text("abÄ.", min_size=1, max_size=4),
        st.tuples(
            st.lists(st.integers(0, 3), max_size=3),
            st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
        ),
        max_size=5,
    )
)
def test_tensors_are_written_as_safetensors_writes_them(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    folder = tmp_path_factory.mktemp("tensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in kinds.items()}
    write_tensors(folder / "ours", tensors, tensors.__getitem__, {"format": "pt"})
    found = TensorFile(folder / "ours")
    assert found.metadata == {"format": "pt"}
    assert list(found) == sorted(tensors)
    save_file(tensors, folder / "theirs", metadata={"format": "pt"})
    for name, tensor in load_file(folder / "ours").items():
        assert torch.equal(tensor, tensors[name])
        assert torch.equal(found[name], tensor)
        assert (found.outlines[name].shape, found.outlines[name].dtype) == (tensor.shape, tensor.dtype)
    assert (folder / "ours").stat().st_size == (folder / "theirs").stat().st_size
    if len({dtype.itemsize for _, dtype in kinds.values()}) == len({dtype for _, dtype in kinds.values()}):
        assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_a_dtype_that_is_not_known_is_refused_on_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be of a dtype in .*, got others for \['a'\]"):
        write_tensors(tmp_path / "a", {"a": torch.ones(1, dtype=torch.complex64)}, lambda name: torch.ones(1), {})
