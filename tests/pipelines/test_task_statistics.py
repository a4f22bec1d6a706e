"""What is measured of a task at each module, and its files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowra_adapters import attach, save_adapter
from flowra_compose import ModuleStatistics, read_adapter
from flowra_pipelines.data import load_text_data, tokenise
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import load_config
from flowra_pipelines.stages.setting import base_model, load_setting
from flowra_pipelines.statistics_files import (
    JSON_NAME,
    TENSORS_NAME,
    read_task_statistics,
    write_task_statistics,
)
from flowra_pipelines.task_statistics import (
    MeasureSettings,
    adapted_model,
    adapter_hash,
    data_source,
    measure_adapter,
    measure_task_statistics,
    statistics_batches,
)
from flowra_testing.tiny_runs import tiny_config, tiny_language_config, tiny_regression_config

QUERY, DENSE = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"


def write_task(folder: Path, config: dict[str, Any], *, seed: int = 0, names: tuple[str, ...] = (QUERY, DENSE)) -> Path:
    """Write an adapter with random updates and its head, as a run would."""
    run = load_config(config)
    setting = load_setting(run)
    model = base_model(run, setting)
    generator = torch.Generator().manual_seed(seed)
    for one in attach(model, dict.fromkeys(names, 2), generator=generator).values():
        for parameter in one.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_adapter(
        model,
        folder,
        modules_to_save=setting.task.heads(model),
        base_model_name_or_path=run.model.path,
        task_type=setting.task.peft_type,
    )
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, reviews and an adapter for them."""
    folder = tmp_path_factory.mktemp("task")
    write_task(folder / "a", tiny_config(folder))
    return folder


@pytest.fixture(scope="module")
def measured(task: Path) -> Path:
    settings = MeasureSettings(examples=24, batch_size=5, fisher=True)
    data = data_source(str(task / "reviews.csv"))
    assert measure_adapter(task / "a", data, task / "known", names=[QUERY, DENSE], settings=settings) == []
    return task / "known"


def test_inputs_are_the_second_moment_of_what_enters_the_layer_on_the_adapted_model(task: Path) -> None:
    adapted = adapted_model(task / "a")
    settings = MeasureSettings(examples=16, batch_size=4)
    rows = load_text_data(data_source(str(task / "reviews.csv")), label=None).train
    batches = statistics_batches(adapted, tokenise(rows, adapted.tokenizer, max_length=128), settings)
    seen: list[Tensor] = []
    layer = adapted.model.get_submodule(DENSE)
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        for batch in batches:
            adapted.model(**{key: value for key, value in batch.items() if key != "labels"})
    handle.remove()
    real = torch.cat([each[batch["attention_mask"].bool()] for each, batch in zip(seen, batches, strict=True)]).double()
    found = measure_task_statistics(adapted.model, adapted.task, batches, [DENSE, QUERY], settings=settings)
    inputs, outputs = found[DENSE].inputs, found[DENSE].outputs
    assert inputs is not None
    assert outputs is not None
    torch.testing.assert_close(inputs.double(), real.T @ real / len(real), rtol=1e-5, atol=1e-6)
    assert outputs.shape == (32, 32)
    assert float(torch.linalg.eigvalsh(outputs.double()).min()) > -1e-9
    assert float(outputs.trace()) > 0


def test_labels_of_the_data_are_not_looked_at(task: Path, measured: Path, tmp_path: Path) -> None:
    lines = (task / "reviews.csv").read_text().splitlines()
    texts = ["text", *(line.partition(",")[2] for line in lines[1:])]
    (tmp_path / "texts.csv").write_text("\n".join(texts) + "\n")
    settings = MeasureSettings(examples=24, batch_size=5, fisher=True)
    measure_adapter(
        task / "a",
        data_source(f"{tmp_path / 'texts.csv'}"),
        tmp_path / "again",
        names=[QUERY, DENSE],
        settings=settings,
    )
    assert (tmp_path / "again" / TENSORS_NAME).read_bytes() == (measured / TENSORS_NAME).read_bytes()


def test_the_same_again_gives_the_same_bytes_and_another_seed_others(
    task: Path, measured: Path, tmp_path: Path
) -> None:
    data = data_source(str(task / "reviews.csv"))
    for seed in (0, 1):
        settings = MeasureSettings(examples=24, batch_size=5, fisher=True, seed=seed)
        measure_adapter(task / "a", data, tmp_path / str(seed), names=[QUERY, DENSE], settings=settings)
    assert (tmp_path / "0" / TENSORS_NAME).read_bytes() == (measured / TENSORS_NAME).read_bytes()
    assert (tmp_path / "1" / TENSORS_NAME).read_bytes() != (measured / TENSORS_NAME).read_bytes()


