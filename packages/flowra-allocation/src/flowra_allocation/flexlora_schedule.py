"""When FlexLoRA moves rank, and how many directions at a time.

    b(t) = round(b0 (1 − p³)),   p = clip((t − warmup) / (T − final − warmup), 0, 1)

rounded half to even (Liu, Si & Jia 2026, arXiv:2601.22905, eq. 4, as the released code has it). b stays near b0 until
late: at p = ½ it is ⅞ b0. This is not AdaLoRA's (1 − p)³. The released launcher leaves this schedule off: b = 4
throughout, ``decay="constant"`` here.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

__all__ = ["FlexLoRASchedule"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlexLoRASchedule:
    """Events every ``interval`` steps, strictly between two steps. Steps count finished optimiser steps of the run."""

    total_steps: int
    """T, of the run."""
    warmup: int
    """No event up to this step, ≥ 0."""
    final: int
    """No event in so many last steps, ≥ 0; with ``warmup`` fewer than T."""
    interval: int
    """Steps from one event to the next, ≥ 1."""
    b0: int
    """Directions that leave and come at the first events, ≥ 1."""
    decay: Literal["cubic", "constant"] = "cubic"
    """Whether b falls to 0."""

    def __post_init__(self) -> None:
        """Check that the schedule can fire.

        Raises:
            ValueError: if a number is out of range, or no event would happen.
        """
        if self.warmup < 0 or self.final < 0 or self.interval < 1 or self.b0 < 1:
            raise ValueError(f"schedule must have warmup ≥ 0, final ≥ 0, interval ≥ 1 and b0 ≥ 1, got {self}")
        if not self.steps:
            raise ValueError(
                f"schedule must have an event: a step {self.warmup} + k · {self.interval} with k ≥ 1 below"
                f" {self.total_steps} − {self.final} where b ≥ 1, got {self}. Train longer, or shorten warmup, final or"
                " interval."
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps after which an event happens: those of the interval, after warmup and before T − final, with b ≥ 1."""
        return _steps(self)

    def directions(self, step: int) -> int:
        """Return b at a step; with ``decay="constant"`` b0 at every step."""
        if self.decay == "constant":
            return self.b0
        span = self.total_steps - self.final - self.warmup
        progress = min(max((step - self.warmup) / span, 0.0), 1.0)
        return round(self.b0 - self.b0 * progress**3)


@lru_cache(maxsize=16)  # a refiner asks before and after each step
def _steps(schedule: FlexLoRASchedule) -> tuple[int, ...]:
    every = range(schedule.warmup + schedule.interval, schedule.total_steps - schedule.final, schedule.interval)
    return tuple(step for step in every if schedule.directions(step) > 0)
