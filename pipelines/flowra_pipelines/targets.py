"""``flowra targets``: what in a model can be adapted, how, and what a unit of rank costs there.

Only the model's configuration is read; its weights are not, and nothing is computed.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import transformers
from rich.table import Table
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from flowra_adapters import METHODS, LinearOperator, ParameterOperator, Site, adaptable_sites, instead_of
from flowra_pipelines.errors import UserError
from flowra_pipelines.progress import console
from flowra_pipelines.sources import resolve
from flowra_pipelines.tasks import TASKS

__all__ = ["Target", "Targets", "show_targets", "targets_of"]

NUMBER = re.compile(r"(?<=[.:])\d+(?=[.:]|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Sites of one name, kind and size, block after block."""

    title: str
    """Their names in one, with the range of the block numbers."""
    names: tuple[str, ...]
    """Their exact names, as ``attach`` takes them; of a norm also those of its shift."""
    type: str
    """Class of the module."""
    shape: tuple[int, ...]
    """Of the weight: output, input, kernel."""
    out_features: int
    """m."""
    in_features: int
    """n, times the kernel's size."""
    method: str
    """The adapter that suits it: what the method ``polymorphic`` picks."""
    applied: str
    """``added`` to the layer's output, or ``materialised``: W + ΔW stands in the weight's place in each pass."""
    part: bool
    """Whether it is a part of another target: adapt the whole or its parts."""
    items: int
    """How many layers they are; a norm's gain and shift are one item."""
    cost_per_rank: int
    """Parameters that one unit of rank costs on one of them: m + n for LoRA; of a Tucker form the first unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What can be adapted, and what cannot."""

    targets: tuple[Target, ...]
    """Linear layers: what a run gives rank to."""
    more: tuple[Target, ...]
    """What else ``flowra_adapters`` can adapt."""
    base_parameters: int
    """N_base: parameters of the base, heads not counted."""
    heads: tuple[str, ...]
    """Modules trained in full; outside the budget."""
    others: dict[str, int]
    """Class of what is not offered to its parameters: what cannot carry an adapter, and a model's output layer."""

    @property
    def cost_per_rank(self) -> int:
        """Parameters of one unit of rank on every linear layer."""
        return sum(target.items * target.cost_per_rank for target in self.targets)


def targets_of(path: str, task_name: str | None = None) -> Targets:
    """List what in a model can carry an adapter.

    Args:
        path: a folder, ``package://NAME/path`` or a Hub name.
        task_name: a key of ``TASKS``; by default what the model says it is for, which may be none of them.

    Returns:
        Sites of one name, kind and size together, in the model's own order.

    Raises:
        UserError: if there is no model configuration, or the task is unknown or not one of this model.
    """
    if task_name is not None and task_name not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {task_name!r}")
    folder = resolve(path)
    try:
        config = AutoConfig.from_pretrained(str(folder or path), local_files_only=folder is not None)
        model, heads = _model_of(config, task_name)
    except (OSError, ValueError) as error:
        problem = str(error).strip().split("\n")[0]
        raise UserError(f"model must bring a configuration that transformers knows, got {problem}; {path}") from None
    offered = _offered(model, heads)
    found = tuple(_together(offered))
    in_heads = sum(parameter.numel() for head in heads for parameter in model.get_submodule(head).parameters())
    return Targets(
        targets=tuple(target for target in found if _is_layer(offered[target.names[0]])),
        more=tuple(target for target in found if not _is_layer(offered[target.names[0]])),
        base_parameters=sum(parameter.numel() for parameter in model.parameters()) - in_heads,
        heads=heads,
        others=_others(model, offered.values(), heads),
    )


def show_targets(path: str, task_name: str | None, *, as_json: bool) -> None:
    """Print the sites as a table, or as JSON."""
    found = targets_of(path, task_name)
    if as_json:
        console.print_json(data={**asdict(found), "cost_per_rank": found.cost_per_rank})
        return
    if found.targets:
        title = f"{path}: {found.base_parameters:,} parameters"
        console.print(_table(title, "layers that can carry rank", found.targets))
        whole = found.cost_per_rank
        share = 100 * whole / found.base_parameters
        cheapest = min(target.cost_per_rank for target in found.targets)
        console.print(
            f"One unit of rank everywhere: {whole:,} parameters, {share:.2g} % of the base."
            f" The smallest budget that buys anything: {cheapest:,}."
        )
    if found.more:
        console.print(_table("With flowra_adapters.attach, also", "layers, parts and parameters", found.more))
    if any(target.applied == "materialised" for target in found.more):
        console.print("* Materialised: W + ΔW stands in the weight's place in each pass.")
    if any(target.part for target in found.more):
        console.print("Indented: parts of a layer, each with a rank of its own. Adapt a layer or its parts.")
    if any(target.method == "flora" for target in found.more):
        console.print("flora: a Tucker form; its first unit of rank. Later units cost more.")
    if found.heads:
        console.print(f"Trained in full, outside the budget: {', '.join(found.heads)}")
    if found.others:
        listed = ", ".join(f"{kind} ({count:,} parameters)" for kind, count in found.others.items())
        console.print(f"Not offered: {listed}")


