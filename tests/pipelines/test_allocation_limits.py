"""What a configuration says of ranks is what the plan has and what is trained."""

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flowra_adapters import load_adapter, read_checkpoint
from flowra_allocation import ModulePlan, RankPlan, allocate, read_plan, static_plans, write_plan
from flowra_analysis import read_profile
from flowra_pipelines.config_sections import AllocationConfig
from flowra_pipelines.errors import UserError
from flowra_pipelines.policies import largest_ranks
from flowra_pipelines.rank_limits import CAP_STEPS, rank_limits
from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.stages.record import StageRecord, StageResult, run_stage
from flowra_pipelines.stages.setting import base_model, load_setting, lora_layers
from flowra_pipelines.stages.table import WORK
from flowra_pipelines.stages.train import bring_to_ranks
from flowra_testing.no_pictures import draw_nothing
from flowra_testing.tiny_runs import tiny_config

NAMES = ("h.0.q_proj", "h.0.v_proj", "h.0.down_proj", "h.1.q_proj")
LARGEST = dict.fromkeys(NAMES, 16)
QUERY = "bert.encoder.layer.0.attention.self.query"


# patterns


def limits(**said: Any) -> dict[str, object]:  # noqa: ANN401 - keys of a section
    found = rank_limits(AllocationConfig(**said), LARGEST)
    return {each.name: getattr(found, each.name) for each in dataclasses.fields(found)}


def test_what_is_not_said_limits_nothing() -> None:
    assert limits() == {"caps": None, "floors": None, "frozen": {}, "rank_steps": None, "cap_steps": None}


def test_patterns_come_before_what_holds_for_all() -> None:
    assert limits(cap=4)["caps"] == 4
    assert limits(caps={"q,v": 2})["caps"] == {"h.0.q_proj": 2, "h.0.v_proj": 2, "h.1.q_proj": 2}
    assert limits(cap=4, caps={"h.0.*": 2})["caps"] == {**dict.fromkeys(NAMES, 2), "h.1.q_proj": 4}
    assert limits(floor=1, floors={"down_proj": 3})["floors"] == {**dict.fromkeys(NAMES, 1), "h.0.down_proj": 3}
    assert limits(frozen={"h.1.q_proj": 0, "v": 5})["frozen"] == {"h.1.q_proj": 0, "h.0.v_proj": 5}


