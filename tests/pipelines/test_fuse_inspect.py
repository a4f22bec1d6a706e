"""``flowra fuse inspect``: what gates do on texts, as numbers, pictures and a page that needs nothing else."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flowra_adapters import attach, save_adapter
from flowra_compose.fusion import (
    FailureSign,
    GateInspection,
    GateOptions,
    Gates,
    TextWeights,
    fuse,
    gates_for,
    write_gates,
)
from flowra_compose.fusion.gates import Level
from flowra_pipelines.figure_style import FAINT, GAP, INK
from flowra_pipelines.fuse_inspection import FILES, InspectionJob, inspect_gates, pieces
from flowra_pipelines.fuse_setting import FusedSetting, FuseRecord, open_setting, read_record, write_record
from flowra_pipelines.fusion_figures import layer_labels, layer_means, weight_maps, weight_scale
from flowra_pipelines.report_fusion import fusion_page
from flowra_testing.html_page import Page, assert_self_contained
from flowra_testing.tiny_runs import write_tiny_llama

Here = Callable[..., tuple[int, str, str]]
SCHEMA = Path(__file__).parents[2] / "docs" / "formats" / "fusion_inspection.schema.json"
QUERY, DOWN, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"
LONG, SHORT = "the film is a story with the cast and the plot", "moving and dull"
HOSTILE = "</title><script src='http://evil.example/x.js'>alert(1)</script><img src=x onerror=alert(1)>&\"$\\frac{$"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder, two adapters of other layers and ranks, and texts."""
    folder = tmp_path_factory.mktemp("inspect")
    base = str(write_tiny_llama(folder / "llama"))
    for seed, (name, ranks) in enumerate({"a": {QUERY: 2, DOWN: 3}, "b": {DOWN: 1, UP: 4}}.items()):
        generator = torch.Generator().manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        for one in attach(model, ranks, generator=generator).values():
            for parameter in one.parameters():
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        save_adapter(model, folder / name, base_model_name_or_path=base, task_type="CAUSAL_LM")
    rows = [{"text": f"{LONG} {word}", "answer": "warm"} for word in ("the", "film", "is", "a", "story")]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "other.jsonl").write_text(json.dumps({"text": "dull " * 12}) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def setting(folder: Path) -> FusedSetting:
    """Base and adapters; not to be changed."""
    return open_setting([folder / "a", folder / "b"])


def written(setting: FusedSetting, out: Path, *, level: Level = "layer", size: float = 20.0) -> tuple[Path, Gates]:
    """Write gates as if they had been trained, with the record that belongs to them; hidden states are small."""
    gates = gates_for(setting.model, setting.adapters, GateOptions(level=level))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, each in gates.named_parameters():
            if not name.endswith("bias"):
                each.add_(size * torch.randn(each.shape, generator=generator))
    write_gates(gates, setting.adapters, out)
    record = FuseRecord(
        base=setting.base,
        base_hash=setting.base_hash,
        task="CAUSAL_LM",
        heads_from=None,
        adapters=tuple({"name": name, "folder": str(where)} for name, where in setting.folders.items()),
        settings={"max_length": 13},
        data={},
        curve=(),
        losses={"validation": {"gates": 1.1}, "training": {"gates": 1.0}},
        weights={},
        versions={},
    )
    write_record(record, out)
    return out, gates


@pytest.fixture(scope="module")
def trained(setting: FusedSetting, folder: Path) -> Path:
    """Gates of level ``layer`` that weigh every token in another way; not to be changed."""
    return written(setting, folder / "trained")[0]


def load(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "inspection.json").read_text(encoding="utf-8"))
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(content)
    return content


def refused(answer: tuple[int, str, str]) -> str:
    """Return the one line of a refusal."""
    code, _, complaint = answer
    assert code == 2, complaint
    assert "Traceback" not in complaint
    (line,) = complaint.strip().splitlines()
    return line


