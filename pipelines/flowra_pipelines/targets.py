"""``flowra targets``: what in a model can be adapted, and what a unit of rank costs there.

Only the model's configuration is read; its weights are not, and nothing is computed.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from flowra_adapters import adaptable_modules
from flowra_pipelines.errors import UserError
from flowra_pipelines.progress import console
from flowra_pipelines.sources import resolve
from flowra_pipelines.stages.setting import shape_of, without_heads
from flowra_pipelines.tasks import TASKS

__all__ = ["Target", "Targets", "show_targets", "targets_of"]

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Layers of one name and size, block after block."""

    title: str
    """Their names in one, with the range of the block numbers."""
    names: tuple[str, ...]
    """Their exact names."""
    type: str
    """Class of the layer."""
    out_features: int
    """m."""
    in_features: int
    """n."""
    cost_per_rank: int
    """Parameters that one unit of rank costs on one of them: m + n for LoRA."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What can be adapted, and what cannot."""

    targets: tuple[Target, ...]
    base_parameters: int
    """N_base: parameters of the base, heads not counted."""
    heads: tuple[str, ...]
    """Modules trained in full; outside the budget."""
    others: dict[str, int]
    """Class of what cannot carry an adapter (yet) to its parameters."""

    @property
    def cost_per_rank(self) -> int:
        """Parameters of one unit of rank on every layer."""
        return sum(len(target.names) * target.cost_per_rank for target in self.targets)


def targets_of(path: str, task_name: str | None = None) -> Targets:
    """List the layers of a model that can carry rank.

    Args:
        path: a folder, ``package://NAME/path`` or a Hub name.
        task_name: a key of ``TASKS``; by default what the model says it is for.

    Returns:
        Layers of one name and size together, in the model's own order.

    Raises:
        UserError: if there is no model configuration, or the task is unknown or not one of this model.
    """
    if task_name is not None and task_name not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {task_name!r}")
    folder = resolve(path)
    try:
        config = AutoConfig.from_pretrained(str(folder or path), local_files_only=folder is not None)
        task = TASKS[task_name or _task_of(config)]
        with torch.device("meta"):
            model = task.model_class.from_config(config)
    except (OSError, ValueError) as error:
        problem = str(error).strip().split("\n")[0]
        raise UserError(f"model must bring a configuration that transformers knows, got {problem}; {path}") from None
    assert isinstance(model, PreTrainedModel)
    heads = tuple(task.heads(model))
    names = without_heads(model, task, list(adaptable_modules(model)))
    alike: dict[tuple[str, str, int, int], list[str]] = {}
    for name in names:
        kind = type(model.get_submodule(name)).__name__
        alike.setdefault((NUMBER.sub("*", name), kind, *shape_of(model, name)), []).append(name)
    found = tuple(
        Target(
            title=_title(together), names=tuple(together), type=kind, out_features=m, in_features=n, cost_per_rank=m + n
        )
        for (_, kind, m, n), together in alike.items()
    )
    in_heads = sum(parameter.numel() for head in heads for parameter in model.get_submodule(head).parameters())
    return Targets(
        targets=found,
        base_parameters=sum(parameter.numel() for parameter in model.parameters()) - in_heads,
        heads=heads,
        others=_others(model, {*names}, heads),
    )


def show_targets(path: str, task_name: str | None, *, as_json: bool) -> None:
    """Print the layers as a table, or as JSON."""
    found = targets_of(path, task_name)
    if as_json:
        console.print_json(data={**asdict(found), "cost_per_rank": found.cost_per_rank})
        return
    table = Table(title=f"{path}: {found.base_parameters:,} parameters", title_justify="left")
    table.add_column("layers that can carry rank")
    for heading in ("how many", "type", "out × in", "parameters per unit of rank", "of all"):
        table.add_column(heading, justify="right")
    for target in found.targets:
        size = f"{target.out_features} × {target.in_features}"
        each, count = target.cost_per_rank, len(target.names)
        table.add_row(target.title, str(count), target.type, size, f"{each:,}", f"{count * each:,}")
    console.print(table)
    if found.targets:
        whole = found.cost_per_rank
        share = 100 * whole / found.base_parameters
        cheapest = min(target.cost_per_rank for target in found.targets)
        console.print(
            f"One unit of rank everywhere: {whole:,} parameters, {share:.2g} % of the base."
            f" The smallest budget that buys anything: {cheapest:,}."
        )
    if found.heads:
        console.print(f"Trained in full, outside the budget: {', '.join(found.heads)}")
    if found.others:
        listed = ", ".join(f"{kind} ({count:,} parameters)" for kind, count in found.others.items())
        console.print(f"Cannot carry an adapter yet: {listed}")


def _task_of(config: PretrainedConfig) -> str:
    """Tell from the class that a checkpoint was saved as what it is for."""
    writes = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())
    return "causal_lm" if writes else "sequence_classification"


def _title(names: list[str]) -> str:
    """Write names that differ in block numbers only as one: ``layer.0–5.query``."""
    if len(names) == 1:
        return names[0]
    numbers = [[int(number) for number in NUMBER.findall(name)] for name in names]
    ranges = iter([
        str(first[0]) if min(first) == max(first) else f"{min(first)}–{max(first)}"
        for first in zip(*numbers, strict=True)
    ])
    return NUMBER.sub(lambda match: next(ranges), names[0])


def _others(model: nn.Module, adaptable: set[str], heads: tuple[str, ...]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for name, module in model.named_modules():
        if name in adaptable or any(f"{name}.".startswith(f"{head}.") for head in heads):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:  # a tied weight counts once
                seen.add(id(parameter))
                counts[type(module).__name__] += parameter.numel()
    return dict(counts)
