"""MLflow: one parent run for the whole, one child for each stage, everything by run id.

MLflow's active run belongs to a thread, and tasks may run in others; so nothing here uses it.
"""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from flowra_pipelines.config_sections import TrackingConfig
from flowra_pipelines.databases import put_database, sqlite_file
from flowra_pipelines.stages.record import StageRecord, StageResult

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Tracked", "Tracker", "open_tracking"]

# Before mlflow is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

MAX_PARAMETER = 500


class Tracked(Protocol):
    """What can be tracked: the configuration of a run, or of tasks that are composed."""

    @property
    def name(self) -> str:
        """Of the parent run."""

    @property
    def output_root(self) -> str:
        """Folder of all runs."""

    @property
    def tracking(self) -> TrackingConfig:
        """Where to."""

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking URI."""

    def model_dump(self, *, mode: Literal["json"]) -> dict[str, Any]:
        """Return all keys."""


def open_tracking(config: Tracked) -> "MlflowClient":
    """Open the store of a run's tracking URI; a sqlite file that is not there is made first.

    Args:
        config: of the run.

    Returns:
        The client.
    """
    from mlflow import MlflowClient

    Path(config.output_root).mkdir(parents=True, exist_ok=True)
    path = sqlite_file(config.tracking_uri)
    if path is not None and not path.exists():
        with TemporaryDirectory(prefix="flowra-") as folder:
            made = Path(folder) / "mlflow.db"
            MlflowClient(tracking_uri=f"sqlite:///{made}")
            put_database(made, path)
    return MlflowClient(tracking_uri=config.tracking_uri)


class Tracker:
    """Logs one run.

    Args:
        config: of the run; its tracking URI and experiment are used.
        parent_run_id: to continue; by default a new parent run is opened.
        under: run of which the new parent run is a child itself.
    """

    def __init__(self, config: Tracked, *, parent_run_id: str | None = None, under: str | None = None) -> None:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        self._parent_tag = MLFLOW_PARENT_RUN_ID
        self._client = open_tracking(config)
        self.experiment_id = self._experiment(config)
        if parent_run_id is None:
            tags = {} if under is None else {self._parent_tag: under}
            made = self._client.create_run(self.experiment_id, run_name=config.name, tags=tags)
            parent_run_id = made.info.run_id
            self._log_parameters(parent_run_id, _flat(config.model_dump(mode="json")))
            self._client.log_dict(parent_run_id, config.model_dump(mode="json"), "config.json")
        self.parent_run_id = str(parent_run_id)

    def stage(self, name: str, *, tags: dict[str, str]) -> Callable[[StageResult, Path], str]:
        """Return the function that logs a stage's result as a child run and gives its id."""

        def log(result: StageResult, folder: Path) -> str:
            from mlflow.entities import Metric

            run_id = self._client.create_run(
                self.experiment_id, run_name=name, tags={self._parent_tag: self.parent_run_id, **tags}
            ).info.run_id
            status = "FAILED"
            try:
                self._log_parameters(run_id, {key: str(value) for key, value in result.parameters.items()})
                now = int(1000 * time.time())
                metrics = [Metric(_named(key), value, now, step) for key, value, step in result.metrics]
                for start in range(0, len(metrics), 1000):
                    self._client.log_batch(run_id, metrics=metrics[start : start + 1000])
                for path in sorted(folder.iterdir()):
                    if path.is_dir() and path.name != "model":  # the merged base stays on disk
                        self._client.log_artifacts(run_id, str(path), path.name)
                    elif path.is_file():
                        self._client.log_artifact(run_id, str(path), "plots" if path.suffix == ".png" else None)
                for key, line in result.summary.items():
                    self._client.set_tag(run_id, f"summary.{key}", line[:MAX_PARAMETER])
                status = "FINISHED"
            finally:
                self._client.set_terminated(run_id, status)
            return str(run_id)

        return log

    def reused(self, record: StageRecord) -> None:
        """Note on the parent which earlier run made a stage's artifacts."""
        self._client.set_tag(self.parent_run_id, f"stage.{record.stage}.reused_from", record.mlflow_run_id or "unknown")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the parent run."""
        self._client.set_terminated(self.parent_run_id, "FINISHED" if error is None else "FAILED")

    def _experiment(self, config: Tracked) -> str:
        existing = self._client.get_experiment_by_name(config.tracking.experiment)
        if existing is not None:
            return str(existing.experiment_id)
        location = None
        if config.tracking.uri is None:
            location = (Path(config.output_root).absolute() / "mlartifacts").as_uri()
        return str(self._client.create_experiment(config.tracking.experiment, artifact_location=location))

    def _log_parameters(self, run_id: str, values: dict[str, str]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(run_id, params=[Param(key, value[:MAX_PARAMETER]) for key, value in values.items()])


def _named(metric: str) -> str:
    """Return a name that MLflow takes: tasks are called after folders, which may hold anything."""
    return re.sub(r"[^\w.\- :/]", "_", metric, flags=re.ASCII)


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
