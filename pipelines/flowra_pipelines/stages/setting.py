"""What every stage starts from: the task, the examples, the base model, and the layers that may carry rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flowra_adapters import LoRA, SVDForm, adapters, linear_size, match_modules
from flowra_allocation import mean_rank, parse_budget
from flowra_pipelines.config_sections import DataConfig, ModelConfig
from flowra_pipelines.data import Examples, TextData, load_text_data, tokenise
from flowra_pipelines.errors import UserError
from flowra_pipelines.layer_names import layers_called
from flowra_pipelines.placements import PLACEMENTS, placed
from flowra_pipelines.rank_limits import rank_limits
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.same_budget import parameters_of
from flowra_pipelines.tasks import TASKS, Task, load_model, load_tokenizer

__all__ = [
    "Layers",
    "Setting",
    "base_model",
    "check_inputs",
    "largest_rank",
    "load_setting",
    "lora_layers",
    "low_rank_layers",
    "probe_rank",
    "shape_of",
    "survey",
    "uniform_layers",
    "without_heads",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Task, tokenizer and examples of a run."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    data: TextData
    train: Examples
    test: Examples

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad examples to one batch."""
        padding = {"input_ids": int(self.tokenizer.pad_token_id or 0), "token_type_ids": 0}
        return self.task.collate(rows, padding)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """The layers that may carry rank, and what the budget means for them."""

    costs: dict[str, int]
    """Module name to parameters per unit of rank."""
    shapes: dict[str, tuple[int, int]]
    """Module name to (m, n)."""
    base_parameters: int
    """N_base: parameters of the base, heads not counted."""
    head_parameters: int
    """Parameters of the heads."""
    budget: int
    """P."""


def load_setting(config: RunConfig) -> Setting:
    """Read and tokenise the examples; the last run's are kept in memory, for stages in one process."""
    return _load_setting(config.model, config.data)


@lru_cache(maxsize=1)
def _load_setting(model: ModelConfig, data_config: DataConfig) -> Setting:
    task = TASKS[model.task]
    tokenizer = load_tokenizer(model)
    data = load_text_data(data_config, label=task.label)
    encode = partial(tokenise, tokenizer=tokenizer, max_length=data_config.max_length)
    return Setting(task=task, tokenizer=tokenizer, data=data, train=encode(data.train), test=encode(data.test))


@lru_cache(maxsize=1)
def check_inputs(config: RunConfig) -> None:
    """Look at data, model, patterns and budget before anything is written: a run that cannot start leaves nothing.

    A run that has begun is not looked at again; its stages find what is wrong.
    """
    if not config.folder.exists():
        from flowra_pipelines.merge_budget import check_merge

        setting = load_setting(config)
        layers = survey(config, base_model(config, setting), setting.task)
        check_merge(config.merge.budget, config.merge.extra, layers.shapes, base_parameters=layers.base_parameters)


