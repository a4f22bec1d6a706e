"""What the packages write follows the schemas, and packages that share a file read the same values from it."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError
from peft import LoraConfig
from torch import Tensor, nn

from flowra_adapters import AdapterCheckpoint, LoRA, attach, read_checkpoint, save_adapter, write_checkpoint
from flowra_allocation import (
    Breathe,
    RankEvent,
    RankHistory,
    RefinementSchedule,
    Refiner,
    allocate,
    read_plan,
    write_plan,
)
from flowra_allocation.refinement_files import read_refinement_state
from flowra_analysis import FlowProfile, ModuleProfile, read_profile, write_profile
from flowra_compose import AdapterState, LowRankUpdate, ModuleUpdates, read_adapter, write_adapter
from flowra_compose.fusion import (
    GateInspection,
    GateOptions,
    Gates,
    TextWeights,
    failure_signs,
    read_gates,
    write_gates,
)
from flowra_compose.interference import InterferenceMeter
from flowra_compose.interference_files import read_interference, write_interference
from flowra_compose.memory import TaskMemory
from flowra_compose.memory_files import read_task_memory, write_task_memory
from flowra_compose.statistics import ModuleStatistics
from flowra_pipelines.fuse_inspection import Inspected, inspection_content
from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.stages.record import STAGES, StageResult, read_record, run_stage
from flowra_pipelines.stages.setting import base_model, load_setting
from flowra_pipelines.stages.table import WORK
from flowra_pipelines.training_state import read_training_state
from flowra_testing.tiny_models import mlp
from flowra_testing.tiny_runs import tiny_config

FORMATS = Path(__file__).parents[2] / "docs" / "formats"
SCHEMAS = {  # of what runs write; those of run configurations are tested beside them
    path.name.removesuffix(".schema.json"): path
    for path in sorted(FORMATS.glob("*.schema.json"))
    if path.name not in {"run_config.schema.json", "composition_config.schema.json"}
}
NOT_OF_A_RUN = {  # written by loops of one's own, by merges, and by `flowra fuse`
    "refinement_state",
    "task_memory",
    "interference",
    "fusion_inspection",
    "gates",
}
FUSED = {
    name: AdapterState(updates={"fc": LowRankUpdate(torch.eye(3)[:2], torch.ones(4, 2), scaling)})
    for name, scaling in (("a", 1.0), ("b", -0.5))
}
READERS: dict[str, Callable[[Path], object]] = {
    "profile": read_profile,
    "plan": read_plan,
    "training_state": read_training_state,
    "refinement_state": read_refinement_state,
    "interference": read_interference,
    "task_memory": read_task_memory,
    "gates": lambda folder: read_gates(folder, FUSED),
}
WIDER: dict[str, Any] = {"target_parameters": ["fc.weight"]}  # what flowra_adapters reads and nothing composes
MEANING: dict[str, Any] = {
    "peft_type": "LOHA",
    "bias": "some",
    "init_lora_weights": "pissa",
    "use_qalora": True,
    "use_bdlora": {"blocks": 2},
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1},
    "monteclora_config": {"samples": 2},
}


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(SCHEMAS[name].read_text(encoding="utf-8")))


def load(path: Path) -> Any:  # noqa: ANN401 - JSON
    return json.loads(path.read_text(encoding="utf-8"))


def unlogged(result: StageResult, folder: Path) -> None:
    return None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of all stages on a tiny encoder; not to be changed."""
    torch.set_num_threads(1)
    config = load_config(tiny_config(tmp_path_factory.mktemp("formats")))
    for name in (*STAGES, "validate"):
        run_stage(name, WORK[name], config, log=unlogged)
    return config


@pytest.fixture
def artifacts(run: RunConfig, tmp_path: Path) -> dict[str, Path]:
    """Copies of the run's JSON files by schema, with the files beside them."""
    folders = {
        "profile": "calibrate",
        "training_state": "calibrate",
        "plan": "allocate",
        "rank_history": "refine",
        "metrics": "evaluate",
        "stage": "allocate",
        "validation": "validate",
    }
    copied = {}
    for name, folder in folders.items():
        shutil.copytree(run.folder / folder, tmp_path / name, ignore=shutil.ignore_patterns("*.png"))
        copied[name] = tmp_path / name / f"{name}.json"
    refinement().save(tmp_path / "refinement_state")
    made = {"interference": interference(tmp_path / "interference"), "task_memory": task_memory(tmp_path / "memory")}
    write_gates(Gates({"fc": 3}, 2, GateOptions(level="module")), FUSED, tmp_path / "gates")
    made["gates"] = tmp_path / "gates" / "gates.json"
    made["fusion_inspection"] = fusion_inspection(tmp_path / "inspection.json")
    return copied | made | {"refinement_state": tmp_path / "refinement_state" / "refinement_state.json"}


