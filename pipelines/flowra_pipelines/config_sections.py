"""The sections of a run's configuration: every key, its values, its default, and what it means.

Imports no library package, so that ``--help`` stays fast; a test compares the defaults with the packages' own.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flowra_pipelines.merge_rules import MERGE_RULES, OPTIONS, RuleName

__all__ = [
    "POLICY_KEYS",
    "AdapterConfig",
    "AllocationConfig",
    "CalibrationConfig",
    "DataConfig",
    "EvaluationConfig",
    "MergeConfig",
    "MergeRuleConfig",
    "ModelConfig",
    "RefinementConfig",
    "Section",
    "TrackingConfig",
    "TrainingConfig",
    "ValidationConfig",
]

TRIPLET_POLICIES = frozenset({"flexlora", "flexlora_compat", "adalora"})
"""Policies whose updates are B diag(E) A; those of the others are B A."""
KEEP_FLOORS = ("none", "breathe", "shrink")
"""Policies under which no module falls below its least rank, or leaves the one that it was given."""
TRIPLET_KEYS = frozenset({"start", "freeze", "interval", "back_end", "orthogonality"})
POLICY_KEYS: Mapping[str, frozenset[str]] = {
    "none": frozenset({"start"}),
    "breathe": frozenset({"start", "freeze", "events", "observe", "share"}),
    "shrink": frozenset({"start", "freeze", "events", "observe", "measure", "kappa"}),
    "flexlora": TRIPLET_KEYS | {"b0", "decay", "metric", "moves", "initialisation", "share", "r_max"},
    "flexlora_compat": TRIPLET_KEYS | {"b0", "decay", "optimizer_reset"},
    "adalora": TRIPLET_KEYS | {"kappa"},
}
"""What counts with each policy; another key of ``refinement`` is refused."""
KAPPA: Mapping[str, float] = {"shrink": 2.0, "adalora": 1.5}
"""κ by default: the packages' own."""


class Section(BaseModel):
    """A part of the configuration: frozen, and no key is ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    """Which model, for which kind of task."""

    path: str
    """Folder, ``package://NAME/path`` inside an installed package (nothing is imported), or a Hub name."""
    task: Literal["sequence_classification", "regression", "causal_lm"] = "sequence_classification"
    """What the model is trained for: a class or a number for each text or pair, or the next token."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen base. Adapters are float32."""


class DataConfig(Section):
    """Where examples come from, and which columns they are in."""

    train: str
    """File (parquet, csv, json, jsonl, also compressed), ``package://NAME/path``, or a Hub name."""
    train_split: str = "train"
    """Split of a Hub data set to train on."""
    test: str | None = None
    """File or Hub name of the test examples; by default a part of ``train`` is held out."""
    test_split: str = "test"
    """Split of a Hub data set to test on; used only with ``test``."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share held out when there is no ``test``, chosen by the SHA-1 of the text: no seed, the same on every machine."""
    text: str = "text"
    """Column with the text."""
    text_pair: str | None = None
    """Column with a second text, for pairs."""
    label: str = "label"
    """Column with the class or, for ``regression``, the number; not used for ``causal_lm``."""
    labels: tuple[str, ...] | None = None
    """Classes to keep, in the order of their ids; rows with others are left out and counted. By default all, sorted."""
    drop_duplicates: bool = True
    """Leave out rows of ``train`` whose text has been seen; counted."""
    max_length: Annotated[int, Field(ge=2)] = 128
    """Tokens per example; longer texts are cut."""
    max_test_examples: Annotated[int, Field(ge=2)] | None = None
    """Use only the first so many test examples."""


class AdapterConfig(Section):
    """Which layers may carry rank."""

    targets: tuple[str, ...] = ("all-linear",)
    """Names, tails of names (``query``), shell patterns, or ``all-linear``; each must match."""
    exclude: tuple[str, ...] = ()
    """Taken out again; each must match. Heads are never adapted."""
    scaling: Annotated[float, Field(gt=0)] = 2.0
    """s of the update s · B A, the same at every rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the adapters' inputs, in training."""


