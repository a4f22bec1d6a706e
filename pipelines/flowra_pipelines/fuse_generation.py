"""``flowra fuse run``: text from a model with gates, or fixed weights, over its adapters; with a cache, in batches."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from flowra_compose.fusion import Routing, StaticWeights
from flowra_compose.fusion.gate_files import FILES
from flowra_pipelines.composition import as_user_errors
from flowra_pipelines.data import read_columns
from flowra_pipelines.errors import UserError
from flowra_pipelines.fuse_setting import FusedSetting, open_gates, open_setting, require_decoder
from flowra_pipelines.progress import console, meter
from flowra_pipelines.task_statistics import data_source
from flowra_pipelines.whole_files import replacing

__all__ = ["GenerationSettings", "check_prompts", "generate", "read_prompts", "show_generation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """How text is written."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """Of sampling; 0 takes the likeliest token."""
    beams: int = 1
    batch_size: int = 8
    """Prompts at a time."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self) -> None:
        """Check the temperature: of a smaller one logits overflow."""
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:
            raise UserError(f"temperature must be 0, for the likeliest token, or 0.01 to 100, got {self.temperature}")


def generate(setting: FusedSetting, prompts: Sequence[str], settings: GenerationSettings) -> list[str]:
    """Let a fused model go on from prompts.

    Args:
        setting: whose model is fused now.
        prompts: texts.
        settings: how.

    Returns:
        What comes after each prompt, special tokens left out.

    Raises:
        UserError: if the model is no decoder, or a prompt is empty or too long.
    """
    encoded = check_prompts(setting, prompts, settings.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    model: Any = setting.model  # what writes is a mixin of it
    own, tokenizer = model.generation_config, setting.tokenizer
    sampled = settings.temperature > 0
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.beams,
        do_sample=sampled,
        **({"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if sampled else {}),
        pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id if own is None or own.eos_token_id is None else own.eos_token_id,
    )
    device = next(setting.model.parameters()).device
    found: dict[int, str] = {}
    with meter("generation", len(prompts)) as progress, torch.random.fork_rng(), _without_defaults(model):
        torch.manual_seed(settings.seed)
        for start in range(0, len(order), settings.batch_size):
            chosen = order[start : start + settings.batch_size]
            ids, mask = _padded([encoded[index] for index in chosen], filler=config.pad_token_id)
            written = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
            after = written[:, ids.shape[1] :]
            found |= zip(chosen, tokenizer.batch_decode(after, skip_special_tokens=True), strict=True)
            progress.advance(len(chosen))
    return [found[index] for index in range(len(prompts))]


def _padded(rows: Sequence[Sequence[int]], *, filler: int) -> tuple[Tensor, Tensor]:
    """Pad rows of ids to the left, ``(rows, positions)``; the mask is 0 at padding."""
    ids = torch.full((len(rows), max(map(len, rows))), filler)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, -len(row) :] = torch.tensor(row)
        mask[index, -len(row) :] = 1
    return ids, mask


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:  # noqa: ANN401 - see above
    """Leave out what the base's authors like, such as a penalty for repetition: greedy is greedy."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def check_prompts(setting: FusedSetting, prompts: Sequence[str], new_tokens: int) -> list[list[int]]:
    """Tokenise prompts, and see whether the model can go on from them.

    Args:
        setting: model and tokenizer.
        prompts: texts.
        new_tokens: how many are to come.

    Returns:
        The ids of each.

    Raises:
        UserError: if the model is no decoder, or a prompt is empty or too long.
    """
    require_decoder(setting)
    if not prompts:
        raise UserError("prompts must be at least one, got none. Give --prompt TEXT or --prompts FILE.")
    empty = [index for index, text in enumerate(prompts) if not text.strip()]
    if empty:
        raise UserError(f"prompts must hold text, got an empty one, number {empty[0] + 1} of {len(prompts)}")
    encoded: list[list[int]] = setting.tokenizer(list(prompts), verbose=False)["input_ids"]
    limit = setting.context
    for index, ids in enumerate(encoded):
        if not ids:
            raise UserError(f"prompts must hold tokens, got none in number {index + 1}, {prompts[index]!r}")
        if limit is not None and len(ids) + new_tokens > limit:
            raise UserError(
                f"prompts must leave room in the model's {limit} positions for {new_tokens} new tokens, got {len(ids)}"
                f" tokens in number {index + 1}. Shorten it, or lower --max-new-tokens."
            )
    return encoded


def read_prompts(source: str) -> list[str]:
    """Read prompts: the lines of a text file, or a column of a table, ``FILE[:COLUMN]``, by default ``prompt``.

    Returns:
        The prompts.

    Raises:
        UserError: if there is no such file or column, or what is there is no text.
    """
    if Path(source).suffix == ".txt":
        try:
            lines = Path(source).expanduser().read_text(encoding="utf-8-sig").split("\n")
            return lines[:-1] if lines[-1] == "" else lines  # what ends a line begins none
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompts must be a readable file, got {error}") from None
    data = data_source(source)
    column = "prompt" if data.train == source else data.text
    values = read_columns(data.train, data.train_split, {"prompt": column})["prompt"]
    strange = next((value for value in values if not isinstance(value, str)), None)
    if strange is not None:
        raise UserError(f"column {column!r} must hold text, got {strange!r}; in {data.train}")
    return values


def show_generation(
    sources: Sequence[Path],
    prompts: Sequence[str],
    settings: GenerationSettings,
    *,
    base: str | None,
    static: tuple[float, ...] | None,
    heads_from: str | None,
    out: Path | None,
) -> None:
    """Write text for prompts, to the screen or to a file.

    Args:
        sources: the gates' folder and perhaps the adapters'; with ``static`` the former may be missing.
        prompts: texts.
        settings: how.
        base: of the adapters; by default that of the training, or what they say.
        static: weights that replace the gates.
        heads_from: name or folder of the adapter whose trained modules are used, where there are no gates to say so.
        out: file of JSON lines with ``prompt`` and ``text``.

    Raises:
        UserError: for what the user can put right.
    """
    if out is not None and out.is_dir():
        raise UserError(f"out must be a file of JSON lines, got the folder {out}")
    routing: Routing | None = None
    if static is None or (sources[0] / FILES[1]).is_file():
        if heads_from is not None:
            raise UserError(f"heads-from must be left out with gates, got {heads_from}: they know whose head is used")
        setting, routing, _ = open_gates(sources[0], sources[1:], base=base)
    else:
        setting = open_setting(sources, base=base, heads_from=heads_from)
    check_prompts(setting, prompts, settings.max_new_tokens)
    with as_user_errors():
        used = StaticWeights(static) if static is not None else routing
    assert used is not None
    with setting.fused(used):
        texts = generate(setting, prompts, settings)
    if out is None:
        for prompt, text in zip(prompts, texts, strict=True):
            console.print(f"[bold]{'—' * 3}[/bold]")
            for each in (prompt, text):  # as it is: code is no markup, and a tab no spaces
                console.file.write(f"{each}\n")
        return
    lines = [
        json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    with replacing(out) as (file,):
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"Written: {out}, {len(lines)} texts", markup=False)
