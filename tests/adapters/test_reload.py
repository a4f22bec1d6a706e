"""What can be created can be saved, loaded in a fresh process, gives equal output, and saves to equal bytes."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowra_adapters import (
    AdapterCheckpoint,
    attach,
    checkpoint_of,
    load_adapter,
    read_checkpoint,
    save_adapter,
    write_checkpoint,
)
from flowra_testing.adapter_table import METHODS
from flowra_testing.asserts import assert_close, attach_to, build_case, randomise
from flowra_testing.tiny_models import MLP, mlp, nested

FILES = ("adapter_config.json", "adapter_model.safetensors")
OWN_FILES = ("flowra_config.json", "flowra_model.safetensors")
RANKS = {"up": 3, "down": 2, "skip": 0}
EXPORT_TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}


LINEAR_METHODS = [method for method in METHODS if "linear" in method.layer_types]
PEFT_METHODS = ("lora", "rslora", "dora", "polymorphic")  # that PEFT's files say all of, on linear layers


def adapted_mlp(method: str, dtype: torch.dtype, scaling: float) -> MLP:
    model = mlp(dtype=dtype)
    randomise(model.head, seed=9)
    strength = {"alpha" if method == "rslora" else "scaling": scaling}
    found = attach(model, RANKS, method=method, modules_to_save=["head"], **strength)
    for seed, adapter in enumerate(found.values()):
        randomise(adapter, seed=seed)
    return model


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run_child(root: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = [sys.executable, "-m", "flowra_testing.reload_child", str(root), str(torch.get_num_threads())]
    subprocess.run(child, check=True, env=environment)


@pytest.fixture(scope="module")
def every_row(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, Tensor]]:
    """Write one folder per method, layer type and dtype (two of them once), resized, and let one child reload them."""
    root = tmp_path_factory.mktemp("rows")
    expected = {}
    for method in METHODS:
        for index, (kind, layer_type) in enumerate(method.layer_types.items()):
            for dtype in method.dtypes if index == 0 else (torch.float32,):
                if dtype not in layer_type.dtypes:
                    continue
                case = build_case(layer_type, dtype)
                adapter = attach_to(case, method, layer_type.rank)
                if layer_type.rank > 2:  # another rank than at birth
                    adapter.shrink([2, 0])
                randomise(adapter)
                name = str(dtype).removeprefix("torch.")
                folder = root / f"{method.name}-{kind}-{name}"
                folder.mkdir()
                save_adapter(case.model, folder / "adapter")
                save_file({"x": case.x}, folder / "input.safetensors")
                stated = {"dtype": name, "method": method.name, "layer_type": kind}
                (folder / "case.json").write_text(json.dumps(stated))
                expected[folder.name] = (folder, case.output())
    run_child(root)
    return expected


def test_every_method_on_every_layer_gives_the_same_bits_in_a_fresh_process(
    every_row: Mapping[str, tuple[Path, Tensor]],
) -> None:
    assert len(every_row) > 100
    for name, (folder, y) in every_row.items():
        assert torch.equal(load_file(folder / "output.safetensors")["y"], y), name


def test_every_method_on_every_layer_saves_again_to_equal_bytes(every_row: Mapping[str, tuple[Path, Tensor]]) -> None:
    for name, (folder, _) in every_row.items():
        assert file_bytes(folder / "again") == file_bytes(folder / "adapter"), name


def test_every_row_is_reloaded(every_row: Mapping[str, tuple[Path, Tensor]]) -> None:
    names = {tuple(name.split("-")[:2]) for name in every_row}
    assert names == {(method.name, kind) for method in METHODS for kind in method.layer_types}


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, Tensor]]:
    """Write one folder per method, dtype, form and scaling of a whole model, and let one child reload them all."""
    root = tmp_path_factory.mktemp("reload")
    expected = {}
    for method in LINEAR_METHODS:
        for dtype in method.dtypes:
            for unit_scale in (False, True):
                for scaling in (2.0, 0.1):
                    name = str(dtype).removeprefix("torch.")
                    form = "export" if unit_scale else "checkpoint"
                    folder = root / f"{name}-{form}-{method.name}-{scaling}"
                    folder.mkdir()
                    model = adapted_mlp(method.key, dtype, scaling)
                    save_adapter(model, folder / "adapter", modules_to_save=["head"], unit_scale=unit_scale)
                    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
                    save_file({"x": x}, folder / "input.safetensors")
                    case = {"dtype": name, "modules_to_save": ["head"], "unit_scale": unit_scale}
                    (folder / "case.json").write_text(json.dumps(case))
                    with torch.no_grad():
                        expected[folder.name] = (folder, model(x))
    run_child(root)
    return expected


def test_a_fresh_process_gives_equal_output_from_a_checkpoint(reloaded: Mapping[str, tuple[Path, Tensor]]) -> None:
    checked = 0
    for name, (folder, y) in reloaded.items():
        if "checkpoint" in name:
            found = load_file(folder / "output.safetensors")["y"]
            if name.endswith("2.0"):
                assert torch.equal(found, y), name
            else:  # PEFT's alpha = s · r cannot hold every s exactly: 0.1 · 3 / 3 ≠ 0.1
                assert_close(found, y, 4 * torch.finfo(y.dtype).eps)
            checked += 1
    assert checked > 0


def test_a_fresh_process_gives_equal_output_from_an_export(reloaded: Mapping[str, tuple[Path, Tensor]]) -> None:
    checked = 0
    for name, (folder, y) in reloaded.items():
        if "export" in name:
            assert_close(load_file(folder / "output.safetensors")["y"], y, EXPORT_TOLERANCE[name.split("-")[0]])
            checked += 1
    assert checked > 0


def test_saving_again_gives_equal_bytes(reloaded: Mapping[str, tuple[Path, Tensor]]) -> None:
    for name, (folder, _) in reloaded.items():
        assert file_bytes(folder / "again") == file_bytes(folder / "adapter"), name


def test_a_module_of_rank_zero_is_left_out_of_peft_s_files(reloaded: Mapping[str, tuple[Path, Tensor]]) -> None:
    checked = set()
    for name, (folder, _) in reloaded.items():
        method = name.split("-")[2]
        if method not in PEFT_METHODS and "checkpoint" in name:
            assert {path.name for path in (folder / "adapter").iterdir()} == set(OWN_FILES)
            assert json.loads((folder / "adapter" / OWN_FILES[0]).read_text())["sites"]["skip"]["rank"] == 0
            continue
        checked.add(method)
        config = json.loads((folder / "adapter" / FILES[0]).read_text())
        assert config["target_modules"] == ["down", "up"]
        assert not any("skip" in key for key in load_file(folder / "adapter" / FILES[1]))
        assert "skip" not in json.dumps(config)
    assert checked == {method.name for method in LINEAR_METHODS}


def test_no_temporary_file_is_left_behind(reloaded: Mapping[str, tuple[Path, Tensor]]) -> None:
    for folder, _ in reloaded.values():
        assert {path.name for path in (folder / "adapter").iterdir()} <= {*FILES, *OWN_FILES}


def test_every_tensor_of_the_file_is_in_the_loaded_model(tmp_path: Path) -> None:
    save_adapter(adapted_mlp("lora", torch.float32, 2.0), tmp_path, modules_to_save=["head"])
    model = mlp()
    load_adapter(model, tmp_path)
    state = model.state_dict()
    for key, tensor in load_file(tmp_path / FILES[1]).items():
        name = key.removeprefix("base_model.model.")
        for end in ("lora_A", "lora_B"):
            name = name.replace(f".{end}.weight", f".adapters.default.{end}")
        assert torch.equal(state[name], tensor)


def test_a_file_with_an_extra_tensor_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted_mlp("lora", torch.float32, 2.0), tmp_path, modules_to_save=["head"])
    for key in ("base_model.model.nowhere.weight", "base_model.model.up.lora_E.weight", "up.lora_A.weight", "extra"):
        tensors = load_file(tmp_path / FILES[1])
        folder = tmp_path / "extra"
        folder.mkdir(exist_ok=True)
        (folder / FILES[0]).write_bytes((tmp_path / FILES[0]).read_bytes())
        save_file({**tensors, key: torch.zeros(3)}, folder / FILES[1])
        with pytest.raises(ValueError, match="must be LoRA factors or lie in modules_to_save"):
            load_adapter(mlp(), folder)


def test_a_resized_adapter_reloads_with_its_scaling(tmp_path: Path) -> None:
    model = adapted_mlp("lora", torch.float32, 0.7)
    up = model.up.adapters["default"]
    up.shrink([2])
    down = model.down.adapters["default"]
    down.grow(torch.randn(3, 12))
    model.skip.adapters["default"].grow(torch.randn(1, 8))
    save_adapter(model, tmp_path, modules_to_save=["head"])
    fresh = mlp()
    found = load_adapter(fresh, tmp_path)
    assert {name: one.rank for name, one in found.items()} == {"up": 1, "down": 5, "skip": 1}
    assert [one.scaling for one in found.values()] == pytest.approx([0.7] * 3, rel=1e-15)
    x = torch.randn(4, 8)
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-6, atol=1e-6)


def test_an_adapted_module_inside_a_module_trained_in_full_reloads_or_is_refused_at_once(tmp_path: Path) -> None:
    model = mlp()
    try:
        found = attach(model, {"all-linear": 2}, modules_to_save=["head"])
    except ValueError:
        return
    for adapter in found.values():
        randomise(adapter)
    save_adapter(model, tmp_path, modules_to_save=["head"])
    fresh = mlp()
    load_adapter(fresh, tmp_path)
    x = torch.randn(4, 8)
    assert torch.equal(fresh(x), model(x))


def test_a_bare_linear_layer_reloads_or_is_refused_at_once(tmp_path: Path) -> None:
    model = nn.Linear(6, 5)
    try:
        found = attach(model, {"all-linear": 2})
    except ValueError:
        return
    for adapter in found.values():
        randomise(adapter)
    save_adapter(model, tmp_path)
    fresh = nn.Linear(6, 5)
    fresh.load_state_dict({"weight": model.weight.detach(), "bias": model.bias.detach()})
    load_adapter(fresh, tmp_path)
    x = torch.randn(4, 6)
    assert torch.equal(fresh(x), model(x))


def checkpoint(ranks: Mapping[str, int], scalings: Mapping[str, float], *, size: int = 8) -> AdapterCheckpoint:
    generator = torch.Generator().manual_seed(0)
    return AdapterCheckpoint(
        factors={
            name: (torch.randn(rank, size, generator=generator), torch.randn(size, rank, generator=generator))
            for name, rank in ranks.items()
        },
        scalings=dict(scalings),
    )


def assert_equal_checkpoints(actual: AdapterCheckpoint, expected: AdapterCheckpoint) -> None:
    assert actual.factors.keys() == expected.factors.keys()
    for name, (a, b) in expected.factors.items():
        assert torch.equal(actual.factors[name][0], a)
        assert torch.equal(actual.factors[name][1], b)
        assert actual.scalings[name] == pytest.approx(expected.scalings[name], rel=1e-14)


def test_equal_values_give_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    one = checkpoint({"b": 2, "a": 4}, {"b": 1.0, "a": 3.0})
    backwards = dataclasses.replace(one, factors=dict(reversed(one.factors.items())))
    write_checkpoint(one, tmp_path / "one")
    write_checkpoint(backwards, tmp_path / "backwards")
    write_checkpoint(read_checkpoint(tmp_path / "one"), tmp_path / "read")
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "backwards") == file_bytes(tmp_path / "read")


@pytest.mark.parametrize("names", [("k", "q", "block.q"), ("k", "b.q", "z.b.q"), ("k.q", "q", "a.q", "b.a.q")], ids=str)
def test_a_name_that_ends_another_keeps_its_own_rank_and_scaling(tmp_path: Path, names: tuple[str, ...]) -> None:
    by_rank = checkpoint({name: index + 1 for index, name in enumerate(names)}, dict.fromkeys(names, 2.0))
    by_scaling = checkpoint(dict.fromkeys(names, 2), {name: index + 1.0 for index, name in enumerate(names)})
    for index, one in enumerate((by_rank, by_scaling)):
        write_checkpoint(one, tmp_path / str(index))
        assert_equal_checkpoints(read_checkpoint(tmp_path / str(index)), one)


def test_two_modules_may_share_a_factor_tensor(tmp_path: Path) -> None:
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    one = AdapterCheckpoint(factors={"x": (a, b), "y": (a, b)}, scalings={"x": 1.0, "y": 2.0})
    write_checkpoint(one, tmp_path)
    assert_equal_checkpoints(read_checkpoint(tmp_path), one)


def test_a_failing_save_leaves_the_old_files(tmp_path: Path) -> None:
    model = adapted_mlp("lora", torch.float32, 2.0)
    save_adapter(model, tmp_path, modules_to_save=["head"])
    before = file_bytes(tmp_path)
    for name in RANKS:
        model.get_submodule(name).adapters["default"].shrink([])
    with pytest.raises(ValueError, match="at least one module of rank ≥ 1, got none"):
        save_adapter(model, tmp_path, modules_to_save=["head"])
    model.up.adapters["default"].grow(torch.full((1, 8), torch.nan))
    with pytest.raises(ValueError, match=r"factors must be finite.*'up'"):
        save_adapter(model, tmp_path, modules_to_save=["head"])
    assert file_bytes(tmp_path) == before


PARTS = st.sampled_from([
    "q",
    "block",
    "z",
    "k_proj",
    "0",
    "1",
    "weight",
    "model",
    "base_model",
    "default",
    "lora_A",
    "q-v",
])
NAMES = st.lists(PARTS, min_size=1, max_size=3).map(".".join)


def _no_leaf_inside_a_leaf(names: list[str]) -> bool:
    return not any(one != other and other.startswith(f"{one}.") for one in names for other in names)


@given(
    names=st.lists(NAMES, min_size=1, max_size=5, unique=True).filter(_no_leaf_inside_a_leaf),
    ranks=st.lists(st.integers(0, 4), min_size=5, max_size=5),
    scaling=st.floats(1e-3, 1e3),
    unit_scale=st.booleans(),
)
def test_any_names_and_ranks_survive_the_round_trip(
    names: list[str], ranks: list[int], scaling: float, unit_scale: bool
) -> None:
    rank_of = dict(zip(names, ranks, strict=False))
    if not any(rank_of.values()):
        rank_of[names[0]] = 1
    model = nested(*names)
    for seed, adapter in enumerate(attach(model, rank_of, scaling=scaling).values()):
        randomise(adapter, seed=seed)
    with tempfile.TemporaryDirectory() as root:
        save_adapter(model, Path(root) / "one", unit_scale=unit_scale)
        fresh = nested(*names)
        load_adapter(fresh, Path(root) / "one")
        save_adapter(fresh, Path(root) / "two", unit_scale=unit_scale)
        assert file_bytes(Path(root) / "one") == file_bytes(Path(root) / "two")
    before, after = checkpoint_of(model), checkpoint_of(fresh)
    assert before.factors.keys() == after.factors.keys() == {name for name, rank in rank_of.items() if rank}
    for name in before.factors:
        (a, b), (c, d) = before.factors[name], after.factors[name]
        assert torch.equal(a, c)
        torch.testing.assert_close(b * before.scalings[name], d * after.scalings[name])


@given(
    ranks=st.dictionaries(NAMES, st.integers(1, 4), min_size=1, max_size=5),
    scalings=st.lists(st.floats(-1e3, 1e3).filter(lambda value: abs(value) > 1e-3), min_size=5, max_size=5),
    size=st.integers(1, 6),
)
def test_any_checkpoint_survives_the_round_trip(ranks: dict[str, int], scalings: list[float], size: int) -> None:
    one = checkpoint(ranks, dict(zip(ranks, scalings, strict=False)), size=size)
    with tempfile.TemporaryDirectory() as root:
        write_checkpoint(one, Path(root) / "one")
        read = read_checkpoint(Path(root) / "one")
        assert_equal_checkpoints(read, one)
        write_checkpoint(read, Path(root) / "two")
        assert file_bytes(Path(root) / "one") == file_bytes(Path(root) / "two")


def test_saving_again_gives_equal_bytes_for_awkward_scalings_and_ranks(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    scalings = torch.rand(20, generator=generator, dtype=torch.float64).tolist()
    named = {f"m{rank}.l{index}": (rank, s) for rank in (7, 11, 13, 25, 49) for index, s in enumerate(scalings)}
    one = checkpoint({name: rank for name, (rank, _) in named.items()}, {name: s for name, (_, s) in named.items()})
    write_checkpoint(one, tmp_path / "one")
    read = read_checkpoint(tmp_path / "one")
    assert_equal_checkpoints(read, one)
    write_checkpoint(read, tmp_path / "two")
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "two")
