"""Pictures: layer × module type, loss. Drawn without a display."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

__all__ = ["ModuleGrid", "layer_and_kind", "loss_curve", "module_grid", "module_heatmap"]

BLOCK = re.compile(r"(?:^|\.)(\d{1,9})\.(.+)$")
"""The index of a block and what follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleGrid:
    """Where each module stands in a picture of blocks × kinds of modules."""

    kinds: tuple[str, ...]
    """Rows: what a module is in its block, in the order of the modules."""
    blocks: tuple[int | None, ...]
    """Columns: ascending; None, at the end, for modules outside blocks."""
    places: Mapping[str, tuple[int, int]]
    """Module name to row and column; no two modules share a place."""


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """Split a module name into the index of its block and what it is there.

    Returns:
        The index, None outside blocks, and the rest of the name.

    Example:
        >>> layer_and_kind("bert.encoder.layer.3.attention.self.query")
        (3, 'attention.self.query')
        >>> layer_and_kind("bert.pooler.dense")
        (None, 'bert.pooler.dense')
    """
    match = BLOCK.search(name)
    return (int(match[1]), match[2]) if match else (None, name)


def module_grid(names: Iterable[str]) -> ModuleGrid:
    """Find a row and a column for each module.

    Where two stacks of blocks have modules of the same name (an encoder and a decoder), the kind begins with the stack.

    Args:
        names: of modules, each once.

    Returns:
        The places.
    """
    split = {name: layer_and_kind(name) for name in names}
    count = Counter(split.values())
    stack = {name: name[: match.start()] for name in split if (match := BLOCK.search(name))}
    double = {kind for (_, kind), times in count.items() if times > 1}
    kind_of = {name: f"{stack[name]}: {kind}" if kind in double else kind for name, (_, kind) in split.items()}
    kinds = tuple(dict.fromkeys(kind_of.values()))
    numbers = sorted({block for block, _ in split.values() if block is not None})
    blocks = (*numbers, *([None] if any(block is None for block, _ in split.values()) else []))
    rows = {kind: row for row, kind in enumerate(kinds)}
    columns = {block: column for column, block in enumerate(blocks)}
    places = {name: (rows[kind_of[name]], columns[block]) for name, (block, _) in split.items()}
    return ModuleGrid(kinds=kinds, blocks=blocks, places=places)


def module_heatmap(
    values: Mapping[str, float], *, title: str, label: str, limits: tuple[float, float] | None
) -> Figure:
    """Draw one value per module: blocks across, kinds of modules down; modules outside blocks in a column ``–``."""
    place = module_grid(values)
    grid = np.full((len(place.kinds), len(place.blocks)), np.nan)
    for name, (row, column) in place.places.items():
        grid[row, column] = values[name]
    figure = Figure(figsize=(2.8 + 0.55 * len(place.blocks), 1.6 + 0.38 * len(place.kinds)), layout="constrained")
    axes = figure.subplots()
    low, high = limits or (0.0, max(1.0, float(np.nanmax(grid))))
    image = axes.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for row in range(len(place.kinds)):
        for column in range(len(place.blocks)):
            value = grid[row, column]
            if not np.isnan(value):
                text = f"{value:.0f}" if float(value).is_integer() and limits is None else f"{value:.2f}"
                dark = (value - low) / (high - low) < 0.6
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(place.blocks)), ["–" if block is None else str(block) for block in place.blocks])
    axes.set_yticks(range(len(place.kinds)), place.kinds, parse_math=False)
    axes.set_xlabel("block")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def loss_curve(points: Sequence[tuple[int, float]], *, title: str) -> Figure:
    """Draw the training loss by step, with a running mean over a tenth of the points."""
    steps = [step for step, _ in points]
    losses = np.array([loss for _, loss in points])
    window = max(1, len(losses) // 10)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps[window - 1 :], smooth, linewidth=2, label=f"mean of {window}")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats)")
    axes.set_title(title)
    axes.legend(frameon=False)
    return figure
