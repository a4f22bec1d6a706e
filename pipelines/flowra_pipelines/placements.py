"""Which layers a placement means: query and value, attention, the feed-forward part, or all; read off their names."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from flowra_pipelines.errors import UserError

__all__ = ["PLACEMENTS", "placed"]

PLACEMENTS: Mapping[str, frozenset[str] | None] = MappingProxyType({
    "q,v": frozenset({"Q", "V"}),
    "attention": frozenset({"Q", "K", "V", "QKV", "O"}),
    "mlp": frozenset({"gate", "up", "gate+up", "down"}),
    "all": None,
})
"""Placement to types of layers (``flowra_analysis.layer_type``); None for whatever there is."""


def placed(names: Iterable[str], placement: str) -> list[str]:
    """Choose the layers of a placement. Where query and value are one layer with the key, ``q,v`` means that layer.

    Args:
        names: qualified names of layers.
        placement: a key of :data:`PLACEMENTS`.

    Returns:
        Those that it means, in their order.

    Raises:
        UserError: if the placement is unknown or means none of them.
    """
    from flowra_analysis import layer_type

    if placement not in PLACEMENTS:
        raise UserError(f"placement must be one of {'; '.join(PLACEMENTS)}, got {placement!r}")
    wanted, types = PLACEMENTS[placement], {name: layer_type(name) for name in names}
    if wanted is None:
        return list(types)
    found = [name for name, kind in types.items() if kind in wanted]
    if not found and placement == "q,v":
        found = [name for name, kind in types.items() if kind == "QKV"]
    if not found:
        known = ", ".join(dict.fromkeys(types.values()))
        raise UserError(f"placement must mean at least one layer, got {placement!r} for layers of the types {known}")
    return found
