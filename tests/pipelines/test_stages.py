"""The six stages on a tiny encoder, from files to files."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from flowra_adapters import attach, load_adapter, read_checkpoint, save_adapter
from flowra_allocation import read_plan, write_plan
from flowra_analysis import read_profile, write_profile
from flowra_compose.interference_files import read_interference
from flowra_pipelines.errors import UserError
from flowra_pipelines.results_table import results_as_markdown
from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.stages.record import STAGES, StageRecord, StageResult, read_record, run_stage
from flowra_pipelines.stages.setting import base_model, load_setting, lora_layers
from flowra_pipelines.stages.table import WORK
from flowra_testing.tiny_runs import tiny_config

Runner = Callable[..., tuple[StageRecord, bool]]


def unlogged(result: StageResult, folder: Path) -> None:
    return None


def run_all(config: RunConfig, stages: tuple[str, ...] = STAGES) -> dict[str, tuple[StageRecord, bool]]:
    return {name: run_stage(name, WORK[name], config, log=unlogged) for name in stages}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run; tests that change it work on a copy."""
    torch.set_num_threads(1)
    made = load_config(tiny_config(tmp_path_factory.mktemp("stages")))
    run_all(made)
    return made


@pytest.fixture
def copy(config: RunConfig, tmp_path: Path) -> RunConfig:
    shutil.copytree(config.folder, tmp_path / "runs" / "tiny")
    return config.model_copy(update={"output_root": str(tmp_path / "runs")})


def logits(model: torch.nn.Module, config: RunConfig) -> torch.Tensor:
    setting = load_setting(config)
    batch = setting.collate([setting.test[index] for index in range(8)])
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_every_stage_leaves_whole_files_that_its_record_names(config: RunConfig) -> None:
    for name in STAGES:
        record = read_record(config.folder / name)
        assert record is not None
        found = {path.relative_to(config.folder / name).as_posix() for path in (config.folder / name).rglob("*")}
        assert record.artifacts.keys() <= found
        assert not (config.folder / f"{name}.partial").exists()
    of_refine = ("rank_over_time", "budget_path", "magnitude_and_entropy")
    for picture in (
        *("calibrate/sensitivity", "allocate/rank_plan", "train/loss"),
        *(f"refine/{name}" for name in of_refine),
    ):
        assert (config.folder / f"{picture}.png").stat().st_size > 5_000


def test_the_plan_spends_the_budget_and_no_more(config: RunConfig) -> None:
    plan = read_plan(config.folder / "allocate")
    assert plan.budget == config.budget == 700
    assert plan.parameters <= 700
    assert len(set(plan.ranks.values())) > 1
    cheapest = min(
        module.cost_per_rank
        for module in plan.modules.values()
        if module.psi >= plan.sensitivity_threshold and module.rank < len(module.gains)
    )
    assert plan.left < cheapest


def test_another_profile_gives_other_ranks(copy: RunConfig) -> None:
    before = read_plan(copy.folder / "allocate").ranks
    profile = read_profile(copy.folder / "calibrate")
    generator = torch.Generator().manual_seed(5)
    noise = {
        name: torch.rand(len(gains), generator=generator, dtype=torch.float64).sort(descending=True).values
        for name, gains in profile.spectra["flow_gains"].items()
    }
    random_profile = dataclasses.replace(profile, spectra={**profile.spectra, "flow_gains": noise})
    write_profile(random_profile, copy.folder / "calibrate")
    run_stage("allocate", WORK["allocate"], copy, log=unlogged, force=True)
    assert read_plan(copy.folder / "allocate").ranks != before


def test_train_goes_on_at_the_planned_ranks(config: RunConfig) -> None:
    planned = {name: rank for name, rank in read_plan(config.folder / "allocate").ranks.items() if rank}
    trained = read_checkpoint(config.folder / "train" / "adapter")
    assert {name: a.shape[0] for name, (a, _) in trained.factors.items()} == planned
    assert set(trained.scalings.values()) == {2.0}


def test_refine_moves_rank_inside_the_budget_and_then_freezes(config: RunConfig) -> None:
    history = json.loads((config.folder / "refine" / "rank_history.json").read_text())
    planned = read_plan(config.folder / "allocate").ranks
    assert history["initial"] == planned
    assert [event["step"] for event in history["events"]] == [22, 28]
    assert all(event["parameters"] <= 700 for event in history["events"])
    assert any(event["ranks"] != planned for event in history["events"])
    final = read_checkpoint(config.folder / "refine" / "adapter")
    ranks = {name: a.shape[0] for name, (a, _) in final.factors.items()}
    assert ranks == {name: rank for name, rank in history["events"][-1]["ranks"].items() if rank}


