"""The ``flowra`` command. Heavy imports happen inside the commands, so that ``--help`` is instant."""

import shlex
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flowra_pipelines import config_commands, fuse_commands, merge_commands, plan_commands, profile_commands
from flowra_pipelines.errors import explain
from flowra_pipelines.help_text import flow_paragraphs
from flowra_pipelines.one_stage import quiet, run_one_stage

__all__ = ["app", "main"]

app = typer.Typer(
    name="flowra",
    help="Give a model, a data set and a parameter budget; Flowra puts rank where it pays.",
    epilog="Start with: flowra demo. Then copy its configuration and run: flowra run my.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(config_commands.app)
app.add_typer(profile_commands.app)
app.add_typer(plan_commands.app)
app.add_typer(fuse_commands.app)

Config = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. --set training.steps=400. Repeatable."),
]
Force = Annotated[bool, typer.Option("--force", help="Run even if the artifacts are up to date.")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
    prefect: Annotated[
        bool, typer.Option("--prefect/--no-prefect", help="Run as a Prefect flow, or call the stages directly.")
    ] = True,
    force: Force = False,
) -> None:
    """Run all stages: calibrate, allocate, train, refine, merge, evaluate.

    With `tasks` in the file, each task is such a run; then they become one adapter, and each is evaluated on it. Stages
    whose inputs have not changed are reused, so the same command continues a run that was interrupted.
    """
    from flowra_pipelines.composition_config import is_composition

    if is_composition(config):
        _run_tasks(config, overrides, dry_run=dry_run, prefect=prefect, force=force)
        return
    _run(config, overrides, dry_run=dry_run, prefect=prefect, force=force, command=["flowra", "run", str(config)])


@app.command()
def demo(
    overrides: Overrides = None,
    prefect: Annotated[
        bool, typer.Option("--prefect/--no-prefect", help="Run as a Prefect flow, or call the stages directly.")
    ] = True,
    force: Force = False,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the configuration and stop.")] = False,
) -> None:
    """Fine-tune all-MiniLM-L6-v2 on Rotten Tomatoes reviews and compare with baselines; minutes on two cores."""
    path = Path(str(files("flowra_pipelines").joinpath("configs", "demo.yaml")))
    if show_config:
        sys.stdout.write(path.read_text(encoding="utf-8"))
        return
    _run(path, overrides, dry_run=False, prefect=prefect, force=force, command=["flowra", "demo"])


@app.command()
def calibrate(
    config: Config,
    overrides: Overrides = None,
    force: Force = False,
    validate: Annotated[
        bool,
        typer.Option("--validate", help="Then take rank away, module by module, and see whether the estimators knew."),
    ] = False,
) -> None:
    """Train a short probe and measure its flow spectrum: writes the profile.

    With --validate also validation.json: how the estimators' order agrees with the loss that each module's rank really
    saves, by leaving it out of the trained probe, and for some modules by training without and alone.
    """
    run_one_stage("calibrate", config, overrides, force)
    if validate:
        run_one_stage("validate", config, overrides, force)


@app.command()
def allocate(config: Config, overrides: Overrides = None, force: Force = False) -> None:
    """Turn the profile and the budget into ranks: writes the plan."""
    run_one_stage("allocate", config, overrides, force)


@app.command()
def train(config: Config, overrides: Overrides = None, force: Force = False) -> None:
    """Train on from the probe's kept directions at the planned ranks."""
    run_one_stage("train", config, overrides, force)


@app.command()
def refine(config: Config, overrides: Overrides = None, force: Force = False) -> None:
    """Go on training while rank moves between modules, then freezes."""
    run_one_stage("refine", config, overrides, force)


app.command(help=merge_commands.MERGE)(merge_commands.merge)


@app.command()
def evaluate(config: Config, overrides: Overrides = None, force: Force = False) -> None:
    """Score the adapter on held-out examples against its baselines, and print the table."""
    run_one_stage("evaluate", config, overrides, force)


app.command(help=merge_commands.STATISTICS)(merge_commands.statistics)


