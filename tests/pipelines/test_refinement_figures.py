"""How rank moved, as pictures and as a section of the report: what is drawn is what happened."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure
from torch import nn

from flowra_adapters import attach, save_adapter
from flowra_allocation import ModulePlan, RankEvent, RankHistory, RankPlan, write_plan
from flowra_analysis import FlowProfile, ModuleProfile, write_profile
from flowra_pipelines.errors import UserError
from flowra_pipelines.refinement_figures import (
    CAPTIONS,
    budget_path,
    magnitude_and_entropy,
    rank_over_time,
    shape_of_spectrum,
)
from flowra_pipelines.report import profile_report, write_report
from flowra_pipelines.report_refinement import (
    Refinement,
    adapter_shapes,
    read_refinement,
    refinement_figures_of,
    refinement_section,
)

LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
HOSTILE = "</title><script src='http://evil.example/x.js'>alert(1)</script>&\"$\\frac{$"


def history_of(names: tuple[str, ...], *, events: int = 3, budget: int = 400) -> RankHistory:
    """Return a history in which each module loses one direction, one after the other; a unit costs 100."""
    ranks = {name: 1 + index % 3 for index, name in enumerate(names)}
    initial, made = dict(ranks), []
    for event in range(events):
        chosen = names[event % len(names)]
        ranks[chosen] = max(0, ranks[chosen] - 1)
        made.append(
            RankEvent(
                step=20 + 10 * event,
                ranks=dict(ranks),
                parameters=100 * sum(ranks.values()),
                budget=budget,
                dropped={chosen: 1},
                importance=dict.fromkeys(names, 0.5),
                kkt_gap=None if event == 0 else 0.25,
            )
        )
    return RankHistory(
        initial=initial,
        budget=budget,
        policy="shrink",
        settings={"kappa": 2.0, "measure": "flow"},
        steps=tuple(event.step for event in made),
        peak=100 * sum(initial.values()),
        events=made,
    )


NAMES = tuple(f"model.layers.{block}.{layer}" for block in range(2) for layer in LAYERS)
MANY = tuple(f"model.layers.{block}.{layer}" for block in range(50) for layer in LAYERS)


def meshes(figure: Figure) -> dict[str, np.ndarray[Any, Any]]:
    """Return title to the values of each panel's cells, without rank as 0."""
    found = {}
    for axes in figure.axes:
        for mesh in axes.collections:
            if isinstance(mesh, QuadMesh) and axes.get_title(loc="left"):
                values = mesh.get_array()
                assert values is not None
                found[axes.get_title(loc="left")] = np.ma.filled(np.ma.masked_invalid(values), 0)
    return found


def drawn(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


# rank over time


def test_ranks_stand_by_type_of_layer_and_depth_with_time_to_the_right() -> None:
    history = history_of(NAMES)
    figure = rank_over_time(history)
    found = meshes(figure)
    assert list(found) == ["Q  (2)", "V  (2)", "down  (2)"]
    for title, layer in zip(found, LAYERS, strict=True):
        expected = [
            [ranks[f"model.layers.{block}.{layer}"] for ranks in (history.initial, *(e.ranks for e in history.events))]
            for block in range(2)
        ]
        np.testing.assert_array_equal(found[title].reshape(2, 4), expected)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "block")
    assert axes.get_xlim() == (10.0, 50.0)
    assert axes.yaxis_inverted()
    assert figure.axes[-1].get_ylabel() == "rank (directions)"


def test_a_hundred_and_fifty_modules_have_panels_that_can_be_read() -> None:
    figure = rank_over_time(history_of(MANY, events=150))
    assert [values.size for values in meshes(figure).values()] == [50 * 151] * 3
    height = 72 * figure.get_figheight()
    assert height < 800
    for axes in figure.axes[:3]:
        labels = [label for label in axes.get_yticklabels() if label.get_text()]
        assert len(labels) <= 16
        assert height / 50 > 5  # points for each row
    assert len(drawn(figure)) > 1000


def test_modules_outside_blocks_are_named() -> None:
    names = (*NAMES, "pooler.dense", "a$b.other_layer")
    figure = rank_over_time(history_of(names))
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "other  (2)"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["pooler.dense", "a$b.other_layer"]
    drawn(figure)


def test_one_event_and_no_rank_at_all_is_drawn() -> None:
    history = history_of(("h.0.q",), events=1)
    none = replace(history, initial={"h.0.q": 0}, events=[replace(history.events[0], ranks={"h.0.q": 0})])
    assert drawn(rank_over_time(none)) != drawn(rank_over_time(history))