def test_a_bias_has_the_outputs_of_its_layer_and_modules_that_cannot_be_measured_are_told(
    task: Path, tmp_path: Path
) -> None:
    norm = "bert.encoder.layer.0.output.LayerNorm.weight"
    names = [QUERY, f"{QUERY}.bias", norm]
    left = measure_adapter(
        task / "a",
        data_source(str(task / "reviews.csv")),
        tmp_path / "known",
        names=names,
        settings=MeasureSettings(examples=8),
    )
    assert left == [norm]
    known = read_task_statistics(tmp_path / "known")
    assert set(known) == {QUERY, f"{QUERY}.bias"}
    assert torch.equal(known[f"{QUERY}.bias"].outputs, known[QUERY].outputs)  # type: ignore[arg-type]
    assert torch.equal(known[f"{QUERY}.bias"].inputs, torch.ones(1, 1))  # type: ignore[arg-type]
    assert known[f"{QUERY}.bias"].fisher is None


def test_the_fisher_of_a_bias_is_the_diagonal_of_what_is_known_of_its_layer_s_outputs(
    task: Path, tmp_path: Path
) -> None:
    settings = MeasureSettings(examples=8, fisher=True)
    data, names = data_source(str(task / "reviews.csv")), [QUERY, f"{QUERY}.bias"]
    measure_adapter(task / "a", data, tmp_path / "known", names=names, settings=settings)
    known = read_task_statistics(tmp_path / "known")[f"{QUERY}.bias"]
    assert known.fisher is not None
    assert known.outputs is not None
    torch.testing.assert_close(known.fisher, known.outputs.diagonal()[:, None].float())


def test_queries_keys_and_values_share_one_matrix_of_inputs_in_the_file(task: Path, tmp_path: Path) -> None:
    names = [QUERY.replace("query", each) for each in ("query", "key", "value")]
    measure_adapter(
        task / "a",
        data_source(str(task / "reviews.csv")),
        tmp_path / "known",
        names=names,
        settings=MeasureSettings(examples=8),
    )
    tensors = load_file(tmp_path / "known" / TENSORS_NAME)
    assert sum(name.startswith("inputs/") for name in tensors) == 1
    assert sum(name.startswith("outputs/") for name in tensors) == 3


@pytest.mark.parametrize("make", [tiny_regression_config, tiny_language_config], ids=["regression", "language"])
def test_other_tasks_are_told_by_their_adapter(make: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    config = make(tmp_path)
    name = "model.layers.0.self_attn.q_proj" if "llama" in str(config["model"]["path"]) else QUERY
    folder = write_task(tmp_path / "a", config, names=(name,))
    measure_adapter(
        folder,
        data_source(f"{config['data']['train']}:text"),
        tmp_path / "known",
        names=[name],
        settings=MeasureSettings(examples=16),
    )
    known = read_task_statistics(tmp_path / "known")
    assert known[name].inputs is not None
    assert known.provenance["labels"] == "model"


def test_an_adapter_without_a_head_on_a_base_without_one_is_refused(task: Path, tmp_path: Path) -> None:
    shutil.copytree(task / "a", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: each for key, each in load_file(path).items() if "lora" in key}, path, {"format": "pt"})
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    with pytest.raises(UserError, match=r"adapter must bring its head, or the base must, got none for 'classifier"):
        adapted_model(tmp_path / "a")


def test_where_they_come_from_is_said(task: Path, measured: Path) -> None:
    said = read_task_statistics(measured).provenance
    assert said["adapter_hash"] == adapter_hash(task / "a")
    assert said["examples"] == 24
    assert said["seed"] == 0
    assert said["estimators"] == "inputs; outputs; fisher"
    assert len(str(said["base_hash"])) == len(str(said["data_hash"])) == 64


def test_the_hash_of_an_adapter_is_that_of_its_files_alone(task: Path, tmp_path: Path) -> None:
    shutil.copytree(task / "a", tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("changed")
    assert adapter_hash(tmp_path / "a") == adapter_hash(task / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: each + 1 for key, each in load_file(path).items()}, path, {"format": "pt"})
    assert adapter_hash(tmp_path / "a") != adapter_hash(task / "a")


# files


