"""``flowra fuse train`` and ``flowra fuse run``."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from flowra_adapters import attach, save_adapter
from flowra_compose import read_adapter
from flowra_compose.fusion import StaticWeights, fuse
from flowra_pipelines import fuse_generation, fuse_training
from flowra_pipelines.cli import main
from flowra_pipelines.config_sections import DataConfig
from flowra_pipelines.data import load_text_data, tokenise
from flowra_pipelines.fuse_examples import read_examples
from flowra_pipelines.fuse_generation import GenerationSettings, generate, read_prompts
from flowra_pipelines.fuse_setting import FusedSetting, open_fused, open_setting, read_record
from flowra_pipelines.fuse_training import FuseJob, TrainSettings, _real, _scored, train_gates
from flowra_testing.tiny_runs import BAD, FILLER, write_tiny_bert, write_tiny_llama

Here = Callable[..., tuple[int, str, str]]
QUERY, DOWN, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"
SHORT = ("--steps", 10, "--batch-size", 4)


def _adapter(model: torch.nn.Module, folder: Path, ranks: dict[str, int], seed: int, **said: object) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for one in attach(model, ranks, generator=generator).values():
        for parameter in one.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder, **said)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder, two adapters of other layers and ranks, and texts."""
    folder = tmp_path_factory.mktemp("language")
    base = str(write_tiny_llama(folder / "llama"))
    for seed, (name, ranks) in enumerate({"a": {QUERY: 2, DOWN: 3}, "b": {DOWN: 1, UP: 4}}.items()):
        model = AutoModelForCausalLM.from_pretrained(base)
        _adapter(model, folder / name, ranks, seed, base_model_name_or_path=base, task_type="CAUSAL_LM")
    rng = random.Random(0)
    rows = [
        {"text": " ".join(rng.choices(FILLER[:4], k=7)), "answer": " ".join(rng.choices(BAD, k=3))} for _ in range(30)
    ]
    (folder / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def gates(language: Path) -> Path:
    """Gates for them, trained for ten steps."""
    out = language / "gates"
    settings = TrainSettings(steps=10, learning_rate=0.05, bias_learning_rate=0.05)
    job = FuseJob(
        sources=(language / "a", language / "b"), data=str(language / "both.jsonl"), out=out, settings=settings
    )
    train_gates(job)
    return out


def refused(answer: tuple[int, str, str]) -> str:
    """Return the one line of a refusal."""
    code, _, complaint = answer
    assert code == 2, complaint
    assert "Traceback" not in complaint
    (line,) = complaint.strip().splitlines()
    return line


def train(language: Path, out: Path, *options: object) -> list[object]:
    return [
        *("fuse", "train", language / "a", language / "b", "--data", language / "both.jsonl", "--out", out),
        *options,
    ]


def losses(out: Path) -> dict[str, float]:
    found = read_record(out).losses["validation"]
    assert all(each is not None for each in found.values())
    return {title: float(each) for title, each in found.items() if each is not None}


def test_gates_learn_and_the_record_says_what_they_gain(language: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    before = {file: file.read_bytes() for name in ("a", "b", "llama") for file in (language / name).iterdir()}
    code, shown, complaint = here(
        *train(language, out, "--steps", 30, "--learning-rate", 0.05, "--bias-learning-rate", 0.05)
    )
    assert code == 0, complaint
    for title in ("base", "a alone", "b alone", "mean", "sum", "gates"):
        assert title in shown
    assert sorted(file.name for file in out.iterdir()) == ["fuse.json", "gates.json", "gates.safetensors"]
    assert not (tmp_path / "out.partial").exists()
    record, found = read_record(out), losses(out)
    assert found["gates"] < min(found["b alone"], found["mean"])
    assert [step for step, _, _ in record.curve] == list(range(1, 31))
    assert max(rate for *_, rate in record.curve) <= 0.05
    assert list(record.weights) == ["model.layers.0", "model.layers.1"]
    assert [each["name"] for each in record.adapters] == ["a", "b"]
    assert str(tmp_path) not in (out / "fuse.json").read_text(encoding="utf-8").replace(str(language), "")
    assert {file: file.read_bytes() for file in before} == before


def test_base_and_adapters_keep_every_bit_and_nothing_stays_on_the_model(
    language: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[FusedSetting] = []

    def opening(
        sources: Sequence[Path], *, names: Sequence[str] | None, base: str | None, heads_from: str | None
    ) -> FusedSetting:
        opened.append(open_setting(sources, names=names, base=base, heads_from=heads_from))
        return opened[-1]

    monkeypatch.setattr("flowra_pipelines.fuse_training.open_setting", opening)
    assert here(*train(language, tmp_path / "out", *SHORT))[0] == 0
    (setting,) = opened
    fresh = AutoModelForCausalLM.from_pretrained(language / "llama")
    state = setting.model.state_dict()
    assert state.keys() == fresh.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in fresh.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in setting.model.parameters())


def test_the_losses_before_are_those_of_fixed_weights(language: Path, gates: Path) -> None:
    setting = open_setting([language / "a", language / "b"])
    rows = [json.loads(line) for line in (language / "both.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = load_text_data(DataConfig(train=str(language / "both.jsonl")), label=None).test
    assert len(held_out) < len(rows)
    examples = tokenise(held_out, setting.tokenizer, max_length=32)
    for title, weights in {"base": (0.0, 0.0), "a alone": (1.0, 0.0), "mean": (0.5, 0.5), "sum": (1.0, 1.0)}.items():
        total, count = 0.0, 0
        with setting.fused(StaticWeights(weights)), torch.no_grad():
            for index in range(len(examples)):
                loss, targets, _ = setting.losses(setting.collate([examples[index]]))
                total, count = total + float(loss), count + int(targets)
        assert losses(gates)[title] == pytest.approx(total / count, rel=1e-5)


def test_the_average_weights_are_those_at_real_tokens(language: Path, gates: Path) -> None:
    with open_fused(gates) as (setting, fusion, record), torch.no_grad():
        rows = load_text_data(DataConfig(train=str(language / "both.jsonl")), label=None).test
        examples = tokenise(rows, setting.tokenizer, max_length=32)
        with fusion.recording() as seen:
            for index in range(len(examples)):
                setting.losses(setting.collate([examples[index]]))
        for place, calls in seen.weights.items():
            wanted = torch.cat([each.flatten(0, -2) for each in calls]).mean(0).tolist()
            assert record.weights[place] == pytest.approx(wanted, rel=1e-4)


def test_a_response_alone_is_learned(language: Path) -> None:
    setting = open_setting([language / "a", language / "b"])
    data = f"{language / 'both.jsonl'}:text,answer"
    examples, _, _ = read_examples(setting, data, validation=0.1, max_length=64, label="label", labels=None)
    batch = setting.collate([examples[0], examples[1]])
    assert "response" not in batch
    words = setting.tokenizer.convert_ids_to_tokens(batch["labels"][0][batch["labels"][0] != -100].tolist())
    assert len(words) == 4
    assert set(words[:3]) <= set(BAD)
    assert words[3] == "[EOS]"


@pytest.mark.parametrize(
    "options",
    [
        ("--level", "step", "--initial", "uniform", "--gate-input", "normed"),
        ("--level", "module", "--top-k", 1, "--rank", 1),
        ("--primary", "a", "--temperature", 2, "--entropy-penalty", 0.1, "--names", "a, c"),
    ],
)
def test_options_reach_the_gates(language: Path, tmp_path: Path, here: Here, options: tuple[object, ...]) -> None:
    out = tmp_path / "out"
    code, _, complaint = here(*train(language, out, *SHORT, *options))
    assert code == 0, complaint
    said = json.loads((out / "gates.json").read_text(encoding="utf-8"))["options"]
    for key, value in zip(options[::2], options[1::2], strict=True):
        name = str(key).removeprefix("--").replace("-", "_")
        if name in said and name != "primary":
            assert said[name] == value
    if "--primary" in options:
        assert said["primary"] == 0
        assert [each["name"] for each in read_record(out).adapters] == ["a", "c"]


def test_biases_learn_ten_times_as_fast_unless_told_otherwise(language: Path, tmp_path: Path, here: Here) -> None:
    """With ε this small against the gradient, Adam's first step is as long as its rate, whatever the gradient."""
    moved = {}
    for name, options in {"default": (), "said": ("--bias-learning-rate", 0.002)}.items():
        assert here(*train(language, tmp_path / name, "--steps", 10, "--learning-rate", 0.001, *options))[0] == 0
        values = load_file(tmp_path / name / "gates.safetensors")
        biases = [value - torch.tensor([-0.5, 0.5]) for key, value in values.items() if key.endswith("bias")]
        moved[name] = max(float(each.abs().max()) for each in biases)
    assert 0 < moved["said"] <= 10 * 0.002
    assert moved["default"] == pytest.approx(5 * moved["said"], rel=0.3)


def test_an_entropy_penalty_makes_gates_decide(language: Path, tmp_path: Path, here: Here) -> None:
    entropies = {}
    for penalty in (0, 5):
        out = tmp_path / str(penalty)
        rates = ("--learning-rate", 0.05, "--bias-learning-rate", 0.05)
        options = ("--steps", 20, *rates, "--gate-input", "normed", "--entropy-penalty", penalty)
        assert here(*train(language, out, *options))[0] == 0
        with open_fused(out) as (setting, fusion, _), torch.no_grad(), fusion.recording() as record:
            setting.model(torch.arange(3, 15)[None])
        entropies[penalty] = float(record.entropy())
    assert entropies[5] < 0.8 * entropies[0]


KILLED = """
import time
from flowra_pipelines import fuse_training
from flowra_pipelines.cli import main
from flowra_pipelines.fuse_partial import PartialTraining
save = PartialTraining.save
def slow(self, state, curve):
    save(self, state, curve)
    print("saved", state.step, flush=True)
    if state.step >= 15:
        time.sleep(60)
PartialTraining.save = slow
fuse_training.code_hash = lambda: "code"
main()
"""


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_to_the_same_bytes(
    language: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowra_pipelines.fuse_training.code_hash", lambda: "code")  # it may be edited meanwhile
    rates = ("--learning-rate", 0.05, "--bias-learning-rate", 0.05)
    options = ("--steps", 21, *rates, "--entropy-penalty", 0.01)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert here(*train(language, whole, *options))[0] == 0
    command = [sys.executable, "-c", KILLED, *map(str, train(language, out, *options))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as killed:
        assert killed.stdout is not None
        for line in killed.stdout:
            if line.startswith("saved 15"):
                break
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [each.name for each in sorted((tmp_path / "out.partial").glob("state*"))] == ["state-00000015"]
    code, shown, complaint = here(*train(language, out, *options))
    assert code == 0, complaint
    assert "continuing after step 15 of 21" in shown
    for name in ("gates.safetensors", "gates.json", "fuse.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (tmp_path / "out.partial").exists()


def test_a_training_of_other_inputs_is_begun_anew(
    language: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fuse_training, "train_phase", stop)
        patch.setattr(sys, "argv", ["flowra", *map(str, train(language, tmp_path / "out", *SHORT))])
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main()
    assert (tmp_path / "out.partial" / "before.json").is_file()
    code, shown, _ = here(*train(language, tmp_path / "out", *SHORT, "--seed", 1))
    assert code == 0
    assert "starting over" in shown
    assert "of other settings" in shown


def test_written_text_is_that_of_the_likeliest_tokens_and_prompts_of_a_batch_are_independent(
    language: Path, gates: Path, tmp_path: Path, here: Here
) -> None:
    prompts = ["the film is", "a story with the cast and plot", "warm"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    out = tmp_path / "written.jsonl"
    options = ("--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 6, "--out", out)
    code, _, complaint = here("fuse", "run", gates, *options)
    assert code == 0, complaint
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [each["prompt"] for each in written] == prompts
    with open_fused(gates) as (setting, _, _), torch.no_grad():
        for each in written:
            ids = setting.tokenizer(each["prompt"], return_tensors="pt")["input_ids"]
            start = ids.shape[1]
            for _ in range(6):
                ids = torch.cat([ids, setting.model(ids).logits[:, -1:].argmax(-1)], dim=1)
                if int(ids[0, -1]) == 2:
                    break
            assert each["text"] == setting.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_fixed_weights_need_no_gates_and_one_adapter_is_that_adapter(
    language: Path, gates: Path, tmp_path: Path, here: Here
) -> None:
    options = ("--prompt", "the film is", "--max-new-tokens", 5, "--static", "1,0", "--out")
    assert here("fuse", "run", gates, *options, tmp_path / "with.jsonl")[0] == 0
    assert here("fuse", "run", language / "a", language / "b", *options, tmp_path / "without.jsonl")[0] == 0
    assert (tmp_path / "with.jsonl").read_bytes() == (tmp_path / "without.jsonl").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(language / "llama").eval()
    setting = open_setting([language / "a"])
    with fuse(model, {"a": read_adapter(language / "a")}, StaticWeights((1.0,))):
        ids = setting.tokenizer("the film is", return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    said = json.loads((tmp_path / "with.jsonl").read_text(encoding="utf-8"))
    assert said["text"] == setting.tokenizer.decode(wanted, skip_special_tokens=True)


@pytest.mark.parametrize("options", [("--beams", 2), ("--temperature", 0.7, "--seed", 3)])
def test_beams_and_samples_are_the_same_each_time(gates: Path, here: Here, options: tuple[object, ...]) -> None:
    first = here("fuse", "run", gates, "--prompt", "the film", "--max-new-tokens", 5, *options)
    assert first[0] == 0, first[2]
    assert "the film" in first[1]
    assert here("fuse", "run", gates, "--prompt", "the film", "--max-new-tokens", 5, *options) == first


def test_prompts_may_be_a_column_of_a_table(language: Path, gates: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out.jsonl"
    options = ("--prompts", f"{language / 'both.jsonl'}:answer", "--max-new-tokens", 2, "--out", out)
    assert here("fuse", "run", gates, *options)[0] == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 30


def test_what_is_printed_is_the_text_itself(gates: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "film[the:key:is]  # [bold]:warning:[/bold]\n\treturn b"
    monkeypatch.setattr(fuse_generation, "generate", lambda *_: ["d[lo:key:hi]\n\tx = 1 "])
    code, shown, complaint = here("fuse", "run", gates, "--prompt", prompt, "--max-new-tokens", 2)
    assert code == 0, complaint
    assert shown.endswith(f"{prompt}\nd[lo:key:hi]\n\tx = 1 \n")


def test_prompts_of_a_file_are_its_lines_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Q: one\u2028more \nAnswer: \n", encoding="utf-8")
    assert read_prompts(str(file)) == ["Q: one\u2028more ", "Answer: "]
    file.write_text("one\n\ntwo", encoding="utf-8")
    assert read_prompts(str(file)) == ["one", "", "two"]


def test_a_tokenizer_without_padding_writes_as_one_with(language: Path, gates: Path) -> None:
    settings = GenerationSettings(max_new_tokens=3)
    with open_fused(gates) as (setting, _, _):
        wanted = generate(setting, ["the film is", "warm"], settings)
        setting.tokenizer.pad_token = None
        assert setting.tokenizer.pad_token_id is None
        assert generate(setting, ["the film is", "warm"], settings) == wanted


def test_a_folder_of_the_user_s_beside_out_is_left_alone(language: Path, tmp_path: Path, here: Here) -> None:
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert "must be free for a training that is under way" in refused(here(*train(language, tmp_path / "out", *SHORT)))
    assert mine.read_text() == "mine"
    (tmp_path / "other.partial").write_text("mine")
    assert "must be free for a training that is under way" in refused(
        here(*train(language, tmp_path / "other", *SHORT))
    )


def test_a_model_that_counts_positions_from_its_padding_has_fewer(language: Path) -> None:
    setting = open_setting([language / "a", language / "b"])
    assert setting.context == 32
    config = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=32, pad_token_id=1,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    limit = replace(setting, model=model).context
    assert limit == 30
    assert model(torch.full((1, limit), 5)).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, limit + 1), 5))


def test_gates_and_adapters_may_move_together(language: Path, gates: Path, tmp_path: Path, here: Here) -> None:
    for name in ("a", "b", "llama", "gates"):
        shutil.copytree(language / name, tmp_path / "moved" / name)
    code, _, complaint = here(
        "fuse", "run", tmp_path / "moved" / "gates", "--prompt", "the film", "--max-new-tokens", 2
    )
    assert code == 0, complaint
    shutil.move(tmp_path / "moved" / "a", tmp_path / "moved" / "c")
    line = refused(here("fuse", "run", tmp_path / "moved" / "gates", "--prompt", "the film"))
    assert "adapters must be where they were at training" in line
    again = (tmp_path / "moved" / "c", tmp_path / "moved" / "b")
    code, _, complaint = here(
        "fuse", "run", tmp_path / "moved" / "gates", *again, "--prompt", "the film", "--max-new-tokens", 2
    )
    assert code == 0, complaint


def test_what_cannot_be_run_is_one_line(language: Path, gates: Path, tmp_path: Path, here: Here) -> None:
    def run(*arguments: object) -> str:
        return refused(here("fuse", "run", gates, *arguments))

    assert "prompts must hold text, got an empty one, number 2 of 2" in run("--prompt", "a", "--prompt", " ")
    assert "32 positions for 28 new tokens, got 6 tokens in number 1" in run(
        "--prompt", "the film is a story with", "--max-new-tokens", 28
    )
    assert "prompts must be given" in run()
    assert "other updates of" in run(language / "b", language / "a", "--prompt", "a")
    assert "adapters must be the 2 that the gates know, a, b, got 1" in run(language / "a", "--prompt", "a")
    assert "static must be numbers" in run("--prompt", "a", "--static", "x")
    assert "routing must be for the 2 adapters given" in run("--prompt", "a", "--max-new-tokens", 1, "--static", "1")
    other = write_tiny_llama(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    model.lm_head.weight.data += 1
    model.save_pretrained(other)
    assert "base must be the one that the gates were trained on" in run("--base", other, "--prompt", "a")
    assert "temperature must be 0, for the likeliest token, or 0.01 to 100" in run(
        "--prompt", "a", "--temperature", 1e-50
    )
    assert here("fuse", "run", gates, "--prompt", "a", "--temperature", 1, "--seed", 10**30)[0] == 2
    assert "gates must be a folder that flowra fuse train wrote" in refused(
        here("fuse", "run", language / "a", "--prompt", "a")
    )


def test_what_cannot_be_trained_is_one_line(language: Path, gates: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")

    def run(*adapters: Path, data: Path = language / "both.jsonl", options: tuple[object, ...] = ()) -> str:
        return refused(here("fuse", "train", *adapters, "--data", data, "--out", out, *options))

    both = language / "a", language / "b"
    assert "adapters must be at least two, got 1" in run(language / "a")
    assert "data must hold rows, got none" in run(*both, data=tmp_path / "empty.jsonl")
    assert "primary must be one of the adapters, a, b, got c" in run(*both, options=("--primary", "c"))
    assert "names must be distinct" in run(*both, options=("--names", "a,a"))
    assert "rank must be at most 2" in run(*both, options=("--rank", 3))
    assert "temperature must be" in run(*both, options=("--temperature", 0))
    assert "validation must be a file, or a share" in run(*both, options=("--validation", 2))
    assert "learning rate must be a finite number > 0, got 0" in run(*both, options=("--learning-rate", 0))
    assert "bias learning rate must be a finite number > 0, got nan" in run(
        *both, options=("--bias-learning-rate", "nan")
    )
    assert "entropy penalty must be a finite number ≥ 0, got inf" in run(*both, options=("--entropy-penalty", "inf"))
    assert "primary must be left out with a uniform start" in run(
        *both, options=("--initial", "uniform", "--primary", "a")
    )
    assert "names must be distinct and not empty" in run(*both, options=("--names", ",b"))
    assert "heads-from must be an adapter that brings trained modules, got a" in run(
        *both, options=("--heads-from", "a")
    )
    for options in (("--label", "answer"), ("--labels", "x,y")):
        assert "label and labels must be left out with a language model" in run(*both, options=options)
    other = write_tiny_llama(tmp_path / "other")
    moved = tmp_path / "c"
    shutil.copytree(language / "b", moved)
    config = json.loads((moved / "adapter_config.json").read_text(encoding="utf-8"))
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
    assert "adapters must be of one base" in run(language / "a", moved)
    assert not out.exists()
    assert "which is an input" in refused(
        here("fuse", "train", *both, "--data", language / "both.jsonl", "--out", both[0])
    )
    assert "with adapter_config.json" in refused(
        here("fuse", "train", *both, "--data", language / "both.jsonl", "--out", moved)
    )


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """An encoder, two adapters with heads, and labelled texts."""
    base = str(write_tiny_bert(tmp_path / "bert"))
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        ranks = {f"bert.encoder.layer.{seed}.attention.self.query": 2, "bert.encoder.layer.0.output.dense": 1}
        said = {"base_model_name_or_path": base, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
        _adapter(model, tmp_path / name, ranks, seed, **said)
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(FILLER, k=6)), "label": "no" if index % 2 else "yes"} for index in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def test_gates_of_a_classifier_use_one_head_and_write_no_text(reviews: Path, here: Here) -> None:
    command = ("fuse", "train", reviews / "a", reviews / "b", "--data", reviews / "rows.jsonl")
    command = (*command, "--out", reviews / "gates", *SHORT)
    assert "modules_to_save must be equal" in refused(here(*command))
    code, _, complaint = here(*command, "--heads-from", reviews / "b", "--labels", "yes,no")
    assert code == 0, complaint
    record = read_record(reviews / "gates")
    assert record.heads_from == "b"
    assert record.task == "SEQ_CLS"
    with open_fused(reviews / "gates") as (setting, _, _):
        head = load_file(reviews / "b" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
        assert torch.equal(setting.model.classifier.weight, head)  # type: ignore[union-attr]
    line = refused(here("fuse", "run", reviews / "gates", "--prompt", "a"))
    assert "adapters must be of a causal language model to write text, got SEQ_CLS" in line


def test_help_is_fast_and_lists_the_commands(here: Here) -> None:
    started = time.perf_counter()
    code, shown, _ = here("fuse", "--help")
    assert code == 0
    assert time.perf_counter() - started < 5
    assert all(name in shown for name in ("train", "run", "inspect"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2 where it must be 1"),
        ({"settings": {}}, "settings with a max_length of None"),
        ({"settings": {"max_length": -1}}, "settings with a max_length of -1"),
        ({"losses": []}, "losses: "),
        ({"losses": {"training": {"gates": "low"}}}, "losses.training.gates: "),
        ({"base": 5}, "base: "),
        ({"adapters": [{"name": "a"}]}, "adapters without name and folder"),
        ({"curve": [[1, 2.0]]}, "curve.0.2: "),
        ({"weights": {"x": "abc"}}, "weights.x: "),
        ({"colour": "red"}, "the unknown key 'colour'"),
    ],
    ids=str,
)
def test_a_damaged_record_is_refused_in_one_line(
    change: dict[str, Any], message: str, gates: Path, tmp_path: Path, here: Here
) -> None:
    shutil.copytree(gates, tmp_path / "gates")
    content = json.loads((gates / "fuse.json").read_text(encoding="utf-8"))
    (tmp_path / "gates" / "fuse.json").write_text(json.dumps({**content, **change}), encoding="utf-8")
    said = refused(here("fuse", "run", tmp_path / "gates", "--prompt", "the film"))
    assert f"gates must be a folder that flowra fuse train wrote, got {message}" in said


def test_what_the_base_s_authors_like_does_not_change_the_likeliest_tokens(gates: Path) -> None:
    settings = GenerationSettings(max_new_tokens=8)
    with open_fused(gates) as (setting, _, _):
        plain = generate(setting, ["the film is"], settings)
        liked: Any = setting.model
        liked.generation_config.repetition_penalty = 50.0
        liked.generation_config.no_repeat_ngram_size = 1
        assert generate(setting, ["the film is"], settings) == plain
        assert liked.generation_config.repetition_penalty == 50.0


def test_a_folder_is_no_file_for_text_and_gates_may_be_written_where_one_is(
    language: Path, gates: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(here("fuse", "run", gates, "--prompt", "the film", "--out", tmp_path))
    assert "out must be a file of JSON lines, got the folder" in said
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert here(*train(language, Path(), *SHORT))[0] == 0
    assert sorted(each.name for each in (tmp_path / "here").iterdir()) == [
        "fuse.json",
        "gates.json",
        "gates.safetensors",
    ]
    assert [each.name for each in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("without", ["a", "b"])
def test_an_adapter_that_says_no_task_has_that_of_the_other(without: str, language: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(language / name, tmp_path / name)
    file = tmp_path / without / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": None}))
    assert open_setting([tmp_path / "a", tmp_path / "b"]).task.peft_type == "CAUSAL_LM"


def test_padding_counts_in_no_average_where_modules_see_batch_and_positions_as_one() -> None:
    weights, mask = torch.rand(2, 3, 4), torch.tensor([[1, 1, 1], [1, 0, 0]])
    real = _real(weights, mask)
    assert real.shape == (4, 4)
    assert torch.equal(_real(weights.flatten(0, 1), mask), real)
    assert torch.equal(_real(weights[:, 0], mask), weights[:, 0])


def test_the_best_fixed_weights_may_be_searched_and_stand_beside_the_gates(
    language: Path, tmp_path: Path, here: Here
) -> None:
    code, shown, complaint = here(*train(language, tmp_path / "out", *SHORT, "--fixed-trials", 14))
    assert code == 0, complaint
    found = losses(tmp_path / "out")
    (title,) = [each for each in found if each.startswith("fixed at ")]
    assert title in shown
    assert len([line for line in shown.splitlines() if "fixed weights, trial" in line]) >= 14
    weights = [float(each) for each in title.removeprefix("fixed at ").split(",")]
    setting = open_setting([language / "a", language / "b"])
    training, validation, _ = read_examples(
        setting, str(language / "both.jsonl"), validation=0.2, max_length=512, label="label", labels=None
    )

    def loss(weights: Sequence[float], examples: Any) -> float:  # noqa: ANN401 - examples of a data set
        with setting.fused(StaticWeights(weights)):
            found, _ = _scored(setting, examples, 4, "")
        assert found is not None
        return found

    assert found[title] == pytest.approx(loss(weights, validation), rel=1e-3)
    assert loss(weights, training) <= min(loss(each, training) for each in ((1, 0), (0, 1), (0.5, 0.5), (1, 1))) + 1e-3
    said = refused(here(*train(language, tmp_path / "few", *SHORT, "--fixed-trials", 3)))
    assert "fixed-trials must be 0 or at least 4 with 2 adapters, got 3" in said
