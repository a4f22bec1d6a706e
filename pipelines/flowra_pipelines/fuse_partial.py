"""A training of gates that is not finished: its state, the losses before it, and what it was made from."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowra_pipelines.errors import UserError
from flowra_pipelines.progress import console
from flowra_pipelines.training import LossCurve
from flowra_pipelines.training_state import TrainingState, read_training_state, write_training_state

__all__ = ["PartialTraining"]


class PartialTraining:
    """The folder of a training that is not finished.

    Args:
        folder: made if it is not there; one that was made from other inputs is emptied, and that is said.
        inputs: all that decides the result.

    Raises:
        UserError: if something else lies there.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        self._folder = folder
        said = json.dumps(inputs, sort_keys=True, allow_nan=False)
        known = folder / "inputs.json"
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not known.exists())):
            raise UserError(
                f"{folder} must be free for a training that is under way, got something else there. Move it."
            )
        if folder.exists():
            try:
                before = json.loads(known.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                before = {}
            if not isinstance(before, dict) or before != json.loads(said):
                changed = [
                    key for key in inputs if not isinstance(before, dict) or before.get(key) != json.loads(said)[key]
                ]
                console.print(f"  starting over: {folder} is of other {', '.join(changed)}", markup=False)
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        known.write_text(said, encoding="utf-8")

    def remembered(self, name: str, make: Callable[[], dict[str, float | None]]) -> dict[str, float | None]:
        """Return what was made before, or make it and keep it."""
        file = self._folder / f"{name}.json"
        if not file.is_file():
            made = make()
            whole = file.with_suffix(".new")
            whole.write_text(json.dumps(made), encoding="utf-8")
            os.replace(whole, file)
        found: dict[str, float | None] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def save(self, state: TrainingState, curve: LossCurve) -> None:
        """Write a state; the one before goes when this one is whole."""
        made, place = self._folder / "state.new", self._folder / f"state-{state.step:08d}"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        write_training_state(state, made)
        (made / "curve.json").write_text(json.dumps(curve), encoding="utf-8")
        os.replace(made, place)
        for older in self._states()[:-1]:
            shutil.rmtree(older)

    def state(self) -> tuple[TrainingState, LossCurve] | None:
        """Return the last state, if there is one."""
        found = self._states()
        if not found:
            return None
        curve = json.loads((found[-1] / "curve.json").read_text(encoding="utf-8"))
        return read_training_state(found[-1]), [(step, loss, rate) for step, loss, rate in curve]

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self._folder)

    def _states(self) -> list[Path]:
        return sorted(self._folder.glob("state-*"))
