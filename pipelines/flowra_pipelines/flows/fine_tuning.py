"""The whole job as a Prefect flow of six tasks.

Tasks take and return plain JSON: the configuration, a run id, a folder. Results are files; whether a stage must run
again is decided by the content of what it reads (``stages/record.py``), not by Prefect's cache, whose keys know neither
files nor helper functions.
"""

import atexit
import gc
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run, task_run

from flowra_pipelines.errors import UserError, explain
from flowra_pipelines.run_config import RunConfig, load_config

__all__ = ["fine_tuning"]

# Heavy imports happen inside, so that `prefect deploy`, which reads the signature, is quick. Prefect stores the
# exception of a failed run even where results are not persisted, and as a pickle unless a serializer is named.

# At exit the interpreter would look for garbage among a million live objects, which takes seconds.
atexit.register(gc.freeze)


@task(cache_policy=NO_CACHE, persist_result=False, result_serializer="json")
def stage_task(name: str, config: dict[str, Any], parent_run_id: str, force: bool) -> dict[str, Any]:
    """Run one stage; returns where its artifacts lie and which tracking run made them."""
    from flowra_pipelines.stages.table import run_tracked
    from flowra_pipelines.tracking import Tracker

    settings: RunConfig = load_config(config)
    tracker = Tracker(settings, parent_run_id=parent_run_id)
    tags = {"prefect.flow_run_id": str(flow_run.id), "prefect.task_run_id": str(task_run.id)}
    record = run_tracked(name, settings, tracker, force=force, tags=tags)
    get_run_logger().info("%s: %.1f s", name, record.seconds)
    for key, line in record.summary.items():
        if not key.startswith("seconds"):
            get_run_logger().info("%s: %s", key, line)
    return {
        "stage": name,
        "folder": str(settings.folder / name),
        "mlflow_run_id": record.mlflow_run_id,
        "seconds": record.seconds,
    }


@flow(name="fine-tuning", persist_result=False, result_serializer="json")
def fine_tuning(
    config: str | dict[str, Any],
    overrides: tuple[str, ...] = (),
    force: bool = False,
    under: str | None = None,
) -> list[dict[str, Any]]:
    """Calibrate, allocate, train, refine, merge, evaluate.

    Args:
        config: path of a run's YAML file, or its content. Relative paths, also those inside it, start at the working
            directory: for a deployment, the folder in which it was deployed.
        overrides: keys to change, such as ``training.steps=400``.
        force: run every stage even if its artifacts are up to date.
        under: tracking run of which this one is a child, where it is a part of something larger.

    Returns:
        For each stage its folder, tracking run and time.

    Raises:
        UserError: for what the user or the machine's owner can put right; its line is the message of the failed run.
    """
    get_run_logger().info("Working directory: %s", Path.cwd())
    settings = load_config(config, overrides)
    content = settings.model_dump(mode="json", exclude_unset=True)

    from flowra_pipelines.results_table import results_as_markdown
    from flowra_pipelines.stages.record import STAGES
    from flowra_pipelines.stages.setting import check_inputs
    from flowra_pipelines.tracking import Tracker

    try:
        check_inputs(settings)
        with Tracker(settings, under=under) as tracker:
            done = [
                stage_task.with_options(name=name, task_run_name=name)(name, content, tracker.parent_run_id, force)
                for name in STAGES
            ]
    except Exception as error:
        line = explain(error)
        if line is None or isinstance(error, UserError):
            raise
        raise UserError(line) from error
    create_markdown_artifact(results_as_markdown(settings), key="comparison", description=f"Results of {settings.name}")
    return done
