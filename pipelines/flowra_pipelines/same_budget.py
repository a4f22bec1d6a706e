"""``same as PATH``: how many adapter parameters a plan or an adapter has. Heads are not counted."""

from pathlib import Path
from typing import TYPE_CHECKING

from flowra_pipelines.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["number_of_same", "parameters_of"]

ADAPTERS = ("", "adapter", "refine/adapter")
"""Where under a folder its adapter is. What merge writes may hold other adapters, too, and does not count."""
PLANS = ("", "allocate")
OURS, PEFTS = ("flowra_config.json", "flowra_model.safetensors"), "adapter_config.json"
COUNTED = ("lora_A", "lora_B", "lora_E", "lora_magnitude", "offset", "core", "factor_")
"""Tensors of a site in Flowra's own pair that are trained."""


def parameters_of(path: str | Path) -> int:
    """Count the adapter parameters of a plan, an adapter, or a run.

    Args:
        path: a ``plan.json``; or a folder with a plan or an adapter; or that of a run, whose final adapter counts, or
            its plan if it has not come so far: what that spends, or what refinement ends within. Zeros that an export
            was filled up with count, for they are stored.

    Returns:
        The number.

    Raises:
        UserError: if there is neither, or it cannot be read.
    """
    from flowra_adapters import read_checkpoint
    from flowra_adapters.json_files import read_tensors
    from flowra_allocation import read_plan

    folder = Path(path).expanduser()
    if folder.name == "plan.json" and folder.is_file():
        places = [(folder.parent, "plan.json")]
    else:
        places = [(folder / place, name) for place in ADAPTERS for name in (OURS[0], PEFTS)]
        places += [(folder / place, "plan.json") for place in PLANS]
    where, name = next(((each, name) for each, name in places if (each / name).is_file()), (None, ""))
    if where is None:
        raise UserError(
            f"budget must be the same as a plan.json, a folder with one or with an adapter, or a run, got {path}"
        )
    try:
        if name == "plan.json":
            plan = read_plan(where)
            return plan.parameters if plan.final_budget is None else min(plan.parameters, plan.final_budget)
        if name == OURS[0]:
            return _count(read_tensors(where / OURS[1]))
        found = read_checkpoint(where)
    except ValueError as error:
        raise UserError(f"budget must be the same as something that can be read, got {error}") from None
    tensors = [each for pair in found.factors.values() for each in pair]
    for beside in (found.magnitudes, found.biases, found.bias_offsets):
        tensors += beside.values()
    return sum(tensor.numel() for tensor in tensors)


def number_of_same(budget: str | int) -> str | int:
    """Return the number for ``same as PATH``, so that it is seen when the file there changes; others as they are.

    Raises:
        UserError: if nothing that can be counted is there.
    """
    if not str(budget).strip().startswith("same"):
        return budget
    from flowra_allocation import parse_budget

    try:
        return parse_budget(budget, base_parameters=1, parameters_of=parameters_of)
    except ValueError as error:
        raise UserError(str(error)) from None


def _count(tensors: "dict[str, Tensor]") -> int:
    """Count what is trained in Flowra's pair; of masked slots those in use."""
    total = 0
    for name, tensor in tensors.items():
        site, _, key = name.rpartition("/")
        if site.startswith("site/") and key.startswith(COUNTED):
            mask = tensors.get(f"{site}/mask")
            total += tensor.numel() if mask is None else tensor.numel() // len(mask) * int(mask.sum())
    return total
