"""refine: rank moves between modules inside the budget, then freezes; training ends at step T."""

import json
import math
from pathlib import Path

from flowra_adapters import attach, load_adapter
from flowra_allocation import Breathe, RankHistory, RefinementSchedule, Refiner, mean_rank, read_plan
from flowra_allocation.trainer_callback import RefinementCallback
from flowra_pipelines import plots
from flowra_pipelines.learning_rate import with_learning_rate
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.phase import phase_metrics, resume_phase, save_phase
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.stages.setting import base_model, load_setting, lora_layers
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
    if empty:  # modules without rank may be tried on probation
        attach(model, empty, scaling=plan.scaling, modules_to_save=setting.task.heads(model))
    layers = lora_layers(model)
    optimizer, state = resume_phase(config, setting, model, trained)
    costs = {name: module.cost_per_rank for name, module in plan.modules.items()}
    refiner = None
    if config.refinement.policy == "breathe":
        cap = math.ceil(8 * mean_rank(costs, plan.budget))
        refiner = Refiner(
            model,
            layers,
            costs={name: costs[name] for name in layers},
            caps={name: min(cap, layer.lora_A.shape[1], layer.lora_B.shape[0]) for name, layer in layers.items()},
            budget=plan.budget,
            policy=Breathe(
                schedule=RefinementSchedule(
                    start=config.refinement_start,
                    freeze=config.refinement_freeze,
                    events=config.refinement.events,
                    observe=config.refinement.observe,
                ),
                share=config.refinement.share,
            ),
            seed=config.seed,
        )
    curve = train_phase(
        model,
        setting.train,
        optimizer,
        config=config.training,
        collate=setting.collate,
        first_step=state.step,
        last_step=config.training.steps,
        seed=state.seed,
        description="refine: moving rank" if refiner else "refine: off, training on",
        rng=state.rng,
        callbacks=[RefinementCallback(refiner, first_step=state.step)] if refiner else [],
    )
    save_phase(config, setting, model, optimizer, folder, step=config.training.steps, peak_before=state.peak_parameters)
    result = StageResult(
        metrics=phase_metrics(curve),
        parameters={"policy": config.refinement.policy},
        figures={"loss": plots.loss_curve([(step, loss) for step, loss, _ in curve], title="Refinement")},
        summary={"loss": f"{curve[0][1]:.3f} → {curve[-1][1]:.3f} in steps {state.step}–{config.training.steps}"},
    )
    if refiner is not None:
        _report(refiner.history, result, folder)
    return result


def _report(history: RankHistory, result: StageResult, folder: Path) -> None:
    content = history.as_json()
    del content["seconds"]  # files of a run do not depend on the machine's speed
    (folder / "rank_history.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    steps = [int(history.settings["start"] or 0), *(event.step for event in history.events)]
    ranks = [history.initial, *(event.ranks for event in history.events)]
    result.figures["rank_over_time"] = plots.rank_over_time(steps, ranks)
    for event in history.events:
        result.metrics.append(("refine/parameters", float(event.parameters), event.step))
        result.metrics.append(("refine/moved_directions", float(sum(event.admitted.values())), event.step))
        if event.kkt_gap is not None:
            result.metrics.append(("refine/kkt_gap", event.kkt_gap, event.step))
    dropped = sum(sum(event.dropped.values()) for event in history.events)
    admitted = sum(sum(event.admitted.values()) for event in history.events)
    changed = sum(history.initial[name] != rank for name, rank in history.events[-1].ranks.items())
    result.summary["rank"] = (
        f"{dropped} directions dropped and {admitted} tried in {len(history.events)} events;"
        f" {changed} modules changed rank"
    )
    result.metrics.append(("refine/seconds_in_events", history.seconds, history.events[-1].step))
