"""The whole job as a Prefect flow of six tasks.

Tasks take and return plain JSON: the configuration, a run id, a folder. Results are files; whether a stage must run
again is decided by the content of what it reads (``stages/record.py``), not by Prefect's cache, whose keys know neither
files nor helper functions.
"""

from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run, task_run

from flowra_pipelines.results_table import results_as_markdown
from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.stages.record import STAGES
from flowra_pipelines.stages.table import run_tracked
from flowra_pipelines.tracking import Tracker

__all__ = ["fine_tuning"]


@task(cache_policy=NO_CACHE, persist_result=False)
def stage_task(name: str, config: dict[str, Any], parent_run_id: str, force: bool) -> dict[str, Any]:
    """Run one stage; returns where its artifacts lie and which tracking run made them."""
    settings: RunConfig = load_config(config)
    tracker = Tracker(settings, parent_run_id=parent_run_id)
    tags = {"prefect.flow_run_id": str(flow_run.id), "prefect.task_run_id": str(task_run.id)}
    record = run_tracked(name, settings, tracker, force=force, tags=tags)
    get_run_logger().info("%s: %.1f s", name, record.seconds)
    return {
        "stage": name,
        "folder": str(settings.folder / name),
        "mlflow_run_id": record.mlflow_run_id,
        "seconds": record.seconds,
    }


@flow(name="fine-tuning", persist_result=False)
def fine_tuning(config: dict[str, Any], force: bool = False) -> list[dict[str, Any]]:
    """Calibrate, allocate, train, refine, merge, evaluate.

    Args:
        config: a run configuration, as in its YAML file.
        force: run every stage even if its artifacts are up to date.

    Returns:
        For each stage its folder, tracking run and time.
    """
    settings = load_config(config)
    with Tracker(settings) as tracker:
        done = [
            stage_task.with_options(name=name, task_run_name=name)(name, config, tracker.parent_run_id, force)
            for name in STAGES
        ]
    create_markdown_artifact(results_as_markdown(settings), key="comparison", description=f"Results of {settings.name}")
    return done
