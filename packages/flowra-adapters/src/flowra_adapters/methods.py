"""The table of adapter methods."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flowra_adapters.adapter import Adapter
from flowra_adapters.dora import DoRA
from flowra_adapters.lora import LoRA
from flowra_adapters.matching import is_bias, is_norm, low_rank
from flowra_adapters.offset import ParameterOffset
from flowra_adapters.sites import Site
from flowra_adapters.svd import SVDForm
from flowra_adapters.svd_masked import MaskedSVDForm
from flowra_adapters.tucker_conv import flora

__all__ = ["METHODS", "AdapterMethod", "instead_of"]


def _no_other(site: Site) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterMethod:
    """How adapters of one kind are made. A method of your own is a value of this class, given to ``attach``."""

    name: str
    """Of the method."""
    adapter: Callable[..., Adapter]
    """Called with the operator, and ``rank``, ``scaling``, ``dropout``, ``dtype`` and ``generator`` by name."""
    scaling: Callable[[float, int], float] | None
    """s from α and the reference rank; None if the update has no scale."""
    needs_alpha: bool = False
    """Whether s must come from α."""
    adapts: Callable[[Site], bool] = low_rank
    """Which sites it can adapt."""
    instead: Callable[[Site], str | None] = _no_other
    """Another method for a site, a key of :data:`METHODS`; None for this one."""


def _over_rank(alpha: float, rank: int) -> float:
    return alpha / rank


def _over_root(alpha: float, rank: int) -> float:
    """Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2: the only power of the rank that keeps learning stable."""
    return alpha / math.sqrt(rank)


def _over_rank_as_adalora(alpha: float, rank: int) -> float:
    """As in the released code of AdaLoRA and FlexLoRA and in PEFT, so that α means the same there and here."""
    return alpha / (rank + 1e-5)


def _is_array(site: Site) -> bool:
    """Tell whether a site has at least two axes and is no normalisation's gain."""
    return len(site.operator.shape) > 1 and not is_norm(site)


def _by_kind(site: Site) -> str | None:
    """Leave matrices to LoRA: those of linear and pointwise layers, of embeddings, and raw ones."""
    if is_norm(site):
        return "norm"
    return "flora" if math.prod(site.operator.shape[2:]) > 1 else None


METHODS: Mapping[str, AdapterMethod] = MappingProxyType({
    row.name: row
    for row in (
        AdapterMethod(name="lora", adapter=LoRA, scaling=_over_rank),
        AdapterMethod(name="rslora", adapter=LoRA, scaling=_over_root, needs_alpha=True),
        AdapterMethod(name="dora", adapter=DoRA, scaling=_over_rank),
        AdapterMethod(name="svd", adapter=SVDForm, scaling=_over_rank_as_adalora),
        AdapterMethod(name="svd_masked", adapter=MaskedSVDForm, scaling=_over_rank_as_adalora),
        AdapterMethod(name="flora", adapter=flora, scaling=_over_rank, adapts=_is_array),
        AdapterMethod(
            name="polymorphic",
            adapter=LoRA,
            scaling=_over_rank,
            adapts=lambda site: _is_array(site) or is_norm(site),
            instead=_by_kind,
        ),
        AdapterMethod(name="norm", adapter=ParameterOffset, scaling=None, adapts=is_norm),
        AdapterMethod(name="bitfit", adapter=ParameterOffset, scaling=None, adapts=is_bias),
    )
})


def instead_of(method: AdapterMethod, site: Site) -> AdapterMethod:
    """Return the method that adapts a site: this one, or the one it names instead."""
    other = method.instead(site)
    return method if other is None else METHODS[other]
