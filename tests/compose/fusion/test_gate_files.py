"""Gates as files: the bits that were written, for the adapters that they know, and nothing hostile."""

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compose.fusion.stacks import LEVELS, adapters_of, randomised, stack, states
from flowra_compose import AdapterState, LowRankUpdate, read_adapter, write_adapter
from flowra_compose.fusion import (
    GateOptions,
    Gates,
    adapter_fingerprint,
    adapter_names,
    fuse,
    gates_for,
    read_gates,
    write_gates,
)
from flowra_compose.fusion.gate_files import FILES, MAX_JSON_BYTES

OPTIONS = (
    GateOptions(),
    GateOptions(level="step", initial="uniform", temperature=1.1),
    GateOptions(level="module", gate_input="normed", rank=2, top_k=1, primary=0),
)


def pair(count: int = 2) -> dict[str, AdapterState]:
    return adapters_of(stack(dtype=torch.float32), "stack", count)


def learned(options: GateOptions | None = None, adapters: dict[str, AdapterState] | None = None) -> Gates:
    return randomised(gates_for(stack(dtype=torch.float32), adapters or pair(), options))


def assert_equal(found: Gates, expected: Gates) -> None:
    assert (found.places, found.widths, found.options) == (expected.places, expected.widths, expected.options)
    state, other = found.state_dict(), expected.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good gates, for a test to damage."""
    write_gates(learned(), pair(), tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[Any], object], *, of: str = "json") -> None:
    """Change the JSON, or the tensors with the hash that then fits."""
    tensors_file, json_file = (folder / name for name in FILES)
    content = json.loads(json_file.read_text())
    if of == "tensors":
        tensors: dict[str, Tensor] = load_file(tensors_file)
        change(tensors)
        save_file({key: each.contiguous() for key, each in tensors.items()}, tensors_file)
        content["sha256"] = hashlib.sha256(tensors_file.read_bytes()).hexdigest()
    else:
        change(content)
    json_file.write_text(json.dumps(content))


# what is written is read


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_read_is_what_was_written_to_the_bit(options: GateOptions, tmp_path: Path) -> None:
    gates = learned(options)
    write_gates(gates, pair(), tmp_path / "first")
    found = read_gates(tmp_path / "first", pair())
    assert_equal(found, gates)
    assert all(each.requires_grad for each in found.parameters())
    write_gates(found, pair(), tmp_path / "second")
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("count", [1, 3])
def test_gates_of_one_and_of_three_adapters_are_read(count: int, tmp_path: Path) -> None:
    gates = learned(adapters=pair(count))
    write_gates(gates, pair(count), tmp_path)
    assert_equal(read_gates(tmp_path, pair(count)), gates)
    assert adapter_names(tmp_path) == list(pair(count))


CHILD = """
import sys
import torch
from compose.fusion.stacks import adapters_of, stack, states
from flowra_compose import read_adapter
from flowra_compose.fusion import adapter_names, fuse, read_gates
folder = sys.argv[1]
torch.set_num_threads(1)
model = stack(dtype=torch.float32)
adapters = {name: read_adapter(f"{folder}/{name}") for name in adapter_names(folder)}
with fuse(model, adapters, read_gates(folder, adapters)), torch.no_grad():
    torch.save(model(states(dtype=torch.float32)), f"{folder}/answer.pt")