def test_what_was_written_is_read_and_only_when_it_is_asked_for(tmp_path: Path) -> None:
    inputs = torch.eye(3)
    known = {
        "a": ModuleStatistics(inputs=inputs, outputs=torch.ones(2), fisher=torch.ones(2, 3)),
        "b": ModuleStatistics(inputs=inputs),
    }
    write_task_statistics(known, tmp_path, provenance={"seed": 1})
    found = read_task_statistics(tmp_path)
    assert list(found) == ["a", "b"]
    assert found.provenance == {"seed": 1}
    for name, each in known.items():
        for kind in ("inputs", "outputs", "fisher"):
            wanted = getattr(each, kind)
            got = getattr(found[name], kind)
            assert (got is None) == (wanted is None)
            assert wanted is None or torch.equal(got, wanted)
    (tmp_path / TENSORS_NAME).unlink()
    with pytest.raises(UserError, match="statistics must be readable for 'a'"):
        found["a"]


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / JSON_NAME).read_text())
    change(content)
    (folder / JSON_NAME).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format_version=2), "format_version must be 1, got 2"),
        (lambda content: content.update(format_version=True), "format_version must be 1, got True"),
        (lambda content: content.update(more=1), "keys must be format_version, modules and provenance"),
        (lambda content: content.pop("provenance"), "keys must be format_version, modules and provenance"),
        (lambda content: content.update(provenance={"a": [1]}), "provenance must be names and texts or finite numbers"),
        (lambda content: content.update(modules=[]), "modules must be names and names of tensors"),
        (lambda content: content["modules"].update(a={"weight": "weight/a"}), "modules must be names and names of"),
        (lambda content: content["modules"].update(a={"inputs": "outputs/a"}), "modules must be names and names of"),
        (lambda content: content["modules"].update(a={"inputs": "inputs/b"}), "tensors must be those that .* names"),
    ],
)
def test_a_json_that_does_not_belong_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    known = {"a": ModuleStatistics(inputs=torch.eye(3), outputs=torch.eye(2))}
    write_task_statistics(known, tmp_path, provenance={})
    changed(tmp_path, change)
    with pytest.raises(UserError, match=message):
        read_task_statistics(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"inputs/a": torch.ones(3, 2)}, r"inputs must be \(d, d\) or \(d,\), got \(3, 2\) for 'a'"),
        ({"inputs/a": torch.ones(3, dtype=torch.int64)}, "tensors must be floating point, got 'inputs/a'"),
        ({"inputs/a": torch.eye(3), "inputs/b": torch.eye(3)}, "got 'inputs/b' on one side only"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    write_task_statistics({"a": ModuleStatistics(inputs=torch.eye(3))}, tmp_path, provenance={})
    save_file(tensors, tmp_path / TENSORS_NAME)
    with pytest.raises(UserError, match=message):
        read_task_statistics(tmp_path)


def test_values_that_are_not_finite_are_refused_when_they_are_read(tmp_path: Path) -> None:
    write_task_statistics({"a": ModuleStatistics(inputs=torch.eye(3))}, tmp_path, provenance={})
    save_file({"inputs/a": torch.full((3, 3), torch.nan)}, tmp_path / TENSORS_NAME)
    with pytest.raises(UserError, match="statistics must be readable for 'a', got inputs must be finite"):
        read_task_statistics(tmp_path)["a"]


@pytest.mark.parametrize("content", ["", "[]", '{"modules": {}, "modules": {}}', "[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / JSON_NAME).write_text(content)
    with pytest.raises(UserError, match=r"must be JSON|must hold a JSON object|keys must be"):
        read_task_statistics(tmp_path)


def test_a_folder_without_statistics_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"must be a folder with task_statistics\.json.* Make one with flowra statistics"
    ):
        read_task_statistics(tmp_path)
    write_task_statistics({"a": ModuleStatistics(inputs=torch.eye(3))}, tmp_path, provenance={})
    (tmp_path / TENSORS_NAME).write_bytes(b"{}")
    with pytest.raises(UserError, match="must be a whole safetensors file"):
        read_task_statistics(tmp_path)


@pytest.mark.parametrize(
    ("text", "source", "columns"),
    [
        ("a.csv", "a.csv", ("text", None)),
        ("a.csv:review", "a.csv", ("review", None)),
        ("a.csv:premise,hypothesis", "a.csv", ("premise", "hypothesis")),
        ("package://data/a.csv", "package://data/a.csv", ("text", None)),
        ("package://data/a.csv:review", "package://data/a.csv", ("review", None)),
        ("C:\\data\\a.csv", "C:\\data\\a.csv", ("text", None)),
    ],
)
def test_a_source_may_name_its_columns(text: str, source: str, columns: tuple[str, str | None]) -> None:
    found = data_source(text)
    assert (found.train, found.text, found.text_pair) == (source, *columns)


def test_statistics_of_an_adapter_are_those_that_its_merge_reads(task: Path, measured: Path) -> None:
    known = read_task_statistics(measured)
    for name, update in read_adapter(task / "a").updates.items():
        m, n = update.shape
        each = known[name]
        assert [None if one is None else tuple(one.shape) for one in (each.inputs, each.outputs, each.fisher)] == [
            (n, n),
            (m, m),
            (m, n),
        ]
