"""Signs that gates did not learn, or learned what needs no gates.

The thresholds are ours, each with its reason. ``docs/methods.md``, section 29.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flowra_compose.fusion.gates import Gate, GateOptions
from flowra_compose.fusion.inspection import AMBIGUOUS_ENTROPY, MOST, GateInspection

__all__ = ["FailureSign", "birth_weights", "failure_signs", "loss_gap_warning", "weight_gap_warning"]

FEWEST_POSITIONS = 8
"""With fewer positions nothing is said of how weights differ between tokens: a spread of fewer values than these may
lie off by a quarter of itself (its standard error is σ / √(2 (n − 1)))."""
SAME_WEIGHTS = 0.01
"""Spread below which weights count as equal: what an adapter adds then differs by a hundredth of itself, the size of
what three roundings to bfloat16 (2⁻⁸ each) do to a product of two factors and a weight."""
ALMOST_ALL = 0.9
"""Share of places from which a sign is one of the whole fusion: one place in ten may be an exception."""
AMBIGUOUS_SHARE = 0.1
"""Share of ambiguous positions from which it is a sign: one in ten is what the first words of short texts come to."""
SATURATED_SHARE = 0.999
"""Largest share from which a softmax counts as saturated: its gradient p (1 − p) is then below 0.001, where at birth
with two adapters it is 0.25."""
BEYOND = 0.25
"""How far a weight may lie beyond what softmax and the bias of birth can reach: an adapter is then a quarter stronger
or weaker than any gate makes it whose bias has not moved. Beyond it the bias has taken over."""
OUTSIDE_SHARE = 0.05
"""Share of positions with a weight farther than :data:`BEYOND` from which it is a sign."""
FAR_SUM = 0.25
"""How far the sum of a place's weights may be from 1: adapters were trained at 1, and a quarter more or less of what
they add is a change of their strength, not of their mixture."""
LOSS_GAP = 0.2
"""Nats by which the loss of validation may lie above that of training: perplexity is then 22 % higher."""
STANDARD_GAP = 0.5
"""Difference of mean weights over their spread from which two sets of texts are weighed differently: two normal
distributions so far apart share 80 % of their area."""
NAMED = 8
"""Places or tokens that a sign names."""

SignKind = Literal[
    "few positions",
    "unmoved",
    "same for all tokens",
    "same in all layers",
    "ambiguous prefixes",
    "saturated",
    "out of range",
    "far sum",
    "loss gap",
    "weight gap",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureSign:
    """Something that training of gates should not leave behind."""

    kind: SignKind
    found: str
    """A sentence with the numbers and the threshold."""
    advice: str
    """What to do."""


def birth_weights(adapters: int, options: GateOptions) -> Tensor:
    """Return the weights that gates give before they have learned, ``(k,)``."""
    with torch.no_grad():
        weights, _ = Gate(adapters, 1, replace(options, rank=None)).forward(torch.zeros(1))
    return weights


def failure_signs(inspection: GateInspection) -> list[FailureSign]:
    """Look for signs of gates that did not learn, or learned what needs no gates.

    Where weights are equal everywhere, what follows from that is not said again. With one adapter there is nothing to
    weigh, and no sign.

    Args:
        inspection: on texts of the kind that the gates are for.

    Returns:
        What was found, the most fundamental first.
    """
    if len(inspection.adapters) == 1:
        return []
    unmoved, all_unmoved = _unmoved(inspection)
    signs = [*unmoved]
    if inspection.positions < FEWEST_POSITIONS:
        signs.append(_few(inspection))
    elif not all_unmoved:
        same = _same_for_all_tokens(inspection) or [*_same_in_all_layers(inspection), *_ambiguous(inspection)]
        signs += same
    return [*signs, *_saturated(inspection), *_outside(inspection), *_far_sum(inspection)]


def loss_gap_warning(train: float, validation: float) -> FailureSign | None:
    """Compare the mean losses of training and of validation after the gates were trained.

    Args:
        train: nats per token.
        validation: nats per token.

    Returns:
        A sign if validation lies more than :data:`LOSS_GAP` above training.

    Raises:
        ValueError: if a loss is not finite.
    """
    if not math.isfinite(train) or not math.isfinite(validation):
        raise ValueError(f"losses must be finite, got {train} and {validation}")
    gap = validation - train
    if gap <= LOSS_GAP:
        return None
    return FailureSign(
        kind="loss gap",
        found=f"The loss of validation, {validation:.4g}, lies {gap:.3g} nats above that of training, {train:.4g}"
        f" (limit {LOSS_GAP:g}).",
        advice="Take more examples or fewer epochs, or gates of level 'step' or of low rank. If the adapters themselves"
        " were trained on the training texts, compare with the gap that each has alone.",
    )


def weight_gap_warning(train: GateInspection, validation: GateInspection) -> FailureSign | None:
    """Compare how texts of training and of validation are weighed.

    Args:
        train: on texts that the gates were trained on.
        validation: of the same gates on others.

    Returns:
        A sign if in most layers an adapter's mean weight differs by more than :data:`STANDARD_GAP` spreads (and by more
        than :data:`SAME_WEIGHTS`); None with fewer than :data:`FEWEST_POSITIONS` positions on a side.

    Raises:
        ValueError: if these are not the same adapters and places.
    """
    if train.adapters != validation.adapters or train.places != validation.places:
        raise ValueError(f"inspections must be of the same gates, got adapters {train.adapters}, {validation.adapters}")
    if min(train.positions, validation.positions) < FEWEST_POSITIONS:
        return None
    gaps = {}
    for one, other in zip(train.by_layer(), validation.by_layer(), strict=True):
        found = []
        for index in range(len(train.adapters)):
            difference = abs(one.mean[index] - other.mean[index])
            spread = math.sqrt((one.spread[index] ** 2 + other.spread[index] ** 2) / 2)
            found.append(0.0 if difference <= SAME_WEIGHTS else difference / spread if spread else math.inf)
        gaps[one.name] = max(found)
    apart = [name for name, gap in gaps.items() if gap > STANDARD_GAP]
    if len(apart) / len(gaps) <= MOST:
        return None
    return FailureSign(
        kind="weight gap",
        found=f"In {len(apart)} of {len(gaps)} layers the mean weights of training and validation differ by more than"
        f" {STANDARD_GAP:g} of their spread: {_named(apart)}.",
        advice="See whether both hold the same kinds of texts in the same shares. If so, the gates have learned their"
        " examples: take more of them, fewer epochs, or gates of level 'step'.",
    )


# signs


def _few(inspection: GateInspection) -> FailureSign:
    return FailureSign(
        kind="few positions",
        found=f"Only {inspection.positions} tokens were seen: too few to say how weights differ between tokens"
        f" (at least {FEWEST_POSITIONS}).",
        advice="Give a longer text, or several.",
    )


def _unmoved(inspection: GateInspection) -> tuple[list[FailureSign], bool]:
    """Find gates that are where they were born, and tell whether all are."""
    if inspection.options is None:
        return [], False
    birth, weights = birth_weights(len(inspection.adapters), inspection.options), inspection.weights()
    moved = ((weights - birth.double()).abs() * (weights != 0)).amax(dim=(1, 2))
    names = [name for name, far in zip(inspection.places, moved, strict=True) if far < SAME_WEIGHTS]
    if not names:
        return [], False
    every = len(names) == len(inspection.places)
    shown = ", ".join(f"{weight:.3g}" for weight in birth.tolist())
    what = "No gate" if every else f"{len(names)} of {len(inspection.places)} gates"
    verb = "has moved" if every else "have not moved"
    sign = FailureSign(
        kind="unmoved",
        found=f"{what} {verb} from the weights of birth ({shown}; limit {SAME_WEIGHTS:g})"
        + (f": {_named(names)}." if inspection.level != "step" and not every else "."),
        advice="Train longer or at a higher rate; with gate_input='normed' the scores have the same size in all layers."
        + (" Until then a merge with these weights does the same." if every else ""),
    )
    return [sign], every


def _same_for_all_tokens(inspection: GateInspection) -> list[FailureSign]:
    spreads = inspection.weights().std(dim=1, correction=0).amax(dim=1)
    same = float((spreads < SAME_WEIGHTS).double().mean())
    if same < ALMOST_ALL:
        return []
    mean = inspection.mean()
    weights = ", ".join(f"{weight:.4g}" for weight in mean)
    advice = (
        "A static merge does the same without gates: rule cat with weights"
        f" {weights} for {', '.join(inspection.adapters)}."
    )
    if max(inspection.spread_over_places()) >= SAME_WEIGHTS:
        advice = (
            "A static merge does the same without gates, with the mean weights of each layer. Weights of whole"
            f" adapters come nearest with {weights} for {', '.join(inspection.adapters)}."
        )
    return [
        FailureSign(
            kind="same for all tokens",
            found=f"At {same:.0%} of the places the weights are the same for all tokens (spread below"
            f" {SAME_WEIGHTS:g}).",
            advice=advice,
        )
    ]


def _same_in_all_layers(inspection: GateInspection) -> list[FailureSign]:
    if len(inspection.places) < 2:
        return []
    spread = max(inspection.spread_over_places())
    if spread >= SAME_WEIGHTS:
        return []
    return [
        FailureSign(
            kind="same in all layers",
            found=f"The weights of a token are the same in all layers (spread {spread:.2g}, limit {SAME_WEIGHTS:g}).",
            advice="One gate does the same: train one of level 'step'. If layers should differ, train longer, or with"
            " gate_input='normed'.",
        )
    ]


def _ambiguous(inspection: GateInspection) -> list[FailureSign]:
    found = inspection.ambiguous()
    share = sum(int(each.sum()) for each in found) / inspection.positions
    if share < AMBIGUOUS_SHARE:
        return []
    tokens = Counter(
        token
        for text, positions in zip(inspection.texts, found, strict=True)
        for token, undecided in zip(text.tokens, positions.tolist(), strict=True)
        if undecided
    )
    listed = _named([repr(token) for token, _ in tokens.most_common()])
    return [
        FailureSign(
            kind="ambiguous prefixes",
            found=f"At {share:.1%} of the tokens most gates do not decide (entropy of the shares at least"
            f" {AMBIGUOUS_ENTROPY:g} log k), most often at {listed}.",
            advice="If these are the first tokens, the prefix does not say yet which adapter is meant: put the task or"
            " the language first. If they are everywhere, add an entropy penalty, or train longer.",
        )
    ]


def _saturated(inspection: GateInspection) -> list[FailureSign]:
    if inspection.options is None:
        return []
    share = float((inspection.shares().amax(dim=-1) > SATURATED_SHARE).double().mean())
    if share < ALMOST_ALL:
        return []
    return [
        FailureSign(
            kind="saturated",
            found=f"At {share:.1%} of places and tokens one share is above {SATURATED_SHARE:g}: no gradient passes"
            " through the softmax, and gates cannot learn on.",
            advice="Train again at a lower rate, a higher temperature, or with gate_input='normed'.",
        )
    ]


def _biases(inspection: GateInspection, options: GateOptions) -> tuple[Tensor, Tensor]:
    """Return the biases of all places, ``(places, k)``, and those of birth, ``(k,)``: w is softmax + b unless it is 0.

    A weight is exactly 0 where top-k routing, or an adapter that leaves the module alone, has made it so.
    """
    count = len(inspection.adapters)
    birth = birth_weights(count, replace(options, top_k=None)).double() - 1 / count
    weights, shares = inspection.weights(), inspection.shares()
    told = weights != 0
    means = ((weights - shares) * told).sum(dim=1) / told.sum(dim=1).clamp(min=1)
    return torch.where(told.any(dim=1), means, birth), birth


def _outside(inspection: GateInspection) -> list[FailureSign]:
    if inspection.options is None:
        return []
    biases, birth = _biases(inspection, inspection.options)
    weights = inspection.shares() + biases[:, None]
    outside = ((weights < birth - BEYOND) | (weights > 1 + birth + BEYOND)).any(dim=-1)
    share = float(outside.double().mean())
    if share < OUTSIDE_SHARE:
        return []
    names = [name for name, each in zip(inspection.places, outside, strict=True) if bool(each.any())]
    return [
        FailureSign(
            kind="out of range",
            found=f"At {share:.1%} of places and tokens a weight lies more than {BEYOND:g} beyond what the softmax and"
            " the bias of birth can reach" + (f": {_named(names)}." if inspection.level != "step" else "."),
            advice="The bias, outside of the softmax, has carried the weights there: train at a lower rate, or for"
            " fewer steps.",
        )
    ]


def _far_sum(inspection: GateInspection) -> list[FailureSign]:
    if inspection.options is None:
        return []
    sums = 1 + _biases(inspection, inspection.options)[0].sum(dim=-1)
    far = [name for name, each in zip(inspection.places, sums, strict=True) if abs(float(each) - 1) > FAR_SUM]
    if not far:
        return []
    return [
        FailureSign(
            kind="far sum",
            found=f"At {len(far)} of {len(sums)} places the weights sum to {float(sums.min()):.3g} to"
            f" {float(sums.max()):.3g} on average, more than {FAR_SUM:g} from 1"
            + (f": {_named(far)}." if inspection.level != "step" else "."),
            advice="The adapters are stronger or weaker than they were trained. If quality suffers, train at a lower"
            " rate, or for fewer steps.",
        )
    ]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
