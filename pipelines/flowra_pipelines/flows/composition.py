"""Several tasks as one Prefect flow: each task's fine-tuning is a subflow, then they become one adapter.

One after another, subflows run in this process. Several at a time need processes of their own: training draws from
PyTorch's global generators, and threads would mix their draws.
"""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run, task_run

from flowra_pipelines.composition_config import CompositionConfig, load_composition
from flowra_pipelines.errors import UserError, explain
from flowra_pipelines.flows.fine_tuning import fine_tuning

__all__ = ["composition"]


@task(name="task", cache_policy=NO_CACHE, persist_result=False, result_serializer="json")
def train_task(content: dict[str, Any], name: str, under: str, force: bool, threads: int) -> str:
    """Fine-tune one task in a process of its own, with its share of the threads; returns its name."""
    import torch

    from flowra_pipelines.one_stage import quiet

    quiet()
    torch.set_num_threads(threads)
    run = load_composition(content).tasks[name].run
    fine_tuning(run.model_dump(mode="json", exclude_unset=True), force=force, under=under)
    return name


@task(name="compose", cache_policy=NO_CACHE, persist_result=False, result_serializer="json")
def compose_task(content: dict[str, Any], parent_run_id: str, force: bool) -> dict[str, str | None]:
    """Merge what was trained and evaluate it; returns the tracking run of each stage."""
    from flowra_pipelines.composed_tasks import compose_tasks
    from flowra_pipelines.tracking import Tracker

    settings = load_composition(content)
    tags = {"prefect.flow_run_id": str(flow_run.id), "prefect.task_run_id": str(task_run.id)}
    done = compose_tasks(settings, Tracker(settings, parent_run_id=parent_run_id), force=force, tags=tags)
    for name, record in done.items():
        get_run_logger().info("%s: %.1f s", name, record.seconds)
    return {name: record.mlflow_run_id for name, record in done.items()}


@flow(name="composition", persist_result=False, result_serializer="json")
def composition(
    config: str | dict[str, Any], overrides: tuple[str, ...] = (), force: bool = False
) -> dict[str, str | None]:
    """Fine-tune several tasks on one base, merge them, and evaluate each on what came out.

    Args:
        config: path of a YAML file with ``tasks``, or its content. Relative paths start at the working directory.
        overrides: keys to change, such as ``merge.rule=ties``.
        force: run every stage even if its artifacts are up to date.

    Returns:
        The tracking run of each stage of the composition.

    Raises:
        UserError: for what the user or the machine's owner can put right.
    """
    get_run_logger().info("Working directory: %s", Path.cwd())
    from flowra_pipelines.config_file import read_content

    content = read_content(config, overrides)
    settings = load_composition(content)
    from flowra_pipelines.composed_tasks import check_tasks, composition_as_markdown
    from flowra_pipelines.tracking import Tracker

    try:
        check_tasks(settings)
        with Tracker(settings) as tracker:
            _train(settings, content, tracker.parent_run_id, force)
            done = compose_task(content, tracker.parent_run_id, force)
    except Exception as error:
        line = explain(error)
        if line is None or isinstance(error, UserError):
            raise
        raise UserError(line) from error
    create_markdown_artifact(
        composition_as_markdown(settings), key="composition", description=f"Results of {settings.name}"
    )
    return done


def _train(settings: CompositionConfig, content: dict[str, Any], under: str, force: bool) -> None:
    """Run the tasks' subflows, as many at a time as the configuration says."""
    workers = min(settings.parallel, len(settings.tasks))
    if workers == 1:
        for each in settings.tasks.values():
            fine_tuning(each.run.model_dump(mode="json", exclude_unset=True), force=force, under=under)
        return
    import torch
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.task_runners import ProcessPoolTaskRunner

    threads = max(1, torch.get_num_threads() // workers)
    url = str(get_client(sync_client=True).api_url)  # of the server in use, temporary or not
    with temporary_settings({PREFECT_API_URL: url}), ProcessPoolTaskRunner(max_workers=workers) as runner:
        begun = [
            runner.submit(
                train_task.with_options(name=f"task {name}"),
                {"content": content, "name": name, "under": under, "force": force, "threads": threads},
            )
            for name in settings.tasks
        ]
        for future in begun:
            future.wait()
    for future in begun:
        future.result()
