"""Regression from files to files: one number for each text, by the same six stages."""

import json
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator, ValidationError
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, PreTrainedModel

from flowra_adapters import load_adapter, read_checkpoint
from flowra_pipelines.config_sections import ModelConfig
from flowra_pipelines.data import Spread, TextData
from flowra_pipelines.errors import UserError
from flowra_pipelines.results_table import results_as_markdown
from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.stages.evaluate import score
from flowra_pipelines.stages.record import STAGES, StageResult, run_stage
from flowra_pipelines.stages.setting import base_model, load_setting
from flowra_pipelines.stages.table import WORK
from flowra_pipelines.statistics import paired_t_p_value, r_squared, spearman
from flowra_pipelines.tasks import TASKS, load_model
from flowra_pipelines.training import build_optimizer
from flowra_testing.tiny_runs import tiny_config, tiny_regression_config, write_tiny_bert, write_tiny_llama

SCHEMA = Path(__file__).parents[2] / "docs" / "formats" / "metrics.schema.json"


def unlogged(result: StageResult, folder: Path) -> None:
    return None


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run; not to be changed. Its numbers lie around 50."""
    torch.set_num_threads(1)
    made = load_config(tiny_regression_config(tmp_path_factory.mktemp("regression"), zero=50))
    for name in STAGES:
        run_stage(name, WORK[name], made, log=unlogged)
    return made


def metrics_of(config: RunConfig) -> dict:  # type: ignore[type-arg]
    content = json.loads((config.folder / "evaluate" / "metrics.json").read_text())
    assert isinstance(content, dict)
    return content


def answers(model: nn.Module, config: RunConfig) -> Tensor:
    setting = load_setting(config)
    batch = setting.collate([setting.test[index] for index in range(16)])
    assert batch.pop("labels").dtype == torch.float32
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    assert isinstance(logits, Tensor)
    return logits


def some_data(mean: float = 50.0) -> TextData:
    spread = Spread(mean=mean, deviation=2.0, low=mean - 3, high=mean + 3)
    return TextData(train=[], test=[], labels=(), numbers=spread, left_out={})


# the run


@pytest.mark.slow
def test_the_words_that_decide_the_number_are_learned(config: RunConfig) -> None:
    row = metrics_of(config)["rows"]["flowra"]
    assert row["accuracy"] is None
    assert row["r2"]["low"] > 0.2
    assert row["spearman"]["low"] > 0.4
    assert row["loss"]["high"] < 4.5  # the variance of the labels is about 5


@pytest.mark.slow
def test_the_file_follows_its_schema_and_the_scores_give_its_numbers_again(config: RunConfig) -> None:
    metrics = metrics_of(config)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(metrics)
    setting = load_setting(config)
    tensors = load_file(config.folder / "evaluate" / "scores.safetensors")
    assert tensors["expected"].tolist() == [pytest.approx(row["label"]) for row in setting.data.test]
    for name, row in metrics["rows"].items():
        errors = tensors[f"{name}/predicted"] - tensors["expected"]
        torch.testing.assert_close(errors.square(), tensors[f"{name}/loss"])
        assert row["loss"]["value"] == pytest.approx(float(errors.double().square().mean()), rel=1e-5)
        assert f"{name}/correct" not in tensors


@pytest.mark.slow
def test_the_schema_wants_the_measures_of_regression_here_and_nowhere_else(config: RunConfig) -> None:
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))
    metrics = metrics_of(config)
    with pytest.raises(ValidationError):
        validator.validate({**metrics, "task": "sequence_classification"})
    del metrics["rows"]["base"]["spearman"]
    with pytest.raises(ValidationError, match="'spearman' is a required property"):
        validator.validate(metrics)


@pytest.mark.slow
def test_the_verdict_is_about_the_squared_error_and_paired(config: RunConfig) -> None:
    metrics = metrics_of(config)
    setting = load_setting(config)
    model = base_model(config, setting)
    load_adapter(model, config.folder / "merge" / "adapter")
    mine = score(model, config, setting, "scoring")
    tensors = load_file(config.folder / "evaluate" / "scores.safetensors")
    torch.testing.assert_close(mine.loss, tensors["flowra/loss"])
    rows = metrics["rows"]
    assert rows["flowra"]["r2"]["value"] == pytest.approx(r_squared(mine).value, rel=1e-4)  # type: ignore[union-attr]
    assert rows["flowra"]["spearman"]["value"] == pytest.approx(spearman(mine).value, rel=1e-4)  # type: ignore[union-attr]
    for (name, p_value), sentence in zip(metrics["p_values_against_flowra"].items(), metrics["verdicts"], strict=True):
        other = mine.__class__(loss=tensors[f"{name}/loss"], targets=mine.targets)
        assert p_value == pytest.approx(paired_t_p_value(mine, other), rel=1e-3)
        difference = rows["flowra"]["loss"]["value"] - rows[name]["loss"]["value"]
        amount = f"{difference:+.4g} in mean squared error"
        if p_value >= 0.05:
            assert sentence == f"Tie: Flowra against {rows[name]['title']}, {amount}, p = {p_value:.3f} (paired)."
        else:
            word = "better" if difference < 0 else "worse"
            assert sentence == f"Flowra is {word} than {rows[name]['title']}: {amount}, p = {p_value:.2g} (paired)."
    assert any(sentence.startswith("Flowra is better than base, trained head: -") for sentence in metrics["verdicts"])


@pytest.mark.slow
def test_the_table_has_the_measures_of_regression(config: RunConfig) -> None:
    heading = results_as_markdown(config).splitlines()[2]
    assert heading == (
        "|  | mean squared error (95 % interval) | R² (95 % interval) | Spearman's ρ (95 % interval)"
        " | parameters | peak | training |"
    )


@pytest.mark.slow
def test_the_export_gives_peft_the_numbers_on_a_plain_regression_base(config: RunConfig) -> None:
    ours = base_model(config, load_setting(config))
    load_adapter(ours, config.folder / "refine" / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(
        config.model.path, num_labels=1, problem_type="regression"
    )
    theirs = PeftModel.from_pretrained(base, config.folder / "merge" / "adapter")
    torch.testing.assert_close(answers(theirs, config), answers(ours, config), rtol=1e-5, atol=1e-4)
    exported = json.loads((config.folder / "merge" / "adapter" / "adapter_config.json").read_text())
    assert exported["task_type"] == "SEQ_CLS"
    assert exported["modules_to_save"] == ["classifier"]


@pytest.mark.slow
def test_the_merged_model_is_a_regression_model_of_transformers(config: RunConfig) -> None:
    ours = base_model(config, load_setting(config))
    load_adapter(ours, config.folder / "refine" / "adapter")
    alone = AutoModelForSequenceClassification.from_pretrained(config.folder / "merge" / "model")
    assert (alone.config.num_labels, alone.config.problem_type) == (1, "regression")
    torch.testing.assert_close(answers(alone, config), answers(ours, config), rtol=1e-4, atol=1e-3)
    setting = load_setting(config)
    batch = setting.collate([setting.test[index] for index in range(16)])
    losses, _, _ = setting.task.losses(alone, batch)
    with torch.no_grad():
        torch.testing.assert_close(alone(**batch).loss, losses.mean().detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_heads_and_adapters_are_in_the_labels_own_unit_at_every_stage(config: RunConfig) -> None:
    mean = load_setting(config).data.numbers
    assert mean is not None
    for stage in ("calibrate", "train", "refine", "merge"):
        head = read_checkpoint(config.folder / stage / "adapter").modules_to_save
        assert float(head["classifier.bias"]) == pytest.approx(mean.mean, abs=3 * mean.deviation)


# the start of the head


def test_a_new_head_starts_at_the_mean_of_the_training_labels(tmp_path: Path) -> None:
    config = load_config(tiny_regression_config(tmp_path, zero=1000))
    setting = load_setting(config)
    assert setting.data.numbers is not None
    head = base_model(config, setting).get_submodule("classifier")
    bias = float(head.state_dict()["bias"])
    assert bias == pytest.approx(setting.data.numbers.mean)
    assert abs(bias - 1000) < 1
    first = score(base_model(config, setting), config, setting, "scoring")
    value = r_squared(first)
    assert value is not None
    assert abs(value.value) < 0.1  # as good as the mean, before any step


def test_the_offset_of_the_labels_does_not_change_what_is_learned(tmp_path: Path) -> None:
    found = []
    for zero in (0, 1000):
        folder = tmp_path / str(zero)
        folder.mkdir()
        config = load_config(tiny_regression_config(folder, zero=zero) | {"training": {"steps": 20, "batch_size": 8}})
        run_stage("calibrate", WORK["calibrate"], config, log=unlogged)
        found.append(read_checkpoint(config.folder / "calibrate" / "adapter").factors)
    for name, (a, b) in found[0].items():
        torch.testing.assert_close(found[1][name][0], a, rtol=0, atol=1e-3)
        torch.testing.assert_close(found[1][name][1], b, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_unit_of_the_labels_does_not_change_what_is_learned(tmp_path: Path) -> None:
    curves: list[list[float]] = []

    def keep_losses(result: StageResult, folder: Path) -> None:
        curves.append([value for name, value, _ in result.metrics if name == "train/loss"])

    for unit in (1, 100):
        folder = tmp_path / str(unit)
        folder.mkdir()
        content = tiny_regression_config(folder, unit=unit, zero=5 * unit)
        content["training"]["max_grad_norm"] = 1e9  # a limit in the unit of the loss
        run_stage("calibrate", WORK["calibrate"], load_config(content), log=keep_losses)
    one, hundred = curves
    assert len(one) == 16
    assert [loss / 100**2 for loss in hundred] == pytest.approx(one, rel=5e-3)


def test_the_last_layer_of_a_head_learns_in_the_labels_unit(tmp_path: Path) -> None:
    config = load_config(tiny_regression_config(tmp_path, unit=10))
    setting = load_setting(config)
    model = base_model(config, setting)
    heads = setting.task.heads(model)
    optimizer = build_optimizer(model, config.training, heads=heads, label_unit=setting.data.label_unit)
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    for name, parameter in model.named_parameters():
        factor = setting.data.label_unit if name.startswith("classifier.") else 1.0
        assert rates[id(parameter)] == pytest.approx(0.02 * factor)
    assert setting.data.label_unit > 10


def test_a_head_that_the_checkpoint_brings_stays_as_it_is(tmp_path: Path) -> None:
    write_tiny_bert(tmp_path)
    brought = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    with torch.no_grad():
        brought.classifier.bias.fill_(7.0)
    brought.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), task="regression")
    model = load_model(config, data=some_data(), seed=0)
    torch.testing.assert_close(model.get_submodule("classifier").state_dict(), brought.classifier.state_dict())


def test_the_head_of_a_decoder_has_no_bias_to_start_from(tmp_path: Path) -> None:
    config = ModelConfig(path=str(write_tiny_llama(tmp_path)), task="regression")
    model = load_model(config, data=some_data(), seed=0)
    assert TASKS["regression"].heads(model) == ["score"]
    assert {name: tuple(each.shape) for name, each in model.get_submodule("score").named_parameters()} == {
        "weight": (1, 32)
    }
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


@pytest.mark.parametrize("write", [write_tiny_bert, write_tiny_llama], ids=["encoder", "decoder"])
def test_the_loss_is_the_one_that_transformers_trains_on(tmp_path: Path, write: object) -> None:
    assert callable(write)
    model: PreTrainedModel = load_model(
        ModelConfig(path=str(write(tmp_path)), task="regression"), data=some_data(), seed=0
    )
    task = TASKS["regression"]
    rows = [
        {"input_ids": list(range(3, 3 + length)), "attention_mask": [1] * length, "labels": 50.0 + length}
        for length in (4, 6, 2)
    ]
    batch = task.collate(rows, {"input_ids": 0})
    losses, targets, predicted = task.losses(model.eval(), batch)
    assert predicted is not None
    torch.testing.assert_close(losses, (predicted - batch["labels"]).square())
    torch.testing.assert_close(losses.mean(), model(**batch).loss)
    assert targets.tolist() == [1, 1, 1]
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in model.get_submodule(task.heads(model)[0]).parameters())


# what a user may get wrong


def test_labels_to_keep_have_no_effect_and_are_refused(tmp_path: Path) -> None:
    content = tiny_config(tmp_path, model={"path": "m", "task": "regression"})
    with pytest.raises(UserError, match=r"data\.labels has no effect with regression: labels are numbers"):
        load_config(content)


def test_classes_that_are_words_are_refused_as_numbers(tmp_path: Path) -> None:
    content = tiny_config(tmp_path, model={"path": str(tmp_path / "bert"), "task": "regression"})
    del content["data"]["labels"]
    with pytest.raises(UserError, match=r"column .category. must hold numbers within ±1e\+18, got .fresh.; in"):
        load_setting(load_config(content))
