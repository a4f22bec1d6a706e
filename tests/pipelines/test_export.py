"""``flowra export``: what it writes is what its reader reads, and the check finds where it is not."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from flowra_adapters import attach, load_adapter, save_adapter
from flowra_pipelines import export_check
from flowra_pipelines.errors import UserError
from flowra_pipelines.export import adapter_folder, export_adapter
from flowra_pipelines.export_check import CheckFailed
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import seeded
from flowra_testing.tiny_runs import tiny_config, tiny_language_config, write_tiny_bert, write_tiny_llama
from flowra_testing.vllm_rules import read_as_vllm, serve

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
Run = Callable[..., tuple[int, str, str]]
IDS = torch.tensor([[4, 5, 6, 7, 3]])
RANKS = {"q_proj": 3, "v_proj": 2, "model.layers.1.mlp.down_proj": 5, "model.layers.0.self_attn.v_proj": 0}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("export") / "llama")


def logits(model: nn.Module, inputs: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found = model.eval()(inputs).logits
    assert isinstance(found, Tensor)
    return found


def saved_llama(
    llama: Path, folder: Path, *, method: str = "lora", ranks: Mapping[str, int] = RANKS
) -> tuple[Path, Tensor]:
    """Save a trained adapter, and return its folder and the logits it gives."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    for seed, one in enumerate(attach(model, ranks, method=method, scaling=1.5).values()):
        randomise(one, seed=seed)
        if method == "dora" and one.rank > 0:
            one.lora_magnitude.data.abs_()
    save_adapter(model, folder, base_model_name_or_path=str(llama), task_type="CAUSAL_LM")
    return folder, logits(model)


@pytest.mark.parametrize("method", ["lora", "svd", "flora", "dora"])
def test_for_peft_the_real_peft_gives_our_logits(llama: Path, tmp_path: Path, here: Run, method: str) -> None:
    folder, expected = saved_llama(llama, tmp_path / "adapter", method=method)
    code, shown, complaint = here("export", folder, "--for", "peft", "--check", "--rank-step", 4)
    assert code == 0, complaint
    written = tmp_path / "adapter-peft"
    assert sorted(path.name for path in written.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), written)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
    config = json.loads((written / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {4, 8}
    assert "2–5" in shown
    assert "4–8" in shown
    assert "exact" in shown
    said = "Left out, of rank 0: 1 (model.layers.0.self_attn.v_proj)" in shown
    assert said == (folder / "flowra_config.json").exists()  # PEFT's own files do not know of such a module
    assert "Checked: peft differs from Flowra by" in shown
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_for_vllm_a_reader_with_its_rules_gives_our_logits(llama: Path, tmp_path: Path, here: Run) -> None:
    folder, expected = saved_llama(llama, tmp_path / "adapter")
    code, shown, complaint = here("export", folder, "--for", "vllm", "--check", "--to", tmp_path / "out")
    assert code == 0, complaint
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert serve(model, read_as_vllm(tmp_path / "out", modules=MODULES, max_lora_rank=8)) == 4
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert "--max-lora-rank 8" in shown
    assert "2–5" in shown


def test_dora_for_vllm_is_decomposed_exactly_or_cut_with_the_error(llama: Path, tmp_path: Path, here: Run) -> None:
    folder, expected = saved_llama(llama, tmp_path / "adapter", method="dora")
    code, shown, complaint = here("export", folder, "--for", "vllm", "--check")
    assert code == 0, complaint
    assert "--max-lora-rank 32" in shown
    model = AutoModelForCausalLM.from_pretrained(llama)
    serve(model, read_as_vllm(tmp_path / "adapter-vllm", modules=MODULES, max_lora_rank=32))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    cut = export_adapter(folder, "vllm", to=tmp_path / "cut", rank=8)
    (kind,) = cut.kinds
    assert set(kind.written) == {8}
    assert 0.01 < kind.error < 1
    code, shown, complaint = here("export", folder, "--for", "vllm", "--rank", 8, "--to", tmp_path / "no", "--check")
    assert code == 1
    assert "vllm must give Flowra's answer within 1e-04, got a difference of" in complaint
    assert len(complaint.strip().splitlines()) == 1
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("method", ["lora", "flora", "dora"])
def test_for_kohya_lycoris_gives_our_logits(llama: Path, tmp_path: Path, here: Run, method: str) -> None:
    folder, _ = saved_llama(llama, tmp_path / "adapter", method=method)
    code, shown, complaint = here("export", folder, "--for", "kohya", "--check", "--prefix", "lora_te")
    assert code == 0, complaint
    tensors = load_file(tmp_path / "adapter-kohya.safetensors")
    assert "lora_te_model_layers_1_mlp_down_proj.lora_up.weight" in tensors
    assert "Checked: LyCORIS differs" in shown
    assert "Modules Loaded" not in shown
    assert str(tmp_path / "adapter-kohya.safetensors") in shown


@pytest.mark.parametrize("consumer", ["peft", "kohya"])
def test_a_plan_of_several_kinds_on_a_convolutional_model(tmp_path: Path, here: Run, consumer: str) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3, image_size=16)
    with seeded(0):
        ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    model = ResNetForImageClassification.from_pretrained(tmp_path / "resnet")
    for seed, one in enumerate(attach(model, {"all-conv": 2}, method="polymorphic", scaling=1.0).values()):
        randomise(one, seed=seed)
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "resnet"))
    assert (tmp_path / "adapter" / "flowra_config.json").exists()
    code, shown, complaint = here("export", tmp_path / "adapter", "--for", consumer, "--check")
    assert code == 0, complaint
    assert "TuckerConv" in shown
    assert "LoRA" in shown


