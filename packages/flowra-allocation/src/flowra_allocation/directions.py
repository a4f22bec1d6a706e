"""What each direction of an update is worth, and how to keep the best of them (docs/methods.md, sections 4 and 7).

Two measures, each for every form of update:

- ``flow``: the rise of the loss, in its K-FAC model, when a direction leaves. A pair is re-based so that its directions
  separate (:func:`~flowra_allocation.bottleneck_gram.flow_spectrum`), and gains add up. Triplets are taken one by one,
  as they are: direction k is worth ½ (M_A)_kk (M_B)_kk, exactly if it alone leaves.
- ``magnitude``: half the squared norm of what leaves ΔW; no statistics are needed. A pair is re-based to the singular
  vectors of B A. It is what ``flow`` would be if all inputs and output gradients were alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowra_allocation.bottleneck_gram import BottleneckGram, FlowSpectrum, balance, flow_spectra, truncate
from flowra_allocation.policy import Keep, LayerView, Rebasing

__all__ = ["Directions", "best_of", "by_magnitude", "densities", "measure_directions"]


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """An update's directions, best first."""

    gains: tuple[float, ...]
    """Non-increasing, ≥ 0."""
    best: Callable[[int], Keep]
    """Maps a rank to what keeps that many of the best."""


def measure_directions(views: Mapping[str, LayerView], measure: Literal["flow", "magnitude"]) -> dict[str, Directions]:
    """Rank the directions of each update by one of the two measures.

    Args:
        views: module name to update, which has a Gram if the loss reached it.
        measure: ``"flow"``: what the K-FAC model of the loss loses, in units of the loss; or ``"magnitude"``.

    Returns:
        Module name to directions; none, and no gains, at rank 0.

    Raises:
        ValueError: if a Gram, or with ``magnitude`` a factor, holds NaN or infinity.
    """
    if measure == "magnitude":
        return {name: by_magnitude(view) for name, view in views.items()}
    grams = {name: view.gram or BottleneckGram.empty(view.rank) for name, view in views.items()}
    pairs = [name for name, view in views.items() if view.lora_E is None]
    spectra = dict(zip(pairs, flow_spectra([grams[name] for name in pairs]), strict=True))
    return {
        name: _separated(view, spectra[name]) if name in spectra else _as_they_are(grams[name])
        for name, view in views.items()
    }


def best_of(
    directions: Mapping[str, Directions], ranks: Mapping[str, int], views: Mapping[str, LayerView]
) -> dict[str, Keep]:
    """Say what stays of the modules that fall to a lower rank: the best of their directions."""
    return {name: directions[name].best(rank) for name, rank in ranks.items() if rank < views[name].rank}


def densities(directions: Mapping[str, Directions], views: Mapping[str, LayerView]) -> dict[str, float]:
    """Return the gains of each module, summed, per parameter of a direction."""
    return {name: sum(each.gains) / views[name].cost for name, each in directions.items()}


def _separated(view: LayerView, spectrum: FlowSpectrum) -> Directions:
    """Rank the directions of a pair by what each is worth once they separate."""
    return Directions(
        tuple(spectrum.gains.tolist()),
        lambda rank: Rebasing(**_named(truncate(view.lora_A, view.lora_B, spectrum, rank))),
    )


def _as_they_are(gram: BottleneckGram) -> Directions:
    """Rank triplets by what each is worth alone."""
    z2, delta2 = gram.activations.diagonal(), gram.gradients.diagonal()
    return _one_by_one(z2 * delta2 / (2 * max(gram.tokens, 1e-300) * max(gram.examples, 1e-300)))


def by_magnitude(view: LayerView) -> Directions:
    """Rank by the squared norm of the part of ΔW, halved.

    Returns:
        The directions.

    Raises:
        ValueError: if the factors hold NaN or infinity.
    """
    if view.lora_E is not None:
        return _one_by_one(view.magnitudes.square() / 2)
    factors = [each.to("cpu", torch.float64) for each in (view.lora_A, view.lora_B)]
    if not all(each.isfinite().all() for each in factors):
        raise ValueError("factors must be finite, got NaN or infinity. Lower the learning rate.")
    lora_A, lora_B = balance(*factors)
    sigma = view.scaling * lora_A.norm(dim=1) * lora_B.norm(dim=0)
    return Directions(
        tuple((sigma.square() / 2).tolist()),
        lambda rank: Rebasing(lora_A=lora_A[:rank].to(view.lora_A), lora_B=lora_B[:, :rank].to(view.lora_B)),
    )


def _one_by_one(gains: Tensor) -> Directions:
    """Rank directions that stay what they are; of equals the first."""
    if not gains.isfinite().all():
        raise ValueError("gains must be finite, got NaN or infinity. Lower the learning rate.")
    order = torch.argsort(gains, descending=True, stable=True).tolist()
    return Directions(tuple(gains[order].tolist()), lambda rank: tuple(sorted(order[:rank])))


def _named(factors: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("lora_A", "lora_B"), factors, strict=True))
