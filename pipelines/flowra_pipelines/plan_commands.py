"""``flowra plan``: what a plan says, what differs between two, and what it would be. Imports nothing heavy early."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowra_pipelines.errors import UserError
from flowra_pipelines.profile_commands import natural, printable

if TYPE_CHECKING:
    from rich.table import Table

    from flowra_allocation import ModulePlan, RankPlan
    from flowra_pipelines.what_if import Answer

__all__ = ["app", "plan_content", "plan_difference"]

app = typer.Typer(name="plan", help="Show a plan, what differs between two, or what it would be.", no_args_is_help=True)

PlanPath = Annotated[
    Path, typer.Argument(help="Folder of a run or of its stage allocate, or a plan.json.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
All = Annotated[bool, typer.Option("--all", help="Modules of unchanged rank, too.")]


@app.command()
def show(path: PlanPath, as_json: AsJson = False) -> None:
    """Print what each module gets, and what its last and its next unit of rank are worth per parameter.

    In a good plan the smallest worth that was taken (`last in`) is about the largest that was left out (`first out`).
    """
    from flowra_pipelines.what_if import plan_at

    file, plan = plan_at(path)
    if as_json:
        _echo({"plan": str(file), **plan_content(plan)})
        return
    from flowra_pipelines.progress import console

    console.print(_modules(plan, str(file)), soft_wrap=False)
    for line in _summary(plan):
        console.print(line, markup=False, emoji=False)


@app.command()
def diff(first: PlanPath, second: PlanPath, as_json: AsJson = False, every: All = False) -> None:
    """Say what differs between two plans: budget, ranks, parameters. A difference is no error: exit code 0."""
    from flowra_pipelines.what_if import plan_at

    (first_file, one), (second_file, other) = plan_at(first), plan_at(second)
    if as_json:
        _echo({"first": str(first_file), "second": str(second_file), **plan_difference(one, other)})
        return
    from rich.text import Text

    from flowra_pipelines.progress import console

    for label, file in (("A", first_file), ("B", second_file)):
        console.print(Text.assemble((f"{label}: ", "bold"), printable(str(file))))
    _print_difference(one, other, every)


WHAT_IF = """Plan again under other conditions, and show what would change; nothing is trained, no model is read.

NAMES are names of modules, tails of names (query), shell patterns (*.layer.0.*), or q, k, v, o; commas between.

\b
flowra plan what-if runs/demo --budget 0.2%
flowra plan what-if runs/demo --cap 8 --freeze q,v --floor down_proj=1
flowra plan what-if runs/demo --rank-steps vllm --solver exact
flowra plan what-if runs/demo --static uniform --seed 1
flowra plan what-if runs/demo --budget 'same as runs/other' --write runs/demo/allocate

