"""The configuration of several tasks, trained apart and composed: one run's keys, and ``tasks`` with what differs.

Each task is a run of its own: what is said at the top counts for all of them, and what a task says comes before it.
Imports no library package, so that ``--help`` stays fast.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from flowra_pipelines.config_file import explained, read_content
from flowra_pipelines.config_sections import Section, TaskMergeConfig, TrackingConfig
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import RunConfig, load_config

__all__ = ["CompositionConfig", "is_composition", "load_composition"]


class ComposedTask(Section):
    """One of the tasks."""

    weight: float = 1.0
    """Factor of its update in the merge; 0 leaves it out."""
    run: RunConfig
    """Its run, what is common included."""


class CompositionConfig(Section):
    """Tasks on one base that are trained apart, merged, and evaluated on the merged update, each with its own head."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name of the whole; its artifacts lie in ``output_root/name``, those of a task in ``tasks/TASK`` there."""
    output_root: str = "runs"
    """Folder of all runs."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the inputs and labels that statistics are measured with; and of every run, unless its task says another."""
    parallel: Annotated[int, Field(ge=1)] = 1
    """Tasks that are trained at the same time, each in a process of its own; 1 trains one after another in this one."""
    merge: TaskMergeConfig = TaskMergeConfig()
    """How they become one: rule, its options, and the size of the result."""
    tracking: TrackingConfig = TrackingConfig()
    """Where MLflow logs."""
    tasks: Annotated[dict[str, ComposedTask], Field(min_length=1)]
    """Name to task, in this order."""

    @property
    def folder(self) -> Path:
        """Absolute folder of the artifacts."""
        return Path(self.output_root).absolute() / self.name

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking URI."""
        return self.tracking.uri or f"sqlite:///{Path(self.output_root).absolute() / 'mlflow.db'}"


OWN = ("parallel", "merge")
"""Keys at the top that are the composition's alone."""
HERE = ("name", "output_root", "tracking", "merge")
"""Keys of a run that a task cannot say."""


def is_composition(path: Path) -> bool:
    """Tell whether a YAML file is about several tasks."""
    return "tasks" in read_content(path)


def load_composition(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> CompositionConfig:
    """Read a configuration of several tasks and apply ``key=value`` overrides.

    Args:
        source: path of a YAML file, or its content.
        overrides: such as ``training.steps=400`` or ``tasks.sst2.budget=300k``; values are YAML.

    Returns:
        The validated configuration.

    Raises:
        UserError: if the file is unreadable, or a key is unknown, missing or out of range; for a key of a task the
            message says of which.
    """
    where = "the configuration" if isinstance(source, Mapping) else str(source)
    content = read_content(source, overrides)
    tasks = content.get("tasks")
    if not isinstance(tasks, dict) or not tasks or not all(isinstance(each, dict) for each in tasks.values()):
        raise UserError(f"tasks must be sections by name, at least one, each with its `data`; in {where}")
    mine = {key: content[key] for key in CompositionConfig.model_fields.keys() & content.keys() - {"tasks"}}
    common = {key: value for key, value in content.items() if key not in (*HERE, *OWN, "tasks")}
    try:
        whole = CompositionConfig.model_validate({**mine, "tasks": {"none": {"run": _stand_in()}}})
    except ValidationError as error:
        raise UserError(f"{explained(error, CompositionConfig)}; in {where}") from None
    made = {}
    for name, section in tasks.items():
        for key in HERE:
            if key in section:
                raise UserError(f"tasks.{name}.{key} must be left out: it is said once, at the top; in {where}")
        own = {key: value for key, value in section.items() if key != "weight"}
        run = {
            **_joined(common, own),
            "name": name,
            "output_root": str(whole.folder / "tasks"),
            "tracking": {"uri": whole.tracking_uri, "experiment": whole.tracking.experiment},
            "merge": {"save_model": False},
        }
        try:
            made[name] = ComposedTask(weight=section.get("weight", 1.0), run=load_config(run))
        except (UserError, ValidationError) as error:
            said = explained(error, ComposedTask) if isinstance(error, ValidationError) else str(error)
            raise UserError(f"tasks.{name}: {said.removesuffix('; in the configuration')}; in {where}") from None
    bases = {each.run.model.path for each in made.values()}
    if len(bases) > 1:
        raise UserError(f"tasks must have one base, got {sorted(bases)}; in {where}")
    if not any(each.weight for each in made.values()):
        raise UserError(f"tasks must have a weight other than 0, got none; in {where}")
    return whole.model_copy(update={"tasks": made})


def _joined(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Put what a task says before what is common, section by section."""
    joined = dict(common)
    for key, value in own.items():
        known = joined.get(key)
        joined[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return joined


def _stand_in() -> dict[str, Any]:
    return {"name": "none", "model": {"path": "none"}, "data": {"train": "none"}}
