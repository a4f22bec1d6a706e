"""What a memory writes, and what it refuses to read."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowra_compose import (
    LowRankUpdate,
    ModuleMemory,
    ModuleStatistics,
    TaskMemory,
    read_task_memory,
    write_task_memory,
)
from flowra_compose.memory_files import FILES
from flowra_testing.past_tasks import moment

SHAPES = {"fc": (4, 8), "layers.0.out": (3, 6)}


def remembered(tasks: int = 2, *, outputs: bool = True) -> TaskMemory:
    memory = TaskMemory.empty(SHAPES)
    for task in range(tasks):
        memory = memory.after(
            {
                name: ModuleStatistics(
                    inputs=moment(n, 3, seed=task), outputs=moment(m, m, seed=task) if outputs else None
                )
                for name, (m, n) in SHAPES.items()
            },
            {"fc": LowRankUpdate(torch.randn(2, 8), torch.randn(4, 2))},
        )
    return memory


def assert_equal(found: TaskMemory, expected: TaskMemory) -> None:
    assert list(found.modules) == list(expected.modules)
    for name, module in expected.modules.items():
        other = found.modules[name]
        assert (other.shape, other.kept) == (module.shape, module.kept)
        for part in ("basis", "rows", "inputs", "outputs"):
            mine, theirs = getattr(module, part), getattr(other, part)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good memory, for a test to damage."""
    write_task_memory(remembered(), tmp_path)
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


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("tasks", [0, 1, 3])
def test_what_is_read_is_what_was_written_to_the_bit(tasks: int, outputs: bool, tmp_path: Path) -> None:
    memory = remembered(tasks, outputs=outputs)
    write_task_memory(memory, tmp_path / "first")
    found = read_task_memory(tmp_path / "first")
    assert_equal(found, memory)
    assert found.tasks == tasks
    write_task_memory(found, tmp_path / "second")
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in FILES)


def test_a_memory_that_was_read_grows_as_the_one_that_was_written(folder: Path) -> None:
    statistics = {
        name: ModuleStatistics(inputs=moment(n, n, seed=9), outputs=torch.eye(m)) for name, (m, n) in SHAPES.items()
    }
    memory = remembered()
    write_task_memory(memory, folder)
    assert_equal(read_task_memory(folder).after(statistics), memory.after(statistics))


def test_the_files_hold_no_pickle(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for path in folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(path.read_bytes())


def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_task_memory(remembered(3), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_missing_or_cut_off_is_refused(file: str, folder: Path) -> None:
    content = (folder / file).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\x80\x04N."):
        (folder / file).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"task memory must follow docs/formats/task_memory\.md, got"):
            read_task_memory(folder)
    (folder / file).unlink()
    with pytest.raises(ValueError, match="FileNotFoundError"):
        read_task_memory(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "format_version must be 1, got 2"),
        (lambda c: c.update(format_version=True), "format_version must be 1, got True"),
        (lambda c: c.update(surplus=1), r"unknown \['surplus'\]"),
        (lambda c: c.pop("tasks"), r"missing \['tasks'\]"),
        (lambda c: c.update(tasks=-1), "tasks must be a whole number"),
        (lambda c: c.update(tasks=3), "kept must be a number for each of 3 tasks"),
        (lambda c: c.update(modules=[]), "modules an object"),
        (lambda c: c.update(modules={}), "got missing|unknown"),
        (lambda c: c["modules"]["fc"].update(shape=[4, 9]), r"basis must be float32 \(9,"),
        (lambda c: c["modules"]["fc"].update(shape=[4]), "shape must be two whole numbers"),
        (lambda c: c["modules"]["fc"].update(shape=[4, 8.0]), "shape must be two whole numbers"),
        (lambda c: c["modules"]["fc"].update(kept=[1.0, 2.0]), r"kept must be shares in \[0, 1\]"),
        (lambda c: c["modules"]["fc"].update(kept=[1.0, True]), "kept must be a number"),
        (lambda c: c["modules"].update(fc=7), "module 'fc' must be an object"),
        (lambda c: c["modules"].pop("fc"), r"unknown \['basis/fc', 'inputs/fc', 'outputs/fc'\]"),
        (lambda c: c["modules"].update(other=c["modules"]["fc"]), "tensors must hold basis/other"),
        (lambda c: c.update(sha256="0" * 64), "sha256 must be that of task_memory.safetensors"),
    ],
)
def test_a_hostile_json_is_refused(change: Callable[[Any], object], message: str, folder: Path) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        read_task_memory(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("basis/fc"), "tensors must hold basis/fc"),
        (lambda t: t.pop("rows/fc"), "tensors must hold basis/fc and rows/fc"),
        (lambda t: t.pop("inputs/fc"), "inputs and outputs must be there together"),
        (lambda t: t.update(other=torch.ones(1)), r"unknown \['other'\]"),
        (lambda t: t.update({"basis/fc": t["basis/fc"] * 1.01}), "basis must have orthonormal columns"),
        (lambda t: t.update({"basis/fc": torch.eye(8, 9)}), "basis must have orthonormal columns"),
        (lambda t: t.update({"basis/fc": t["basis/fc"].half()}), "basis must be float32"),
        (lambda t: t.update({"basis/fc": torch.ones(())}), "basis and rows must be matrices, got 0 and 2 axes"),
        (lambda t: t["inputs/fc"].fill_(torch.nan), "inputs must be finite"),
        (lambda t: t.update({"outputs/fc": torch.eye(3)}), r"outputs must be float32 \(4, 4\)"),
        (lambda t: t.update({"rows/fc": torch.ones(2, 7)}), r"rows must be float32 \(2, 8\)"),
    ],
)
def test_hostile_tensors_are_refused(change: Callable[[Any], object], message: str, folder: Path) -> None:
    edit(folder, change, of="tensors")
    with pytest.raises(ValueError, match=message):
        read_task_memory(folder)


def test_numbers_that_json_does_not_have_are_refused(folder: Path) -> None:
    edit(folder, lambda content: content["modules"]["fc"].update(kept=[1.0, float("nan")]))
    with pytest.raises(ValueError, match="numbers must be finite, got NaN"):
        read_task_memory(folder)
    (folder / FILES[1]).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="RecursionError"):
        read_task_memory(folder)


def test_a_module_of_any_name_is_kept(tmp_path: Path) -> None:
    memory = TaskMemory(modules={name: ModuleMemory.empty((1, 1)) for name in ("a/b", "../c", "d ë")})
    write_task_memory(memory, tmp_path)
    assert_equal(read_task_memory(tmp_path), memory)