def test_heads_go_to_peft_and_are_refused_elsewhere(tmp_path: Path, here: Run) -> None:
    base = write_tiny_bert(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    for one in attach(model, {"query": 2}, modules_to_save=["classifier"]).values():
        randomise(one)
    save_adapter(
        model,
        tmp_path / "adapter",
        modules_to_save=["classifier"],
        base_model_name_or_path=str(base),
        task_type="SEQ_CLS",
    )
    code, shown, complaint = here("export", tmp_path / "adapter", "--for", "peft", "--check")
    assert code == 0, complaint
    assert "Trained in full, and in it: classifier" in shown
    for consumer in ("vllm", "kohya"):
        code, _, complaint = here("export", tmp_path / "adapter", "--for", consumer)
        assert code == 2
        assert "'classifier'" in complaint
        assert len(complaint.strip().splitlines()) == 1


def test_gpt2_whose_weights_lie_transposed(tmp_path: Path, here: Run) -> None:
    with seeded(0):
        GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    for one in attach(model, {"c_attn:q": 2, "c_attn:v": 3}).values():
        randomise(one)
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "gpt2"), task_type="CAUSAL_LM")
    for consumer in ("peft", "vllm"):
        code, _, complaint = here("export", tmp_path / "adapter", "--for", consumer, "--check")
        assert code == 0, complaint
    code, _, complaint = here("export", tmp_path / "adapter", "--for", "kohya")
    assert code == 2
    assert "LyCORIS does not adapt such a layer (Conv1D)" in complaint


def test_an_adapter_that_changes_nothing_fails_the_check(llama: Path, tmp_path: Path, here: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    attach(model, {"q_proj": 2})
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(llama), task_type="CAUSAL_LM")
    code, _, complaint = here("export", tmp_path / "adapter", "--for", "peft", "--check")
    assert code == 1
    assert complaint.strip().splitlines() == [
        "flowra: adapter must change the model's answer, got no change beyond rounding. Train longer."
        " Nothing was written."
    ]
    assert not (tmp_path / "adapter-peft").exists()
    assert here("export", tmp_path / "adapter", "--for", "peft")[0] == 0


