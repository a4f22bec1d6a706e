"""Adapters become one, with what it cost: the work behind ``flowra merge``, the stage merge and composed tasks."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from flowra_adapters.json_files import read_json_object
from flowra_allocation import parse_budget
from flowra_compose import (
    RULES,
    AdapterState,
    LowRankUpdate,
    MergeOptions,
    ModuleStatistics,
    Truncation,
    base_weights,
    merge_folders,
    read_adapter,
)
from flowra_compose.interference import InterferenceMeter, InterferenceReport
from flowra_compose.interference_files import write_interference
from flowra_compose.merging import check_rule
from flowra_compose.module_updates import modules_of
from flowra_compose.recommendation import Recommendation, recommend
from flowra_pipelines.errors import UserError
from flowra_pipelines.export import CONFIGS, adapter_folder
from flowra_pipelines.merge_rules import DATA_FREE_RULES
from flowra_pipelines.module_names import modules_called
from flowra_pipelines.progress import console, meter
from flowra_pipelines.run_config import load_config
from flowra_pipelines.same_budget import parameters_of
from flowra_pipelines.sources import resolve
from flowra_pipelines.statistics_files import JSON_NAME, TENSORS_NAME, TaskStatistics, read_task_statistics
from flowra_pipelines.task_statistics import MeasureSettings, adapter_hash, data_source, measure_adapter, measure_run

__all__ = [
    "MergeJob",
    "Merged",
    "as_user_errors",
    "check_provenance",
    "compose",
    "default_rule",
    "merged_parameters",
    "run_merge",
    "show_merge",
    "show_statistics",
    "task_names",
    "truncation_of",
]

BASIS = {"measured": "what was measured", "predicted": "the statistics", "geometry": "the geometry of the updates"}
SHOWN = 5

OURS = ("adapter_config.json", "adapter_model.safetensors", "README.md", "interference.json")
"""What an earlier merge may have left in its folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeJob:
    """What is to be merged, and how; the options of ``flowra merge``."""

    sources: tuple[Path, ...]
    """Folders of adapters or of runs."""
    out: Path
    """Folder to write."""
    rule: str | None = None
    """By default what the statistics allow, see :func:`default_rule`."""
    weights: tuple[float, ...] | None = None
    """One for each; by default 1."""
    density: float | None = None
    trim: Literal["global", "tensor"] | None = None
    seed: int | None = None
    common: float | None = None
    shrinkage: float | None = None
    rank: int | None = None
    energy: float | None = None
    budget: str | int | None = None
    heads_from: Path | None = None
    """One of the sources."""
    base: str | None = None
    """Of the adapters; by default what they say."""
    statistics: tuple[Path, ...] = ()
    """Folders, one for each source, or none."""
    data: tuple[str, ...] = ()
    """Inputs that statistics are measured on, one for each source, or none."""
    examples: int = 128
    batch_size: int = 16


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
    weights: Mapping[str, float]
    """Of each task that took part."""
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


def default_rule(*, statistics: bool) -> tuple[str, str]:
    """Choose the rule where none is asked for.

    Returns:
        Its name, and why in words.
    """
    if statistics and "flow" in RULES:
        return "flow", "the default with statistics"
    free = next(name for name in DATA_FREE_RULES if name in RULES)
    return free, "the default without statistics; with them (--statistics, --data) it would be flow"


