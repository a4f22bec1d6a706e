"""``training.learning_rate: auto``: the peak rate that the curvature suggests, measured once, before the probe."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from flowra_analysis import LearningRate, propose_learning_rate, read_profile
from flowra_pipelines.errors import UserError
from flowra_pipelines.progress import console
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.setting import Setting
from flowra_pipelines.training import build_optimizer, data_order

__all__ = ["propose", "with_learning_rate", "with_rate"]

WARM_UP, MEASURED = 10, 8
"""Batches: for the steps that are made and undone, and for the measurement."""


def propose(config: RunConfig, setting: Setting, model: nn.Module, heads: Sequence[str]) -> LearningRate:
    """Measure the curvature over all that will be trained, and propose a peak rate.

    Args:
        config: of the run.
        setting: of the run.
        model: with its adapters and a new head, as training begins; left as it is.
        heads: modules trained in full. A head with a rate of its own does not count.

    Returns:
        The proposal.

    Raises:
        UserError: if none can be made.
    """
    unit = build_optimizer(model, with_rate(config, 1.0).training, heads=heads, label_unit=setting.data.label_unit)
    factors = {id(each): float(group["lr"]) for group in unit.param_groups for each in group["params"]}
    fixed = tuple(f"{head}." for head in heads) if config.training.head_learning_rate is not None else ()
    parameters = {
        name: each for name, each in model.named_parameters() if id(each) in factors and not name.startswith(fixed)
    }
    console.print("  learning rate: measuring the curvature")
    try:
        return propose_learning_rate(
            model,
            _batches(config, setting, next(model.parameters()).device),
            partial(_losses, setting),
            parameters,
            factors={name: factors[id(each)] for name, each in parameters.items()},
            warm_up_steps=WARM_UP,
        )
    except ValueError as error:
        raise UserError(f"{error} Or set training.learning_rate to a number.") from None


def with_learning_rate(config: RunConfig, run: Path) -> RunConfig:
    """Return the configuration with the rate that calibrate proposed in place of ``auto``.

    Args:
        config: of the run.
        run: folder of the run, in which calibrate has finished.

    Returns:
        The configuration itself where the rate is a number.

    Raises:
        UserError: if calibrate has not proposed one.
    """
    if config.training.learning_rate != "auto":
        return config
    rate = read_profile(run / "calibrate").provenance.get("learning_rate")
    if not isinstance(rate, float):
        raise UserError(f"learning_rate must be in the profile's provenance, got {rate}. Run `flowra calibrate`.")
    return with_rate(config, rate)


def with_rate(config: RunConfig, rate: float) -> RunConfig:
    """Return the configuration with this peak rate."""
    training = config.training.model_copy(update={"learning_rate": rate})
    return config.model_copy(update={"training": training})


def _losses(setting: Setting, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Weigh examples as training does: by their targets."""
    losses, targets, _ = setting.task.losses(model, batch)
    return losses / targets.to(losses.dtype).mean()


def _batches(config: RunConfig, setting: Setting, device: torch.device) -> list[dict[str, Tensor]]:
    """Draw batches of the size that a step is made on, in an order of their own."""
    size = config.training.batch_size * config.training.gradient_accumulation
    needed = (WARM_UP + MEASURED) * size
    rows = [setting.train[index] for index in data_order(len(setting.train), needed=needed, seed=config.seed + 3)]
    batches = (setting.collate(rows[start : start + size]) for start in range(0, needed, size))
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]
