"""One pass over the data for any number of statistics.

A statistic is a value with four operations. ``init`` is its own; what the others take and give is the same for all, so
statistics are fed together, split over batches and processes, and merged. Those of this package are
:class:`EmpiricalFisher`, :class:`DiagonalFisher`, :class:`KFAC`, :class:`GradientSpectra` and their like; one of your
own needs only the three methods of :class:`Statistic`.
"""

from collections.abc import Callable, Iterable, Mapping
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
) -> dict[str, State]:
    """Feed several statistics from one forward and backward pass over each batch.

    Args:
        model: must treat the examples of a batch independently, first axis N.
        batches: whatever ``per_example_loss`` understands.
        per_example_loss: ``(model, batch)`` to ``(N,)``; see :func:`per_example_signals`.
        module_names: exact qualified names of layers, see :func:`is_measurable_layer`.
        statistics: states by any name of one's own, new ones or such that have seen other data.
        mask: ``batch`` to ``(N, T)``, nonzero at real tokens; see :func:`layer_signals`.

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
    for index, batch in enumerate(per_example_signals(model, batches, per_example_loss, module_names, mask=mask)):
        for name, narrow in batch.items():
            signals = _wide(narrow)  # once for all statistics, each of which accumulates in float32 at least
            states = {kind: state.update(name, signals, batch=index) for kind, state in states.items()}
    return states


def _wide(signals: Signals) -> Signals:
    """Give x and g at least float32."""
    x, g = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in signals[:2])
    return signals._replace(x=x, g=g)