def refinement() -> Refiner:
    """Return a refinement that has been watching a step."""
    model = mlp()
    layers: Mapping[str, Any] = attach(model, {"up": 2, "down": 2}, method="svd_masked")
    costs = {name: layer.cost_per_rank for name, layer in layers.items()}
    policy = Breathe(schedule=RefinementSchedule(start=0, freeze=6, events=2, observe=3))
    caps = dict.fromkeys(layers, 4)
    refiner = Refiner(model, layers, policy=policy, costs=costs, caps=caps, budget=2 * sum(costs.values()))
    refiner.before_step(0)
    model(torch.ones(3, 8)).sum().backward()
    refiner.after_step(1, None)
    return refiner


def interference(folder: Path) -> Path:
    """Write the report of a merge of two tasks, one of which leaves a module alone."""
    meter = InterferenceMeter(tasks=("a", "b"))
    one, other = (LowRankUpdate(torch.eye(3)[:2], torch.ones(4, 2), scaling) for scaling in (1.0, -0.5))
    for name, updates in (("fc", (one, other)), ("out", (one, None))):
        meter.add(ModuleUpdates(name=name, updates=updates, statistics=(None, None)), one)
    return write_interference(meter.report(), folder)


def fusion_inspection(path: Path) -> Path:
    """Write what was seen of gates at two layers, on three tokens."""
    weights = torch.rand(2, 3, 2, dtype=torch.float64)
    text = TextWeights(tokens=("a", "b", "c"), weights=weights, shares=weights)
    places = ("h.0", "h.1")
    seen = GateInspection(adapters=("x", "y"), level="layer", places=places, texts=(text,), options=GateOptions())
    signs = tuple(failure_signs(seen))
    found = Inspected(inspection=seen, validation=seen, signs=signs, shown=1, cut=0, length=3)
    path.write_text(json.dumps(inspection_content(found), allow_nan=False), encoding="utf-8")
    return path


def task_memory(folder: Path) -> Path:
    """Write what is kept of one task at two modules."""
    memory = TaskMemory.empty({"fc": (4, 3), "out": (2, 3)})
    statistics = ModuleStatistics(inputs=torch.diag(torch.tensor([4.0, 1.0, 0.0])))
    write_task_memory(memory.after(dict.fromkeys(memory.modules, statistics)), folder)
    return folder / "task_memory.json"


# the schemas themselves


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_a_schema_and_has_a_page(name: str) -> None:
    Draft202012Validator.check_schema(load(SCHEMAS[name]))
    pages = " ".join(path.read_text(encoding="utf-8") for path in FORMATS.glob("*.md") if path.name != "README.md")
    assert f"({name}.schema.json)" in pages


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_page_of_a_schema_names_every_key(name: str) -> None:
    page = (FORMATS / f"{name.removesuffix('_config')}.md").read_text(encoding="utf-8")
    assert [key for key in load(SCHEMAS[name])["properties"] if f"`{key}`" not in page] == []


# a whole run


def test_every_file_of_a_run_follows_its_schema(run: RunConfig) -> None:
    seen = set()
    for path in run.folder.rglob("*.json"):
        if path.stem in SCHEMAS:
            validator(path.stem).validate(load(path))
            seen.add(path.stem)
        else:
            assert path.name == "check.json" or path.parent.name == "model"
    assert seen == SCHEMAS.keys() - NOT_OF_A_RUN


