"""Folders are merged module by module, and a merge that was killed goes on to the same bytes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowra_compose import (
    AdapterState,
    LowRankUpdate,
    MergeOptions,
    ModuleStatistics,
    Truncation,
    merge_adapters,
    merge_folders,
    read_adapter,
    write_adapter,
)
from flowra_compose.fingerprints import fingerprint
from flowra_compose.folders import MergedFolder

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WEIGHTS = [0.7, -1.3]
RANKS = {"a.fc": 2, "b.fc": 3, "b.out": 1, "head_of_b": 4}


def adapter(seed: int, *, head: bool = False) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    updates = {
        name: LowRankUpdate(
            torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator), 1.0 + seed
        )
        for name, rank in RANKS.items()
    }
    heads = {"head.weight": torch.randn(2, 3, generator=generator), "head.count": torch.tensor(3)}
    return AdapterState(updates=updates, modules_to_save=heads if head else {}, task_type="SEQ_CLS")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two adapters to merge."""
    write_adapter(adapter(0), tmp_path / "one")
    write_adapter(adapter(1, head=True), tmp_path / "two")
    return [tmp_path / "one", tmp_path / "two"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(BaseException):
    """What stops a merge from outside, as Ctrl-C does."""


def stop_after(count: int) -> Any:  # noqa: ANN401 - a callback
    def on_module(name: str, done: int, total: int) -> None:
        if done == count:
            raise Stop

    return on_module


@pytest.mark.parametrize("truncation", [None, Truncation(rank=2)], ids=["exact", "truncated"])
def test_folders_merge_to_the_bytes_of_their_adapters_in_memory(
    folders: list[Path], truncation: Truncation | None, tmp_path: Path
) -> None:
    merged = merge_folders(folders, WEIGHTS, tmp_path / "out", truncation=truncation)
    expected = merge_adapters([adapter(0), adapter(1, head=True)], WEIGHTS, truncation=truncation)
    in_memory = merge_adapters([read_adapter(folder) for folder in folders], WEIGHTS, truncation=truncation)
    write_adapter(in_memory, tmp_path / "expected")
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    for name, update in expected.updates.items():
        torch.testing.assert_close(merged.updates[name].delta_weight(), update.delta_weight())
    assert torch.equal(merged.modules_to_save["head.weight"], expected.modules_to_save["head.weight"])
    assert (merged.task_type, merged.trained_modules) == ("SEQ_CLS", ("head",))
    assert not (tmp_path / "out.partial").exists()


def test_each_truncation_tells_its_loss(folders: list[Path], tmp_path: Path) -> None:
    merged = merge_folders(folders, WEIGHTS, tmp_path / "out", truncation=Truncation(rank=2))
    in_memory = merge_adapters([read_adapter(folder) for folder in folders], WEIGHTS, truncation=Truncation(rank=2))
    assert merged.relative_losses == {name: each.relative_loss for name, each in in_memory.updates.items()}  # type: ignore[attr-defined]
    assert merged.relative_losses["b.fc"] > 0
    assert merge_folders(folders, WEIGHTS, tmp_path / "out").relative_losses == {}


def test_progress_is_told_for_every_module(folders: list[Path], tmp_path: Path) -> None:
    told = []
    merge_folders(folders, WEIGHTS, tmp_path / "out", on_module=lambda *each: told.append(each))
    assert told == [(name, done, 4) for done, name in enumerate(sorted(RANKS), 1)]


def test_what_is_written_beside_is_there_with_the_adapter_or_neither(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def beside(merged: MergedFolder, folder: Path) -> None:
        assert set(merged.updates) == set(RANKS)
        assert merged.updates["a.fc"].delta_weight().isfinite().all()
        assert not out.exists()
        (folder / "note.txt").write_text("first")

    def refuse(merged: MergedFolder, folder: Path) -> None:
        (folder / "note.txt").write_text("second")
        raise ValueError("no")

    merge_folders(folders, WEIGHTS, out, beside=beside)
    first = content(out)
    assert first.pop("note.txt") == b"first"
    merge_folders(folders, WEIGHTS, tmp_path / "straight")
    assert first == content(tmp_path / "straight")
    with pytest.raises(ValueError, match="no"):
        merge_folders(folders, [1, 1], out, beside=refuse)
    assert content(out) == {**first, "note.txt": b"first"}
    assert not (tmp_path / "out.partial").exists()


def test_what_a_killed_process_left_beside_the_adapter_is_not_moved(folders: list[Path], tmp_path: Path) -> None:
    def stop(merged: MergedFolder, folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise Stop

    with pytest.raises(Stop):
        merge_folders(folders, WEIGHTS, tmp_path / "out", beside=stop)
    merge_folders(folders, WEIGHTS, tmp_path / "out")
    merge_folders(folders, WEIGHTS, tmp_path / "straight")
    assert content(tmp_path / "out") == content(tmp_path / "straight")


# a merge that is stopped


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_merge_that_was_stopped_goes_on_where_it_was(folders: list[Path], count: int, tmp_path: Path) -> None:
    truncation = Truncation(rank=2)
    expected = merge_folders(folders, WEIGHTS, tmp_path / "straight", truncation=truncation)
    out = tmp_path / "deep" / "out"
    with pytest.raises(Stop):
        merge_folders(folders, WEIGHTS, out, truncation=truncation, on_module=stop_after(count))
    assert not out.exists()
    told = []
    merged = merge_folders(folders, WEIGHTS, out, truncation=truncation, on_module=lambda *each: told.append(each))
    assert told == [(name, done, 4) for done, name in enumerate(sorted(RANKS), 1) if done > count]
    assert content(out) == content(tmp_path / "straight")
    assert merged.relative_losses == expected.relative_losses
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "task_arithmetic"},
        {"rule": "ties", "options": MergeOptions(density=0.5)},
        {"rule": "ties", "options": MergeOptions(density=0.6)},
        {"truncation": Truncation(rank=2)},
        {"truncation": Truncation(rank=dict.fromkeys(RANKS, 2))},
        {"heads_from": 1},
        {"statistics": [{"a.fc": ModuleStatistics(inputs=torch.eye(6))}, {}]},
        {"statistics": [{}, {"a.fc": ModuleStatistics(inputs=torch.eye(6))}]},
    ],
    ids=str,
)
def test_what_another_merge_has_left_is_not_taken_up(
    folders: list[Path], options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        merge_folders(folders, WEIGHTS, tmp_path / "out", on_module=stop_after(3))
    told = []
    merge_folders(folders, WEIGHTS, tmp_path / "out", on_module=lambda *each: told.append(each[1]), **options)
    assert told == [1, 2, 3, 4]
    assert not (tmp_path / "out.partial").exists()


def test_modules_that_a_budget_leaves_out_are_left_out_after_a_stop_too(folders: list[Path], tmp_path: Path) -> None:
    truncation = Truncation(parameters=33)  # three units of rank of 5 + 6 each, for four modules
    expected = merge_folders(folders, WEIGHTS, tmp_path / "straight", truncation=truncation)
    assert 1 <= len(expected.updates) < 4
    with pytest.raises(Stop):
        merge_folders(folders, WEIGHTS, tmp_path / "out", truncation=truncation, on_module=stop_after(1))
    merge_folders(folders, WEIGHTS, tmp_path / "out", truncation=truncation)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_other_weights_or_inputs_start_again(folders: list[Path], tmp_path: Path) -> None:
    def stopped(weights: Sequence[float]) -> list[int]:
        told = []

        def on_module(name: str, done: int, total: int) -> None:
            told.append(done)
            if done == 3:
                raise Stop

        with pytest.raises(Stop):
            merge_folders(folders, weights, tmp_path / "out", on_module=on_module)
        return told

    assert stopped(WEIGHTS) == [1, 2, 3]
    assert stopped([0.7, -1.2]) == [1, 2, 3]
    config = json.loads((folders[0] / CONFIG).read_text())
    (folders[0] / CONFIG).write_text(json.dumps(config | {"lora_alpha": 7}))
    assert stopped([0.7, -1.2]) == [1, 2, 3]
    tensors = load_file(folders[1] / TENSORS)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, folders[1] / TENSORS)
    assert stopped([0.7, -1.2]) == [1, 2, 3]


