"""``flowra export``: an adapter as another system reads it, and the proof that it reads the same.

The adapter is put on its base and written again from there, so that what a system would compute otherwise is known by
layer, and refused with the reason.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypedDict, Unpack

import torch
import transformers
from rich.table import Table
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from flowra_adapters import (
    Adapter,
    checkpoint_of,
    load_adapter,
    pad_ranks,
    save_kohya,
    sites,
    write_checkpoint,
)
from flowra_pipelines.errors import UserError
from flowra_pipelines.export_check import compare, require_reader
from flowra_pipelines.progress import console
from flowra_pipelines.run_config import load_config
from flowra_pipelines.sources import resolve

__all__ = ["Exported", "For", "KindOfUpdate", "adapter_folder", "export_adapter", "in_peft_form", "show_export"]

For = Literal["peft", "vllm", "kohya"]
CONFIGS = ("flowra_config.json", "adapter_config.json")
TENSORS = {"flowra_config.json": "flowra_model.safetensors", "adapter_config.json": "adapter_model.safetensors"}
PLACES = ("", "adapter", "merge/adapter", "refine/adapter")
"""Where under a folder its final adapter is, the last stage first."""
AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types."""
OURS = ("adapter_config.json", "adapter_model.safetensors", "README.md")
PREFIX = "base_model.model."
RECORD = "stage.json"
SHOWN = 5
READER = {"peft": "peft", "vllm": "a reader with vLLM's rules", "kohya": "LyCORIS"}


class Options(TypedDict, total=False):
    """Of :func:`export_adapter`."""

    to: Path | None
    base: str | None
    rank_step: int
    rank: int | None
    prefix: str
    check: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class KindOfUpdate:
    """What became of the updates of one method."""

    method: str
    """Class of the adapters."""
    ranks: tuple[int, ...]
    """Of each, as it was."""
    written: tuple[int, ...]
    """Rank of the module that each is written in."""
    error: float
    """The largest ‖ΔW - s · B A‖_F / ‖ΔW‖_F; 0 where nothing had to be cut or decomposed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written."""

    path: Path
    """The folder, or kohya's file."""
    kinds: tuple[KindOfUpdate, ...]
    """What is in it, method by method."""
    dropped: tuple[str, ...]
    """Sites that are not in it, since their rank is 0."""
    heads: tuple[str, ...]
    """Modules trained in full that are in it."""
    difference: float | None
    """Of its reader's answer from Flowra's, relative; None if it was not checked."""


def adapter_folder(source: Path) -> Path:
    """Find the adapter that is meant: a folder with one, the final one of a run's folder, or of a run's YAML file.

    Returns:
        Its folder.

    Raises:
        UserError: if there is none.
    """
    if source.suffix in (".yaml", ".yml") and source.is_file():
        source = load_config(source).folder
    for place in PLACES:
        if any((source / place / name).is_file() for name in CONFIGS):
            return source / place
    raise UserError(
        f"adapter must be a folder with {' or '.join(CONFIGS)}, or a run that has come to refine or merge, got {source}"
    )


@contextmanager
def in_peft_form(folders: Sequence[Path], base: str | None = None) -> Iterator[list[Path]]:
    """Within the block, have adapters as PEFT reads them; those in Flowra's own files are exported to a folder for now.

    Args:
        folders: of the adapters.
        base: of those that are exported, see :func:`export_adapter`.

    Yields:
        A folder for each, its own where it is in PEFT's form.

    Raises:
        UserError: if one cannot be exported.
    """
    with TemporaryDirectory(prefix="flowra-export-") as made:
        readable = [*folders]
        for index, folder in enumerate(folders):
            if (folder / CONFIGS[0]).is_file():
                readable[index] = Path(made) / str(index)
                export_adapter(folder, "peft", to=readable[index], base=base)
        yield readable


