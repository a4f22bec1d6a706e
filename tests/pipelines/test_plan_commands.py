"""`flowra plan`: what is printed is what the plans say, what-if plans again, and a mistake is one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowra_adapters import attach, save_adapter
from flowra_allocation import ModulePlan, RankPlan, allocate, read_plan, uniform_plan, write_plan
from flowra_analysis import FlowProfile, ModuleProfile, write_profile
from flowra_pipelines.errors import UserError
from flowra_pipelines.placements import PLACEMENTS, placed
from flowra_pipelines.same_budget import parameters_of

Run = Callable[..., tuple[int, str, str]]
COSTS = {
    f"model.layers.{block}.{name}": cost
    for block in (2, 10)
    for name, cost in (("self_attn.q_proj", 20), ("self_attn.v_proj", 15), ("mlp.down_proj", 30))
}
GAINS = {name: [(1 + index) * 0.5**unit for unit in range(8 + index)] for index, name in enumerate(COSTS)}
Q2, V2, DOWN2, Q10, V10, DOWN10 = COSTS


@pytest.fixture
def here(here: Run) -> Run:
    return partial(here, "plan")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that has come to allocate."""
    modules = {
        name: ModuleProfile(shape=(cost, 16), cost_per_rank=cost, statistics={"gain_fisher": float(index)})
        for index, (name, cost) in enumerate(COSTS.items())
    }
    spectra = {
        "flow_gains": {name: torch.tensor(each, dtype=torch.float64) for name, each in GAINS.items()},
        "gradient": {name: torch.tensor(each, dtype=torch.float64) for name, each in GAINS.items()},
    }
    provenance = {"budget_parameters": 300}
    profile = FlowProfile(modules=modules, spectra=spectra, base_parameters=100_000, provenance=provenance)
    write_profile(profile, tmp_path / "run" / "calibrate")
    write_plan(allocate(GAINS, COSTS, budget=300), tmp_path / "run" / "allocate")
    return tmp_path / "run"


def lines(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]


def asked(here: Run, *arguments: str | Path) -> dict[str, Any]:
    code, shown, complaint = here("what-if", *arguments, "--json")
    assert (code, complaint) == (0, "")
    return dict(json.loads(shown))


def ranks(content: dict[str, Any]) -> dict[str, int]:
    return {name: module["rank"] for name, module in content["modules"].items()}


# show


def test_show_says_what_each_module_gets_block_by_block_and_what_its_units_are_worth(folder: Path, here: Run) -> None:
    plan = read_plan(folder / "allocate")
    for path in (folder, folder / "allocate", folder / "allocate" / "plan.json"):
        code, shown, _ = here("show", path)
        assert code == 0
        rows = lines(shown)
        assert [row[0] for row in rows] == [DOWN2, Q2, V2, DOWN10, Q10, V10]
        module = plan.modules[V2]
        last, following = (f"{GAINS[V2][unit] / 15:.3g}" for unit in (module.rank - 1, module.rank))
        assert rows[2] == [V2, "lora", f"{module.psi:.3f}", str(module.rank), f"{module.used}", last, following]
        assert f"{plan.parameters} of 300 parameters, {plan.left} left" in shown
        assert plan.first_out is not None
        assert f"first out: {plan.first_out[0]}, worth {plan.first_out[1]:.3g} per parameter" in shown


def test_show_as_json_is_the_plan(folder: Path, here: Run) -> None:
    plan = read_plan(folder / "allocate")
    code, shown, _ = here("show", folder, "--json")
    content = json.loads(shown)
    assert code == 0
    assert ranks(content) == plan.ranks
    assert tuple(content["last_in"]) == plan.last_in
    assert content["modules"][Q2]["next"] == GAINS[Q2][plan.ranks[Q2]] / 20


