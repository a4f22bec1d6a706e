"""What a rule of composition can be told beyond the weights."""

from dataclasses import dataclass, fields
from typing import Literal

__all__ = ["MergeOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """Options of all rules; one that is None is left to the rule, and one that the rule does not take is refused.

    Raises:
        ValueError: if a value is out of range.
    """

    density: float | None = None
    """Share of the entries of each task vector that is kept, in (0, 1]. Of rules that trim (``ties``,
    ``magnitude_prune``) the largest, 0.2 by default, as Yadav et al. 2023. Of those that draw by chance (``dare``) each
    entry with this probability, 0.5 by default, where as much noise comes in as there is signal."""
    trim: Literal["global", "tensor"] | None = None
    """Whether the largest entries are those of a task's whole vector, over all modules, or of each module; ``global``
    by default. Entries are those of the rule's space."""
    seed: int | None = None
    """Of what is drawn by chance; 0 by default. Draws depend on the seed, the name of the module and the adapter's
    ΔW, not on its weight or the order of the adapters."""
    common: float | None = None
    """Share of the directions that is taken from the sum, in [0, 1] (``iso_cts``), 0.8 by default, as Marczak et al.
    2025; the rest are of single tasks."""
    shrinkage: float | None = None
    """ρ in [0, 1], how far second moments are drawn to a multiple of the identity (``flow``, 0.02 by default; 0.1 is
    better for fewer than 64 examples) or their off-diagonal entries to 0 (``regmean``, 0.1 by default)."""

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.trim not in (None, "global", "tensor"):
            raise ValueError(f"trim must be 'global' or 'tensor', got {self.trim!r}")
        if self.seed is not None and (type(self.seed) is not int or self.seed < 0):
            raise ValueError(f"seed must be a whole number ≥ 0, got {self.seed!r}")
        for name in ("common", "shrinkage"):
            value: float | None = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")

    def given(self) -> dict[str, object]:
        """Return the options that are not None, by name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