def test_the_hand_over_holds_moments_for_exactly_the_live_parameters(config: RunConfig) -> None:
    for stage in ("calibrate", "train", "refine"):
        tensors = load_file(config.folder / stage / "training_state.safetensors")
        adapter = load_file(config.folder / stage / "adapter" / "adapter_model.safetensors")
        moments = {key.partition("/")[2] for key in tensors if key.startswith("exp_avg/")}
        expected = {
            key.removeprefix("base_model.model.").replace(".lora_", ".adapters.default.lora_").removesuffix(".weight")
            if ".lora_" in key
            else key.removeprefix("base_model.model.")
            for key in adapter
        }
        assert moments == expected
        for key in adapter:
            assert torch.isfinite(adapter[key]).all()
    state = json.loads((config.folder / "refine" / "training_state.json").read_text())
    assert (state["step"], state["total_steps"], state["examples_seen"]) == (40, 40, 320)


def test_the_export_gives_peft_the_logits_of_the_trained_model(config: RunConfig) -> None:
    setting = load_setting(config)
    ours = base_model(config, setting)
    load_adapter(ours, config.folder / "refine" / "adapter")
    expected = logits(ours, config)
    theirs = PeftModel.from_pretrained(base_model(config, setting), config.folder / "merge" / "adapter")
    torch.testing.assert_close(logits(theirs, config), expected, rtol=1e-5, atol=1e-5)
    exported = json.loads((config.folder / "merge" / "adapter" / "adapter_config.json").read_text())
    ranks = [layer.rank for layer in lora_layers(ours).values()]
    assert exported["r"] == exported["lora_alpha"] == max(ranks)
    assert exported["rank_pattern"] == exported["alpha_pattern"]


def test_the_merged_model_loads_alone_and_gives_the_same_logits(config: RunConfig) -> None:
    ours = base_model(config, load_setting(config))
    load_adapter(ours, config.folder / "refine" / "adapter")
    alone = AutoModelForSequenceClassification.from_pretrained(config.folder / "merge" / "model")
    torch.testing.assert_close(logits(alone, config), logits(ours, config), rtol=1e-4, atol=1e-5)
    assert alone.config.id2label == {0: "rotten", 1: "fresh"}


def test_the_table_counts_adapter_parameters_only_and_states_the_peak(config: RunConfig) -> None:
    metrics = json.loads((config.folder / "evaluate" / "metrics.json").read_text())
    rows = metrics["rows"]
    final = read_checkpoint(config.folder / "refine" / "adapter")
    assert rows["flowra"]["parameters"] == sum(a.numel() + b.numel() for a, b in final.factors.values())
    assert rows["flowra"]["parameters"] <= 700 < rows["flowra"]["peak_parameters"]
    assert rows["base"]["parameters"] == 0
    assert rows["uniform"]["parameters"] == 4 * 64 * 2
    for interval in (row["accuracy"] for row in rows.values()):
        assert 0 <= interval["low"] <= interval["value"] <= interval["high"] <= 1
    assert len(metrics["verdicts"]) == 2
    for verdict, p_value in zip(metrics["verdicts"], metrics["p_values_against_flowra"].values(), strict=True):
        assert verdict.startswith("Tie") == (p_value >= 0.05)


def test_the_results_are_a_markdown_table_too(config: RunConfig) -> None:
    shown = results_as_markdown(config)
    lines = shown.splitlines()
    assert lines[2] == "|  | accuracy (95 % interval) | loss | parameters | peak | training |"
    assert {line.count("|") for line in lines if line.startswith("|")} == {7}
    assert "| Flowra |" in shown


def test_a_run_whose_inputs_are_unchanged_is_reused(copy: RunConfig) -> None:
    assert all(reused for _, reused in run_all(copy).values())


def test_a_changed_option_reruns_its_stage_and_those_after_it(copy: RunConfig) -> None:
    changed = copy.model_copy(update={"merge": copy.merge.model_copy(update={"save_model": False})})
    reused = {name: was for name, (_, was) in run_all(changed).items()}
    assert reused == {
        "calibrate": True,
        "allocate": True,
        "train": True,
        "refine": True,
        "merge": False,
        "evaluate": False,
    }
    assert not (changed.folder / "merge" / "model").exists()


def test_the_same_run_elsewhere_gives_the_same_artifacts(config: RunConfig, tmp_path: Path) -> None:
    elsewhere = config.model_copy(update={"output_root": str(tmp_path / "other")})
    stages = ("calibrate", "allocate", "train", "refine")
    for name, (record, reused) in run_all(elsewhere, stages).items():
        first = read_record(config.folder / name)
        assert first is not None
        assert not reused
        assert record.artifacts == first.artifacts


def test_a_plan_edited_by_hand_is_trained_and_seen_as_edited(copy: RunConfig) -> None:
    plan = read_plan(copy.folder / "allocate")
    dropped = next(name for name, rank in plan.ranks.items() if rank)
    smaller = dataclasses.replace(
        plan.modules[dropped], rank=plan.ranks[dropped] - 1, alpha=2.0 * (plan.ranks[dropped] - 1)
    )
    edited = dataclasses.replace(
        plan,
        modules={**plan.modules, dropped: smaller},
        parameters=plan.parameters - smaller.cost_per_rank,
    )
    write_plan(edited, copy.folder / "allocate")
    _, reused = run_stage("train", WORK["train"], copy, log=unlogged)
    assert not reused
    trained = read_checkpoint(copy.folder / "train" / "adapter").factors
    assert {name: a.shape[0] for name, (a, _) in trained.items()} == {n: r for n, r in edited.ranks.items() if r}
    _, reused = run_stage("allocate", WORK["allocate"], copy, log=unlogged)
    assert not reused
    assert read_plan(copy.folder / "allocate") == plan


