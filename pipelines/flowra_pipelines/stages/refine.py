"""refine: a policy moves rank between modules, then ranks are frozen; training ends at step T."""

import json
from functools import partial
from pathlib import Path
from statistics import median

import torch

from flowra_adapters import attach, compact, load_adapter
from flowra_allocation import Policy, RankHistory, RankPlan, RefinementError, Refiner, hand_over, read_plan
from flowra_allocation.trainer_callback import RefinementCallback
from flowra_pipelines import loss_figure
from flowra_pipelines.errors import UserError
from flowra_pipelines.learning_rate import with_learning_rate
from flowra_pipelines.policies import build_policy, final_budget, largest_ranks
from flowra_pipelines.rank_limits import floors_of
from flowra_pipelines.report_refinement import Refinement, adapter_shapes, refinement_figures_of
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.phase import penalties, phase_metrics, resume_phase, save_phase
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.stages.setting import base_model, largest_rank, load_setting, low_rank_layers
from flowra_pipelines.training import train_phase

__all__ = ["refine"]


def refine(config: RunConfig, folder: Path) -> StageResult:
    """Train to the end while rank moves; write ``adapter/``, the training state and ``rank_history.json``."""
    config = with_learning_rate(config, folder.parent)
    setting = load_setting(config)
    model = base_model(config, setting)
    trained = folder.parent / "train"
    plan = read_plan(folder.parent / "allocate")
    load_adapter(model, trained / "adapter")
    empty = {name: 0 for name, rank in plan.ranks.items() if rank == 0}
    if empty and config.refinement.policy != "flexlora_compat":  # it has no word for a module without rank
        attach(
            model,
            empty,
            method=config.refinement.method,
            scaling=plan.scaling,
            modules_to_save=setting.task.heads(model),
            generator=torch.Generator(model.device).manual_seed(config.seed),
        )
    optimizer, state = resume_phase(config, setting, model, trained)
    policy = build_policy(config)
    refiner = None if policy is None else _refiner(config, model, plan, policy)
    phase = partial(
        train_phase,
        model,
        setting.train,
        optimizer,
        config=config.training,
        collate=setting.collate,
        seed=state.seed,
    )
    frozen = _compacted_at(config, policy)
    try:
        curve = phase(
            first_step=state.step,
            last_step=frozen,
            description=f"refine: {policy.name}" if policy else "refine: off, training on",
            rng=state.rng,
            callbacks=[
                *penalties(config, model),
                *([RefinementCallback(refiner, first_step=state.step)] if refiner else []),
            ],
        )
    except RefinementError as error:
        raise UserError(f"{error} (refinement.policy {config.refinement.policy})") from None
    if frozen < config.training.steps:
        for slots, tensors in compact(model).values():
            hand_over(optimizer, slots, tensors)
        curve += phase(
            first_step=frozen,
            last_step=config.training.steps,
            description="refine: ranks are frozen",
            rng=torch.get_rng_state(),
            callbacks=penalties(config, model),
        )
    peak = max(state.peak_parameters, refiner.history.peak if refiner else 0)
    save_phase(config, setting, model, optimizer, folder, step=config.training.steps, peak_before=peak)
    result = StageResult(
        metrics=phase_metrics(curve),
        parameters={"policy": config.refinement.policy},
        figures={"loss": loss_figure.loss_curve([(step, loss) for step, loss, _ in curve], title="Refinement")},
        summary={"loss": f"{curve[0][1]:.3f} → {curve[-1][1]:.3f} in steps {state.step}–{config.training.steps}"},
    )
    if refiner is not None:
        costs = {name: module.cost_per_rank for name, module in plan.modules.items()}
        found = Refinement(history=refiner.history, costs=costs, shapes=adapter_shapes(folder / "adapter"))
        result.figures.update(refinement_figures_of(found))
        _report(refiner.history, result, folder)
    return result


def _compacted_at(config: RunConfig, policy: Policy | None) -> int:
    """Return the step after which slots become tensors as large as the ranks; the last one where there are none."""
    last = config.training.steps
    return last if policy is None or config.refinement.method != "svd_masked" else min(policy.steps[-1], last)


def _refiner(config: RunConfig, model: torch.nn.Module, plan: RankPlan, policy: Policy) -> Refiner:
    """Set up what moves rank, within the budget of the run.

    Returns:
        The refiner.

    Raises:
        UserError: if the policy cannot move what the plan gives it.
    """
    layers = low_rank_layers(model)
    floors = floors_of(config.allocation, plan.ranks)
    try:
        return Refiner(
            model,
            layers,
            costs={name: plan.modules[name].cost_per_rank for name in layers},
            caps=largest_ranks(
                config,
                plan,
                {name: layer.rank for name, layer in layers.items()},
                {name: largest_rank(layer) for name, layer in layers.items()},
            ),
            floors={name: floors[name] for name in layers},
            budget=final_budget(plan),
            policy=policy,
            seed=config.seed,
        )
    except ValueError as error:
        raise UserError(f"{error} (refinement.policy {config.refinement.policy})") from None


def _report(history: RankHistory, result: StageResult, folder: Path) -> None:
    content = history.as_json()
    del content["seconds"]  # files of a run do not depend on the machine's speed
    (folder / "rank_history.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for event in history.events:
        values: dict[str, float | None] = {
            "parameters": event.parameters,
            "budget": event.budget,
            "moved_directions": sum(event.admitted.values()),
            "dropped_directions": sum(event.dropped.values()),
            "silenced_directions": sum(event.silenced.values()),
            "kkt_gap": event.kkt_gap,
        }
        if event.importance:
            scores = list(event.importance.values())
            values |= {"importance_min": min(scores), "importance_max": max(scores)}
            values["importance_median"] = median(scores)
        result.metrics += [
            (f"refine/{key}", float(value), event.step) for key, value in values.items() if value is not None
        ]
    dropped = sum(sum(event.dropped.values()) for event in history.events)
    admitted = sum(sum(event.admitted.values()) for event in history.events)
    last = history.events[-1]
    changed = sum(history.initial[name] != rank for name, rank in last.ranks.items())
    result.summary["rank"] = (
        f"{dropped} directions dropped and {admitted} tried in {len(history.events)} events;"
        f" {changed} modules changed rank"
    )
    result.summary["parameters"] = (
        f"{last.parameters:,} at the end, budget {history.budget:,}; at most {history.peak:,} while rank moved"
    )
    result.parameters |= {"budget_parameters": history.budget, "peak_parameters": history.peak}
    result.metrics.append(("refine/peak_parameters", float(history.peak), last.step))
    result.metrics.append(("refine/seconds_in_events", history.seconds, last.step))