A run whose plan is replaced trains with it when its next stages are called one by one: flowra train, then refine, merge
and evaluate. flowra run would plan anew; what every run should do belongs into its configuration (flowra config explain
allocation).
"""


@app.command("what-if", help=WHAT_IF)
def what_if(
    path: Annotated[
        Path,
        typer.Argument(help="Folder of a run, a plan.json, or a profile.json or its folder.", show_default=False),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            help="Of the run, as in its configuration: 0.1%, 300k, 2MB, 'like r=8 on q,v', 'same as PATH'; by default"
            " the present one."
        ),
    ] = None,
    cap: Annotated[
        list[str] | None, typer.Option(metavar="[NAMES=]RANK", help="Largest rank, of all or of some. Repeatable.")
    ] = None,
    floor: Annotated[
        list[str] | None, typer.Option(metavar="[NAMES=]RANK", help="Least rank, of all or of some. Repeatable.")
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES[=RANK]", help="Keep these at their present rank, or at this one. Repeatable."),
    ] = None,
    rank_steps: Annotated[
        str | None,
        typer.Option(
            metavar="vllm|R,R,…",
            help="4,8,16: every rank is one of these, or 0. vllm: the largest rank is one that vLLM has buffers for.",
        ),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(help="greedy (by default), or exact: the optimum, greedy is short of by a unit."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="η: modules with ψ below it get no rank. 0 switches it off.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="NAME", help="Gains from another spectrum or statistic of the profile."),
    ] = None,
    static: Annotated[
        str | None,
        typer.Option(help="Look at no gains: uniform, random, or one rank on q,v, attention, mlp or all."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of --static uniform and random; by default 0.")] = None,
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it: a folder, or a path that ends in plan.json.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    every: All = False,
) -> None:
    """Plan again under other conditions, and show what would change; see :data:`WHAT_IF`."""
    target = None if write is None else _target(write)
    from flowra_pipelines.what_if import Question, answer, read_sources

    sources = read_sources(path)
    question = Question(
        budget=budget,
        caps=cap or (),
        floors=floor or (),
        frozen=freeze or (),
        rank_steps=rank_steps,
        solver=solver,
        threshold=threshold,
        source=source,
        static=static,
        seed=seed,
    )
    found = answer(sources, question)
    written = None if target is None else _write(found.plan, target)
    if as_json:
        content: dict[str, Any] = {"notes": found.notes, "ladder": [asdict(step) for step in found.ladder]}
        if sources.plan is not None:
            content["difference"] = plan_difference(sources.plan, found.plan)
        _echo({**content, **plan_content(found.plan), "written": written and str(written)})
        return
    _print_answer(found, sources.plan, every=every)
    if written is not None:
        from flowra_pipelines.progress import console

        console.print(f"Written: {printable(str(written))}", markup=False)


def plan_content(plan: "RankPlan") -> dict[str, Any]:
    """Say in plain values what is printed of a plan."""
    modules = {}
    for name, module in plan.modules.items():
        last, following = _worth(module)
        modules[name] = {
            "kind": module.kind,
            "psi": module.psi,
            "rank": module.rank,
            "parameters": module.used,
            "last": last,
            "next": following,
        }
    return {
        "budget": plan.budget,
        "final_budget": plan.final_budget,
        "parameters": plan.parameters,
        "gain": _gain(plan),
        "last_in": plan.last_in,
        "first_out": plan.first_out,
        "scaling": plan.scaling,
        "sensitivity_threshold": plan.sensitivity_threshold,
        "modules": modules,
    }


def plan_difference(first: "RankPlan", second: "RankPlan") -> dict[str, Any]:
    """Say in plain values what differs between two plans."""
    shared = [name for name in first.modules if name in second.modules]
    one, other = first.modules, second.modules
    values = {
        "budget": (first.budget, second.budget),
        "final_budget": (first.final_budget, second.final_budget),
        "parameters": (first.parameters, second.parameters),
        "gain": (_gain(first), _gain(second)),
        "scaling": (first.scaling, second.scaling),
        "sensitivity_threshold": (first.sensitivity_threshold, second.sensitivity_threshold),
    }
    return {
        **values,
        "only_in_first": [name for name in one if name not in other],
        "only_in_second": [name for name in other if name not in one],
        "kinds": {name: (one[name].kind, other[name].kind) for name in shared if one[name].kind != other[name].kind},
        "other_gains": [name for name in shared if one[name].gains != other[name].gains],
        "moved_parameters": sum(max(0, other[name].used - one[name].used) for name in shared),
        "ranks": {name: (one[name].rank, other[name].rank) for name in shared if one[name].rank != other[name].rank},
    }


def _value(value: float | None) -> str:
    """Show a number of a plan, or that it says none."""
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _target(path: Path) -> Path:
    """Return the folder that is meant."""
    if path.name == "plan.json":
        return path.parent
    if path.suffix == ".json" or path.is_file():
        raise UserError(f"--write must be a folder, or a path that ends in plan.json, got {path}")
    return path


def _write(plan: "RankPlan", folder: Path) -> Path:
    from flowra_allocation import write_plan

    return write_plan(plan, folder)


def _echo(content: Mapping[str, object]) -> None:
    typer.echo(json.dumps(content, indent=2, allow_nan=False))


def _worth(module: "ModulePlan") -> tuple[float | None, float | None]:
    """Return the gain per parameter of the module's last unit of rank and of its next; None where it is not known."""
    linear = module.parameters is None
    units = [gain / module.cost_per_rank for gain in module.gains] if linear else []
    last = units[module.rank - 1] if 0 < module.rank <= len(units) else None
    return last, units[module.rank] if module.rank < len(units) else None


def _gain(plan: "RankPlan") -> float:
    return sum(sum(module.gains[: module.rank]) for module in plan.modules.values())


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=natural)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _modules(plan: "RankPlan", title: str) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left")
    for heading in ("module", "kind", "ψ", "rank", "parameters", "last unit", "next unit"):
        table.add_column(heading, justify="left" if heading in ("module", "kind") else "right", overflow="fold")
    for name in _in_order(plan.modules):
        module = plan.modules[name]
        worth = (_number(each) for each in _worth(module))
        below = module.psi < plan.sensitivity_threshold
        cells = (f"{module.psi:.3f}{' < η' if below else ''}", str(module.rank), f"{module.used:,}", *worth)
        table.add_row(Text(printable(name)), module.kind, *cells)
    return table


