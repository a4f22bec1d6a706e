"""Every policy through the stages on a tiny encoder: what is planned, what is left, what is written, and resumed."""

import dataclasses
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

from flowra_adapters import LoRA, MaskedSVDForm, SVDForm, attach, load_adapter, orthogonality, read_checkpoint
from flowra_allocation import (
    AdaLoRA,
    Breathe,
    FlexLoRA,
    FlexLoRACompat,
    Moves,
    Policy,
    RankEvent,
    RefinementError,
    Refiner,
    Shrink,
    Snapshot,
    read_plan,
    write_plan,
)
from flowra_pipelines.config_sections import KEEP_FLOORS
from flowra_pipelines.errors import UserError
from flowra_pipelines.policies import build_policy, largest_ranks
from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.stages.record import StageRecord, StageResult, read_record, run_stage
from flowra_pipelines.stages.setting import (
    base_model,
    largest_rank,
    load_setting,
    lora_layers,
    low_rank_layers,
    probe_rank,
)
from flowra_pipelines.stages.table import WORK
from flowra_pipelines.triplets import as_triplets, triplets_of
from flowra_testing.no_pictures import draw_nothing
from flowra_testing.tiny_runs import tiny_config

MINIMAL: dict[str, Any] = {"name": "one", "model": {"path": "m"}, "data": {"train": "d.csv"}}
BUDGET = 1400
POLICIES: Mapping[str, dict[str, object]] = {
    "breathe": {"policy": "breathe", "events": 2, "observe": 2, "share": 0.3},
    "shrink by flow": {"policy": "shrink", "measure": "flow", "events": 3, "observe": 2},
    "shrink by magnitude": {"policy": "shrink", "events": 3, "kappa": 1.5},
    "flexlora": {"policy": "flexlora", "interval": 4, "b0": 2},
    "flexlora, masked": {"policy": "flexlora", "interval": 4, "b0": 2, "back_end": "masked"},
    "flexlora that expands by sensitivity": {
        "policy": "flexlora",
        "interval": 3,
        "moves": "expand",
        "metric": "sensitivity",
        "share": 0.3,
        "initialisation": "orthogonal",
    },
    "flexlora_compat": {"policy": "flexlora_compat", "interval": 4, "b0": 1},
    "adalora": {"policy": "adalora", "interval": 3},
    "adalora, masked": {"policy": "adalora", "interval": 3, "back_end": "masked", "kappa": 2.0},
}
TRAINED = ("allocate", "train", "refine")


def unlogged(result: StageResult, folder: Path) -> None:
    return None


def run(config: RunConfig, *stages: str) -> dict[str, StageRecord]:
    return {name: run_stage(name, WORK[name], config, log=unlogged)[0] for name in stages}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the inputs and a finished calibration, which all policies share."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp("policies")
        run(load_config(tiny_config(folder, budget=BUDGET)), "calibrate")
        yield folder


def configured(
    calibrated: Path, root: Path, refinement: Mapping[str, object], allocation: Mapping[str, object] | None = None
) -> RunConfig:
    """Return the configuration of a run of its own after the shared calibration."""
    content = tiny_config(calibrated, budget=BUDGET, refinement=refinement, output_root=str(root))
    content["allocation"] = allocation or {}
    content["evaluation"] = {"baselines": []}
    config = load_config(content)
    shutil.copytree(calibrated / "runs" / "tiny" / "calibrate", config.folder / "calibrate")
    return config


def history(config: RunConfig) -> dict[str, Any]:
    content = json.loads((config.folder / "refine" / "rank_history.json").read_text())
    assert isinstance(content, dict)
    return content


def model_of(config: RunConfig, stage: str) -> nn.Module:
    model = base_model(config, load_setting(config))
    load_adapter(model, config.folder / stage / "adapter")
    return model


def updates(config: RunConfig, stage: str) -> dict[str, torch.Tensor]:
    layers = low_rank_layers(model_of(config, stage))
    return {name: layer.delta_weight().detach() for name, layer in layers.items() if layer.rank}


# every policy


QUICK = ("shrink by magnitude", "adalora, masked")


