"""What people call layers, in the words of each architecture: ``q`` is ``query`` here and ``q_proj`` there."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import nn

from flowra_adapters import adaptable_modules, match_modules

__all__ = ["ROLES", "layers_called"]

ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "q": ("query", "q_proj", "q_lin", "query_proj", "q"),
    "k": ("key", "k_proj", "k_lin", "key_proj", "k"),
    "v": ("value", "v_proj", "v_lin", "value_proj", "v"),
    "o": ("attention.output.dense", "o_proj", "out_proj", "out_lin", "o"),
})
FUSED = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv")
"""Query, key and value in one layer: it is meant by each of ``q``, ``k``, ``v`` where they are not apart."""


def layers_called(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Resolve names, patterns and the roles ``q``, ``k``, ``v``, ``o`` to names of layers that can carry an adapter.

    Args:
        model: whose layers are meant.
        names: at least one.

    Returns:
        Module names in the model's own order.

    Raises:
        ValueError: if one of the names means no layer.
    """
    present = adaptable_modules(model)
    patterns = []
    for name in names:
        tails = (*ROLES.get(name, ()), *(FUSED if name in ("q", "k", "v") else ()))
        known = [tail for tail in tails if any(f".{each}".endswith(f".{tail}") for each in present)]
        if name in ROLES and not known:
            here = sorted({each.rsplit(".", 1)[-1] for each in present})
            raise ValueError(
                f"layer {name!r} must have a usual name ({', '.join(tails)}), got none."
                f" Layers here: {', '.join(here)}. Name them."
            )
        patterns += known or [name]
    return match_modules(model, patterns)
