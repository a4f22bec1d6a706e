"""Between which ranks a module may lie: caps, floors, frozen modules and steps."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Limits", "limits_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a solver is told of ranks."""

    floors: Mapping[str, int]
    """Module name to least rank."""
    caps: Mapping[str, int]
    """Module name to largest rank, at least the floor."""
    rank_steps: Mapping[str, Sequence[int]]
    """Module name to the ranks it may have beside 0, for the modules of which not all are permitted."""

    def without(self, names: Collection[str]) -> "Limits":
        """Leave modules at their floors."""
        caps = {name: self.floors[name] if name in names else cap for name, cap in self.caps.items()}
        return Limits(floors=self.floors, caps=caps, rank_steps=self.rank_steps)

    def capped(self, cap: int, names: Collection[str]) -> "Limits":
        """Cap modules further."""
        caps = {name: min(cap, own) if name in names else own for name, own in self.caps.items()}
        return Limits(floors=self.floors, caps=caps, rank_steps=self.rank_steps)


def limits_of(
    units: Mapping[str, int],
    *,
    caps: int | Mapping[str, int] | None = None,
    floors: int | Mapping[str, int] | None = None,
    frozen: Mapping[str, int] | None = None,
    rank_steps: Sequence[int] | None = None,
    items: Collection[str] = (),
) -> Limits:
    """Put together what is said of ranks.

    Args:
        units: module name to the number of its units of rank.
        caps: largest rank, of all or by name; no more than the units.
        floors: least rank, of all or by name. One for all is lowered to a module's cap.
        frozen: module name to the rank it keeps, whatever else is said.
        rank_steps: the ranks permitted beside 0. Floors are raised and caps lowered to them.
        items: modules that steps do not concern.

    Returns:
        The limits.

    Raises:
        ValueError: if a limit is negative, a floor by name exceeds the cap, or a step is below 1.
    """
    frozen = frozen or {}
    for what, value in {"caps": caps, "floors": floors, "frozen": frozen}.items():
        ranks = value.values() if isinstance(value, Mapping) else [value or 0]
        if any(rank < 0 for rank in ranks):
            raise ValueError(f"{what} must be ranks ≥ 0, got {value}")
    if rank_steps is not None and min(rank_steps, default=0) < 1:
        raise ValueError(f"rank_steps must be at least one rank ≥ 1, got {list(rank_steps)}")
    least, most, steps = {}, {}, {}
    for name, largest in units.items():
        high = min(largest, caps.get(name, largest) if isinstance(caps, Mapping) else largest if caps is None else caps)
        low = floors.get(name, 0) if isinstance(floors, Mapping) else min(floors or 0, high)
        if rank_steps is not None and name not in items:
            every = steps[name] = sorted({0, *rank_steps})
            high = max(step for step in every if step <= high)
            low = min((step for step in every if step >= low), default=low)
            low = low if isinstance(floors, Mapping) else min(low, high)
        if name in frozen:
            high = low = frozen[name]
            steps.pop(name, None)
        if low > high:
            raise ValueError(
                f"floors must be at most the largest rank, {high} for {name!r}, got {low}. Lower the floor."
            )
        least[name], most[name] = low, high
    return Limits(floors=least, caps=most, rank_steps={name: each[1:] for name, each in steps.items()})