def seen(
    weights: torch.Tensor,
    *,
    tokens: tuple[str, ...] | None = None,
    adapters: tuple[str, ...] = ("a", "b"),
    places: tuple[str, ...] | None = None,
) -> GateInspection:
    """One text with weights ``(places, positions, k)``, which are the shares, too."""
    names = places or tuple(f"model.layers.{index}" for index in range(len(weights)))
    words = tokens or tuple(f"t{index}" for index in range(weights.shape[1]))
    text = TextWeights(tokens=words, weights=weights, shares=weights.clamp(0, 1))
    return GateInspection(adapters=adapters, level="layer", places=names, texts=(text,))


def random_weights(layers: int, positions: int, adapters: int = 2) -> torch.Tensor:
    return torch.rand(layers, positions, adapters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# the command


@pytest.mark.parametrize("level", ["layer", "step", "module"])
def test_the_weights_in_the_file_are_those_of_the_fused_model(
    level: Level, setting: FusedSetting, tmp_path: Path, here: Here
) -> None:
    gates_folder, gates = written(setting, tmp_path / "gates", level=level)
    out = tmp_path / "out"
    code, shown, complaint = here(
        "fuse", "inspect", gates_folder, "--text", LONG, "--text", SHORT, "--out", out, "--batch-size", 2
    )
    assert code == 0, complaint
    content = load(out)
    assert (content["level"], content["adapters"]) == (level, ["a", "b"])
    assert content["seen"]["tokens"] == 14
    with fuse(setting.model, setting.adapters, gates) as fusion, torch.no_grad():
        for text, found in zip((LONG, SHORT), content["texts"], strict=True):
            ids = setting.tokenizer(text, return_tensors="pt")["input_ids"]
            with fusion.recording() as record:
                setting.model(input_ids=ids)
            assert content["places"] == list(record.weights)
            torch.testing.assert_close(torch.tensor(found["weights"]), record.stacked()[:, 0], rtol=0, atol=2e-5)
            assert [each.strip() for each in found["tokens"]] == text.split()
    layers = {"layer": 2, "step": 1, "module": 2}[level]
    assert len(content["seen"]["layers"]) == layers
    assert ("model.layers.1" in shown) is (level != "step")
    assert f"2 texts, 14 tokens, {len(content['places'])} gates of level {level}" in shown
    mean = content["seen"]["mean"]
    assert f"Average weight and spread over tokens: a {mean[0]:.3f} ±" in shown
    assert {path.name for path in out.iterdir()} == set(FILES)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in FILES if name.endswith(".png"))
    page = assert_self_contained((out / "inspection.html").read_text(encoding="utf-8"))
    assert ("#modules" in page.attribute("href")) is (level == "module")


def test_a_text_beside_longer_ones_has_the_weights_that_it_has_alone(trained: Path, tmp_path: Path, here: Here) -> None:
    texts = {"both": (LONG, SHORT), "alone": (SHORT,)}
    found = {}
    for name, given in texts.items():
        options = [part for text in given for part in ("--text", text)]
        assert here("fuse", "inspect", trained, *options, "--out", tmp_path / name)[0] == 0
        found[name] = load(tmp_path / name)["texts"][-1]
    both, alone = (torch.tensor(each["weights"]) for each in found.values())
    torch.testing.assert_close(both, alone, rtol=0, atol=2e-5)
    assert found["both"]["tokens"] == found["alone"]["tokens"]


def test_texts_of_a_file_go_on_with_the_second_column_and_are_cut_as_in_training(
    trained: Path, folder: Path, tmp_path: Path, here: Here
) -> None:
    data = ("--data", f"{folder / 'train.jsonl'}:text,answer", "--examples", 5)
    code, shown, complaint = here("fuse", "inspect", trained, *data, "--out", tmp_path / "out")
    assert code == 0, complaint
    assert "5 texts were cut to the 13 tokens of the training" in shown
    content = load(tmp_path / "out")
    assert content["seen"]["texts"] == 5
    assert len(content["texts"]) == 4
    for text in content["texts"]:
        assert len(text["tokens"]) == 13
        assert text["tokens"][-1] == "warm"
    html = (tmp_path / "out" / "inspection.html").read_text(encoding="utf-8")
    assert "The first 4 of 5 texts are shown." in html


