"""A run that cannot go on says so in one line, exits with 2, and leaves nothing half-written."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from flowra_adapters import attach, save_adapter
from flowra_pipelines.cli import main
from flowra_pipelines.config_sections import KEEP_FLOORS
from flowra_pipelines.errors import UserError, explain
from flowra_pipelines.progress import console
from flowra_testing.tiny_models import bert_classifier, seeded
from flowra_testing.tiny_runs import tiny_config, write_tiny_bert

Command = Callable[..., str]
QUICK = {"steps": 10, "batch_size": 4}


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command on a tiny configuration, check how it failed, and return its one line."""
    torch.set_num_threads(1)

    def run(command: str, *options: str, **sections: Any) -> str:  # noqa: ANN401 - sections of a YAML file
        path = tmp_path / "run.yaml"
        content = tiny_config(tmp_path, training=QUICK)
        for name, value in sections.items():
            content[name] = {**content[name], **value} if isinstance(value, dict) and name in content else value
        path.write_text(yaml.safe_dump(content))
        monkeypatch.setattr(sys, "argv", ["flowra", command, str(path), *options])
        monkeypatch.setattr(console, "file", sys.stdout)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("flowra: ")
        assert message.count("\n") == 1
        assert not list(tmp_path.rglob("*.partial"))
        return message

    return run


def test_a_pattern_that_matches_nothing(fails: Command, tmp_path: Path) -> None:
    message = fails("calibrate", adapter={"targets": ["querry"]})
    assert "must match at least one module, got 'querry'. Nearest names: query" in message
    assert not (tmp_path / "runs" / "tiny" / "calibrate").exists()


def test_a_budget_below_one_unit_of_rank(fails: Command) -> None:
    assert "budget must pay for at least one unit of rank, 64 parameters here, got 63" in fails("calibrate", budget=63)


@pytest.mark.parametrize(
    "said", [{"floor": 2}, {"floors": {"query": 9}}, {"frozen": {"query,value": 6}}, {"floor": 3, "cap": 2}], ids=str
)
@pytest.mark.parametrize("policy", KEEP_FLOORS)
def test_least_ranks_above_the_budget_before_anything_is_trained(
    fails: Command, tmp_path: Path, policy: str, said: dict[str, Any]
) -> None:
    few = "" if policy == "none" else ", events: 2"
    message = fails("calibrate", "--set", f"refinement={{policy: {policy}{few}}}", allocation=said)
    assert "allocation.floors and frozen must fit the budget, 700 parameters here, got" in message
    assert not (tmp_path / "runs" / "tiny" / "calibrate").exists()


def test_a_budget_like_layers_that_are_not_there(fails: Command) -> None:
    message = fails("run", "--dry-run", budget="like r=1 on q_proj")
    assert "must match at least one module, got 'q_proj'" in message


def test_a_model_folder_without_weights(fails: Command, tmp_path: Path) -> None:
    BertConfig(hidden_size=32).save_pretrained(tmp_path / "empty")
    assert "model must be a folder with *.safetensors weights" in fails(
        "calibrate", model={"path": str(tmp_path / "empty")}
    )


def test_weights_that_are_damaged(fails: Command, tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model must load as sequence_classification" in fails("calibrate", model={"path": str(folder)})


def test_a_loss_that_is_not_finite(fails: Command) -> None:
    message = fails("calibrate", training={"learning_rate": 1e30})
    assert "loss must be finite" in message
    assert "Lower training.learning_rate" in message


def test_an_adapter_of_another_base(fails: Command, tmp_path: Path, finished: Path) -> None:
    other = bert_classifier(num_labels=2)
    attach(other, {"query": 1}, modules_to_save=["classifier"])
    save_adapter(other, tmp_path / "other", modules_to_save=["classifier"])
    message = fails("merge", output_root=str(finished), merge={"extra": [{"path": str(tmp_path / "other")}]})
    assert "merge" in message
    assert "(16, 16)" in message
    assert "other" in message


def test_artifacts_of_another_base_are_refused_even_if_they_fit(fails: Command, tmp_path: Path, finished: Path) -> None:
    twin = write_tiny_bert(tmp_path / "twin")
    with seeded(7):
        BertModel(BertConfig.from_pretrained(twin)).save_pretrained(twin)
    message = fails("train", output_root=str(finished), model={"path": str(twin)})
    assert "train needs artifacts of calibrate for this base, data and configuration, got others" in message
    assert "Run `flowra calibrate`" in message


def test_a_place_that_cannot_be_written_to(fails: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "folder must be one that can be written to" in fails("calibrate", output_root=str(tmp_path / "file"))


def test_a_stage_whose_forerunners_have_not_run_leaves_nothing(fails: Command, tmp_path: Path) -> None:
    assert "train needs the artifacts of calibrate, got none" in fails("train")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run everything up to refine, and return the output root."""
    path = tmp_path / "first.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path, training=QUICK)))
    for stage in ("calibrate", "allocate", "train", "refine"):
        monkeypatch.setattr(sys, "argv", ["flowra", stage, str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    return tmp_path / "runs"


@pytest.mark.slow
@pytest.mark.parametrize("prefect", ["--prefect", "--no-prefect"])
def test_a_disk_that_is_full(tmp_path: Path, prefect: str) -> None:
    """The kernel refuses to write more than 12 MB into a file, which the merged model needs."""
    config = tiny_config(tmp_path, training=QUICK)
    with seeded(0):
        BertModel(
            BertConfig(
                vocab_size=120_000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            )
        ).save_pretrained(tmp_path / "bert")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    limit = 12_000_000
    done = subprocess.run(
        [sys.executable, "-m", "flowra_pipelines.cli", "run", str(path), prefect],
        env={**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("flowra: disk must have room for the artifacts, got ")
    assert (tmp_path / "runs" / "tiny" / "refine" / "stage.json").exists()
    assert not (tmp_path / "runs" / "tiny" / "merge").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_mistake_of_our_own_keeps_its_traceback() -> None:
    assert explain(KeyError("x")) is None


def test_what_a_user_can_put_right_is_found_under_what_it_caused() -> None:
    outer = RuntimeError("a task failed")
    outer.__cause__ = UserError("budget must be more")
    assert explain(outer) == "budget must be more"
