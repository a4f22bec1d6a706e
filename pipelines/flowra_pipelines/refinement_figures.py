"""The pictures of rank: where a plan puts it, how it moved, the budget's path, and what the final updates look like.

Colours as in :mod:`flowra_pipelines.figure_style`; ranks have those of viridis, which differ in lightness.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from flowra_allocation import RankHistory
from flowra_allocation.importance import spectral_entropy
from flowra_analysis import LAYER_TYPES, layer_type
from flowra_pipelines.figure_style import FAINT, GAP, INK, NOTHING, STYLES, fitting_size, ink_on, plain_name, styled
from flowra_pipelines.module_grid import frame_grid, layer_and_kind, module_grid, rows_by_type

__all__ = [
    "CAPTIONS",
    "Shape",
    "budget_path",
    "magnitude_and_entropy",
    "rank_map",
    "rank_over_time",
    "shape_of_spectrum",
]

CAPTIONS = {
    "rank_over_time": "The rank of every module between events: time to the right, a panel for each type of layer, in"
    " it the blocks from the first (top) to the last. Grey: no rank. The first column is the plan, and every event"
    " begins a new one.",
    "magnitude_and_entropy": "Each mark is a module at the end of training: how large its update is (mean singular"
    " value of ΔW) and how evenly its directions share it (entropy of σᵢ²/Σσ² over ln r; 0: one direction has all, 1:"
    " all are alike). Colour and size are its final rank; modules without rank are left out.",
    "budget_path": "Adapter parameters that the policy allowed and those that were there, event by event, and the most"
    " that there ever were.",
}
ALLOWED, USED = "#e69f00", "#0072b2"
NAMED_ROWS = 16
"""Rows of a panel that are all named; of more, some."""
NUMBERED = 2000
"""Cells up to which each shows its number."""
DISCRETE = 12
"""Ranks up to which each has a step of its own on the colour bar."""
Shape = tuple[float, float, int]
"""Mean singular value, entropy in [0, 1], and rank of an update."""


def shape_of_spectrum(singular_values: Tensor) -> Shape:
    """Say how large an update is and how evenly its directions share it.

    Args:
        singular_values: of ΔW, ``(r,)``, r ≥ 1.

    Returns:
        Their mean, FlexLoRA's entropy (docs/methods.md, section 7; 0 at rank 1 and of zeros), and r.
    """
    mean = float(singular_values.double().mean())
    return mean, min(1.0, max(0.0, spectral_entropy(singular_values))), len(singular_values)


@styled
def rank_map(ranks: Mapping[str, int]) -> Figure:
    """Draw the rank of each module, blocks across and types of layers down.

    Args:
        ranks: module name to rank ≥ 0; at least one module.

    Returns:
        The picture.
    """
    place = module_grid(ranks)
    order = rows_by_type(place)
    labels = [label for _, label in order]
    row_of = {row: index for index, (row, _) in enumerate(order)}
    values = np.full((len(labels), len(place.blocks)), np.nan)
    for name, (row, column) in place.places.items():
        values[row_of[row], column] = ranks[name]
    largest = max(1, max(ranks.values()))
    colours, norm = _rank_colours(largest)
    beyond = 0.068 * max(0, max(map(len, labels)) - 14)
    size = fitting_size(2.6 + 0.5 * len(place.blocks) + beyond, 1.4 + 0.4 * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.where(values == 0, 0.0, np.nan), cmap=ListedColormap([NOTHING]), aspect="auto")
    axes.imshow(np.where(values > 0, values, np.nan), cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    for row, column in np.argwhere(values > 0) if values.size <= NUMBERED else ():
        rank = int(values[row, column])
        ink = ink_on(colours(float(norm(rank))))
        axes.text(column, row, str(rank), ha="center", va="center", fontsize=8, color=ink)
    frame_grid(axes, place, labels)
    axes.set_xticks(np.arange(1, len(place.blocks)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(labels)) - 0.5, minor=True)
    axes.grid(which="minor", color=GAP, linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    _bar(figure, [axes], largest, "planned rank", aspect=24, fraction=0.15)
    figure.legend(handles=[Patch(facecolor=NOTHING, label="no rank")], loc="outside lower left", handlelength=1.4)
    return figure


@styled
def rank_over_time(history: RankHistory) -> Figure:
    """Draw the rank of every module between events, a panel for each type of layer, blocks from top to bottom.

    Args:
        history: with at least one event.

    Returns:
        The picture.
    """
    edges = _edges([event.step for event in history.events])
    ranks = [history.initial, *(event.ranks for event in history.events)]
    panels = _panels(list(history.initial))
    largest = max(1, max(rank for each in ranks for rank in each.values()))
    colours, norm = _rank_colours(largest)
    columns = min(len(panels), 4 if len(panels) in (4, 7, 8) or len(panels) > 9 else 3)
    rows = [list(panels)[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [0.62 + 0.135 * min(NAMED_ROWS * 2, max(len(panels[kind]) for kind in row)) for row in rows]
    width = 1.2 + 2.6 * columns
    figure = Figure(figsize=fitting_size(max(5.2, width), 0.8 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    drawn: list[Axes] = []
    for line, row in zip(grid, rows, strict=True):
        for axes, kind in zip(line, [*row, *[None] * (len(line) - len(row))], strict=True):
            if kind is None:
                axes.remove()
                continue
            names = panels[kind]
            values = np.array([[each[name] for each in ranks] for name in names], dtype=np.float64)
            values[values == 0] = np.nan
            lines = np.arange(len(names) + 1) - 0.5
            image = axes.pcolormesh(edges, lines, values, cmap=colours, norm=norm)
            image.set_rasterized(values.size > 4000)
            axes.set_facecolor(NOTHING)
            for step in edges[1:-1] if len(edges) <= 2 * NAMED_ROWS else []:
                axes.axvline(step, color=GAP, linewidth=0.6)
            axes.hlines(lines[1:-1], edges[0], edges[-1], color=GAP, linewidth=0.4 if len(names) < 40 else 0.0)
            axes.set_ylim(len(names) - 0.5, -0.5)
            _name_rows(axes, names)
            axes.set_title(f"{kind}  ({len(names)})")
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5, integer=True))
            axes.set_xlabel("step")
            drawn.append(axes)
    _bar(figure, drawn, largest, "rank (directions)", aspect=40, fraction=0.03)
    figure.legend(handles=[Patch(facecolor=NOTHING, label="no rank")], loc="outside lower left", handlelength=1.4)
    return figure


@styled
def magnitude_and_entropy(shapes: Mapping[str, Shape]) -> Figure:
    """Draw each module's update: its magnitude across, its entropy up, its final rank as colour and size.

    Args:
        shapes: module name to what :func:`shape_of_spectrum` says; at least one.

    Returns:
        The picture.
    """
    figure = Figure(figsize=(6.6, 4.4), layout="constrained")
    axes = figure.subplots()
    largest = max(rank for _, _, rank in shapes.values())
    colours, norm = _rank_colours(largest)
    met: dict[str, str] = {}
    for kind in LAYER_TYPES:
        found = [each for name, each in shapes.items() if layer_type(name) == kind]
        if found:
            met[kind] = STYLES[kind][2]
            x, y, ranks = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
            sizes = 22 + 90 * ranks / largest
            axes.scatter(
                x, y, s=sizes, c=ranks, cmap=colours, norm=norm, marker=met[kind], alpha=0.85, edgecolors=FAINT,
                linewidths=0.5,
            )  # fmt: skip
    axes.set_xlabel("mean singular value of ΔW")
    axes.set_ylabel("entropy of the directions (0 to 1)")
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlim(left=0)
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    _bar(figure, [axes], largest, "final rank (directions)", aspect=24, fraction=0.15)
    handles = [
        Line2D([], [], linestyle="none", marker=mark, color=INK, markersize=5, markeredgewidth=0, label=kind)
        for kind, mark in met.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 9), handlelength=1.2)
    return figure


@styled
def budget_path(history: RankHistory, costs: Mapping[str, int] | None = None) -> Figure:
    """Draw the parameters that were allowed and those that were there, event by event, and the peak.

    Args:
        history: with at least one event.
        costs: module name to parameters per unit of rank, to know what was there before the first event.

    Returns:
        The picture.
    """
    steps = [event.step for event in history.events]
    begin, *_, end = _edges(steps)
    used, allowed = [event.parameters for event in history.events], [event.budget for event in history.events]
    before = None if costs is None else sum(costs[name] * rank for name, rank in history.initial.items())
    figure = Figure(figsize=(6.6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(history.budget, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), label=f"budget {history.budget:,}")
    axes.step([*steps, end], [*allowed, allowed[-1]], where="post", color=ALLOWED, linewidth=3.2, label="allowed")
    x, y = ([*steps, end], [*used, used[-1]]) if before is None else ([begin, *steps, end], [before, *used, used[-1]])
    axes.step(x, y, where="post", color=USED, linewidth=1.3, label="used")
    axes.plot(steps, used, linestyle="none", marker="o", markersize=4, color=USED)
    points = [*zip(steps, used, strict=True)] if before is None else [(begin, before), *zip(steps, used, strict=True)]
    at, most = max(points, key=lambda each: (each[1], -each[0]))
    if most == history.peak:
        axes.plot(
            at, most, linestyle="none", marker="*", markersize=13, color="#d55e00", markeredgecolor=GAP,
            clip_on=False, zorder=4,
            label=f"peak {most:,}, at step {at:,}" if at != begin else f"peak {most:,}, before the first event",
        )  # fmt: skip
    else:
        axes.axhline(history.peak, color="#d55e00", linewidth=1.2, linestyle=":", label=f"peak {history.peak:,}")
    axes.set_ylim(0, 1.12 * max(history.peak, history.budget, *allowed))
    axes.set_xlim(begin, end)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("step")
    axes.set_ylabel("adapter parameters")
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _edges(steps: Sequence[int]) -> list[float]:
    """Return where columns begin and end: at the events, and as far beyond the first and last as events lie apart."""
    gap = median(second - first for first, second in pairwise(steps)) if len(steps) > 1 else 1
    return [max(0.0, steps[0] - gap), *map(float, steps), steps[-1] + gap]


def _panels(names: Sequence[str]) -> dict[str, list[str]]:
    """Group modules by type of layer, in each from the first block to the last; those outside blocks come last."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[layer_type(name)].append(name)
    depth = {name: math.inf if (block := layer_and_kind(name)[0]) is None else block for name in names}
    return {kind: sorted(found[kind], key=lambda name: depth[name]) for kind in LAYER_TYPES if kind in found}


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name rows by their blocks where each has its own; else by the end of their names, some of them if many."""
    blocks = [layer_and_kind(name)[0] for name in names]
    alone = None not in blocks and len(set(blocks)) == len(blocks)
    every = math.ceil(len(names) / NAMED_ROWS)
    ticks = range(0, len(names), every)
    labels = [str(blocks[row]) if alone else plain_name(_end(names[row])) for row in ticks]
    axes.set_yticks(ticks, labels)
    axes.set_ylabel("block" if alone else "")
    if not alone:
        axes.tick_params(axis="y", labelsize=6.0)


def _end(name: str) -> str:
    """Return a block and what the module is there, short enough to stand beside an axis."""
    block, kind = layer_and_kind(name)
    short = kind if len(kind) <= 22 else f"...{kind[-19:]}"
    return short if block is None else f"{block}: {short}"


def _rank_colours(largest: int) -> tuple[Colormap, Normalize]:
    """Return colours of the ranks from 1 on, a step for each if they are few."""
    if largest > DISCRETE:
        return mpl.colormaps["viridis"], Normalize(1, largest)
    colours = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.05, 1.0, largest)))
    return colours, BoundaryNorm([rank + 0.5 for rank in range(largest + 1)], largest)


def _bar(figure: Figure, axes: list[Axes], largest: int, label: str, *, aspect: float, fraction: float) -> None:
    """Draw the scale of ranks."""
    colours, norm = _rank_colours(largest)
    scale = mpl.cm.ScalarMappable(norm, colours)
    bar = figure.colorbar(scale, ax=axes, label=label, shrink=0.9, aspect=aspect, fraction=fraction, pad=0.02)
    if largest <= DISCRETE:
        bar.set_ticks([rank + 0.0 for rank in range(1, largest + 1)], labels=[str(r) for r in range(1, largest + 1)])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