def base_model(config: RunConfig, setting: Setting) -> PreTrainedModel:
    """Load the base with its new head, in evaluation mode; the same bits for the same seed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(config.model, data=setting.data, seed=config.seed)
    nn.Module.to(model, device).eval()
    return model


def survey(config: RunConfig, model: PreTrainedModel, task: Task) -> Layers:
    """List the layers that may carry rank and work out the budget.

    Args:
        config: targets, exclusions and budget.
        model: a base without adapters.
        task: whose heads are outside the budget and never adapted.

    Returns:
        Costs, shapes and counts.

    Raises:
        UserError: if a pattern matches nothing, limits of rank cannot be meant or leave a policy nothing to give back,
            or the budget pays for no unit of rank.
    """
    heads = task.heads(model)
    try:
        names = match_modules(model, config.adapter.targets, exclude=config.adapter.exclude)
        names = without_heads(model, task, names)
        head_parameters = sum(p.numel() for head in heads for p in model.get_submodule(head).parameters())
        base_parameters = sum(parameter.numel() for parameter in model.parameters()) - head_parameters
        budget = parse_budget(
            config.budget,
            base_parameters=base_parameters,
            unit_cost=lambda wanted: sum(sum(shape_of(model, name)) for name in layers_called(model, wanted)),
            parameters_of=parameters_of,
        )
        if "uniform" in config.evaluation.baselines:  # said now, not after the training
            uniform_layers(config, model)
    except ValueError as error:
        raise UserError(str(error)) from None
    shapes = {name: shape_of(model, name) for name in names}
    costs = {name: sum(shape) for name, shape in shapes.items()}
    if not costs or budget < min(costs.values()):
        raise UserError(
            f"budget must pay for at least one unit of rank, {min(costs.values(), default=0)} parameters here,"
            f" got {budget} ({config.budget} of {base_parameters}). Raise the budget."
        )
    largest = {name: min(shape) for name, shape in shapes.items()}
    limits = rank_limits(config.allocation, largest)  # likewise said now
    needed = sum(cost * limits.least(name) for name, cost in costs.items())
    if needed > budget:
        raise UserError(
            f"allocation.floors and frozen must fit the budget, {budget} parameters here, got {needed}."
            " Lower them or raise the budget."
        )
    probe = probe_rank(config, costs, budget) if config.allocation.plan == "flow" else budget
    most = sum(cost * limits.most(name, min(largest[name], probe)) for name, cost in costs.items())
    if config.refinement.plan_factor > 1 and most <= budget:
        raise UserError(
            f"refinement.policy {config.refinement.policy} must start above the budget, {budget} parameters here, got"
            f" layers, allocation.cap, caps and frozen that allow {most}. Loosen them, lower the budget, or set"
            " refinement.policy: breathe."
        )
    if config.allocation.plan in PLACEMENTS:
        placed(costs, config.allocation.plan)
    return Layers(
        costs=costs,
        shapes=shapes,
        base_parameters=base_parameters,
        head_parameters=head_parameters,
        budget=budget,
    )


def probe_rank(config: RunConfig, costs: Mapping[str, int], budget: int) -> int:
    """Return the probe's uniform rank, ⌈κ r̄⌉."""
    return max(1, math.ceil(config.probe_factor * mean_rank(costs, budget)))


def lora_layers(model: nn.Module) -> dict[str, LoRA]:
    """Return the model's LoRA adapters by module name."""
    return {name: one for name, one in adapters(model).items() if isinstance(one, LoRA)}


def low_rank_layers(model: nn.Module) -> dict[str, LoRA | SVDForm]:
    """Return the model's adapters whose rank can move, pairs or triplets, by module name."""
    return {name: one for name, one in adapters(model).items() if isinstance(one, LoRA | SVDForm)}


def largest_rank(layer: LoRA | SVDForm) -> int:
    """Return the largest rank that an update can have: as its weight allows, or as many slots as it has."""
    return layer.max_rank if isinstance(layer, SVDForm) else min(layer.lora_A.shape[1], layer.lora_B.shape[0])


def uniform_layers(config: RunConfig, model: PreTrainedModel) -> list[str]:
    """Name the layers of the uniform baseline, by default query and value.

    Returns:
        Module names.

    Raises:
        UserError: if a name means no layer.
    """
    try:
        return layers_called(model, config.evaluation.uniform_targets or ("q", "v"))
    except ValueError as error:
        raise UserError(f"evaluation.uniform_targets: {error}") from None


def without_heads(model: PreTrainedModel, task: Task, names: Sequence[str]) -> list[str]:
    """Leave out layers that are trained in full or give the model's output."""
    heads, output = task.heads(model), model.get_output_embeddings()
    return [name for name in names if not _inside(name, heads) and model.get_submodule(name) is not output]


def _inside(name: str, heads: Sequence[str]) -> bool:
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def shape_of(model: nn.Module, name: str) -> tuple[int, int]:
    """Return (m, n) of a linear layer."""
    return linear_size(model.get_submodule(name))