class TrainingConfig(Section):
    """One schedule for the whole run; the stages share it."""

    steps: Annotated[int, Field(ge=10)] = 200
    """T: optimiser steps of the whole run, the probe's included."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples per micro-batch."""
    length_window: Annotated[int, Field(ge=1)] = 8
    """Micro-batches whose examples are sorted by length before they are cut, to save padding; 1 switches it off."""
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    """Micro-batches per optimiser step."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = 1e-3
    """Peak learning rate of adapters. ``auto``: what the curvature suggests, measured before the probe, at the price of
    about ninety passes over a batch."""
    head_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the head; by default that of the adapters. For ``regression`` that of its last layer is
    this times the standard deviation of the labels, so that their unit does not matter."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of T over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""


class CalibrationConfig(Section):
    """The short probe whose learned update is measured."""

    probe_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of T that the probe trains."""
    probe_factor: Annotated[float, Field(ge=1)] = 2.0
    """κ: the probe's uniform rank is ⌈κ · mean rank the budget allows⌉; κ is at least what a plan by flow spends
    (``refinement.kappa``), for it gives no module more rank than the probe."""
    examples: Annotated[int, Field(ge=8)] = 128
    """Training examples the statistics are taken on."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Examples per batch of statistics; standard errors come from the batches."""
    estimators: tuple[Literal["probe", "fisher", "gradient", "kfac_gradient", "magnitude", "snr"], ...] = (
        "probe",
        "fisher",
        "gradient",
        "magnitude",
    )
    """What is asked how much a unit of rank is worth in each module. ``probe`` decides and is always asked; the others
    are reported beside it. ``kfac_gradient`` costs several times as much as the rest together."""
    labels: Literal["data", "model"] = "data"
    """Whose labels ``fisher``, ``gradient`` and ``kfac_gradient`` take gradients at: those of the data (the empirical
    Fisher), or labels drawn from the model (the Fisher; its mean gradient is zero, so it needs ``fisher`` alone)."""
    activations: bool = True
    """Measure how many directions the inputs of each layer use."""
    report: bool = True
    """Write the profile as a page to look at, ``report.html``, too; ``flowra report`` does it later."""
    jacobian_examples: Annotated[int, Field(ge=0)] = 0
    """Examples on which the Jacobians of whole blocks are measured, ten or so times as dear as the rest; 0 for none."""


class ValidationConfig(Section):
    """What ``flowra calibrate --validate`` takes away to see whether the estimators are right."""

    examples: Annotated[int, Field(ge=8)] = 256
    """Held-out examples on which the loss is compared."""
    retrained: Annotated[int, Field(ge=0)] = 6
    """Modules that the probe is trained without, and that are trained alone; two trainings each."""


Rank = Annotated[int, Field(ge=0)]
Ranks = dict[str, Rank]


class AllocationConfig(Section):
    """How the budget is spent.

    Patterns are names of modules, tails of names (``query``), shell patterns, or ``q``, ``k``, ``v``, ``o``; commas
    between several. Each must match, and no two of one key may say different ranks of a module.
    """

    plan: Literal["flow", "uniform", "random", "q,v", "attention", "mlp", "all"] = "flow"
    """``flow``: where the probe gained. The others look at no data, to be compared with: ``uniform``, one rank
    everywhere and one more where the seed falls; ``random``, units drawn; or one rank on ``q,v``, ``attention``,
    ``mlp`` or ``all``."""
    solver: Literal["greedy", "exact"] = "greedy"
    """``greedy`` takes the unit of rank with the largest gain per parameter, again and again; ``exact`` finds the
    optimum, which is larger by at most one unit's gain, and not at all where costs are equal."""
    cap: Rank | None = None
    """Largest rank of a module, of the plan and while rank moves; by default what the policy allows."""
    caps: Ranks | None = None
    """Largest rank by pattern, such as ``{"q,v": 8}``; before ``cap``."""
    floor: Rank | None = None
    """Least rank of a module, also where ψ is below the threshold, as far as caps allow; of the plan and while rank
    moves. With ``refinement.policy`` ``none``, ``breathe`` or ``shrink``, as the next two."""
    floors: Ranks | None = None
    """Least rank by pattern; before ``floor``."""
    frozen: Ranks | None = None
    """Ranks by pattern that are given and stay, whatever else is said or measured."""
    rank_steps: Literal["vllm"] | Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None
    """``[4, 8, 16]``: every rank is one of these, or 0. ``vllm``: the largest rank is a size of vLLM's buffers, for a
    server pays for the largest everywhere."""

    @model_validator(mode="after")
    def _what_the_plan_reads(self) -> "AllocationConfig":
        """Check that no option is without effect."""
        for key in ("solver", "floor", "floors", "frozen", "rank_steps"):
            if self.plan != "flow" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"allocation.{key} has no effect with allocation.plan {self.plan}")
        return self

    def __hash__(self) -> int:
        """Hash ranks by pattern, too, which are mappings."""
        return hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))


