"""How large a merged adapter may be, and whether what a configuration wants merged is there."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flowra_allocation import parse_budget
from flowra_pipelines.config_sections import ExtraAdapter
from flowra_pipelines.errors import UserError
from flowra_pipelines.export import adapter_folder
from flowra_pipelines.module_names import modules_called
from flowra_pipelines.same_budget import parameters_of
from flowra_pipelines.statistics_files import read_task_statistics

__all__ = ["check_merge", "merged_parameters"]


def merged_parameters(
    budget: str | int, shapes: Mapping[str, tuple[int, int]], *, base_parameters: int | None = None
) -> int:
    """Turn a budget into parameters of the merged adapter.

    Args:
        budget: as of a run; ``like PATH`` is what the adapter there has.
        shapes: module name to (m, n) of what is merged, which a budget like ``like r=8 on q,v`` may name.
        base_parameters: of the base, for a percentage.

    Returns:
        Parameters ≥ 1.

    Raises:
        UserError: if it is no budget.
    """
    text = str(budget).strip()
    if _is_like_a_path(text):
        text = f"same as {text.removeprefix('like ').strip()}"
    if text.endswith("%") and base_parameters is None:
        raise UserError(f"budget must be a number of parameters where no base is given, got {budget!r}. Give --base.")
    try:
        found = parse_budget(
            text,
            base_parameters=base_parameters or 1,
            unit_cost=lambda names: sum(sum(shapes[name]) for name in modules_called(shapes, names, "budget")),
            parameters_of=_parameters_at,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if found < 1:
        raise UserError(f"budget must be at least one parameter, got {budget!r}. Raise it.")
    return found


def check_merge(
    budget: str | int | None,
    extra: Sequence[ExtraAdapter],
    shapes: Mapping[str, tuple[int, int]],
    *,
    base_parameters: int,
) -> None:
    """Look, before anything is trained, at what a merge will be asked for: its budget, and the adapters from elsewhere.

    Args:
        budget: of the merged adapter. One like that of a path is not looked at: it may be of a run that is yet to come.
        extra: adapters to be merged with what is trained.
        shapes: of the layers that may be updated.
        base_parameters: of the base.

    Raises:
        UserError: if the budget is none, an adapter or its statistics are not there or cannot be read.
    """
    if budget is not None and not str(budget).strip().startswith("same as") and not _is_like_a_path(str(budget)):
        merged_parameters(budget, shapes, base_parameters=base_parameters)
    for each in extra:
        adapter_folder(Path(each.path))
        if each.statistics is not None:
            read_task_statistics(each.statistics)


def _is_like_a_path(text: str) -> bool:
    return text.strip().startswith("like ") and "=" not in text


def _parameters_at(path: str) -> int:
    """Count the parameters of the adapter, run or plan at a path; heads are not counted."""
    source = Path(path).expanduser()
    return parameters_of(source if source.name == "plan.json" else adapter_folder(source))