@pytest.mark.parametrize("consumer", ["peft", "vllm", "kohya"])
@pytest.mark.parametrize("damage", ["scaled", "gone"])
def test_the_check_finds_an_export_that_is_wrong(llama: Path, tmp_path: Path, consumer: str, damage: str) -> None:
    folder, _ = saved_llama(llama, tmp_path / "adapter", ranks={"q_proj": 3, "v_proj": 3})
    done = export_adapter(folder, consumer, to=tmp_path / ("x.safetensors" if consumer == "kohya" else "x"))  # type: ignore[arg-type]
    file = done.path if consumer == "kohya" else done.path / "adapter_model.safetensors"
    tensors = load_file(file)
    last = [key for key in tensors if "layers.1" in key.replace("_", ".") and ("lora_B" in key or "lora_up" in key)][-1]
    tensors[last] = tensors[last] * (1.01 if damage == "scaled" else 0.0)
    save_file(tensors, file)
    ours, fresh = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoModelForCausalLM.from_pretrained(llama).eval()
    load_adapter(ours, folder)
    with pytest.raises(CheckFailed, match=f"{consumer} must give Flowra's answer within"):
        export_check.compare(ours, fresh, done.path, consumer=consumer, prefix="lycoris")


def test_a_file_that_its_reader_cannot_read_fails_the_check(llama: Path, tmp_path: Path) -> None:
    folder, _ = saved_llama(llama, tmp_path / "adapter")
    done = export_adapter(folder, "peft")
    config = json.loads((done.path / "adapter_config.json").read_text())
    (done.path / "adapter_config.json").write_text(json.dumps({**config, "r": -1, "rank_pattern": {}}))
    ours, fresh = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoModelForCausalLM.from_pretrained(llama).eval()
    load_adapter(ours, folder)
    with pytest.raises(CheckFailed, match="peft must read the export, got ValueError"):
        export_check.compare(ours, fresh, done.path, consumer="peft", prefix="lycoris")