def test_texts_of_validation_that_are_weighed_otherwise_are_told(
    trained: Path, folder: Path, tmp_path: Path, here: Here
) -> None:
    train, other = folder / "train.jsonl", folder / "other.jsonl"
    same = inspect_gates(InspectionJob(gates=trained, data=str(train), validation_data=str(train)))
    assert same.validation is not None
    assert "weight gap" not in [sign.kind for sign in same.signs]
    options = ("--data", train, "--validation-data", other, "--out", tmp_path / "out")
    code, shown, complaint = here("fuse", "inspect", trained, *options)
    assert code == 0, complaint
    assert "Warning, weight gap: " in shown
    content = load(tmp_path / "out")
    assert (content["seen"]["texts"], content["validation"]["texts"]) == (5, 1)
    assert "weight gap" in [sign["kind"] for sign in content["signs"]]


def test_gates_that_did_not_move_are_warned_of_everywhere(setting: FusedSetting, tmp_path: Path, here: Here) -> None:
    gates, _ = written(setting, tmp_path / "gates", size=0.0)
    code, shown, complaint = here("fuse", "inspect", gates, "--text", LONG, "--out", tmp_path / "out")
    assert code == 0, complaint
    said = "No gate has moved from the weights of birth (0, 1; limit 0.01)."
    assert f"Warning, unmoved: {said}" in shown
    (sign,) = load(tmp_path / "out")["signs"]
    assert sign["found"] == said
    text = " ".join(Page((tmp_path / "out" / "inspection.html").read_text(encoding="utf-8")).text)
    assert said in text
    assert "What to do." in text


def test_the_losses_of_the_training_are_compared(trained: Path, tmp_path: Path) -> None:
    for validation, told in ((1.19, False), (1.21, True), (None, False)):
        gates = shutil.copytree(trained, tmp_path / f"gates-{validation}")
        losses: Any = {"validation": {"gates": validation}, "training": {"gates": 1.0}}
        write_record(replace(read_record(trained), losses=losses), gates)
        found = inspect_gates(InspectionJob(gates=gates, texts=(LONG,)))
        assert ("loss gap" in [sign.kind for sign in found.signs]) is told


def test_what_cannot_be_looked_at_is_refused_in_one_line(
    trained: Path, folder: Path, tmp_path: Path, here: Here
) -> None:
    out = ("--out", tmp_path / "out")
    inspect = ("fuse", "inspect", trained)
    assert "texts must be at least one, got none" in refused(here(*inspect, *out))
    assert "text must hold tokens, got none in ''" in refused(here(*inspect, "--text", "", *out))
    only = ("--text", LONG, "--validation-data", folder / "train.jsonl")
    assert "validation-data must be compared with --data, got none" in refused(here(*inspect, *only, *out))
    (folder / "empty.jsonl").write_text('{"text": ""}\n{"text": null}\n', encoding="utf-8")
    empty = refused(here(*inspect, "--data", folder / "empty.jsonl", *out))
    assert "data must hold rows of text, got none in column text" in empty
    swapped = refused(here(*inspect, folder / "b", folder / "a", "--text", LONG, *out))
    assert "adapters must be those that the gates were trained with" in swapped
    assert "out must be a folder of its own" in refused(here(*inspect, "--text", LONG, "--out", trained))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert "got" in refused(here(*inspect, "--text", LONG, "--out", tmp_path / "full"))
    assert not (tmp_path / "out").exists()


