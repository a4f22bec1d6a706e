"""Ranks of one's own in PEFT's words: what a ``LoraConfig`` must say for every module to get its rank and scaling.

PEFT computes s = lora_alpha / r (rsLoRA: / √r) for each module, and looks r and lora_alpha up in two patterns, regular
expressions of which the first that matches counts. Here each names one module, from its first letter to its last.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from flowra_allocation.rank_plan import RankPlan

__all__ = ["PeftPatterns", "alpha_of", "endings", "peft_patterns", "plan_for_peft"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftPatterns:
    """Five fields of a ``LoraConfig``."""

    r: int
    """That most modules have; of several, the largest."""
    lora_alpha: float
    """Of those modules."""
    rank_pattern: dict[str, int]
    """Of all other modules."""
    alpha_pattern: dict[str, float]
    """Of all other modules, where it differs."""
    target_modules: list[str] | str
    """Exact names of the modules of rank ≥ 1, or, where a name is the end of another's, an expression."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name: ``LoraConfig(**patterns.as_dict())``."""
        return {name: getattr(self, name) for name in self.__slots__}


def peft_patterns(
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    *,
    use_rslora: bool = False,
    others: Iterable[str] = (),
) -> PeftPatterns:
    """Say in PEFT's words which rank and scaling each module has. Modules of rank 0 are left out, as PEFT has none.

    Args:
        ranks: exact module name to rank, ≥ 0.
        scalings: module name to s, for the same modules.
        use_rslora: as the ``LoraConfig`` says it.
        others: names of further modules of the model. Only a name that ends in another one's matters.

    Returns:
        The fields.

    Raises:
        ValueError: if no module has a rank.

    Example:
        >>> fields = peft_patterns({"a.q": 4, "a.v": 4, "a.o": 1, "a.k": 0}, dict.fromkeys(["a.q", "a.v", "a.o"], 2.0))
        >>> fields.r, fields.lora_alpha, fields.target_modules
        (4, 8, ['a.o', 'a.q', 'a.v'])
        >>> fields.rank_pattern.values(), fields.alpha_pattern.values()  # the keys match a.o alone
        (dict_values([1]), dict_values([2]))
    """
    live = {name: rank for name, rank in ranks.items() if rank > 0}
    if not live:
        raise ValueError(f"ranks must be ≥ 1 for at least one module, got {dict(ranks)}. PEFT has no empty adapter.")
    both = {name: (rank, alpha_of(rank, scalings[name], use_rslora=use_rslora)) for name, rank in live.items()}
    counts = Counter(both.values())
    r, lora_alpha = max(counts, key=lambda each: (counts[each], each))
    return PeftPatterns(
        r=r,
        lora_alpha=lora_alpha,
        rank_pattern={_exactly(name): rank for name, (rank, _) in both.items() if rank != r},
        alpha_pattern={_exactly(name): alpha for name, (_, alpha) in both.items() if alpha != lora_alpha},
        target_modules=_exact_targets(live, [*ranks, *others]),
    )


def plan_for_peft(plan: RankPlan, *, use_rslora: bool = False, others: Iterable[str] = ()) -> PeftPatterns:
    """Say a plan in PEFT's words, for those who train with PEFT alone.

    Args:
        plan: whose modules are all LoRA, or all DoRA (then the ``LoraConfig`` also needs ``use_dora=True``).
        use_rslora: as the ``LoraConfig`` says it.
        others: as for :func:`peft_patterns`.

    Returns:
        The fields: ``LoraConfig(**plan_for_peft(plan).as_dict(), …)``.

    Raises:
        ValueError: if the plan has other kinds, or no module of rank ≥ 1.
    """
    kinds = {module.kind for module in plan.modules.values() if module.rank > 0}
    if not kinds <= {"lora"} and not kinds <= {"dora"}:
        raise ValueError(f"plan must be of lora, or of dora, alone to be said in PEFT's words, got {sorted(kinds)}")
    scalings = dict.fromkeys(plan.modules, plan.scaling)
    return peft_patterns(plan.ranks, scalings, use_rslora=use_rslora, others=others)


def alpha_of(rank: int, scaling: float, *, use_rslora: bool) -> float:
    """Return the ``lora_alpha`` that gives a scaling at a rank ≥ 1; whole where it can be, as some readers expect."""
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    return int(alpha) if alpha.is_integer() else alpha


def endings(name: str) -> Iterator[str]:
    """List the shorter names that a module's name ends in: of ``a.b.c`` these are ``b.c`` and ``c``."""
    dot = name.find(".")
    while dot >= 0:
        yield name[dot + 1 :]
        dot = name.find(".", dot + 1)


def _exact_targets(names: Collection[str], all_names: Iterable[str]) -> list[str] | str:
    """Name these modules and no other of ``all_names``.

    Returns:
        A list; or, as PEFT's list also takes every module whose name ends in a dot and one of them, an expression if
        there is one that is not meant.
    """
    taken = any(ending in names for name in all_names if name not in names for ending in endings(name))
    return "|".join(map(_escaped, sorted(names))) if taken else sorted(names)


def _exactly(name: str) -> str:
    """Return the key of a pattern that matches this name alone."""
    return f"^{_escaped(name)}"


@cache
def _escaped(name: str) -> str:
    return re.escape(name).replace(r"\-", "-")
