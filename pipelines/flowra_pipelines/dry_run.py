"""What a run would do, without training."""

from flowra_allocation import mean_rank
from flowra_pipelines.merge_budget import check_merge
from flowra_pipelines.progress import console
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.setting import base_model, load_setting, probe_rank, survey

__all__ = ["show_plan"]


def show_plan(config: RunConfig) -> None:
    """Load model and data, check every pattern, and print budget, ranks and phases."""
    setting = load_setting(config)
    model = base_model(config, setting)
    layers = survey(config, model, setting.task)
    check_merge(config.merge.budget, config.merge.extra, layers.shapes, base_parameters=layers.base_parameters)
    average = mean_rank(layers.costs, layers.budget)
    probe = probe_rank(config, layers.costs, layers.budget)
    needed = config.training.steps * config.training.batch_size * config.training.gradient_accumulation
    console.print(f"[bold]{config.name}[/bold] in {config.folder}")
    console.print(f"base: {config.model.path}, {layers.base_parameters:,} parameters")
    console.print(f"head: {', '.join(setting.task.heads(model)) or 'none'}, {layers.head_parameters:,} parameters")
    console.print(f"data: {len(setting.train):,} training and {len(setting.test):,} test examples")
    if setting.data.label_summary:
        console.print(f"labels: {setting.data.label_summary}")
    for reason, count in setting.data.left_out.items():
        console.print(f"  left out: {count:,} rows because {reason}")
    console.print(f"budget: {config.budget} = {layers.budget:,} adapter parameters")
    console.print(f"layers: {len(layers.costs)} may carry rank; {min(layers.costs.values()):,} parameters buy a unit")
    console.print(
        f"mean rank {average:.2f}, probe rank {probe} (peak {probe * sum(layers.costs.values()):,} parameters)"
    )
    if config.allocation.plan == "flow":
        cap = probe if config.allocation.cap is None else min(config.allocation.cap, probe)
        console.print(f"plan: by flow, at most rank {cap}; η = {config.sensitivity_threshold:g}")
    else:
        console.print(f"plan: {config.allocation.plan}, which looks at no data")
    chosen = config.refinement
    spends = "" if chosen.plan_factor == 1 else f"; the plan spends {chosen.plan_factor:g} times the budget"
    form = "pairs" if chosen.method == "lora" else f"triplets, {chosen.back_end}"
    console.print(f"refinement: {chosen.policy} on {form}{spends}")
    console.print(
        f"steps: probe 0–{config.probe_steps}, train –{config.refinement_start}, refine –{config.refinement_freeze},"
        f" frozen –{config.training.steps} ({needed / len(setting.train):.1f} epochs)"
    )
