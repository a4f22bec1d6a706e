"""Folders of adapters become one folder, one module at a time; a merge that was stopped goes on where it was."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch

from flowra_compose.base_weights import Base, base_value
from flowra_compose.fingerprints import fingerprint
from flowra_compose.low_rank import AdapterState
from flowra_compose.merge import merged_frame
from flowra_compose.merging import merged_modules
from flowra_compose.module_updates import Weight
from flowra_compose.options import MergeOptions
from flowra_compose.partial_merge import PartialMerge
from flowra_compose.peft_files import CONFIG_NAME, TENSORS_NAME
from flowra_compose.peft_reader import FileUpdates, read_adapter
from flowra_compose.peft_writer import PeftForm, write_adapter
from flowra_compose.statistics import ModuleStatistics
from flowra_compose.truncation import Truncation

__all__ = ["MergedFolder", "merge_folders"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MergedFolder(AdapterState):
    """The adapter that a merge has written, each update read when it is asked for."""

    relative_losses: Mapping[str, float] = field(default_factory=dict)
    """For each update that was truncated, ‖ΔW - ΔW_r‖² / ‖ΔW‖² as its truncation told."""


@torch.no_grad()
def merge_folders(
    folders: Sequence[str | Path],
    weights: Sequence[Weight],
    out: str | Path,
    *,
    rule: str = "cat",
    options: MergeOptions | None = None,
    truncation: Truncation | None = None,
    statistics: Sequence[Mapping[str, ModuleStatistics]] | None = None,
    heads_from: int | None = None,
    base: Base | None = None,
    base_model_name_or_path: str | None = None,
    on_module: Callable[[str, int, int], None] | None = None,
    beside: Callable[["MergedFolder", Path], None] | None = None,
) -> MergedFolder:
    """Merge adapters in PEFT's format into one, holding one module at a time. See :func:`merge_adapters`.

    What is done lies in ``<out>.partial`` until all of it is. If the process is killed, the same call goes on from
    there and gives the same bytes on the same machine: same files, weights, rule, options, statistics, base and
    versions, which a fingerprint tells; what another call has left is removed. If inputs are refused, nothing stays.

    Args:
        folders: at least one folder, see :func:`read_adapter`. They must stay as they are meanwhile.
        weights: one for each folder.
        out: folder to write, none of the inputs; an adapter in it is replaced when the merge is complete.
        rule: as for :func:`merge_adapters`.
        options: as for :func:`merge_adapters`.
        truncation: as for :func:`merge_adapters`.
        statistics: as for :func:`merge_adapters`; a mapping may read from files when it is asked. All of it is read
            once for the fingerprint.
        heads_from: as for :func:`merge_adapters`.
        base: the parameters of the base, where an input or what is written needs them, see :func:`read_adapter` and
            :func:`write_adapter`.
        base_model_name_or_path: of the base, where the folders call the same one by different names.
        on_module: called with a module's name, the number of modules done and of all when one has been written.
        beside: called once with what was merged and a folder, before the result is moved to ``out``. The files that it
            writes there are moved with it: ``out`` never holds those of one merge beside the adapter of another.

    Returns:
        What was written, with the loss of each truncation; zeros that PEFT's form wants of other biases are left out.

    Raises:
        ValueError: if a folder is refused by :func:`read_adapter`, ``out`` is one of them, the adapters cannot be
            merged, or PEFT has no word for the result (:func:`write_adapter`).
    """
    out = Path(out)
    if out.resolve() in {Path(folder).resolve() for folder in folders}:
        raise ValueError(f"out must be a folder of its own, got {out}, which is an input. Choose another.")
    adapters = [read_adapter(folder, base) for folder in folders]
    if base_model_name_or_path is not None:
        adapters = [replace(one, base_model_name_or_path=base_model_name_or_path) for one in adapters]
    labels = [str(folder) for folder in folders]
    frame = merged_frame(adapters, weights, labels, rule, options, truncation, heads_from)
    form = PeftForm.of(frame.updates, base)  # refuses before the work what it cannot write
    names = sorted(frame.updates)
    files = [Path(folder) / name for folder in folders for name in (CONFIG_NAME, TENSORS_NAME)]
    known = fingerprint(
        [version("flowra-compose"), torch.__version__, rule],
        files,
        weights,
        [options or MergeOptions(), truncation, statistics, heads_from, base_model_name_or_path],
        _of_base(adapters, form, base),
    )
    partial = PartialMerge(out, known, names)
    try:
        made = merged_modules(
            [one.updates for one in adapters],
            weights,
            rule=rule,
            options=options,
            truncation=truncation,
            statistics=statistics,
            done=frozenset(partial),
        )
        for name, update in made:
            partial.add(name, update)
            if on_module is not None:
                on_module(name, len(partial), len(names))
        partial.clear_adapter()
        write_adapter(replace(frame, updates=partial), partial.adapter, base)
        losses = partial.relative_losses
        if beside is not None:
            beside(_written(partial.adapter, base, names, losses), partial.adapter)
    except ValueError:
        partial.discard()
        raise
    partial.finish()
    return _written(out, base, names, losses)


def _written(folder: Path, base: Base | None, names: Collection[str], losses: Mapping[str, float]) -> MergedFolder:
    """Open a merged adapter; of its updates those that were merged."""
    written = read_adapter(folder, base)
    assert isinstance(written.updates, FileUpdates)
    return MergedFolder(
        updates=written.updates.only(names),
        modules_to_save=written.modules_to_save,
        trained_modules=written.trained_modules,
        base_model_name_or_path=written.base_model_name_or_path,
        task_type=written.task_type,
        fan_in_fan_out=written.fan_in_fan_out,
        relative_losses=losses,
    )


def _of_base(adapters: Sequence[AdapterState], form: PeftForm, base: Base | None) -> list[tuple[str, str]]:
    """Return the fingerprint of each parameter of the base that the merge depends on."""
    needed = {name for one in adapters if isinstance(one.updates, FileUpdates) for name in one.updates.needed_of_base}
    if form.biases == "all":
        needed |= {name for name, layout in form.layouts.items() if layout == "vector"}
    return [(name, fingerprint(base_value(base, name))) for name in sorted(needed)]
