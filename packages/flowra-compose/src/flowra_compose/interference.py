"""Measuring what a merge costs each task, module by module while merging: how the updates meet, what is left of them.

Source: docs/methods.md, section 27.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations

import torch
from torch import Tensor

from flowra_compose.interference_report import (
    InterferenceReport,
    Metric,
    ModuleInterference,
    ModulePair,
    ModuleTask,
    TaskScores,
    check_task_names,
)
from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.matching import matching_energy
from flowra_compose.module_updates import ModuleUpdates, Weight
from flowra_compose.pair_geometry import inner_product, pair_geometry, product_energy
from flowra_compose.product_svd import ProductSVD
from flowra_compose.sign_conflicts import SignConflicts, sign_conflicts
from flowra_compose.singular_vectors import nonzero_svd, singular_task_interference
from flowra_compose.statistics import ModuleStatistics
from flowra_compose.truncation import TruncatedUpdate

__all__ = ["InterferenceMeter"]


@dataclass(kw_only=True, slots=True)
class InterferenceMeter:
    """Makes a report while adapters are merged; it keeps numbers, no tensors.

    Raises:
        ValueError: if tasks are not distinct names, or weights are not one for each.

    Example:
        Two tasks on axes of their own do not meet.

        >>> one, other = (LowRankUpdate(torch.eye(2)[i:][:1], torch.eye(2)[:, i:][:, :1]) for i in (0, 1))
        >>> module = ModuleUpdates(name="fc", updates=(one, other), statistics=(None, None))
        >>> meter = InterferenceMeter(tasks=("a", "b"))
        >>> meter.add(module, LowRankUpdate(torch.eye(2), torch.eye(2)))
        >>> report = meter.report()
        >>> report.pair_means("cosine"), report.projections, report.energy_kept
        ({('a', 'b'): 0.0}, {'a': 1.0, 'b': 1.0}, 1.0)
    """

    tasks: tuple[str, ...]
    """Names of the tasks that take part, those of a weight other than 0, in the order of the adapters."""
    weights: Sequence[Weight] | None = None
    """Their weights, as they were merged with, to know ΔWᵢ = τᵢ / wᵢ; 1 by default, and then ΔWᵢ is τᵢ. A module at
    which the weight of a task is 0 counts as one that the task leaves alone."""
    signs: bool = True
    """Whether signs are compared. That looks at every entry of every weight, and is most of the work."""
    _metric: Metric | None = field(default=None, init=False, repr=False)
    _modules: dict[str, ModuleInterference] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_task_names(self.tasks)
        if self.weights is not None and len(self.weights) != len(self.tasks):
            raise ValueError(f"weights must be one for each task, got {len(self.weights)} for {list(self.tasks)}")

    @torch.no_grad()
    def add(self, module: ModuleUpdates, merged: LowRankUpdate | None) -> None:
        """Take in one module.

        Where statistics hold the inputs' second moment C of a task, what the task misses is measured in it; S of the
        outputs likewise, else it counts as I.

        Args:
            module: what was merged, with the statistics that are known; at most once each.
            merged: what came out; None where a budget has left the module out, M = 0.

        Raises:
            ValueError: if the module does not fit the tasks, was there before or is not of the shape of what came out,
                or statistics are of another shape or not the same in all modules.
        """
        count, name = len(self.tasks), module.name
        if merged is None:
            m, n = module.shape
            merged = module.of_factors(torch.zeros(1, n), torch.zeros(m, 1))
        if len(module.updates) != count:
            raise ValueError(f"module must have updates of {count} tasks, got {len(module.updates)} for {name!r}")
        if name in self._modules or merged.shape != module.shape:
            got = f"{merged.shape} for {module.shape}" if name not in self._modules else "one that has been added"
            raise ValueError(f"merged must be the update of a new module, of its shape, got {got}; {name!r}")
        tau = [None if update is None else _decomposed(update) for update in module.updates]
        a, b = merged.lora_A.double(), merged.scaling * merged.lora_B.double()
        signs = sign_conflicts(module.present) if self.signs else None
        self._modules[name] = ModuleInterference(
            shape=module.shape,
            tasks=tuple(self._task(module, index, each, a, b) for index, each in enumerate(tau)),
            pairs=_pairs(tau, [update is not None for update in module.updates], signs),
            merged_rank=merged.rank,
            merged_energy=product_energy(a, b),
            sum_energy=product_energy(*module.stacked()),
            singular_task_interference=singular_task_interference(module.present),
            cancelled=None if signs is None else signs.cancelled,
            truncation_loss=merged.relative_loss if isinstance(merged, TruncatedUpdate) else None,
        )

    def report(self, scores: Mapping[str, TaskScores] | None = None) -> InterferenceReport:
        """Return what has been taken in.

        Args:
            scores: of every task, where they were measured. ``dataclasses.replace(report, scores=…)`` adds them later.

        Returns:
            A value of its own: the meter may go on.

        Raises:
            ValueError: if no module was added, or scores are not those of the tasks.
        """
        return InterferenceReport(
            tasks=tuple(self.tasks),
            modules=dict(self._modules),
            metric=self._metric,
            scores=scores,
        )

    def _task(self, module: ModuleUpdates, index: int, tau: ProductSVD | None, a: Tensor, b: Tensor) -> ModuleTask:
        weight, known = self._weight(module, index), module.statistics[index]
        rank = 0 if tau is None else len(tau.sigma)
        energy = 0.0 if tau is None else float(tau.sigma.square().sum()) / weight**2
        inner = 0.0 if tau is None else inner_product(a, b, tau) / weight
        if known is None or known.inputs is None:
            return ModuleTask(weight=weight, rank=rank, energy=energy, inner=inner)
        self._check_statistics(module, known)
        missed, response = (a, b), 0.0
        if tau is not None:
            own = tau.vh, tau.u * (tau.sigma / weight)
            missed = torch.cat([a, own[0]]), torch.cat([b, -own[1]], dim=1)
            response = matching_energy(LowRankUpdate(*own), known)
        return ModuleTask(
            weight=weight,
            rank=rank,
            energy=energy,
            inner=inner,
            missed=matching_energy(LowRankUpdate(*missed), known),
            response=response,
        )

    def _weight(self, module: ModuleUpdates, index: int) -> float:
        if module.updates[index] is None:
            return 0.0
        weight = 1.0 if self.weights is None else self.weights[index]
        return weight[module.name] if isinstance(weight, Mapping) else weight

    def _check_statistics(self, module: ModuleUpdates, known: ModuleStatistics) -> None:
        """Refuse what does not fit the module, or is measured otherwise than before."""
        name, inputs, outputs = module.name, known.inputs, known.outputs
        assert inputs is not None
        m, n = module.shape
        if len(inputs) != n or (outputs is not None and len(outputs) != m):
            got = f"{tuple(inputs.shape)}" + ("" if outputs is None else f" and {tuple(outputs.shape)}")
            raise ValueError(f"statistics must be of {n} inputs and {m} outputs, got {got} for {name!r}")
        metric: Metric = "inputs" if outputs is None else "inputs_and_outputs"
        if self._metric not in {None, metric}:
            raise ValueError(
                f"statistics must hold the same in all modules, got {metric} for {name!r} after {self._metric}."
                " Give those of the outputs everywhere, or nowhere."
            )
        self._metric = metric


def _decomposed(update: LowRankUpdate) -> ProductSVD | None:
    """Return the directions of an update; None for ΔW = 0."""
    svd = nonzero_svd(update.lora_A, update.scaling * update.lora_B.double())
    return svd if len(svd.sigma) else None


def _pairs(
    tau: Sequence[ProductSVD | None], present: Sequence[bool], signs: SignConflicts | None
) -> tuple[ModulePair | None, ...]:
    """Compare any two tasks; signs are known of those that are present."""
    row = [sum(present[:index]) for index in range(len(present))]
    found: list[ModulePair | None] = []
    for i, j in combinations(range(len(tau)), 2):
        first, second = tau[i], tau[j]
        if first is None or second is None:
            found.append(None)
            continue
        geometry = pair_geometry(first, second)
        numbers = {each.name: getattr(geometry, each.name) for each in fields(geometry)}
        conflict = None if signs is None else signs.shares[row[i]][row[j]]
        found.append(ModulePair(**numbers, sign_conflict=conflict))
    return tuple(found)
