"""merge: put the adapter into the base, check the logits, and write what others read.

Where other adapters are merged in, what that costs each of them is written, too.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from flowra_adapters import detach, load_adapter, merge, unmerge
from flowra_compose import MergeOptions, ModuleStatistics, read_adapter
from flowra_compose.interference_files import write_interference
from flowra_pipelines.composition import check_provenance, compose, task_names, truncation_of
from flowra_pipelines.errors import UserError
from flowra_pipelines.export import in_peft_form
from flowra_pipelines.merge_rules import OPTIONS
from flowra_pipelines.report_interference import write_interference_page
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.stages.setting import Setting, base_model, load_setting, lora_layers
from flowra_pipelines.statistics_files import read_task_statistics
from flowra_pipelines.task_statistics import (
    MeasureSettings,
    adapted_run,
    measure_task_statistics,
    statistics_batches,
)

__all__ = ["merge_stage"]

ROUNDING = 1e-6


def merge_stage(config: RunConfig, folder: Path) -> StageResult:
    """Write ``adapter/`` (unit scale, for PEFT and vLLM), ``model/``, ``check.json``, and what others cost."""
    setting = load_setting(config)
    others = [Path(each.path) for each in config.merge.extra]
    own = folder.parent / "refine" / "adapter"
    weights = [1.0, *(each.weight for each in config.merge.extra)]
    model = base_model(config, setting)
    own_head = 0 if setting.task.heads(model) else None
    chosen = config.merge
    try:
        with in_peft_form(others, config.model.path) as readable:
            sources = [own, *readable]
            inputs = [read_adapter(source, base=model.get_parameter) for source in sources]
            merged = compose(
                sources,
                folder / "adapter",
                names=task_names([config.folder, *others]),
                weights=weights,
                rule=chosen.rule,
                options=MergeOptions(**{key: getattr(chosen, key) for key in OPTIONS}),
                truncation=truncation_of(
                    rank=chosen.rank,
                    energy=chosen.energy,
                    budget=chosen.budget,
                    inputs=inputs,
                    base_parameters=sum(parameter.numel() for parameter in _of_the_base(model, setting)),
                ),
                statistics=_statistics(config, own, {name for one in inputs for name in one.updates}),
                heads_from=own_head,
                base=model.get_parameter,
            )
        load_adapter(model, folder / "adapter")
    except (ValueError, ArithmeticError) as error:
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
    if others:
        write_interference(merged.report, folder)
        write_interference_page(merged.report, folder / "interference.html", title=f"{config.name}: merge")
    return StageResult(
        metrics=[
            *((f"merge/{key}", value, 0) for key, value in check.items()),
            *(merged.metrics if others else ()),
        ],
        parameters={"adapters": 1 + len(others), "largest_rank": max(ranks.values())},
        summary={
            "check": f"merged and unmerged logits differ by {check['relative_difference']:.1e} of the largest",
            "adapter": f"{len(ranks)} modules, largest rank {max(ranks.values())}",
            **merged.summary,
        },
    )


def _statistics(config: RunConfig, own: Path, names: Collection[str]) -> list[Mapping[str, ModuleStatistics]]:
    """Measure the run's own task on its training texts, and read what others bring; none for a rule without."""
    needs = config.merge.needs
    if not needs:
        return []
    others = [Path(each.path) for each in config.merge.extra]
    known = [read_task_statistics(each.statistics) for each in config.merge.extra if each.statistics is not None]
    check_provenance(known, others)
    adapted, examples = adapted_run(config, own)
    settings = MeasureSettings(examples=config.merge.examples, seed=config.seed, fisher="fisher" in needs)
    batches = statistics_batches(adapted, examples, settings)
    measured = measure_task_statistics(
        adapted.model, adapted.task, batches, sorted(names), settings=settings, description="merge: statistics"
    )
    return [measured, *known]


def _of_the_base(model: PreTrainedModel, setting: Setting) -> Iterator[nn.Parameter]:
    """Go through the parameters that are not heads'."""
    heads = tuple(f"{head}." for head in setting.task.heads(model))
    return (parameter for name, parameter in model.named_parameters() if not name.startswith(heads))


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
