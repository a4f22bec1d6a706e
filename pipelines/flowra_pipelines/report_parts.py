"""What every section of a report's page is made of: tables, and pictures as SVG whose ink is the page's."""

import io
import re
from collections.abc import Iterable, Sequence
from html import escape

import matplotlib as mpl
from matplotlib.figure import Figure

from flowra_pipelines import figure_style

__all__ = ["picture", "table"]

PIXELS = 1.25
"""Of the page for each point of a picture, at most; nine tenths of a point at least, below that it scrolls."""
VARIABLES = {
    figure_style.INK: "var(--ink)",
    figure_style.FAINT: "var(--faint)",
    figure_style.GAP: "var(--card)",
}
"""What the page colours as it is light or dark."""
NAMES = ("module", "type", "estimator")
"""Headings of columns that wrap nowhere and stand to the left."""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, wrap: bool = False) -> str:
    """Write a table; names to the left, all else to the right unless it wraps. Everything is escaped."""
    classes = ["text" if wrap else "" if heading in NAMES else "number" for heading in headings]
    top = "".join(
        f'<th scope="col" class="{kind}">{escape(each)}</th>' for each, kind in zip(headings, classes, strict=True)
    )
    lines = (
        "".join(f'<td class="{kind}">{escape(cell)}</td>' for cell, kind in zip(row, classes, strict=True))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(name: str, figure: Figure, caption: str) -> str:
    """Put a picture into the page as SVG: its text is the page's, its ink changes with light and dark.

    Args:
        name: of the picture, alone in the page: it begins all ids inside.
        figure: the picture.
        caption: stands below it, and in its place for those who cannot see it.

    Returns:
        A ``<figure>``.
    """
    width = 72 * figure.get_figwidth()
    size = f"min-width:{min(0.9 * width, 2400):.0f}px;width:100%;max-width:{PIXELS * width:.0f}px"
    return (
        f'<figure><div class="scroll" tabindex="0">{_svg(name, figure, size, caption)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _svg(name: str, figure: Figure, size: str, label: str) -> str:
    file = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=unsaid)
    drawn = file.getvalue()
    head, _, rest = drawn[drawn.index("<svg") :].partition(">")
    view = re.search(r'viewBox="[-\d. ]+"', head)
    assert view is not None
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r"<[^>]*>", lambda tag: _adapted(tag[0], name), rest)
    return f'<svg role="img" aria-label="{escape(label)}" {view[0]} style="{size}">{rest}'


def _adapted(tag: str, name: str) -> str:
    """Make an element of a picture one of the page: ids of its own, colours that change, no declarations."""
    tag = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", tag)
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, variable)
    return tag.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
