"""The pictures of ``flowra fuse inspect``: weights by token and layer, and the average by layer with its spread.

Colours are centred on 1/k, the weight of each of k adapters where a gate makes no difference: red is more, blue less.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure

from flowra_compose.fusion import GateInspection, TextWeights
from flowra_pipelines.figure_style import FAINT, STYLES, fitting_size, plain_name, styled

__all__ = ["CAPTIONS", "WeightScale", "layer_labels", "layer_means", "visible", "weight_maps", "weight_scale"]

CAPTIONS: Mapping[str, str] = {
    "layers": "Average weight of each adapter by layer, over all tokens; the bands are one standard deviation of single"
    " tokens. The thin line is 1/k, where every adapter counts the same.",
}
TEXTS = 3
"""That are drawn."""
TOKENS = 100
"""Of each that are drawn."""
LABELLED = 60
"""Layers up to which each has its number."""
CHARACTERS = 14
"""Of a token below an axis."""
LEAST_REACH = 0.1
"""Of the colours to both sides of 1/k: smaller differences stay pale."""
COVERED = 0.98
"""Share of the shown weights whose colours differ; those beyond have the last colour."""
LINES: tuple[str, ...] = ("Q", "O", "V", "up", "down", "K", "gate", "embedding")
"""Rows of the house's styles, as they are told apart best."""
SIGNS = {" ": "·", "\n": "↵", "\t": "→"}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightScale:
    """How weights become colours."""

    centre: float
    reach: float
    colours: Colormap

    @property
    def norm(self) -> Normalize:
        """From weights to [0, 1]."""
        return Normalize(self.centre - self.reach, self.centre + self.reach, clip=True)

    def position(self, weight: float) -> float:
        """Return where between the ends of the colours a weight lies, in [0, 1]."""
        return min(max((weight - self.centre + self.reach) / (2 * self.reach), 0.0), 1.0)


def weight_scale(inspection: GateInspection, texts: Sequence[TextWeights]) -> WeightScale:
    """Choose colours for the weights of texts, averaged by layer: white at 1/k, as far as nearly all of them reach."""
    centre = 1 / len(inspection.adapters)
    far = torch.cat([(inspection.layer_weights(each) - centre).abs().flatten() for each in texts])
    reach = float(np.quantile(far.numpy(), COVERED))
    colours = ListedColormap(mpl.colormaps["RdBu_r"](np.linspace(0.08, 0.92, 256)))  # the ends are too dark for numbers
    return WeightScale(centre=centre, reach=max(LEAST_REACH, math.ceil(20 * reach) / 20), colours=colours)


def visible(token: str) -> str:
    """Write spaces and ends of lines as signs."""
    return "".join(SIGNS.get(each, each) for each in token)


def layer_labels(names: Sequence[str]) -> list[str]:
    """Call layers by their numbers where these differ, ``all`` at level ``step``, otherwise by their names."""
    ends = [name.rpartition(".")[2] for name in names]
    if all(each.isdecimal() for each in ends) and len(set(ends)) == len(names):
        return ends
    return [plain_name(name) or "all" for name in names]


@styled
def weight_maps(inspection: GateInspection, texts: Sequence[TextWeights]) -> Figure:
    """Draw weights, tokens across and layers down, a panel for each adapter and text.

    Args:
        inspection: whose texts these are.
        texts: at least one; of the first three the first hundred tokens are drawn.

    Returns:
        The picture. Modules of a layer are averaged.
    """
    scale, labels = weight_scale(inspection, texts), layer_labels(list(inspection.layers))
    drawn = list(texts[:TEXTS])
    longest = min(TOKENS, max(len(each.tokens) for each in drawn))
    height = 1.1 + max(0.3, 0.15 * len(labels))
    rows = len(drawn) * len(inspection.adapters)
    size = fitting_size(2.6 + max(2.4, 0.17 * longest), 0.3 + rows * height)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for row, axes in enumerate(grid):
        text, adapter = drawn[row // len(inspection.adapters)], row % len(inspection.adapters)
        weights = inspection.layer_weights(text)[:, :TOKENS, adapter].numpy()
        axes.imshow(weights, cmap=scale.colours, norm=scale.norm, aspect="auto", interpolation="nearest")
        more = f"  (first {TOKENS} of {len(text.tokens)} tokens)" if len(text.tokens) > TOKENS else ""
        of = f", text {row // len(inspection.adapters) + 1}" if len(drawn) > 1 else ""
        axes.set_title(f"{plain_name(inspection.adapters[adapter])}{of}{more}")
        tokens = [plain_name(_short(each)) for each in text.tokens[:TOKENS]]
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6.5)
        axes.set_xlim(-0.5, longest - 0.5)
        step = math.ceil(len(labels) / LABELLED)
        axes.set_yticks(range(0, len(labels), step), labels[::step], fontsize=6.5)
        axes.set_ylabel("layer")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    _bar(figure, list(grid), scale)
    return figure


@styled
def layer_means(inspection: GateInspection) -> Figure:
    """Draw the average weight of each adapter by layer, with its spread over tokens: Figure 3 of LoRA-Flow.

    Args:
        inspection: of any level; at level ``step`` there is one point for all layers.

    Returns:
        The picture.
    """
    layers = inspection.by_layer()
    places = np.arange(len(layers))
    figure = Figure(figsize=fitting_size(max(4.6, 2.2 + 0.22 * len(layers)), 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1 / len(inspection.adapters), color=FAINT, linewidth=0.8)
    for index, name in enumerate(inspection.adapters):
        colour, dashes, mark = _line(index)
        mean = np.array([each.mean[index] for each in layers])
        spread = np.array([each.spread[index] for each in layers])
        if len(layers) > 1:
            axes.fill_between(places, mean - spread, mean + spread, color=colour, alpha=0.14, linewidth=0)
        else:
            axes.errorbar(places, mean, spread, color=colour, linestyle="none", capsize=4)
        line = {"color": colour, "linestyle": dashes, "marker": mark, "label": plain_name(name)}
        axes.plot(places, mean, linewidth=1.6, markersize=4.5, markeredgewidth=0, **line)  # type: ignore[arg-type]
    labels = layer_labels([each.name for each in layers])
    step = math.ceil(len(labels) / 24)
    names = not all(each.isdecimal() for each in labels) and len(labels) > 1
    axes.set_xticks(places[::step], labels[::step], rotation=90 if names else 0)
    axes.set_xlabel("layer")
    axes.set_ylabel("weight")
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower left", ncols=min(3, len(inspection.adapters)))
    return figure


def _line(index: int) -> tuple[str, Literal["-", "--", "-.", ":"], str]:
    return STYLES[LINES[index % len(LINES)]]


def _short(token: str) -> str:
    """Write a token so that fonts have its signs."""
    shown = "".join({" ": "_", "\n": "\\n", "\t": "\\t"}.get(each, each) for each in token)
    return shown if len(shown) <= CHARACTERS else f"{shown[: CHARACTERS - 1]}~"


def _bar(figure: Figure, axes: list[Axes], scale: WeightScale) -> None:
    mappable = ScalarMappable(scale.norm, scale.colours)
    bar = figure.colorbar(mappable, ax=axes, label="weight", shrink=0.9, aspect=30, pad=0.02, extend="both")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
