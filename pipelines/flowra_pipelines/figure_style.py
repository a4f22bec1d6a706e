"""How all pictures look: type, colours, sizes, names.

Colours differ for the colour-blind, too (Okabe & Ito; blue and red for below and above), and lines differ in their
dashes and marks as well. Text and axes have colours of their own, :data:`INK`, :data:`FAINT` and :data:`GAP`, so that a
page may exchange them.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Literal, ParamSpec

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowra_analysis import LAYER_TYPES
from flowra_pipelines.profile_commands import printable

__all__ = ["FAINT", "GAP", "INK", "NOTHING", "STYLES", "fitting_size", "ink_on", "plain_name", "styled", "type_legend"]

INK = "#24292e"
FAINT = "#818a93"
GAP = "#fefefe"
"""Between cells."""
NOTHING = "#d9dee3"
"""Of a cell without a value."""
LABEL = 40
"""Characters of a name beside an axis."""
MAX_SIDE = 60.0
"""Inches of a picture's longer side."""
Dashes = Literal["-", "--", "-.", ":"]
STYLES: Mapping[str, tuple[str, Dashes, str]] = {  # colour, dashes, mark
    "Q": ("#0072b2", "-", "o"),
    "K": ("#56b4e9", "--", "s"),
    "V": ("#009e73", "-.", "^"),
    "QKV": ("#0072b2", "-", "o"),
    "O": ("#d55e00", "-", "D"),
    "gate": ("#9a8c1f", ":", "v"),
    "up": ("#e69f00", "--", "P"),
    "gate+up": ("#e69f00", "--", "P"),
    "down": ("#b0529f", "-", "X"),
    "embedding": ("#7f8c9b", "--", "h"),
    "other": ("#7f8c9b", ":", "*"),
}
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelsize": 9.0,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "hatch.linewidth": 0.6,
    "axes.formatter.use_mathtext": False,
}
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with the type and the colours that all pictures share."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def ink_on(colour: tuple[float, float, float, float]) -> str:
    """Return white or black, whichever can be read on a colour."""
    red, green, blue, _ = colour
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#111111"


def type_legend(figure: Figure, met: set[str], *, lines: bool = True) -> None:
    """Say below the panels how the types of layers are drawn."""
    handles = []
    for kind in LAYER_TYPES:
        if kind in met:
            colour, dashes, mark = STYLES[kind]
            handles.append(
                Line2D(
                    [], [], color=colour, linestyle=dashes if lines else "none", marker=mark, markersize=5, label=kind
                )
            )
    columns = min(len(handles), 9)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3.2 if lines else 1.2)


def fitting_size(width: float, height: float) -> tuple[float, float]:
    """Return a figure's size in inches, cut to what a page can hold."""
    return min(width, MAX_SIDE), min(height, MAX_SIDE)


def plain_name(name: str) -> str:
    """Write a name so that every font has its characters; of a long one the end."""
    written = printable(name).encode("ascii", "backslashreplace").decode("ascii")
    return written if len(written) <= LABEL else f"...{written[3 - LABEL :]}"
