"""``flowra fuse inspect``: the command. Imports nothing heavy early."""

from pathlib import Path
from typing import Annotated

import typer

from flowra_pipelines.one_stage import quiet

__all__ = ["INSPECT", "inspect"]

INSPECT = """Look at gates: how they weigh the adapters at each token of texts and in each layer, and what went wrong.

Writes inspection.json, a page that needs nothing else (inspection.html), and two pictures: weights.png, tokens by
layers for each adapter, and layers.png, the average weight by layer with its spread. Warned of are gates that have not
moved, weights that are the same for all tokens or in all layers, tokens at which nothing decides, saturated gates,
weights out of range, and gaps between training and validation.

\b
flowra fuse inspect gates --text "def area(r): ..." --text "Write a haiku."
flowra fuse inspect gates --data test.csv:prompt,response --examples 64
flowra fuse inspect gates math/ zh/ --data train.csv --validation-data test.csv --out looked-at
"""


def inspect(
    gates: Annotated[Path, typer.Argument(help="Folder that flowra fuse train wrote.", show_default=False)],
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[ADAPTER]...",
            help="Those of the training, in their order; by default from where they were then.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to look at. Repeatable.", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:COLUMN[,COLUMN]]",
            help="Texts in the column `text`, or in these.",
            show_default=False,
        ),
    ] = None,
    validation_data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:COLUMN[,COLUMN]]",
            help="Others, to compare their weights with those of --data.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder, package://NAME/path or Hub name; by default that of the training.", show_default=False
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Texts that are taken of a file.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 8,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write.")] = Path("inspection"),
) -> None:
    """See ``INSPECT``."""
    quiet()
    from flowra_pipelines.fuse_inspection import InspectionJob, show_inspection

    job = InspectionJob(
        gates=gates,
        sources=tuple(adapters or ()),
        texts=tuple(text or ()),
        data=data,
        validation_data=validation_data,
        base=base,
        examples=examples,
        batch_size=batch_size,
        out=out,
    )
    show_inspection(job)
