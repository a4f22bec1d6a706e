"""allocate: solve the knapsack on the profile's flow gains; the profile file decides, nothing else."""

from dataclasses import replace
from pathlib import Path

from flowra_allocation import allocate as solve
from flowra_allocation import write_plan
from flowra_analysis import read_profile
from flowra_pipelines import plots
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.record import StageResult

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
        plan = solve(
            {name: each.tolist() for name, each in gains.items()},
            {name: module.cost_per_rank + of_E for name, module in profile.modules.items()},
            budget=int(factor * int(profile.provenance["budget_parameters"])),
            sensitivity_threshold=config.sensitivity_threshold,
            scaling=config.adapter.scaling,
            solver=config.allocation.solver,
        )
    except KeyError as error:
        raise UserError(f"profile must say {error} in its provenance, got none. Rerun calibrate.") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    plan = replace(plan, modules={name: replace(module, kind=method) for name, module in plan.modules.items()})
    write_plan(plan, folder)
    active = {name: rank for name, rank in plan.ranks.items() if rank}
    return StageResult(
        metrics=[("plan/parameters", float(plan.parameters), 0), ("plan/modules", float(len(active)), 0)],
        parameters={"budget_parameters": plan.budget, "sensitivity_threshold": plan.sensitivity_threshold},
        figures={"rank_plan": plots.module_heatmap(plan.ranks, title="Planned rank", label="rank", limits=None)},
        summary={
            "plan": f"{plan.parameters:,} of {plan.budget:,} parameters on {len(active)} of {len(plan.ranks)} modules"
            + ("" if factor == 1 else f"; the budget is {profile.provenance['budget_parameters']:,}"),
            "next unit": f"{plan.first_out[0]} (gain {plan.first_out[1]:.2e} per parameter)"
            if plan.first_out
            else "none",
        },
    )