def test_steps_are_of_all_ranks_or_for_vllm_of_the_largest() -> None:
    assert limits(rank_steps=(4, 8)).items() >= {"rank_steps": (4, 8), "cap_steps": None}.items()
    assert limits(rank_steps="vllm").items() >= {"rank_steps": None, "cap_steps": CAP_STEPS}.items()
    assert CAP_STEPS[0] == 8


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"caps": {"h.0.*": 2, "q": 3}}, r"^allocation\.caps must say one rank .*, got 2 and 3 for 'h\.0\.q_proj'$"),
        (
            {"floors": {"k_proj": 2}},
            r"^allocation\.floors must name modules of the plan, got 'k_proj'; nearest: [qv]_proj$",
        ),
        ({"frozen": {"v": 17}}, r"^allocation\.frozen must be at most the layer's 16, got 17 for 'h\.0\.v_proj'$"),
        (
            {"cap": 12, "rank_steps": "vllm"},
            r"^allocation\.cap must be one of vLLM's ranks 1, 8, .*, got 12: .* rank 16",
        ),
    ],
)
def test_limits_that_cannot_be_meant_are_one_line(said: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        limits(**said)


def test_the_same_rank_said_twice_is_no_contradiction() -> None:
    assert limits(caps={"h.0.q_proj": 2, "q": 2})["caps"] == {"h.0.q_proj": 2, "h.1.q_proj": 2}


def test_caps_hold_while_rank_moves_but_take_nothing_away() -> None:
    module = ModulePlan(rank=1, alpha=2.0, cost_per_rank=32, psi=0.5, gains=(1.0,))
    plan = RankPlan(
        modules=dict.fromkeys(NAMES, module), budget=128, parameters=128, scaling=2.0, sensitivity_threshold=0.0
    )
    ranks = {**dict.fromkeys(NAMES, 1), "h.0.q_proj": 3}  # a plan written by hand

    def largest(**said: Any) -> dict[str, int]:  # noqa: ANN401 - keys of a section
        content = {"name": "one", "model": {"path": "m"}, "data": {"train": "d.csv"}, "allocation": said}
        return largest_ranks(load_config(content), plan, ranks, LARGEST)

    assert largest() == dict.fromkeys(NAMES, 8)
    assert largest(cap=2) == {**dict.fromkeys(NAMES, 2), "h.0.q_proj": 3}
    assert largest(cap=40, caps={"v": 0}) == {**dict.fromkeys(NAMES, 8), "h.0.v_proj": 1}


# stages


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the inputs and a finished calibration."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp("limits")
        run(load_config(tiny_config(folder, refinement={"policy": "none"})), "calibrate")
        yield folder


def unlogged(result: StageResult, folder: Path) -> None:
    return None


def run(config: RunConfig, *stages: str) -> dict[str, tuple[StageRecord, bool]]:
    return {name: run_stage(name, WORK[name], config, log=unlogged) for name in stages}


def configured(calibrated: Path, root: Path, **sections: Any) -> RunConfig:  # noqa: ANN401 - sections of a YAML file
    content = tiny_config(calibrated, refinement={"policy": "none"}, output_root=str(root))
    config = load_config({**content, **sections})
    shutil.copytree(calibrated / "runs" / "tiny" / "calibrate", config.folder / "calibrate")
    return config


def test_the_plan_is_that_of_allocate_with_the_limits_by_module(calibrated: Path, tmp_path: Path) -> None:
    said = {"cap": 2, "floors": {"intermediate.dense": 1}, "frozen": {"layer.0.attention.self.query": 3}}
    config = configured(calibrated, tmp_path, allocation=said)
    run(config, "allocate")
    profile = read_profile(config.folder / "calibrate")
    expected = allocate(
        {name: gains.tolist() for name, gains in profile.spectra["flow_gains"].items()},
        {name: module.cost_per_rank for name, module in profile.modules.items()},
        budget=700,
        caps=2,
        floors={name: 1 for name in profile.modules if name.endswith("intermediate.dense")},
        frozen={QUERY: 3},
    )
    assert read_plan(config.folder / "allocate") == expected
    assert expected.ranks[QUERY] == 3


@pytest.mark.parametrize("plan", ["uniform", "random", "mlp"])
def test_a_static_plan_is_that_of_the_library_within_the_caps(plan: str, calibrated: Path, tmp_path: Path) -> None:
    config = configured(calibrated, tmp_path, allocation={"plan": plan, "caps": {"layer.0.*": 1}}, seed=0)
    run(config, "allocate")
    profile = read_profile(config.folder / "calibrate")
    costs = {name: module.cost_per_rank for name, module in profile.modules.items()}
    caps = {name: 1 if ".layer.0." in name else min(each.shape) for name, each in profile.modules.items()}
    if plan == "mlp":
        names = [n for n in costs if n.endswith(("intermediate.dense", "output.dense")) and "attention" not in n]
        expected = static_plans.placement_plan(costs, names, budget=700, caps=caps)
    elif plan == "uniform":
        expected = static_plans.uniform_plan(costs, budget=700, seed=0, caps=caps)
    else:
        expected = static_plans.random_plan(costs, budget=700, seed=0, caps=caps)
    assert read_plan(config.folder / "allocate").ranks == expected.ranks
    assert max(rank for name, rank in expected.ranks.items() if ".layer.0." in name) <= 1


def test_a_rank_above_the_probe_s_is_trained(calibrated: Path, tmp_path: Path) -> None:
    config = configured(calibrated, tmp_path, allocation={"frozen": {"layer.0.attention.self.query": 8}})
    probe = read_checkpoint(config.folder / "calibrate" / "adapter")
    assert probe.rank(QUERY) < 8
    run(config, "allocate", "train")
    planned = {name: rank for name, rank in read_plan(config.folder / "allocate").ranks.items() if rank}
    trained = read_checkpoint(config.folder / "train" / "adapter")
    assert {name: trained.rank(name) for name in trained.factors} == planned
    assert planned[QUERY] == 8


def test_fresh_directions_change_no_answer_and_are_drawn_as_in_a_new_adapter(calibrated: Path) -> None:
    config = load_config(tiny_config(calibrated, refinement={"policy": "none"}))
    model = base_model(config, load_setting(config))
    load_adapter(model, config.folder / "calibrate" / "adapter")
    layers = lora_layers(model)
    before = {name: layer.delta_weight().detach().clone() for name, layer in layers.items()}
    probe = layers[QUERY].rank
    bring_to_ranks(model, dict.fromkeys(layers, 8), config.folder / "calibrate", seed=0)
    for name, layer in layers.items():
        assert layer.rank == 8
        assert torch.equal(layer.delta_weight(), before[name])
    rows = layers[QUERY].lora_A[probe:]
    assert 0 < rows.abs().max() <= 1 / math.sqrt(rows.shape[1])
    assert torch.linalg.matrix_rank(layers[QUERY].lora_A) == 8
    with pytest.raises(UserError, match=rf"rank must be at most \d+ for '{QUERY}', got 10000 in the plan"):
        bring_to_ranks(model, dict.fromkeys(sorted(layers), 10000), config.folder / "calibrate", seed=0)


def test_a_plan_that_leaves_no_rank_is_refused(calibrated: Path, tmp_path: Path) -> None:
    config = configured(calibrated, tmp_path, allocation={"cap": 0})
    with pytest.raises(UserError, match="allocation must leave a module some rank"):
        run(config, "allocate")


@pytest.mark.parametrize("allocation", [{"caps": {"qurey": 2}}, {"frozen": {"query": 1000}}])
def test_limits_are_looked_at_before_anything_is_trained(
    allocation: dict[str, Any], calibrated: Path, tmp_path: Path
) -> None:
    content = tiny_config(calibrated, refinement={"policy": "none"}, allocation=allocation, output_root=str(tmp_path))
    with pytest.raises(UserError, match=r"^allocation\.(caps|frozen) must "):
        run(load_config(content), "calibrate")
    assert not (tmp_path / "tiny" / "calibrate").exists()


@pytest.mark.parametrize(
    ("policy", "allocation"),
    [
        ("shrink", {"cap": 1}),
        ("shrink", {"cap": 1, "plan": "uniform"}),
        ("shrink", {"frozen": {"*.layer.*": 1}}),
        ("adalora", {"caps": {"*.layer.*": 1}}),
    ],
)
def test_ranks_that_cannot_exceed_the_budget_are_no_start_for_a_policy_that_gives_back(
    policy: str, allocation: dict[str, Any], calibrated: Path, tmp_path: Path
) -> None:
    content = tiny_config(
        calibrated,
        budget="like r=1 on all-linear",
        refinement={"policy": policy},
        allocation=allocation,
        output_root=str(tmp_path),
    )
    content["adapter"] = {"targets": ["*.layer.*"]}
    with pytest.raises(UserError, match=rf"^refinement.policy {policy} must start above the budget, \d+ parameters"):
        run(load_config(content), "calibrate")
    assert not (tmp_path / "tiny" / "calibrate").exists()


# the budget of another run


def write_budget(folder: Path, *, rank: int) -> None:
    module = ModulePlan(rank=rank, alpha=2.0 * rank, cost_per_rank=100, psi=0.5, gains=())
    used = 100 * rank
    write_plan(
        RankPlan(modules={"q": module}, budget=used, parameters=used, scaling=2.0, sensitivity_threshold=0.0), folder
    )


def test_the_same_budget_as_elsewhere_is_a_number_and_a_new_one_runs_the_stage_again(
    calibrated: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write_budget(other, rank=7)
    config = configured(calibrated, tmp_path / "runs", budget=f"same as {other}")
    assert run(config, "calibrate")["calibrate"][1]  # the number is that of the shared calibration
    assert not run(config, "allocate")["allocate"][1]
    assert read_plan(config.folder / "allocate").budget == 700
    write_budget(other, rank=6)
    assert not run(config, "calibrate")["calibrate"][1]
    run(config, "allocate")
    assert read_plan(config.folder / "allocate").budget == 600
    shutil.rmtree(other)
    with pytest.raises(UserError, match=r"^budget must be the same as a plan\.json, .* got .*other"):
        run(config, "allocate")


# a plan that is written over


def test_a_plan_of_what_if_is_trained_until_the_run_plans_anew(calibrated: Path, tmp_path: Path) -> None:
    from flowra_pipelines.what_if import Question, answer, read_sources

    config = configured(calibrated, tmp_path)
    run(config, "allocate")
    present = read_plan(config.folder / "allocate")
    asked = answer(read_sources(config.folder), Question(static="q,v")).plan
    assert asked.ranks != present.ranks
    write_plan(asked, config.folder / "allocate")
    run(config, "train", "refine")
    for stage in ("train", "refine"):
        found = read_checkpoint(config.folder / stage / "adapter")
        assert {name: found.rank(name) for name in found.factors} == {n: r for n, r in asked.ranks.items() if r}
    run(config, "allocate")  # as `flowra run` does
    assert read_plan(config.folder / "allocate") == present