def test_what_an_interrupted_stage_left_behind_is_never_read(copy: RunConfig) -> None:
    half = copy.folder / "refine.partial"
    shutil.move(copy.folder / "refine", half)
    (half / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"merge needs the artifacts of refine, got none"):
        run_stage("merge", WORK["merge"], copy, log=unlogged)
    record, reused = run_stage("refine", WORK["refine"], copy, log=unlogged)
    assert not reused
    assert not half.exists()
    assert read_checkpoint(copy.folder / "refine" / "adapter").factors
    assert record.artifacts


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (None, {"budget": 10}, r"budget must pay for at least one unit of rank, 64 parameters here, got 10"),
        ("adapter", {"targets": ("qurey",)}, r"match at least one module, got 'qurey'. Nearest names: query"),
        ("adapter", {"exclude": ("nothing",)}, "exclude must match at least one module, got 'nothing'"),
        ("model", {"path": "/nowhere/model"}, r"file must exist, got '/nowhere/model'"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_leaves_nothing(
    config: RunConfig, tmp_path: Path, section: str | None, changes: dict[str, Any], message: str
) -> None:
    update = changes if section is None else {section: getattr(config, section).model_copy(update=changes)}
    wrong = config.model_copy(update={**update, "output_root": str(tmp_path)})
    with pytest.raises(UserError, match=message) as caught:
        run_stage("calibrate", WORK["calibrate"], wrong, log=unlogged)
    assert "\n" not in str(caught.value)
    assert not (wrong.folder / "calibrate").exists()


def test_refinement_can_be_switched_off(copy: RunConfig) -> None:
    off = copy.model_copy(update={"refinement": copy.refinement.model_copy(update={"policy": "none"})})
    run_stage("refine", WORK["refine"], off, log=unlogged)
    planned = {name: rank for name, rank in read_plan(copy.folder / "allocate").ranks.items() if rank}
    final = read_checkpoint(copy.folder / "refine" / "adapter")
    assert {name: a.shape[0] for name, (a, _) in final.factors.items()} == planned
    assert not (copy.folder / "refine" / "rank_history.json").exists()


def test_an_extra_adapter_in_files_of_our_own_is_merged_as_its_export(copy: RunConfig, tmp_path: Path) -> None:
    model = base_model(copy, load_setting(copy))
    query = next(name for name, _ in model.named_modules() if name.endswith("query"))
    (triplets,) = attach(model, {query: 2}, method="svd").values()
    with torch.no_grad():
        for each in triplets.parameters():
            each.normal_(generator=torch.Generator().manual_seed(0))
        update = triplets.delta_weight().clone()
    save_adapter(model, tmp_path / "triplets", task_type="SEQ_CLS")
    assert not (tmp_path / "triplets" / "adapter_config.json").exists()
    merge = copy.merge.model_validate({"extra": [{"path": str(tmp_path / "triplets")}]})
    run_stage("merge", WORK["merge"], copy.model_copy(update={"merge": merge}), log=unlogged)
    own, both = (read_checkpoint(copy.folder / stage / "adapter") for stage in ("refine", "merge"))
    wanted = update
    if query in own.factors:
        lora_A, lora_B = own.factors[query]
        wanted = wanted + own.scalings[query] * lora_B @ lora_A
    lora_A, lora_B = both.factors[query]
    torch.testing.assert_close(both.scalings[query] * lora_B @ lora_A, wanted, rtol=1e-5, atol=1e-6)


def test_extra_adapters_are_added_exactly(copy: RunConfig) -> None:
    extra = copy.folder / "refine" / "adapter"

    def with_extra(weight: float) -> RunConfig:
        merge = copy.merge.model_validate({"extra": [{"path": str(extra), "weight": weight}]})
        return copy.model_copy(update={"merge": merge})

    with pytest.raises(UserError, match="adapter must change the model's output, got no change beyond rounding"):
        run_stage("merge", WORK["merge"], with_extra(-1.0), log=unlogged)
    done, _ = run_stage("merge", WORK["merge"], with_extra(1.0), log=unlogged)
    report = read_interference(copy.folder / "merge")
    assert list(report.pair_means("cosine").values()) == [pytest.approx(1.0)]
    assert {"interference.html", "interference_task_cosines.png"} <= {
        path.name for path in (copy.folder / "merge").iterdir()
    }
    assert done.summary["recommendation"] == "keep apart, by geometry"  # the sum is twice of what either wants
    once, twice = read_checkpoint(extra), read_checkpoint(copy.folder / "merge" / "adapter")
    for name, (a, b) in twice.factors.items():
        first_a, first_b = once.factors[name]
        torch.testing.assert_close(b @ a, 2 * 2.0 * (first_b @ first_a), rtol=1e-5, atol=1e-6)
