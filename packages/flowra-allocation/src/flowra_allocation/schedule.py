"""Evenly spaced events between two steps, as :class:`~flowra_allocation.breathe.Breathe` and others hold them."""

from dataclasses import dataclass

__all__ = ["RefinementSchedule"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RefinementSchedule:
    """When rank moves. Steps count finished optimiser steps of the whole run."""

    start: int
    """Rank is as planned until this step, ≥ 0."""
    freeze: int
    """Ranks are frozen from this step on; the last event happens there."""
    events: int = 4
    """Number of events, evenly spaced, ≥ 1."""
    observe: int = 4
    """Steps before each event on which statistics are gathered, ≥ 1."""

    def __post_init__(self) -> None:
        """Check that the schedule can fire.

        Raises:
            ValueError: if there is no room for the events between start and freeze.
        """
        if self.events < 1 or self.observe < 1:
            raise ValueError(f"schedule must have events ≥ 1 and observe ≥ 1, got {self}")
        if self.start < 0 or (self.freeze - self.start) // self.events < 1:
            raise ValueError(
                f"schedule must leave at least one step per event, got {self.events} events in steps"
                f" {self.start}–{self.freeze}. Train longer or ask for fewer events."
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps after which an event happens; the last is ``freeze``."""
        span = self.freeze - self.start
        return tuple(self.start + span * (index + 1) // self.events for index in range(self.events))
