"""A write that fails leaves a folder as it was, whoever writes."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from flowra_adapters import AdapterCheckpoint, write_checkpoint
from flowra_allocation import allocate, write_plan
from flowra_analysis import FlowProfile, ModuleProfile, write_profile
from flowra_compose import AdapterState, LowRankUpdate, write_adapter
from flowra_pipelines.training_state import RNG, TrainingState, write_training_state

LIMIT = 100_000
ROOT = Path(__file__).parents[2]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to make a file larger than this, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def checkpoint(folder: Path, size: int) -> None:
    write_checkpoint(
        AdapterCheckpoint(factors={"fc": (torch.ones(1, size), torch.ones(2, 1))}, scalings={"fc": 1.0}), folder
    )


def adapter(folder: Path, size: int) -> None:
    write_adapter(AdapterState(updates={"fc": LowRankUpdate(torch.ones(1, size), torch.ones(2, 1))}), folder)


def plan(folder: Path, size: int) -> None:
    write_plan(allocate({"fc": [1.0] * size}, {"fc": 10}, budget=100), folder)


def profile(folder: Path, size: int) -> None:
    module = ModuleProfile(shape=(2, 2), cost_per_rank=4, statistics={})
    spectra = {"weight": {"fc": torch.ones(size, dtype=torch.float64)}}
    write_profile(FlowProfile(modules={"fc": module}, spectra=spectra, base_parameters=4, provenance={}), folder)


def state(folder: Path, size: int) -> None:
    tensors = {RNG: torch.zeros(size, dtype=torch.float64)}
    counts = {"step": 1, "total_steps": 2, "seed": 0, "examples_seen": 1, "peak_parameters": 1}
    write_training_state(TrainingState(schedule="linear", tensors=tensors, **counts), folder)


WRITERS = [checkpoint, adapter, plan, profile, state]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_write_that_fails_leaves_the_folder_as_it_was(write: Callable[[Path, int], None], tmp_path: Path) -> None:
    write(tmp_path, 3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files_of_at_most(LIMIT), pytest.raises((OSError, SafetensorError)):
        write(tmp_path, LIMIT)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(tmp_path, LIMIT)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} != before


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_kill_between_two_changes_of_files_leaves_the_old_the_new_or_nothing_to_read(
    write: Callable[[Path, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    write(tmp_path / "old", 3)
    write(tmp_path / "new", 4)
    old, new = files(tmp_path / "old"), files(tmp_path / "new")
    changes, found = {name: getattr(os, name) for name in ("replace", "unlink")}, []
    for killed_at in range(9):
        folder, left = tmp_path / str(killed_at), killed_at
        write(folder, 3)

        def change(name: str, *places: Path) -> None:
            nonlocal left
            if left == 0 and (name == "replace" or places[0].suffix != ".partial"):  # a kill cleans nothing up
                raise KeyboardInterrupt
            left -= 1
            changes[name](*places)

        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            for name in changes:
                patched.setattr(os, name, partial(change, name))
            write(folder, 4)
        found.append(files(folder))
        assert found[-1] in (old, new) or not any(name.endswith(".json") for name in found[-1])
    assert found[0] == old
    assert found[-1] == new


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_first_write_that_fails_leaves_no_file(write: Callable[[Path, int], None], tmp_path: Path) -> None:
    with files_of_at_most(LIMIT), pytest.raises((OSError, SafetensorError)):
        write(tmp_path / "new", LIMIT)
    assert not list((tmp_path / "new").iterdir())


def test_the_helper_is_the_same_in_every_distribution() -> None:
    copies = [*ROOT.glob("packages/*/src/*/whole_files.py"), *ROOT.glob("pipelines/*/whole_files.py")]
    assert len(copies) == 5
    assert len({path.read_bytes() for path in copies}) == 1


@pytest.mark.parametrize("name", ["sharding", "penalty_callback"])
def test_what_two_packages_need_is_the_same_in_both(name: str) -> None:
    copies = [*ROOT.glob(f"packages/*/src/*/{name}.py")]
    assert len(copies) == 2
    assert len({path.read_bytes() for path in copies}) == 1
