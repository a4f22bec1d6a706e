"""From the configuration to the policy that moves rank, and to what its refiner is told."""

import math
from collections.abc import Mapping

from flowra_adapters import LoRA, SVDForm
from flowra_allocation import (
    AdaLoRA,
    Breathe,
    FlexLoRA,
    FlexLoRACompat,
    FlexLoRASchedule,
    Policy,
    RankPlan,
    RefinementSchedule,
    Shrink,
    mean_rank,
)
from flowra_pipelines.run_config import RunConfig

__all__ = ["build_policy", "largest_ranks"]

CAP = 8
"""Mean ranks that one module may have at most."""


def build_policy(config: RunConfig) -> Policy | None:
    """Return the policy that a configuration names, None for ``none``. Steps are those of the whole run."""
    chosen, total = config.refinement, config.training.steps
    start, freeze = config.refinement_start, config.refinement_freeze
    match chosen.policy:
        case "breathe":
            return Breathe(schedule=_evenly(config), share=chosen.share)
        case "shrink":
            return Shrink(schedule=_evenly(config), measure=chosen.measure, kappa=chosen.plan_factor)
        case "adalora":
            return AdaLoRA(
                total_steps=total,
                tinit=start,
                tfinal=total - freeze,
                delta_t=chosen.interval,
                kappa=chosen.plan_factor,
            )
        case "flexlora":
            return FlexLoRA(
                schedule=_flexlora_schedule(config),
                metric=chosen.metric,
                moves=chosen.moves,
                initialisation=chosen.initialisation,
                r_max=chosen.r_max,
                # counted in directions, a full budget and layers of different sizes leave no exchange that fits
                budget="params" if chosen.moves == "both" else "ranks",
            )
        case "flexlora_compat":
            return FlexLoRACompat(schedule=_flexlora_schedule(config), optimizer_reset=chosen.optimizer_reset)
        case "none":
            return None


def largest_ranks(
    plan: RankPlan,
    budget: int,
    layers: Mapping[str, LoRA | SVDForm],
    *,
    caps: int | Mapping[str, int] | None = None,
    bounded: bool = True,
) -> dict[str, int]:
    """Say how far each module's rank may grow: to eight mean ranks of the budget, as far as its tensors allow.

    Args:
        plan: whose modules they are.
        budget: P.
        layers: module name to its update.
        caps: largest rank that was asked for, of all or by name.
        bounded: whether eight mean ranks are an end at all; the released FlexLoRA knows none.

    Returns:
        Module name to rank; at least the one that it has.
    """
    mean = mean_rank({name: module.cost_per_rank for name, module in plan.modules.items()}, budget)
    cap = math.ceil(CAP * mean) if bounded else budget
    found = {}
    for name, layer in layers.items():
        largest = layer.max_rank if isinstance(layer, SVDForm) else min(layer.lora_A.shape[1], layer.lora_B.shape[0])
        asked = caps.get(name, cap) if isinstance(caps, Mapping) else cap if caps is None else caps
        found[name] = min(max(min(asked, cap), layer.rank), largest)
    return found


def _evenly(config: RunConfig) -> RefinementSchedule:
    return RefinementSchedule(
        start=config.refinement_start,
        freeze=config.refinement_freeze,
        events=config.refinement.events,
        observe=config.refinement.observe,
    )


def _flexlora_schedule(config: RunConfig) -> FlexLoRASchedule:
    return FlexLoRASchedule(
        total_steps=config.training.steps,
        warmup=config.refinement_start,
        final=config.training.steps - config.refinement_freeze,
        interval=config.refinement.interval,
        b0=config.refinement.b0,
        decay=config.refinement.decay,
    )
