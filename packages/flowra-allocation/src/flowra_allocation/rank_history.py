"""How rank moved in a run, as values and as a file (docs/formats/rank_history.md)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

__all__ = ["RankEvent", "RankHistory"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEvent:
    """One event, as it happened."""

    step: int
    """Finished optimiser steps."""
    ranks: Mapping[str, int]
    """Ranks after the event."""
    parameters: int
    """Σ cost · rank after the event."""
    budget: int
    """Parameters that were allowed after the event."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Module name to directions removed, ≥ 1."""
    admitted: Mapping[str, int] = field(default_factory=dict)
    """Module name to directions that came, ≥ 1; best first."""
    silenced: Mapping[str, int] = field(default_factory=dict)
    """Module name to directions, of those in ``ranks``, whose E was set to zero, ≥ 1."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """Module name to the score that decided; empty if the policy has none."""
    kkt_gap: float | None = None
    """Smallest gain per parameter kept minus largest dropped; None if nothing was dropped or kept."""


@dataclass(kw_only=True, slots=True)
class RankHistory:
    """Ranks over a run."""

    format_version: ClassVar[int] = 2

    initial: dict[str, int]
    """Ranks before the first event."""
    budget: int
    """P, in parameters."""
    policy: str
    """What decided."""
    settings: dict[str, float | str | bool | None]
    """What defines the policy."""
    steps: tuple[int, ...]
    """Steps after which rank was to move; from the last on it is frozen."""
    peak: int
    """Largest Σ cost · rank so far, that before the first event included."""
    events: list[RankEvent] = field(default_factory=list)
    """What happened, in order."""
    seconds: float = 0.0
    """Time spent in events. Not part of any hash."""

    def add(self, event: RankEvent) -> None:
        """Append an event; it shares the ranks of what was before it, if they did not change."""
        before = self.events[-1].ranks if self.events else self.initial
        self.events.append(replace(event, ranks=before) if event.ranks == before else event)
        self.peak = max(self.peak, event.parameters)

    def as_json(self) -> dict[str, Any]:
        """Return plain values, ``seconds`` included."""
        return {"format_version": self.format_version, **asdict(self)}
