"""merge: put the adapter into the base, check the logits, and write what others read."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from flowra_adapters import detach, load_adapter, merge, unmerge
from flowra_compose import AdapterState, TruncatedUpdate, Truncation, merge_folders
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.stages.setting import Setting, base_model, load_setting, lora_layers

__all__ = ["merge_stage"]

ROUNDING = 1e-6


def merge_stage(config: RunConfig, folder: Path) -> StageResult:
    """Write ``adapter/`` (unit scale, for PEFT and vLLM), ``model/`` and ``check.json``."""
    setting = load_setting(config)
    sources = [str(folder.parent / "refine" / "adapter"), *(each.path for each in config.merge.extra)]
    weights = [1.0, *(each.weight for each in config.merge.extra)]
    model = base_model(config, setting)
    own_head = 0 if setting.task.heads(model) else None
    try:
        merged = merge_folders(
            sources,
            weights,
            folder / "adapter",
            rule=config.merge.rule,
            truncation=_truncation(config),
            heads_from=own_head,
        )
        load_adapter(model, folder / "adapter")
    except ValueError as error:
        raise UserError(str(error)) from None
    check = _check(config, setting, model)
    (folder / "check.json").write_text(json.dumps(check, indent=1) + "\n", encoding="utf-8")
    ranks = {name: layer.rank for name, layer in lora_layers(model).items()}
    merge(model)
    detach(model)
    if config.merge.save_model:
        transformers_logging.disable_progress_bar()
        model.save_pretrained(folder / "model")
        setting.tokenizer.save_pretrained(folder / "model")
    return StageResult(
        metrics=[(f"merge/{key}", value, 0) for key, value in check.items()],
        parameters={"adapters": len(sources), "largest_rank": max(ranks.values())},
        summary={
            "check": f"merged and unmerged logits differ by {check['relative_difference']:.1e} of the largest",
            "adapter": f"{len(ranks)} modules, largest rank {max(ranks.values())}",
            **_loss(merged),
        },
    )


def _truncation(config: RunConfig) -> Truncation | None:
    rank, energy = config.merge.rank, config.merge.energy
    return None if rank is None and energy is None else Truncation(rank=rank, energy=energy)


def _loss(merged: AdapterState) -> dict[str, str]:
    """Say what a truncation lost, and where most."""
    lost = {name: each.relative_loss for name, each in merged.updates.items() if isinstance(each, TruncatedUpdate)}
    if not lost:
        return {}
    worst = max(lost, key=lost.__getitem__)
    return {"truncated": f"at most {lost[worst]:.2%} of a module's squared norm was lost, at {worst}"}


@torch.no_grad()
def _check(config: RunConfig, setting: Setting, model: PreTrainedModel) -> dict[str, float]:
    """Compare logits of base, unmerged and merged model on test examples.

    Returns:
        Differences relative to the largest unmerged logit.

    Raises:
        UserError: if merging changes the answers, or the adapter changes nothing.
    """
    rows = [setting.test[index] for index in range(min(32, len(setting.test)))]
    batch = {key: value.to(model.device) for key, value in setting.collate(rows).items()}
    unmerged = _logits(model, batch)
    merge(model)
    merged = _logits(model, batch)
    unmerge(model)
    for layer in lora_layers(model).values():
        layer.enabled = False
    base = _logits(model, batch)
    for layer in lora_layers(model).values():
        layer.enabled = True
    scale = float(unmerged.abs().max())
    difference = float((merged - unmerged).abs().max()) / scale
    effect = float((base - unmerged).abs().max()) / scale
    if not difference <= config.merge.tolerance:
        raise UserError(
            f"merged logits must equal unmerged ones within {config.merge.tolerance:g}, got {difference:.1e} relative."
            " Raise merge.tolerance if the base's dtype is coarse."
        )
    if not effect > ROUNDING:
        raise UserError("adapter must change the model's output, got no change beyond rounding. Train longer.")
    return {"relative_difference": difference, "effect_of_the_adapter": effect}


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    assert isinstance(logits, Tensor)
    return logits.float()
