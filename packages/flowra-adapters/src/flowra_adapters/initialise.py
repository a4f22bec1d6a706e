"""Give attached LoRA adapters another start: the initialisations of :mod:`flowra_adapters.initialisation` by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from flowra_adapters.applying import adapter_dicts
from flowra_adapters.attach import adapters
from flowra_adapters.initialisation import (
    Initialisation,
    flow_v,
    lora_ga,
    lora_one,
    milora,
    olora,
    orthogonal,
    pissa,
)
from flowra_adapters.input_pca import InputPCA, eva
from flowra_adapters.lora import LoRA
from flowra_adapters.weights import base_weight

__all__ = ["INITIALISATIONS", "initialise"]

Evidence = Tensor | InputPCA


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """What a start is computed from."""

    weight: Tensor
    """``(m, n·∏k)``."""
    rank: int
    scaling: float
    evidence: Evidence | None
    generator: torch.Generator

    @property
    def matrix(self) -> Tensor:
        """The evidence, where it is a tensor."""
        assert isinstance(self.evidence, Tensor)
        return self.evidence

    @property
    def pca(self) -> InputPCA:
        """The evidence, where it is a PCA of inputs."""
        assert isinstance(self.evidence, InputPCA)
        return self.evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    start: Callable[[_Place], Initialisation]
    evidence: type | None = None


INITIALISATIONS: Mapping[str, _Row] = MappingProxyType({
    "pissa": _Row(start=lambda at: pissa(at.weight, at.rank, scaling=at.scaling)),
    "milora": _Row(start=lambda at: milora(at.weight, at.rank, scaling=at.scaling)),
    "olora": _Row(start=lambda at: olora(at.weight, at.rank, scaling=at.scaling)),
    "orthogonal": _Row(
        start=lambda at: orthogonal(
            at.weight.shape[0],
            at.weight.shape[1],
            at.rank,
            generator=at.generator,
            dtype=torch.promote_types(at.weight.dtype, torch.float32),
        )
    ),
    "lora_ga": _Row(start=lambda at: lora_ga(at.matrix, at.rank, generator=at.generator), evidence=Tensor),
    "lora_one": _Row(start=lambda at: lora_one(at.matrix, at.rank, generator=at.generator), evidence=Tensor),
    "eva": _Row(start=lambda at: eva(at.pca, at.rank, out_features=len(at.weight)), evidence=InputPCA),
    "flow_v": _Row(start=lambda at: flow_v(at.matrix, at.rank, out_features=len(at.weight)), evidence=Tensor),
})
"""Name to how it starts, and what it must be given for each site: for ``lora_ga`` and ``lora_one`` the mean gradient of
the loss in the weight ``(m, n·∏k)``, for ``eva`` the PCA of the layer's inputs, for ``flow_v`` leading input directions
``(≥ r, n·∏k)``."""


@torch.no_grad()
def initialise(
    model: nn.Module,
    name: str,
    *,
    adapter: str = "default",
    evidence: Mapping[str, Evidence] | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Give every LoRA adapter of this name another start. The model's output stays what it is without them.

    The base is never changed. Where a method takes its start out of the base weight (PiSSA, MiLoRA, OLoRA, LoRA-GA,
    LoRA-One), the adapter carries it as a constant with a minus sign instead, so that other adapters, ``disabled`` and
    files stay right: the update is s (B A - B₀ A₀), a plain LoRA of rank 2r when it is saved. All adapters get their
    start or none.

    Args:
        model: with freshly attached LoRA adapters.
        name: a key of :data:`INITIALISATIONS`.
        adapter: whose adapters.
        evidence: site name to what the initialisation is computed from, where it needs data.
        generator: source of randomness, by default one seeded with 0.

    Raises:
        ValueError: if the name is unknown, evidence is missing or superfluous, an adapter is not LoRA, or a start
            cannot be computed for a site, which is named.
    """
    if name not in INITIALISATIONS:
        raise ValueError(f"initialisation must be one of {sorted(INITIALISATIONS)}, got {name!r}")
    row, generator = INITIALISATIONS[name], generator or torch.Generator().manual_seed(0)
    found = adapters(model, adapter)
    _check_evidence(name, row, sorted(found), evidence)
    weights = _weights(model)
    starts: dict[str, Initialisation] = {}
    for site, one in found.items():
        if not isinstance(one, LoRA):
            raise ValueError(
                f"initialisation {name!r} must be given LoRA adapters, got {type(one).__name__} at {site!r}"
            )
        if one.operator.groups > 1:
            raise ValueError(f"initialisation {name!r} must be given layers of one group, got {site!r}. Exclude it.")
        if one.rank > 0:
            place = _Place(
                weight=weights[id(one)],
                rank=one.rank,
                scaling=one.scaling,
                evidence=evidence[site] if evidence is not None else None,
                generator=generator,
            )
            try:
                starts[site] = _fitting(row.start(place), one)
            except ValueError as error:
                raise ValueError(f"{error}; for module {site!r}. Choose another value or exclude the module.") from None
    for site, start in starts.items():
        one = found[site]
        assert isinstance(one, LoRA)
        if start.offset:
            one.start_from(start.lora_A, start.lora_B)
        else:
            one.replace_factors(start.lora_A.to(one.lora_A), start.lora_B.to(one.lora_B))


def _fitting(start: Initialisation, one: LoRA) -> Initialisation:
    wanted, got = ([tuple(each.shape) for each in (one.lora_A, one.lora_B)] for one in (one, start))
    if wanted != got:
        raise ValueError(f"evidence must have the sizes of the layer, {wanted} for its factors, got {got}")
    return start


def _weights(model: nn.Module) -> dict[int, Tensor]:
    """Return each adapter's base weight as a matrix ``(m, n·∏k)``, by the adapter's identity."""
    return {
        id(one): site.operator.to_standard(base_weight(held, site)).flatten(1)
        for held in adapter_dicts(model).values()
        for key, one in held.each()
        if len((site := held.sites[key]).operator.shape) > 1
    }


def _check_evidence(name: str, row: _Row, sites: list[str], evidence: Mapping[str, Evidence] | None) -> None:
    if row.evidence is None:
        if evidence is not None:
            raise ValueError(f"evidence must be None for {name!r}, which needs no data, got some")
        return
    given = evidence or {}
    missing = [site for site in sites if site not in given]
    if missing:
        raise ValueError(f"evidence must be given for every adapted site with {name!r}, got none for {missing[0]!r}")
    wrong = [site for site in sites if not isinstance(given[site], row.evidence)]
    if wrong:
        kind = type(given[wrong[0]]).__name__
        raise ValueError(f"evidence must be {row.evidence.__name__} for {name!r}, got {kind} for {wrong[0]!r}")