class RefinementConfig(Section):
    """Which policy moves rank between modules, and when."""

    policy: Literal["shrink", "breathe", "flexlora", "flexlora_compat", "adalora", "none"] = "shrink"
    """``shrink`` and ``adalora`` start above the budget and end inside it; ``breathe`` moves rank inside it;
    ``flexlora`` prunes and expands by entropy; ``flexlora_compat`` does as its published code; ``none`` trains on at
    the planned ranks."""
    start: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of T at which refinement begins; ``train`` runs from the probe's end to here."""
    freeze: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Share of T after which ranks stay."""
    events: Annotated[int, Field(ge=1)] = 4
    """Number of events from start to freeze; for ``breathe`` (at least 2, rank moves at all but the last) and
    ``shrink``."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Part of the budget that changes hands at an event of ``breathe``, or that the plan leaves free for ``flexlora``
    with ``moves`` expand."""
    observe: Annotated[int, Field(ge=1)] = 4
    """Steps before an event on which statistics are gathered, at most those since the event before; for ``breathe``,
    and ``shrink`` by flow."""
    measure: Literal["magnitude", "flow"] = "magnitude"
    """What a direction is worth: its norm, or the loss without it, by bottleneck Grams; for ``shrink``."""
    kappa: Annotated[float, Field(gt=1)] | None = None
    """κ: the plan spends κ times the budget, and rank falls from there; for ``shrink``, by default 2, and ``adalora``,
    by default 1.5."""
    interval: Annotated[int, Field(ge=1)] = 10
    """Steps between events; for ``flexlora``, ``flexlora_compat`` and ``adalora``."""
    b0: Annotated[int, Field(ge=1)] = 4
    """Modules that lose and gain a direction at the first event, fewer at later ones; for ``flexlora`` and
    ``flexlora_compat``."""
    decay: Literal["cubic", "constant"] = "cubic"
    """Whether their number falls to 0 or stays, as in the published launcher; for ``flexlora`` and
    ``flexlora_compat``."""
    r_max: Annotated[int, Field(ge=1)] | None = None
    """Largest rank of a module, by default four times the largest at the start; for ``flexlora`` that expands."""
    optimizer_reset: bool = False
    """Whether optimisers forget, at each event, all that they know, as the published code does where its guard lets it;
    for ``flexlora_compat``."""
    metric: Literal["entropy", "nuclear", "frobenius", "sensitivity", "elem_energy", "mat_energy"] = "entropy"
    """What modules are compared by; for ``flexlora``."""
    moves: Literal["both", "prune", "expand"] = "both"
    """What an event does; for ``flexlora``."""
    initialisation: Literal["zero_impact", "small", "zero", "orthogonal"] = "zero_impact"
    """What new directions are; for ``flexlora`` that expands."""
    back_end: Literal["resized", "masked"] = "resized"
    """``resized`` makes tensors anew, so that memory falls with the rank; ``masked`` keeps their shapes and masks what
    has left, until ranks are frozen; for ``flexlora``, ``flexlora_compat`` and ``adalora``."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the penalty that keeps directions near orthonormal; for ``flexlora``, ``flexlora_compat`` and
    ``adalora``. 0 switches it off."""

    @model_validator(mode="after")
    def _options_of_the_policy(self) -> "RefinementConfig":
        """Check that no option is without effect."""
        unused = self.model_fields_set - POLICY_KEYS[self.policy] - {"policy"}
        for key in type(self).model_fields:
            if key in unused:
                raise ValueError(f"refinement.{key} has no effect with refinement.policy {self.policy}")
        for key, other, value in (
            ("observe", "measure", "magnitude"),
            ("initialisation", "moves", "prune"),
            ("r_max", "moves", "prune"),
            ("share", "moves", "prune"),
            ("share", "moves", "both"),
        ):
            if key in self.model_fields_set and self.policy != "breathe" and getattr(self, other) == value:
                raise ValueError(f"refinement.{key} has no effect with refinement.{other} {value}")
        return self

    @property
    def method(self) -> Literal["lora", "svd", "svd_masked"]:
        """Adapter method of the updates from ``train`` on: pairs, or triplets in one of their back ends."""
        if self.policy not in TRIPLET_POLICIES:
            return "lora"
        return "svd" if self.back_end == "resized" else "svd_masked"

    @property
    def penalty(self) -> float:
        """Weight of the penalty for directions that are not orthonormal; 0 for pairs, which need not be."""
        return 0.0 if self.method == "lora" else self.orthogonality

    @property
    def plan_factor(self) -> float:
        """What the plan spends, as a multiple of the budget."""
        if self.policy in KAPPA:
            return self.kappa or KAPPA[self.policy]
        return 1 - self.share if self.policy == "flexlora" and self.moves == "expand" else 1.0


class ExtraAdapter(Section):
    """Another adapter to merge with the trained one."""

    path: str
    """Folder, in PEFT's format or Flowra's own."""
    weight: float = 1.0
    """Factor of its update."""
    statistics: str | None = None
    """Folder that ``flowra statistics`` made of it; for rules that look at data (``flow``, ``regmean``, ``fisher``)."""


class MergeRuleConfig(Section):
    """How updates become one, and of which size."""

    rule: RuleName = "cat"
    """``cat`` adds the updates exactly, ``flow`` keeps what every task needs; ``flowra merge --help`` lists all. It is
    ``flow`` where nothing is said and statistics are there: with ``tasks``, or where every ``merge.extra`` has some."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the entries of each update that is kept; for ``ties``, ``magnitude_prune`` and ``dare_…``."""
    trim: Literal["global", "tensor"] | None = None
    """Whether the largest entries are those of a whole adapter or of each module; for ``ties`` and
    ``magnitude_prune``."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Of what is dropped by chance; for ``dare_…``."""
    common: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the directions that is taken from the sum; for ``iso_cts``."""
    shrinkage: Annotated[float, Field(ge=0, le=1)] | None = None
    """How far second moments are drawn to something simpler; for ``flow`` and ``regmean``."""
    examples: Annotated[int, Field(ge=8)] = 128
    """Inputs of a task that its statistics are measured on, without labels; for rules that look at data."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Largest rank of a module; by default all that the rule gives."""
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each module's squared norm to keep; by default all."""
    budget: str | int | None = None
    """Adapter parameters of the result, as in ``budget`` of the run: the rank of each module follows."""

    @property
    def needs(self) -> tuple[str, ...]:
        """What the rule must know of every task."""
        return MERGE_RULES[self.rule].needs

    @model_validator(mode="after")
    def _options_of_the_rule(self) -> "MergeRuleConfig":
        """Check that no option is without effect, and that none is missing."""
        row, where = MERGE_RULES[self.rule], f"with merge.rule {self.rule}"
        for key in OPTIONS:
            if getattr(self, key) is not None and key not in row.options:
                raise ValueError(f"merge.{key} has no effect {where}; it takes {', '.join(row.options) or 'no option'}")
        if self.examples != type(self).model_fields["examples"].default and not row.needs:
            raise ValueError(f"merge.examples has no effect {where}, which looks at no data")
        shaping = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if self.rule == "cat" and shaping:
            raise ValueError(f"merge.{shaping[0]} has no effect with merge.rule cat; set merge.rule: truncated_svd")
        if row.truncates and not shaping:
            raise ValueError(f"merge.rank, merge.energy or merge.budget must be given {where}")
        return self


