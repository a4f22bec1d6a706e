"""Pictures: layer × module type, rank over time, loss. Drawn without a display."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

__all__ = ["layer_and_kind", "loss_curve", "module_heatmap", "rank_over_time"]


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
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else (None, name)


def module_heatmap(
    values: Mapping[str, float], *, title: str, label: str, limits: tuple[float, float] | None
) -> Figure:
    """Draw one value per module: blocks across, kinds of modules down; modules outside blocks in a column ``–``."""
    places = {name: layer_and_kind(name) for name in values}
    blocks = sorted({block for block, _ in places.values() if block is not None})
    columns: list[int | None] = [*blocks, *([None] if any(block is None for block, _ in places.values()) else [])]
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = np.full((len(kinds), len(columns)), np.nan)
    for name, (block, kind) in places.items():
        grid[kinds.index(kind), columns.index(block)] = values[name]
    figure = Figure(figsize=(2.8 + 0.55 * len(columns), 1.6 + 0.38 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    low, high = limits or (0.0, max(1.0, float(np.nanmax(grid))))
    image = axes.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for row in range(len(kinds)):
        for column in range(len(columns)):
            value = grid[row, column]
            if not np.isnan(value):
                text = f"{value:.0f}" if float(value).is_integer() and limits is None else f"{value:.2f}"
                dark = (value - low) / (high - low) < 0.6
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), ["–" if block is None else str(block) for block in columns])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def rank_over_time(steps: Sequence[int], ranks: Sequence[Mapping[str, int]]) -> Figure:
    """Draw the rank of every module after each event."""
    names = list(ranks[0])
    grid = np.array([[each[name] for each in ranks] for name in names], dtype=float)
    figure = Figure(figsize=(4.2 + 0.5 * len(steps), 1.4 + 0.17 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=max(1.0, grid.max()), aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xlabel("step")
    axes.set_title("Rank over time")
    figure.colorbar(image, ax=axes, label="rank")
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
