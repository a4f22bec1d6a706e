"""The table of rules and the kinds of adapters they merge: a new rule joins the battery of laws by adding one row."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowra_compose import RULES, LowRankUpdate, MergeOptions, ModuleStatistics, Truncation, merge_updates

Updates = Mapping[str, LowRankUpdate]
Statistics = Mapping[str, ModuleStatistics]
Products = Mapping[str, Tensor]

WEIGHTS = (0.7, -1.3, 0.4)
"""Of the three adapters of a kind, where a law does not say otherwise."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rule with the options that it is tested with."""

    rule: str
    """Key of :data:`flowra_compose.RULES`."""
    variant: str = ""
    options: MergeOptions | None = None
    copies: float
    """T copies of an adapter give T to this power of what one gives: 1 of a sum, 0 of a mean."""
    tolerance: float = 1e-10
    """Of products, relative to the sizes of the inputs, in float64."""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """Law that the rule cannot obey, or ``law:kind`` where that is so for one kind of adapters only, to the reason."""

    @property
    def name(self) -> str:
        """Of the rule, and how it is used."""
        return f"{self.rule}-{self.variant}" if self.variant else self.rule

    @property
    def truncation(self) -> Truncation | None:
        """All of the energy, for a rule that is nothing without a truncation."""
        return Truncation(energy=1.0) if RULES[self.rule].truncates else None

    @property
    def draws(self) -> bool:
        """Whether chance plays a part."""
        return "seed" in RULES[self.rule].options and (self.options is None or self.options.density != 1)

    def excuse(self, law: str, kind: str) -> str | None:
        """Return the reason why a law does not hold, if there is one."""
        return self.exceptions.get(law) or self.exceptions.get(f"{law}:{kind}")

    def merge(
        self,
        adapters: Sequence[Updates],
        weights: Sequence[float],
        statistics: Sequence[Statistics],
        *,
        truncation: Truncation | None = None,
    ) -> dict[str, LowRankUpdate]:
        """Merge with the rule."""
        return merge_updates(
            adapters,
            weights,
            rule=self.rule,
            options=self.options,
            truncation=truncation or self.truncation,
            statistics=statistics if RULES[self.rule].needs or (truncation and truncation.metric) else None,
        )


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Three adapters of a kind."""

    name: str
    make: Callable[[], tuple[Updates, ...]]
    """Draw them, in float64."""

    def adapters(self, dtype: torch.dtype = torch.float64) -> list[Updates]:
        """Draw the adapters, the same values, rounded, in every dtype."""
        return [{name: cast(update, dtype) for name, update in one.items()} for one in self.make()]


def cast(update: LowRankUpdate, dtype: torch.dtype) -> LowRankUpdate:
    """Round the factors of an update to a dtype."""
    return replace(update, lora_A=update.lora_A.to(dtype), lora_B=update.lora_B.to(dtype))


def product(update: LowRankUpdate) -> Tensor:
    """Return ΔW in float64, whatever the dtype of the factors."""
    return update.scaling * (update.lora_B.double() @ update.lora_A.double())


def products(updates: Updates) -> dict[str, Tensor]:
    """Return all ΔW in float64."""
    return {name: product(update) for name, update in updates.items()}


def random_update(
    m: int,
    n: int,
    rank: int,
    *,
    seed: int,
    scaling: float = 2.0,
    like: LowRankUpdate | None = None,
) -> LowRankUpdate:
    """Draw an update in float64, of the layout of another."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    made = LowRankUpdate(a, b, scaling)
    return made if like is None else replace(made, layout=like.layout, kernel=like.kernel)


def statistics_for(adapters: Sequence[Updates], *, seed: int = 0) -> list[Statistics]:
    """Draw for each adapter positive definite second moments, and a Fisher diagonal, of every module of any."""
    shapes = {name: update for one in adapters for name, update in sorted(one.items())}
    generator = torch.Generator().manual_seed(seed)

    def moment(size: int) -> Tensor:
        root = torch.randn(size, 2 * size + 1, generator=generator, dtype=torch.float64)
        return root @ root.T / size

    return [
        {
            name: ModuleStatistics(
                inputs=moment(update.shape[1]).diagonal() if update.layout == "embedding" else moment(update.shape[1]),
                outputs=moment(update.shape[0]),
                fisher=0.1 + torch.rand(update.shape, generator=generator, dtype=torch.float64),
            )
            for name, update in sorted(shapes.items())
        }
        for _ in adapters
    ]


def _linear() -> tuple[Updates, ...]:
    ranks = {"fc": (2, 4, 3), "out": (1, 2, 3)}
    shapes = {"fc": (12, 10), "out": (6, 9)}
    return tuple(
        {
            name: random_update(*shapes[name], ranks[name][task], seed=10 * task + index)
            for index, name in enumerate(shapes)
        }
        for task in range(3)
    )


def _rslora() -> tuple[Updates, ...]:
    return tuple(
        {"fc": random_update(11, 12, rank, seed=rank, scaling=alpha / math.sqrt(rank))}
        for rank, alpha in ((2, 4.0), (3, 1.0), (5, 16.0))
    )


def _of_layout(layout: LowRankUpdate, *ranks: int) -> Callable[[], tuple[Updates, ...]]:
    def make() -> tuple[Updates, ...]:
        return tuple(
            {"block.layer": random_update(*layout.shape, rank, seed=seed, like=layout)}
            for seed, rank in enumerate(ranks)
        )

    return make


def _with_biases() -> tuple[Updates, ...]:
    return tuple(
        {
            "fc": random_update(*shape, rank, seed=rank),
            "fc.bias": random_update(shape[0], 1, 1, seed=rank + 9, like=VECTOR),
        }
        for rank, shape in ((2, (7, 6)), (1, (7, 6)), (3, (7, 6)))
    )


