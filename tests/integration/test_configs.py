"""Run configurations that are shipped load as they stand."""

import re
from importlib.resources import files
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from flowra_pipelines.composition_config import load_composition
from flowra_pipelines.config_sections import ModelConfig
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import RunConfig, load_config

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = Path(str(files("flowra_pipelines").joinpath("configs", "demo.yaml")))
OF_SEVERAL_TASKS = EXAMPLES / "several_tasks.yaml"
OF_ONE_TASK = sorted(set(EXAMPLES.glob("*.yaml")) - {OF_SEVERAL_TASKS})
SHIPPED = [*OF_ONE_TASK, DEMO]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_configuration_loads(path: Path) -> None:
    assert load_config(path).name


def test_the_example_of_several_tasks_gives_each_what_is_common_and_what_is_its_own() -> None:
    config = load_composition(OF_SEVERAL_TASKS)
    steps = {name: task.run.training.steps for name, task in config.tasks.items()}
    assert steps == {"reviews": 200, "pairs": 400}
    assert {task.run.data.test_fraction for task in config.tasks.values()} == {0.2}
    assert config.merge.rule == "flow"


def test_every_task_has_an_example() -> None:
    tasks = {load_config(path).model.task for path in SHIPPED}
    assert tasks == set(get_args(ModelConfig.model_fields["task"].annotation))


def keys_by_section(path: Path) -> dict[str, set[str]]:
    """Collect the keys of each section, also those after a '#'; keys of the run itself are under ''."""
    found: dict[str, set[str]] = {"": set()}
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([a-z_0-9]+):", line):
            section = match[1]
            found[""].add(section)
        elif match := re.match(r"  (?:# )?([a-z_0-9]+):", line):
            found.setdefault(section, set()).add(match[1])
    return found


@pytest.mark.parametrize("path", OF_ONE_TASK, ids=lambda path: path.name)
def test_an_example_names_every_key_and_no_other(path: Path) -> None:
    expected = {"": set(RunConfig.model_fields)}
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            expected[name] = set(field.annotation.model_fields)
    assert keys_by_section(path) == expected


def test_a_misspelt_key_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"training.stepz must be a known key; nearest: steps"):
        load_config(EXAMPLES / "classification.yaml", ["training.stepz=400"])