def merged_parameters(budget: str | int, inputs: Sequence[AdapterState], *, base_parameters: int | None = None) -> int:
    """Turn a budget into parameters of the merged adapter.

    Args:
        budget: as of a run; ``like PATH`` is what the adapter there has.
        inputs: the adapters, whose modules a budget like ``like r=8 on q,v`` may name.
        base_parameters: of the base, for a percentage.

    Returns:
        Parameters ≥ 1.

    Raises:
        UserError: if it is no budget.
    """
    shapes = {name: one.updates[name].shape for one in inputs for name in one.updates}
    text = str(budget).strip()
    if text.startswith("like ") and "=" not in text:
        text = f"same as {text.removeprefix('like ').strip()}"
    if text.endswith("%") and base_parameters is None:
        raise UserError(f"budget must be a number of parameters where no base is given, got {budget!r}. Give --base.")
    try:
        return parse_budget(
            text,
            base_parameters=base_parameters or 1,
            unit_cost=lambda names: sum(sum(shapes[name]) for name in modules_called(shapes, names, "budget")),
            parameters_of=_parameters_at,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _parameters_at(path: str) -> int:
    """Count the parameters of the adapter, run or plan at a path; heads are not counted."""
    source = Path(path).expanduser()
    return parameters_of(source if source.name == "plan.json" else adapter_folder(source))


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
    weights: Sequence[float],
    rule: str,
    why: str = "as asked for",
    options: MergeOptions | None = None,
    truncation: Truncation | None = None,
    statistics: Sequence[Mapping[str, ModuleStatistics]] = (),
    heads_from: int | None = None,
    base: Callable[[str], Tensor] | None = None,
) -> Merged:
    """Merge adapters into a folder, and look at what it cost.

    Args:
        folders: of the adapters.
        out: folder of the result.
        names: of the tasks.
        weights: one for each.
        rule: a name in ``flowra_compose.RULES``.
        why: it was taken.
        options: of the rule.
        truncation: of the result.
        statistics: of every task, or none; they also tell what each task is predicted to lose.
        heads_from: index of the adapter whose heads are kept.
        base: gives a parameter of the base by its name, for adapters that mean something only beside it.

    Returns:
        The result.

    Raises:
        ValueError: as :func:`flowra_compose.merge_folders`.
    """
    inputs = [read_adapter(folder, base=base) for folder in folders]
    updates = [one.updates for one in inputs]
    total = len({name for weight, one in zip(weights, updates, strict=True) if weight for name in one})
    part = [index for index, weight in enumerate(weights) if weight]
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
            on_module=lambda *_: progress.advance(),
        )
    cost = InterferenceMeter(
        tasks=tuple(names[index] for index in part), weights=tuple(weights[index] for index in part)
    )
    with meter("merge: what it cost", total) as progress:
        for module in modules_of(updates, weights, statistics or None):
            m, n = module.shape
            dropped = module.of_factors(torch.zeros(1, n), torch.zeros(m, 1))  # a budget may give a module rank 0
            cost.add(module, state.updates.get(module.name, dropped))
            progress.advance()
    parameters = {name: _count(one) for name, one in zip(names, updates, strict=True)}
    report = cost.report()
    modules = {
        name: replace(each, truncation_loss=state.relative_losses.get(name)) for name, each in report.modules.items()
    }
    report = replace(report, modules=modules)
    return Merged(
        path=out,
        rule=rule,
        why=why,
        state=state,
        weights={names[index]: weights[index] for index in part},
        parameters=parameters,
        report=report,
    )


