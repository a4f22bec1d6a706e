"""A merge that is under way on disk: one small file for each update that is done, beside the target.

In ``<target>.partial`` lie the fingerprint of the merge, and ``00000.safetensors`` for the first update in order. A
file has its name only when it is whole. So a merge that was killed goes on where it was, and what another merge has
left is known by its fingerprint and removed.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from torch import Tensor

from flowra_compose.lazy_updates import LazyUpdates
from flowra_compose.low_rank import Layout, LowRankUpdate
from flowra_compose.peft_files import CONFIG_NAME
from flowra_compose.truncation import TruncatedUpdate
from flowra_compose.whole_tensors import TensorFile, write_tensors

__all__ = ["PartialMerge"]

NOTE = "fingerprint.txt"
ADAPTER = "adapter"
OURS = re.compile(r"(\d{5,}\.safetensors|fingerprint\.txt)(\.partial)?|adapter")


class PartialMerge(LazyUpdates):
    """The updates that are done, by name, each read when it is asked for."""

    def __init__(self, target: Path, fingerprint: str, names: Sequence[str]) -> None:
        """Take up what the same merge has left, or start.

        Args:
            target: the folder to write in the end.
            fingerprint: of all that the result depends on.
            names: the updates to come, in order.

        Raises:
            ValueError: if there is a folder ``<target>.partial`` that is not of a merge.
        """
        self._target = target.resolve()
        self._folder = self._target.with_name(f"{self._target.name}.partial")
        self._paths = {name: self._folder / f"{index:05}.safetensors" for index, name in enumerate(names)}
        left = [each.name for each in self._folder.iterdir()] if self._folder.is_dir() else []
        strange = sorted(name for name in left if not OURS.fullmatch(name))
        if strange:
            raise ValueError(f"{self._folder} must be free, got {strange[:3]} in it. Move it, or choose another out.")
        note = self._folder / NOTE
        if NOTE not in left or note.read_text(encoding="utf-8") != fingerprint:
            self.discard()
            self._folder.mkdir(parents=True)
            new = note.with_name(f"{NOTE}.partial")
            new.write_text(fingerprint, encoding="utf-8")
            os.replace(new, note)
        self._files: dict[str, TensorFile] = {}
        self.outlines: dict[str, LowRankUpdate] = {}
        for name, path in self._paths.items():
            with suppress(ValueError):  # missing, or damaged as where the power failed: it is made again
                self._open(name, path)

    def __getitem__(self, name: str) -> LowRankUpdate:
        """Read one update."""
        return _update(self._files[name], self._files[name].metadata)

    @property
    def relative_losses(self) -> dict[str, float]:
        """What each truncation has lost, for the updates that were truncated."""
        losses = {name: json.loads(one.metadata["relative_loss"]) for name, one in self._files.items()}
        return {name: loss for name, loss in losses.items() if loss is not None}

    def add(self, name: str, update: LowRankUpdate) -> None:
        """Write one update that is done."""
        loss = update.relative_loss if isinstance(update, TruncatedUpdate) else None
        numbers = {"scaling": update.scaling, "kernel": list(update.kernel), "relative_loss": loss}
        notes = {"layout": update.layout, **{key: json.dumps(value) for key, value in numbers.items()}}
        tensors = {"lora_A": update.lora_A, "lora_B": update.lora_B}
        path = self._paths[name]
        new = path.with_name(f"{path.name}.partial")
        write_tensors(new, tensors, tensors.__getitem__, notes)
        os.replace(new, path)
        self._open(name, path)

    @property
    def adapter(self) -> Path:
        """Where to write the whole adapter before :meth:`finish`."""
        return self._folder / ADAPTER

    def clear_adapter(self) -> None:
        """Remove what a killed process has left where the whole adapter is written."""
        shutil.rmtree(self.adapter, ignore_errors=True)

    def finish(self) -> None:
        """Move the whole adapter, and what lies beside it, to the target, and remove the rest.

        The configuration comes last: without it a folder is no adapter.
        """
        self._target.mkdir(parents=True, exist_ok=True)
        (self._target / CONFIG_NAME).unlink(missing_ok=True)
        for name in sorted((each.name for each in self.adapter.iterdir()), key=lambda each: each == CONFIG_NAME):
            os.replace(self.adapter / name, self._target / name)
        self.discard()

    def discard(self) -> None:
        """Remove all that is under way."""
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _open(self, name: str, path: Path) -> None:
        file = TensorFile(path)
        self.outlines[name] = _update(file.outlines, file.metadata)
        self._files[name] = file


def _update(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> LowRankUpdate:
    return LowRankUpdate(
        tensors["lora_A"],
        tensors["lora_B"],
        json.loads(notes["scaling"]),
        layout=cast(Layout, notes["layout"]),
        kernel=tuple(json.loads(notes["kernel"])),
    )
