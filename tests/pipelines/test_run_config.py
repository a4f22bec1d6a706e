import inspect
from pathlib import Path
from typing import Any

import pytest

from flowra_adapters import attach
from flowra_allocation import RefinementSchedule, allocate
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import AdapterConfig, RefinementConfig, RunConfig, load_config

MINIMAL: dict[str, Any] = {"name": "one", "model": {"path": "m"}, "data": {"train": "d.csv"}}


def test_every_choice_is_a_word_that_yaml_reads_as_text() -> None:
    for key, choices in {
        "refinement.policy": ("breathe", "none"),
        "training.schedule": ("linear", "cosine", "constant"),
        "model.task": ("sequence_classification", "causal_lm"),
    }.items():
        for choice in choices:
            section, name = key.split(".")
            assert getattr(getattr(load_config(MINIMAL, [f"{key}={choice}"]), section), name) == choice


def test_a_minimal_configuration_is_enough() -> None:
    config = load_config(MINIMAL)
    assert config.budget == "0.1%"
    assert (config.probe_steps, config.refinement_start, config.refinement_freeze) == (40, 80, 140)


def test_defaults_are_those_of_the_packages() -> None:
    refinement = RefinementConfig()
    schedule = RefinementSchedule(start=0, freeze=100)
    assert (refinement.events, refinement.share, refinement.observe) == (
        schedule.events,
        schedule.share,
        schedule.observe,
    )
    assert inspect.signature(allocate).parameters["sensitivity_threshold"].default == (
        RunConfig.model_fields["sensitivity_threshold"].default
    )
    for function in (attach, allocate):
        assert inspect.signature(function).parameters["scaling"].default == AdapterConfig().scaling


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainig.steps=5", r"trainig must be a known key; nearest: training"),
        ("training.stepz=5", r"training\.stepz must be a known key; nearest: steps; known here: steps, batch_size"),
        ("training.steps=three", r"training\.steps: input should be a valid integer.*got 'three'"),
        ("training.steps=1", r"training\.steps: input should be greater than or equal to 10, got 1"),
        ("calibration.probe_fraction=0.5", r"phases must follow one another, got probe to step 100, train to 80"),
        ("refinement.events=1000", r"refinement\.events must be at most 60, got 1000"),
        ("data.test_split=dev", r"data\.test_split has no effect without data\.test"),
        ("name=../up", r"name: string should match pattern"),
        ("training", r"override must be key=value, got 'training'"),
        ("name.x=1", r"override must name a section, got 'name\.x': 'name' is a value"),
        ("merge.extra=[{path: a, wieght: 1}]", r"wieght must be a known key; nearest: weight"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(MINIMAL, [override])
    assert "\n" not in str(caught.value)


def test_options_without_effect_are_refused() -> None:
    language = {**MINIMAL, "model": {"path": "m", "task": "causal_lm"}}
    with pytest.raises(UserError, match="have no effect with causal_lm"):
        load_config(language, ["data.label=category"])
    with pytest.raises(UserError, match=r"data\.test_fraction has no effect with data\.test"):
        load_config(MINIMAL, ["data.test=t.csv", "data.test_fraction=0.5"])


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(UserError, match=r"seed: .*; .*batch_size: ") as caught:
        load_config(MINIMAL, ["seed=-1", "training.batch_size=0"])
    assert "the configuration" in str(caught.value)


def test_a_file_that_is_not_a_mapping_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="configuration must be a readable file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="configuration must be a mapping of sections, got list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="configuration must be YAML"):
        load_config(tmp_path / "bad.yaml")


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: a\nmodel: {path: m}\ndata: {train: d.csv}\ntraining: {steps: 100}\n")
    config = load_config(tmp_path / "run.yaml", ["training.batch_size=4", "budget=0.5%", "adapter.targets=[query]"])
    assert (config.training.steps, config.training.batch_size) == (100, 4)
    assert config.budget == "0.5%"
    assert config.adapter.targets == ("query",)


def test_every_field_is_documented() -> None:
    def fields(section: type[Any], prefix: str = "") -> list[str]:
        missing = []
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                missing += fields(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                missing.append(prefix + name)
        return missing

    assert fields(RunConfig) == []