def test_a_damaged_piece_is_made_again(folders: list[Path], tmp_path: Path) -> None:
    merge_folders(folders, WEIGHTS, tmp_path / "straight")
    with pytest.raises(Stop):
        merge_folders(folders, WEIGHTS, tmp_path / "out", on_module=stop_after(3))
    (tmp_path / "out.partial" / "00001.safetensors").write_bytes(b"")
    told = []
    merge_folders(folders, WEIGHTS, tmp_path / "out", on_module=lambda *each: told.append(each[:2]))
    assert told == [("b.fc", 3), ("head_of_b", 4)]
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_a_folder_of_someone_else_is_not_touched(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.partial must be free, got \['thesis\.tex'\] in it\. Move it"):
        merge_folders(folders, WEIGHTS, tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "mine"


def test_an_older_adapter_stays_until_the_new_one_is_whole(folders: list[Path], tmp_path: Path) -> None:
    merge_folders(folders, [1, 0], tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    before = content(tmp_path / "out")
    with pytest.raises(Stop):
        merge_folders(folders, WEIGHTS, tmp_path / "out", on_module=stop_after(4))
    assert content(tmp_path / "out") == before
    merge_folders(folders, WEIGHTS, tmp_path / "out")
    merge_folders(folders, WEIGHTS, tmp_path / "straight")
    assert content(tmp_path / "out") == content(tmp_path / "straight") | {"README.md": b"mine"}


CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
from flowra_compose import merge_folders
out, kill_at, *folders = sys.argv[1:]
replace, count = os.replace, 0
def counted(*paths):
    global count
    count += 1
    if count == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = counted
def told(name, done, total):
    print(name, flush=True)
    if int(kill_at) == 0 and done == 2:
        sys.stdin.read()
merge_folders(folders, [0.7, -1.3], out, on_module=told)
print(count)
"""
"""Merges, and kills itself at a renaming, or waits after two modules to be killed."""


def run_child(out: Path, kill_at: int, folders: list[Path]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(out), str(kill_at), *map(str, folders)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_from(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_folders(folders, WEIGHTS, tmp_path / "straight")
    command = [sys.executable, "-c", CHILD, str(out), "0", *map(str, folders)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["a.fc", "b.fc"]
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert not out.exists()
    told = []
    merge_folders(folders, WEIGHTS, out, on_module=lambda *each: told.append(each[0]))
    assert told == ["b.out", "head_of_b"]
    assert content(out) == content(tmp_path / "straight")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow  # a process for every renaming
@pytest.mark.parametrize("older", [False, True], ids=["new", "replaced"])
def test_a_process_may_be_killed_anywhere(folders: list[Path], older: bool, tmp_path: Path) -> None:
    merge_folders(folders, WEIGHTS, tmp_path / "straight")
    expected, old = content(tmp_path / "straight"), None
    kill_at, killed = 1, True
    while killed:
        out = tmp_path / f"out{kill_at}"
        if older:
            write_adapter(adapter(2), out)
            old = content(out)
        done = run_child(out, kill_at, folders)
        killed = done.returncode == -signal.SIGKILL
        assert killed or done.returncode == 0, done.stderr
        left = content(out) if out.exists() else None
        if CONFIG in (left or {}):  # whole: the old one or the new one
            assert left in (old, expected)
        merge_folders(folders, WEIGHTS, out)
        assert content(out) == expected
        assert not out.with_name(f"{out.name}.partial").exists()
        kill_at += 1
    assert kill_at - 2 == 1 + len(RANKS) + 2 + 2  # the fingerprint, every module, the two files twice


MEASURED = """
import sys, torch
torch.set_num_threads(1)
from flowra_compose import merge_folders
out, *folders = sys.argv[1:]
merge_folders(folders[:1], [1.0], out + ".first")
def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1024
before = peak()
merge_folders(folders[1:], [1.0] * (len(folders) - 1), out)
print(peak() - before)
"""


@pytest.mark.slow  # writes a gigabyte
def test_memory_is_bounded_by_one_module(tmp_path: Path) -> None:
    size, rank, modules, tasks = 4096, 64, 60, 4
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(rank, size, generator=generator)

    def write(folder: Path, names: Sequence[str]) -> None:
        write_adapter(AdapterState(updates={name: LowRankUpdate(shared, shared.T) for name in names}), folder)

    write(tmp_path / "small", ["fc"])
    for task in range(tasks):
        write(tmp_path / str(task), [f"layers.{index}.fc" for index in range(modules)])
    folders = [tmp_path / "small", *(tmp_path / str(task) for task in range(tasks))]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "out"), *map(str, folders)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},  # give back what is freed
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out" / TENSORS).stat().st_size / 2**20
    assert written == pytest.approx(modules * 2 * size * rank * tasks * 4 / 2**20, rel=0.01)
    one = 2 * size * rank * tasks * 4 / 2**20  # MiB of a merged module in float32
    assert float(done.stdout) < 12 * one < written / 4


# fingerprints


def test_a_fingerprint_tells_values_apart() -> None:
    values = [
        None,
        0,
        1,
        1.0,
        True,
        "1",
        [1],
        [[1], [2]],
        [[1, 2]],
        {"a": 1},
        [("a", 1)],
        torch.ones(2),
        torch.ones(2, 1),
        torch.ones(2).double(),
        torch.zeros(0),
        torch.zeros(0, 2),
        MergeOptions(),
        MergeOptions(density=0.5),
        Truncation(rank=2),
        Truncation(rank={"a": 2}),
    ]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint({"a": 1, "b": [2.0]}) == fingerprint({"b": [2.0], "a": 1})
    assert fingerprint([1, 2]) == fingerprint((1, 2))
    assert fingerprint(torch.arange(6.0).reshape(2, 3).T) == fingerprint(torch.arange(6.0).reshape(2, 3).T.contiguous())


def test_the_fingerprint_of_a_path_is_that_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"one")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"two")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_a_value_without_a_fingerprint_is_refused() -> None:
    with pytest.raises(TypeError, match="values must be plain, tensors, paths or made of them, got object"):
        fingerprint([object()])