def export_adapter(
    source: Path,
    consumer: For,
    *,
    to: Path | None = None,
    base: str | None = None,
    rank_step: int = 1,
    rank: int | None = None,
    prefix: str = "lycoris",
    check: bool = False,
) -> Exported:
    """Write an adapter as another system reads it.

    Args:
        source: see :func:`adapter_folder`.
        consumer: who reads: PEFT, vLLM, or what reads kohya's files.
        to: a folder, or for kohya a ``.safetensors`` file; by default beside the adapter, or the stage that it is of.
        base: model folder, ``package://NAME/path`` or Hub name; by default what the adapter says.
        rank_step: every rank is filled up with zeros to a multiple of this.
        rank: what the consumer has no word for is cut to this rank; by default it is decomposed in full.
        prefix: of names in kohya's file.
        check: let the consumer's own reader put it on the base, and compare the answers. If they differ, nothing is
            written.

    Returns:
        What was written.

    Raises:
        UserError: if there is no adapter or base, they do not fit, or the consumer would compute something else.
        CheckFailed: if the reader's answer differs from Flowra's.
    """
    if check:
        require_reader(consumer)
    folder = adapter_folder(source)
    target = _target(folder, consumer, to)
    said = _config(folder)
    name = base or said.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"base must be known, got an adapter that does not name one: {folder}. Give --base.")
    listed = tuple(str(each) for each in said.get("modules_to_save") or ())
    if listed and consumer == "kohya":
        raise UserError(f"adapter must hold no modules trained in full for kohya, got {listed[0]!r}. Use --for peft.")
    model, missing = _base(name, said.get("task_type"), folder)
    fresh = deepcopy(model) if check else None
    with _as_user_errors():
        attached = load_adapter(model, folder)
    owners = {id(each.owner) for site, each in sites(model).items() if site in attached}
    new = [key for key in missing if id(model.get_submodule(key.rpartition(".")[0])) in owners]
    if new:
        raise UserError(f"base must bring the weights that the adapter updates, got none for {new[0]!r}; from {name}")
    heads = tuple(each for each, _ in model.named_modules() if any(f".{each}".endswith(f".{one}") for one in listed))
    target.parent.mkdir(parents=True, exist_ok=True)
    energy = 1.0 if rank is None else None
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as partial, _as_user_errors():
        made = Path(partial) / target.name
        errors: Mapping[str, float]
        if consumer == "kohya":
            errors = save_kohya({prefix: model}, made, rank=rank, energy=energy, rank_step=rank_step)
            names = {site: _kohya_name(prefix, site) for site in attached}
            ranks = _kohya_ranks(made)
        else:
            checkpoint = checkpoint_of(
                model,
                modules_to_save=heads,
                base_model_name_or_path=name,
                task_type=said.get("task_type"),
                consumer=consumer,
                rank=rank,
                energy=energy,
            )
            errors, padded = checkpoint.errors, pad_ranks(checkpoint, rank_step)
            write_checkpoint(padded, made, consumer=consumer)
            names = {site: site.partition(":")[0].removesuffix(".in_proj_weight") for site in attached}
            common = int(_config(made)["r"])  # vLLM's files have one rank
            ranks = {each: common if consumer == "vllm" else padded.rank(each) for each in padded.factors}
        difference = None
        if fresh is not None:
            difference = compare(model, fresh, made, consumer=consumer, prefix=prefix)
        _move(made, target)
    return Exported(
        path=target,
        kinds=tuple(_kinds(attached, names, ranks, errors)),
        dropped=tuple(site for site, one in attached.items() if one.rank == 0),
        heads=heads,
        difference=difference,
    )


def show_export(source: Path, consumer: For, **options: Unpack[Options]) -> None:
    """Export, and print what was done."""
    done = export_adapter(source, consumer, **options)
    table = Table(title=f"{source} for {consumer}", title_justify="left")
    table.add_column("updates")
    for heading in ("how many", "ranks", "ranks written", "conversion error"):
        table.add_column(heading, justify="right")
    for kind in done.kinds:
        error = f"{kind.error:.1e}" if kind.error else "exact"
        table.add_row(kind.method, str(len(kind.ranks)), _range(kind.ranks), _range(kind.written), error)
    console.print(table)
    if done.heads:
        console.print(f"Trained in full, and in it: {', '.join(done.heads)}")
    if done.dropped:
        shown = ", ".join(done.dropped[:SHOWN]) + (", …" if len(done.dropped) > SHOWN else "")
        console.print(f"Left out, of rank 0: {len(done.dropped)} ({shown})")
    if consumer == "vllm":
        largest = max(max(kind.written, default=0) for kind in done.kinds)
        console.print(f"A server needs --enable-lora --max-lora-rank {largest}.")
    if done.difference is None:
        console.print("Not checked. With --check its reader must give Flowra's answer.")
    else:
        console.print(f"Checked: {READER[consumer]} differs from Flowra by {done.difference:.1e} of the largest logit.")
    console.print(f"Written: {done.path}", markup=False)


def _range(ranks: tuple[int, ...]) -> str:
    if not any(ranks):
        return "–"
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"