# magnitude and entropy


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        ([2.0, 2.0], (2.0, 1.0, 2)),
        ([3.0, 0.0, 0.0], (1.0, 0.0, 3)),
        ([2.0, 2.0, 0.0, 0.0], (1.0, 0.5, 4)),
        ([5.0], (5.0, 0.0, 1)),
        ([0.0, 0.0], (0.0, 0.0, 2)),
    ],
)
def test_the_shape_of_an_update_is_its_mean_singular_value_and_their_entropy(
    values: list[float], shape: tuple[float, float, int]
) -> None:
    mean, entropy, rank = shape_of_spectrum(torch.tensor(values, dtype=torch.float64))
    assert (mean, rank) == (pytest.approx(shape[0]), shape[2])
    assert entropy == pytest.approx(shape[1], abs=1e-6)
    assert 0 <= entropy <= 1


def test_every_module_is_a_mark_where_its_update_is_and_as_large_as_its_rank() -> None:
    shapes = {NAMES[0]: (0.5, 0.25, 1), NAMES[1]: (1.0, 0.75, 3), NAMES[3]: (0.75, 0.0, 2)}
    figure = magnitude_and_entropy(shapes)
    axes = figure.axes[0]
    marks = [each for each in axes.collections if isinstance(each, PathCollection)]
    points = {tuple(each) for mark in marks for each in np.asarray(mark.get_offsets()).tolist()}
    assert points == {(x, y) for x, y, _ in shapes.values()}
    sizes = {
        tuple(point): float(size)
        for mark in marks
        for point, size in zip(np.asarray(mark.get_offsets()).tolist(), mark.get_sizes(), strict=True)
    }
    assert sizes[0.5, 0.25] < sizes[0.75, 0.0] < sizes[1.0, 0.75]
    assert "singular value of ΔW" in axes.get_xlabel()
    assert "entropy" in axes.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Q", "V"]


def test_the_shapes_are_those_of_the_adapter_s_updates(tmp_path: Path) -> None:
    """Pairs and triplets alike, by a full decomposition of ΔW."""
    for method in ("lora", "svd"):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        layers = attach(model, {"0": 3, "1": 0}, method=method, scaling=2.0)
        with torch.no_grad():
            for parameter in layers["0"].parameters():
                parameter.normal_()
        save_adapter(model, tmp_path / method, consumer="peft")
        sigma = torch.linalg.svdvals(layers["0"].delta_weight().detach().double())[:3]
        found = adapter_shapes(tmp_path / method)
        assert found.keys() == {"0"}
        assert found["0"] == pytest.approx(shape_of_spectrum(sigma), rel=1e-4)


# budget path


def test_the_budget_path_shows_what_was_allowed_what_was_used_and_the_peak() -> None:
    history = history_of(NAMES, budget=900)
    figure = budget_path(history, dict.fromkeys(NAMES, 100))
    axes = figure.axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(np.asarray(lines["used"].get_ydata())) == [1200, 1100, 1000, 900, 900]
    assert list(np.asarray(lines["allowed"].get_ydata())) == [900] * 4
    assert "budget 900" in lines
    assert list(np.asarray(lines["peak 1,200, before the first event"].get_ydata())) == [1200]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "adapter parameters")


def test_without_costs_the_peak_is_a_line() -> None:
    history = history_of(NAMES)
    labels = [str(line.get_label()) for line in budget_path(history).axes[0].lines]
    assert "peak 1,200" in labels
    grown = replace(history, peak=max(event.parameters for event in history.events))
    labels = [str(line.get_label()) for line in budget_path(grown).axes[0].lines]
    assert "peak 1,100, at step 20" in labels


# the report


