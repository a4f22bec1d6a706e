"""``flowra merge --track``: a merge of adapters as a run of MLflow, beside those of runs and compositions."""

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from flowra_compose.interference_files import write_interference
from flowra_pipelines.composition import Merged
from flowra_pipelines.config_sections import TrackingConfig
from flowra_pipelines.merge_job import MergeJob
from flowra_pipelines.report_interference import write_interference_page
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.tracking import Tracker

__all__ = ["track_merge"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _TrackedMerge:
    """What the tracker wants to know of a merge; it is logged where ``flowra ui`` looks without a configuration."""

    job: MergeJob

    @property
    def tracking(self) -> TrackingConfig:
        """The default experiment."""
        return TrackingConfig()

    @property
    def name(self) -> str:
        """The folder's."""
        return self.job.out.resolve().name

    @property
    def output_root(self) -> str:
        """Where runs are by default."""
        return str(RunConfig.model_fields["output_root"].default)

    @property
    def tracking_uri(self) -> str:
        """The database there."""
        return f"sqlite:///{Path(self.output_root).absolute() / 'mlflow.db'}"

    def model_dump(self, *, mode: Literal["json"]) -> dict[str, Any]:
        """Return what was asked for, but for what was left open."""
        asked = {key: value for key, value in asdict(self.job).items() if value not in (None, ())}
        return {
            key: list(map(str, value)) if isinstance(value, tuple) else _plain(value) for key, value in asked.items()
        }


def track_merge(job: MergeJob, done: Merged) -> str:
    """Log what a merge was asked for and what came out: metrics, advice, the report, its page and pictures.

    Args:
        job: what was asked for.
        done: what came out.

    Returns:
        The id of the run.
    """
    result = StageResult(
        metrics=[*done.metrics, ("merge/parameters", float(done.merged_parameters), 0)],
        parameters={"rule": done.rule, "why": done.why, "tasks": len(done.report.tasks)},
        summary=done.summary,
    )
    with TemporaryDirectory(prefix="flowra-") as folder, Tracker(_TrackedMerge(job=job)) as tracker:
        write_interference(done.report, folder)
        write_interference_page(done.report, Path(folder) / "interference.html", title=done.path.name)
        tracker.stage("merge", tags={})(result, Path(folder))
        return tracker.parent_run_id


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str | dict) else str(value)