def _table(title: str, first: str, targets: Iterable[Target]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for heading in ("how many", "type", "out × in", "adapter", "parameters per unit of rank", "of all"):
        table.add_column(heading, justify="right")
    for target in targets:
        size = " × ".join(str(length) for length in target.shape)
        adapter = target.method if target.applied == "added" else f"{target.method} *"
        each = target.cost_per_rank
        table.add_row(
            f"  {target.title}" if target.part else target.title,
            str(target.items),
            target.type,
            size,
            adapter,
            f"{each:,}",
            f"{target.items * each:,}",
        )
    return table


def _model_of(config: PretrainedConfig, task_name: str | None) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Build the model on no device, as its task needs it, and name its heads; a model of no task of ours has none."""
    known = task_name or _task_of(config)
    with torch.device("meta"):
        if known is not None:
            model = TASKS[known].model_class.from_config(config)
        else:
            assert config.architectures
            kind = getattr(transformers, config.architectures[0], None)
            if kind is None:
                raise ValueError(f"the architecture {config.architectures[0]!r}")
            model = kind(config)
    assert isinstance(model, PreTrainedModel)
    return model, tuple(TASKS[known].heads(model)) if known else ()


def _task_of(config: PretrainedConfig) -> str | None:
    """Tell from the class that a checkpoint was saved as what it is for."""
    names = config.architectures or ()
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "causal_lm"
    classes = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return "sequence_classification" if type(config) in classes or not names else None


def _offered(model: PreTrainedModel, heads: tuple[str, ...]) -> dict[str, Site]:
    """List sites outside the heads and the output layer; of a stack of matrices the matrices, not the stack."""
    row, output = METHODS["polymorphic"], model.get_output_embeddings()
    known = adaptable_sites(model, lambda site: row.adapts(site) or METHODS["bitfit"].adapts(site))
    stacks = {name.rpartition(":")[0] for name, site in known.items() if site.part and site.part.name.isdigit()}
    return {
        name: site
        for name, site in known.items()
        if name not in stacks
        and site.owner is not output
        and not any(f"{name}.".startswith((f"{head}.", f"{head}:")) for head in heads)
    }


def _is_layer(site: Site) -> bool:
    return isinstance(site.operator, LinearOperator) and site.part is None


def _method_of(site: Site) -> str:
    row = METHODS["polymorphic"]
    if not row.adapts(site):
        return "bitfit"
    return instead_of(row, site).name.replace("polymorphic", "lora")


def _together(offered: dict[str, Site]) -> Iterable[Target]:
    """Put sites alike into one target, a norm's gain and shift, and all biases that are not a norm's."""
    alike: dict[tuple[object, ...], dict[str, Site]] = {}
    for name, site in offered.items():
        method = _method_of(site)
        kind = type(site.owner).__name__
        folded = NUMBER.sub("*", name)
        if method == "bitfit":
            key: tuple[object, ...] = (method,)
        elif method == "norm":
            size = sum(parameter.numel() for parameter in site.owner.parameters(recurse=False))
            key = (method, folded.removesuffix(f".{site.parameter}"), kind, size)
        else:
            key = (method, folded, kind, site.operator.shape)
        alike.setdefault(key, {})[name] = site
    for key, together in alike.items():
        yield _target(str(key[0]), together)


def _target(method: str, together: dict[str, Site]) -> Target:
    names, first = list(together), next(iter(together.values()))
    owners = {id(site.owner): name for name, site in reversed(together.items())}
    biases = method == "bitfit"
    return Target(
        title="*.bias" if biases else _title([*reversed(owners.values())] if method == "norm" else names),
        names=tuple(names),
        type=" ".join(dict.fromkeys(type(site.owner).__name__ for site in together.values())),
        shape=() if biases else first.operator.shape,
        out_features=first.operator.out_size,
        in_features=first.operator.in_size,
        method=method,
        applied="materialised" if isinstance(first.operator, ParameterOperator) else "added",
        part=first.part is not None and not first.part.name.isdigit(),
        items=len(owners) if method == "norm" else 1 if biases else len(names),
        cost_per_rank=_cost(method, together),
    )


def _cost(method: str, together: dict[str, Site]) -> int:
    """Count the parameters of one unit of rank on one item."""
    if method == "bitfit":
        return sum(math.prod(site.operator.shape) for site in together.values())
    if method == "norm":
        one = next(iter(together.values())).owner
        return sum(math.prod(site.operator.shape) for site in together.values() if site.owner is one)
    adapter = METHODS[method].adapter(
        next(iter(together.values())).operator,
        rank=1,
        scaling=1.0,
        dropout=0.0,
        dtype=torch.float32,
        generator=torch.Generator(),
    )
    return adapter.cost(1)


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


def _others(model: nn.Module, offered: Iterable[Site], heads: tuple[str, ...]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    seen = {id(site.owner._parameters[site.parameter]) for site in offered}
    for name, module in model.named_modules():
        if any(f"{name}.".startswith(f"{head}.") for head in heads):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:  # a tied weight counts once
                seen.add(id(parameter))
                counts[type(module).__name__] += parameter.numel()
    return dict(counts)
