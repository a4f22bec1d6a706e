"""Adapters become one, with what it cost: the work behind ``flowra merge``, the stage merge and composed tasks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from flowra_compose import (
    RULES,
    AdapterState,
    LowRankUpdate,
    MergeOptions,
    ModuleStatistics,
    Truncation,
    merge_folders,
    read_adapter,
)
from flowra_compose.folders import MergedFolder
from flowra_compose.interference import InterferenceMeter
from flowra_compose.interference_files import write_interference
from flowra_compose.interference_report import InterferenceReport
from flowra_compose.module_updates import Weight, modules_of, takes_part, updated_modules
from flowra_compose.recommendation import recommend
from flowra_pipelines.errors import UserError
from flowra_pipelines.merge_budget import merged_parameters
from flowra_pipelines.merge_rules import DATA_FREE_RULES
from flowra_pipelines.progress import meter
from flowra_pipelines.statistics_files import TaskStatistics
from flowra_pipelines.task_statistics import adapter_hash

__all__ = [
    "Merged",
    "as_user_errors",
    "check_provenance",
    "compose",
    "default_rule",
    "task_names",
    "truncation_of",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What came out."""

    path: Path
    """Of the adapter."""
    rule: str
    """That was used."""
    why: str
    """In words."""
    state: AdapterState
    """The adapter."""
    weights: Mapping[str, Weight]
    """Of each task that took part, a number or one for each module."""
    parameters: Mapping[str, int]
    """Of each task's own adapter."""
    report: InterferenceReport
    """What it cost."""

    @property
    def merged_parameters(self) -> int:
        """Of the result."""
        return _count(self.state.updates)

    @property
    def loss(self) -> tuple[str, float] | None:
        """The module where a truncation lost most of the squared norm, and the share; None where nothing was cut."""
        lost = {
            name: each.truncation_loss for name, each in self.report.modules.items() if each.truncation_loss is not None
        }
        return max(lost.items(), key=lambda item: item[1]) if lost else None

    @property
    def metrics(self) -> list[tuple[str, float, int]]:
        """What it cost each task, as metrics of a stage."""
        kinds = {"projection": self.report.projections, "predicted": self.report.predicted}
        return [
            (f"interference/{kind}/{name}", value, 0)
            for kind, values in kinds.items()
            for name, value in values.items()
        ]

    @property
    def summary(self) -> dict[str, str]:
        """What it cost, in lines: what to do, and what a truncation took."""
        advice = recommend(self.report)
        lines = {"recommendation": f"{advice.advice}, by {advice.basis}"} if len(self.report.tasks) > 1 else {}
        if self.loss is not None:
            lines["cut"] = f"at most {self.loss[1]:.2%} of a module's squared norm was lost, at {self.loss[0]}"
        return lines


def default_rule(*, statistics: bool) -> tuple[str, str]:
    """Choose the rule where none is asked for.

    Returns:
        Its name, and why in words.
    """
    if statistics and "flow" in RULES:
        return "flow", "the default with statistics"
    free = next(name for name in DATA_FREE_RULES if name in RULES)
    return free, "the default without statistics; with them (--statistics, --data) it would be flow"


def task_names(sources: Sequence[Path]) -> tuple[str, ...]:
    """Name tasks by their folders, with more of the path where names are the same."""
    paths = [source.resolve().parts for source in sources]
    depth = 1
    while depth < max(map(len, paths)) and len({parts[-depth:] for parts in paths}) < len(paths):
        depth += 1
    names = ["/".join(parts[-depth:]) for parts in paths]
    return tuple(name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names))


