"""What ``flowra fuse inspect`` does: run texts through fused adapters, sum up the weights, write and print them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowra_compose.fusion import (
    FailureSign,
    Fusion,
    GateInspection,
    Gates,
    TextWeights,
    WeightSummary,
    failure_signs,
    loss_gap_warning,
    weight_gap_warning,
    weights_of_texts,
)
from flowra_pipelines.data import read_columns
from flowra_pipelines.errors import UserError
from flowra_pipelines.fuse_setting import FusedSetting, FuseRecord, open_gates
from flowra_pipelines.fusion_figures import layer_means, weight_maps
from flowra_pipelines.merge_job import check_out
from flowra_pipelines.profile_commands import printable
from flowra_pipelines.progress import console, meter
from flowra_pipelines.report_fusion import fusion_page
from flowra_pipelines.task_statistics import data_source
from flowra_pipelines.training import data_order
from flowra_pipelines.whole_files import replacing

__all__ = [
    "FILES",
    "Inspected",
    "InspectionJob",
    "inspect_gates",
    "inspection_content",
    "pieces",
    "show_inspection",
    "write_inspection",
]

FILES = ("inspection.json", "inspection.html", "weights.png", "layers.png")
FORMAT_VERSION = 1
DPI = 160
SHOWN_OF_DATA = 4
"""Texts of a file that are kept token by token; all of --text are."""
DIGITS = 5
"""Decimals of weights in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectionJob:
    """What is to be looked at; the arguments of ``flowra fuse inspect``."""

    gates: Path
    """Folder that ``flowra fuse train`` wrote."""
    sources: tuple[Path, ...] = ()
    """Folders of the adapters; by default those that the gates remember."""
    texts: tuple[str, ...] = ()
    data: str | None = None
    """``FILE[:COLUMN[,COLUMN]]``."""
    validation_data: str | None = None
    base: str | None = None
    examples: int = 64
    """Texts that are taken of a file, at random with seed 0."""
    batch_size: int = 8
    out: Path = Path("inspection")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspected:
    """What was seen."""

    inspection: GateInspection
    """Of all texts: those given, then those of the data."""
    validation: GateInspection | None
    signs: tuple[FailureSign, ...]
    shown: int
    """How many of the first texts are shown token by token."""
    cut: int
    """How many texts were cut to the length of the training."""
    length: int
    """That length, in tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoded:
    """A text as the model reads it, and each token as people do."""

    inputs: Mapping[str, Sequence[int]]
    tokens: tuple[str, ...]
    cut: bool


def inspect_gates(job: InspectionJob) -> Inspected:
    """Run texts through the fused adapters and look at the weights.

    Args:
        job: what is asked for.

    Returns:
        What was seen.

    Raises:
        UserError: for what the user can put right.
    """
    if not job.texts and job.data is None:
        raise UserError("texts must be at least one, got none. Give --text TEXT or --data FILE.")
    if job.validation_data is not None and job.data is None:
        raise UserError("validation-data must be compared with --data, got none. Give both.")
    check_out(job.out, [job.gates], FILES)
    setting, gates, record = open_gates(job.gates, job.sources, base=job.base)
    length = _length(setting, record)
    given = [_encoded((text,), setting, length) for text in job.texts]
    for text, each in zip(job.texts, given, strict=True):
        if not each.tokens:
            raise UserError(f"text must hold tokens, got none in {text!r}")
    drawn = [] if job.data is None else _drawn(job.data, setting, length, job.examples)
    others = [] if job.validation_data is None else _drawn(job.validation_data, setting, length, job.examples)
    with setting.fused(gates) as fusion:
        seen = _seen(setting, gates, fusion, [*given, *drawn], job.batch_size)
        validation = _seen(setting, gates, fusion, others, job.batch_size) if others else None
    signs = failure_signs(seen)
    if validation is not None:
        of_data = GateInspection(
            adapters=seen.adapters,
            level=seen.level,
            places=seen.places,
            texts=seen.texts[len(given) :],
            options=seen.options,
        )
        signs += filter(None, [weight_gap_warning(of_data, validation)])
    losses = [record.losses.get(part, {}).get("gates") for part in ("training", "validation")]
    if losses[0] is not None and losses[1] is not None:
        signs += filter(None, [loss_gap_warning(losses[0], losses[1])])
    return Inspected(
        inspection=seen,
        validation=validation,
        signs=tuple(signs),
        shown=min(len(seen.texts), len(given) + SHOWN_OF_DATA),
        cut=sum(each.cut for each in [*given, *drawn, *others]),
        length=length,
    )


def show_inspection(job: InspectionJob) -> None:
    """Look at gates, write the files and print averages and warnings.

    Raises:
        UserError: for what the user can put right.
    """
    found = inspect_gates(job)
    write_inspection(found, job.out, title=job.gates.resolve().name)
    seen = found.inspection
    if seen.level != "step":
        console.print(_table(seen.by_layer(), seen.adapters), soft_wrap=False)
    means = ", ".join(
        f"{printable(name)} {mean:.3f} ± {spread:.3f}"
        for name, mean, spread in zip(seen.adapters, seen.mean(), seen.spread_over_tokens(), strict=True)
    )
    console.print(f"Average weight and spread over tokens: {means}", markup=False)
    console.print(f"{len(seen.texts)} texts, {seen.positions} tokens, {len(seen.places)} gates of level {seen.level}")
    if found.cut:
        console.print(f"{found.cut} texts were cut to the {found.length} tokens of the training")
    for sign in found.signs:
        console.print(Text.assemble((f"Warning, {sign.kind}: ", "yellow"), _plain(sign.found)))
        console.print(Text(f"  {_plain(sign.advice)}"))
    if not found.signs:
        console.print("No sign of failed training.")
    console.print(f"Written: {job.out}", markup=False)


def write_inspection(found: Inspected, folder: Path, *, title: str) -> None:
    """Write ``inspection.json``, the page and the pictures, all or none."""
    texts = found.inspection.texts[: found.shown]
    with replacing(*(folder / name for name in FILES)) as (data, page, weights, layers):
        data.write_text(json.dumps(inspection_content(found), allow_nan=False) + "\n", encoding="utf-8")
        page.write_text(fusion_page(found.inspection, texts, found.signs, title=title), encoding="utf-8")
        weight_maps(found.inspection, texts).savefig(weights, format="png", dpi=DPI)
        layer_means(found.inspection).savefig(layers, format="png", dpi=DPI)


def inspection_content(found: Inspected) -> dict[str, Any]:
    """Say in plain values what was seen: ``inspection.json``."""
    seen = found.inspection
    return {
        "format_version": FORMAT_VERSION,
        "adapters": list(seen.adapters),
        "level": seen.level,
        "seen": _sums(seen),
        "validation": None if found.validation is None else _sums(found.validation),
        "signs": [asdict(sign) for sign in found.signs],
        "places": list(seen.places),
        "texts": [
            _text(text, ambiguous)
            for text, ambiguous in zip(seen.texts[: found.shown], seen.ambiguous()[: found.shown], strict=True)
        ],
    }


def _sums(seen: GateInspection) -> dict[str, Any]:
    return {
        "texts": len(seen.texts),
        "tokens": seen.positions,
        "mean": list(seen.mean()),
        "spread_over_tokens": list(seen.spread_over_tokens()),
        "spread_over_places": list(seen.spread_over_places()),
        "layers": [asdict(each) for each in seen.by_layer()],
        "places": [asdict(each) for each in seen.by_place()],
    }


def _text(text: TextWeights, ambiguous: Tensor) -> dict[str, Any]:
    weights = [[[round(each, DIGITS) for each in token] for token in place] for place in text.weights.tolist()]
    return {"tokens": list(text.tokens), "ambiguous": ambiguous.nonzero()[:, 0].tolist(), "weights": weights}


# texts


def _length(setting: FusedSetting, record: FuseRecord) -> int:
    """Return how many tokens of a text are read: as many as in training, where the context has room."""
    trained = int(record.settings["max_length"])
    return min(trained, setting.context or trained)


def _drawn(source: str, setting: FusedSetting, length: int, examples: int) -> list[_Encoded]:
    """Draw texts of a file; rows without text are left out."""
    data = data_source(source)
    columns = [data.text] if data.text_pair is None else [data.text, data.text_pair]
    found = read_columns(data.train, data.train_split, {column: column for column in columns})
    rows = [row for row in zip(*found.values(), strict=True) if all(isinstance(each, str) and each for each in row)]
    order = data_order(len(rows), needed=min(examples, len(rows)), seed=0) if rows else []
    encoded = [_encoded(rows[index], setting, length) for index in order]
    kept = [each for each in encoded if each.tokens]
    if not kept:
        raise UserError(f"data must hold rows of text, got none in column {' and '.join(columns)}; in {data.train}")
    return kept


def _encoded(row: Sequence[str], setting: FusedSetting, length: int) -> _Encoded:
    """Tokenise a text, or two as the task puts them: for a language model the second goes on from the first."""
    tokenizer = setting.tokenizer
    if setting.task.peft_type == "CAUSAL_LM":
        ids: list[int] = []
        tokens: list[str] = []
        for part, text in enumerate(row):
            coded = tokenizer(
                text, add_special_tokens=part == 0, return_offsets_mapping=tokenizer.is_fast, verbose=False
            )
            ids += coded["input_ids"]
            tokens += pieces(coded, (text,), tokenizer)
        if len(row) > 1 and tokenizer.eos_token_id is not None:  # as in training
            ids.append(tokenizer.eos_token_id)
            tokens.append(str(tokenizer.eos_token))
        inputs = {"input_ids": ids[:length]}
        return _Encoded(inputs=inputs, tokens=tuple(tokens[:length]), cut=len(ids) > length)
    coded = tokenizer(*row, truncation=True, max_length=length, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    whole = len(tokenizer(*row, verbose=False)["input_ids"])
    kept = {key: coded[key] for key in ("input_ids", "token_type_ids") if key in coded}
    return _Encoded(inputs=kept, tokens=tuple(pieces(coded, row, tokenizer)), cut=whole > length)


def pieces(
    coded: Any,  # noqa: ANN401 - of transformers
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """Return what each token stands for in its text, with the space before it; special tokens by their name."""
    names = [str(each) for each in tokenizer.convert_ids_to_tokens(coded["input_ids"])]
    if "offset_mapping" not in coded:
        return names
    ends = [0] * len(texts)
    found = []
    for name, (start, end), which in zip(names, coded["offset_mapping"], coded.sequence_ids(0), strict=True):
        if which is None or end <= start:
            found.append(name)
            continue
        found.append(texts[which][ends[which] : end] or "…")  # a character of several tokens stands at the first
        ends[which] = max(ends[which], end)
    return found


def _seen(
    setting: FusedSetting, gates: Gates, fusion: Fusion, texts: Sequence[_Encoded], batch_size: int
) -> GateInspection:
    """Run texts through the model, those of about the same length together."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].tokens))
    found: dict[int, TextWeights] = {}
    places: tuple[str, ...] = ()
    with meter("inspection", len(texts)) as progress:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = _padded([texts[index].inputs for index in chosen], setting)
            with torch.no_grad(), fusion.recording() as record:
                setting.model(**batch)
            tokens = [texts[index].tokens for index in chosen]
            try:
                weights = weights_of_texts(record, tokens, batch["attention_mask"])
            except ValueError as error:
                raise UserError(f"{error}. Only models whose gates all see the same positions are shown.") from None
            found |= zip(chosen, weights, strict=True)
            places = tuple(record.weights)
            progress.advance(len(chosen))
    return GateInspection(
        adapters=setting.names,
        level=gates.level,
        places=places,
        texts=tuple(found[index] for index in range(len(texts))),
        options=gates.options,
    )


def _padded(rows: Sequence[Mapping[str, Sequence[int]]], setting: FusedSetting) -> dict[str, Tensor]:
    """Make one batch, padded at the end."""
    device = next(setting.model.parameters()).device
    longest = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": int(setting.tokenizer.pad_token_id or 0), "token_type_ids": 0}
    batch = {
        key: torch.tensor([[*row[key], *[padding[key]] * (longest - len(row[key]))] for row in rows]) for key in rows[0]
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return {key: value.to(device) for key, value in batch.items()}


# the terminal


def _table(layers: Sequence[WeightSummary], adapters: Sequence[str]) -> Table:
    table = Table(title="Average weight by layer ± spread", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in adapters:
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    for each in layers:
        cells = (f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(each.mean, each.spread, strict=True))
        table.add_row(Text(printable(each.name)), *cells)
    return table


def _plain(text: str) -> str:
    """Write what does not print as escapes, of a text of any length."""
    return "".join(map(printable, text))
