"""What training hands from stage to stage beside the adapter (docs/formats/training_state.md).

Optimiser moments by parameter name and the state of the random number generator as safetensors, the place in the
schedule as JSON. The learning rate and the data order are functions of the step and the seed, so the step says both.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_pipelines.errors import UserError
from flowra_pipelines.whole_files import replacing

__all__ = ["TrainingState", "read_training_state", "restore_moments", "write_training_state"]

NAME = "training_state"
RNG = "rng/torch_cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """A place in one schedule of T steps."""

    format_version: ClassVar[int] = 1

    step: int
    """Finished optimiser steps."""
    total_steps: int
    """T."""
    schedule: str
    """Shape of the learning rate."""
    seed: int
    """Of the data order."""
    examples_seen: int
    """Position in the data order."""
    peak_parameters: int
    """Largest number of adapter parameters so far."""
    tensors: dict[str, Tensor]
    """``<moment>/<parameter name>`` and the generator's state."""

    @property
    def rng(self) -> Tensor:
        """State of torch's CPU generator."""
        return self.tensors[RNG]


def capture_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copy the optimiser's state by parameter name, and the generator's state.

    Returns:
        Tensors on the CPU; empty factors have no state.
    """
    tensors = {RNG: torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel():
                tensors[f"{key}/{name}"] = value.detach().to("cpu", copy=True).contiguous()
    return tensors


def restore_moments(state: TrainingState, model: nn.Module, optimizer: Optimizer) -> None:
    """Give the optimiser the moments of the parameters it holds.

    Raises:
        UserError: if a tensor has no parameter to go to, or does not fit it.
    """
    parameters = dict(model.named_parameters())
    for key, value in state.tensors.items():
        moment, _, name = key.partition("/")
        if key == RNG:
            continue
        if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
            raise UserError(
                f"training state must fit the model, got {tuple(value.shape)} for {key!r}. Rerun the stage before."
            )
        device = "cpu" if moment == "step" else parameters[name].device  # where the optimisers of torch count
        optimizer.state[parameters[name]][moment] = value.to(device, copy=True)


def write_training_state(state: TrainingState, folder: Path) -> None:
    """Write ``training_state.safetensors`` and ``training_state.json``, both or none."""
    content = {key: value for key, value in asdict(state).items() if key != "tensors"}
    text = json.dumps({"format_version": state.format_version, **content}, indent=1) + "\n"
    with replacing(folder / f"{NAME}.safetensors", folder / f"{NAME}.json") as (tensors_file, json_file):
        save_file(dict(sorted(state.tensors.items())), tensors_file)
        json_file.write_text(text, encoding="utf-8")


def read_training_state(folder: Path) -> TrainingState:
    """Read what :func:`write_training_state` wrote.

    Returns:
        The state.

    Raises:
        UserError: if a file is missing, damaged or of another version.
    """
    try:
        content = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
        found = content.pop("format_version")
        state = TrainingState(**content, tensors=load_file(folder / f"{NAME}.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"training state must be whole, got {error}; in {folder}. Rerun the stage before.") from None
    if type(found) is not int or found != TrainingState.format_version:
        raise UserError(f"format_version must be {TrainingState.format_version}, got {found!r}; in {folder}")
    counts = (state.step, state.total_steps, state.seed, state.examples_seen, state.peak_parameters)
    if not all(type(count) is int and count >= 0 for count in counts) or state.step > state.total_steps:
        raise UserError(f"training state must hold counts ≥ 0 with step ≤ total_steps, got {counts}; in {folder}")
    return state