def _dense() -> tuple[Updates, ...]:
    deltas = [product(random_update(6, 8, 6, seed=seed)) for seed in range(3)]
    return tuple({"fc": LowRankUpdate.of_delta_weight(delta)} for delta in deltas)


def _overlapping() -> tuple[Updates, ...]:
    return (
        {"a": random_update(8, 9, 2, seed=1), "b": random_update(7, 8, 3, seed=2)},
        {"b": random_update(7, 8, 2, seed=3), "c": random_update(5, 6, 1, seed=4)},
        {"b": random_update(7, 8, 1, seed=5), "c": random_update(5, 6, 2, seed=6)},
    )


def _zero() -> tuple[Updates, ...]:
    first, second, third = (random_update(8, 9, rank, seed=rank) for rank in (2, 4, 3))
    return {"fc": first}, {"fc": replace(second, lora_B=torch.zeros_like(second.lora_B))}, {"fc": third}


def _rank_above_sides() -> tuple[Updates, ...]:
    return tuple({"fc": random_update(4, 6, rank, seed=rank)} for rank in (5, 7, 9))


CONV = LowRankUpdate(torch.zeros(1, 18), torch.zeros(9, 1), layout="conv", kernel=(3, 2))
EMBEDDING = LowRankUpdate(torch.zeros(1, 11), torch.zeros(8, 1), layout="embedding")
VECTOR = LowRankUpdate(torch.zeros(1, 1), torch.zeros(7, 1), layout="vector")

KINDS: tuple[Kind, ...] = (
    Kind(name="linear", make=_linear),
    Kind(name="rslora", make=_rslora),
    Kind(name="conv", make=_of_layout(CONV, 2, 4, 1)),
    Kind(name="embedding", make=_of_layout(EMBEDDING, 3, 1, 2)),
    Kind(name="vector", make=_with_biases),
    Kind(name="dense", make=_dense),
    Kind(name="overlapping", make=_overlapping),
    Kind(name="zero_update", make=_zero),
    Kind(name="rank_above_sides", make=_rank_above_sides),
)

CORE = ("overlapping", "conv", "vector", "rank_above_sides")
"""The kinds that every run tries; the others are tried by `nox -s laws`."""

TRIMMED = "a trim loses the smaller entries of one adapter, too"
FIT = "where the ranks of all copies exceed the shorter side, each copy gives its leading triplets only"
DRAWN = "what is dropped of one adapter is not made up for by others; only the expectation is the adapter"

ROWS: tuple[Row, ...] = (
    Row(rule="cat", copies=1),
    Row(rule="task_arithmetic", copies=1),
    Row(rule="truncated_svd", copies=1),
    Row(rule="magnitude_prune", variant="all", options=MergeOptions(density=1), copies=1),
    Row(rule="magnitude_prune", options=MergeOptions(density=0.4), copies=1, exceptions={"identity": TRIMMED}),
    Row(rule="ties", variant="all", options=MergeOptions(density=1), copies=0),
    Row(rule="ties", copies=0, exceptions={"identity": TRIMMED}),
    Row(
        rule="ties",
        variant="by_module",
        options=MergeOptions(density=0.4, trim="tensor"),
        copies=0,
        exceptions={"identity": TRIMMED},
    ),
    Row(rule="dare_linear", variant="all", options=MergeOptions(density=1), copies=1),
    Row(rule="dare_linear", copies=1, exceptions={"identity": DRAWN}),
    Row(rule="dare_ties", variant="all", options=MergeOptions(density=1), copies=0),
    Row(rule="dare_ties", options=MergeOptions(density=0.7, seed=3), copies=0, exceptions={"identity": DRAWN}),
    Row(rule="knots_ties", variant="all", options=MergeOptions(density=1), copies=0),
    Row(rule="knots_ties", copies=0, exceptions={"identity": TRIMMED}),
    Row(rule="knots_dare_linear", variant="all", options=MergeOptions(density=1), copies=1),
    Row(rule="knots_dare_linear", copies=1, exceptions={"identity": DRAWN}),
    Row(rule="knots_dare_ties", variant="all", options=MergeOptions(density=1), copies=0),
    Row(rule="knots_dare_ties", copies=0, exceptions={"identity": DRAWN}),
    Row(rule="core_task_arithmetic", copies=1),
    Row(rule="core_ties", variant="all", options=MergeOptions(density=1), copies=0),
    Row(rule="core_ties", copies=0, exceptions={"identity": TRIMMED}),
    Row(rule="core_ties", variant="by_module", options=MergeOptions(density=0.5, trim="tensor"), copies=0),
    Row(rule="tsv_m", copies=0, exceptions={"copies:dense": FIT, "copies:rank_above_sides": FIT}),
    Row(rule="orth", copies=-0.5, exceptions={"copies:dense": FIT, "copies:rank_above_sides": FIT}),
    Row(rule="iso_c", copies=1, exceptions={"identity": "all singular values become their mean"}),
    Row(
        rule="iso_cts",
        copies=1,
        exceptions={
            "identity": "all singular values become their mean",
            "copies:dense": "equal adapters bring the same direction of their own, in place of other ones of the sum",
        },
    ),
    Row(rule="wudi", copies=0),
    Row(rule="flow", copies=0, tolerance=1e-8),  # its equation is solved to 1e-10
    Row(rule="flow", variant="unshrunk", options=MergeOptions(shrinkage=0), copies=0, tolerance=1e-8),
    Row(rule="regmean", copies=0),
    Row(rule="fisher", copies=0),
)