def test_every_stage_leaves_the_files_that_the_page_lists(run: RunConfig) -> None:
    page = (FORMATS / "stage.md").read_text(encoding="utf-8")
    for stage in (*STAGES, "validate"):
        listed = next(line for line in page.split("## Folders")[1].splitlines() if line.startswith(f"| {stage} |"))
        for path in (run.folder / stage).iterdir():
            name = f"{path.name}/" if path.is_dir() else path.name
            if path.suffix == ".png" or name == "stage.json":
                continue
            assert f"`{name}`" in listed or f"`{path.stem}.*`" in listed


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "adapter_config"])
def test_an_unknown_key_is_refused_by_schema_and_reader(name: str, artifacts: dict[str, Path]) -> None:
    path = artifacts[name]
    path.write_text(json.dumps({**load(path), "surplus": 1}), encoding="utf-8")
    with pytest.raises(ValidationError, match="surplus"):
        validator(name).validate(load(path))
    if name in READERS:
        with pytest.raises(ValueError, match="surplus"):
            READERS[name](path.parent)
    elif name == "stage":
        assert read_record(path.parent) is None


@pytest.mark.parametrize("name", ["profile", "plan"])
def test_an_unknown_key_of_a_module_is_refused_by_schema_and_reader(name: str, artifacts: dict[str, Path]) -> None:
    path = artifacts[name]
    content = load(path)
    next(iter(content["modules"].values()))["surplus"] = 1
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValidationError, match="surplus"):
        validator(name).validate(content)
    with pytest.raises(ValueError, match="surplus"):
        READERS[name](path.parent)


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "adapter_config"])
def test_another_version_is_refused_by_schema_and_reader(name: str, artifacts: dict[str, Path]) -> None:
    path = artifacts[name]
    version = load(path)["format_version"]
    path.write_text(json.dumps({**load(path), "format_version": version + 1}), encoding="utf-8")
    with pytest.raises(ValidationError, match=f"{version} was expected"):
        validator(name).validate(load(path))
    if name in READERS:
        with pytest.raises(ValueError, match=f"format_version must be {version}, got {version + 1}"):
            READERS[name](path.parent)
    elif name == "stage":
        assert read_record(path.parent) is None


def test_a_refinement_s_state_follows_its_schema_and_its_history_that_of_histories(artifacts: dict[str, Path]) -> None:
    content = load(artifacts["refinement_state"])
    validator("refinement_state").validate(content)
    validator("rank_history").validate(content["history"])
    assert content["processes"] == 1


@pytest.mark.parametrize(
    "name", ["profile", "plan", "training_state", "refinement_state", "interference", "task_memory", "gates", "stage"]
)
def test_every_required_key_is_required_by_the_reader_too(name: str, artifacts: dict[str, Path]) -> None:
    path = artifacts[name]
    whole = load(path)
    for key in load(SCHEMAS[name])["required"]:
        path.write_text(json.dumps({other: value for other, value in whole.items() if other != key}), encoding="utf-8")
        if name == "stage":
            assert read_record(path.parent) is None, key
        else:
            with pytest.raises(ValueError, match=key):
                READERS[name](path.parent)


def test_costs_of_plan_and_profile_are_those_of_lora(run: RunConfig) -> None:
    plan, profile = read_plan(run.folder / "allocate"), read_profile(run.folder / "calibrate")
    attached = attach(base_model(run, load_setting(run)), plan.ranks)
    assert attached.keys() == plan.modules.keys() == profile.modules.keys()
    for name, one in attached.items():
        assert one.cost_per_rank == plan.modules[name].cost_per_rank == profile.modules[name].cost_per_rank
    assert sum(one.num_parameters() for one in attached.values()) == plan.parameters


def test_an_interference_report_follows_its_schema_with_and_without_scores(artifacts: dict[str, Path]) -> None:
    content = load(artifacts["interference"])
    validator("interference").validate(content)
    scores = {"base": 0.5, "single": 0.9, "merged": 0.8}
    validator("interference").validate({**content, "scores": {"a": scores, "b": scores}})


def test_an_inspection_follows_its_schema_with_and_without_validation(artifacts: dict[str, Path]) -> None:
    content = load(artifacts["fusion_inspection"])
    assert content["signs"]
    validator("fusion_inspection").validate(content)
    validator("fusion_inspection").validate({**content, "validation": None})


def test_a_task_memory_follows_its_schema_before_and_after_a_task(artifacts: dict[str, Path], tmp_path: Path) -> None:
    validator("task_memory").validate(load(artifacts["task_memory"]))
    write_task_memory(TaskMemory.empty({"fc": (4, 3)}), tmp_path / "empty")
    validator("task_memory").validate(load(tmp_path / "empty" / "task_memory.json"))


