"""Attach what a plan says: each site its own method and rank."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn

from flowra_adapters.adapter import Adapter
from flowra_adapters.attach import attach
from flowra_adapters.lora import LoRA
from flowra_adapters.methods import METHODS, AdapterMethod
from flowra_adapters.sites import sites

__all__ = ["KINDS", "PlanEntry", "attach_plan"]


class PlanEntry(Protocol):
    """What one site gets; such as an entry of ``modules`` of ``plan.json`` (docs/formats/plan.md)."""

    @property
    def kind(self) -> str:
        """Adapter method, a key of :data:`METHODS`."""

    @property
    def rank(self) -> int:
        """≥ 0."""


def attach_plan(
    model: nn.Module,
    entries: Mapping[str, PlanEntry],
    *,
    scaling: float,
    dropout: float = 0.0,
    modules_to_save: Iterable[str] = (),
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Adapter]:
    """Attach one set of adapters of several methods, and freeze the base. See :func:`attach` for what is not said here.

    Nothing is changed if an argument is wrong.

    Args:
        model: changed in place.
        entries: exact site name to kind and rank. Rank 0 attaches an empty adapter that may grow later.
        scaling: s of every update that has a scale; a plan says it once.
        dropout: of every update that has a scale.
        modules_to_save: qualified names of modules trained in full.
        adapter: name of this set of adapters.
        dtype: of the adapters' tensors.
        generator: source of randomness, by default one seeded with 0.

    Returns:
        The new adapters by site name, in the model's own order.

    Raises:
        ValueError: if a name is not a site, a kind is unknown or cannot adapt its site, or :func:`attach` refuses.
    """
    known = sites(model)
    for name, entry in entries.items():
        if name not in known:
            raise ValueError(f"entries must name sites of the model, got {name!r}. List them with sites(model).")
        if entry.kind not in KINDS:
            raise ValueError(f"kind must be one of {sorted(KINDS)}, got {entry.kind!r} for {name!r}")
        if not KINDS[entry.kind].adapts(known[name]):
            raise ValueError(f"kind must be a method that can adapt {name!r}, got {entry.kind!r}. Choose another.")
    planned = AdapterMethod(
        name="plan",
        adapter=LoRA,
        scaling=METHODS["lora"].scaling,
        adapts=lambda site: site.name in entries,
        instead=lambda site: entries[site.name].kind,
    )
    return attach(
        model,
        {name: entry.rank for name, entry in entries.items()},
        method=planned,
        scaling=scaling,
        dropout=dropout,
        modules_to_save=modules_to_save,
        adapter=adapter,
        dtype=dtype,
        generator=generator,
    )


KINDS: Mapping[str, AdapterMethod] = MappingProxyType({
    name: row for name, row in METHODS.items() if not row.needs_alpha and name != "polymorphic"
})
"""Methods that a plan can name: those whose s is a number of the plan's, and that are one method."""