def _summary(plan: "RankPlan") -> list[str]:
    active = sum(module.rank > 0 for module in plan.modules.values())
    lines = [
        f"{plan.parameters:,} of {plan.budget:,} parameters, {plan.left:,} left; {active} of {len(plan.modules)}"
        f" modules have rank, the largest {max(plan.ranks.values())}",
        f"planned gain {_gain(plan):.4g}; s = {plan.scaling:g}; η = {plan.sensitivity_threshold:g}",
    ]
    if plan.final_budget is not None:
        lines.insert(1, f"refinement starts from there, and ends within {plan.final_budget:,} parameters")
    for what, edge in (("last in", plan.last_in), ("first out", plan.first_out)):
        if edge is not None:
            lines.append(f"{what}: {printable(edge[0])}, worth {edge[1]:.3g} per parameter")
    return lines


def _print_answer(found: "Answer", present: "RankPlan | None", *, every: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from flowra_pipelines.progress import console

    if present is None:
        console.print(_modules(found.plan, "What the plan would be"), soft_wrap=False)
    else:
        console.print(Text.assemble(("A: ", "bold"), "the present plan"))
        console.print(Text.assemble(("B: ", "bold"), "what it would be"))
        _print_difference(present, found.plan, every)
    for line in _summary(found.plan):
        console.print(line, markup=False, emoji=False)
    if found.ladder:
        table = Table(title="vLLM: what each size of its buffers would hold", title_justify="left")
        for heading in ("max_lora_rank", "planned gain", "parameters", "of the buffers unused"):
            table.add_column(heading, justify="right")
        for step in found.ladder:
            share = step.unused / max(step.unused + step.parameters, 1)
            cells = (f"{step.gain:.4g}", f"{step.parameters:,}", f"{step.unused:,} ({share:.0%})")
            table.add_row(str(step.rank), *cells)
        console.print(table, soft_wrap=False)
    for note in found.notes:
        console.print(note, markup=False, emoji=False)


def _print_difference(first: "RankPlan", second: "RankPlan", every: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from flowra_pipelines.progress import console

    found = plan_difference(first, second)
    table = Table()
    for heading in ("", "A", "B"):
        table.add_column(heading, justify="left" if not heading else "right")
    for key in ("budget", "final_budget", "parameters", "gain", "scaling", "sensitivity_threshold"):
        if any(each is not None for each in found[key]):
            table.add_row(key.replace("_", " "), *map(_value, found[key]))
    console.print(table, soft_wrap=False)
    for label, names in (("A", found["only_in_first"]), ("B", found["only_in_second"])):
        if names:
            listed = ", ".join(printable(name) for name in names[:8])
            console.print(Text(f"Modules only in {label}: {listed}{' …' if len(names) > 8 else ''}"))
    for kinds, number in Counter(found["kinds"].values()).items():
        console.print(f"Kind: {kinds[0]} in A, {kinds[1]} in B; {number} modules.", markup=False)
    if found["other_gains"]:
        console.print(Text("Warning: gains differ, so the plans rest on different measurements.", "yellow"))
    shared = [name for name in first.modules if name in second.modules]
    rows = [name for name in shared if every or name in found["ranks"]]
    if not rows:
        console.print("Ranks: the same.")
        return
    table = Table()
    for heading in ("module", "ψ", "rank A", "rank B", "change", "parameters B", "last unit B", "next unit B"):
        table.add_column(heading, justify="left" if heading == "module" else "right", overflow="fold")
    for name in _in_order(rows):
        old, new = first.modules[name], second.modules[name]
        change = f"{new.rank - old.rank:+d}" if new.rank != old.rank else ""
        worth = (_number(each) for each in _worth(new))
        table.add_row(
            Text(printable(name)), f"{new.psi:.3f}", str(old.rank), str(new.rank), change, f"{new.used:,}", *worth
        )
    console.print(table, soft_wrap=False)
    changed = len(found["ranks"])
    console.print(
        f"{changed} of {len(shared)} modules change rank; {found['moved_parameters']:,} parameters go to those that"
        " gain."
    )