@pytest.mark.parametrize(
    "options",
    [GateOptions(), GateOptions(level="step", initial="uniform"), GateOptions(rank=1, top_k=1, temperature=1.1)],
    ids=["usual", "one for all", "low rank"],
)
def test_gates_follow_their_schema(options: GateOptions, tmp_path: Path) -> None:
    places = {"": 3} if options.level == "step" else {"blocks.0": 3, "blocks.1": 3}
    write_gates(Gates(places, 2, options), FUSED, tmp_path)
    validator("gates").validate(load(tmp_path / "gates.json"))
    assert read_gates(tmp_path, FUSED).options == options


# values made by hand


def test_a_profile_with_nothing_but_the_required_follows_its_schema(tmp_path: Path) -> None:
    profile = FlowProfile(modules={"fc": ModuleProfile(shape=(3, 5), cost_per_rank=8)}, base_parameters=15)
    write_profile(profile, tmp_path)
    validator("profile").validate(load(tmp_path / "profile.json"))
    assert read_profile(tmp_path) == profile


@pytest.mark.parametrize(
    "gains",
    [{"a": [2.0, 1.0], "b": [0.5]}, {"a": [], "b": [1.0]}, {"a": [0.0], "b": [0.0]}, {"a": [3.0], "b": [1e-9]}],
    ids=["usual", "a module without gains", "all zero", "one insensitive"],
)
@pytest.mark.parametrize("budget", [8, 10, 100])
def test_a_plan_follows_its_schema(gains: dict[str, list[float]], budget: int, tmp_path: Path) -> None:
    plan = allocate(gains, {"a": 10, "b": 8}, budget=budget)
    write_plan(plan, tmp_path)
    validator("plan").validate(load(tmp_path / "plan.json"))
    assert read_plan(tmp_path) == plan


def test_a_rank_history_follows_its_schema_with_and_without_times() -> None:
    event = RankEvent(step=4, ranks={"a": 1, "b": 0}, parameters=8, budget=10, dropped={"b": 1}, admitted={"a": 1})
    history = RankHistory(
        initial={"a": 0, "b": 1},
        budget=10,
        policy="breathe",
        settings={"share": 0.1},
        steps=(4,),
        peak=8,
        events=[event],
    )
    content = json.loads(json.dumps(history.as_json()))
    validator("rank_history").validate(content)
    del content["seconds"]
    validator("rank_history").validate(content)


@pytest.mark.parametrize("key", ["initial", "budget", "policy", "settings", "steps", "peak", "events"])
def test_a_rank_history_without_a_key_is_refused(key: str, artifacts: dict[str, Path]) -> None:
    content = load(artifacts["rank_history"])
    del content[key]
    with pytest.raises(ValidationError, match=key):
        validator("rank_history").validate(content)


# adapters: two packages and PEFT, one format