def test_show_marks_modules_below_the_threshold(tmp_path: Path, here: Run) -> None:
    gains = {"a.q": [9.0], "a.k": [9.0], "a.v": [0.01]}
    write_plan(allocate(gains, dict.fromkeys(gains, 5), budget=15), tmp_path)
    _, shown, _ = here("show", tmp_path)
    assert {row[0]: row[2].endswith("< η") for row in lines(shown)} == {"a.q": False, "a.k": False, "a.v": True}


def test_what_a_unit_is_worth_is_not_said_where_cost_is_not_in_proportion(tmp_path: Path, here: Run) -> None:
    gains, costs = {"conv": [4.0, 3.0], "q": [1.0]}, {"conv": [7, 16], "q": 5}
    write_plan(allocate(gains, costs, budget=21, kinds={"conv": "flora"}), tmp_path)
    _, shown, _ = here("show", tmp_path)
    assert lines(shown)[0] == ["conv", "flora", "0.597", "2", "16", "–", "–"]


# diff


def test_diff_names_what_changes_rank_and_how_many_parameters_move(folder: Path, tmp_path: Path, here: Run) -> None:
    write_plan(allocate(GAINS, COSTS, budget=400), tmp_path / "other")
    one, other = read_plan(folder / "allocate"), read_plan(tmp_path / "other")
    changed = {name for name in COSTS if one.ranks[name] != other.ranks[name]}
    code, shown, complaint = here("diff", folder, tmp_path / "other")
    assert (code, complaint) == (0, "")
    rows = lines(shown)
    assert ["budget", "300", "400"] in rows
    assert {row[0] for row in rows} & COSTS.keys() == changed != COSTS.keys()
    name = next(iter(changed))
    row = next(row for row in rows if row[0] == name)
    assert row[2:5] == [str(one.ranks[name]), str(other.ranks[name]), f"{other.ranks[name] - one.ranks[name]:+d}"]
    assert f"{other.parameters - one.parameters} parameters go to those that gain" in shown
    assert "Warning" not in shown
    _, everything, _ = here("diff", folder, tmp_path / "other", "--all")
    assert {row[0] for row in lines(everything)} >= COSTS.keys()


def test_diff_tells_what_refinement_ends_within(folder: Path, tmp_path: Path, here: Run) -> None:
    plan = read_plan(folder / "allocate")
    write_plan(replace(plan, final_budget=50), tmp_path / "other")
    assert ["final budget", "none", "50"] in lines(here("diff", folder, tmp_path / "other")[1])
    difference = json.loads(here("diff", folder, tmp_path / "other", "--json")[1])
    assert difference["final_budget"] == [None, 50]


def test_diff_of_equal_plans_says_so(folder: Path, here: Run) -> None:
    code, shown, _ = here("diff", folder, folder)
    assert code == 0
    assert "Ranks: the same." in shown


def test_diff_warns_of_other_measurements_and_names_modules_of_one_side(
    folder: Path, tmp_path: Path, here: Run
) -> None:
    gains = {name: [2 * gain for gain in each] for name, each in GAINS.items() if name != Q2} | {"new": [1.0]}
    costs = {name: {**COSTS, "new": 5}[name] for name in gains}
    write_plan(allocate(gains, costs, budget=300), tmp_path)
    _, shown, _ = here("diff", folder, tmp_path)
    assert f"Modules only in A: {Q2}" in shown
    assert "Modules only in B: new" in shown
    assert "Warning: gains differ" in shown
    _, text, _ = here("diff", folder, tmp_path, "--json")
    assert json.loads(text)["only_in_second"] == ["new"]


# what-if


