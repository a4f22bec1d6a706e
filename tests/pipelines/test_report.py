"""`flowra report`: a page that needs nothing else, and pictures of what the profile says."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flowra_analysis import FlowProfile, ModuleProfile, write_profile
from flowra_pipelines import report_figures
from flowra_pipelines.errors import UserError
from flowra_pipelines.module_grid import module_grid
from flowra_pipelines.refinement_figures import rank_map
from flowra_pipelines.report import profile_report, write_report
from flowra_pipelines.report_validation import LossChange, parse_validation, read_validation
from flowra_testing.html_page import Page, assert_self_contained

KINDS = ("flow_gains", "weight", "gradient", "kfac_gradient", "activation", "update")
ESTIMATORS = ("probe", "fisher", "snr")
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
FIGURES = ("sensitivity", "layer_types", "spectra", "effective_ranks", "estimator_agreement")
OF_ABLATIONS = ("ablation_correlations", "ablation_scatter")
HOSTILE = "</title><script src='http://evil.example/x.js'>alert(1)</script><img src=x onerror=alert(1)>&\"$\\frac{$"


def profile(*, names: tuple[str, ...] | None = None) -> FlowProfile:
    """Return what a full calibration knows of two blocks and a head."""
    names = names or (*(f"model.layers.{block}.{layer}" for block in range(2) for layer in LAYERS), "head")
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for index, name in enumerate(names):
        statistics = {"psi": (index + 1) / 10, "psi_stderr": 0.06, "fisher_trace": 1.0}
        for estimator in ESTIMATORS:
            statistics[f"psi_{estimator}"] = float(torch.rand((), generator=generator))
            statistics[f"psi_{estimator}_stderr"] = 0.01
        for kind in KINDS[1:]:
            statistics |= {f"{kind}_effective_rank": 2.0 + index, f"{kind}_stable_rank": 1.5}
        modules[name] = ModuleProfile(shape=(8, 6), cost_per_rank=14, statistics=statistics)
    spectra = {kind: {name: torch.tensor([4.0, 2.0, 1e-9, 0.0]) for name in names} for kind in KINDS}
    provenance = {"model": "tiny", "examples": 128, "seed": 0}
    return FlowProfile(modules=modules, spectra=spectra, base_parameters=2_000_000, provenance=provenance)


def small() -> FlowProfile:
    """Return a profile that is drawn at once."""
    return FlowProfile(
        modules={"h.0.q": ModuleProfile(shape=(2, 1), cost_per_rank=3, statistics={"psi": 0.5})}, base_parameters=2
    )


def validation(names: tuple[str, ...]) -> dict[str, object]:
    ablations = ("leave_one_rank_out", "leave_module_out", "retrain_without", "alone")
    interval = {"value": 0.8, "low": 0.6, "high": 0.9}
    return {
        "ablations": {key: {name: {"loss_change": 0.1, "stderr": 0.01} for name in names} for key in ablations},
        "reliability": {"leave_one_rank_out": 0.9, "alone": None},
        "estimators": {
            name: {"spearman": dict.fromkeys(ablations, interval), "cost": 1.5} for name in (*ESTIMATORS, "other<b>")
        },
    }


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Figure], str]:
    """The report of a profile that knows everything; not to be changed."""
    one = profile()
    return profile_report(one, validation(tuple(one.modules)))


# the page


def test_the_page_is_whole_and_needs_nothing_else(whole: tuple[dict[str, Figure], str]) -> None:
    figures, html = whole
    page = assert_self_contained(html)
    assert tuple(figures) == (*FIGURES, *OF_ABLATIONS)
    assert sum(tag == "svg" for tag, _ in page.elements) == len(figures)
    assert page.attribute("href")[:3] == ["#seen", "#sensitivity", "#types"]


def test_the_page_changes_with_light_and_dark_and_fits_a_phone(whole: tuple[dict[str, Figure], str]) -> None:
    _, html = whole
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in html
    for colour in (report_figures.INK, report_figures.FAINT, report_figures.GAP):
        assert colour not in html.partition("</style>")[2]
    assert html.count("var(--ink)") > 20


def test_the_text_says_what_the_numbers_are(whole: tuple[dict[str, Figure], str]) -> None:
    text = " ".join(Page(whole[1]).text).replace("\u00a0", " ")
    assert "Most sensitive on average: down (mean ψ 0.45), then O (0.35). Least: Q (0.25)." in text
    assert "The highest single modules: head (0.700 ± 0.060)" in text
    assert "Of 7 modules, 1 lie clearly above the median, 3 clearly below it, and 3 cannot be told from it" in text
    assert "ablation “first rank left out”" in text
    assert "(ρ = 0.80, 0.60 to 0.90; the ablation with itself: 0.90)" in text


def test_the_same_profile_gives_the_same_page() -> None:
    one = replace(profile(), spectra={})
    pages = [profile_report(each)[1] for each in (one, replace(one, modules=dict(one.modules)))]
    assert pages[0] == pages[1]


def test_whatever_is_hostile_is_text() -> None:
    one = profile(names=(HOSTILE, f"h.0.{HOSTILE}", f"h.{'9' * 5000}.x", "a\ud800\x00\x1b\u202e", "名前😀.0.q_proj"))
    modules = {
        name: replace(each, statistics={**each.statistics, f"psi_{HOSTILE}": 0.5, f"{HOSTILE}_effective_rank": 2.0})
        for name, each in one.modules.items()
    }
    spectra = {HOSTILE.replace("/", ""): one.spectra["weight"]}
    hostile = replace(one, modules=modules, spectra=spectra, provenance={"model": HOSTILE, HOSTILE: HOSTILE})
    figures, html = profile_report(hostile, validation(tuple(one.modules)))
    page = assert_self_contained(html)
    assert any("<script src=" in each for each in page.text)
    assert not {"\ud800", "\x00", "\x1b", "\u202e"} & set(html)
    html.encode("utf-8")
    figures["sensitivity"].savefig(io.BytesIO(), format="png", dpi=40)


def test_what_a_profile_does_not_know_is_left_out() -> None:
    bare = FlowProfile(modules={"a": ModuleProfile(shape=(2, 1), cost_per_rank=3)}, base_parameters=2)
    figures, html = profile_report(bare)
    page = assert_self_contained(html)
    assert figures == {}
    assert page.attribute("href") == ["#seen", "#modules", "#provenance"]
    assert "The profile holds no sensitivity" in html


@pytest.mark.parametrize("key", ["psi_stderr", "psi_probe", "weight_effective_rank"])
def test_statistics_that_some_modules_lack_are_drawn_of_the_others(key: str) -> None:
    one = profile()
    modules = dict(one.modules)
    kept = {name: value for name, value in modules["head"].statistics.items() if name != key}
    modules["head"] = replace(modules["head"], statistics=kept)
    figures, html = profile_report(replace(one, modules=modules, spectra={}))
    assert tuple(figures) == tuple(name for name in FIGURES if name != "spectra")
    assert_self_contained(html)


def test_a_profile_of_one_module_and_one_value_is_drawn() -> None:
    module = ModuleProfile(shape=(2, 1), cost_per_rank=3, statistics={"psi": 0.5, "weight_effective_rank": 1.0})
    spectra = {"weight": {"a": torch.ones(1)}, "zero": {"a": torch.zeros(2)}, "empty": {"a": torch.zeros(0)}}
    figures, html = profile_report(FlowProfile(modules={"a": module}, spectra=spectra, base_parameters=2))
    assert tuple(figures) == ("sensitivity", "layer_types", "spectra", "effective_ranks")
    assert_self_contained(html)


def test_a_statistic_that_no_axis_holds_is_refused() -> None:
    module = ModuleProfile(shape=(2, 1), cost_per_rank=3, statistics={"weight_effective_rank": 1e308})
    with pytest.raises(UserError, match="statistics must be at most 1e"):
        profile_report(FlowProfile(modules={"a": module}, base_parameters=2))


# pictures


def test_modules_within_two_standard_errors_of_a_half_are_hatched(whole: tuple[dict[str, Figure], str]) -> None:
    axes = whole[0]["sensitivity"].axes[0]
    cells = [each for each in axes.patches if isinstance(each, Rectangle)]
    hatched = {each.get_xy() for each in cells if each.get_hatch()}
    # ψ runs 0.1, 0.2, 0.3 in block 0 and 0.4, 0.5, 0.6 in block 1, each ± 0.06; the head's is 0.7
    assert hatched == {(0.5, -0.5), (0.5, 0.5), (0.5, 1.5)}
    assert len(cells) - len(hatched) == 7
    texts = [each.get_text() for each in axes.texts]
    assert texts.count("±.06") == 7
    assert {".10", ".70"} <= set(texts)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Q", "O", "down", "head"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "–"]


@pytest.mark.parametrize(
    ("value", "error", "uncertain"),
    [(0.5, 0.01, True), (0.55, 0.03, True), (0.55, 0.02, False), (0.5, 0.0, False), (0.5, None, False)],
)
def test_an_unknown_error_makes_nothing_uncertain(value: float, error: float | None, uncertain: bool) -> None:
    assert report_figures.uncertain(value, error) is uncertain


def test_a_map_of_thousands_of_modules_is_an_image() -> None:
    psi = {f"h.{block}.experts.{expert}.w1": 0.5 for block in range(30) for expert in range(80)}
    axes = report_figures.sensitivity_map(psi, {}).axes[0]
    assert len(axes.texts) == 0
    assert np.asarray(axes.images[0].get_array()).shape == (80, 30)


def test_two_stacks_of_blocks_do_not_share_cells() -> None:
    names = [f"{stack}.block.{block}.q" for stack in ("encoder", "decoder") for block in range(2)]
    place = module_grid([*names, "decoder.block.0.cross.q", "shared"])
    assert len(set(place.places.values())) == 6
    assert place.kinds == ("encoder.block: q", "decoder.block: q", "cross.q", "shared")
    assert place.blocks == (0, 1, None)


def test_a_name_with_dollars_is_no_mathematics() -> None:
    rank_map({"h.0.$\\frac{$": 1}).savefig(io.BytesIO(), format="png")


def test_the_spectra_drawn_are_relative_to_their_first_value() -> None:
    figure = report_figures.spectral_decay(profile())
    assert [axes.get_title(loc="left") for axes in figure.axes][:3] == ["flow gains", "weights", "gradients"]
    for axes in figure.axes:
        for line in axes.lines:
            assert np.asarray(line.get_ydata()).tolist() == [1.0, 0.5]  # what lies below the floor is not drawn


def test_the_change_of_the_loss_is_drawn_per_parameter_where_it_is_known_how_many() -> None:
    psi = {"h.0.q": 0.2, "h.0.k": 0.8}
    for parameters, label, values in (
        (500.0, "loss change per 1,000 parameters", [2.0, 4.0]),
        (None, "change of the loss", [1.0, 2.0]),
    ):
        changes = {"h.0.q": LossChange(1.0, 0.1, parameters), "h.0.k": LossChange(2.0, None, parameters)}
        axes = report_figures.ablation_scatter(psi, {}, {"alone": changes}).axes[0]
        assert axes.get_ylabel() == label
        dots = [each for each in axes.collections if isinstance(each, PathCollection)]
        drawn = [np.asarray(each.get_offsets())[0].tolist() for each in dots]
        assert drawn == [[0.2, values[0]], [0.8, values[1]]]
        assert axes.get_title(loc="left") == "alone: ρ = 1.00"


# files


def test_the_report_lies_beside_the_stage_and_leaves_its_files_alone(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "calibrate"
    write_profile(small(), stage)
    (stage / "stage.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in stage.iterdir()}
    paths = write_report(stage.parent)
    assert paths[0] == tmp_path / "run" / "report" / "report.html"
    assert {path.name for path in paths[0].parent.iterdir()} == {path.name for path in paths}
    assert [path.name for path in paths[1:]] == ["sensitivity.png", "layer_types.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[1:])
    assert {path.name: path.read_bytes() for path in stage.iterdir()} == before
    assert write_report(stage, tmp_path / "to")[0] == tmp_path / "to" / "report.html"


def test_ablations_beside_the_profile_are_shown(tmp_path: Path) -> None:
    write_profile(small(), tmp_path)
    (tmp_path / "validation.json").write_text(json.dumps(validation(("h.0.q",))))
    paths = write_report(tmp_path / "profile.json")
    assert paths[0].parent == tmp_path / "report"
    assert {f"{name}.png" for name in OF_ABLATIONS} < {path.name for path in paths}
    assert "other&lt;b&gt;" in paths[0].read_text(encoding="utf-8")


def test_the_command_says_where_the_report_is(tmp_path: Path, here: Callable[..., tuple[int, str, str]]) -> None:
    write_profile(small(), tmp_path / "profile")
    code, shown, _ = here("report", tmp_path / "profile", "--to", tmp_path / "[red]")
    assert code == 0
    assert f"Report: {tmp_path / '[red]' / 'report.html'}" in shown
    assert (tmp_path / "[red]" / "sensitivity.png").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", "must hold objects, got list"),
        ('{"estimators": {"a": {"cost": NaN}}}', "must hold finite numbers, got nan"),
        ('{"estimators": {"a": {"cost": true}}}', "must hold finite numbers, got True"),
        ('{"ablations": {"alone": {"head": {"loss_change": "x"}}}}', "must hold finite numbers, got 'x'"),
        ('{"ablations": {"alone": {"head": 1}}}', "must hold objects, got int"),
        ('{"estimators": {"a": {"spearman": {"alone": {"value": 1' + "0" * 400 + "}}}}}", "must hold finite numbers"),
    ],
    ids=["empty", "deep", "list", "nan", "bool", "text", "number", "huge"],
)
def test_a_damaged_validation_is_one_line_and_exit_code_2(
    content: str, message: str, tmp_path: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    write_profile(small(), tmp_path)
    (tmp_path / "validation.json").write_text(content)
    code, _, complaint = here("report", tmp_path)
    assert code == 2
    assert message in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"ablations": None, "estimators": None},
        {"ablations": {"alone": {}}, "estimators": {"a": {}}},
        {"ablations": {"alone": {"head": {}}}, "estimators": {"a": {"spearman": {"alone": {}}, "cost": None}}},
        {"ablations": {"unheard of": 3}, "more": 4},
    ],
)
def test_every_part_of_a_validation_may_be_missing(content: dict[str, object]) -> None:
    found = parse_validation(content)
    assert not any(found.ablations.values())
    assert not any(found.correlations.values())
    assert tuple(profile_report(small(), content)[0]) == ("sensitivity", "layer_types")


def test_a_correlation_without_an_interval_is_a_point(tmp_path: Path) -> None:
    content = {
        "estimators": {"a": {"spearman": {"alone": {"value": 0.5}}}},
        "ablations": {"alone": {"x": {"loss_change": 1}}},
    }
    (tmp_path / "validation.json").write_text(json.dumps(content))
    read = read_validation(tmp_path)
    assert read is not None
    assert parse_validation(read).correlations == {"a": {"alone": (0.5, 0.5, 0.5)}}
    assert parse_validation(read).ablations == {"alone": {"x": (1.0, None, None)}}
    assert read_validation(tmp_path / "none") is None