def some(names: Collection[str]) -> list[ParameterSet]:
    """Return cases of which the quick ones are run by default."""
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", some(POLICIES))
def test_a_policy_ends_within_the_budget_and_says_its_peak(name: str, calibrated: Path, tmp_path: Path) -> None:
    config = configured(calibrated, tmp_path, POLICIES[name])
    records = run(config, *TRAINED, "merge", "evaluate")
    plan, moved = read_plan(config.folder / "allocate"), history(config)
    factor, compat = config.refinement.plan_factor, config.refinement.policy == "flexlora_compat"
    assert plan.budget == int(factor * BUDGET)
    assert plan.final_budget == (None if factor == 1 else BUDGET)
    assert {module.kind for module in plan.modules.values()} == {config.refinement.method}
    assert moved["policy"] == config.refinement.policy
    assert moved["budget"] == BUDGET
    assert {n: r for n, r in moved["initial"].items() if r} == {n: r for n, r in plan.ranks.items() if r}
    assert any(event["dropped"] or event["admitted"] for event in moved["events"])
    last = moved["events"][-1]
    assert last["parameters"] <= (BUDGET if not compat else last["budget"])
    peak = max(plan.parameters, *(event["parameters"] for event in moved["events"]))
    assert moved["peak"] == peak
    assert peak <= max(1.0, factor) * BUDGET or compat

    layers = low_rank_layers(model_of(config, "refine"))
    assert {n: each.rank for n, each in layers.items() if each.rank} == {n: r for n, r in last["ranks"].items() if r}
    assert sum(each.num_parameters() for each in layers.values()) == last["parameters"]
    row = json.loads((config.folder / "evaluate" / "metrics.json").read_text())["rows"]["flowra"]
    assert row["parameters"] == last["parameters"]
    state = json.loads((config.folder / "refine" / "training_state.json").read_text())
    assert row["peak_parameters"] == state["peak_parameters"] >= peak
    assert (
        f"{last['parameters']:,} at the end, budget {BUDGET:,}; at most {peak:,}"
        in records["refine"].summary["parameters"]
    )


@pytest.mark.parametrize("name", some(name for name in POLICIES if name.startswith(KEEP_FLOORS)))
def test_least_and_frozen_ranks_hold_while_rank_moves(name: str, calibrated: Path, tmp_path: Path) -> None:
    query, others = "encoder.layer.0.attention.self.query", "intermediate.dense"
    config = configured(calibrated, tmp_path, POLICIES[name], {"frozen": {query: 2}, "floors": {others: 1}})
    run(config, *TRAINED)
    moved = history(config)
    ranks = [moved["initial"], *(event["ranks"] for event in moved["events"])]
    assert ranks[0] != ranks[-1]
    for each in ranks:
        assert {rank for name, rank in each.items() if name.endswith(query)} == {2}
        assert all(rank >= 1 for name, rank in each.items() if name.endswith(others))
    assert moved["events"][-1]["parameters"] <= BUDGET


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flexlora", "adalora, masked"])
def test_triplets_are_written_as_they_are_and_for_peft_with_the_same_update(
    name: str, calibrated: Path, tmp_path: Path
) -> None:
    config = configured(calibrated, tmp_path, POLICIES[name])
    run(config, *TRAINED)
    masked = config.refinement.back_end == "masked"
    for stage, kind in (("train", MaskedSVDForm if masked else SVDForm), ("refine", SVDForm)):
        layers = low_rank_layers(model_of(config, stage))
        assert {type(each) for each in layers.values()} == {kind}  # slots go when ranks are frozen
        checkpoint = read_checkpoint(config.folder / stage / "adapter")
        for module, delta in updates(config, stage).items():
            lora_A, lora_B = checkpoint.factors[module]
            torch.testing.assert_close(checkpoint.scalings[module] * lora_B @ lora_A, delta)
        moments = load_file(config.folder / stage / "training_state.safetensors")
        live = {n for n, each in layers.items() if each.rank}
        assert {f"exp_avg/{n}.adapters.default.lora_E" for n in live} <= moments.keys()


# resume


@pytest.mark.parametrize("name", some(["shrink by magnitude", "flexlora", "flexlora, masked", "adalora"]))
def test_a_stage_that_was_killed_between_events_makes_the_same_files_again(
    name: str, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(calibrated, tmp_path, POLICIES[name])
    expected = run(config, *TRAINED)["refine"]
    shutil.rmtree(config.folder / "refine")
    held: list[int] = []
    apply = Refiner._apply

    def killed_at_the_second(self: Refiner, moves: Moves, step: int, optimizer: Optimizer | None) -> RankEvent:
        held.append(step)
        if len(held) == 2:
            raise KeyboardInterrupt
        return apply(self, moves, step, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(Refiner, "_apply", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(config, "refine")
    assert len(held) == 2
    assert read_record(config.folder / "refine") is None
    again = run(config, "refine")["refine"]
    assert again.artifacts == expected.artifacts


# from pairs to triplets


def test_triplets_have_the_product_of_the_pair_and_orthonormal_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    b = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    b[:, 2] = b[:, 0]  # the product has rank 2
    a[2] = a[0]
    lora_A, lora_E, lora_B = triplets_of(a, b)
    torch.testing.assert_close(lora_B * lora_E @ lora_A, b @ a)
    for gram in (lora_A @ lora_A.T, lora_B.T @ lora_B):
        torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64))
    assert (lora_E >= 0).all()
    assert lora_E[2] < 1e-12 < lora_E[1] <= lora_E[0]


@pytest.mark.parametrize("method", ["svd", "svd_masked"])
def test_a_model_answers_the_same_when_its_pairs_become_triplets(method: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2))
    attach(model, {"0": 2, "1": 0}, scaling=3.0, modules_to_save=["2"])
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_()
    x = torch.randn(8, 6)
    expected = model(x)
    as_triplets(model, method, heads=["2"], seed=0)
    torch.testing.assert_close(model(x), expected)
    layers = low_rank_layers(model)
    assert {name: (layer.rank, layer.scaling) for name, layer in layers.items()} == {"0": (2, 3.0)}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"2.weight", "2.bias", *(f"0.adapters.default.lora_{each}" for each in "AEB")}


