import inspect
from pathlib import Path
from typing import Any, get_args

import pytest
from torch import nn

from flowra_adapters import attach
from flowra_allocation import AdaLoRA, Breathe, FlexLoRA, FlexLoRASchedule, RefinementSchedule, Shrink, allocate
from flowra_pipelines.composition_config import load_composition
from flowra_pipelines.config_file import read_content
from flowra_pipelines.config_sections import KEEP_FLOORS, POLICY_KEYS, AdapterConfig, AllocationConfig, RefinementConfig
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.static_plans import STATIC

MINIMAL: dict[str, Any] = {"name": "one", "model": {"path": "m"}, "data": {"train": "d.csv"}}


def test_every_choice_is_a_word_that_yaml_reads_as_text() -> None:
    for key, choices in {
        "refinement.policy": ("breathe", "shrink", "flexlora", "flexlora_compat", "adalora", "none"),
        "training.schedule": ("linear", "cosine", "constant"),
        "model.task": ("sequence_classification", "regression", "causal_lm"),
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
    share = Breathe(schedule=schedule).share
    assert (refinement.events, refinement.share, refinement.observe) == (schedule.events, share, schedule.observe)
    shrink, flexlora = (
        Shrink(schedule=schedule),
        FlexLoRA(schedule=FlexLoRASchedule(total_steps=100, warmup=0, final=0, interval=10, b0=refinement.b0)),
    )
    assert refinement.measure == shrink.measure
    assert load_config(MINIMAL, ["refinement.policy=shrink"]).refinement.plan_factor == shrink.kappa
    adalora = AdaLoRA(total_steps=100, tinit=0, tfinal=0, delta_t=1)
    assert load_config(MINIMAL, ["refinement.policy=adalora"]).refinement.plan_factor == adalora.kappa
    for key in ("metric", "moves", "initialisation"):
        assert getattr(refinement, key) == getattr(flexlora, key)
    assert inspect.signature(allocate).parameters["sensitivity_threshold"].default == (
        RunConfig.model_fields["sensitivity_threshold"].default
    )
    assert inspect.signature(allocate).parameters["scaling"].default == AdapterConfig().scaling
    (attached,) = attach(nn.Sequential(nn.Linear(2, 2)), {"0": 1}).values()
    assert attached.scaling == AdapterConfig().scaling


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainig.steps=5", r"trainig must be a known key; nearest: training"),
        ("training.stepz=5", r"training\.stepz must be a known key; nearest: steps; known here: steps, batch_size"),
        ("training.steps=three", r"training\.steps must be a valid integer.*got 'three'"),
        ("training.steps=1", r"training\.steps must be greater than or equal to 10, got 1"),
        ("calibration.probe_fraction=0.5", r"phases must follow one another, got probe to step 100, train to 80"),
        ("refinement.events=1000", r"refinement\.events must be at most 60, got 1000"),
        ("refinement={policy: breathe, events: 1}", r"refinement\.events must be at least 2 with breathe, .* got 1"),
        ("refinement={policy: shrink, events: 61}", r"refinement\.events must be at most 60, got 61"),
        (
            "refinement={policy: flexlora, interval: 60}",
            r"refinement\.interval must be less than the 60 steps from refinement\.start to .*freeze, got 60",
        ),
        (
            "refinement={policy: flexlora, interval: 50, b0: 1}",
            r"refinement\.b0 must be at least 1 after its decay at the first event, 50 steps into the 60 .* got 1",
        ),
        ("refinement={policy: breathing}", r"refinement\.policy must be 'shrink', 'breathe', .* got 'breathing'"),
        ("data.test_split=dev", r"data\.test_split has no effect without data\.test"),
        ("name=../up", r"name must match pattern"),
        ("training", r"override must be key=value, got 'training'"),
        ("name.x=1", r"override must name a section, got 'name\.x': 'name' is a value"),
        ("merge.extra=[{path: a, wieght: 1}]", r"wieght must be a known key; nearest: weight"),
        ("training=", r"training must be a section of keys, got None"),
        ("training=fast", r"training must be a section of keys, got 'fast'"),
        ("evaluation.baselines=base", r"evaluation\.baselines must be a list, such as \[a, b\], got 'base'"),
        ("budget=0.001", r"^budget must be text or a whole number, got 0\.001; in the configuration$"),
        ("training.learning_rate=.inf", r"training\.learning_rate must be a number greater than 0, or auto, got inf"),
        ("training.schedule=liner", r"training\.schedule must be 'linear', 'cosine' or 'constant', got 'liner'"),
        (f"seed={'x' * 500}", r"seed must be a valid integer.*got 'x{76}\.\.\.; in"),
        ("1=2", r"1 must be a known key; nearest: \w+; known here: name, "),
        ("allocation.rank_steps=vlm", r"allocation\.rank_steps must be vllm, or ranks ≥ 1 such as .*, got 'vlm'; in"),
        ("allocation.rank_steps=[]", r"^allocation\.rank_steps must be vllm, or ranks ≥ 1 such as .*, got \[\]; in"),
        ("allocation.rank_steps=[4, 0]", r"^allocation\.rank_steps must be vllm, or ranks .*, got \[4, 0\]; in"),
        ("allocation.caps=8", r"allocation\.caps must be ranks by pattern, such as \{query: 8\}, got 8; in"),
        ("allocation.caps.query=-1", r"allocation\.caps\.query must be greater than or equal to 0, got -1; in"),
        ("allocation.plan=qv", r"allocation\.plan must be 'flow', 'uniform', .* got 'qv'"),
        ("model.task=regresion", r"model\.task must be 'sequence_classification', 'regression' or 'causal_lm', got"),
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
    number = {**MINIMAL, "model": {"path": "m", "task": "regression"}}
    with pytest.raises(UserError, match=r"data\.labels has no effect with regression: labels are numbers"):
        load_config(number, ["data.labels=[a, b]"])
    with pytest.raises(UserError, match=r"data\.test_fraction has no effect with data\.test"):
        load_config(MINIMAL, ["data.test=t.csv", "data.test_fraction=0.5"])


@pytest.mark.parametrize(
    ("refinement", "key"),
    [
        ({"policy": "none", "freeze": 0.8}, "freeze"),
        ({"policy": "breathe", "kappa": 2.0}, "kappa"),
        ({"policy": "breathe", "orthogonality": 0.1}, "orthogonality"),
        ({"policy": "shrink", "share": 0.1}, "share"),
        ({"policy": "adalora", "b0": 4}, "b0"),
        ({"policy": "adalora", "events": 4}, "events"),
        ({"policy": "flexlora", "kappa": 2.0}, "kappa"),
        ({"policy": "flexlora_compat", "metric": "entropy"}, "metric"),
    ],
)
def test_an_option_of_another_policy_is_refused(refinement: dict[str, Any], key: str) -> None:
    message = rf"refinement\.{key} has no effect with refinement\.policy {refinement['policy']}"
    with pytest.raises(UserError, match=message):
        load_config({**MINIMAL, "refinement": refinement})


@pytest.mark.parametrize("key", ["floor=1", "floors.query=1", "frozen.query=1", "rank_steps=vllm"])
def test_what_policies_do_not_keep_to_needs_ranks_that_stay(key: str) -> None:
    name = key.partition("=")[0].partition(".")[0]
    keepers = ("none",) if name == "rank_steps" else KEEP_FLOORS
    for policy in sorted(POLICY_KEYS.keys() - set(keepers)):
        wanted = (
            rf"allocation\.{name} must be left out with refinement\.policy {policy},"
            rf" .*set refinement\.policy: {' or '.join(keepers)};"
        )
        with pytest.raises(UserError, match=wanted):
            load_config(MINIMAL, [f"allocation.{key}", f"refinement.policy={policy}"])
        load_config(MINIMAL, ["allocation.cap=4", "allocation.caps={query: 2}", f"refinement.policy={policy}"])
    for policy in keepers:
        found = load_config(MINIMAL, [f"allocation.{key}", f"refinement.policy={policy}"])
        assert getattr(found.allocation, name) is not None
    with pytest.raises(UserError, match=rf"allocation\.{name} has no effect with allocation\.plan uniform"):
        load_config(MINIMAL, [f"allocation.{key}", "refinement.policy=none", "allocation.plan=uniform"])


def test_a_static_plan_reads_neither_solver_nor_threshold() -> None:
    with pytest.raises(UserError, match=r"allocation\.solver has no effect with allocation\.plan random"):
        load_config(MINIMAL, ["allocation={plan: random, solver: exact}"])
    with pytest.raises(UserError, match=r"^sensitivity_threshold has no effect with allocation\.plan q,v"):
        load_config(MINIMAL, ["allocation={plan: 'q,v'}", "sensitivity_threshold=0.1"])
    written_out = ["allocation={plan: mlp, solver: greedy, cap: 2}", "sensitivity_threshold=0.05"]
    assert load_config(MINIMAL, written_out).allocation.cap == 2  # so a baseline is a --set on any configuration


def test_static_plans_are_those_of_what_if() -> None:
    assert get_args(AllocationConfig.model_fields["plan"].annotation) == ("flow", *STATIC)


def test_a_configuration_with_ranks_by_pattern_can_be_remembered() -> None:
    first, second = (load_config(MINIMAL, [f"allocation.caps={caps}"]) for caps in ("{q: 1, k: 2}", "{k: 2, q: 1}"))
    assert first == second
    assert hash(first) == hash(second)


def test_options_of_one_policy_switch_each_other_off() -> None:
    shrink = {**MINIMAL, "refinement": {"policy": "shrink", "measure": "magnitude", "observe": 2}}
    with pytest.raises(UserError, match=r"refinement\.observe has no effect with refinement\.measure magnitude"):
        load_config(shrink)
    with pytest.raises(UserError, match=r"refinement\.share has no effect with refinement\.moves both"):
        load_config({**MINIMAL, "refinement": {"policy": "flexlora", "share": 0.2}})


def test_ranks_that_stay_need_no_freeze() -> None:
    config = load_config({**MINIMAL, "refinement": {"policy": "none", "start": 0.9}})
    assert config.refinement_start == 180


@pytest.mark.parametrize(
    ("refinement", "method", "factor"),
    [
        ({}, "lora", 2.0),
        ({"policy": "breathe"}, "lora", 1.0),
        ({"policy": "none"}, "lora", 1.0),
        ({"policy": "shrink", "kappa": 3}, "lora", 3.0),
        ({"policy": "adalora", "back_end": "masked"}, "svd_masked", 1.5),
        ({"policy": "flexlora"}, "svd", 1.0),
        ({"policy": "flexlora", "moves": "expand", "share": 0.25}, "svd", 0.75),
        ({"policy": "flexlora_compat"}, "svd", 1.0),
    ],
)
def test_the_policy_decides_the_form_of_updates_and_what_the_plan_spends(
    refinement: dict[str, Any], method: str, factor: float
) -> None:
    made = load_config({**MINIMAL, "refinement": refinement}).refinement
    assert (made.method, made.plan_factor) == (method, factor)
    assert made.penalty == (0.0 if method == "lora" else 0.1)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(UserError, match=r"seed must .*; .*batch_size must ") as caught:
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "got the key 'name' twice at line 2, column 1"),
        ("name: a\ndata: {train: a, train: b}\n", "got the key 'train' twice at line 2, column 18"),
        ("? [1, 2]\n: 3\n", "got a key that is no word at line 1"),
        ("\tname: a\n", "cannot start any token"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
    ],
)
def test_yaml_that_could_be_misread_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=f"configuration must be YAML, .*{message}") as caught:
        load_config(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def test_what_a_file_gives_is_read_without_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: a\ntraining: {steps: 100}\n")
    assert read_content(tmp_path / "run.yaml", ["training.warmup=0.2"]) == {
        "name": "a",
        "training": {"steps": 100, "warmup": 0.2},
    }


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: a\nmodel: {path: m}\ndata: {train: d.csv}\ntraining: {steps: 100}\n")
    config = load_config(tmp_path / "run.yaml", ["training.batch_size=4", "budget=0.5%", "adapter.targets=[query]"])
    assert (config.training.steps, config.training.batch_size) == (100, 4)
    assert config.budget == "0.5%"
    assert config.adapter.targets == ("query",)


def test_flow_is_the_rule_where_statistics_are_there_and_nothing_is_said() -> None:
    def rule(**merge: Any) -> str:  # noqa: ANN401 - a section of a YAML file
        return load_config({**MINIMAL, "merge": merge}).merge.rule

    known, unknown = {"path": "a", "statistics": "a-statistics"}, {"path": "b"}
    assert rule() == rule(extra=[unknown]) == "cat"
    assert rule(extra=[known], budget=300) == "flow"
    assert rule(extra=[known], rule="regmean") == "regmean"
    with pytest.raises(UserError, match=r"merge\.extra\[0\]\.statistics has no effect with merge\.rule cat"):
        rule(extra=[known, unknown])
    tasks = {"a": {"data": {"train": "a.csv"}}, "b": {"data": {"train": "b.csv"}}}
    composed = {"name": "two", "model": {"path": "m"}, "tasks": tasks}
    for merge in ({}, {"budget": "300k"}, {"rank": 8, "examples": 64, "shrinkage": 0.1}):
        assert load_composition({**composed, "merge": merge}).merge.rule == "flow"
    assert load_composition({**composed, "merge": {"rule": "cat"}}).merge.rule == "cat"