def test_help_says_what_is_written(here: Here) -> None:
    code, shown, _ = here("fuse", "inspect", "--help")
    assert code == 0
    for word in ("inspection.json", "weights.png", "layers.png", "--validation-data", "--examples"):
        assert word in shown


# tokens


def test_tokens_are_what_stands_in_the_text_with_the_space_before_them() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({letter: index for index, letter in enumerate(letters)}, [])
    raw = Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    coded = tokenizer("a é\n", return_offsets_mapping=True)
    assert pieces(coded, ("a é\n",), tokenizer) == ["a", " ", "é", "…", "\n"]  # é is two bytes
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), unk_token="?"
    )
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert pieces(words("a  zz a", return_offsets_mapping=True), ("a  zz a",), words) == ["a", "  zz", " a"]


# the page


@pytest.fixture(scope="module")
def page() -> str:
    """A page that says everything; not to be changed."""
    signs = [FailureSign(kind="unmoved", found="It did not.", advice="Push.")]
    one = seen(random_weights(2, 3), tokens=("def", " f\n", "<s>"))
    return fusion_page(one, one.texts, signs, title="Two skills")


def test_the_page_is_whole_and_needs_nothing_else(page: str) -> None:
    found = assert_self_contained(page)
    assert found.attribute("href")[:4] == ["#warnings", "#texts", "#maps", "#layers"]
    assert "prefers-color-scheme: dark" in page
    for colour in (INK, FAINT, GAP):
        assert colour not in page.partition("</style>")[2]
    text = " ".join(found.text)
    assert "Gates that have not moved" in text
    assert "It did not." in text
    assert "Push." in text


def test_cells_say_token_layer_and_all_weights_where_the_pointer_rests(page: str) -> None:
    weights = random_weights(2, 3)
    titles = Page(page).attribute("title")
    for index, token in enumerate(("“def”", "“·f↵”", "“<s>”")):
        for layer in range(2):
            first, second = weights[layer, index].tolist()
            said = f"{token}, token {index + 1}, layer {layer}: a {first:.3f}, b {second:.3f}"
            assert titles.count(said) == 2  # in the map of each adapter
        first, second = weights[:, index].mean(dim=0).tolist()
        assert titles.count(f"{token}, token {index + 1}, all layers: a {first:.3f}, b {second:.3f}") == 2
        assert sum(f"{token}, token {index + 1}: a {first:.3f}, b {second:.3f}" in each for each in titles) == 1


def test_cells_hold_their_numbers_and_maps_have_headings_for_readers_of_screens(page: str) -> None:
    found = Page(page)
    scopes = [attributes.get("scope") for tag, attributes in found.elements if tag == "th"]
    assert None not in scopes
    assert scopes.count("row") == 6
    text = [each.strip() for each in found.text]
    assert f"{float(random_weights(2, 3)[1, 2, 0]):.2f}" in text
    focusable = [
        attributes for tag, attributes in found.elements if tag == "div" and "heat" in str(attributes.get("class"))
    ]
    assert len(focusable) == 2
    assert all(each["tabindex"] == "0" for each in focusable)


def test_colours_are_white_at_1_over_k_and_each_class_has_its_rule(page: str) -> None:
    style = page.partition("</style>")[0]
    used = {part for each in Page(page).attribute("class") for part in each.split()}
    numbers = {each for each in used if each[0] == "w" and each[1:].isdecimal()}
    assert numbers
    assert all(f".{each} {{ background: #" in style for each in numbers)
    scale = weight_scale(one := seen(random_weights(2, 3)), one.texts)
    assert scale.centre == 0.5
    middle = mpl.colors.to_hex(scale.colours(0.5))
    assert all(int(middle[at : at + 2], 16) > 235 for at in (1, 3, 5))


def test_one_place_for_all_layers_has_no_mean_over_layers() -> None:
    one = seen(random_weights(1, 3), places=("",))
    html = fusion_page(one, one.texts, [], title="step")
    assert "No sign of failed training." in html
    assert "layer all: a" in html
    assert ", all layers: a" not in html