def write_run(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Write the files of a run that a report reads: profile, plan, history and adapter."""
    (folder / "calibrate").mkdir(parents=True)
    (folder / "calibrate" / "stage.json").write_text("{}")
    modules = {name: ModuleProfile(shape=(6, 5), cost_per_rank=100, statistics={"psi": 0.5}) for name in names}
    write_profile(FlowProfile(modules=modules, base_parameters=2_000), folder / "calibrate")
    history = history_of(names)
    (folder / "allocate").mkdir()
    plans = {
        name: ModulePlan(rank=rank, alpha=2.0 * rank, cost_per_rank=100, psi=0.5, gains=(1.0,))
        for name, rank in history.initial.items()
    }
    spent = sum(plan.used for plan in plans.values())
    write_plan(
        RankPlan(modules=plans, budget=spent, parameters=spent, scaling=2.0, sensitivity_threshold=0.0),
        folder / "allocate",
    )
    (folder / "refine").mkdir()
    (folder / "refine" / "rank_history.json").write_text(json.dumps(history.as_json()))
    model = nn.Sequential(nn.Linear(5, 6))
    attach(model, {"0": 2})
    save_adapter(model, folder / "refine" / "adapter")
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = read_refinement(write_run(tmp_path / "run"))
    assert found is not None
    assert found.history == history_of(NAMES)
    assert found.costs == dict.fromkeys(NAMES, 100)
    assert found.shapes is not None
    assert found.shapes.keys() == {"0"}


def test_the_report_of_a_run_shows_how_rank_moved(tmp_path: Path) -> None:
    page, *pictures = write_report(write_run(tmp_path / "run"))
    assert set(CAPTIONS) <= {path.stem for path in pictures}
    html = page.read_text(encoding="utf-8")
    assert '<section id="refinement"><h2>Refinement</h2>' in html
    for name, caption in CAPTIONS.items():
        assert f'id="{name}-' in html
        assert html.count(caption.split(":")[0]) >= 2  # beside the picture, and in its place
    assert "Policy shrink (kappa 2.0, measure flow)." in html
    assert "3 events from step 20 to 40; directions: 3 dropped." in html
    assert "At the end 900 parameters, above the budget of 400; at most 1,200." in html
    assert "3 of 6 modules changed rank" in html
    assert "<summary>3 events</summary>" in html
    assert '<td class="number">0.25</td>' in html


def test_a_run_without_refinement_has_a_report_without_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "refine" / "rank_history.json").unlink()
    assert read_refinement(run) is None
    page, *pictures = write_report(run)
    assert "Refinement" not in page.read_text(encoding="utf-8")
    assert not set(CAPTIONS) & {path.stem for path in pictures}


def test_what_is_hostile_in_a_history_is_text() -> None:
    names = (HOSTILE, f"h.0.{HOSTILE}", "名前😀.0.q_proj")
    history = history_of(names)
    hostile = replace(history, policy=HOSTILE, settings={HOSTILE: HOSTILE})
    refinement = Refinement(history=hostile, costs=dict.fromkeys(names, 100), shapes={HOSTILE: (1.0, 0.5, 2)})
    figures = refinement_figures_of(refinement)
    section = refinement_section(refinement, figures)
    assert "<script" not in section
    assert "&lt;script" in section
    profile = FlowProfile(modules={"a": ModuleProfile(shape=(2, 1), cost_per_rank=3)}, base_parameters=2)
    _, html = profile_report(profile, refinement=refinement)
    assert "<script" not in html


def test_the_same_history_gives_the_same_section() -> None:
    sections = []
    for _ in range(2):
        refinement = Refinement(history=history_of(NAMES), costs=dict.fromkeys(NAMES, 100))
        figures = refinement_figures_of(refinement)
        assert "magnitude_and_entropy" not in figures
        sections.append(refinement_section(refinement, figures))
    assert sections[0] == sections[1]


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(run: Path) -> None:
        path = run / "refine" / "rank_history.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "refine" / "rank_history.json").write_text("{"), "JSONDecodeError"),
        (edited(lambda content: content.update(format_version=1)), "format_version must be 2, got 1"),
        (edited(lambda content: content.pop("peak")), "peak"),
        (edited(lambda content: content.update(more=1)), "unexpected keyword argument 'more'"),
        (edited(lambda content: content.update(peak=-1)), "counts must be whole numbers ≥ 0, got -1"),
        (edited(lambda content: content["events"][0].update(step=99)), "steps must rise from event to event, got 30"),
        (edited(lambda content: content["events"][0]["ranks"].popitem()), "event must have ranks of the modules"),
        (edited(lambda content: content["events"][0].update(dropped={"other": 1})), "dropped must name modules"),
        (edited(lambda content: content["events"][0].update(parameters="many")), "counts must be whole numbers"),
        (edited(lambda content: content["events"][1].update(kkt_gap="wide")), "kkt_gap must be a number or null"),
        (edited(lambda content: content.update(settings=[])), "history must name modules, a policy and settings"),
    ],
)
def test_a_damaged_history_is_one_line(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    damage(run)
    with pytest.raises(UserError, match=message) as caught:
        read_refinement(run)
    assert "\n" not in str(caught.value)
    assert "rank history must follow docs/formats/rank_history.md" in str(caught.value)


def test_a_plan_of_other_modules_and_a_damaged_adapter_are_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "refine" / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_refinement(run)
    other = write_run(tmp_path / "other", ("h.0.q_proj", "h.0.v_proj"))
    (run / "allocate" / "plan.json").write_text((other / "allocate" / "plan.json").read_text())
    with pytest.raises(UserError, match="plan must name the modules of the rank history, got others"):
        read_refinement(run)


def test_a_history_without_events_has_nothing_to_show(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    empty = replace(history_of(NAMES), events=[])
    content = {"format_version": 2, **asdict(empty)}
    (run / "refine" / "rank_history.json").write_text(json.dumps(content))
    assert read_refinement(run) is None
