"""From the configuration to the policy that moves rank, and to what its refiner is told."""

import math
from collections.abc import Mapping

import torch

from flowra_allocation import (
    AdaLoRA,
    Breathe,
    FlexLoRA,
    FlexLoRACompat,
    FlexLoRASchedule,
    LayerView,
    Policy,
    RankPlan,
    RefinementSchedule,
    Shrink,
    Snapshot,
    mean_rank,
)
from flowra_pipelines.errors import UserError
from flowra_pipelines.rank_limits import caps_of, floors_of
from flowra_pipelines.run_config import RunConfig

__all__ = ["build_policy", "check_movable", "final_budget", "largest_ranks"]

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
    config: RunConfig, plan: RankPlan, ranks: Mapping[str, int], possible: Mapping[str, int]
) -> dict[str, int]:
    """Say how far each module's rank may grow: to eight mean ranks of the budget, as far as its tensors allow.

    The released FlexLoRA knows no such end.

    Args:
        config: largest ranks that were asked for, and the policy.
        plan: whose modules they are.
        ranks: module name to the rank that it has.
        possible: module name to the largest that its tensors allow.

    Returns:
        Module name to rank, of those in ``ranks``; at least the one that it has.
    """
    budget = final_budget(plan)
    mean = mean_rank({name: module.cost_per_rank for name, module in plan.modules.items()}, budget)
    cap = budget if config.refinement.policy == "flexlora_compat" else math.ceil(CAP * mean)
    said = caps_of(config.allocation, plan.modules)
    asked = said if isinstance(said, Mapping) else dict.fromkeys(ranks, cap if said is None else said)
    return {name: min(max(min(asked.get(name, cap), cap), rank), possible[name]) for name, rank in ranks.items()}


def final_budget(plan: RankPlan) -> int:
    """Return what training ends within; a plan may be edited by hand."""
    return plan.budget if plan.final_budget is None else plan.final_budget


def check_movable(config: RunConfig, plan: RankPlan, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a plan that the policy cannot move, before anything is trained at its ranks.

    Args:
        config: names the policy.
        plan: what it would start from.
        shapes: module name to (m, n).

    Raises:
        UserError: if there is nothing to move, or no room for it.
    """
    policy = build_policy(config)
    if policy is None:
        return
    triplets, compat = config.refinement.method != "lora", config.refinement.policy == "flexlora_compat"
    ranks = {name: rank for name, rank in plan.ranks.items() if rank or not compat}  # it has no word for rank 0
    caps = largest_ranks(config, plan, ranks, {name: min(shape) for name, shape in shapes.items()})
    floors = floors_of(config.allocation, plan.ranks)
    views = {
        name: LayerView(
            lora_A=torch.empty(rank, shapes[name][1], device="meta"),
            lora_B=torch.empty(shapes[name][0], rank, device="meta"),
            lora_E=torch.empty(rank, device="meta") if triplets else None,
            cost=plan.modules[name].cost_per_rank,
            cap=caps[name],
            floor=floors[name],
        )
        for name, rank in ranks.items()
    }
    try:
        policy.check(Snapshot(step=0, layers=views, budget=final_budget(plan), seed=config.seed))
    except ValueError as error:
        raise UserError(f"{error} (refinement.policy {config.refinement.policy})") from None


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
