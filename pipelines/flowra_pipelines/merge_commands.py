"""``flowra merge`` of adapters, and ``flowra statistics``, which some rules need. Imports nothing heavy early."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flowra_pipelines.errors import UserError
from flowra_pipelines.merge_rules import rules_text
from flowra_pipelines.one_stage import quiet, run_one_stage

if TYPE_CHECKING:
    from flowra_pipelines.learned_weights import LearnWeights

__all__ = ["MERGE", "STATISTICS", "merge", "statistics"]

MERGE = f"""Make one adapter of many, and say what it cost; or run the stage merge of a run.

With folders of adapters (or of runs) on one base, the result is an ordinary adapter that PEFT and vLLM load. Ranks and
layers may differ; heads are kept apart: each task goes on with its own, and --heads-from puts one of them into the
result. A rule that looks at data needs statistics of every task: made before with flowra statistics, or here from a
few unlabelled inputs of each. With one YAML file, it is the run's stage: the adapter goes into the base, is checked and
written for PEFT and vLLM.

\b
flowra merge runs/a runs/b --out merged --heads-from runs/a
flowra merge a/ b/ c/ --data a.csv --data b.csv --data c.csv:premise,hypothesis --report report.html
flowra merge a/ b/ --statistics a-statistics --statistics b-statistics --budget 'like a/'
flowra merge a/ b/ --method ties --density 0.2 --weights 1,0.5 --rank 16
flowra merge a/ b/ --weights learned --data a.csv --data b.csv   # those that make the merged model sure of its answers
flowra merge my.yaml --set merge.rule=cat

\b
{rules_text()}
"""

STATISTICS = """Measure what a task needs of each layer, for flowra merge: on base and adapter, with unlabelled inputs.

C, the second moment of what enters a layer, and S, that of the gradients at what leaves it, with labels drawn from the
model. 64 to 256 inputs are enough. What the adapter is to be merged with may update other layers, too: name it with
--with, so that these are measured as well.

