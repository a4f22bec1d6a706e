"""What a configuration says of ranks, by module: caps, floors, frozen modules and steps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flowra_adapters.peft_writer import VLLM_RANKS
from flowra_pipelines.config_sections import AllocationConfig
from flowra_pipelines.errors import UserError
from flowra_pipelines.module_names import modules_called

__all__ = ["CAP_STEPS", "RankLimits", "caps_of", "check_cap_of_vllm", "floors_of", "rank_limits"]

CAP_STEPS = VLLM_RANKS[1:]
"""Ranks of vLLM's buffers that a plan is cut to. It has rank 1, too, but a plan of rank 7 is not cut so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLimits:
    """What ``flowra_allocation.allocate`` is told of ranks."""

    caps: int | Mapping[str, int] | None
    floors: int | Mapping[str, int] | None
    frozen: Mapping[str, int]
    rank_steps: Sequence[int] | None
    cap_steps: Sequence[int] | None

    def least(self, name: str) -> int:
        """Return the rank that a module has at least, whatever is measured."""
        if name in self.frozen:
            return self.frozen[name]
        floor = self.floors.get(name, 0) if isinstance(self.floors, Mapping) else self.floors or 0
        cap = self.caps.get(name, floor) if isinstance(self.caps, Mapping) else self.caps
        return floor if cap is None else min(floor, cap)

    def most(self, name: str, largest: int) -> int:
        """Return the rank that a module has at most, where it could have the largest otherwise."""
        if name in self.frozen:
            return self.frozen[name]
        cap = self.caps.get(name) if isinstance(self.caps, Mapping) else self.caps
        return largest if cap is None else min(largest, cap)


def rank_limits(chosen: AllocationConfig, largest: Mapping[str, int]) -> RankLimits:
    """Resolve patterns to modules.

    Args:
        chosen: limits by pattern.
        largest: module name to the largest rank that its weight allows, min(m, n).

    Returns:
        Limits by module; one for all stays a number where no pattern says otherwise.

    Raises:
        UserError: if a pattern means no module, two of one key say different ranks of a module, a frozen rank exceeds
            what the weight allows, or a cap for all is not one of vLLM's ranks where the steps are vLLM's.
    """
    frozen = _by_name(chosen.frozen, largest, "frozen")
    for name, rank in frozen.items():
        if rank > largest[name]:
            raise UserError(f"allocation.frozen must be at most the layer's {largest[name]}, got {rank} for {name!r}")
    vllm = chosen.rank_steps == "vllm"
    if vllm and chosen.cap is not None:
        check_cap_of_vllm(chosen.cap, what="allocation.cap", instead="leave allocation.rank_steps out")
    return RankLimits(
        caps=caps_of(chosen, largest),
        floors=_of_all(chosen.floor, _by_name(chosen.floors, largest, "floors"), largest),
        frozen=frozen,
        rank_steps=None if isinstance(chosen.rank_steps, str) else chosen.rank_steps,
        cap_steps=CAP_STEPS if vllm else None,
    )


def caps_of(chosen: AllocationConfig, names: Iterable[str]) -> int | dict[str, int] | None:
    """Return the largest rank of all modules, or by name where a pattern says one; None without any.

    A frozen module's is the rank that it was given.
    """
    known = list(names)
    by_name = _by_name(chosen.caps, known, "caps") | _by_name(chosen.frozen, known, "frozen")
    return _of_all(chosen.cap, by_name, known)


def floors_of(chosen: AllocationConfig, planned: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks below which modules do not fall while rank moves.

    Args:
        chosen: limits by pattern.
        planned: module name to the rank of the plan, which has followed them as far as caps allowed.

    Returns:
        Module name to least rank.
    """
    said = RankLimits(
        caps=None,
        floors=_of_all(chosen.floor, _by_name(chosen.floors, planned, "floors"), planned),
        frozen=_by_name(chosen.frozen, planned, "frozen"),
        rank_steps=None,
        cap_steps=None,
    )
    return {name: min(said.least(name), rank) for name, rank in planned.items()}


def check_cap_of_vllm(cap: int, *, what: str, instead: str) -> None:
    """Refuse a cap that is between two sizes of vLLM's buffers: it would pay for more than it allows.

    Args:
        cap: largest rank of all modules.
        what: it is called.
        instead: what else can be done.

    Raises:
        UserError: if there are no buffers of that rank.
    """
    if cap not in VLLM_RANKS:
        above = next((step for step in VLLM_RANKS if step > cap), VLLM_RANKS[-1])
        raise UserError(
            f"{what} must be one of vLLM's ranks {', '.join(map(str, VLLM_RANKS))}, got {cap}: a server keeps buffers"
            f" of rank {above} for it. Take one of these, or {instead}."
        )


def _of_all(everywhere: int | None, by_name: Mapping[str, int], names: Iterable[str]) -> int | dict[str, int] | None:
    if not by_name:
        return everywhere
    return {**({} if everywhere is None else dict.fromkeys(names, everywhere)), **by_name}


def _by_name(given: Mapping[str, int] | None, names: Iterable[str], key: str) -> dict[str, int]:
    """Resolve patterns. Their order does not matter, so two must not say different ranks of one module."""
    known, found = list(names), dict[str, int]()
    for patterns, rank in (given or {}).items():
        for name in modules_called(known, patterns.split(","), f"allocation.{key}"):
            if found.setdefault(name, rank) != rank:
                raise UserError(
                    f"allocation.{key} must say one rank for each module, got {found[name]} and {rank} for {name!r}"
                )
    return found