"""


def test_a_fresh_process_answers_to_the_bit_from_the_files(tmp_path: Path) -> None:
    for name, one in pair().items():
        write_adapter(one, tmp_path / name)
    adapters = {name: read_adapter(tmp_path / name) for name in pair()}
    gates = learned(adapters=adapters)
    write_gates(gates, adapters, tmp_path)
    model = stack(dtype=torch.float32)
    with fuse(model, adapters, gates), torch.no_grad():
        expected = model(states(dtype=torch.float32))
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "answer.pt", weights_only=True), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_training_goes_on_from_files_as_it_would_have(level: Any, tmp_path: Path) -> None:  # noqa: ANN401 - a literal
    def steps(gates: Gates) -> Gates:
        model = stack(dtype=torch.float32)
        optimizer = torch.optim.SGD(gates.parameters(), lr=0.1)
        with fuse(model, pair(), gates):
            for _ in range(2):
                optimizer.zero_grad()
                model(states(dtype=torch.float32)).pow(2).mean().backward()
                optimizer.step()
        return gates

    halfway = steps(learned(GateOptions(level=level)))
    write_gates(halfway, pair(), tmp_path)
    assert_equal(steps(read_gates(tmp_path, pair())), steps(halfway))


def test_an_adapter_s_fingerprint_is_that_of_what_it_adds() -> None:
    language, task = pair().values()
    assert adapter_fingerprint(language) == adapter_fingerprint(pair()["language"])
    assert adapter_fingerprint(language) != adapter_fingerprint(task)
    name, update = next(iter(language.updates.items()))
    scaled = {**language.updates, name: dataclasses.replace(update, scaling=update.scaling * 2)}
    assert adapter_fingerprint(dataclasses.replace(language, updates=scaled)) != adapter_fingerprint(language)
    reversed_order = dict(reversed(list(language.updates.items())))
    assert adapter_fingerprint(AdapterState(updates=reversed_order)) == adapter_fingerprint(language)


def test_an_adapter_has_one_fingerprint_in_memory_and_in_files(tmp_path: Path) -> None:
    held = {
        name: LowRankUpdate(nn.Parameter(each.lora_A), nn.Parameter(each.lora_B), 2)  # a whole number, and parameters
        for name, each in pair()["language"].updates.items()
    }
    write_adapter(AdapterState(updates=held), tmp_path)
    assert adapter_fingerprint(AdapterState(updates=held)) == adapter_fingerprint(read_adapter(tmp_path))


# other adapters


def renamed(adapters: dict[str, AdapterState]) -> dict[str, AdapterState]:
    return {"tongue": adapters["language"], "task": adapters["task"]}


def reordered(adapters: dict[str, AdapterState]) -> dict[str, AdapterState]:
    return {"task": adapters["task"], "language": adapters["language"]}


def exchanged(adapters: dict[str, AdapterState]) -> dict[str, AdapterState]:
    return {"language": adapters["task"], "task": adapters["language"]}


def fewer(adapters: dict[str, AdapterState]) -> dict[str, AdapterState]:
    return {"language": adapters["language"]}


def trained_on(adapters: dict[str, AdapterState]) -> dict[str, AdapterState]:
    task = dict(adapters["task"].updates)
    name, update = next(iter(task.items()))
    task[name] = dataclasses.replace(update, lora_B=torch.nextafter(update.lora_B, torch.tensor(9.0)))
    return {**adapters, "task": AdapterState(updates=task)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"got \['tongue', 'task'\] where they know \['language', 'task'\]"),
        (reordered, r"got \['task', 'language'\] where they know \['language', 'task'\]"),
        (fewer, r"got \['language'\] where they know \['language', 'task'\]"),
        (exchanged, r"got other updates of \['language', 'task'\]"),
        (trained_on, r"got other updates of \['task'\]"),
    ],
)
def test_adapters_other_than_those_of_training_are_refused(
    change: Callable[[dict[str, AdapterState]], dict[str, AdapterState]], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=f"adapters must be those that the gates were trained with.*{message}"):
        read_gates(folder, change(pair()))


def test_gates_are_not_written_for_another_number_of_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapters must be 2, as the gates weigh, got 3"):
        write_gates(learned(), pair(3), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gates_that_could_not_be_read_are_not_written(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gates must be finite and float32, got others in \['gates\.0\.bias'"):
        write_gates(learned().to(dtype), pair(), tmp_path)
    broken = learned()
    with torch.no_grad():
        next(iter(broken)).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"gates must be finite and float32, got others in \['gates\.0\.weight'\]"):
        write_gates(broken, pair(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# damage


def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_gates(randomised(learned(), seed=9), pair(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_files_hold_no_pickle_and_one_beside_them_is_not_opened(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for path in folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(path.read_bytes())
    for name in ("gates.bin", "gates.pt", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    assert_equal(read_gates(folder, pair()), learned())


class Trap:
    """Fails the test that unpickles it."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_missing_or_cut_off_is_refused(file: str, folder: Path) -> None:
    content = (folder / file).read_bytes()
    for damaged in (content[: len(content) // 2], content[:-2], content + b"x", b"", b"\x80\x04N."):
        (folder / file).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"gates must follow docs/formats/gates\.md, got .*Train them again"):
            read_gates(folder, pair())
    (folder / file).unlink()
    with pytest.raises(ValueError, match="FileNotFoundError"):
        read_gates(folder, pair())


def test_the_tensors_of_other_gates_are_refused(folder: Path, tmp_path: Path) -> None:
    write_gates(randomised(learned(), seed=9), pair(), tmp_path / "other")
    (tmp_path / "other" / FILES[0]).replace(folder / FILES[0])
    with pytest.raises(ValueError, match=r"sha256 must be that of gates\.safetensors"):
        read_gates(folder, pair())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "format_version must be 1, got 2"),
        (lambda c: c.update(format_version=True), "format_version must be 1, got True"),
        (lambda c: c.update(format_version="1"), "format_version must be 1, got '1'"),
        (lambda c: c.update(surplus=1), r"keys of the gates must be .*missing \[\] and unknown \['surplus'\]"),
        (lambda c: c.pop("options"), r"missing \['options'\] and unknown"),
        (lambda c: c.pop("format_version"), "format_version"),
        (lambda c: c["options"].update(surplus=1), "keys of options must be"),
        (lambda c: c["options"].pop("level"), "keys of options must be"),
        (lambda c: c["options"].update(level="token"), "level must be one of"),
        (lambda c: c["options"].update(level=["layer"]), "level must be one of"),
        (lambda c: c["options"].update(temperature=10**400), "temperature must be a number from 1e-6 to 1e6"),
        (lambda c: c["options"].update(temperature=True), "temperature must be a number from 1e-6 to 1e6"),
        (lambda c: c["options"].update(temperature=0), "temperature must be a number from 1e-6 to 1e6"),
        (lambda c: c["options"].update(temperature="1"), "TypeError"),
        (lambda c: c["options"].update(rank=2), "tensors must be"),
        (lambda c: c["options"].update(rank=3), "rank must be at most 2"),
        (lambda c: c["options"].update(primary=7), "primary must be the index"),
        (lambda c: c.update(options=[]), "options must be an object, got list"),
        (lambda c: c.update(adapters=3), "TypeError"),
        (lambda c: c.update(adapters=[]), "primary must be the index of one of 0 adapters"),
        (lambda c: c["adapters"].append(c["adapters"][0]), r"gates\.0\.bias must be finite \(3,\) float32, got \(2,\)"),
        (lambda c: c["adapters"][0].update(surplus=1), "keys of an adapter must be"),
        (lambda c: c["adapters"][0].pop("sha256"), "keys of an adapter must be"),
        (lambda c: c["places"][0].update(surplus=1), "keys of a place must be"),
        (lambda c: c["places"][0].update(width=9), r"gates\.0\.weight must be finite \(2, 9\)"),
        (lambda c: c["places"][0].update(width=7), r"gates\.0\.weight must be finite \(2, 7\)"),
        (lambda c: c["places"][0].update(width=2**62), "places must be no wider than gates.safetensors"),
        (lambda c: c["places"][0].update(width=10**40), "places must be no wider than gates.safetensors"),
        (lambda c: c["places"][0].update(width=0), "places must be distinct names with widths > 0"),
        (lambda c: c["places"][0].update(width=True), "places must be distinct names with widths > 0"),
        (lambda c: c["places"][0].update(width=8.0), "places must be distinct names with widths > 0"),
        (lambda c: c["places"][1].update(name="blocks.0"), "places must be distinct names"),
        (lambda c: c["places"][0].update(name=[]), "TypeError"),
        (lambda c: c["places"].pop(), "tensors must be"),
        (lambda c: c.update(places=None), "TypeError"),
        (lambda c: c.update(sha256="0" * 64), "sha256 must be that of gates.safetensors"),
    ],
)
def test_a_hostile_json_is_refused(change: Callable[[Any], object], message: str, folder: Path) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        read_gates(folder, pair())


