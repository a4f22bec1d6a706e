"""The picture of a training's loss. Drawn without a display."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from flowra_pipelines.figure_style import FAINT, styled

__all__ = ["loss_curve"]


@styled
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
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    axes.legend()
    return figure