def test_the_final_adapter_of_a_run_is_found(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    with pytest.raises(UserError, match="a run that has come to refine or merge, got"):
        adapter_folder(run)
    for stage in ("refine", "merge"):
        (run / stage / "adapter").mkdir(parents=True)
        (run / stage / "adapter" / "adapter_config.json").write_text("{}")
        assert adapter_folder(run) == run / stage / "adapter"
    assert adapter_folder(run / "refine") == run / "refine" / "adapter"
    assert adapter_folder(run / "refine" / "adapter") == run / "refine" / "adapter"
    config = tmp_path / "run.yaml"
    config.write_text(f"name: mine\noutput_root: {tmp_path / 'runs'}\nmodel: {{path: x}}\ndata: {{train: y}}\n")
    assert adapter_folder(config) == run / "merge" / "adapter"


def test_mistakes_are_one_line_and_exit_code_2(llama: Path, tmp_path: Path, here: Run) -> None:
    folder, _ = saved_llama(llama, tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for arguments, message in (
        ([tmp_path / "nothing", "--for", "peft"], "adapter must be a folder with"),
        ([folder, "--for", "peft", "--to", folder], "another folder than the adapter's own"),
        ([folder, "--for", "peft", "--to", tmp_path / "full"], "a new folder or an earlier export"),
        ([folder, "--for", "kohya", "--to", tmp_path / "x"], "must be a .safetensors file for kohya"),
        ([folder, "--for", "peft", "--base", str(tmp_path / "none" / "x" / "y")], "file must exist"),
        ([folder, "--for", "peft", "--base", str(folder)], "base must be a model that transformers can load"),
        ([folder, "--for", "kohya", "--prefix", "a.b"], "prefixes must be letters"),
    ):
        code, _, complaint = here("export", *arguments)
        assert (code, len(complaint.strip().splitlines())) == (2, 1), complaint
        assert message in complaint
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert here("export", folder, "--for", "gguf")[0] == 2


def test_a_base_that_does_not_fit_is_said_in_one_line(llama: Path, tmp_path: Path, here: Run) -> None:
    folder, _ = saved_llama(llama, tmp_path / "adapter")
    config = AutoConfig.from_pretrained(llama)
    config.hidden_size, config.num_hidden_layers = 16, 1
    with seeded(0):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    code, _, complaint = here("export", folder, "--for", "peft", "--base", tmp_path / "other")
    assert code == 2
    assert "adapter must" in complaint
    assert len(complaint.strip().splitlines()) == 1


def test_an_adapter_without_a_base_asks_for_one(llama: Path, tmp_path: Path, here: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    randomise(attach(model, {"model.layers.0.self_attn.q_proj": 2})["model.layers.0.self_attn.q_proj"])
    save_adapter(model, tmp_path / "adapter", task_type="CAUSAL_LM")
    code, _, complaint = here("export", tmp_path / "adapter", "--for", "peft")
    assert code == 2
    assert "Give --base." in complaint
    assert here("export", tmp_path / "adapter", "--for", "peft", "--base", llama, "--check")[0] == 0
    written = json.loads((tmp_path / "adapter-peft" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(llama)


def test_a_judge_that_is_not_installed_is_said_before_anything_is_written(
    llama: Path, tmp_path: Path, here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved_llama(llama, tmp_path / "adapter")
    monkeypatch.setattr(export_check, "find_spec", lambda name: None)
    code, _, complaint = here("export", folder, "--for", "kohya", "--check")
    assert code == 2
    assert "lycoris-lora must be installed to check an export for kohya" in complaint
    assert "flowra-pipelines[export]" in complaint
    assert here("export", folder, "--for", "kohya")[0] == 0


def test_an_earlier_export_is_written_over(llama: Path, tmp_path: Path, here: Run) -> None:
    folder, _ = saved_llama(llama, tmp_path / "adapter")
    assert here("export", folder, "--for", "peft")[0] == 0
    before = (tmp_path / "adapter-peft" / "adapter_model.safetensors").read_bytes()
    assert here("export", folder, "--for", "peft")[0] == 0
    assert (tmp_path / "adapter-peft" / "adapter_model.safetensors").read_bytes() == before


def test_an_update_of_a_tied_embedding_leaves_the_output_layer_alone(tmp_path: Path, here: Run) -> None:
    with seeded(0):
        config = GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=True)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    for one in attach(model, {"transformer.wte": 2, "c_attn": 2}).values():
        randomise(one)
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "gpt2"), task_type="CAUSAL_LM")
    for consumer in ("peft", "vllm"):
        code, _, complaint = here("export", tmp_path / "adapter", "--for", consumer, "--check")
        assert code == 0, complaint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "consumers"),
    [(tiny_language_config, ("peft", "vllm", "kohya")), (tiny_config, ("peft",))],
    ids=["llama", "bert"],
)
def test_a_run_is_exported_by_its_configuration(
    tmp_path: Path, here: Run, made: Callable[[Path], object], consumers: tuple[str, ...]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(made(tmp_path)))
    code, _, complaint = here("run", config, "--no-prefect")
    assert code == 0, complaint
    for consumer in consumers:
        code, shown, complaint = here("export", config, "--for", consumer, "--check")
        assert code == 0, complaint
        assert f"adapter-{consumer}" in shown
    stage = next(tmp_path.glob("runs/*/merge"))
    assert {path.name for path in stage.parent.glob("adapter-*")} == {
        f"adapter-{each}" + (".safetensors" if each == "kohya" else "") for each in consumers
    }
    code, _, complaint = here("export", config, "--for", "peft", "--to", stage / "mine")
    assert code == 2
    assert "outside a run's stages" in complaint


def test_help_teaches(here: Run) -> None:
    code, shown, _ = here("export", "--help")
    assert code == 0
    for word in ("--for", "--rank-step", "--to", "--base", "--check", "lora_unet", "Exit code 1"):
        assert word in shown