class TaskMergeConfig(MergeRuleConfig):
    """How the updates of several tasks become one: statistics of all are there."""

    rule: RuleName = "flow"
    """``flow`` keeps what every task needs, ``cat`` adds the updates exactly; ``flowra merge --help`` lists all."""


class MergeConfig(MergeRuleConfig):
    """What the trained adapter is merged with, by which rule, and how strictly the result is checked."""

    extra: tuple[ExtraAdapter, ...] = ()
    """More adapters on the same base, to be merged with the trained one."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-4
    """Largest allowed difference between merged and unmerged logits, relative to the largest logit."""
    save_model: bool = True
    """Write the merged model, too (as large as the base)."""

    @model_validator(mode="before")
    @classmethod
    def _rule_for_statistics(cls, given: object) -> object:
        """Take the default rule of statistics, where all others bring some and no rule is said."""
        extras = given.get("extra") if isinstance(given, Mapping) else None
        if not isinstance(given, Mapping) or "rule" in given or not isinstance(extras, list | tuple) or not extras:
            return given
        known = [each.get("statistics") if isinstance(each, Mapping) else None for each in extras]
        return {**given, "rule": "flow"} if all(known) else given

    @model_validator(mode="after")
    def _statistics_of_extras(self) -> "MergeConfig":
        """Check that others bring what the rule looks at, and nothing else."""
        for index, each in enumerate(self.extra):
            key = f"merge.extra[{index}].statistics"
            if each.statistics is not None and not self.needs:
                raise ValueError(f"{key} has no effect with merge.rule {self.rule}, which looks at no data")
            if each.statistics is None and self.needs:
                raise ValueError(
                    f"{key} must be given with merge.rule {self.rule}, which looks at data; make it:"
                    f" flowra statistics {each.path} --data FILE --out FOLDER"
                )
        return self


class EvaluationConfig(Section):
    """What the adapter is compared with."""

    baselines: tuple[Literal["base", "uniform"], ...] = ("base", "uniform")
    """``base``: frozen base, trained head. ``uniform``: LoRA at the largest uniform rank that fits the budget."""
    uniform_targets: tuple[str, ...] | None = None
    """Layers of the uniform baseline: names, patterns, or ``q``, ``k``, ``v``, ``o``; by default query and value."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Examples per batch."""
    significance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Level of the paired test below which a difference is called one."""


class TrackingConfig(Section):
    """Where runs are logged."""

    uri: str | None = None
    """MLflow tracking URI; by default a sqlite file in ``output_root``."""
    experiment: str = "flowra"
    """MLflow experiment."""
