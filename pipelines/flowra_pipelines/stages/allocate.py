"""allocate: solve the knapsack on the profile's flow gains, or plan without a look at them; trains nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from flowra_allocation import RankPlan, write_plan
from flowra_allocation import allocate as solve
from flowra_analysis import read_profile
from flowra_pipelines import refinement_figures
from flowra_pipelines.errors import UserError
from flowra_pipelines.policies import check_movable
from flowra_pipelines.rank_limits import rank_limits
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.static_plans import static_plan

__all__ = ["allocate"]


def allocate(config: RunConfig, folder: Path) -> StageResult:
    """Read the profile and write ``plan.json``."""
    profile = read_profile(folder.parent / "calibrate")
    gains = profile.spectra.get("flow_gains")
    if gains is None:
        raise UserError(f"profile must hold flow_gains, got {sorted(profile.spectra)}. Rerun calibrate.")
    method, factor = config.refinement.method, config.refinement.plan_factor
    of_E = 0 if method == "lora" else 1  # a triplet has one parameter more than a pair
    try:
        budget = int(profile.provenance["budget_parameters"])
        plan_with = partial(
            _plan,
            config,
            {name: each.tolist() for name, each in gains.items()},
            {name: module.cost_per_rank + of_E for name, module in profile.modules.items()},
            budget=int(factor * budget),
            largest={name: min(module.shape) for name, module in profile.modules.items()},
        )
        plan = plan_with(threshold=config.sensitivity_threshold)
        starved = factor > 1 and plan.parameters <= budget and plan.sensitivity_threshold > 0
        plan = plan_with(threshold=0.0) if starved else plan
    except KeyError as error:
        raise UserError(f"profile must say {error} in its provenance, got none. Rerun calibrate.") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    plan = replace(
        plan,
        modules={name: replace(module, kind=method) for name, module in plan.modules.items()},
        final_budget=None if factor == 1 else budget,
    )
    active = {name: rank for name, rank in plan.ranks.items() if rank}
    if not active:
        raise UserError("allocation must leave a module some rank, got caps and frozen modules that leave none")
    check_movable(config, plan, {name: module.shape for name, module in profile.modules.items()})
    write_plan(plan, folder)
    return StageResult(
        metrics=[("plan/parameters", float(plan.parameters), 0), ("plan/modules", float(len(active)), 0)],
        parameters={
            "plan": config.allocation.plan,
            "budget_parameters": plan.budget,
            "sensitivity_threshold": plan.sensitivity_threshold,
        },
        figures={"rank_plan": refinement_figures.rank_map(plan.ranks)},
        summary={
            "plan": ("" if config.allocation.plan == "flow" else f"static, {config.allocation.plan}: ")
            + f"{plan.parameters:,} of {plan.budget:,} parameters on {len(active)} of {len(plan.ranks)} modules"
            + ("" if factor == 1 else f"; the budget is {budget:,}"),
            "next unit": f"{plan.first_out[0]} (gain {plan.first_out[1]:.2e} per parameter)"
            if plan.first_out
            else "none",
            **({"threshold": f"η set aside: above it nothing exceeds the budget of {budget:,}"} if starved else {}),
        },
    )


def _plan(
    config: RunConfig,
    gains: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    *,
    budget: int,
    largest: Mapping[str, int],
    threshold: float,
) -> RankPlan:
    """Plan as the configuration says; what it says of ranks is by pattern."""
    chosen, scaling = config.allocation, config.adapter.scaling
    limits = rank_limits(chosen, largest)
    if chosen.plan != "flow":
        said = limits.caps if isinstance(limits.caps, Mapping) else {}
        everywhere = limits.caps if isinstance(limits.caps, int) else budget
        caps = {name: min(said.get(name, everywhere), rank) for name, rank in largest.items()}
        return static_plan(chosen.plan, costs, budget=budget, seed=config.seed, caps=caps, gains=gains, scaling=scaling)
    return solve(
        gains,
        costs,
        budget=budget,
        sensitivity_threshold=threshold,
        scaling=scaling,
        solver=chosen.solver,
        caps=limits.caps,
        floors=limits.floors,
        frozen=limits.frozen,
        rank_steps=limits.rank_steps,
        cap_steps=limits.cap_steps,
    )
