"""Weights for ``flowra merge`` that make the merged model sure of its answers, on unlabelled inputs of every task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowra_compose import AdapterState, LearnedCoefficients, learn_coefficients
from flowra_pipelines.config_sections import DataConfig
from flowra_pipelines.data import load_text_data, tokenise
from flowra_pipelines.errors import UserError
from flowra_pipelines.progress import meter
from flowra_pipelines.task_statistics import AdaptedModel, MeasureSettings, bare_model, statistics_batches
from flowra_pipelines.tasks import TASKS, Batch

__all__ = ["LearnWeights", "learned_weights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnWeights:
    """How weights are learned."""

    per: Literal["module", "task"] = "module"
    """One for each adapter and module, or one for each adapter."""
    steps: int = 500
    """Of Adam, each with one batch of every task."""


def learned_weights(
    folders: Sequence[Path],
    states: Sequence[AdapterState],
    data: Sequence[DataConfig],
    *,
    base: str | None,
    learn: LearnWeights,
    settings: MeasureSettings,
) -> LearnedCoefficients:
    """Learn the weights of a sum of adapters.

    Args:
        folders: of the adapters, on one base.
        states: what is in them.
        data: of each its inputs; labels are not looked at.
        base: model folder, ``package://NAME/path`` or Hub name; by default what the adapters say.
        learn: for what, and how long.
        settings: which inputs, and how many at a time.

    Returns:
        The weights, and the entropy before each step.

    Raises:
        UserError: if a task has no classes, tasks are of different kinds or bases, or data cannot be read.
        ValueError: as :func:`flowra_compose.learn_coefficients`.
    """
    first = bare_model(folders[0], base)
    batches = [_batches(first, data[0], settings)]
    for folder, config in zip(folders[1:], data[1:], strict=True):
        other = bare_model(folder, base)
        if (other.task, other.base) != (first.task, first.base):
            raise UserError(
                f"adapters must be of one base and one kind of task where weights are learned, got {folders[0]} and"
                f" {folder}. Give numbers: --weights 1,0.5."
            )
        batches.append(_batches(other, config, settings))
        del other  # one model at a time
    if first.task is TASKS["regression"]:
        raise UserError(
            "adapters must be of classifiers or language models where weights are learned, got a regression: it has no"
            " classes to be sure of. Give numbers: --weights 1,0.5."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = nn.Module.to(first.model, device).eval()

    def logits(call: Callable[..., Any], batch: Batch, task: int) -> Tensor:
        given = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        found: Tensor = call(**given).logits
        return found if found.ndim == 2 else found[given["attention_mask"].bool()]  # padding predicts nothing

    with meter("merge: weights", learn.steps) as progress:
        return learn_coefficients(
            model,
            [state.updates for state in states],
            batches,
            logits,
            per=learn.per,
            heads=[_head(state) for state in states],
            fan_in_fan_out=any(state.fan_in_fan_out for state in states),
            steps=learn.steps,
            seed=settings.seed,
            progress=lambda _, entropy: progress.advance(note=f"entropy {entropy:.3f}"),
        )


def _batches(adapted: AdaptedModel, data: DataConfig, settings: MeasureSettings) -> list[Batch]:
    rows = load_text_data(data, label=None).train
    return statistics_batches(adapted, tokenise(rows, adapted.tokenizer, max_length=settings.max_length), settings)


def _head(state: AdapterState) -> Mapping[str, Tensor]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: tensor.to(device) for name, tensor in state.modules_to_save.items()}