@app.command()
def targets(
    model: Annotated[str, typer.Argument(help="Folder, package://NAME/path, or a Hub name.", show_default=False)],
    task: Annotated[
        str | None, typer.Option(help="Task of the run; by default what the model says it is for.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List what in a model can be adapted, and what a unit of rank costs there; reads no weights."""
    quiet()
    from flowra_pipelines.targets import show_targets

    show_targets(model, task, as_json=as_json)


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help="Folder of an adapter or of a run, or a run's YAML file.", show_default=False)
    ],
    consumer: Annotated[
        Literal["peft", "vllm", "kohya"],
        typer.Option("--for", help="Who reads it. kohya: also LyCORIS and ComfyUI.", show_default=False),
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="Folder to write, for kohya a .safetensors file; by default beside it.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder, package://NAME/path or Hub name; by default what it says.", show_default=False),
    ] = None,
    rank_step: Annotated[int, typer.Option(min=1, help="Fill ranks up with zeros to multiples of this.")] = 1,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Cut what is not LoRA for the reader to this rank; by default nothing is cut."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Of kohya's names: lora_unet, lora_te, lycoris.")] = "lycoris",
    check: Annotated[
        bool, typer.Option("--check", help="Read it back with peft, vLLM's rules or LyCORIS, and compare the logits.")
    ] = False,
) -> None:
    """Write an adapter for PEFT, vLLM or kohya's tools; with --check, prove that they compute the same.

    Scales are folded in, so that no reader can mis-scale it. What a reader would compute otherwise is refused with the
    reason. Exit code 1: the check failed, and nothing was written.
    """
    quiet()
    from flowra_pipelines.export import show_export
    from flowra_pipelines.export_check import CheckFailed

    try:
        show_export(source, consumer, to=to, base=base, rank_step=rank_step, rank=rank, prefix=prefix, check=check)
    except CheckFailed as failed:
        typer.echo(f"flowra: {failed} Nothing was written.", err=True)
        sys.exit(1)


@app.command()
def report(
    path: profile_commands.ProfilePath,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder to write; by default `report` beside the stage.", show_default=False
        ),
    ] = None,
) -> None:
    """Draw a profile: pictures, and one page that opens in any browser and needs nothing else.

    What `validation.json` beside the profile says of ablations is shown, too, and how rank moved in the run.
    """
    from flowra_pipelines.report import show_report

    show_report(path, to)


@app.command()
def ui(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of a run; by default runs/mlflow.db here.", show_default=False)
    ] = None,
    uri: Annotated[
        str | None, typer.Option(help="Tracking URI, instead of the configuration's.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="On a terminal, open the page in a browser.")
    ] = True,
) -> None:
    """Compare runs on MLflow's page, served on this machine until Ctrl-C."""
    from flowra_pipelines.config_sections import TrackingConfig
    from flowra_pipelines.run_config import RunConfig, load_config
    from flowra_pipelines.ui import show_ui

    settings = None if config is None else load_config(config)
    if uri is None:
        here = Path(RunConfig.model_fields["output_root"].default).absolute()
        uri = f"sqlite:///{here / 'mlflow.db'}" if settings is None else settings.tracking_uri
    experiment = (TrackingConfig() if settings is None else settings.tracking).experiment
    show_ui(uri=uri, experiment=experiment, port=port, browser=browser and sys.stdout.isatty())


flow_paragraphs(app)


def main() -> None:
    """Run the command line; a user's mistake or a full disk is one line and exit code 2, never a traceback."""
    try:
        app()
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        typer.echo(f"flowra: {line}", err=True)
        raise SystemExit(2) from None


def _run(
    path: Path, overrides: list[str] | None, *, dry_run: bool, prefect: bool, force: bool, command: list[str]
) -> None:
    from flowra_pipelines.run_config import load_config

    config = load_config(path, overrides or [])
    quiet()
    if dry_run:
        from flowra_pipelines.dry_run import show_plan

        show_plan(config)
        return
    from flowra_pipelines.results_table import show_results
    from flowra_pipelines.stages.setting import check_inputs

    check_inputs(config)
    content: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    again = [*command, *(part for each in overrides or [] for part in ("--set", each))]
    try:
        if prefect:
            from flowra_pipelines.flows.fine_tuning import fine_tuning

            fine_tuning(content, force=force)
        else:
            from flowra_pipelines.stages.record import STAGES
            from flowra_pipelines.stages.table import run_tracked
            from flowra_pipelines.tracking import Tracker

            with Tracker(config) as tracker:
                for name in STAGES:
                    run_tracked(name, config, tracker, force=force)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. Continue with: {shlex.join(again)}", err=True)
        raise SystemExit(130) from None
    show_results(config)


def _run_tasks(path: Path, overrides: list[str] | None, *, dry_run: bool, prefect: bool, force: bool) -> None:
    from flowra_pipelines.composition_config import load_composition
    from flowra_pipelines.config_file import read_content

    content = read_content(path, overrides or [])
    config = load_composition(content)
    quiet()
    from flowra_pipelines.composed_tasks import check_tasks, compose_tasks, run_task, show_composition

    if dry_run:
        from flowra_pipelines.dry_run import show_plan

        for each in config.tasks.values():
            show_plan(each.run)
        check_tasks(config)
        return
    check_tasks(config)
    again = ["flowra", "run", str(path), *(part for key in overrides or [] for part in ("--set", key))]
    try:
        if prefect:
            from flowra_pipelines.flows.composition import composition

            composition(content, force=force)
        else:
            from flowra_pipelines.tracking import Tracker

            with Tracker(config) as tracker:
                for name in config.tasks:
                    run_task(config, name, tracker, force=force)
                compose_tasks(config, tracker, force=force)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. Continue with: {shlex.join(again)}", err=True)
        raise SystemExit(130) from None
    show_composition(config)


if __name__ == "__main__":
    main()
