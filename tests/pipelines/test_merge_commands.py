"""``flowra merge`` of adapters, and ``flowra statistics``."""

import csv
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from flowra_adapters import attach, save_adapter
from flowra_compose import RULES, read_adapter
from flowra_compose.interference_files import read_interference
from flowra_compose.learned_coefficients import prediction_entropy
from flowra_pipelines.config_sections import MergeConfig
from flowra_pipelines.merge_rules import MERGE_RULES
from flowra_pipelines.run_config import load_config
from flowra_pipelines.stages.setting import base_model, load_setting
from flowra_pipelines.statistics_files import read_task_statistics
from flowra_testing.tiny_runs import tiny_config, write_tiny_llama

Here = Callable[..., tuple[int, str, str]]
QUERY, VALUE = (f"bert.encoder.layer.0.attention.self.{each}" for each in ("query", "value"))
DENSE = "bert.encoder.layer.1.output.dense"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, reviews, and three adapters of other layers and ranks, each with a head of its own."""
    folder = tmp_path_factory.mktemp("tasks")
    run = load_config(tiny_config(folder))
    setting = load_setting(run)
    for seed, (name, ranks) in enumerate(
        {
            "a": {QUERY: 2, VALUE: 1},
            "b": {QUERY: 3, DENSE: 2},
            "c": {VALUE: 2},
        }.items()
    ):
        generator = torch.Generator().manual_seed(seed)
        model = base_model(run, setting)
        for one in attach(model, ranks, generator=generator).values():
            for parameter in one.parameters():
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        for parameter in model.classifier.parameters():  # type: ignore[union-attr]
            parameter.data = torch.randn(parameter.shape, generator=generator)
        save_adapter(
            model,
            folder / name,
            modules_to_save=["classifier"],
            base_model_name_or_path=run.model.path,
            task_type="SEQ_CLS",
        )
    return folder


def refused(answer: tuple[int, str, str]) -> str:
    """Return the one line of a refusal."""
    code, _, complaint = answer
    assert code == 2, complaint
    assert "Traceback" not in complaint
    (line,) = complaint.strip().splitlines()
    return line


def test_the_rules_that_help_lists_are_those_that_there_are() -> None:
    assert set(MERGE_RULES) == set(RULES)
    for name, text in MERGE_RULES.items():
        row = RULES[name]
        assert set(text.options) == set(row.options), name
        assert text.needs == row.needs, name
        assert text.truncates == row.truncates, name
        assert set(MergeConfig.model_fields) >= set(row.options)


def test_help_lists_the_rules_and_examples(here: Here) -> None:
    code, shown, _ = here("merge", "--help")
    assert code == 0
    for name in RULES:
        assert name in shown
    assert "flowra merge runs/a runs/b" in shown


def test_two_adapters_become_one_that_peft_loads(tasks: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    code, shown, complaint = here(
        "merge", tasks / "a", tasks / "b", "--method", "cat", "--heads-from", tasks / "a", "--out", out
    )
    assert code == 0, complaint
    assert "Rule: cat, as asked for" in shown
    assert "Modules: 3, of rank 1 to 5" in shown
    assert "Recommendation:" in shown
    first, second, merged = (read_adapter(each) for each in (tasks / "a", tasks / "b", out))
    wanted = first.updates[QUERY].delta_weight() + second.updates[QUERY].delta_weight()
    torch.testing.assert_close(merged.updates[QUERY].delta_weight(), wanted)
    assert torch.equal(merged.modules_to_save["classifier.weight"], first.modules_to_save["classifier.weight"])
    base = AutoModelForSequenceClassification.from_pretrained(tasks / "bert", num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(out))
    assert loaded.peft_config["default"].rank_pattern
    assert read_interference(out).tasks == ("a", "b")
    assert read_interference(out).settings == {"rule": "cat"}


def test_report_and_page_say_how_it_was_merged(tasks: Path, tmp_path: Path, here: Here) -> None:
    asked = ("--method", "dare_ties", "--density", "0.25", "--seed", "3", "--rank", "2")
    files = ("--heads-from", tasks / "a", "--out", tmp_path / "out", "--report", tmp_path / "page.html")
    assert here("merge", tasks / "a", tasks / "b", *asked, *files)[0] == 0
    said = {"rule": "dare_ties", "density": 0.25, "seed": 3, "rank": 2}
    assert read_interference(tmp_path / "out").settings == said
    assert "<dd>dare_ties, density 0.25, seed 3, rank 2</dd>" in (tmp_path / "page.html").read_text()


def test_dora_and_trained_biases_of_peft_are_merged_beside_their_base(tasks: Path, tmp_path: Path, here: Here) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tasks / "bert", num_labels=2)
    plain = {name: each.detach().clone() for name, each in base.named_parameters()}
    config = LoraConfig(r=2, use_dora=True, bias="all", target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "dora")
    trained = dict(model.merge_and_unload().named_parameters())
    out = tmp_path / "out"
    command = ("merge", tmp_path / "dora", tasks / "b", "--method", "cat", "--heads-from", tasks / "b", "--out", out)
    code, _, complaint = here(*command, "--base", tasks / "bert")
    assert code == 0, complaint
    merged, other = read_adapter(out, plain), read_adapter(tasks / "b")
    wanted = trained[f"{QUERY}.weight"] - plain[f"{QUERY}.weight"] + other.updates[QUERY].delta_weight()
    torch.testing.assert_close(merged.updates[QUERY].delta_weight(), wanted, atol=1e-5, rtol=0)
    bias = f"{QUERY}.bias"
    torch.testing.assert_close(merged.updates[bias].delta_weight()[:, 0], trained[bias] - plain[bias])


def test_weights_count(tasks: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    options = ("--method", "cat", "--weights", "1,-0.5", "--heads-from", tasks / "b", "--out", out)
    assert here("merge", tasks / "a", tasks / "b", *options)[0] == 0
    first, second, merged = (read_adapter(each).updates[QUERY] for each in (tasks / "a", tasks / "b", out))
    torch.testing.assert_close(merged.delta_weight(), first.delta_weight() - 0.5 * second.delta_weight())


@pytest.fixture(scope="module")
def unsureness(tasks: Path) -> Callable[[Path], float]:
    """How unsure the base with an update is of both tasks' answers, on the reviews, each with its own head."""
    model = AutoModelForSequenceClassification.from_pretrained(tasks / "bert", num_labels=2).eval()
    plain = {name: each.detach().clone() for name, each in model.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(tasks / "bert")
    texts = [row["text"] for row in csv.DictReader((tasks / "reviews.csv").read_text().splitlines())][:24]

    def entropy(folder: Path) -> float:
        total = 0.0
        for head in "ab":
            changed = dict(plain)
            for name, update in read_adapter(folder).updates.items():
                changed[f"{name}.weight"] = plain[f"{name}.weight"] + update.delta_weight()
            changed |= read_adapter(tasks / head).modules_to_save
            with torch.no_grad():
                inputs = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128))
                total += float(prediction_entropy(torch.func.functional_call(model, changed, (), inputs).logits)) / 2
        return total

    return entropy


