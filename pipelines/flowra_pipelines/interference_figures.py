"""Pictures of what a merge costs: tasks against tasks, and tasks at modules by block and type of layer.

Every cell has the name ``cell-<panel>-<row>-<column>`` in an SVG, and its number that name with ``-text`` behind it, so
that a page can say what it is where the pointer rests (:data:`Hovers`).
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from flowra_pipelines.figure_style import FAINT, GAP, NOTHING, fitting_size, ink_on, plain_name, styled
from flowra_pipelines.module_grid import frame_cells, frame_grid, module_grid, rows_by_type

__all__ = ["CAPTIONS", "Hovers", "cell_name", "module_maps", "predicted_and_measured", "task_pairs"]

Hovers = dict[str, str]
"""Name of a cell to what it says."""

CAPTIONS: Mapping[str, str] = {
    "task_cosines": "Cosine of the updates of two tasks, the mean over the modules that both change. Blue pulls apart,"
    " red together; 0 is a right angle.",
    "task_overlaps": "How far the spaces of two tasks overlap: mean cos² of the angles between what the updates read"
    " (rows) and where they write (columns), averaged over modules. Unrelated spaces have about rank over size.",
    "cross_talk": "What each task misses at each module: the energy of the difference between the merged update and its"
    " own, over that of its own, in the metric of its inputs and loss. 0: nothing, 1: as much as without an adapter.",
    "sign_conflicts": "Share of all magnitude that entries of opposite sign take away when the updates are added,"
    " module by module.",
    "predicted_and_measured": "Share of the gain of its adapter that each task loses: predicted from cross-talk, and"
    " measured by scores. The lines are the limits of the advice.",
}
NUMBERED = 2000
"""Cells of a picture up to which each is drawn, and named, by itself."""
WIDE = 14
"""Blocks from which on panels stand below each other."""
LEAST = 1e-3
"""Cross-talk from which on colours differ."""
PREDICTED, MEASURED = "#0072b2", "#d55e00"


def cell_name(panel: int, row: int, column: int) -> str:
    """Return the name of a cell."""
    return f"cell-{panel}-{row}-{column}"


def task_pairs(
    tasks: Sequence[str], panels: Mapping[str, Mapping[tuple[str, str], float]], *, label: str, signed: bool
) -> tuple[Figure, Hovers]:
    """Draw a number of each pair of tasks, a panel for each kind.

    Args:
        tasks: at least two.
        panels: title to the number by pair, in the order of the tasks; a pair may be missing.
        label: what the numbers are.
        signed: whether they lie in [-1, 1], else in [0, 1].

    Returns:
        The picture, and what its cells say.
    """
    hovers: Hovers = {}
    return _task_pairs(tasks, panels, label, signed, hovers), hovers


@styled
def _task_pairs(
    tasks: Sequence[str],
    panels: Mapping[str, Mapping[tuple[str, str], float]],
    label: str,
    signed: bool,
    hovers: Hovers,
) -> Figure:
    """Draw, and note what cells say."""
    names = [plain_name(name) for name in tasks]
    beyond = 0.068 * max(0, max(map(len, names)) - 14)
    side = 1.7 + 0.6 * len(tasks) + beyond
    figure = Figure(figsize=fitting_size(0.9 + side * len(panels), side), layout="constrained")
    colours, norm = _colours(signed)
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (axes, (title, values)) in enumerate(zip(every, panels.items(), strict=True)):
        for row, first in enumerate(tasks):
            for column, second in enumerate(tasks):
                value = 1.0 if row == column else values.get((first, second), values.get((second, first)))
                key = cell_name(panel, row, column)
                _cell(axes, key, row, column, value, colours, norm, "–" if value is None else f"{value:.2f}")
                said = "not known" if value is None else f"{value:.4f}"
                hovers[key] = f"{title or label}, {first} and {second}: {said}"
        frame_cells(axes, names, names)
        axes.tick_params(axis="x", rotation=35)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
        axes.set_title(title)
    _bar(figure, list(every), colours, norm, label, [-1, -0.5, 0, 0.5, 1] if signed else [0, 0.25, 0.5, 0.75, 1])
    return figure


def module_maps(panels: Mapping[str, Mapping[str, float]], *, label: str, logarithmic: bool) -> tuple[Figure, Hovers]:
    """Draw a number ≥ 0 of each module, blocks across and types of layers down, a panel for each task.

    Args:
        panels: title to the number by module; the union of all modules has a place in each. At least one has a number.
        label: what the numbers are.
        logarithmic: whether colours are those of the logarithm, for ratios, else they run from 0 to 1.

    Returns:
        The picture, and what its cells say.
    """
    hovers: Hovers = {}
    return _module_maps(panels, label, logarithmic, hovers), hovers


@styled
def _module_maps(panels: Mapping[str, Mapping[str, float]], label: str, logarithmic: bool, hovers: Hovers) -> Figure:
    """Draw, and note what cells say."""
    names = list(dict.fromkeys(name for values in panels.values() for name in values))
    place = module_grid(names)
    order = rows_by_type(place)
    row_of = {row: index for index, (row, _) in enumerate(order)}
    labels = [each for _, each in order]
    height, width = len(order), len(place.blocks)
    across = 1 if width >= WIDE else min(3, len(panels))
    down = math.ceil(len(panels) / across)
    beyond = 0.068 * max(0, max(map(len, labels)) - 8)
    size = fitting_size(1.4 + across * (0.8 + 0.5 * width + beyond), 0.6 + down * (0.9 + 0.42 * height))
    figure = Figure(figsize=size, layout="constrained")
    colours, norm = _ratio_colours() if logarithmic else _colours(False)
    grid = figure.subplots(down, across, squeeze=False)
    drawn: list[Axes] = []
    for panel, axes in enumerate(grid.flat):
        if panel >= len(panels):
            axes.remove()
            continue
        title, values = list(panels.items())[panel]
        if height * width * len(panels) <= NUMBERED:
            for name, (row, column) in place.places.items():
                key, value = cell_name(panel, row_of[row], column), values.get(name)
                _cell(axes, key, row_of[row], column, value, colours, norm, _short(value))
                said = "not known" if value is None else f"{value:.4g}"
                hovers[key] = f"{title + ', ' if title else ''}{name}: {said}"
        else:
            image = np.full((height, width), np.nan)
            for name, (row, column) in place.places.items():
                image[row_of[row], column] = values.get(name, np.nan)
            axes.imshow(image, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        frame_grid(axes, place, labels)
        axes.set_title(plain_name(title))
        drawn.append(axes)
    ticks = [LEAST, 1e-2, 1e-1, 1.0, 10.0] if logarithmic else [0, 0.25, 0.5, 0.75, 1]
    _bar(figure, drawn, colours, norm, label, ticks)
    return figure


@styled
def predicted_and_measured(
    predicted: Mapping[str, float], measured: Mapping[str, float], limits: tuple[float, float]
) -> Figure:
    """Draw the share of its adapter's gain that each task loses.

    Args:
        predicted: by task.
        measured: by task; one of both knows a task at least.
        limits: up to the first merging is advised, from the second on tasks are kept apart.

    Returns:
        The picture, tasks down.
    """
    tasks = list(dict.fromkeys([*measured, *predicted]))
    figure = Figure(figsize=fitting_size(6.8, 1.3 + 0.46 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    for limit in limits:
        axes.axvline(limit, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
    for row, name in enumerate(tasks):
        both = [values[name] for values in (predicted, measured) if name in values]
        axes.plot([min(both), max(both)], [row, row], color=FAINT, linewidth=1.2, zorder=1)
        for values, colour, mark in ((predicted, PREDICTED, "o"), (measured, MEASURED, "D")):
            if name in values:
                axes.plot(values[name], row, marker=mark, color=colour, markersize=7, linestyle="none")
    axes.set_yticks(range(len(tasks)), [plain_name(name) for name in tasks])
    axes.set_ylim(len(tasks) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("share of the adapter's gain that is lost")
    axes.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    shown = [("predicted", PREDICTED, "o", predicted), ("measured", MEASURED, "D", measured)]
    handles = [
        Line2D([], [], color=colour, marker=mark, linestyle="none", markersize=6, label=name)
        for name, colour, mark, values in shown
        if values
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=2)
    return figure


def _cell(
    axes: Axes, name: str, row: int, column: int, value: float | None, colours: Colormap, norm: Normalize, text: str
) -> None:
    colour = mpl.colors.to_rgba(NOTHING) if value is None else colours(float(norm(value)))
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor=GAP, linewidth=0.8, gid=name))
    axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink_on(colour), gid=f"{name}-text")


def _bar(
    figure: Figure, axes: list[Axes], colours: Colormap, norm: Normalize, label: str, ticks: Sequence[float]
) -> None:
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, shrink=0.9, aspect=24, pad=0.02, label=label)
    bar.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _colours(signed: bool) -> tuple[Colormap, Normalize]:
    """Return blue, white and red for [-1, 1], or white to red for [0, 1]; the ends are too dark for numbers."""
    start = 0.08 if signed else 0.5
    return ListedColormap(mpl.colormaps["RdBu_r"](np.linspace(start, 0.92, 256))), Normalize(-1 if signed else 0, 1)


def _ratio_colours() -> tuple[Colormap, Normalize]:
    """Return blue below 0.1 and red above, by the logarithm."""
    colours = ListedColormap(mpl.colormaps["RdBu_r"](np.linspace(0.08, 0.92, 256)))
    return colours, LogNorm(LEAST, 10.0, clip=True)


def _short(value: float | None) -> str:
    """Write a number ≥ 0 in four characters."""
    if value is None:
        return "–"
    if value < 0.995:
        return f"{value:.2f}".removeprefix("0")
    return f"{value:.1f}" if value < 99.5 else f"{min(value, 9e9):.0e}".replace("e+0", "e")