def products(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read ΔW with both packages."""
    ours = read_checkpoint(folder)
    by_adapters = {name: ours.scalings[name] * (b @ a) for name, (a, b) in ours.factors.items()}
    by_compose = {name: update.delta_weight() for name, update in read_adapter(folder).updates.items()}
    return by_adapters, by_compose


def assert_both_read(folder: Path, expected: dict[str, Tensor]) -> None:
    validator("adapter_config").validate(load(folder / "adapter_config.json"))
    for found in products(folder):
        assert found.keys() == expected.keys()
        for name, delta in expected.items():
            torch.testing.assert_close(found[name], delta, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unit_scale", [False, True], ids=["checkpoint", "export"])
def test_a_model_s_adapter_follows_the_schema_and_reads_alike_in_both_packages(
    unit_scale: bool, tmp_path: Path
) -> None:
    model = mlp()
    attached = attach(model, {"up": 3, "down": 1, "skip": 0}, scaling=1.5, modules_to_save=["head"])
    for one in attached.values():
        assert isinstance(one, LoRA)
        nn.init.normal_(one.lora_B)
    save_adapter(model, tmp_path, modules_to_save=["head"], unit_scale=unit_scale, task_type="SEQ_CLS")
    assert_both_read(tmp_path, {name: attached[name].delta_weight().detach() for name in ("up", "down")})
    ours, theirs = read_checkpoint(tmp_path), read_adapter(tmp_path)
    assert ours.trained_modules == theirs.trained_modules == ("head",)
    assert ours.modules_to_save.keys() == theirs.modules_to_save.keys()
    assert all(torch.equal(tensor, theirs.modules_to_save[name]) for name, tensor in ours.modules_to_save.items())
    assert ours.task_type == theirs.task_type == "SEQ_CLS"


NAMES = st.lists(st.sampled_from(["a", "b", "b-c"]), min_size=1, max_size=3).map(".".join)
RANKS = st.dictionaries(NAMES, st.integers(1, 4), min_size=1, max_size=5)
SCALINGS = st.sampled_from([1.0, 2.0, 0.3, -1.5])


def factors(ranks: dict[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Draw factors of few bits: sums of their products are the same on every processor, in every order."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return (64 * torch.randn(shape, generator=generator)).round() / 64

    return {name: (drawn(rank, 6), drawn(5, rank)) for name, rank in sorted(ranks.items())}


@given(ranks=RANKS, scaling=SCALINGS, unit_scale=st.booleans())
@settings(max_examples=25)
def test_what_adapters_writes_reads_alike_in_both_packages(
    ranks: dict[str, int], scaling: float, unit_scale: bool
) -> None:
    made = factors(ranks)
    checkpoint = AdapterCheckpoint(factors=made, scalings=dict.fromkeys(made, scaling))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(checkpoint, folder, unit_scale=unit_scale)
        assert_both_read(Path(folder), {name: scaling * (b @ a) for name, (a, b) in made.items()})


@given(ranks=RANKS, scaling=SCALINGS)
@settings(max_examples=25)
def test_what_compose_writes_reads_alike_in_both_packages(ranks: dict[str, int], scaling: float) -> None:
    made = factors(ranks)
    state = AdapterState(updates={name: LowRankUpdate(a, b, scaling) for name, (a, b) in made.items()})
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(state, folder)
        assert_both_read(Path(folder), {name: scaling * (b @ a) for name, (a, b) in made.items()})


def test_what_compose_writes_of_other_layers_reads_alike_in_both_packages(tmp_path: Path) -> None:
    a, b = factors({"fc": 2})["fc"]
    conv = LowRankUpdate(a, b, 2.0, layout="conv", kernel=(3,))
    offset = LowRankUpdate(torch.ones(1, 1), b[:, :1], -0.5, layout="vector")
    write_adapter(AdapterState(updates={"conv": conv, "conv.bias": offset, "fc": LowRankUpdate(a, b)}), tmp_path)
    validator("adapter_config").validate(load(tmp_path / "adapter_config.json"))
    ours, theirs = read_checkpoint(tmp_path), read_adapter(tmp_path)
    assert ours.factors.keys() == theirs.updates.keys() - {"conv.bias", "fc.bias"} == {"conv", "fc"}
    for name, (rows, columns) in ours.factors.items():
        delta = ours.scalings[name] * columns.flatten(1) @ rows.flatten(1)
        torch.testing.assert_close(delta, theirs.updates[name].delta_weight())
    assert theirs.updates["conv"].parameter_shape == (5, 2, 3)
    torch.testing.assert_close(ours.bias_offsets["conv"], theirs.updates["conv.bias"].delta_weight().flatten())
    write_adapter(AdapterState(updates={"emb": LowRankUpdate(a, b, layout="embedding")}), tmp_path / "embedding")
    rows, columns = read_checkpoint(tmp_path / "embedding").factors["emb"]
    torch.testing.assert_close(columns @ rows, read_adapter(tmp_path / "embedding").updates["emb"].delta_weight())


def adapter_folder(folder: Path, **changes: Any) -> Path:  # noqa: ANN401 - JSON
    made = factors({"fc": 4, "out": 2})
    write_checkpoint(AdapterCheckpoint(factors=made, scalings={"fc": 2.0, "out": 2.0}), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**load(path), **changes}), encoding="utf-8")
    return folder


def test_rank_stabilised_scaling_reads_alike_in_both_packages(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path, use_rslora=True, r=4, lora_alpha=6, rank_pattern={"out": 2}, alpha_pattern={})
    made = factors({"fc": 4, "out": 2})
    scalings = {"fc": 6 / 4**0.5, "out": 6 / 2**0.5}
    assert_both_read(folder, {name: scalings[name] * (b @ a) for name, (a, b) in made.items()})


@pytest.mark.parametrize("key", MEANING)
def test_an_option_that_changes_the_meaning_is_refused_by_schema_and_both_readers(key: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path, **{key: MEANING[key]})
    assert not validator("adapter_config").is_valid(load(folder / "adapter_config.json"))
    for reader in (read_checkpoint, read_adapter):
        with pytest.raises(ValueError, match=rf"adapter must be plain LoRA, got .*{key}"):
            reader(folder)


@pytest.mark.parametrize("key", WIDER)
def test_an_option_that_only_adapters_reads_is_not_composed(key: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path, **{key: WIDER[key]})
    validator("adapter_config").validate(load(folder / "adapter_config.json"))
    with pytest.raises(ValueError, match=rf"adapter must be plain LoRA, got .*{key}"):
        read_adapter(folder)


def test_every_option_that_the_schema_refuses_is_tried() -> None:
    properties = load(SCHEMAS["adapter_config"])["properties"]
    off = {key for key, value in properties.items() if value == {"$ref": "#/$defs/off"}}
    assert off | {"peft_type", "bias", "init_lora_weights"} == MEANING.keys()


@pytest.mark.parametrize("changes", [{"r": 0}, {"lora_alpha": 0}, {"rank_pattern": {"out": 0}}], ids=str)
def test_a_rank_or_alpha_of_zero_is_refused_by_schema_and_both_readers(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path, **{"rank_pattern": {}, "alpha_pattern": {}, **changes})
    assert not validator("adapter_config").is_valid(load(folder / "adapter_config.json"))
    for reader in (read_checkpoint, read_adapter):
        with pytest.raises(ValueError, match=r"must be finite numbers other than 0, got 0|rank must be"):
            reader(folder)


def test_a_key_of_peft_s_that_is_not_listed_is_let_pass_by_schema_and_both_readers(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path, peft_version="0.0", runtime_config={"ephemeral_gpu_offload": False})
    made = factors({"fc": 4, "out": 2})
    assert_both_read(folder, {name: 2.0 * (b @ a) for name, (a, b) in made.items()})


def test_a_configuration_that_peft_writes_follows_the_schema(tmp_path: Path) -> None:
    LoraConfig(r=4, lora_alpha=8, target_modules=["fc"], rank_pattern={"out": 2}, task_type="SEQ_CLS").save_pretrained(
        str(tmp_path)
    )
    validator("adapter_config").validate(load(tmp_path / "adapter_config.json"))


# reuse of stages


def counted(calls: list[str]) -> Callable[[RunConfig, Path], StageResult]:
    def work(config: RunConfig, folder: Path) -> StageResult:
        calls.append("run")
        (folder / "result.txt").write_text(str(len(calls)), encoding="utf-8")
        return StageResult()

    return work


@pytest.fixture
def small(tmp_path: Path) -> RunConfig:
    """A run whose model and data are files of one line: nothing but their hashes is asked for."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "data.csv").write_text("text,label\n", encoding="utf-8")
    return load_config({
        "name": "small",
        "output_root": str(tmp_path / "runs"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "data.csv")},
    })