def run_merge(job: MergeJob) -> Merged:
    """Merge adapters as a user asked for.

    Args:
        job: what and how.

    Returns:
        The result, the rule that was used, and the report.

    Raises:
        UserError: for what the user can put right.
    """
    folders, names = [adapter_folder(source) for source in job.sources], task_names(job.sources)
    _check_out(job.out, folders)
    for what, given in (("statistics", job.statistics), ("data", job.data)):
        if given and len(given) != len(folders):
            raise UserError(f"{what} must be one for each adapter, in their order, got {len(given)} for {len(folders)}")
    if job.statistics and job.data:
        raise UserError("statistics and data must not be given together: statistics have been measured already")
    rule, why = (job.rule, "as asked for") if job.rule else default_rule(statistics=bool(job.statistics or job.data))
    with TemporaryDirectory(prefix="flowra-statistics-") as measured, as_user_errors():
        options, drawn = _options(job, rule)
        shaped = any(each is not None for each in (job.rank, job.energy, job.budget))
        check_rule(rule, options, Truncation(rank=1) if shaped else None)  # before anything is measured
        needs = RULES[rule].needs
        if needs and not job.statistics and not job.data:
            raise UserError(
                f"statistics must be given for the rule {rule!r}, got none. Make them with flowra statistics, or give"
                " --data FILE for each adapter."
            )
        base = _base(job.base, folders)
        inputs = [read_adapter(folder, base=base) for folder in folders]
        if job.data:
            settings = MeasureSettings(
                examples=job.examples, batch_size=job.batch_size, seed=drawn, fisher="fisher" in needs
            )
            modules = {name for one in inputs for name in one.updates}
            places = [Path(measured) / str(index) for index in range(len(folders))]
            for folder, data, place in zip(folders, job.data, places, strict=True):
                measure_adapter(folder, data_source(data), place, names=modules, base=job.base, settings=settings)
        else:
            places = list(job.statistics)
        known = [read_task_statistics(place) for place in places]
        check_provenance(known, folders)
        truncation = truncation_of(
            rank=job.rank,
            energy=job.energy,
            budget=job.budget,
            inputs=inputs,
            base_parameters=_size_of(job.base) if job.base and str(job.budget).strip().endswith("%") else None,
        )
        return compose(
            folders,
            job.out,
            names=names,
            weights=job.weights or (1.0,) * len(folders),
            rule=rule,
            why=why,
            options=options,
            truncation=truncation,
            statistics=known,
            heads_from=None if job.heads_from is None else _index_of(job.heads_from, job.sources),
            base=base,
        )


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
    return Truncation(
        rank=rank, energy=energy, parameters=merged_parameters(budget, inputs, base_parameters=base_parameters)
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


def show_merge(job: MergeJob, *, report: Path | None, as_json: bool) -> None:
    """Merge, write ``interference.json`` beside the result and a page if wanted, and print what came out.

    Raises:
        UserError: for what the user can put right.
    """
    if report is not None and report.suffix != ".html":
        raise UserError(f"report must be a path that ends in .html, got {report}")
    done = run_merge(job)
    write_interference(done.report, done.path)
    if report is not None:
        from flowra_pipelines.report_interference import write_interference_page

        write_interference_page(done.report, report)
    advice = recommend(done.report)
    if as_json:
        sys.stdout.write(json.dumps(_content(done, advice, report), indent=2, allow_nan=False) + "\n")
        return
    console.print(_table(done), soft_wrap=False)
    modules = done.state.updates
    ranks = sorted(each.rank for each in modules.values())
    console.print(f"Rule: {done.rule}, {done.why}")
    console.print(f"Modules: {len(modules)}, of rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[-1] > ranks[0] else ""))
    if done.loss is not None:
        console.print(f"Cut: at most {done.loss[1]:.2%} of a module's squared size was lost, at {done.loss[0]}")
    worst = done.report.worst_task
    if worst is not None:
        console.print(f"Worst task: {worst[0]}, which loses about {worst[1]:.1%} of what its adapter gains")
    console.print(f"Recommendation: [bold]{advice.advice}[/bold], by {BASIS[advice.basis]}")
    for line in (*advice.reasons, *advice.would_change):
        console.print(f"  {line}", markup=False)
    if done.state.modules_to_save:
        console.print(f"Heads: {', '.join(done.state.trained_modules)}")
    console.print(f"Written: {done.path}" + (f", {report}" if report is not None else ""), markup=False)


def show_statistics(
    adapter: Path,
    out: Path,
    *,
    data: str | None,
    others: Sequence[Path],
    base: str | None,
    settings: MeasureSettings,
) -> None:
    """Measure a task's statistics, write them, and say what they are.

    Args:
        adapter: folder of an adapter or of a run, or a run's YAML file.
        out: folder to write.
        data: inputs, unless a YAML file says them.
        others: adapters whose modules are measured, too.
        base: of the adapter; by default what it says.
        settings: how.

    Raises:
        UserError: for what the user can put right.
    """
    folder = adapter_folder(adapter)
    if out.exists() and (not out.is_dir() or {each.name for each in out.iterdir()} - {JSON_NAME, TENSORS_NAME}):
        raise UserError(f"out must be a new folder or one with statistics, got {out}")
    config = load_config(adapter) if adapter.suffix in (".yaml", ".yml") else None
    if config is None and data is None:
        raise UserError(f"data must be given with an adapter, got none for {adapter}. Give --data FILE.")
    if config is not None and (data is not None or base is not None):
        raise UserError("data and base must be left out with a YAML file, which says them")
    with as_user_errors():
        reader = _base(base or (config.model.path if config else None), [folder])
        names = {
            name for each in (folder, *map(adapter_folder, others)) for name in read_adapter(each, base=reader).updates
        }
        if config is None:
            assert data is not None
            left = measure_adapter(folder, data_source(data), out, names=names, base=base, settings=settings)
        else:
            left = measure_run(config, folder, out, names=names, settings=settings)
    known = read_task_statistics(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(
        f"{len(known)} modules, {known.provenance['examples']} inputs of {known.provenance['data']}", markup=False
    )
    if left:
        shown = ", ".join(left[:SHOWN]) + (" …" if len(left) > SHOWN else "")
        console.print(f"Not measured, as they are no layers or biases of layers: {len(left)} ({shown})", markup=False)
    console.print(f"Written: {out}, {size / 2**20:.1f} MiB", markup=False)


def _content(done: Merged, advice: Recommendation, page: Path | None) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    report = done.report
    return {
        "out": str(done.path),
        "rule": done.rule,
        "why": done.why,
        "tasks": [
            {
                "name": name,
                "weight": weight,
                "parameters": done.parameters[name],
                "projection": report.projections.get(name),
                "predicted_interference": report.predicted.get(name),
            }
            for name, weight in done.weights.items()
        ],
        "parameters": done.merged_parameters,
        "modules": {
            name: {"rank": each.rank, "parameters": each.parameters, "loss": report.modules[name].truncation_loss}
            for name, each in sorted(done.state.updates.items())
        },
        "energy_kept": report.energy_kept,
        "recommendation": asdict(advice),
        "heads": list(done.state.trained_modules),
        "report": None if page is None else str(page),
    }


def _table(done: Merged) -> Table:
    """Put the tasks and the result side by side."""
    report = done.report
    predicted = bool(report.predicted)
    table = Table(title=f"{len(report.tasks)} adapters become one", title_justify="left")
    headings = ["", "weight", "parameters", "finds of its update", *(["predicted loss"] if predicted else [])]
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for name, weight in done.weights.items():
        share = report.projections.get(name)
        cells = [f"{weight:g}", f"{done.parameters[name]:,}", "–" if share is None else f"{share:.1%}"]
        if predicted:
            cells.append(f"{report.predicted[name]:.1%}" if name in report.predicted else "–")
        table.add_row(Text(name), *cells)
    table.add_row(Text("merged"), "", f"{done.merged_parameters:,}", "", *([""] if predicted else []), style="bold")
    return table


def _size_of(base: str) -> int:
    """Count the parameters in the files of a base."""
    path = resolve(base)
    if path is None:
        raise UserError(f"base must be a folder for a budget in per cent, got {base}")
    return sum(tensor.numel() for tensor in base_weights(path).values())


def _count(updates: Mapping[str, LowRankUpdate]) -> int:
    return sum(each.parameters for each in updates.values())


def _check_out(out: Path, folders: Sequence[Path]) -> None:
    """Refuse a folder that must not be written over."""
    if out.resolve() in {folder.resolve() for folder in folders}:
        raise UserError(f"out must be a folder of its own, got {out}, which is an input")
    if out.exists() and not out.is_dir():
        raise UserError(f"out must be a folder, got the file {out}")
    others = sorted(each.name for each in out.iterdir() if each.name not in OURS) if out.is_dir() else []
    if others:
        raise UserError(f"out must be a new folder or an earlier result, got {out} with {others[0]}. Give --out.")


def _options(job: MergeJob, rule: str) -> tuple[MergeOptions, int]:
    """Return the options of the rule, and the seed of what is measured.

    A seed is the rule's where it draws, and otherwise that of the inputs and labels that statistics are measured with.

    Raises:
        UserError: if a seed has no effect.
    """
    draws = rule not in RULES or "seed" in RULES[rule].options
    if job.seed is not None and not draws and not job.data:
        raise UserError(f"seed must be left out with the rule {rule!r}, got {job.seed}: nothing is drawn")
    options = MergeOptions(
        density=job.density,
        trim=job.trim,
        seed=job.seed if draws else None,
        common=job.common,
        shrinkage=job.shrinkage,
    )
    return options, job.seed or 0


def _index_of(wanted: Path, sources: Sequence[Path]) -> int:
    found = [index for index, source in enumerate(sources) if source.resolve() == wanted.resolve()]
    if not found:
        raise UserError(f"heads-from must be one of the adapters, got {wanted}")
    return found[0]


def _base(name: str | None, folders: Sequence[Path]) -> Callable[[str], Tensor] | None:
    """Return what gives a parameter of the base, opened when it is asked for; None where no folder of it is known."""
    for folder in folders if name is None else ():
        config = next((folder / each for each in CONFIGS if (folder / each).is_file()), folder / CONFIGS[-1])
        said = read_json_object(config).get("base_model_name_or_path")
        name = name or (said if isinstance(said, str) else None)
    path = resolve(name) if name else None
    if path is None:
        return None
    opened: list[Mapping[str, Tensor]] = []

    def parameter(wanted: str) -> Tensor:
        if not opened:
            opened.append(base_weights(path))
        weights = opened[0]
        inside = wanted.partition(".")[2]  # a base that was saved without a head lacks the name of the whole
        known = next((each for each in (wanted, inside) if each in weights), None)
        if known is None:
            raise ValueError(f"base must hold {wanted!r}, got {path} without it. Give --base.")
        return weights[known]

    return parameter


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Say errors of the libraries as the command line says things."""
    try:
        yield
    except (ValueError, ArithmeticError) as error:
        raise UserError(" ".join(str(error).replace("heads_from=<index>", "--heads-from ADAPTER").split())) from None
