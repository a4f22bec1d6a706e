"""Updates that lie in files: their shapes are known at once, their values are read when they are asked for."""

from collections.abc import Iterator, Mapping

from flowra_compose.low_rank import LowRankUpdate

__all__ = ["LazyUpdates", "outlines_of"]


class LazyUpdates(Mapping[str, LowRankUpdate]):
    """Updates by name, each read when it is asked for and kept nowhere."""

    outlines: Mapping[str, LowRankUpdate]
    """For each name an update without values, on the device ``meta``."""

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self.outlines)

    def __len__(self) -> int:
        """Count the updates."""
        return len(self.outlines)


def outlines_of(updates: Mapping[str, LowRankUpdate]) -> Mapping[str, LowRankUpdate]:
    """Return updates for those who ask for shapes only."""
    return updates.outlines if isinstance(updates, LazyUpdates) else updates