def test_a_stage_is_reused_when_nothing_it_reads_has_changed(small: RunConfig) -> None:
    calls: list[str] = []
    first, _ = run_stage("calibrate", counted(calls), small, log=unlogged)
    renamed = small.model_copy(update={"tracking": small.tracking.model_copy(update={"experiment": "other"})})
    second, reused = run_stage("calibrate", counted(calls), renamed, log=unlogged)
    assert reused
    assert first == second
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["data", "model", "record", "configuration"])
def test_a_stage_runs_again_when_something_it_reads_has_changed(change: str, small: RunConfig, tmp_path: Path) -> None:
    calls: list[str] = []
    run_stage("calibrate", counted(calls), small, log=unlogged)
    if change == "data":
        (tmp_path / "data.csv").write_text("text,label\nmore,1\n", encoding="utf-8")
    elif change == "model":
        (tmp_path / "model" / "config.json").write_text("{ }", encoding="utf-8")
    elif change == "record":
        (small.folder / "calibrate" / "stage.json").write_text("{", encoding="utf-8")
    else:
        small = small.model_copy(update={"seed": 1})
    _, reused = run_stage("calibrate", counted(calls), small, log=unlogged)
    assert not reused
    assert len(calls) == 2
    assert not (small.folder / "calibrate.partial").exists()
    validator("stage").validate(load(small.folder / "calibrate" / "stage.json"))