def test_the_probe_goes_on_as_triplets_without_a_jump(calibrated: Path, tmp_path: Path) -> None:
    pairs = configured(calibrated, tmp_path / "pairs", {"policy": "none"})
    triplets = configured(calibrated, tmp_path / "triplets", {"policy": "flexlora", "interval": 4, "orthogonality": 0})
    run(pairs, "allocate", "train")
    run(triplets, "allocate")
    plan = read_plan(pairs.folder / "allocate")
    as_svd = {name: dataclasses.replace(module, kind="svd") for name, module in plan.modules.items()}
    write_plan(dataclasses.replace(plan, modules=as_svd), triplets.folder / "allocate")
    run(triplets, "train")
    first = [
        float(run_stage("train", WORK["train"], config, log=unlogged)[0].summary["loss"].partition(" ")[0])
        for config in (pairs, triplets)
    ]
    assert first[0] == first[1]


@pytest.mark.slow
def test_the_penalty_keeps_directions_orthonormal_while_they_train(calibrated: Path, tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 1.0):
        config = configured(
            calibrated, tmp_path / str(weight), {"policy": "flexlora", "interval": 4, "orthogonality": weight}
        )
        run(config, *TRAINED)
        found[weight] = [
            float(orthogonality(low_rank_layers(model_of(config, stage)).values()).detach())
            for stage in ("train", "refine")
        ]
    for free, kept in zip(found[0.0], found[1.0], strict=True):
        assert kept < 0.8 * free


def test_a_plan_of_another_kind_is_refused(calibrated: Path, tmp_path: Path) -> None:
    config = configured(calibrated, tmp_path, {"policy": "flexlora", "interval": 4})
    run(config, "allocate")
    plan = read_plan(config.folder / "allocate")
    pairs = {name: dataclasses.replace(module, kind="lora") for name, module in plan.modules.items()}
    write_plan(dataclasses.replace(plan, modules=pairs), config.folder / "allocate")
    with pytest.raises(UserError, match=r"kind must be 'svd' in this run's plan, got 'lora' for"):
        run(config, "train")


def test_a_policy_that_cannot_move_the_plan_is_one_line(calibrated: Path, tmp_path: Path) -> None:
    message = r"b must be ≤ \d+, .* \(refinement\.policy flexlora_compat\)"
    config = configured(calibrated, tmp_path / "planned", {"policy": "flexlora_compat", "interval": 4, "b0": 50})
    with pytest.raises(UserError, match=message) as caught:
        run(config, "allocate")
    assert "\n" not in str(caught.value)
    assert not (config.folder / "allocate").exists()
    config = configured(calibrated, tmp_path / "trained", {"policy": "flexlora_compat", "interval": 4, "b0": 1})
    run(config, "allocate", "train")
    later = config.model_copy(update={"refinement": config.refinement.model_copy(update={"b0": 50})})
    with pytest.raises(UserError, match=message):
        run(later, "refine")


@pytest.mark.parametrize("name", ["shrink by magnitude", "adalora"])
def test_where_the_threshold_leaves_nothing_to_give_back_it_is_set_aside(
    name: str, calibrated: Path, tmp_path: Path
) -> None:
    content = tiny_config(calibrated, budget=BUDGET, refinement=POLICIES[name], output_root=str(tmp_path))
    config = load_config({**content, "sensitivity_threshold": 0.9})
    shutil.copytree(calibrated / "runs" / "tiny" / "calibrate", config.folder / "calibrate")
    record = run(config, "allocate")["allocate"]
    plan = read_plan(config.folder / "allocate")
    assert plan.parameters > BUDGET
    assert plan.sensitivity_threshold == 0
    assert record.summary["threshold"] == f"η set aside: above it nothing exceeds the budget of {BUDGET:,}"


def test_the_probe_has_the_rank_that_the_plan_may_spend(calibrated: Path) -> None:
    shrink = of({"policy": "shrink", "kappa": 4.0})
    assert shrink.probe_factor == 4.0
    assert probe_rank(shrink, {"a": 10}, 20) == 8
    assert probe_rank(of({}), {"a": 10}, 20) == 4
    assert of({"policy": "none"}).probe_factor == 2.0
    uniform = load_config({**MINIMAL, "allocation": {"plan": "uniform"}, "refinement": {"kappa": 4.0}})
    assert uniform.probe_factor == 2.0


