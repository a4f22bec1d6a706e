"""What each direction of an update is worth, and how to keep the best of them (docs/methods.md, sections 4 and 7).

Two measures, each for every form of update:

- ``flow``: the rise of the loss, in its K-FAC model, when a direction leaves. A pair is re-based so that its directions
  separate (:func:`~flowra_allocation.bottleneck_gram.flow_spectrum`), and gains add up. Triplets are taken one by one,
  as they are: direction k is worth ½ (M_A)_kk (M_B)_kk, exactly if it alone leaves.
- ``magnitude``: half the squared norm of what leaves ΔW; no statistics are needed. A pair is re-based to the singular
  vectors of B A. It is what ``flow`` would be if all inputs and output gradients were alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowra_allocation.bottleneck_gram import BottleneckGram, balance, flow_spectrum, truncate
from flowra_allocation.policy import Keep, LayerView, Rebasing

__all__ = ["Directions", "by_flow", "by_magnitude", "measure_directions"]


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """An update's directions, best first."""

    gains: tuple[float, ...]
    """Non-increasing, ≥ 0."""
    best: Callable[[int], Keep]
    """Maps a rank to what keeps that many of the best."""


def measure_directions(view: LayerView, measure: Literal["flow", "magnitude"]) -> Directions:
    """Rank the directions of an update by one of the two measures.

    Returns:
        The directions; none, and no gains, at rank 0.
    """
    if view.rank == 0:
        return Directions((), lambda _: ())
    return by_flow(view, view.gram or BottleneckGram.empty(view.rank)) if measure == "flow" else by_magnitude(view)


def by_flow(view: LayerView, gram: BottleneckGram) -> Directions:
    """Rank by what the K-FAC model of the loss loses.

    Returns:
        The directions, gains in units of the loss.

    Raises:
        ValueError: if the Gram holds NaN or infinity.
    """
    if view.lora_E is not None:
        z2, delta2 = gram.activations.diagonal(), gram.gradients.diagonal()
        return _one_by_one(z2 * delta2 / (2 * max(gram.tokens, 1e-300) * max(gram.examples, 1e-300)))
    spectrum = flow_spectrum(gram)
    return Directions(
        tuple(spectrum.gains.tolist()),
        lambda rank: Rebasing(**_named(truncate(view.lora_A, view.lora_B, spectrum, rank))),
    )


def by_magnitude(view: LayerView) -> Directions:
    """Rank by the squared norm of the part of ΔW, halved."""
    if view.lora_E is not None:
        return _one_by_one(view.magnitudes.square() / 2)
    lora_A, lora_B = balance(*(each.to("cpu", torch.float64) for each in (view.lora_A, view.lora_B)))
    sigma = view.scaling * lora_A.norm(dim=1) * lora_B.norm(dim=0)
    return Directions(
        tuple((sigma.square() / 2).tolist()),
        lambda rank: Rebasing(lora_A=lora_A[:rank].to(view.lora_A), lora_B=lora_B[:, :rank].to(view.lora_B)),
    )


def _one_by_one(gains: Tensor) -> Directions:
    """Rank directions that stay what they are; of equals the first."""
    order = torch.argsort(gains, descending=True, stable=True).tolist()
    return Directions(tuple(gains[order].tolist()), lambda rank: tuple(sorted(order[:rank])))


def _named(factors: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("lora_A", "lora_B"), factors, strict=True))
