"""What reaches MLflow."""

from pathlib import Path

from mlflow import MlflowClient

from flowra_pipelines.run_config import load_config
from flowra_pipelines.stages.record import StageResult
from flowra_pipelines.tracking import Tracker


def test_metrics_called_after_folders_are_logged_whatever_these_are_called(tmp_path: Path) -> None:
    content = {
        "name": "tiny",
        "output_root": str(tmp_path / "runs"),
        "model": {"path": "./model"},
        "data": {"train": "./reviews.csv"},
    }
    names = {"a+b (1)": "a_b _1_", "x=1@2": "x_1_2", "café": "caf_", "plain-1.5_a": "plain-1.5_a"}
    result = StageResult(metrics=[(f"interference/projection/{name}", 0.5, 0) for name in names])
    (tmp_path / "artifacts").mkdir()
    with Tracker(load_config(content)) as tracker:
        run = tracker.stage("merge", tags={})(result, tmp_path / "artifacts")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    logged = client.get_run(run)
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics == {f"interference/projection/{name}": 0.5 for name in names.values()}
