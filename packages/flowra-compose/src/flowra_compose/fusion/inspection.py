"""What gates do on texts: the weight of each adapter by token and place, and averages by layer.

The average by layer with its spread is Figure 3 of Wang et al. 2024, *LoRA-Flow* (arXiv:2402.11455);
``docs/methods.md``, section 29. Positions of padding take part in nothing.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowra_compose.fusion.fusion_record import FusionRecord
from flowra_compose.fusion.gates import GateOptions, Level

__all__ = [
    "GateInspection",
    "TextWeights",
    "WeightSummary",
    "layer_of",
    "weights_of_texts",
]

AMBIGUOUS_ENTROPY = 0.98
"""Entropy of the shares over log k from which they do not decide: at k = 2 both lie between 0.42 and 0.58."""
MOST = 0.5
"""Share of the places that must not decide for a position to be ambiguous, and of the layers that must differ for a gap
of weights."""
VARYING = 0.01
"""Spread over positions from which the shares of a place are not all the same."""

NUMBER = re.compile(r"^(.*?(?:^|\.)\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TextWeights:
    """One text's tokens, and the weight of each adapter at each of them, without padding.

    Raises:
        ValueError: if the shapes do not fit.
    """

    tokens: tuple[str, ...]
    """As they are to be read."""
    weights: Tensor
    """``(places, positions, k)``, on the CPU."""
    shares: Tensor
    """The softmax in them, of the same shape."""

    def __post_init__(self) -> None:
        if self.weights.ndim != 3 or self.weights.shape[1] != len(self.tokens) or not self.tokens:
            raise ValueError(
                f"weights must be (places, {len(self.tokens)} tokens, k), at least one token,"
                f" got {tuple(self.weights.shape)}"
            )
        if self.shares.shape != self.weights.shape:
            raise ValueError(
                f"shares must be {tuple(self.weights.shape)} as the weights, got {tuple(self.shares.shape)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSummary:
    """Weights of a place or layer over all positions, one number for each adapter."""

    name: str
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    """Standard deviation over positions, and over the places of a layer."""
    lowest: tuple[float, ...]
    highest: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GateInspection:
    """What was seen of one fusion on texts.

    Raises:
        ValueError: if there is no text, or one has other places or adapters.
    """

    adapters: tuple[str, ...]
    level: Level
    places: tuple[str, ...]
    """As recorded, in the order in which the model asked them."""
    texts: tuple[TextWeights, ...]
    options: GateOptions | None = None
    """Of the gates; None for routing that is no gate, of which nothing is said that concerns training."""

    def __post_init__(self) -> None:
        wanted = len(self.places), len(self.adapters)
        got = sorted({(each.weights.shape[0], each.weights.shape[2]) for each in self.texts})
        if got != [wanted]:
            raise ValueError(f"texts must have weights of (places, adapters) = {wanted}, got {got or 'no text'}")

    @property
    def positions(self) -> int:
        """How many tokens were seen."""
        return sum(len(each.tokens) for each in self.texts)

    @property
    def layers(self) -> dict[str, list[int]]:
        """Name of each layer to the indices of its places."""
        found: dict[str, list[int]] = {}
        for index, place in enumerate(self.places):
            found.setdefault(layer_of(place), []).append(index)
        return found

    def weights(self) -> Tensor:
        """Return the weights of all texts, ``(places, positions, k)``, float64."""
        return torch.cat([each.weights.double() for each in self.texts], dim=1)

    def shares(self) -> Tensor:
        """Return the shares of all texts, ``(places, positions, k)``, float64."""
        return torch.cat([each.shares.double() for each in self.texts], dim=1)

    def by_place(self) -> list[WeightSummary]:
        """Sum up each place."""
        return [_summary(name, each) for name, each in zip(self.places, self.weights(), strict=True)]

    def by_layer(self) -> list[WeightSummary]:
        """Sum up each layer: Figure 3 of the paper. At level ``step`` there is one, named ``""``."""
        weights = self.weights()
        return [_summary(name, weights[indices].flatten(0, 1)) for name, indices in self.layers.items()]

    def layer_weights(self, text: TextWeights) -> Tensor:
        """Return the weights of a text averaged over the places of each layer, ``(layers, positions, k)``, float64."""
        weights = text.weights.double()
        return torch.stack([weights[indices].mean(dim=0) for indices in self.layers.values()])

    def mean(self) -> tuple[float, ...]:
        """Return the mean weight of each adapter over all places and positions."""
        return _floats(self.weights().mean(dim=(0, 1)))

    def spread_over_tokens(self) -> tuple[float, ...]:
        """Return how far each adapter's weights at a place differ between tokens: root mean square over the places."""
        return _floats(self.weights().var(dim=1, correction=0).mean(dim=0).sqrt())

    def spread_over_places(self) -> tuple[float, ...]:
        """Return how far each adapter's weights at a token differ between places: root mean square over the tokens."""
        return _floats(self.weights().var(dim=0, correction=0).mean(dim=0).sqrt())

    def ambiguous(self) -> list[Tensor]:
        """Tell the positions of each text whose shares do not decide in most of the places where they ever do.

        A place whose shares are the same at all positions decides nothing anywhere, and is left out.

        Returns:
            For each text whether, ``(positions,)``, bool.
        """
        varying = self.shares().std(dim=1, correction=0).amax(dim=-1) >= VARYING
        kept = varying if bool(varying.any()) else torch.ones_like(varying)
        return [_undecided(each.shares[kept].double()) for each in self.texts]


def layer_of(place: str) -> str:
    """Return the name up to the first number in it, which is the block's; the whole name where there is none.

    Example:
        >>> layer_of("model.layers.3.self_attn.q_proj"), layer_of("head")
        ('model.layers.3', 'head')
    """
    match = NUMBER.match(place)
    return match[1] if match else place


def weights_of_texts(
    record: FusionRecord, tokens: Sequence[Sequence[str]], attention_mask: Tensor
) -> list[TextWeights]:
    """Take a batch apart, and leave its padding out.

    Args:
        record: of one forward pass over the batch.
        tokens: of each text, without padding.
        attention_mask: ``(texts, positions)``, not 0 where a position is a token.

    Returns:
        One for each text.

    Raises:
        ValueError: if nothing was recorded, or mask, tokens and record do not fit each other.
    """
    weights, shares = record.stacked(), FusionRecord(weights=record.shares).stacked()
    if attention_mask.shape != weights.shape[1:3] or len(tokens) != len(attention_mask):
        raise ValueError(
            f"attention_mask and tokens must be those of the batch {tuple(weights.shape[1:3])},"
            f" got {tuple(attention_mask.shape)} and {len(tokens)}"
        )
    kept = attention_mask.detach().cpu().bool()
    return [
        TextWeights(tokens=tuple(each), weights=weights[:, row, kept[row]], shares=shares[:, row, kept[row]])
        for row, each in enumerate(tokens)
    ]


def _undecided(shares: Tensor) -> Tensor:
    """Return for ``(places, positions, k)`` whether most places do not decide, ``(positions,)``."""
    entropy: Tensor = torch.special.entr(shares).sum(dim=-1) / math.log(shares.shape[-1])
    return (entropy >= AMBIGUOUS_ENTROPY).double().mean(dim=0) > MOST


def _summary(name: str, weights: Tensor) -> WeightSummary:
    """Sum up ``(positions, k)``."""
    return WeightSummary(
        name=name,
        mean=_floats(weights.mean(dim=0)),
        spread=_floats(weights.std(dim=0, correction=0)),
        lowest=_floats(weights.amin(dim=0)),
        highest=_floats(weights.amax(dim=0)),
    )


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