def test_texts_are_cut_to_what_a_page_can_hold_and_it_says_so() -> None:
    one = seen(random_weights(100, 200))
    html = fusion_page(one, one.texts, [], title="long")
    assert "first 59 of 200 tokens" in html
    assert len(html) < 3e6


def test_the_same_inspection_gives_the_same_page() -> None:
    pages = [fusion_page(one, one.texts, [], title="x") for one in [seen(random_weights(2, 3)) for _ in range(2)]]
    assert pages[0] == pages[1]


def test_whatever_is_hostile_is_text() -> None:
    names = (HOSTILE, "a\ud800\x00\x1b\u202e")
    tokens = (HOSTILE, "a\ud800\x00\x1b\u202e", "b" * 3000, "名前😀", "http://x")
    one = seen(random_weights(2, 5), tokens=tokens, adapters=names, places=(f"h.0.{HOSTILE}", HOSTILE))
    signs = [FailureSign(kind="ambiguous prefixes", found=HOSTILE, advice=HOSTILE)]
    html = fusion_page(one, one.texts, signs, title=HOSTILE)
    found = assert_self_contained(html)
    assert any("<script src=" in each for each in found.text)
    assert not {"\ud800", "\x00", "\x1b", "\u202e"} & set(html)
    html.encode("utf-8")
    for figure in (weight_maps(one, one.texts), layer_means(one)):
        figure.savefig(io.BytesIO(), format="png", dpi=20)


# pictures


def test_each_adapter_of_each_text_has_a_panel_of_layers_and_tokens() -> None:
    weights = random_weights(2, 3, 3)
    one = seen(weights, adapters=("a", "b", "c"))
    figure = weight_maps(one, one.texts)
    panels = figure.axes[:3]
    assert [each.get_title(loc="left") for each in panels] == ["a", "b", "c"]
    for index, axes in enumerate(panels):
        drawn = axes.images[0].get_array()
        assert drawn is not None
        assert torch.equal(torch.tensor(drawn.tolist(), dtype=torch.float64), weights[:, :, index])
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["t0", "t1", "t2"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0", "1"]


def test_a_long_text_is_drawn_in_part_and_says_so() -> None:
    one = seen(random_weights(2, 130))
    axes = weight_maps(one, one.texts).axes[0]
    assert axes.get_title(loc="left") == "a  (first 100 of 130 tokens)"


def test_averages_are_drawn_by_layer_with_their_spread() -> None:
    one = seen(random_weights(3, 5))
    axes = layer_means(one).axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    for index, name in enumerate("ab"):
        drawn = [float(each) for each in lines[name].get_ydata()]  # type: ignore[union-attr]
        assert drawn == [each.mean[index] for each in one.by_layer()]
    band = axes.collections[0].get_paths()[0].vertices
    first = one.by_layer()[0]
    assert {round(float(y), 9) for x, y in band if x == 0} == {  # type: ignore[union-attr]
        round(first.mean[0] - first.spread[0], 9),
        round(first.mean[0] + first.spread[0], 9),
    }


def test_weights_that_barely_differ_stay_pale() -> None:
    one = seen(torch.full((2, 4, 2), 0.501, dtype=torch.float64))
    assert weight_scale(one, one.texts).reach == pytest.approx(0.1)
    far = seen(torch.full((2, 4, 2), 1.98, dtype=torch.float64))
    assert weight_scale(far, far.texts).reach == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["h.0", "h.1"], ["0", "1"]),
        (["encoder.0", "decoder.0"], ["encoder.0", "decoder.0"]),
        (["h.0", "head"], ["h.0", "head"]),
        ([""], ["all"]),
    ],
)
def test_layers_are_called_by_number_where_it_tells_them_apart(names: list[str], labels: list[str]) -> None:
    assert layer_labels(names) == labels
