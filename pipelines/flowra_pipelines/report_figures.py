"""The pictures of ``flowra report``: ψ by place and by type, spectra, effective ranks, estimators, ablations."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from flowra_analysis import LAYER_TYPES, FlowProfile, layer_type, rank_correlation
from flowra_pipelines.figure_style import FAINT, GAP, INK, STYLES, fitting_size, ink_on, plain_name, styled, type_legend
from flowra_pipelines.module_grid import frame_grid, layer_and_kind, module_grid, rows_by_type
from flowra_pipelines.report_validation import LossChange

__all__ = [
    "Rows",
    "ablation_correlations",
    "ablation_scatter",
    "effective_ranks",
    "estimator_agreement",
    "layer_types",
    "rank_kinds",
    "sensitivity_map",
    "spectral_decay",
    "uncertain",
]

HATCH = "#9aa3ad"
HALF = 0.5
"""ψ of the median module."""
ERRORS = 2.0
"""Standard errors within which ψ is not told from that of the median module."""
NUMBERED = 2000
"""Cells up to which each shows its number."""
FLOOR = 1e-5
"""Least σᵢ/σ₁ that is drawn."""
POINTS = 80
"""Points of a spectrum that are drawn."""
ORDER = ("flow_gains", "weight", "gradient", "kfac_gradient", "activation", "update")
"""Of kinds of spectra; others follow."""
TITLES = {
    "flow_gains": "flow gains",
    "weight": "weights",
    "gradient": "gradients",
    "kfac_gradient": "gradients, K-FAC metric",
    "activation": "activations",
    "update": "learned updates",
}
MARKS = ("o", "s", "^", "D", "v", "P")
Rows = Mapping[str, Mapping[str, tuple[float, float, float]]]
"""Name to ablation to a correlation with the ends of its interval."""


def uncertain(value: float, error: float | None) -> bool:
    """Tell whether ψ lies within two standard errors of ½; not where the error is not known (or 0, with one batch)."""
    return bool(error) and abs(value - HALF) < ERRORS * (error or 0.0)


@styled
def sensitivity_map(psi: Mapping[str, float], errors: Mapping[str, float]) -> Figure:
    """Draw ψ of each module, blocks across and types of layers down, hatched where it is not told from ½.

    Args:
        psi: module name to ψ, in [0, 1]; at least one.
        errors: module name to standard error, where it is known.

    Returns:
        The picture.
    """
    place = module_grid(psi)
    order = rows_by_type(place)
    height, width = len(order), len(place.blocks)
    row_of = {row: index for index, (row, _) in enumerate(order)}
    labels = [label for _, label in order]
    figure = Figure(
        figsize=fitting_size(2.6 + 0.56 * width + _beyond(labels), 1.7 + 0.46 * height), layout="constrained"
    )
    axes = figure.subplots()
    colours = ListedColormap(mpl.colormaps["RdBu_r"](np.linspace(0.08, 0.92, 256)))  # the ends are too dark for numbers
    if height * width <= NUMBERED:
        for name, (row, column) in place.places.items():
            _cell(axes, row_of[row], column, psi[name], errors.get(name), colours(psi[name]))
    else:
        grid = np.full((height, width), np.nan)
        for name, (row, column) in place.places.items():
            grid[row_of[row], column] = psi[name]
        axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    frame_grid(axes, place, labels)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=axes, shrink=0.9, aspect=24, pad=0.02, label="ψ")
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "¼", "½ median", "¾", "1"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    if any(uncertain(psi[name], errors.get(name)) for name in psi):
        key = Patch(facecolor="none", edgecolor=HATCH, hatch="////", label="within two standard errors of ½")
        figure.legend(handles=[key], loc="outside lower left", handlelength=2.2)
    return figure


@styled
def layer_types(values: Mapping[str, float], *, label: str, reference: float | None) -> Figure:
    """Draw each module as a dot in the row of its type of layer, with mean and spread.

    Args:
        values: module name to value; at least one.
        label: what they are.
        reference: where a line is drawn.

    Returns:
        The picture.
    """
    by_type = _by_type(values)
    figure = Figure(figsize=(7.2, 1.1 + 0.5 * len(by_type)), layout="constrained")
    axes = figure.subplots()
    if reference is not None:
        axes.axvline(reference, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    for row, (kind, names) in enumerate(by_type.items()):
        colour, _, mark = STYLES[kind]
        found = np.array([values[name] for name in names])
        offsets = 0.16 * np.sin(2.4 * np.arange(len(found)))  # spread out, the same each time
        axes.scatter(found, row - 0.1 + offsets, s=26, color=colour, marker=mark, alpha=0.8, linewidth=0)
        mean, spread = found.mean(), found.std()
        low = row + 0.28
        axes.plot([mean - spread, mean + spread], [low, low], color=INK, linewidth=1.4, solid_capstyle="round")
        axes.plot(mean, low, marker="o", markersize=5, color=INK, markeredgewidth=0)
    axes.set_yticks(range(len(by_type)), [f"{kind}  ({len(names)})" for kind, names in by_type.items()])
    axes.set_ylim(len(by_type) - 0.45, -0.55)
    axes.set_xlabel(label)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    handle = Line2D([], [], color=INK, marker="o", markersize=5, markeredgewidth=0, label="mean and spread")
    figure.legend(handles=[handle], loc="outside lower left")
    return figure


@styled
def spectral_decay(profile: FlowProfile) -> Figure:
    """Draw how values of spectra fall off, σᵢ/σ₁: the median by type of layer, and 10 to 90 % of its modules.

    Args:
        profile: with at least one spectrum that is not zero.

    Returns:
        The picture, a panel for each kind.
    """
    curves = {kind: _decay(profile, kind) for kind in _kinds(profile)}
    curves = {kind: found for kind, found in curves.items() if found}
    figure = Figure(figsize=_panels(len(curves)), layout="constrained")
    met: set[str] = set()
    for axes, (kind, by_type) in zip(_grid(figure, len(curves)), curves.items(), strict=False):
        lowest, longest = 1.0, 1
        for name, (index, low, middle, high) in by_type.items():
            colour, dashes, _ = STYLES[name]
            axes.fill_between(index, np.maximum(low, FLOOR), high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(index, middle, color=colour, linestyle=dashes, linewidth=1.7)
            lowest, longest = min(lowest, float(np.nanmin(middle))), max(longest, int(index[-1]))
            met.add(name)
        axes.set_title(TITLES.get(kind, plain_name(kind)))
        axes.set_xscale("log")
        axes.set_xlim(1, max(2, longest))
        _plain_ticks(axes, longest)
        if lowest < 0.05:
            axes.set_yscale("log")
            axes.set_ylim(max(FLOOR, 0.6 * lowest), 1.25)
            axes.yaxis.set_major_formatter(_power)
            axes.yaxis.set_minor_formatter(lambda value, position: "")
        else:
            axes.set_ylim(0, 1.03)
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_ylabel("gain / largest" if kind == "flow_gains" else "σᵢ / σ₁")
        axes.set_xlabel("i")
    type_legend(figure, met)
    return figure


@styled
def effective_ranks(profile: FlowProfile) -> Figure:
    """Draw effective ranks by block and type of layer, a panel for each of weights, gradients, activations, updates.

    Args:
        profile: with at least one statistic ``<kind>_effective_rank``.

    Returns:
        The picture; modules outside blocks stand to the right.
    """
    kinds = rank_kinds(profile)
    figure = Figure(figsize=_panels(len(kinds)), layout="constrained")
    met: set[str] = set()
    for axes, kind in zip(_grid(figure, len(kinds)), kinds, strict=False):
        key = f"{kind}_effective_rank"
        values = {name: each.statistics[key] for name, each in profile.modules.items() if key in each.statistics}
        blocks = [block for block, _ in map(layer_and_kind, values) if block is not None]
        last = max(blocks, default=-1)
        for name, members in _by_type(values).items():
            colour, dashes, mark = STYLES[name]
            met.add(name)
            by_block: dict[int, list[float]] = defaultdict(list)
            for member in members:
                block, _ = layer_and_kind(member)
                by_block[last + 1 if block is None else block].append(values[member])
            inside = sorted(block for block in by_block if block <= last)
            means = {block: float(np.mean(found)) for block, found in by_block.items()}
            line = {"color": colour, "marker": mark, "markersize": 4.2, "markeredgewidth": 0}
            axes.plot(inside, [means[block] for block in inside], linestyle=dashes, linewidth=1.5, **line)  # type: ignore[arg-type]
            if last + 1 in means:
                axes.plot([last + 1], [means[last + 1]], linestyle="none", **line)  # type: ignore[arg-type]
        step = max(1, math.ceil((last + 1) / 10))
        ticks = list(range(0, last + 1, step))
        labels = [str(tick) for tick in ticks]
        if len(blocks) < len(values):
            ticks, labels = [*ticks, last + 1], [*labels, "–"]
        axes.set_xticks(ticks, labels)
        axes.set_title(TITLES.get(kind, plain_name(kind)))
        axes.set_ylim(0, 1.08 * max([1.0, *values.values()]))
        axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
        axes.set_xlabel("block")
        axes.set_ylabel("effective rank")
    type_legend(figure, met)
    return figure


def rank_kinds(profile: FlowProfile) -> list[str]:
    """List the kinds of which effective ranks are known."""
    ending = "_effective_rank"
    found = {key.removesuffix(ending) for each in profile.modules.values() for key in each.statistics if ending in key}
    return _ordered([
        kind for kind in found if any(f"{kind}{ending}" in m.statistics for m in profile.modules.values())
    ])


@styled
def estimator_agreement(estimators: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw Spearman's ρ between any two estimators over the modules that both know.

    Args:
        estimators: name to module name to ψ; at least two.

    Returns:
        The picture.
    """
    names = list(estimators)
    labels = [plain_name(name) for name in names]
    size = 1.9 + 0.62 * len(names) + _beyond(labels)
    figure = Figure(figsize=fitting_size(size + 0.9, size), layout="constrained")
    axes = figure.subplots()
    grid = np.full((len(names), len(names)), np.nan)
    for row, first in enumerate(names):
        for column, second in enumerate(names):
            shared = [name for name in estimators[first] if name in estimators[second]]
            pair = [[estimators[each][name] for name in shared] for each in (first, second)]
            rho = rank_correlation(*pair)
            grid[row, column] = np.nan if rho is None else rho
            dark = rho is not None and abs(rho) > 0.78
            shown = "–" if rho is None else f"{rho:.2f}"
            colour = "#ffffff" if dark else INK if rho is None else "#111111"
            axes.text(column, row, shown, ha="center", va="center", fontsize=8, color=colour)
    edges = np.arange(len(names) + 1) - 0.5
    image = axes.pcolormesh(edges, edges, grid, cmap="RdBu_r", vmin=-1.25, vmax=1.25, edgecolors=GAP, linewidth=0.8)
    image.set_zorder(0)
    axes.invert_yaxis()
    axes.set_xticks(range(len(names)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=22, pad=0.03, label="Spearman's ρ")
    bar.ax.set_ylim(-1, 1)
    bar.outline.set_visible(False)
    return figure


@styled
def ablation_correlations(rows: Rows, ablations: Mapping[str, str]) -> Figure:
    """Draw how well each estimator ranks modules as an ablation does, with intervals.

    Args:
        rows: estimator to ablation to ρ and the ends of its interval; at least one.
        ablations: key to what it is called.

    Returns:
        The picture.
    """
    figure = Figure(figsize=fitting_size(7.2, 1.5 + 0.56 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=FAINT, linewidth=0.8)
    colours = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#b0529f")
    used = [key for key in ablations if any(key in each for each in rows.values())]
    for index, key in enumerate(used):
        style = {"color": colours[index % 6], "marker": MARKS[index % 6]}
        for row, found in enumerate(rows.values()):
            if key in found:
                value, low, high = found[key]
                y = row + 0.16 * (index - (len(used) - 1) / 2)
                axes.plot([low, high], [y, y], color=style["color"], linewidth=1.8, alpha=0.6, solid_capstyle="round")
                axes.plot([value], [y], linestyle="none", markersize=6, **style)  # type: ignore[arg-type]
    axes.set_yticks(range(len(rows)), [plain_name(name) for name in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(min([-0.25, *(found[1] for each in rows.values() for found in each.values())]) - 0.03, 1.03)
    axes.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("Spearman's ρ with the ablation")
    handles = [
        Line2D([], [], color=colours[index % 6], marker=MARKS[index % 6], label=ablations[key])
        for index, key in enumerate(used)
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3)
    return figure


@styled
def ablation_scatter(
    psi: Mapping[str, float],
    errors: Mapping[str, float],
    ablations: Mapping[str, Mapping[str, LossChange]],
) -> Figure:
    """Draw the change of the loss in each ablation over ψ, module by module.

    ψ is a density, so the change is that per parameter taken away, where it is known how many were.

    Args:
        psi: module name to ψ.
        errors: module name to its standard error.
        ablations: what it is called to module name to change of the loss; at least one with a module of ``psi``.

    Returns:
        The picture, a panel for each ablation.
    """
    shown = {title: {name: each[name] for name in each if name in psi} for title, each in ablations.items()}
    shown = {title: each for title, each in shown.items() if each}
    figure = Figure(figsize=_panels(len(shown)), layout="constrained")
    met: set[str] = set()
    for axes, (title, changes) in zip(_grid(figure, len(shown)), shown.items(), strict=False):
        known = all(each.parameters for each in changes.values())
        unit = {name: (each.parameters or 1.0) / 1000 if known else 1.0 for name, each in changes.items()}
        for kind, names in _by_type(changes).items():
            colour, _, mark = STYLES[kind]
            met.add(kind)
            x = [psi[name] for name in names]
            y = [changes[name].value / unit[name] for name in names]
            x_error = [errors.get(name) or 0.0 for name in names]
            y_error = [abs((changes[name].stderr or 0.0) / unit[name]) for name in names]
            axes.errorbar(x, y, y_error, x_error, fmt="none", ecolor=colour, alpha=0.3, elinewidth=0.8)
            axes.scatter(x, y, s=24, color=colour, marker=mark, linewidth=0, alpha=0.85)
        rho = rank_correlation(
            [psi[name] for name in changes], [each.value / unit[name] for name, each in changes.items()]
        )
        axes.set_title(title if rho is None else f"{title}: ρ = {rho:.2f}")
        axes.axhline(0, color=FAINT, linewidth=0.7)
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("ψ")
        axes.set_ylabel("loss change per 1,000 parameters" if known else "change of the loss")
    type_legend(figure, met, lines=False)
    return figure


def _cell(
    axes: Axes, row: int, column: int, value: float, error: float | None, colour: tuple[float, float, float, float]
) -> None:
    """Draw ψ of one module: its colour, its hatch where it is not told from ½, its number over its error."""
    corner = (column - 0.5, row - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor=GAP, linewidth=0.8))
    if uncertain(value, error):
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor=HATCH, linewidth=0))
    box = {"boxstyle": "round,pad=0.12", "facecolor": colour, "edgecolor": "none"}
    centred: dict[str, Any] = {"ha": "center", "va": "center", "color": ink_on(colour), "bbox": box}
    axes.text(column, row - (0.13 if error else 0.0), _short(value), fontsize=8, **centred)
    if error:
        axes.text(column, row + 0.24, f"±{_short(error)}" if error >= 0.005 else "±<.01", fontsize=5.8, **centred)


def _by_type(values: Mapping[str, object]) -> dict[str, list[str]]:
    """Group module names by type of layer, in the order of the types."""
    found: dict[str, list[str]] = {kind: [] for kind in LAYER_TYPES}
    for name in values:
        found[layer_type(name)].append(name)
    return {kind: names for kind, names in found.items() if names}


def _kinds(profile: FlowProfile) -> list[str]:
    return _ordered([kind for kind, by_module in profile.spectra.items() if by_module])


def _ordered(kinds: Sequence[str]) -> list[str]:
    return [*(kind for kind in ORDER if kind in kinds), *sorted(set(kinds) - set(ORDER))]


Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _decay(profile: FlowProfile, kind: str) -> dict[str, Curve]:
    """Return index, 10 %, median and 90 % of σᵢ/σ₁ for each type of layer; where half of the modules have a value."""
    found: dict[str, Curve] = {}
    spectra = {
        name: each.double().numpy() for name, each in profile.spectra[kind].items() if len(each) and float(each[0]) > 0
    }
    for type_name, names in _by_type(spectra).items():
        length = int(np.median([len(spectra[name]) for name in names]))
        index = np.unique(np.geomspace(1, length, POINTS).round().astype(int))
        table = np.full((len(names), len(index)), np.nan)
        for row, name in enumerate(names):
            inside = index[index <= len(spectra[name])]
            table[row, : len(inside)] = np.clip(spectra[name][inside - 1] / spectra[name][0], 0, 1)
        low, middle, high = np.nanquantile(table, [0.1, 0.5, 0.9], axis=0)
        drawn = middle >= FLOOR
        found[type_name] = (index[drawn].astype(float), low[drawn], middle[drawn], high[drawn])
    return found


def _panels(count: int) -> tuple[float, float]:
    columns = min(3, count)
    return 1.0 + 3.1 * columns if columns > 1 else 6.4, 0.7 + 2.7 * math.ceil(count / columns)


def _grid(figure: Figure, count: int) -> Iterator[Axes]:
    """Make panels, three in a row, and take away those that stay empty."""
    columns = min(3, count)
    every = figure.subplots(math.ceil(count / columns), columns, squeeze=False).flat
    for index, axes in enumerate(every):
        if index < count:
            yield axes
        else:
            axes.remove()


def _plain_ticks(axes: Axes, longest: int) -> None:
    steps = (1, 2, 5) if longest < 100 else (1,)
    ticks = [step * 10**power for power in range(len(str(longest))) for step in steps if step * 10**power <= longest]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_formatter(lambda value, position: "")


def _power(value: float, position: float) -> str:
    exponent = round(math.log10(value))
    return f"{value:g}" if exponent > -3 else "10⁻" + "⁰¹²³⁴⁵⁶⁷⁸⁹"[-exponent]


def _short(value: float) -> str:
    """Write a number in [0, 1] with two digits, without its zero."""
    return f"{value:.2f}".removeprefix("0") if 0 <= value < 0.995 else f"{value:.2f}"


def _beyond(labels: Sequence[str]) -> float:
    """Return the inches that the longest label takes beyond what pictures allow for."""
    return 0.068 * max(0, max(map(len, labels)) - 14)
