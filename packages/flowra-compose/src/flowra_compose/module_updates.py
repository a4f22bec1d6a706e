"""What a rule of composition sees: the updates of one module by all tasks, weights included."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.statistics import ModuleStatistics, statistics_at

__all__ = ["ModuleUpdates", "Weight", "check_weights", "modules_of", "takes_part", "updated_modules"]

Weight = float | Mapping[str, float]
"""Of one task: a number, or one for each module that it updates."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModuleUpdates:
    """The task vectors τᵢ = wᵢ ΔWᵢ of one module, of one shape and layout, on one device."""

    name: str
    """The module's."""
    updates: tuple[LowRankUpdate | None, ...]
    """τᵢ for each task, its weight in the scaling. None where a task leaves the module alone, τᵢ = 0; one at least is
    not None."""
    statistics: tuple[ModuleStatistics | None, ...]
    """What is known of each task at this module."""
    thresholds: tuple[float, ...] | None = None
    """For each task the magnitude below which entries are trimmed, where a rule looks at all modules for it."""

    @property
    def present(self) -> tuple[LowRankUpdate, ...]:
        """The updates that are there."""
        return tuple(update for update in self.updates if update is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.present[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """The promoted dtype of all factors, which the result gets."""
        dtype = self.present[0].dtype
        for update in self.present[1:]:
            dtype = torch.promote_types(dtype, update.dtype)
        return dtype

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Stack the factors along the rank: Σᵢ sᵢ Bᵢ Aᵢ = [s₁B₁ … s_k B_k] [A₁; …; A_k], and nothing is averaged.

        Returns:
            A ``(Σ rᵢ, n)`` and B ``(m, Σ rᵢ)`` with B A = Σᵢ τᵢ, in float64.
        """
        a = torch.cat([update.lora_A.double() for update in self.present])
        b = torch.cat([update.scaling * update.lora_B.double() for update in self.present], dim=1)
        return a, b

    def of_factors(self, a: Tensor, b: Tensor) -> LowRankUpdate:
        """Return an update of this module with ΔW = B A, in any dtype: it gets that of the inputs at the end."""
        first = self.present[0]
        return LowRankUpdate(a, b, layout=first.layout, kernel=first.kernel)

    def of_delta_weight(self, delta_weight: Tensor) -> LowRankUpdate:
        """Return an update of this module with a given ΔW ``(m, n)``, which need not be of low rank."""
        first = self.present[0]
        return LowRankUpdate.of_delta_weight(delta_weight, layout=first.layout, kernel=first.kernel)

    def fitted(self, update: LowRankUpdate) -> LowRankUpdate:
        """Return an update of this module in the dtype of the inputs.

        Raises:
            ValueError: if a factor does not fit it.
        """
        a, b = update.lora_A.to(self.dtype), update.lora_B.to(self.dtype)
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(
                f"weighted factors must fit {self.dtype}, got infinity for {self.name!r}."
                " Lower the weights, or merge float32 copies of the inputs."
            )
        return replace(update, lora_A=a, lora_B=b)


def check_weights(updates: Sequence[Mapping[str, LowRankUpdate]], weights: Sequence[Weight]) -> None:
    """Refuse weights by module that do not name the modules of their task.

    Raises:
        ValueError: if one is missing or unknown.
    """
    for task, (one, weight) in enumerate(zip(updates, weights, strict=True)):
        if isinstance(weight, Mapping) and weight.keys() != one.keys():
            lacking, unknown = sorted(one.keys() - weight.keys()), sorted(weight.keys() - one.keys())
            raise ValueError(
                "weights by module must name the modules that their task updates,"
                f" got none for {lacking} and one for unknown {unknown}; of task {task}"
            )


def updated_modules(updates: Sequence[Mapping[str, LowRankUpdate]], weights: Sequence[Weight]) -> list[str]:
    """Return the names of the modules that a task updates with a weight that is not 0, sorted."""
    tasks = zip(updates, weights, strict=True)
    return sorted({name for one, weight in tasks for name in one if _at(weight, name) != 0})


def modules_of(
    updates: Sequence[Mapping[str, LowRankUpdate]],
    weights: Sequence[Weight],
    statistics: Sequence[Mapping[str, ModuleStatistics]] | None = None,
    *,
    done: Collection[str] = (),
) -> Iterator[ModuleUpdates]:
    """Go through the modules, sorted by name; each update is asked for once, when its module's turn comes.

    Args:
        updates: one mapping from module name to update for each task.
        weights: one for each task; a task of weight 0 takes no part, and where its weight is 0 at some modules only, it
            leaves those alone.
        statistics: one mapping from module name to statistics for each task.
        done: names to leave out.

    Yields:
        Each module that a task updates with a weight that is not 0.

    Raises:
        ValueError: if statistics are not one for each task.
    """
    known = statistics or [{} for _ in updates]
    if len(known) != len(updates):
        raise ValueError(f"statistics must be one mapping for each adapter, got {len(known)} for {len(updates)}")
    tasks = [task for task in zip(weights, updates, known, strict=True) if takes_part(task[0])]
    for name in updated_modules(updates, weights):
        if name in done:
            continue
        yield ModuleUpdates(
            name=name,
            updates=tuple(_weighted(_at(weight, name), one[name]) if name in one else None for weight, one, _ in tasks),
            statistics=tuple(statistics_at(each, name) for _, _, each in tasks),
        )


def takes_part(weight: Weight) -> bool:
    """Tell whether a task counts at all: its weight is not 0, at one module at least."""
    return any(weight.values()) if isinstance(weight, Mapping) else weight != 0


def _at(weight: Weight, name: str) -> float:
    return weight[name] if isinstance(weight, Mapping) else weight


def _weighted(weight: float, update: LowRankUpdate) -> LowRankUpdate | None:
    return replace(update, scaling=weight * update.scaling) if weight else None