def test_what_if_without_a_question_is_the_present_plan(folder: Path, here: Run) -> None:
    content = asked(here, folder)
    assert ranks(content) == read_plan(folder / "allocate").ranks
    assert content["difference"]["ranks"] == {}
    assert content["written"] is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--budget", "400"], {"budget": 400}),
        (["--budget", "0.5%"], {"budget": 500}),
        (["--budget", "like r=2 on q,v"], {"budget": 140}),
        (["--cap", "3"], {"caps": 3}),
        (["--cap", "3", "--cap", "q_proj=1"], {"caps": dict.fromkeys(COSTS, 3) | {Q2: 1, Q10: 1}}),
        (["--cap", "q,v=2"], {"caps": dict.fromkeys((Q2, V2, Q10, V10), 2)}),
        (["--floor", "1"], {"floors": 1}),
        (["--floor", "model.layers.2.*=2"], {"floors": dict.fromkeys((Q2, V2, DOWN2), 2)}),
        (["--freeze", "mlp.down_proj=1"], {"frozen": {DOWN2: 1, DOWN10: 1}}),
        (["--rank-steps", "2,4"], {"rank_steps": (2, 4)}),
        (["--solver", "exact"], {"solver": "exact"}),
        (["--threshold", "0.4"], {"sensitivity_threshold": 0.4}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_if_asks_allocate(folder: Path, here: Run, arguments: list[str], expected: dict[str, Any]) -> None:
    plan = allocate(GAINS, COSTS, **{"budget": 300, **expected})
    assert ranks(asked(here, folder, *arguments)) == plan.ranks


def test_freeze_without_a_rank_keeps_the_present_one(folder: Path, here: Run) -> None:
    present = read_plan(folder / "allocate").ranks
    found = ranks(asked(here, folder, "--freeze", "q", "--budget", "150"))
    assert {name: found[name] for name in (Q2, Q10)} == {name: present[name] for name in (Q2, Q10)}
    assert sum(found.values()) < sum(present.values())


def test_the_budget_of_another_run_can_be_had(folder: Path, tmp_path: Path, here: Run) -> None:
    write_plan(allocate(GAINS, COSTS, budget=220), tmp_path / "b b")
    used = read_plan(tmp_path / "b b").parameters
    assert asked(here, folder, "--budget", f"same as {tmp_path / 'b b'}")["budget"] == used


@pytest.mark.parametrize(("kappa", "final"), [(2.0, 150), (1.5, 133), (0.7, 301)])
def test_a_budget_is_the_run_s_where_its_policy_starts_elsewhere(
    kappa: float, final: int, folder: Path, tmp_path: Path, here: Run
) -> None:
    spends = int(kappa * final)
    write_plan(replace(allocate(GAINS, COSTS, budget=spends), final_budget=final), folder / "allocate")
    assert asked(here, folder)["budget"] == spends
    assert asked(here, folder, "--budget", str(final))["modules"] == asked(here, folder)["modules"]
    found = asked(here, folder, "--budget", "100")
    assert (found["budget"], found["final_budget"]) == (int(kappa * 100), 100)
    assert ranks(found) == allocate(GAINS, COSTS, budget=int(kappa * 100)).ranks
    assert asked(here, folder, "--static", "uniform", "--budget", "100")["budget"] == int(kappa * 100)
    here("what-if", folder, "--budget", "200", "--write", tmp_path / "bigger")
    written = read_plan(tmp_path / "bigger")
    assert (written.budget, written.final_budget) == (int(kappa * 200), 200)
    assert parameters_of(tmp_path / "bigger") == min(written.parameters, 200)
    assert "refinement starts from there, and ends within 200 parameters" in here("show", tmp_path / "bigger")[1]


def test_a_plan_without_gains_can_only_be_asked_for_what_needs_none(folder: Path, tmp_path: Path, here: Run) -> None:
    write_plan(uniform_plan(COSTS, budget=300), tmp_path / "alone")
    for question, message in ((), "plan must hold gains"), (("--static", "uniform"), "largest ranks must be known"):
        code, _, complaint = here("what-if", tmp_path / "alone", *question)
        assert code == 2
        assert message in complaint
    write_plan(uniform_plan(COSTS, budget=300), folder / "allocate")
    assert ranks(asked(here, folder)) == allocate(GAINS, COSTS, budget=300, sensitivity_threshold=0.0).ranks
    assert sum(ranks(asked(here, folder, "--static", "uniform")).values()) > 0


def test_diff_tells_kinds(folder: Path, tmp_path: Path, here: Run) -> None:
    plan = read_plan(folder / "allocate")
    kinds = {name: replace(module, kind="svd") for name, module in plan.modules.items()}
    write_plan(replace(plan, modules=kinds), tmp_path / "other")
    shown = here("diff", folder, tmp_path / "other")[1]
    assert f"Kind: lora in A, svd in B; {len(COSTS)} modules." in shown
    content = json.loads(here("diff", folder, tmp_path / "other", "--json")[1])
    assert content["kinds"][Q2] == ["lora", "svd"]


def test_a_profile_alone_can_be_asked_and_gives_the_plan_of_the_stage(folder: Path, here: Run) -> None:
    content = asked(here, folder / "calibrate")
    assert ranks(content) == read_plan(folder / "allocate").ranks
    assert "difference" not in content
    code, shown, _ = here("what-if", folder / "calibrate" / "profile.json")
    assert code == 0
    assert "What the plan would be" in shown


def test_a_plan_alone_can_be_asked(folder: Path, here: Run) -> None:
    path = folder / "allocate" / "plan.json"
    assert ranks(asked(here, path, "--budget", "400")) == allocate(GAINS, COSTS, budget=400).ranks


def test_gains_from_elsewhere_keep_near_the_uniform_rank_unless_told_otherwise(folder: Path, here: Run) -> None:
    mean = 300 / sum(COSTS.values())
    for kind in ("gradient", "gain_fisher"):
        content = asked(here, folder, "--from", kind, "--threshold", "0")
        assert set(ranks(content).values()) <= set(range(1, -int(-2 * mean // 1) + 1))
        assert kind in content["notes"][0]
    free = ranks(asked(here, folder, "--from", "gradient", "--cap", "16", "--floor", "0"))
    assert min(free.values()) == 0
    assert ranks(asked(here, folder, "--from", "flow_gains")) == read_plan(folder / "allocate").ranks


def test_what_if_shows_the_change_and_writes_nothing(folder: Path, here: Run) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    code, shown, _ = here("what-if", folder, "--budget", "600")
    assert code == 0
    assert ["budget", "300", "600"] in lines(shown)
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


@pytest.mark.parametrize("name", ["new/folder", "new/plan.json"])
def test_what_is_written_is_what_was_shown(folder: Path, tmp_path: Path, here: Run, name: str) -> None:
    content = asked(here, folder, "--budget", "600", "--write", tmp_path / name)
    target = (tmp_path / name).parent if name.endswith(".json") else tmp_path / name
    assert content["written"] == str(target / "plan.json")
    assert read_plan(target) == allocate(GAINS, COSTS, budget=600)


def test_modules_of_unknown_cost_are_kept_and_counted(tmp_path: Path, here: Run) -> None:
    gains, costs = {"conv": [4.0, 3.0], "h.q": [1.0, 0.5], "h.v": [1.0, 0.5]}, {"conv": [7, 16], "h.q": 5, "h.v": 5}
    write_plan(allocate(gains, costs, budget=26, kinds={"conv": "flora"}), tmp_path)
    content = asked(here, tmp_path, "--budget", "21")
    assert ranks(content) == {"conv": 2, "h.q": 1, "h.v": 0}
    assert content["parameters"] == 21
    assert content["notes"] == ["1 modules are kept: their cost at other ranks is not in the plan."]


# vLLM's buffers


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A plan whose largest rank is 11."""
    gains = {"h.0.q_proj": [8.0] * 11 + [0.0] * 9, "h.0.v_proj": [1.0] * 20}
    write_plan(allocate(gains, dict.fromkeys(gains, 10), budget=150), tmp_path / "wide")
    assert read_plan(tmp_path / "wide").ranks == {"h.0.q_proj": 11, "h.0.v_proj": 4}
    return tmp_path / "wide"


def test_for_vllm_the_largest_rank_becomes_one_that_it_has_buffers_for_and_the_waste_is_shown(
    wide: Path, here: Run
) -> None:
    content = asked(here, wide, "--rank-steps", "vllm")
    assert ranks(content) == {"h.0.q_proj": 8, "h.0.v_proj": 7}
    assert content["ladder"] == [
        {"rank": 1, "parameters": 20, "gain": 9.0, "unused": 0},
        {"rank": 8, "parameters": 150, "gain": 71.0, "unused": 2 * 8 * 10 - 150},
        {"rank": 16, "parameters": 150, "gain": 92.0, "unused": 2 * 16 * 10 - 150},
    ]
    assert "here 8 (max_lora_rank)" in content["notes"][0]
    _, shown, _ = here("what-if", wide, "--rank-steps", "vllm")
    assert ["16", "92", "150", "170 (53%)"] in lines(shown)


def test_a_cap_that_vllm_has_no_buffers_for_is_refused_with_those_it_has(wide: Path, here: Run) -> None:
    code, _, complaint = here("what-if", wide, "--rank-steps", "vllm", "--cap", "12")
    assert code == 2
    assert complaint.startswith(
        "flowra: cap must be one of vLLM's ranks 1, 8, 16, 32, 64, 128, 256, 320, 512, got 12: a"
    )
    assert max(ranks(asked(here, wide, "--rank-steps", "vllm", "--cap", "8")).values()) == 8


def test_a_plan_below_rank_8_is_not_cut_to_buffers_of_rank_1(wide: Path, here: Run) -> None:
    assert ranks(asked(here, wide, "--rank-steps", "vllm", "--budget", "60")) == {"h.0.q_proj": 6, "h.0.v_proj": 0}


# static plans


@pytest.mark.parametrize("static", ["uniform", "random", "q,v", "attention", "mlp", "all"])
def test_static_plans_keep_the_budget_and_their_placement(folder: Path, here: Run, static: str) -> None:
    content = asked(here, folder, "--static", static)
    active = {name for name, rank in ranks(content).items() if rank}
    assert content["parameters"] <= 300
    if static in PLACEMENTS:
        assert active == set(placed(COSTS, static))
        assert len({ranks(content)[name] for name in active}) == 1
    assert content["sensitivity_threshold"] == 0


def test_a_uniform_plan_is_drawn_by_its_seed(folder: Path, here: Run) -> None:
    caps = {name: min(cost, 16) for name, cost in COSTS.items()}
    for seed in (0, 1):
        content = asked(here, folder, "--static", "uniform", "--seed", str(seed))
        assert ranks(content) == uniform_plan(COSTS, budget=300, seed=seed, caps=caps).ranks


def test_a_static_plan_of_a_run_of_triplets_is_one_of_triplets(folder: Path, here: Run) -> None:
    write_plan(allocate(GAINS, COSTS, budget=300, kinds=dict.fromkeys(COSTS, "svd")), folder / "allocate")
    content = asked(here, folder, "--static", "uniform")
    assert {module["kind"] for module in content["modules"].values()} == {"svd"}


def test_a_static_plan_has_no_more_rank_than_a_layer(folder: Path, here: Run) -> None:
    assert max(ranks(asked(here, folder, "--static", "q,v", "--budget", "90k")).values()) == 16
    assert max(ranks(asked(here, folder, "--static", "q,v", "--budget", "90k", "--cap", "3")).values()) == 3


def test_placements_are_read_off_names_and_query_and_value_may_be_one_layer() -> None:
    fused = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc"]
    assert placed(fused, "q,v") == fused[:1]
    assert placed(fused, "attention") == fused[:2]
    assert placed(fused, "mlp") == fused[2:]
    assert placed(fused, "all") == fused
    with pytest.raises(UserError, match="placement must mean at least one layer, got 'mlp' for layers of the types Q"):
        placed(["h.0.q_proj"], "mlp")
    with pytest.raises(UserError, match="placement must be one of q,v; attention; mlp; all, got 'k'"):
        placed(fused, "k")


# same as


def test_the_parameters_of_plans_and_adapters_are_counted_without_heads(tmp_path: Path) -> None:
    plan = allocate(GAINS, COSTS, budget=300)
    write_plan(plan, tmp_path / "run" / "allocate")
    assert parameters_of(tmp_path / "run") == parameters_of(tmp_path / "run" / "allocate") == plan.parameters
    assert parameters_of(tmp_path / "run" / "allocate" / "plan.json") == plan.parameters
    for method in ("lora", "svd", "svd_masked", "dora", "flora", "norm"):
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
        site = "1" if method == "norm" else "0"
        one = attach(model, {site: 1}, method=method, modules_to_save=["2"])[site]
        save_adapter(model, tmp_path / method, modules_to_save=["2"])
        assert parameters_of(tmp_path / method) == one.num_parameters()
    model = nn.Sequential(nn.Linear(6, 5))
    attach(model, {"0": 3})
    save_adapter(model, tmp_path / "run" / "refine" / "adapter")
    assert parameters_of(tmp_path / "run") == 33  # the final adapter comes before the plan


def test_what_has_no_parameters_to_be_the_same_as_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"budget must be the same as a plan\.json, a folder with one"):
        parameters_of(tmp_path)
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(UserError, match=r"budget must be the same as something that can be read, got plan must follow"):
        parameters_of(tmp_path)


# mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cap", "q=x"], "--cap must be a rank, or names=rank, got 'q=x'. Example: --cap q,v=8"),
        (["--floor", "x"], "--floor must be a rank, or names=rank, got 'x'"),
        (["--freeze", "q=x"], "--freeze must be names, or names=rank, got 'q=x'"),
        (["--freeze", "qproj"], "freeze must name modules of the plan, got 'qproj'; nearest: q_proj"),
        (["--rank-steps", "VLLM"], "--rank-steps must be vllm, or ranks ≥ 1 with commas between, got 'VLLM'"),
        (["--rank-steps", "0,8"], "--rank-steps must be vllm, or ranks ≥ 1"),
        (["--budget", "much"], "budget must be like '0.1%'"),
        (["--budget", "like r=1 on x"], "budget must name modules of the plan, got 'x'"),
        (["--budget", "7"], "budget must be at least one unit of rank, 15 parameters here, got 7. Raise it."),
        (["--budget", "same as nowhere"], "budget must be the same as a plan.json"),
        (["--solver", "best"], "solver must be one of greedy, exact, got 'best'"),
        (["--threshold", "2"], "sensitivity_threshold must be in [0, 1), got 2.0"),
        (["--floor", "9"], "floors and frozen modules must fit the budget, 300 parameters, got"),
        (["--from", "gradeint"], "--from must be a spectrum or a statistic of the profile, got 'gradeint'; nearest:"),
        (["--static", "best"], "static must be one of uniform; random; q,v; attention; mlp; all, got 'best'"),
        (["--static", "all", "--floor", "1"], "--floor has no effect with --static all"),
        (["--static", "all", "--rank-steps", "vllm"], "--rank-steps has no effect with --static all"),
        (["--static", "uniform", "--solver", "exact"], "--solver has no effect with --static uniform"),
        (["--static", "q,v", "--seed", "1"], "--seed has no effect with --static q,v"),
        (["--seed", "0"], "--seed has no effect without --static uniform or random, got 0"),
        (["--write", "other.json"], "--write must be a folder, or a path that ends in plan.json, got other.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, here: Run, arguments: list[str], message: str) -> None:
    code, shown, complaint = here("what-if", folder, *arguments)
    assert code == 2
    assert shown == ""
    assert complaint.startswith(f"flowra: {message}")
    assert complaint.count("\n") == 1


def test_what_a_plan_or_profile_alone_does_not_know_is_said(folder: Path, here: Run) -> None:
    for arguments, message in (
        (
            [folder / "allocate", "--budget", "1%"],
            "budget in per cent needs the base's size, got '1%' for a plan alone",
        ),
        ([folder / "allocate", "--from", "gradient"], "--from gradient needs a profile, got none in"),
        (
            [folder / "calibrate", "--freeze", "q"],
            "--freeze without a rank needs a plan, got a profile only. Say --fre",
        ),
    ):
        code, _, complaint = here("what-if", *arguments)
        assert (code, complaint.count("\n")) == (2, 1)
        assert complaint.startswith(f"flowra: {message}")


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"format_version": 9}', "\x00"], ids=["empty", "list", "version", "null"]
)
@pytest.mark.parametrize("command", [["show"], ["diff", "{good}"], ["what-if"]], ids=" ".join)
def test_a_damaged_plan_is_one_line_and_exit_code_2(
    command: list[str], damage: str, folder: Path, tmp_path: Path, here: Run
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "plan.json").write_text(damage)
    code, shown, complaint = here(*(each.format(good=folder) for each in command), tmp_path / "bad")
    assert (code, shown) == (2, "")
    assert complaint.startswith("flowra: plan must follow docs/formats/plan.md")
    assert complaint.count("\n") == 1


def test_a_folder_without_a_plan_is_one_line_and_exit_code_2(tmp_path: Path, here: Run) -> None:
    for command, message in (("show", "plan must be a plan.json"), ("what-if", "what-if must ask of a plan.json")):
        code, _, complaint = here(command, tmp_path / "none")
        assert (code, complaint.count("\n")) == (2, 1)
        assert complaint.startswith(f"flowra: {message}")


def test_plan_and_profile_of_other_modules_are_refused(folder: Path, here: Run) -> None:
    write_plan(allocate({"x": [1.0]}, {"x": 5}, budget=9), folder / "allocate")
    code, _, complaint = here("what-if", folder)
    assert code == 2
    assert "plan and profile must be of the same modules, got 'x' in the plan only" in complaint


def test_names_that_would_draw_on_the_terminal_are_written_as_escapes(tmp_path: Path, here: Run) -> None:
    hostile = "a.\x1b[2J[red]\u202e\n.q"
    module = ModulePlan(rank=1, alpha=2.0, cost_per_rank=5, psi=0.5, gains=(1.0, 0.5))
    plan = RankPlan(
        modules={hostile: module},
        budget=9,
        parameters=5,
        scaling=2.0,
        sensitivity_threshold=0.05,
        last_in=(hostile, 0.2),
        first_out=(hostile, 0.1),
    )
    write_plan(plan, tmp_path / "one")
    write_plan(replace(plan, budget=10), tmp_path / "other")
    for command in (["show", tmp_path / "one"], ["diff", tmp_path / "one", tmp_path / "other", "--all"]):
        code, shown, _ = here(*command)
        assert code == 0
        assert not {"\x1b", "\u202e"} & set(shown)
        assert "a.\\x1b[2J[red]\\u202e\\n.q" in shown


@pytest.mark.parametrize("command", [["--help"], ["show", "--help"], ["what-if", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy_and_shows_examples(command: list[str]) -> None:
    program = (
        "import sys\nfrom flowra_pipelines.cli import main\ntry:\n    main()\nexcept SystemExit as ended:\n"
        "    assert not ended.code\n"
        "print([name for name in ('torch', 'matplotlib', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", *command], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"
    if command[0] == "what-if":
        assert "flowra plan what-if runs/demo --rank-steps vllm --solver exact" in done.stdout
