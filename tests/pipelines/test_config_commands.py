"""`flowra config`: what it says is what the configuration does."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from pydantic import BaseModel

from flowra_pipelines.cli import main
from flowra_pipelines.composition_config import load_composition
from flowra_pipelines.config_commands import composition_schema, config_schema, keys, schema_text
from flowra_pipelines.config_sections import POLICY_KEYS, RefinementConfig
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import RunConfig, load_config

ROOT = Path(__file__).parents[2]
FORMATS = ROOT / "docs" / "formats"
DEMO = Path(str(files("flowra_pipelines").joinpath("configs", "demo.yaml")))
OF_SEVERAL_TASKS = ROOT / "examples" / "several_tasks.yaml"
SHIPPED = [*sorted({*(ROOT / "examples").glob("*.yaml")} - {OF_SEVERAL_TASKS}), DEMO]
MINIMAL: dict[str, Any] = {"name": "one", "model": {"path": "m"}, "data": {"train": "d.csv"}}
Run = Callable[..., str]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `flowra config` in this process and return what it prints, or its one line of complaint."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["flowra", "config", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        if not ended.value.code:
            assert not shown.err
            return shown.out
        assert ended.value.code == 2
        assert not shown.out
        assert shown.err.count("\n") == 1
        return shown.err

    return run


def leaves(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Collect the fields of sections and of lists of sections, by key."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        annotation = field.annotation
        item = get_args(annotation)[0] if get_origin(annotation) is tuple else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found |= leaves(annotation, f"{prefix}{name}.")
            continue
        found[prefix + name] = field
        if isinstance(item, type) and issubclass(item, BaseModel):
            found |= leaves(item, f"{prefix}{name}[].")
    return found


LEAVES = leaves(RunConfig)


# every key


def test_every_key_is_explained_with_its_value_and_its_text(config: Run) -> None:
    lines = config("explain").splitlines()
    for key, field in LEAVES.items():
        at = next(number for number, line in enumerate(lines) if line.startswith(f"  {key} = "))
        assert field.description
        assert lines[at + 1].strip() == " ".join(field.description.replace("``", "`").split())
    assert {each.name for each in keys(config_schema())} == LEAVES.keys()


@pytest.mark.parametrize("key", LEAVES)
def test_the_default_that_is_shown_is_the_one_that_is_used(key: str) -> None:
    shown = next(each for each in keys(config_schema()) if each.name == key)
    value: Any = load_config(MINIMAL).model_dump(mode="json")
    if LEAVES[key].is_required() or "[]" in key:
        return
    for part in key.split("."):
        value = value[part]
    assert shown.default == value


@pytest.mark.parametrize("key", LEAVES)
def test_every_bound_and_choice_is_in_what_is_shown(key: str, config: Run) -> None:
    shown = config("explain", key)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = re.findall(r"\b(ge|gt|le|lt)=([0-9.e+]+)", repr(LEAVES[key]))
    for bound, limit in bounds:
        assert f"{signs[bound]} {limit}" in shown
    for choice in re.findall(r"Literal\[(.*?)\]", repr(LEAVES[key])):
        assert f"one of {choice.replace(chr(39), '')}" in shown


def test_some_keys_have_bounds_and_some_have_choices() -> None:
    text = repr(LEAVES)
    assert len(re.findall(r"\b(?:ge|gt)=", text)) > 20
    assert text.count("Literal[") >= 5


# a section, a key, a file


def test_a_section_shows_its_keys_and_no_others(config: Run) -> None:
    shown = config("explain", "training")
    assert shown.startswith("training  One schedule for the whole run")
    assert set(re.findall(r"^  (\S+) = ", shown, flags=re.MULTILINE)) == {
        key for key in LEAVES if key.startswith("training.")
    }


def test_a_key_is_shown_in_full(config: Run) -> None:
    assert config("explain", "training.steps").splitlines() == [
        "training.steps",
        "  T: optimiser steps of the whole run, the probe's included.",
        "  values   whole number ≥ 10",
        "  default  200",
        "  in YAML  training: {steps: 200}",
        "  option   --set training.steps=200",
    ]


@pytest.mark.parametrize("key", [key for key, field in LEAVES.items() if not field.is_required() and "[]" not in key])
def test_the_yaml_and_the_option_of_a_key_give_its_default(key: str, config: Run) -> None:
    of_other_policies = {f"refinement.{each}" for each in RefinementConfig.model_fields} - {
        f"refinement.{each}" for each in (*POLICY_KEYS[RefinementConfig().policy], "policy")
    } | {"refinement.observe"}  # by magnitude nothing is observed
    if key in {"data.test_split", "data.test_fraction"} | of_other_policies:
        return  # without effect beside the minimum
    lines = {line[2:11].strip(): line[11:] for line in config("explain", key).splitlines()}
    given = {
        name: {**MINIMAL.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in yaml.safe_load(lines["in YAML"]).items()
    }
    (override,) = shlex.split(lines["option"])[1:]
    expected = load_config(MINIMAL).model_dump()
    assert load_config({**MINIMAL, **given}).model_dump() == load_config(MINIMAL, [override]).model_dump() == expected


@pytest.mark.parametrize(
    ("key", "near"), [("training.stepz", "training.steps"), ("trainig", "training"), ("steps", "training.steps")]
)
def test_an_unknown_key_is_one_line_with_the_nearest_name(key: str, near: str, config: Run) -> None:
    message = config("explain", key)
    assert message == f"flowra: key must be a section or a key of the configuration, got {key!r}; nearest: {near}\n"


def test_a_file_s_values_stand_beside_the_defaults_with_where_they_come_from(config: Run, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("name: a\nmodel: {path: m}\ndata: {train: d.csv}\ntraining: {steps: 400, warmup: 0.2}\n")
    shown = config("explain", "--file", str(path), "--set", "training.warmup=0.3", "--set", "merge={tolerance: 0.5}")
    for line in (
        "  name = a  from file, default none, it must be given  (text matching ^[A-Za-z0-9][A-Za-z0-9_.-]*$)",
        "  seed = 0  default  (whole number ≥ 0, < 2147483648)",
        "  training.steps = 400  from file, default 200  (whole number ≥ 10)",
        "  training.warmup = 0.3  from --set, default 0.1  (number ≥ 0, < 1)",
        "  training.batch_size = 32  default  (whole number ≥ 1)",
        "  merge.tolerance = 0.5  from --set, default 0.0001  (number > 0)",
    ):
        assert line in shown.splitlines()
    assert "  in force 400, from file" in config("explain", "training.steps", "--file", str(path))


def test_a_file_that_is_wrong_is_refused_as_by_a_run(config: Run, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("name: a\nmodel: {path: m}\ndata: {train: d.csv}\ntraining: {stepz: 400}\n")
    assert "training.stepz must be a known key; nearest: steps" in config("explain", "--file", str(path))
    assert "--set must come with --file, got 'seed=1' alone" in config("explain", "--set", "seed=1")


# the schema


@pytest.mark.parametrize(
    ("file", "made", "options"),
    [
        ("run_config.schema.json", config_schema, ()),
        ("composition_config.schema.json", composition_schema, ("--tasks",)),
    ],
    ids=["run", "tasks"],
)
def test_the_committed_schema_is_the_one_that_is_printed(
    file: str, made: Callable[[], dict[str, Any]], options: tuple[str, ...], config: Run, tmp_path: Path
) -> None:
    expected = (FORMATS / file).read_text(encoding="utf-8")
    assert config("schema", *options) == schema_text(made()) == expected, (
        f"run: flowra config schema {' '.join(options)} --output docs/formats/{file}"
    )
    config("schema", *options, "--output", str(tmp_path / "schema.json"))
    assert (tmp_path / "schema.json").read_text(encoding="utf-8") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["schema.json"]


def test_an_output_that_cannot_be_written_is_one_line(config: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = config("schema", "--output", str(tmp_path / "file" / "schema.json"))
    assert "output must be a file that can be written, got" in message


@pytest.mark.parametrize("made", [config_schema, composition_schema], ids=["run", "tasks"])
def test_the_schema_is_a_schema_that_describes_every_key(made: Callable[[], dict[str, Any]]) -> None:
    schema = made()
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        assert section["description"]
        assert all("\n" not in node.get("description", "") for node in section["properties"].values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_schema_takes_every_shipped_configuration(path: Path) -> None:
    Draft202012Validator(config_schema()).validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_schema_of_several_tasks_takes_the_shipped_one_and_refuses_what_a_run_of_it_refuses() -> None:
    judge = Draft202012Validator(composition_schema())
    shipped = yaml.safe_load(OF_SEVERAL_TASKS.read_text(encoding="utf-8"))
    judge.validate(shipped)
    one = {"data": {"train": "d.csv"}}
    changes: tuple[dict[str, Any], ...] = (
        {"trainig": {}},
        {"training": {"stepz": 1}},
        {"parallel": 0},
        {"merge": {"save_model": True}},
        {"tasks": {}},
        {"tasks": {"a": {**one, "wieght": 1}}},
        {"tasks": {"a": {**one, "training": {"steps": 9}}}},
        {"tasks": {"a": {**one, "merge": {"rule": "ties"}}}},
    )
    for change in changes:
        with pytest.raises(ValidationError):
            judge.validate({**shipped, **change})
        with pytest.raises(UserError):
            load_composition({**shipped, **change})


def test_explaining_a_file_of_several_tasks_says_what_shows_them(config: Run) -> None:
    message = config("explain", "--file", str(OF_SEVERAL_TASKS))
    assert "file must be the configuration of one run, got several tasks" in message
    assert "--dry-run" in message


@pytest.mark.parametrize(
    "change",
    [
        {"trainig": {}},
        {"training": {"stepz": 1}},
        {"merge": {"extra": [{"path": "a", "wieght": 1}]}},
        {"training": {"steps": 9}},
        {"training": {"schedule": "liner"}},
        {"training": {"warmup": 1}},
        {"model": {"path": "m", "task": "regresion"}},
        {"data": {}},
        {"name": "../up"},
        {"seed": "zero"},
        {"evaluation": {"baselines": ["unifrom"]}},
    ],
    ids=str,
)
def test_the_schema_and_the_run_refuse_the_same(change: dict[str, Any]) -> None:
    wrong = {**MINIMAL, **change}
    with pytest.raises(ValidationError):
        Draft202012Validator(config_schema()).validate(wrong)
    with pytest.raises(ValueError, match=next(iter(change))):
        load_config(wrong)


# quick and plain


def test_explaining_imports_only_what_is_light() -> None:
    program = "import sys\nfrom flowra_pipelines.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
    program += "import json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    for command in ("explain", "schema"):
        done = subprocess.run(
            [sys.executable, "-c", program, "config", command], capture_output=True, text=True, check=True, timeout=60
        )
        found = set(json.loads(done.stdout.splitlines()[-1]))
        assert {"pydantic", "typer"} <= found
        assert not found & {
            "torch", "transformers", "datasets", "prefect", "mlflow", "numpy", "scipy", "pandas", "matplotlib",
            "flowra_adapters", "flowra_allocation", "flowra_analysis", "flowra_compose",
        }  # fmt: skip


def test_piped_output_is_plain_and_one_line_for_each_text(config: Run) -> None:
    shown = config("explain")
    assert "\x1b" not in shown
    assert (
        len(shown.splitlines())
        == 2 * len(LEAVES)
        + 2 * sum(hasattr(field.annotation, "model_fields") for field in RunConfig.model_fields.values())
        + 1
    )


def test_a_terminal_gets_colours_and_wrapped_texts(monkeypatch: pytest.MonkeyPatch, config: Run) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    shown = config("explain", "data")
    assert "\x1b[" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert all(len(line) <= 60 for line in plain.splitlines() if line.startswith("      "))
    assert not any(line.endswith(" ") for line in plain.splitlines())
    assert max(len(line) for line in plain.splitlines() if line.startswith("      ")) > 50