def test_weights_may_be_learned(tasks: Path, tmp_path: Path, here: Here, unsureness: Callable[[Path], float]) -> None:
    reviews = tasks / "reviews.csv"
    shared = ("--heads-from", tasks / "a", "--data", reviews, "--data", reviews, "--examples", "24", "--json")
    arguments = ("merge", tasks / "a", tasks / "b", *shared, "--weights")
    code, shown, complaint = here(*arguments, "learned", "--steps", "60", "--out", tmp_path / "learned")
    assert code == 0, complaint
    said = json.loads(shown[shown.index("\n{") :])
    assert (said["rule"], said["why"]) == ("task_arithmetic", "the sum that the weights are learned for")
    adapters = [read_adapter(tasks / each).updates for each in "ab"]
    weights = [each["weight"] for each in said["tasks"]]
    assert [set(each) for each in weights] == [{QUERY, VALUE}, {QUERY, DENSE}]
    assert len({value for each in weights for value in each.values()}) == 4
    for name, merged in read_adapter(tmp_path / "learned").updates.items():
        wanted = sum(
            weight[name] * adapter[name].delta_weight()
            for weight, adapter in zip(weights, adapters, strict=True)
            if name in adapter
        )
        torch.testing.assert_close(merged.delta_weight(), wanted)
    assert here(*arguments, "0.5,0.5", "--method", "cat", "--out", tmp_path / "mean")[0] == 0
    assert unsureness(tmp_path / "learned") < unsureness(tmp_path / "mean")

    code, shown, _ = here(*arguments, "learned:task", "--steps", "20", "--out", tmp_path / "by-task")
    assert code == 0
    said = json.loads(shown[shown.index("\n{") :])
    assert all(isinstance(each["weight"], float) and each["weight"] != 0.5 for each in said["tasks"])


