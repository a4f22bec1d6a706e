"""One pass over the data for any number of statistics.

A statistic is a value with four operations. ``init`` is its own; what the others take and give is the same for all, so
statistics are fed together, split over batches and processes, and merged. Those of this package are
:class:`EmpiricalFisher`, :class:`DiagonalFisher`, :class:`KFAC`, :class:`GradientSpectra` and their like; one of your
own needs only the three methods of :class:`Statistic`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from flowra_analysis.layer_signals import Signals
from flowra_analysis.per_example_signals import Batch, per_example_signals

__all__ = ["Statistic", "measure"]


class Statistic(Protocol):
    """What is known so far of the modules of a model. A value: each step returns a new one."""

    def update(self, name: str, signals: Signals, *, batch: int | None = None) -> Self:
        """Return the state that has also seen these examples of one module.

        Args:
            name: the module's.
            signals: what passed through it, g the gradient of each example's own loss.
            batch: index of the batch, for error messages.

        Raises:
            ValueError: if the signals are not finite or do not fit what was seen before.
        """

    def merge(self, other: Self) -> Self:
        """Return the state that has seen the examples of both.

        Raises:
            ValueError: if the two did not begin alike.
        """


State = TypeVar("State", bound=Statistic)


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    per_example_loss: Callable[[nn.Module, Batch], Tensor],
    module_names: Iterable[str],
    statistics: Mapping[str, State],
    *,
    mask: Callable[[Batch], Tensor] | None = None,
    first_batch: int = 0,
) -> dict[str, State]:
    """Feed several statistics from one forward and backward pass over each batch.

    Args:
        model: must treat the examples of a batch independently, first axis N.
        batches: whatever ``per_example_loss`` understands.
        per_example_loss: ``(model, batch)`` to ``(N,)``; see :func:`per_example_signals`.
        module_names: exact qualified names of layers, see :func:`is_measurable_layer`.
        statistics: states by any name of one's own, new ones or such that have seen other data.
        mask: ``batch`` to ``(N, T)``, nonzero at real tokens; see :func:`layer_signals`.
        first_batch: index of the first of these batches, for error messages, where they are a part of several.

    Returns:
        The states that have also seen these batches, by the same names.

    Raises:
        ValueError: as :func:`per_example_signals`, and as the statistics' own ``update``.

    >>> from flowra_analysis import EmpiricalFisher, GradientSpectra
    >>> model, batches = nn.Linear(6, 4), [Tensor(range(12)).view(2, 6)]
    >>> begun = {"fisher": EmpiricalFisher.init(), "gradient": GradientSpectra.init()}
    >>> seen = measure(model, batches, lambda model, batch: model(batch).square().sum(1), [""], begun)
    >>> sorted(seen), list(seen["gradient"].finalise())
    (['fisher', 'gradient'], [''])
    """
    states = dict(statistics)
    seen = per_example_signals(model, batches, per_example_loss, module_names, mask=mask, first_batch=first_batch)
    for index, batch in enumerate(seen, start=first_batch):
        for name, signals in _widened(batch):
            states = {kind: state.update(name, signals, batch=index) for kind, state in states.items()}
    return states


def _widened(batch: Mapping[str, Signals]) -> Iterator[tuple[str, Signals]]:
    """Give x and g at least float32: once for all statistics, and once for neighbours of one input (Q, K and V)."""
    last, x = Tensor(), Tensor()
    for name, narrow in batch.items():
        if not _is_same(narrow.x, last):
            last, x = narrow.x, _wide(narrow.x)
        yield name, narrow._replace(x=x, g=_wide(narrow.g))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors, both alive, are the same place seen the same way."""
    places = [(each.data_ptr(), each.dtype, each.device, each.shape, each.stride()) for each in (one, other)]
    return places[0] == places[1]