def test_names_of_places_are_checked_where_they_are_used(folder: Path) -> None:
    edit(folder, lambda content: content["places"][0].update(name="../blocks"))
    gates = read_gates(folder, pair())
    with pytest.raises(ValueError, match="gates must stand where the model needs them"):
        fuse(stack(dtype=torch.float32), pair(), gates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("gates.0.bias"), "tensors must be"),
        (lambda t: t.update(other=torch.ones(1)), "tensors must be"),
        (lambda t: t["gates.1.weight"].fill_(torch.nan), r"gates\.1\.weight must be finite"),
        (lambda t: t["gates.1.bias"].fill_(torch.inf), r"gates\.1\.bias must be finite"),
        (lambda t: t.update({"gates.0.bias": torch.ones(3)}), r"gates\.0\.bias must be finite \(2,\) float32"),
        (lambda t: t.update({"gates.0.weight": t["gates.0.weight"].double()}), r"gates\.0\.weight must be finite"),
        (lambda t: t.update({"gates.0.weight": t["gates.0.weight"].T}), r"gates\.0\.weight must be finite"),
    ],
)
def test_hostile_tensors_are_refused(change: Callable[[Any], object], message: str, folder: Path) -> None:
    edit(folder, change, of="tensors")
    with pytest.raises(ValueError, match=message):
        read_gates(folder, pair())


def test_numbers_that_json_does_not_have_and_files_that_are_too_long_are_refused(folder: Path) -> None:
    edit(folder, lambda content: content["options"].update(temperature=float("nan")))
    with pytest.raises(ValueError, match="numbers must be finite, got NaN"):
        read_gates(folder, pair())
    (folder / FILES[1]).write_text("[" * 100_000)
    for read in (lambda: read_gates(folder, pair()), lambda: adapter_names(folder)):
        with pytest.raises(ValueError, match=r"gates must follow docs/formats/gates\.md, got RecursionError"):
            read()
    (folder / FILES[1]).write_bytes(b" " * (MAX_JSON_BYTES + 1))
    with pytest.raises(ValueError, match="at most 16777216 bytes are read"):
        read_gates(folder, pair())