def test_without_statistics_the_rule_is_the_free_one_and_says_so(tasks: Path, tmp_path: Path, here: Here) -> None:
    code, shown, _ = here("merge", tasks / "a", tasks / "b", "--heads-from", tasks / "a", "--out", tmp_path / "out")
    assert code == 0
    assert "Rule: orth, the default without statistics" in shown


def test_measured_on_the_spot_it_is_flow_and_as_with_statistics_made_before(
    tasks: Path, tmp_path: Path, here: Here
) -> None:
    reviews = tasks / "reviews.csv"
    shared = ("--heads-from", tasks / "a")
    data = ("--data", reviews, "--data", reviews, "--examples", "24")
    code, shown, complaint = here("merge", tasks / "a", tasks / "b", *shared, *data, "--out", tmp_path / "spot")
    assert code == 0, complaint
    assert "Rule: flow, the default with statistics" in shown
    assert "predicted loss" in shown
    for one, other in ("ab", "ba"):
        code, shown, complaint = here(
            "statistics",
            tasks / one,
            *("--data", reviews, "--examples", "24", "--with", tasks / other, "--out", tmp_path / f"of-{one}"),
        )
        assert code == 0, complaint
        assert "3 modules, 24 inputs" in shown
    known = ("--statistics", tmp_path / "of-a", "--statistics", tmp_path / "of-b")
    assert here("merge", tasks / "a", tasks / "b", *shared, *known, "--out", tmp_path / "before")[0] == 0
    spot, before = ((tmp_path / each / "adapter_model.safetensors").read_bytes() for each in ("spot", "before"))
    assert spot == before
    said = refused(
        here("merge", tasks / "b", tasks / "a", "--heads-from", tasks / "a", *known, "--out", tmp_path / "mixed")
    )
    assert "statistics must be of the adapter in" in said
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("budget", ["300", "1.2kB", "like {a}", "same as {a}", "like r=1 on q,v", "1%"])
def test_a_budget_may_be_said_in_many_ways(budget: str, tasks: Path, tmp_path: Path, here: Here) -> None:
    options = ["--budget", budget.format(a=tasks / "a"), "--heads-from", str(tasks / "a"), "--method", "cat"]
    base = ["--base", str(tasks / "bert")] if budget.endswith("%") else []
    out = tmp_path / "out"
    code, shown, complaint = here("merge", tasks / "a", tasks / "b", *options, *base, "--out", out)
    assert code == 0, complaint
    parameters = sum(each.parameters for each in read_adapter(out).updates.values())
    largest = {"like r=1 on q,v": 128, "like {a}": 192, "same as {a}": 192, "1%": 400}.get(budget, 300)
    assert 0 < parameters <= largest
    assert "Cut: at most" in shown


def test_a_report_is_a_page_and_json_is_for_programs(tasks: Path, tmp_path: Path, here: Here) -> None:
    page = tmp_path / "report.html"
    options = ("--method", "ties", "--density", "0.5", "--rank", "2", "--heads-from", tasks / "a")
    code, shown, complaint = here(*(
        "merge",
        tasks / "a",
        tasks / "b",
        *options,
        "--out",
        tmp_path / "out",
        "--report",
        page,
        "--json",
    ))
    assert code == 0, complaint
    content = json.loads(shown[shown.index("{") :])
    assert content["rule"] == "ties"
    assert [each["name"] for each in content["tasks"]] == ["a", "b"]
    assert set(content["modules"]) == {QUERY, VALUE, DENSE}
    assert all(each["rank"] <= 2 and 0 <= each["loss"] < 1 for each in content["modules"].values())
    assert content["recommendation"]["advice"] in ("merge", "fuse", "keep apart")
    assert "<html" in page.read_text()


