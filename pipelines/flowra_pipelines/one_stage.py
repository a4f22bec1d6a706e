"""One stage as a command runs it. Heavy imports happen inside, so that ``--help`` is instant."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["quiet", "run_one_stage"]


def run_one_stage(name: str, path: Path, overrides: Sequence[str] | None = None, force: bool = False) -> None:
    """Run one stage, or reuse its artifacts, and log it.

    Args:
        name: of the stage.
        path: of the run's YAML file.
        overrides: such as ``training.steps=400``.
        force: run even if the artifacts are up to date.
    """
    from flowra_pipelines.run_config import load_config

    config = load_config(path, overrides or [])
    quiet()
    from flowra_pipelines.stages.record import earlier_records
    from flowra_pipelines.stages.setting import check_inputs
    from flowra_pipelines.stages.table import run_tracked
    from flowra_pipelines.tracking import Tracker

    earlier_records(name, config)  # before anything is written
    check_inputs(config)
    with Tracker(config) as tracker:
        run_tracked(name, config, tracker, force=force)
    if name == "evaluate":
        from flowra_pipelines.results_table import show_results

        show_results(config)


def quiet() -> None:
    """Leave the screen to our own progress; set what a user has not, before the libraries are imported."""
    defaults = {
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):  # they tell of kernels for other machines
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # for an mlflow that was imported before
