"""What ``flowra merge`` is asked for, from folders and words to a merge."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from torch import Tensor

from flowra_adapters.json_files import read_json_object
from flowra_compose import (
    RULES,
    MergeOptions,
    Truncation,
    base_weights,
    read_adapter,
)
from flowra_compose.interference_files import INTERFERENCE_NAME
from flowra_compose.merging import check_rule
from flowra_compose.module_updates import Weight
from flowra_pipelines.composition import (
    Merged,
    as_user_errors,
    check_provenance,
    compose,
    default_rule,
    task_names,
    truncation_of,
)
from flowra_pipelines.errors import UserError
from flowra_pipelines.export import CONFIGS, adapter_folder, in_peft_form
from flowra_pipelines.learned_weights import LearnWeights, learned_weights
from flowra_pipelines.sources import resolve
from flowra_pipelines.statistics_files import read_task_statistics
from flowra_pipelines.task_statistics import MeasureSettings, data_source, measure_adapter
from flowra_pipelines.tied_weights import tied_to

__all__ = ["MergeJob", "check_out", "reader_of", "run_merge"]

SUMS = ("task_arithmetic", "cat", "truncated_svd")
"""Rules for learned weights, which are those of a sum. The first is the default."""
OURS = ("adapter_config.json", "adapter_model.safetensors", INTERFERENCE_NAME)
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
    learn: LearnWeights | None = None
    """Whether the weights are learned on ``data`` instead, and how."""
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
    """Inputs that statistics are measured on and weights are learned from, one for each source, or none."""
    examples: int = 128
    batch_size: int = 16


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
    check_out(job.out, folders, OURS)
    _check_earlier(job.out)
    for what, given in (("statistics", job.statistics), ("data", job.data)):
        if given and len(given) != len(folders):
            raise UserError(f"{what} must be one for each adapter, in their order, got {len(given)} for {len(folders)}")
    if job.statistics and job.data:
        raise UserError("statistics and data must not be given together: statistics have been measured already")
    rule, why = _rule(job)
    with (
        TemporaryDirectory(prefix="flowra-statistics-") as measured,
        in_peft_form(folders, job.base) as readable,
        as_user_errors(),
    ):
        options, drawn = _options(job, rule)
        shaped = any(each is not None for each in (job.rank, job.energy, job.budget))
        check_rule(rule, options, Truncation(rank=1) if shaped else None)  # before anything is measured
        needs = RULES[rule].needs
        if needs and not job.statistics and not job.data:
            raise UserError(
                f"statistics must be given for the rule {rule!r}, got none. Make them with flowra statistics, or give"
                " --data FILE for each adapter."
            )
        base = reader_of(job.base, folders)
        inputs = [read_adapter(folder, base=base) for folder in readable]
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
        weights: Sequence[Weight] = job.weights or (1.0,) * len(folders)
        if job.learn is not None:
            settings = MeasureSettings(examples=job.examples, batch_size=job.batch_size, seed=drawn)
            sources = [data_source(data) for data in job.data]
            weights = learned_weights(
                folders, inputs, sources, base=job.base, learn=job.learn, settings=settings
            ).weights
        named = {one.base_model_name_or_path for one in inputs} - {None}
        return compose(
            readable,
            job.out,
            names=names,
            weights=weights,
            rule=rule,
            why=why,
            options=options,
            truncation=truncation,
            statistics=known,
            heads_from=None if job.heads_from is None else _index_of(job.heads_from, job.sources),
            base=base,
            base_name=job.base if len(named) > 1 else None,
            keep_report=True,
        )


def _rule(job: MergeJob) -> tuple[str, str]:
    """Return the rule, and why in words.

    Raises:
        UserError: if weights are to be learned, and that cannot be.
    """
    if job.learn is None:
        return (job.rule, "as asked for") if job.rule else default_rule(statistics=bool(job.statistics or job.data))
    if not job.data:
        raise UserError("data must be given where weights are learned, got none. Give --data FILE for each adapter.")
    if job.rule not in (None, *SUMS):
        raise UserError(
            f"method must be {', '.join(SUMS[:-1])} or {SUMS[-1]} with learned weights, which are those of a sum,"
            f" got {job.rule!r}"
        )
    return (job.rule, "as asked for") if job.rule else (SUMS[0], "the sum that the weights are learned for")


def reader_of(name: str | None, folders: Sequence[Path]) -> Callable[[str], Tensor] | None:
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
        if known is None and (tied := tied_to(path, wanted)) is not None:
            known = next((each for each in (tied, tied.partition(".")[2]) if each in weights), None)
        if known is None:
            raise ValueError(f"base must hold {wanted!r}, got {path} without it. Is it the base that was adapted?")
        return weights[known]

    return parameter


def _size_of(base: str) -> int:
    """Count the parameters in the files of a base."""
    path = resolve(base)
    if path is None:
        raise UserError(f"base must be a folder for a budget in per cent, got {base}")
    return sum(tensor.numel() for tensor in base_weights(path).values())


def check_out(out: Path, folders: Sequence[Path], ours: Sequence[str]) -> None:
    """Refuse a folder that must not be written over.

    Args:
        out: to be written.
        folders: inputs.
        ours: files that an earlier result may have left.

    Raises:
        UserError: if it is an input, or holds something else.
    """
    if out.resolve() in {folder.resolve() for folder in folders}:
        raise UserError(f"out must be a folder of its own, got {out}, which is an input")
    if out.exists() and not out.is_dir():
        raise UserError(f"out must be a folder, got the file {out}")
    others = sorted(each.name for each in out.iterdir() if each.name not in ours) if out.is_dir() else []
    if others:
        raise UserError(f"out must be a new folder or an earlier result, got {out} with {others[0]}. Give --out.")


def _check_earlier(out: Path) -> None:
    """Refuse a folder with an adapter that no merge has left there: it would be written over."""
    under_way = out.with_name(f"{out.name}.partial")
    if (out / OURS[0]).exists() and not (out / INTERFERENCE_NAME).exists() and not under_way.exists():
        raise UserError(
            f"out must be a new folder or an earlier result, got {out} with an adapter of another origin (no"
            f" {INTERFERENCE_NAME} beside it). Give --out."
        )


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