\b
flowra statistics runs/a --data a.csv --out a-statistics --with runs/b
flowra statistics a/ --data pairs.parquet:premise,hypothesis --examples 256 --out a-statistics --base ./my-model
flowra statistics my.yaml --out my-statistics             # a run: its adapter, its base, its training data
"""

Sources = Annotated[
    list[Path],
    typer.Argument(
        metavar="ADAPTER...|CONFIG", help="Folders of adapters or runs; or one YAML file.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Of the stage: change one key. Repeatable.", show_default=False),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:COLUMN[,COLUMN]]",
        help="Unlabelled inputs of each adapter, in their order: text in the column `text`, or in these. Repeatable.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="Folder, package://NAME/path or Hub name; by default what the adapters say.", show_default=False),
]
Examples = Annotated[int, typer.Option(min=8, help="Inputs that statistics are measured on.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Inputs at a time while they are measured.")]


def merge(
    context: typer.Context,
    sources: Sources,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder to write; not for the stage.", rich_help_panel="Result")
    ] = Path("merged"),
    method: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="One of those above; by default flow with statistics, else orth.",
            show_default=False,
            rich_help_panel="Rule",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,…|learned[:task]",
            help="One for each; by default 1. Or learned on --data: one for each adapter and module, or adapter.",
            show_default=False,
            rich_help_panel="Rule",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Of learning weights; by default 500.", show_default=False, rich_help_panel="Rule"),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of the entries that is kept.", show_default=False, rich_help_panel="Rule"),
    ] = None,
    trim: Annotated[
        Literal["global", "tensor"] | None,
        typer.Option(help="Largest of all entries, or of each module.", show_default=False, rich_help_panel="Rule"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of entries dropped, inputs and labels drawn.", show_default=False, rich_help_panel="Rule"),
    ] = None,
    common: Annotated[
        float | None,
        typer.Option(help="Share of directions from the sum.", show_default=False, rich_help_panel="Rule"),
    ] = None,
    shrinkage: Annotated[
        float | None,
        typer.Option(help="How far moments are made simpler.", show_default=False, rich_help_panel="Rule"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Largest rank of a module.", show_default=False, rich_help_panel="Result"),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of each module's squared norm to keep.", show_default=False, rich_help_panel="Result"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Parameters: 300k, 2MB, 'like a/' (as one of them has), 'like r=8 on q,v', or 0.1% with --base.",
            show_default=False,
            rich_help_panel="Result",
        ),
    ] = None,
    heads_from: Annotated[
        Path | None,
        typer.Option(
            metavar="ADAPTER", help="Whose head the result carries.", show_default=False, rich_help_panel="Result"
        ),
    ] = None,
    base: Base = None,
    statistics: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Of each adapter, in their order, made by flowra statistics. Repeatable.",
            show_default=False,
            rich_help_panel="Statistics",
        ),
    ] = None,
    data: Data = None,
    examples: Examples = 128,
    batch_size: BatchSize = 16,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="How the tasks interfere, as a page.",
            show_default=False,
            rich_help_panel="Result",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.", rich_help_panel="Result")] = False,
    track: Annotated[
        bool,
        typer.Option("--track", help="Log it to MLflow, in runs/mlflow.db: see flowra ui.", rich_help_panel="Result"),
    ] = False,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Of the stage: run even if it is up to date.")] = False,
) -> None:
    """See ``MERGE``."""
    given = _given(context)
    configs = [source for source in sources if source.suffix in (".yaml", ".yml")]
    if configs:
        if len(sources) > 1:
            raise UserError(
                f"a YAML file must stand alone, for the stage merge of its run, got {len(sources)} arguments. Give"
                f" folders of adapters, such as the run's own."
            )
        stray = [option for name, option in given.items() if name not in ("sources", "overrides", "force")]
        if stray:
            raise UserError(
                f"{stray[0]} must be left out with a YAML file, whose section merge says how. Change a key with --set,"
                " such as --set merge.rule=cat."
            )
        run_one_stage("merge", configs[0], overrides or [], force)
        return
    if overrides or force:
        raise UserError(
            "--set and --force must be left out with adapters: they are the stage's, whose argument is YAML"
        )
    idle = [option for name, option in given.items() if name in ("examples", "batch_size") and not data]
    if idle:
        raise UserError(f"{idle[0]} must be left out without --data: nothing is measured")
    quiet()
    from flowra_pipelines.merge_job import MergeJob
    from flowra_pipelines.merge_shown import show_merge

    learn = _learn(weights, steps)
    job = MergeJob(
        sources=tuple(sources),
        out=out,
        rule=method,
        weights=None if learn else _numbers(weights, len(sources)),
        learn=learn,
        density=density,
        trim=trim,
        seed=seed,
        common=common,
        shrinkage=shrinkage,
        rank=rank,
        energy=energy,
        budget=budget,
        heads_from=heads_from,
        base=base,
        statistics=tuple(statistics or ()),
        data=tuple(data or ()),
        examples=examples,
        batch_size=batch_size,
    )
    show_merge(job, report=report, as_json=as_json, track=track)


def statistics(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of an adapter or of a run, or a run's YAML file.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:COLUMN[,COLUMN]]",
            help="Inputs; text in the column `text`, or in these. Not with a YAML file.",
            show_default=False,
        ),
    ] = None,
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="ADAPTER", help="Measure its modules, too. Repeatable.", show_default=False),
    ] = None,
    base: Base = None,
    examples: Examples = 128,
    batch_size: BatchSize = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs and labels that are drawn.")] = 0,
    fisher: Annotated[
        bool, typer.Option("--fisher", help="Also the Fisher's diagonal, for the rule fisher; m n numbers a layer.")
    ] = False,
) -> None:
    """See ``STATISTICS``."""
    quiet()
    from flowra_pipelines.merge_shown import show_statistics
    from flowra_pipelines.task_statistics import MeasureSettings

    settings = MeasureSettings(examples=examples, batch_size=batch_size, seed=seed, fisher=fisher)
    show_statistics(adapter, out, data=data, others=others or [], base=base, settings=settings)


def _given(context: typer.Context) -> dict[str, str]:
    """Return the parameters that stand on the command line, with what they are called there."""
    named = {each.name: each.opts[0] for each in context.command.params if each.name}
    sources = {name: context.get_parameter_source(name) for name in named}
    return {
        name: named[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"
    }


def _learn(weights: str | None, steps: int | None) -> "LearnWeights | None":
    """Read how weights are learned; None if they are not."""
    if weights not in ("learned", "learned:module", "learned:task"):
        if steps is not None:
            raise UserError(f"steps must be left out unless weights are learned, got {steps}. Give --weights learned.")
        return None
    from flowra_pipelines.learned_weights import LearnWeights

    per: Literal["module", "task"] = "task" if weights == "learned:task" else "module"
    return LearnWeights(per=per) if steps is None else LearnWeights(per=per, steps=steps)


def _numbers(text: str | None, count: int) -> tuple[float, ...]:
    """Read the weights."""
    if text is None:
        return (1.0,) * count
    try:
        numbers = tuple(float(each) for each in text.split(","))
    except ValueError:
        raise UserError(
            f"weights must be numbers with commas between, or learned, got {text!r}. Example: --weights 1,0.5"
        ) from None
    if len(numbers) != count:
        raise UserError(f"weights must be one for each adapter, got {len(numbers)} for {count}")
    return numbers