def test_a_merge_may_be_logged_to_mlflow(
    tasks: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("merge", tasks / "a", tasks / "c", "--method", "ties", "--rank", 2, "--heads-from", tasks / "a")
    code, shown, complaint = here(*command, "--out", "out", "--track")
    assert code == 0, complaint
    (identity,) = [line.split()[2].rstrip(".") for line in shown.splitlines() if line.startswith("Logged: run")]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    run = client.get_run(identity)
    assert run.info.status == "FINISHED"
    assert run.data.params["rule"] == "ties"
    assert run.data.params["rank"] == "2"
    children = f"tags.mlflow.parentRunId = '{identity}'"
    (child,) = client.search_runs([run.info.experiment_id], children)
    assert {"interference/projection/a", "interference/projection/c", "merge/parameters"} <= child.data.metrics.keys()
    assert child.data.tags["summary.recommendation"]
    logged = {each.path for each in client.list_artifacts(child.info.run_id)}
    assert {"interference.json", "interference.html", "plots"} <= logged


def test_an_earlier_result_is_replaced_and_anything_else_is_left(tasks: Path, tmp_path: Path, here: Here) -> None:
    arguments = ("merge", tasks / "a", tasks / "c", "--method", "cat", "--heads-from", tasks / "a")
    assert here(*arguments, "--out", tmp_path / "out")[0] == 0
    assert here(*arguments, "--weights", "2,1", "--out", tmp_path / "out")[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "with notes.txt. Give --out" in refused(here(*arguments, "--out", tmp_path / "out"))
    assert "which is an input" in refused(here(*arguments, "--out", tasks / "a"))


def test_an_adapter_that_no_merge_has_written_is_not_written_over(tasks: Path, tmp_path: Path, here: Here) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(tasks / "b", mine)
    before = {each.name: each.read_bytes() for each in mine.iterdir()}
    command = ("merge", tasks / "a", tasks / "c", "--method", "cat", "--heads-from", tasks / "a", "--out", mine)
    said = refused(here(*command))
    assert "out must be a new folder or an earlier result" in said
    assert before == {each.name: each.read_bytes() for each in mine.iterdir()}


@pytest.fixture
def biased(tasks: Path, tmp_path: Path) -> Path:
    """PEFT's LoRA on the queries, which moves their biases, too."""
    base = AutoModelForSequenceClassification.from_pretrained(tasks / "bert", num_labels=2)
    config = LoraConfig(r=2, lora_bias=True, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes its own biases for incomplete tensors
        model.save_pretrained(tmp_path / "biased")
    return tmp_path / "biased"


def test_biases_that_only_some_modules_have_are_counted_there_alone(
    biased: Path, tasks: Path, tmp_path: Path, here: Here
) -> None:
    command = ("merge", biased, tasks / "b", "--method", "cat", "--heads-from", tasks / "b", "--base", tasks / "bert")
    code, shown, complaint = here(*command, "--out", tmp_path / "out", "--json")
    assert code == 0, complaint
    content = json.loads(shown[shown.index("{") :])
    merged = {name for folder in (biased, tasks / "b") for name in read_adapter(folder).updates}
    assert set(content["modules"]) == merged
    assert f"{QUERY}.bias" in merged
    assert f"{DENSE}.bias" not in merged
    assert content["parameters"] == sum(each["parameters"] for each in content["modules"].values())
    limited = (*command, "--out", tmp_path / "limited", "--budget", 300, "--json")
    code, shown, complaint = here(*limited)
    assert code == 0, complaint
    assert json.loads(shown[shown.index("{") :])["parameters"] <= 300


def test_the_rule_fisher_merges_trained_biases(biased: Path, tasks: Path, tmp_path: Path, here: Here) -> None:
    data = [part for _ in range(2) for part in ("--data", tasks / "reviews.csv")]
    command = ("merge", biased, tasks / "b", "--method", "fisher", *data, "--examples", 8, "--heads-from", tasks / "b")
    code, _, complaint = here(*command, "--base", tasks / "bert", "--out", tmp_path / "out")
    assert code == 0, complaint
    assert read_adapter(tmp_path / "out").updates[f"{QUERY}.bias"].delta_weight().abs().max() > 0


def test_an_adapted_output_layer_finds_its_weight_under_the_name_it_is_tied_to(tmp_path: Path, here: Here) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31, n_positions=16))
    base.save_pretrained(tmp_path / "base")
    for name in ("a", "b"):
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        wanted = LoraConfig(r=2, target_modules=["attn.c_attn", "lm_head"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is tied, and that the output layer is no Conv1D
            adapted = get_peft_model(model, wanted)
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter += 0.1 * torch.randn(parameter.shape)
            adapted.save_pretrained(tmp_path / name, save_embedding_layers=True)
    command = ("merge", tmp_path / "a", tmp_path / "b", "--method", "cat", "--base", tmp_path / "base")
    code, _, complaint = here(*command, "--out", tmp_path / "out")
    assert code == 0, complaint
    assert set(read_adapter(tmp_path / "out").updates) == {"transformer.h.0.attn.c_attn", "lm_head"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}", "{b}", "--method", "tie"], "got 'tie'. Nearest: 'ties'"),
        (
            ["{a}", "{b}", "--method", "cat", "--density", "0.5"],
            "density must be left out with the rule 'cat', got 0.5",
        ),
        (["{a}", "{b}", "--method", "ties", "--density", "2"], "density must be in (0, 1], got 2.0"),
        (["{a}", "{b}", "--method", "ties", "--seed", "1"], "seed must be left out with the rule 'ties', got 1"),
        (["{a}", "{b}", "--method", "truncated_svd"], "truncation must be given with the rule 'truncated_svd'"),
        (["{a}", "{b}", "--method", "flow"], "statistics must be given for the rule 'flow', got none"),
        (["{a}", "{b}", "--method", "cat"], "Give --heads-from ADAPTER to keep those of one"),
        (["{a}", "{b}", "--weights", "1"], "weights must be one for each adapter, got 1 for 2"),
        (["{a}", "{b}", "--weights", "1,x"], "weights must be numbers with commas between, or learned, got '1,x'"),
        (["{a}", "{b}", "--weights", "learned"], "data must be given where weights are learned, got none"),
        (["{a}", "{b}", "--weights", "learned:rank"], "weights must be numbers with commas between, or learned, got"),
        (
            ["{a}", "{b}", "--weights", "learned", "--method", "ties", "--data", "x", "--data", "x"],
            "method must be task_arithmetic, cat or truncated_svd with learned weights, which are those of a sum",
        ),
        (["{a}", "{b}", "--steps", "9"], "steps must be left out unless weights are learned, got 9"),
        (["{a}", "{b}", "--data", "{a}"], "data must be one for each adapter, in their order, got 1 for 2"),
        (["{a}", "{b}", "--statistics", "{a}", "--statistics", "{b}"], "a folder with task_statistics.json, got"),
        (["{a}", "{b}", "--heads-from", "{c}"], "heads-from must be one of the adapters"),
        (["{a}", "{b}", "--budget", "much"], "budget must be like"),
        (["{a}", "{b}", "--budget", "1%"], "budget must be a number of parameters where no base is given, got '1%'"),
        (["{a}", "{b}", "--report", "report.pdf"], "report must be a path that ends in .html, got report.pdf"),
        (["{a}", "nowhere"], "adapter must be a folder with"),
        (["{a}", "{b}", "--set", "seed=1"], "--set and --force must be left out with adapters"),
        (["{a}", "run.yaml"], "a YAML file must stand alone, for the stage merge of its run, got 2 arguments"),
        (
            ["run.yaml"],
            "--out must be left out with a YAML file, whose section merge says how. Change a key with --set",
        ),
        (["{a}", "{b}", "--method", "cat", "--examples", "9"], "--examples must be left out without --data"),
        (["{a}", "{b}", "--method", "cat", "--batch-size", "9"], "--batch-size must be left out without --data"),
        (["{a}", "{b}", "--method", "cat", "--budget", "0"], "budget must be"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, tasks: Path, tmp_path: Path, here: Here) -> None:
    given = [each.format(a=tasks / "a", b=tasks / "b", c=tasks / "c") for each in arguments]
    out = tmp_path / "out"
    said = refused(here("merge", *given, "--out", out))
    assert message in said
    assert not out.exists()


@pytest.mark.parametrize("outputs", [1, 3])
def test_weights_are_learned_where_there_are_classes(outputs: int, tasks: Path, tmp_path: Path, here: Here) -> None:
    """Three classes beside two are well; a number is not."""
    model = AutoModelForSequenceClassification.from_pretrained(tasks / "bert", num_labels=outputs)
    attach(model, {QUERY: 1}, generator=torch.Generator().manual_seed(0))
    save_adapter(
        model,
        tmp_path / "other",
        modules_to_save=["classifier"],
        base_model_name_or_path=str(tasks / "bert"),
        task_type="SEQ_CLS",
    )
    reviews = tasks / "reviews.csv"
    options = ("--weights", "learned", "--steps", "2", "--examples", "8", "--data", reviews, "--data", reviews)
    for order in ((tmp_path / "other", tasks / "a"), (tasks / "a", tmp_path / "other")):
        answer = here("merge", *order, *options, "--heads-from", tasks / "a", "--out", tmp_path / "out")
        if outputs == 1:
            assert "--weights 1,0.5" in refused(answer)
            assert not (tmp_path / "out").exists()
        else:
            assert answer[0] == 0, answer[2]


def test_adapters_of_different_bases_are_refused(tasks: Path, tmp_path: Path, here: Here) -> None:
    shutil.copytree(tasks / "b", tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    write_tiny_llama(tmp_path / "llama")
    changed = {**config, "base_model_name_or_path": str(tmp_path / "llama")}
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(changed))
    said = refused(
        here(
            "merge",
            tasks / "a",
            tmp_path / "b",
            "--method",
            "cat",
            "--heads-from",
            tasks / "a",
            "--out",
            tmp_path / "o",
        )
    )
    assert "base_model_name_or_path must be the same in all adapters" in said
    assert said.endswith("If it is one base under two names, give it: --base.")


@pytest.mark.parametrize("method", ["flora", "svd"])
def test_adapters_in_flowra_s_own_files_are_merged_as_their_export(
    method: str, tasks: Path, tmp_path: Path, here: Here
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tasks / "bert", num_labels=2)
    (one,) = attach(model, {QUERY: 2}, method=method, generator=torch.Generator().manual_seed(0)).values()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    wanted = one.delta_weight().detach()
    save_adapter(
        model,
        tmp_path / "own",
        modules_to_save=["classifier"],
        base_model_name_or_path=str(tasks / "bert"),
        task_type="SEQ_CLS",
    )
    assert (tmp_path / "own" / "flowra_config.json").is_file()
    out, reviews = tmp_path / "out", tasks / "reviews.csv"
    command = (
        "merge",
        tmp_path / "own",
        tasks / "b",
        "--method",
        "cat",
        "--heads-from",
        tmp_path / "own",
        "--out",
        out,
    )
    code, shown, complaint = here(*command, "--data", reviews, "--data", reviews, "--examples", "8")
    assert code == 0, complaint
    assert "own" in shown
    merged, other = read_adapter(out), read_adapter(tasks / "b")
    torch.testing.assert_close(
        merged.updates[QUERY].delta_weight(), wanted + other.updates[QUERY].delta_weight(), atol=1e-5, rtol=1e-4
    )


def test_a_base_may_have_two_names(tasks: Path, tmp_path: Path, here: Here) -> None:
    shutil.copytree(tasks / "b", tmp_path / "b")
    file = tmp_path / "b" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "some/bert"}))
    command = ("merge", tasks / "a", tmp_path / "b", "--method", "cat", "--heads-from", tasks / "a")
    code, _, complaint = here(*command, "--base", tasks / "bert", "--out", tmp_path / "out")
    assert code == 0, complaint
    assert read_adapter(tmp_path / "out").base_model_name_or_path == str(tasks / "bert")


def test_statistics_of_a_run_need_its_file_alone(tmp_path: Path, tasks: Path, here: Here) -> None:
    config = tiny_config(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(tasks / "a", tmp_path / "runs" / "tiny" / "merge" / "adapter")
    code, shown, complaint = here("statistics", tmp_path / "run.yaml", "--out", tmp_path / "known", "--examples", "16")
    assert code == 0, complaint
    assert "2 modules, 16 inputs" in shown
    assert set(read_task_statistics(tmp_path / "known")) == {QUERY, VALUE}
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    for arguments, message in (
        ((tmp_path / "run.yaml", "--data", "x.csv"), "data and base must be left out with a YAML file"),
        ((tasks / "a",), "data must be given with an adapter, got none"),
        ((tasks / "a", "--data", tmp_path / "none.csv"), "file must exist"),
    ):
        assert message in refused(here("statistics", *arguments, "--out", tmp_path / "other"))
    taken = here("statistics", tasks / "a", "--data", tasks / "reviews.csv", "--out", tmp_path / "taken")
    assert "out must be a new folder or one with statistics" in refused(taken)