def _target(folder: Path, consumer: For, to: Path | None) -> Path:
    """Choose where to write, and refuse what must not be written over."""
    at = folder.resolve()
    suffix = ".safetensors" if consumer == "kohya" else ""
    beside = at.parent if (at.parent / RECORD).is_file() else at  # a stage that gains a file would run again
    target = beside.with_name(f"{at.name}-{consumer}{suffix}") if to is None else to.absolute()
    stage = next((above for above in target.parents if (above / RECORD).is_file()), None)
    if stage is not None:
        raise UserError(f"to must lie outside a run's stages, which would run again, got {to} in {stage}")
    if consumer == "kohya":
        if target.suffix != suffix or target.is_dir():
            raise UserError(f"to must be a .safetensors file for kohya, got {to}")
        if target.parent == at:
            raise UserError(f"to must lie outside the adapter's folder, got {to}")
        return target
    if target.resolve() == at:
        raise UserError(f"to must be another folder than the adapter's own, got {to}")
    if target.exists() and not target.is_dir():
        raise UserError(f"to must be a folder for {consumer}, got the file {to}")
    others = sorted(each.name for each in target.iterdir() if each.name not in OURS) if target.is_dir() else []
    if others:
        raise UserError(f"to must be a new folder or an earlier export, got {target} with {others[0]}")
    return target


def _move(made: Path, target: Path) -> None:
    """Give what is complete its own name."""
    if made.is_file():
        os.replace(made, target)
        return
    target.mkdir(exist_ok=True)
    for file in sorted(made.iterdir(), reverse=True):  # the tensors first: without a configuration they are nothing
        os.replace(file, target / file.name)


def _kohya_name(prefix: str, site: str) -> str:
    return f"{prefix}_{site.partition(':')[0]}".replace(".", "_")


def _kohya_ranks(file: Path) -> dict[str, int]:
    """Return the rank of each module of the file, by its name there."""
    end = ".lora_down.weight"
    with safe_open(file, framework="pt") as tensors:
        keys = [key for key in tensors.keys() if key.endswith(end)]  # noqa: SIM118 - not a mapping
        return {key.removesuffix(end): int(tensors.get_slice(key).get_shape()[0]) for key in keys}


def _kinds(
    attached: Mapping[str, Adapter], names: Mapping[str, str], ranks: Mapping[str, int], errors: Mapping[str, float]
) -> Iterator[KindOfUpdate]:
    """Put the sites of one method together; an error is under the site's name or the file's."""
    together: dict[str, list[str]] = defaultdict(list)
    for site, one in attached.items():
        if one.rank > 0:
            together[type(one).__name__].append(site)
    for method, own in together.items():
        lost = [errors.get(key, 0.0) for site in own for key in (site, site.replace(":", "."), names[site])]
        yield KindOfUpdate(
            method=method,
            ranks=tuple(attached[site].rank for site in own),
            written=tuple(ranks.get(names[site], 0) for site in own),
            error=max(lost),
        )


def _config(folder: Path) -> dict[str, Any]:
    """Read what an adapter says of its base; the readers of adapters check the rest."""
    path = next(folder / name for name in CONFIGS if (folder / name).is_file())
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be JSON, got {error}") from None
    if not isinstance(said, dict) or not isinstance(said.get("modules_to_save") or [], list):
        raise UserError(f"{path} must hold an adapter's configuration, got something else")
    return said


def _base(name: str, task_type: object, folder: Path) -> tuple[PreTrainedModel, list[str]]:
    """Load the base as its task needs it, in float32 on the CPU, a new head of the adapter's size included.

    Returns:
        The model, and the names of the weights that it does not bring.

    Raises:
        UserError: if there is no such model, or transformers does not know it.
    """
    path = resolve(name)
    where, local = str(path or name), path is not None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that a head is new is meant to be
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=local)
        kind = getattr(transformers, AUTO.get(str(task_type), "") or (config.architectures or ["AutoModel"])[0], None)
        if kind is None:
            raise UserError(f"model must be one that transformers has, got {config.architectures}; from {name}")
        labels = _labels(config, kind, folder) if task_type in ("SEQ_CLS", "TOKEN_CLS") else None
        if labels is not None:
            config.num_labels = labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, report = kind.from_pretrained(
                where,
                config=config,
                local_files_only=local,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=labels is not None,
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        problem = str(error).strip().splitlines()[0]
        raise UserError(f"base must be a model that transformers can load, got {problem}; from {name}") from None
    finally:
        logging.set_verbosity(verbosity)
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model, sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})


def _labels(config: PretrainedConfig, kind: Any, folder: Path) -> int | None:  # noqa: ANN401 - a class of transformers
    """Read off the adapter's head how many classes it has, where that is not what the base says."""
    with torch.device("meta"):
        state = kind.from_config(config).state_dict()
    tensors = TENSORS[next(name for name in CONFIGS if (folder / name).is_file())]
    try:
        with safe_open(folder / tensors, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                shape, name = file.get_slice(key).get_shape(), key.removeprefix("saved/").removeprefix(PREFIX)
                if name in state and shape and list(state[name].shape) != shape:
                    return int(shape[0])
    except (OSError, SafetensorError):
        return None  # the readers of adapters say what is wrong with it
    return None


@contextmanager
def _as_user_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None
