"""What a merge costs as a page that needs nothing else, and as pictures of what the report says."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flowra_compose import LowRankUpdate, ModuleStatistics, ModuleUpdates
from flowra_compose.interference import InterferenceMeter
from flowra_compose.interference_report import InterferenceReport, TaskScores
from flowra_pipelines.errors import UserError
from flowra_pipelines.figure_style import FAINT, GAP, INK
from flowra_pipelines.interference_figures import module_maps, predicted_and_measured, task_pairs
from flowra_pipelines.report_interference import interference_page, write_interference_page
from flowra_testing.html_page import Page, assert_self_contained

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
NAMES = (*(f"model.layers.{block}.{layer}" for block in range(2) for layer in LAYERS), "head")
TASKS = ("sst2", "mnli", "qqp")
FIGURES = ("task_cosines", "task_overlaps", "cross_talk", "sign_conflicts", "predicted_and_measured")
HOSTILE = "</title><script src='http://evil.example/x.js'>alert(1)</script><img src=x onerror=alert(1)>&\"$\\frac{$"
SMALL = ("h.0.q_proj", "head")


def report(
    *,
    names: tuple[str, ...] = NAMES,
    tasks: tuple[str, ...] = TASKS,
    known: bool = True,
    **options: Any,  # noqa: ANN401
) -> InterferenceReport:
    """Return the report of a sum of random updates; the last task leaves the last module alone."""
    generator = torch.Generator().manual_seed(0)
    meter = InterferenceMeter(tasks=tasks, **options)
    for index, name in enumerate(names):
        updates: list[LowRankUpdate | None] = [
            LowRankUpdate(torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)) for _ in tasks
        ]
        if index == len(names) - 1 and len(tasks) > 1:
            updates[-1] = None
        moments = [ModuleStatistics(inputs=torch.rand(6, generator=generator)) if known else None for _ in tasks]
        module = ModuleUpdates(name=name, updates=tuple(updates), statistics=tuple(moments))
        meter.add(module, module.of_factors(*module.stacked()))
    return meter.report()


def scored(one: InterferenceReport) -> InterferenceReport:
    scores = {
        name: TaskScores(base=0.5, single=0.9, merged=0.89 - 0.08 * index) for index, name in enumerate(one.tasks)
    }
    return replace(one, scores=scores)


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Figure], str]:
    """The page of a report that knows everything; not to be changed."""
    return interference_page(scored(report(names=SMALL)), title="Three tasks")


def texts(figure: Figure, panel: int = 0) -> list[str]:
    return [each.get_text() for each in figure.axes[panel].texts]


# the page


def test_the_page_is_whole_and_needs_nothing_else(whole: tuple[dict[str, Figure], str]) -> None:
    figures, html = whole
    page = assert_self_contained(html)
    assert tuple(figures) == FIGURES
    assert sum(tag == "svg" for tag, _ in page.elements) == len(figures)
    assert page.attribute("href") == ["#advice", "#tasks", "#pairs", "#places", "#modules"]
    assert "prefers-color-scheme: dark" in html
    for colour in (INK, FAINT, GAP):
        assert colour not in html.partition("</style>")[2]


def test_the_page_says_the_advice_and_its_numbers(whole: tuple[dict[str, Figure], str]) -> None:
    text = " ".join(Page(whole[1]).text)
    assert "Fuse: keep all adapters" in text
    assert "By measured scores; the task that suffers most decides." in text
    assert "mnli loses 22.5% of the gain of its adapter and keeps 90.0% of its score" in text
    assert "What would change this" in text
    assert "qqp (42.5%)" in text


def test_cells_say_what_they_are_where_the_pointer_rests() -> None:
    one = report(names=SMALL)
    _, html = interference_page(one)
    cosine = one.pair_means("cosine")["sst2", "mnli"]
    assert f"<title>cosine, sst2 and mnli: {cosine:.4f}</title>" in html
    talk = one.modules["h.0.q_proj"].tasks[1].cross_talk
    assert talk is not None
    said = f"<title>mnli, h.0.q_proj: {talk:.4g}</title>"
    assert html.count(said) == 2  # of the cell, and of its number above it
    assert "<title>qqp, head: not known</title>" in html
    assert html.count("<title>") == 1 + 2 * (9 + 2 * 9 + 3 * 2 + 2)


def test_the_same_report_gives_the_same_page() -> None:
    pages = [interference_page(scored(report(names=("a",), tasks=("x", "y"))))[1] for _ in range(2)]
    assert pages[0] == pages[1]


def test_whatever_is_hostile_is_text() -> None:
    names = (HOSTILE, f"h.0.{HOSTILE}", f"h.{'9' * 5000}.x", "a\ud800\x00\x1b\u202e", "名前😀.0.q_proj")
    one = scored(report(names=names, tasks=(HOSTILE, "a\ud800\x00\x1b\u202e", "b" * 5000)))
    figures, html = interference_page(one, title=HOSTILE)
    page = assert_self_contained(html)
    assert any("<script src=" in each for each in page.text)
    assert not {"\ud800", "\x00", "\x1b", "\u202e"} & set(html)
    html.encode("utf-8")
    for figure in figures.values():
        figure.savefig(io.BytesIO(), format="png", dpi=20)


@pytest.mark.parametrize(
    ("one", "names"),
    [
        (report(names=SMALL, known=False), ("task_cosines", "task_overlaps", "sign_conflicts")),
        (report(names=SMALL, known=False, signs=False), ("task_cosines", "task_overlaps")),
        (report(names=SMALL, tasks=("alone",)), ("cross_talk", "predicted_and_measured")),
        (report(names=SMALL, tasks=("alone",), known=False), ()),
    ],
    ids=["no statistics", "nothing but angles", "one task", "one task, no statistics"],
)
def test_what_a_report_does_not_know_is_left_out(one: InterferenceReport, names: tuple[str, ...]) -> None:
    figures, html = interference_page(one)
    page = assert_self_contained(html)
    assert tuple(figures) == names
    assert {"#advice", "#tasks", "#modules"} <= set(page.attribute("href"))


def test_an_energy_that_no_axis_holds_is_refused() -> None:
    one = report(names=("head",))
    module = replace(one.modules["head"], merged_energy=1e200)
    with pytest.raises(UserError, match=r"energies must be at most 1e\+100 to be drawn, got 1e\+200 for head"):
        interference_page(replace(one, modules={**one.modules, "head": module}))


# pictures


def test_each_pair_is_drawn_twice_and_each_task_with_itself_is_one() -> None:
    figure, hovers = task_pairs("ab", {"": {("a", "b"): -0.25}}, label="cosine", signed=True)
    assert texts(figure) == ["1.00", "-0.25", "-0.25", "1.00"]
    assert hovers["cell-0-1-0"] == "cosine, b and a: -0.2500"
    figure, hovers = task_pairs("ab", {"rows": {}}, label="mean cos²", signed=False)
    assert texts(figure) == ["1.00", "–", "–", "1.00"]
    assert hovers["cell-0-0-1"] == "rows, a and b: not known"


def test_modules_stand_by_block_and_type_of_layer() -> None:
    values = {"h.0.mlp.down_proj": 0.004, "h.0.self_attn.q_proj": 0.5, "h.1.self_attn.q_proj": 123.0, "head": 1.0}
    figure, _ = module_maps({"a": values, "b": {"head": 2.0}}, label="cross-talk", logarithmic=True)
    first, second = figure.axes[:2]
    assert [label.get_text() for label in first.get_yticklabels()] == ["Q", "down", "head"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["0", "1", "–"]
    places = {each.get_text(): (round(each.get_position()[0]), round(each.get_position()[1])) for each in first.texts}
    assert places == {".00": (0, 1), ".50": (0, 0), "1e2": (1, 0), "1.0": (2, 2)}
    assert sorted(texts(figure, 1)) == ["2.0", "–", "–", "–"]
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("a", "b")


def test_a_map_of_thousands_of_modules_is_an_image() -> None:
    values = {f"h.{block}.experts.{expert}.w1": 0.5 for block in range(30) for expert in range(80)}
    figure, hovers = module_maps({"a": values}, label="cross-talk", logarithmic=False)
    assert hovers == {}
    assert texts(figure) == []
    assert figure.axes[0].images[0].get_array() is not None
    assert not [each for each in figure.axes[0].patches if isinstance(each, Rectangle)]


def test_predictions_and_measurements_stand_in_the_row_of_their_task() -> None:
    axes = predicted_and_measured({"a": 0.2, "b": 0.4}, {"b": 0.1}, (0.05, 0.5)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    marks = {
        (str(line.get_marker()), float(line.get_xdata()[0]), float(line.get_ydata()[0]))  # type: ignore[index,arg-type]
        for line in axes.lines
        if line.get_marker() in ("o", "D")
    }
    assert marks == {("o", 0.4, 0.0), ("D", 0.1, 0.0), ("o", 0.2, 1.0)}


# files


def test_pictures_lie_beside_the_page(tmp_path: Path) -> None:
    paths = write_interference_page(report(names=("h.0.q_proj",)), tmp_path / "new" / "out.html")
    assert paths[0].read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    names = ["out.html", *(f"out_{name}.png" for name in FIGURES)]
    assert [path.name for path in paths] == names
    assert {path.name for path in paths[0].parent.iterdir()} == set(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[1:])
