"""The configuration of a run: a frozen, validated tree of sections, and the rules between them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from flowra_pipelines.config_file import explained, read_content
from flowra_pipelines.config_sections import (
    KEEP_FLOORS,
    POLICY_KEYS,
    AdapterConfig,
    AllocationConfig,
    CalibrationConfig,
    DataConfig,
    EvaluationConfig,
    MergeConfig,
    ModelConfig,
    RefinementConfig,
    Section,
    TrackingConfig,
    TrainingConfig,
    ValidationConfig,
)
from flowra_pipelines.errors import UserError

__all__ = ["RunConfig", "load_config"]

SENSITIVITY_THRESHOLD = 0.05


class RunConfig(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name of the run; its artifacts lie in ``output_root/name``."""
    output_root: str = "runs"
    """Folder of all runs."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of initialisation, dropout and data order."""
    budget: str | int = "0.1%"
    """Adapter parameters, heads not counted: a percentage of the base's (``0.1%``), a number (``22713``, ``300k``), a
    size in float32 (``2MB``), ``like r=8 on q,v``, or ``same as PATH``: what the plan, adapter or run there has."""
    sensitivity_threshold: Annotated[float, Field(ge=0, lt=1)] = SENSITIVITY_THRESHOLD
    """η: modules with ψ below it get no rank. 0 switches it off. It is set aside where the others cannot exceed the
    budget and the policy of refinement starts above it."""
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    validation: ValidationConfig = ValidationConfig()
    allocation: AllocationConfig = AllocationConfig()
    refinement: RefinementConfig = RefinementConfig()
    merge: MergeConfig = MergeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _phases_in_order(self) -> "RunConfig":
        """Check that every phase of the schedule has at least one step, and no option is without effect."""
        probe, start, freeze = self.probe_steps, self.refinement_start, self.refinement_freeze
        moving = self.refinement.policy != "none"
        if not 0 < probe < start < (freeze if moving else self.training.steps) <= self.training.steps:
            raise ValueError(
                "phases must follow one another, got probe to step"
                f" {probe}, train to {start}, ranks frozen at {freeze} of {self.training.steps}"
            )
        if moving:
            _check_that_events_fire(self.refinement, freeze - start)
        if self.allocation.plan != "flow" and self.sensitivity_threshold != SENSITIVITY_THRESHOLD:
            raise ValueError(f"sensitivity_threshold has no effect with allocation.plan {self.allocation.plan}")
        keepers = {"rank_steps": ("none",)} | dict.fromkeys(("floor", "floors", "frozen"), KEEP_FLOORS)
        for key, policies in keepers.items():
            if self.refinement.policy not in policies and getattr(self.allocation, key) is not None:
                raise ValueError(
                    f"allocation.{key} must be left out with refinement.policy {self.refinement.policy}, which moves"
                    f" rank without regard to it; set refinement.policy: {' or '.join(policies)}"
                )
        if self.data.test is None and "test_split" in self.data.model_fields_set:
            raise ValueError("data.test_split has no effect without data.test")
        if self.data.test is not None and "test_fraction" in self.data.model_fields_set:
            raise ValueError("data.test_fraction has no effect with data.test")
        if self.calibration.labels == "model" and {"gradient", "kfac_gradient"} & set(self.calibration.estimators):
            raise ValueError(
                "calibration.estimators must be without gradient and kfac_gradient with calibration.labels model: the"
                " mean gradient at labels drawn from the model is zero"
            )
        if self.model.task == "regression" and "labels" in self.data.model_fields_set:
            raise ValueError("data.labels has no effect with regression: labels are numbers")
        if self.model.task == "causal_lm" and self.training.head_learning_rate is not None:
            raise ValueError("training.head_learning_rate has no effect with causal_lm: no head is trained")
        if self.evaluation.uniform_targets is not None and "uniform" not in self.evaluation.baselines:
            raise ValueError("evaluation.uniform_targets has no effect without uniform in evaluation.baselines")
        if self.model.task == "causal_lm" and {"label", "labels", "text_pair"} & self.data.model_fields_set:
            raise ValueError("data.label, data.labels and data.text_pair have no effect with causal_lm")
        return self

    @property
    def probe_factor(self) -> float:
        """κ of the probe: ``calibration.probe_factor``, or what a plan by flow spends, for it knows no other gains."""
        plans = self.refinement.plan_factor if self.allocation.plan == "flow" else 1.0
        return max(self.calibration.probe_factor, plans)

    @property
    def probe_steps(self) -> int:
        """Steps of the probe; ``train`` begins here."""
        return round(self.calibration.probe_fraction * self.training.steps)

    @property
    def refinement_start(self) -> int:
        """Step at which ``train`` hands over to ``refine``."""
        return round(self.refinement.start * self.training.steps)

    @property
    def refinement_freeze(self) -> int:
        """Step after which ranks stay."""
        return round(self.refinement.freeze * self.training.steps)

    @property
    def folder(self) -> Path:
        """Absolute folder of the run's artifacts."""
        return Path(self.output_root).absolute() / self.name

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking URI."""
        return self.tracking.uri or f"sqlite:///{Path(self.output_root).absolute() / 'mlflow.db'}"


def _check_that_events_fire(refinement: RefinementConfig, steps: int) -> None:
    """Refuse a schedule that has no room in the steps from start to freeze."""
    between = f"the {steps} steps from refinement.start to refinement.freeze"
    if "events" in POLICY_KEYS[refinement.policy]:
        if refinement.policy == "breathe" and refinement.events < 2:
            raise ValueError("refinement.events must be at least 2 with breathe, for the last admits nothing, got 1")
        if refinement.events > steps:
            raise ValueError(f"refinement.events must be at most {steps}, got {refinement.events}")
    elif "b0" in POLICY_KEYS[refinement.policy] and refinement.interval >= steps:
        raise ValueError(
            f"refinement.interval must be less than {between}, got {refinement.interval}: no event would fall there"
        )
    if "b0" in POLICY_KEYS[refinement.policy] and refinement.decay == "cubic":
        share = refinement.interval / steps
        if round(refinement.b0 * (1 - share**3)) < 1:  # docs/methods.md, section 7: it falls from event to event
            raise ValueError(
                f"refinement.b0 must be at least 1 after its decay at the first event, {refinement.interval} steps"
                f" into {between}, got {refinement.b0}. Raise it, or lower refinement.interval."
            )


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration and apply ``key=value`` overrides.

    Args:
        source: path of a YAML file, or its content.
        overrides: such as ``training.steps=400``; values are YAML.

    Returns:
        The validated configuration.

    Raises:
        UserError: if the file is unreadable, a key is unknown (the nearest name is given) or a value is out of range.
            All problems are reported at once.
    """
    where = "the configuration" if isinstance(source, Mapping) else str(source)
    try:
        return RunConfig.model_validate(read_content(source, overrides))
    except ValidationError as error:
        raise UserError(f"{explained(error, RunConfig)}; in {where}") from None
