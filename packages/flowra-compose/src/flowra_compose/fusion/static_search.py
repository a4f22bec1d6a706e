"""Task-level weights found by trying: what a fixed combination of the adapters can do, without a gradient.

Source: Huang et al. 2023, *LoraHub* (arXiv:2307.13269), section 3.3: a few labelled examples, a gradient-free search
over one weight for each adapter, and a penalty on Σ |wᵢ|. ``docs/methods.md``, section 29. Deviations: the search is a
pattern search (Hooke and Jeeves 1961), deterministic and without a dependency, where the authors use Nevergrad's Shiwa;
it begins at the best of the sum, the mean and each adapter alone, where theirs begins at 0; weights multiply updates,
not factors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["StaticSearch", "search_static_weights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticSearch:
    """What was found, and what was tried."""

    weights: tuple[float, ...]
    """The best, one for each adapter."""
    loss: float
    """Of these, penalty included."""
    tried: tuple[tuple[tuple[float, ...], float], ...]
    """Every evaluation, in order: weights and loss, penalty included."""


def search_static_weights(
    loss: Callable[[tuple[float, ...]], float],
    adapters: int,
    *,
    evaluations: int = 40,
    penalty: float = 0.0,
    bounds: tuple[float, float] = (-1.5, 1.5),
    initial_step: float = 0.5,
    starts: Sequence[Sequence[float]] = (),
) -> StaticSearch:
    """Search the weights of the least loss.

    Args:
        loss: given one weight for each adapter, what to minimise; such as the validation loss under
            :class:`StaticWeights`.
        adapters: k ≥ 1.
        evaluations: how often the loss is asked for, at most; at least k + 2, and one for each of ``starts``.
        penalty: λ ≥ 0 of λ Σ |wᵢ| / k, added to the loss. LoraHub's is 0.05.
        bounds: of each weight.
        initial_step: first length of a step along an axis; it is halved where no step helps.
        starts: weights to begin with beside all 1, all 1/k and each adapter alone, such as the best of fewer adapters.

    Returns:
        The best weights, their loss, and all that was tried. Equal losses keep the earlier weights.

    Raises:
        ValueError: if a setting is out of range.
    """
    if adapters < 1 or evaluations < adapters + 2 + len(starts):
        least = "k + 2" if not starts else f"k + {2 + len(starts)}"
        raise ValueError(f"evaluations must be at least {least} with k ≥ 1, got {evaluations} for k = {adapters}")
    if any(len(each) != adapters for each in starts):
        raise ValueError(f"starts must have a weight for each of {adapters} adapters, got {list(starts)}")
    if not bounds[0] < bounds[1] or not penalty >= 0 or not initial_step > 0:
        raise ValueError(
            "bounds, penalty and initial_step must be low < high, ≥ 0 and > 0,"
            f" got {bounds}, {penalty} and {initial_step}"
        )
    seen: dict[tuple[float, ...], float] = {}

    def value(weights: tuple[float, ...]) -> float:
        if weights not in seen:
            if len(seen) >= evaluations:
                return math.inf
            size = penalty * sum(abs(weight) for weight in weights) / adapters
            found = loss(weights) + size
            seen[weights] = found if math.isfinite(found) else math.inf
        return seen[weights]

    alone = [tuple(float(index == which) for index in range(adapters)) for which in range(adapters)]
    first = [tuple(map(float, each)) for each in starts]
    first += [(1.0,) * adapters, (1 / adapters,) * adapters, *alone]
    best = min((_within(each, bounds) for each in first), key=value)
    step = initial_step
    while len(seen) < evaluations and step > 1e-3:
        before = best
        for axis in range(adapters):
            moves = [_within(_moved(best, axis, sign * step), bounds) for sign in (1, -1)]
            best = min((best, *moves), key=value)
        if best == before:
            step /= 2
        else:  # on in the direction that helped
            further = tuple(2 * now - then for now, then in zip(best, before, strict=True))
            best = min((best, _within(further, bounds)), key=value)
    return StaticSearch(weights=best, loss=seen[best], tried=tuple(seen.items()))


def _moved(weights: tuple[float, ...], axis: int, by: float) -> tuple[float, ...]:
    return tuple(weight + by * (index == axis) for index, weight in enumerate(weights))


def _within(weights: tuple[float, ...], bounds: tuple[float, float]) -> tuple[float, ...]:
    return tuple(min(max(weight, bounds[0]), bounds[1]) for weight in weights)
