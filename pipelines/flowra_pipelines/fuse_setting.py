"""What training, running and inspecting gates share: adapters by name, their base, and the gates' folder.

``fuse.json`` beside the gates says how they came to be (docs/fusion.md): from there ``run`` and ``inspect`` know the
adapters' folders, the base and whose head is used.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flowra_compose import AdapterState, read_adapter
from flowra_compose.fusion import Fusion, Gates, OtherPositionsError, Routing, adapter_names, fuse, read_gates
from flowra_pipelines.composition import as_user_errors, task_names
from flowra_pipelines.errors import UserError
from flowra_pipelines.export import adapter_folder
from flowra_pipelines.merge_job import reader_of
from flowra_pipelines.task_statistics import bare_model
from flowra_pipelines.tasks import Batch, Task
from flowra_pipelines.whole_files import replacing

__all__ = [
    "RECORD",
    "FuseRecord",
    "FusedSetting",
    "open_fused",
    "open_gates",
    "open_setting",
    "read_record",
    "relative_to",
    "require_decoder",
    "write_record",
]

RECORD = "fuse.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedSetting:
    """A base that carries nothing yet, and the adapters that are to be fused on it."""

    model: PreTrainedModel
    """In evaluation mode, on the accelerator if there is one."""
    task: Task
    tokenizer: PreTrainedTokenizerBase
    adapters: Mapping[str, AdapterState]
    """By name, in the order of the gates' weights."""
    folders: Mapping[str, Path]
    """Of the adapters."""
    base: str
    """As it was named."""
    base_hash: str
    """Of its weights, without heads."""
    heads_from: str | None
    """Name of the adapter whose head is used; None where all agree, or none has one."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return tuple(self.adapters)

    @contextmanager
    def fused(self, routing: Routing) -> Iterator[Fusion]:
        """Within the block, have the adapters on the model.

        Yields:
            The fusion.

        Raises:
            UserError: if they do not fit it, each other or the routing, which a pass through the model may show.
        """
        with as_user_errors():
            fusion = fuse(self.model, self.adapters, routing, heads_from=self.heads_from)
        with fusion:
            try:
                yield fusion
            except OtherPositionsError as error:
                raise UserError(f"{error} Train them with --level module.") from None

    @property
    def context(self) -> int | None:
        """The number of tokens that the model has positions for; None if it does not say, or any number will do."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int) or limit < 1:
            return None
        tables = (each for name, each in self.model.named_modules() if name.endswith("position_embeddings"))
        padded = next((each.padding_idx for each in tables if isinstance(each, nn.Embedding)), None)
        return limit if padded is None else limit - padded - 1  # RoBERTa counts from there

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad examples to one batch; where they have a ``response``, 0 or 1 for each token, only 1 is a target."""
        padding = {"input_ids": int(self.tokenizer.pad_token_id or 0), "token_type_ids": 0}
        batch = self.task.collate(rows, padding)
        response = batch.pop("response", None)
        if response is not None:
            batch["labels"] = batch["labels"].masked_fill(response == 0, -100)
        return batch

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return each example's loss, its number of targets and its answer, see :class:`Task`."""
        device = next(self.model.parameters()).device
        return self.task.losses(self.model, {key: value.to(device) for key, value in batch.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class FuseRecord:
    """How gates came to be: ``fuse.json``."""

    base: str
    """Its folder, relative to that of the record, or the name that it was given by."""
    base_hash: str
    task: str
    """PEFT's name for it, such as ``CAUSAL_LM``."""
    heads_from: str | None
    adapters: tuple[Mapping[str, str], ...]
    """``name`` and ``folder``, relative to that of the record, of each."""
    settings: Mapping[str, Any]
    """All that decides the result beside the adapters, the base and the data."""
    data: Mapping[str, Any]
    """``train`` and ``validation`` as they were given, how many ``examples`` of each, and ``left_out``."""
    curve: tuple[tuple[int, float, float], ...]
    """(finished steps, loss, learning rate)."""
    losses: Mapping[str, Mapping[str, float | None]]
    """``validation``: title of a combination to its mean loss, the trained gates' being ``gates``; None where it is not
    finite. ``training``: the same of the training examples, for ``gates`` alone."""
    weights: Mapping[str, tuple[float, ...]]
    """Place of a gate to the average weight of each adapter over the validation examples."""
    versions: Mapping[str, str]


def open_setting(
    sources: Sequence[Path],
    *,
    names: Sequence[str] | None = None,
    base: str | None = None,
    heads_from: str | None = None,
) -> FusedSetting:
    """Read adapters and load their base.

    Args:
        sources: folders of adapters or of runs.
        names: one for each; by default those of the folders.
        base: model folder, ``package://NAME/path`` or Hub name; by default what the adapters say.
        heads_from: name or folder of the adapter whose head is used, where they bring different ones.

    Returns:
        The setting.

    Raises:
        UserError: if an adapter or the base cannot be read, names are not distinct, or tasks or bases differ.
    """
    if not sources:
        raise UserError("adapters must be at least one, got none. Give their folders.")
    folders = [adapter_folder(source) for source in sources]
    names = tuple(names or task_names(sources))
    if len(names) != len(folders) or len(set(names)) < len(names) or not all(each.strip() for each in names):
        raise UserError(
            f"names must be distinct and not empty, one for each of {len(folders)} adapters, got {', '.join(names)}"
        )
    chosen = None if heads_from is None else _name_of(heads_from, names, sources)
    with as_user_errors():
        reader = reader_of(base, folders)
        states = {name: read_adapter(folder, base=reader) for name, folder in zip(names, folders, strict=True)}
    kinds = {name: state.task_type for name, state in states.items()}
    if len({*kinds.values()} - {None}) > 1:
        got = ", ".join(f"{kind} of {name!r}" for name, kind in kinds.items())
        raise UserError(f"adapters must be for one kind of task, got {got}")
    if base is not None:
        states = {name: replace(state, base_model_name_or_path=base) for name, state in states.items()}
    said = {name: state.base_model_name_or_path for name, state in states.items()}
    if len({*said.values()} - {None}) > 1:
        got = ", ".join(f"{each} of {name!r}" for name, each in said.items())
        raise UserError(f"adapters must be of one base, got {got}. If it is the same in truth, name it with --base.")
    found = next((each for each in said.values() if each is not None), None)
    telling = [name for name, kind in kinds.items() if kind is not None] or [*names]
    carrier = chosen or next((name for name in telling if states[name].modules_to_save), telling[0])
    if chosen is not None and not states[chosen].modules_to_save:
        raise UserError(f"heads-from must be an adapter that brings trained modules, got {chosen}, which has none")
    folder = dict(zip(names, folders, strict=True))
    bare = bare_model(folder[carrier], base or found)
    nn.Module.to(bare.model, torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return FusedSetting(
        model=bare.model,
        task=bare.task,
        tokenizer=bare.tokenizer,
        adapters=states,
        folders=folder,
        base=str(base or found),
        base_hash=bare.base,
        heads_from=chosen,
    )


def open_gates(
    gates: Path, sources: Sequence[Path] = (), *, base: str | None = None
) -> tuple[FusedSetting, Gates, FuseRecord]:
    """Read gates, and what they were trained with.

    Args:
        gates: folder that ``flowra fuse train`` wrote.
        sources: folders of the adapters, in the order of training; by default those that ``fuse.json`` names.
        base: of the adapters; by default that of the training.

    Returns:
        Adapters and base, the gates, and how they came to be.

    Raises:
        UserError: if something is missing or damaged, or adapters or base are not those of the training.
    """
    record = read_record(gates)
    with as_user_errors():
        names = adapter_names(gates)
    recorded = [gates / each["folder"] for each in record.adapters]
    lost = [each for each in recorded if not each.is_dir()]
    if not sources and lost:
        raise UserError(
            f"adapters must be where they were at training, got no folder {lost[0]}. Name all of them after the gates."
        )
    given = [adapter_folder(source) for source in sources or recorded]
    if len(given) != len(names):
        raise UserError(f"adapters must be the {len(names)} that the gates know, {', '.join(names)}, got {len(given)}")
    local = gates / record.base
    known = str(local) if local.is_dir() else record.base
    setting = open_setting(given, names=names, base=base or known, heads_from=record.heads_from)
    if setting.base_hash != record.base_hash:
        raise UserError(
            f"base must be the one that the gates were trained on, {known}, got other weights in {setting.base}."
            " Name it with --base, or train gates for this one."
        )
    with as_user_errors():
        return setting, read_gates(gates, setting.adapters), record


@contextmanager
def open_fused(
    gates: Path, sources: Sequence[Path] = (), *, base: str | None = None
) -> Iterator[tuple[FusedSetting, Fusion, FuseRecord]]:
    """Within the block, have the base with its adapters and trained gates, see :func:`open_gates`.

    Yields:
        The setting, the fusion on its model, and how the gates came to be.

    Raises:
        UserError: as :func:`open_gates` does.
    """
    setting, routing, record = open_gates(gates, sources, base=base)
    with setting.fused(routing) as fusion:
        yield setting, fusion, record


def require_decoder(setting: FusedSetting) -> None:
    """Refuse a model that cannot write.

    Raises:
        UserError: if the adapters' task is another.
    """
    if setting.task.peft_type != "CAUSAL_LM":
        raise UserError(f"adapters must be of a causal language model to write text, got {setting.task.peft_type}")


def relative_to(folder: Path, gates: Path) -> str:
    """Return where a folder lies, seen from the gates, so that both can be moved together."""
    return Path(os.path.relpath(folder.resolve(), gates.resolve())).as_posix()


def write_record(record: FuseRecord, folder: Path) -> None:
    """Write ``fuse.json``; equal records give equal bytes."""
    content = {"format_version": FORMAT_VERSION, **{key: getattr(record, key) for key in FuseRecord.__slots__}}
    with replacing(folder / RECORD) as (file,):
        file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_record(folder: Path) -> FuseRecord:
    """Read what :func:`write_record` wrote.

    Returns:
        The record.

    Raises:
        UserError: if it is missing, damaged or of another version.
    """
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        found = content.pop("format_version")
        record = TypeAdapter(FuseRecord).validate_json(json.dumps(content), strict=True)
        problem = _problem(found, record, content.keys() - set(FuseRecord.__slots__))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    if problem is not None:
        raise UserError(f"gates must be a folder that flowra fuse train wrote, got {problem}; in {folder}")
    return record


def _problem(version: object, record: FuseRecord, unknown: set[str]) -> str | None:
    """Say what types do not say of a record; None if all is well."""
    if unknown:
        return f"the unknown key {min(unknown)!r}"
    longest = record.settings.get("max_length")
    if type(version) is not int or version != FORMAT_VERSION:
        return f"format_version {version!r} where it must be {FORMAT_VERSION}"
    if type(longest) is not int or longest < 2:
        return f"settings with a max_length of {longest!r}"
    if not all(each.keys() == {"name", "folder"} for each in record.adapters):
        return "adapters without name and folder"
    return None


def _name_of(wanted: str, names: Sequence[str], sources: Sequence[Path]) -> str:
    """Return the name of the adapter that is meant, by its name or its folder."""
    for name, source in zip(names, sources, strict=True):
        if wanted == name or Path(wanted).resolve() == source.resolve():
            return name
    raise UserError(f"heads-from must be one of the adapters, {', '.join(names)}, got {wanted}")