def test_a_policy_that_cannot_go_on_is_one_line(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(self: Shrink, snapshot: Snapshot) -> Moves:
        raise RefinementError("no update can lose")

    monkeypatch.setattr(Shrink, "decide", stuck)
    config = configured(calibrated, tmp_path, POLICIES["shrink by magnitude"])
    run(config, "allocate", "train")
    with pytest.raises(UserError, match=r"^no update can lose \(refinement\.policy shrink\)$"):
        run(config, "refine")


# from the configuration to the policy


def of(refinement: Mapping[str, object], steps: int = 200) -> RunConfig:
    return load_config({**MINIMAL, "training": {"steps": steps}, "refinement": refinement})


@pytest.mark.parametrize(
    ("refinement", "kind", "settings"),
    [
        ({}, Shrink, {"start": 80, "freeze": 140, "events": 4, "measure": "magnitude", "kappa": 2.0}),
        ({"events": 1, "measure": "flow", "kappa": 3}, Shrink, {"events": 1, "measure": "flow", "kappa": 3.0}),
        ({"policy": "breathe", "share": 0.2}, Breathe, {"events": 4, "observe": 4, "share": 0.2}),
        ({"policy": "adalora"}, AdaLoRA, {"tinit": 80, "tfinal": 60, "delta_t": 10, "kappa": 1.5, "target_rank": None}),
        (
            {"policy": "flexlora", "metric": "nuclear", "moves": "prune", "interval": 5},
            FlexLoRA,
            {"warmup": 80, "final": 60, "interval": 5, "b0": 4, "metric": "nuclear", "moves": "prune"},
        ),
        ({"policy": "flexlora_compat", "b0": 2}, FlexLoRACompat, {"b0": 2, "interval": 10, "optimizer_reset": False}),
    ],
)
def test_a_configuration_gives_the_policy_that_it_names(
    refinement: Mapping[str, object], kind: type[Policy], settings: Mapping[str, object]
) -> None:
    policy = build_policy(of(refinement))
    assert type(policy) is kind
    assert settings.items() <= policy.settings.items()
    assert policy.peak == max(1.0, of(refinement).refinement.plan_factor)


def test_no_policy_is_none() -> None:
    assert build_policy(of({"policy": "none"})) is None


@pytest.mark.parametrize("decay", ["cubic", "constant"])
@pytest.mark.parametrize(("interval", "b0"), [(1, 1), (10, 4), (25, 1), (59, 4), (20, 2), (48, 1), (46, 1), (55, 3)])
def test_what_the_configuration_says_can_fire_is_what_the_schedule_says(interval: int, b0: int, decay: str) -> None:
    """The rule stands in both places, for reading a configuration imports no package."""
    refinement = {"policy": "flexlora", "interval": interval, "b0": b0, "decay": decay}
    try:
        config = of(refinement)
    except UserError:
        unchecked = of({"policy": "flexlora"})
        changed = unchecked.refinement.model_copy(update={"interval": interval, "b0": b0})
        with pytest.raises(ValueError, match="schedule must have an event"):
            build_policy(unchecked.model_copy(update={"refinement": changed}))
    else:
        policy = build_policy(config)
        assert policy is not None
        assert policy.steps


def test_rank_grows_to_eight_mean_ranks_and_no_further_than_its_tensors(calibrated: Path, tmp_path: Path) -> None:
    config = configured(calibrated, tmp_path, {"policy": "flexlora", "interval": 4, "back_end": "masked"})
    run(config, "allocate", "train")
    plan, layers = read_plan(config.folder / "allocate"), low_rank_layers(model_of(config, "train"))
    ranks = {name: layer.rank for name, layer in layers.items()}
    slots = {name: layer.max_rank for name, layer in layers.items() if isinstance(layer, MaskedSVDForm)}
    assert {name: largest_rank(layer) for name, layer in layers.items()} == slots

    def largest(budget: int, config: RunConfig = config) -> dict[str, int]:
        return largest_ranks(config, dataclasses.replace(plan, final_budget=budget), ranks, slots)

    assert largest(10**9) == slots
    assert largest(1) == {name: max(1, rank) for name, rank in ranks.items()}
    assert largest(BUDGET, of({"policy": "flexlora_compat"})) == slots
    pair = LoRA(
        next(iter(layers.values())).operator,
        rank=1,
        scaling=1.0,
        dropout=0.0,
        dtype=torch.float32,
        generator=torch.Generator(),
    )
    assert largest_rank(pair) == min(pair.lora_A.shape[1], pair.lora_B.shape[0])
