"""What a rule of composition can be told beyond the weights."""

from dataclasses import dataclass, fields
from typing import Literal

__all__ = ["MergeOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """Options of all rules; one that is None is left to the rule, and one that the rule does not take is refused.

    Raises:
        ValueError: if a number is out of range.
    """

    density: float | None = None
    """Share of the entries of each task vector that is kept, in (0, 1]: the largest (``ties``, ``magnitude_prune``),
    or any, drawn by chance (``dare``)."""
    trim: Literal["global", "tensor"] | None = None
    """Whether the largest entries are those of a task's whole vector or of each module; ``global`` by default."""
    seed: int | None = None
    """Of what is drawn by chance; 0 by default. Draws depend on the seed, the module and the adapter's values, not on
    the order of the adapters."""
    common: float | None = None
    """Share of the directions that is taken from the sum, in [0, 1] (``iso_cts``); the rest are of single tasks."""
    shrinkage: float | None = None
    """ρ in [0, 1], how far second moments are drawn to a multiple of the identity (``flow``) or their off-diagonal
    entries to 0 (``regmean``)."""

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        for name in ("common", "shrinkage"):
            value: float | None = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")

    def given(self) -> dict[str, object]:
        """Return the options that are not None, by name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