def compose(
    folders: Sequence[Path],
    out: Path,
    *,
    names: Sequence[str],
    weights: Sequence[Weight],
    rule: str,
    why: str = "as asked for",
    options: MergeOptions | None = None,
    truncation: Truncation | None = None,
    statistics: Sequence[Mapping[str, ModuleStatistics]] = (),
    heads_from: int | None = None,
    base: Callable[[str], Tensor] | None = None,
    base_name: str | None = None,
    keep_report: bool = False,
) -> Merged:
    """Merge adapters into a folder, and look at what it cost.

    Args:
        folders: of the adapters.
        out: folder of the result.
        names: of the tasks.
        weights: one for each, a number or one by the name of each module that it updates.
        rule: a name in ``flowra_compose.RULES``.
        why: it was taken.
        options: of the rule.
        truncation: of the result.
        statistics: of every task, or none; they also tell what each task is predicted to lose.
        heads_from: index of the adapter whose heads are kept.
        base: gives a parameter of the base by its name, for adapters that mean something only beside it.
        base_name: of the base, where the adapters call it by different names.
        keep_report: whether to write ``interference.json`` beside the adapter, both or none.

    Returns:
        The result.

    Raises:
        ValueError: as :func:`flowra_compose.merge_folders`.
    """
    inputs = [read_adapter(folder, base=base) for folder in folders]
    updates = [one.updates for one in inputs]
    total = len(updated_modules(updates, weights))
    part = [index for index, weight in enumerate(weights) if takes_part(weight)]
    reports: list[InterferenceReport] = []

    def look(state: MergedFolder, folder: Path) -> None:
        cost = InterferenceMeter(
            tasks=tuple(names[index] for index in part), weights=tuple(weights[index] for index in part)
        )
        with meter("merge: what it cost", total) as progress:
            for module in modules_of(updates, weights, statistics or None):
                cost.add(module, state.updates.get(module.name))
                progress.advance()
        report = cost.report()
        modules = {
            name: replace(each, truncation_loss=state.relative_losses.get(name))
            for name, each in report.modules.items()
        }
        reports.append(replace(report, modules=modules, settings=_settings(rule, options, truncation)))
        if keep_report:
            write_interference(reports[0], folder)

    with meter(f"merge: {rule}", total) as progress:
        state = merge_folders(
            folders,
            weights,
            out,
            rule=rule,
            options=options,
            truncation=truncation,
            statistics=statistics or None,
            heads_from=heads_from,
            base=base,
            base_model_name_or_path=base_name,
            on_module=lambda *_: progress.advance(),
            beside=look,
        )
    return Merged(
        path=out,
        rule=rule,
        why=why,
        state=state,
        weights={names[index]: weights[index] for index in part},
        parameters={name: _count(one) for name, one in zip(names, updates, strict=True)},
        report=reports[0],
    )


def _settings(rule: str, options: MergeOptions | None, truncation: Truncation | None) -> dict[str, str | float]:
    """Say how adapters are merged, as a report keeps it; what nobody said is as the rule has it."""
    said = [asdict(each) for each in (options, truncation) if each is not None]
    return {"rule": rule} | {
        key: value for each in said for key, value in each.items() if isinstance(value, str | int | float)
    }


def truncation_of(
    *,
    rank: int | None,
    energy: float | None,
    budget: str | int | None,
    inputs: Sequence[AdapterState],
    base_parameters: int | None = None,
) -> Truncation | None:
    """Return the truncation that is asked for; None if none is."""
    if rank is None and energy is None and budget is None:
        return None
    if budget is None:
        return Truncation(rank=rank, energy=energy)
    shapes = {name: one.updates[name].shape for one in inputs for name in one.updates}
    return Truncation(
        rank=rank, energy=energy, parameters=merged_parameters(budget, shapes, base_parameters=base_parameters)
    )


def check_provenance(statistics: Sequence[TaskStatistics], folders: Sequence[Path]) -> None:
    """Refuse statistics of another adapter, or of different bases.

    Raises:
        UserError: if they do not belong together, as far as they say.
    """
    for known, folder in zip(statistics, folders, strict=False):
        said = known.provenance.get("adapter_hash")
        if said is not None and said != adapter_hash(folder):
            raise UserError(
                f"statistics must be of the adapter in {folder}, got those of {known.provenance.get('adapter')} as it"
                f" was; in {known.folder}. Give them in the order of the adapters, or measure again."
            )
    bases = {str(known.provenance["base_hash"]) for known in statistics if "base_hash" in known.provenance}
    if len(bases) > 1:
        raise UserError("statistics must be of one base, got different ones. Merge adapters of one base.")


def _count(updates: Mapping[str, LowRankUpdate]) -> int:
    return sum(each.parameters for each in updates.values())


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Say errors of the libraries as the command line says things."""
    try:
        yield
    except (ValueError, ArithmeticError) as error:
        said = str(error).replace("heads_from=<index>", "--heads-from ADAPTER")
        if said.startswith("base_model_name_or_path must be the same"):
            said = said.partition(" If they do")[0] + " If it is one base under two names, give it: --base."
        raise UserError(" ".join(said.split())) from None
