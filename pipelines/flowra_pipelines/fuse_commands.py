"""``flowra fuse``: many adapters on one model, weighed at every token by small gates. Imports nothing heavy early."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flowra_pipelines.errors import UserError
from flowra_pipelines.fuse_inspect import INSPECT, inspect
from flowra_pipelines.one_stage import quiet

__all__ = ["app"]

app = typer.Typer(
    name="fuse",
    help="Weigh adapters anew at every token, by small gates that are trained on a few examples.",
    no_args_is_help=True,
)

LARGEST_SEED = 2**63 - 1

TRAIN = """Train gates: small maps that look at the text so far, and say at every token how much each adapter counts.

Base and adapters stay as they are; ranks and layers of the adapters may differ. About 200 examples that need all of
them are enough. Where each input needs one mix, the same from its first token to its last, flowra merge does. Printed
is the loss on held-out examples of the base, each adapter alone, their mean, their sum, with --fixed-trials the best
fixed weights, and the gates. The same command continues a training that was killed.

\b
flowra fuse train runs/a runs/b --data both.jsonl --out gates
flowra fuse train language/ task/ --data both.csv:question,answer --out gates --level step
flowra fuse train a/ b/ c/ --data both.jsonl --out gates --initial uniform --top-k 2 --validation held-out.jsonl
"""

RUN = """Write text with gates: cached, in batches, greedy unless told otherwise.

The adapters are found where they were at training, or named after the gates, in the same order. --static weighs them
alike at every token instead; then the gates may be left out.

\b
flowra fuse run gates --prompt 'def mean(numbers):'
flowra fuse run gates a/ b/ --prompts prompts.jsonl:question --out written.jsonl --max-new-tokens 256 --beams 4
flowra fuse run a/ b/ --static 0.5,0.5 --prompt 'def mean(numbers):'
"""

Adapters = Annotated[
    list[Path],
    typer.Argument(metavar="ADAPTER...", help="Folders of adapters or runs, on one base.", show_default=False),
]
Base = Annotated[
    str | None,
    typer.Option(help="Folder, package://NAME/path or Hub name; by default what the adapters say.", show_default=False),
]
HeadsFrom = Annotated[
    str | None,
    typer.Option(metavar="ADAPTER", help="Whose head is used, if they bring different ones.", show_default=False),
]


@app.command(help=TRAIN)
def train(
    adapters: Adapters,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE[:COLUMN[,COLUMN]]",
            help="Examples: text in the column `text`, or in this; with two columns of a language model, prompt and"
            " response, of which the response is learned.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write.", show_default=False)],
    base: Base = None,
    names: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME,…", help="Of the adapters; by default their folders'.", show_default=False),
    ] = None,
    heads_from: HeadsFrom = None,
    level: Annotated[
        Literal["layer", "step", "module"],
        typer.Option(help="A gate for each layer, one for all, or one for each module.", rich_help_panel="Gates"),
    ] = "layer",
    initial: Annotated[
        Literal["primary", "uniform"],
        typer.Option(help="At the start one adapter alone, or all alike.", rich_help_panel="Gates"),
    ] = "primary",
    primary: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="That one; by default the last.", show_default=False, rich_help_panel="Gates"
        ),
    ] = None,
    gate_input: Annotated[
        Literal["residual", "normed"],
        typer.Option(help="What a gate sees, as it is or divided by its root mean square.", rich_help_panel="Gates"),
    ] = "residual",
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Of a gate; by default full.", show_default=False, rich_help_panel="Gates"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Adapters that count at a token; by default all.", show_default=False, rich_help_panel="Gates"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the softmax.", rich_help_panel="Gates")] = 1.0,
    validation: Annotated[
        str,
        typer.Option(
            metavar="FILE|SHARE",
            help="Held-out examples in columns of the same names, or the share of --data.",
            rich_help_panel="Training",
        ),
    ] = "0.2",
    label: Annotated[
        str, typer.Option(help="Of a classifier or regression: the column.", rich_help_panel="Training")
    ] = "label",
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…",
            help="Its classes, in the order of the head.",
            show_default=False,
            rich_help_panel="Training",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples.", rich_help_panel="Training")] = 5,
    steps: Annotated[
        int | None,
        typer.Option(min=10, help="Steps, instead of epochs.", show_default=False, rich_help_panel="Training"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at a time.", rich_help_panel="Training")] = 4,
    learning_rate: Annotated[float, typer.Option(help="At its peak.", rich_help_panel="Training")] = 1e-3,
    bias_learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Of the gates' biases; by default ten times as high.", show_default=False, rich_help_panel="Training"
        ),
    ] = None,
    entropy_penalty: Annotated[
        float, typer.Option(min=0.0, help="Times the gates' entropy: they decide.", rich_help_panel="Training")
    ] = 0.0,
    fixed_trials: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also search the best fixed weights, in so many trials (24 for two adapters): what gates should beat.",
            rich_help_panel="Training",
        ),
    ] = 0,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of an example; longer ones are cut.", rich_help_panel="Training")
    ] = 512,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of the order of examples.", rich_help_panel="Training")
    ] = 0,
) -> None:
    """See ``TRAIN``."""
    quiet()
    from flowra_pipelines.fuse_training import FuseJob, TrainSettings, show_training

    settings = TrainSettings(
        level=level,
        initial=initial,
        primary=primary,
        gate_input=gate_input,
        rank=rank,
        top_k=top_k,
        temperature=temperature,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        bias_learning_rate=bias_learning_rate,
        entropy_penalty=entropy_penalty,
        fixed_trials=fixed_trials,
        max_length=max_length,
        seed=seed,
    )
    job = FuseJob(
        sources=tuple(adapters),
        data=data,
        out=out,
        names=_parts(names),
        base=base,
        heads_from=heads_from,
        validation=_share_or_file(validation),
        label=label,
        labels=_parts(labels),
        settings=settings,
    )
    show_training(job)


@app.command(help=RUN)
def run(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="GATES [ADAPTER...]",
            help="Folder of flowra fuse train; then the adapters, if they have moved.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to go on from. Repeatable.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:COLUMN]",
            help="A .txt file with one a line, or a table with the column `prompt`.",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
    heads_from: HeadsFrom = None,
    static: Annotated[
        str | None,
        typer.Option(metavar="W,W,…", help="The same weights at every token, one for each.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    beams: Annotated[int, typer.Option(min=1, help="Of a beam search.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of sampling.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Write lines with prompt and text there.", show_default=False),
    ] = None,
) -> None:
    """See ``RUN``."""
    if (prompt is None) == (prompts is None):
        raise UserError("prompts must be given, by --prompt TEXT or by --prompts FILE, and not by both")
    weights = _weights(static)
    quiet()
    from flowra_pipelines.fuse_generation import GenerationSettings, read_prompts, show_generation

    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, beams=beams, batch_size=batch_size, seed=seed
    )
    texts = prompt if prompts is None else read_prompts(prompts)
    show_generation(sources, texts or [], settings, base=base, static=weights, heads_from=heads_from, out=out)


app.command(help=INSPECT)(inspect)


def _parts(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(each.strip() for each in text.split(","))


def _share_or_file(text: str) -> str | float:
    """Read what is held out."""
    try:
        share = float(text)
    except ValueError:
        return text
    if not 0 < share < 1:
        raise UserError(f"validation must be a file, or a share between 0 and 1, got {text}")
    return share


def _weights(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(each) for each in text.split(","))
    except ValueError:
        raise UserError(
            f"static must be numbers with commas between, got {text!r}. Example: --static 0.5,0.5"
        ) from None
