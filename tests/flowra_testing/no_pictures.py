"""Stages that draw nothing: pictures take half of a tiny run's time."""

from unittest.mock import Mock

import pytest

from flowra_pipelines import loss_figure, refinement_figures, report_figures

__all__ = ["draw_nothing"]


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Put mocks in the place of the pictures that stages draw."""
    patch.setattr(loss_figure, "loss_curve", Mock())
    patch.setattr(report_figures, "sensitivity_map", Mock())
    for name in ("rank_map", "rank_over_time", "budget_path", "magnitude_and_entropy"):
        patch.setattr(refinement_figures, name, Mock())
