"""The report of what a merge costs, against dense matrices in float64, and as a file."""

import doctest
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowra_compose import LowRankUpdate, ModuleStatistics, ModuleUpdates, truncated
from flowra_compose.interference import InterferenceMeter
from flowra_compose.interference_files import from_json, read_interference, to_json, write_interference
from flowra_compose.interference_report import InterferenceReport, TaskScores

SHAPES = [(5, 30), (30, 5), (6, 6), (1, 4), (4, 1), (12, 9)]
Updates = tuple[LowRankUpdate | None, ...]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_update(m: int, n: int, rank: int, *, seed: int, scaling: float = 1.0) -> LowRankUpdate:
    return LowRankUpdate(normal(rank, n, seed=seed), normal(m, rank, seed=seed + 1), scaling)


def moment(size: int, *, seed: int) -> Tensor:
    x = normal(size + 3, size, seed=seed)
    return x.T @ x / len(x)


def statistics(m: int, n: int, *, seed: int) -> ModuleStatistics:
    return ModuleStatistics(inputs=moment(n, seed=seed), outputs=moment(m, seed=seed + 1))


def sum_of(updates: Updates) -> LowRankUpdate:
    module = ModuleUpdates(name="sum", updates=updates, statistics=(None,) * len(updates))
    return module.of_factors(*module.stacked())


def report_of(
    modules: dict[str, Updates],
    merged: dict[str, LowRankUpdate] | None = None,
    known: dict[str, tuple[ModuleStatistics | None, ...]] | None = None,
    **options: Any,  # noqa: ANN401
) -> InterferenceReport:
    """Report a merge of tasks a, b, c, …; by default by their sum and without statistics."""
    count = len(next(iter(modules.values())))
    meter = InterferenceMeter(tasks=tuple("abcdefgh"[:count]), **options)
    for name, updates in modules.items():
        of_module = (None,) * count if known is None else known[name]
        module = ModuleUpdates(name=name, updates=updates, statistics=of_module)
        meter.add(module, sum_of(updates) if merged is None else merged[name])
    return meter.report()


def dense(update: LowRankUpdate | None, shape: tuple[int, int]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64) if update is None else update.delta_weight()


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@st.composite
def tasks(draw: st.DrawFn, *, least: int = 1) -> Updates:
    m, n = draw(st.sampled_from(SHAPES))
    scalings = st.sampled_from([-1.5, 0.01, 1.0, 16.0])
    return tuple(
        random_update(m, n, draw(st.integers(1, 7)), seed=draw(st.integers(0, 10**6)), scaling=draw(scalings))
        for _ in range(draw(st.integers(least, 4)))
    )


# against dense matrices


@settings(max_examples=60)
@given(tasks(), st.integers(0, 10**6), st.sampled_from([1.0, 0.25, -2.0]))
def test_every_number_of_a_module_is_that_of_the_dense_matrices(updates: Updates, seed: int, weight: float) -> None:
    assert updates[0] is not None
    shape = updates[0].shape
    merged = random_update(*shape, 3, seed=seed)
    known = tuple(statistics(*shape, seed=seed + 2 * task) for task in range(len(updates)))
    weights = (weight,) * len(updates)
    report = report_of({"fc": updates}, {"fc": merged}, {"fc": known}, weights=weights)
    module, m = report.modules["fc"], merged.delta_weight()
    tau = [dense(update, shape) for update in updates]
    size = sum(float(each.norm()) for each in tau) + float(m.norm())
    assert module.merged_energy == pytest.approx(float(m.square().sum()), rel=1e-12)
    assert module.sum_energy == pytest.approx(float(torch.stack(tau).sum(0).square().sum()), abs=1e-12 * size**2)
    for one, each, moments in zip(module.tasks, tau, known, strict=True):
        own = each / weight
        assert one.rank == int(torch.linalg.matrix_rank(own))
        assert one.energy == pytest.approx(float(own.square().sum()), rel=1e-12)
        assert one.inner == pytest.approx(float((m * own).sum()), abs=1e-12 * size**2 / abs(weight))
        assert moments.inputs is not None
        assert moments.outputs is not None
        s, c = root(moments.outputs), root(moments.inputs)
        response = float((s @ own @ c).square().sum())
        missed = float((s @ (m - own) @ c).square().sum())
        assert one.response == pytest.approx(response, rel=1e-9)
        assert one.missed == pytest.approx(missed, rel=1e-8, abs=1e-12 * (response + missed))
        assert one.cross_talk == pytest.approx(missed / response, rel=1e-7, abs=1e-10)
    assert report.projections["a"] == pytest.approx(
        float((m * tau[0]).sum() * weight / tau[0].square().sum()), abs=1e-9
    )
    distance = float((m - tau[0] / weight).square().sum() / (tau[0] / weight).square().sum())
    assert report.distances["a"] == pytest.approx(distance, rel=1e-9, abs=1e-9)


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_numbers_of_tasks_are_those_of_their_concatenated_updates(seed: int) -> None:
    shapes = {"fc": (5, 4), "out": (3, 7)}
    modules: dict[str, Updates] = {
        name: tuple(random_update(*shape, 2, seed=seed + 10 * task + index) for task in range(3))
        for index, (name, shape) in enumerate(shapes.items())
    }
    modules["out"] = (None, *modules["out"][1:])
    merged = {name: random_update(*shape, 2, seed=seed + 99) for name, shape in shapes.items()}
    known = {name: tuple(statistics(*shape, seed=seed + task) for task in range(3)) for name, shape in shapes.items()}
    report = report_of(modules, merged, known)
    m = {name: update.delta_weight() for name, update in merged.items()}
    for task, name in enumerate(report.tasks):
        missed = response = product = energy = distance = 0.0
        for module, shape in shapes.items():
            own, moments = dense(modules[module][task], shape), known[module][task]
            assert moments.inputs is not None
            assert moments.outputs is not None
            s, c = root(moments.outputs), root(moments.inputs)
            missed += float((s @ (m[module] - own) @ c).square().sum())
            response += float((s @ own @ c).square().sum())
            product += float((m[module] * own).sum())
            energy += float(own.square().sum())
            distance += float((m[module] - own).square().sum())
        assert report.predicted[name] == pytest.approx(missed / response, rel=1e-9)
        assert report.projections[name] == pytest.approx(product / energy, abs=1e-12)
        assert report.distances[name] == pytest.approx(distance / energy, rel=1e-9)
    alone = report.modules["out"].tasks[0]
    assert (alone.weight, alone.rank, alone.energy, alone.response, alone.cross_talk) == (0.0, 0, 0.0, 0.0, None)
    assert alone.missed is not None
    assert alone.missed > 0  # the merged update disturbs a task at a module that it left alone
    assert [pair is None for pair in report.modules["out"].pairs] == [True, True, False]
    total = sum(float(sum(dense(each, shapes[name]) for each in tau).square().sum()) for name, tau in modules.items())
    assert report.energy_kept == pytest.approx(sum(float(each.square().sum()) for each in m.values()) / total)


def test_diagonal_moments_and_a_missing_s_are_matrices_too() -> None:
    updates: Updates = (random_update(4, 6, 2, seed=0), random_update(4, 6, 3, seed=4))
    inputs, outputs = normal(6, seed=8).square(), normal(4, seed=9).square()
    diagonal = ModuleStatistics(inputs=inputs, outputs=outputs)
    full = ModuleStatistics(inputs=inputs.diag(), outputs=outputs.diag())
    reports = [report_of({"fc": updates}, known={"fc": (one, one)}) for one in (diagonal, full)]
    assert reports[0].predicted == pytest.approx(reports[1].predicted)
    assert reports[0].metric == "inputs_and_outputs"
    plain, identity = (
        report_of({"fc": updates}, known={"fc": (one, one)})
        for one in (ModuleStatistics(inputs=inputs), ModuleStatistics(inputs=inputs, outputs=torch.ones(4)))
    )
    assert plain.predicted == pytest.approx(identity.predicted)
    assert plain.metric == "inputs"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_factors_of_any_dtype_are_measured_in_float64(dtype: torch.dtype) -> None:
    rounded = [
        LowRankUpdate(each.lora_A.to(dtype), each.lora_B.to(dtype))
        for each in (random_update(5, 6, 2, seed=0), random_update(5, 6, 2, seed=5))
    ]
    exact = [LowRankUpdate(each.lora_A.double(), each.lora_B.double()) for each in rounded]
    assert report_of({"fc": tuple(rounded)}) == report_of({"fc": tuple(exact)})


def test_updates_that_are_not_of_low_rank_are_measured_alike() -> None:
    low = (random_update(5, 8, 2, seed=0), random_update(5, 8, 2, seed=5))
    full = tuple(LowRankUpdate.of_delta_weight(each.delta_weight()) for each in low)
    first, second = report_of({"fc": low}).modules["fc"], report_of({"fc": full}).modules["fc"]
    assert second.tasks[0].rank == 2
    assert second.pairs[0] is not None
    assert first.pairs[0] is not None
    assert second.pairs[0].cosine == pytest.approx(first.pairs[0].cosine, abs=1e-12)
    assert second.sum_energy == pytest.approx(first.sum_energy)


# laws


@settings(max_examples=30)
@given(tasks(least=2), st.data())
def test_the_order_of_tasks_is_that_of_the_numbers_and_nothing_else(updates: Updates, data: st.DataObject) -> None:
    assert updates[0] is not None
    known = tuple(statistics(*updates[0].shape, seed=task) for task in range(len(updates)))
    order = data.draw(st.sampled_from(list(permutations(range(len(updates))))))
    report = report_of({"fc": updates}, known={"fc": known})
    turned = report_of({"fc": tuple(updates[i] for i in order)}, known={"fc": tuple(known[i] for i in order)})
    names = dict(zip(turned.tasks, (report.tasks[i] for i in order), strict=True))
    for number in ("cosine", "row_overlap", "column_overlap", "sign_conflict"):
        found, expected = turned.pair_means(number), report.pair_means(number)  # type: ignore[arg-type]
        for (first, second), value in found.items():
            pair = (names[first], names[second])
            assert value == pytest.approx(expected.get(pair, expected.get(pair[::-1])), abs=1e-10)
    for found, expected in ((turned.predicted, report.predicted), (turned.projections, report.projections)):
        assert {names[name]: value for name, value in found.items()} == pytest.approx(expected, rel=1e-7, abs=1e-9)
    assert turned.energy_kept == pytest.approx(report.energy_kept)
    assert turned.modules["fc"].cancelled == pytest.approx(report.modules["fc"].cancelled, abs=1e-12)


def test_tasks_on_orthogonal_inputs_do_not_interfere() -> None:
    q = torch.linalg.qr(normal(9, 6, seed=0)).Q
    updates = tuple(LowRankUpdate(q[:, 2 * i : 2 * i + 2].T, normal(7, 2, seed=i)) for i in range(3))
    known = tuple(
        ModuleStatistics(inputs=q[:, 2 * i : 2 * i + 2] @ q[:, 2 * i : 2 * i + 2].T, outputs=moment(7, seed=i))
        for i in range(3)
    )
    report = report_of({"fc": updates}, known={"fc": known})
    assert list(report.predicted.values()) == pytest.approx([0, 0, 0], abs=1e-15)
    assert list(report.pair_means("cosine").values()) == pytest.approx([0, 0, 0], abs=1e-15)
    assert list(report.pair_means("row_overlap").values()) == pytest.approx([0, 0, 0], abs=1e-25)
    assert report.modules["fc"].singular_task_interference == pytest.approx(0, abs=1e-12)
    assert report.energy_kept == pytest.approx(1)
    assert list(report.projections.values()) == pytest.approx([1, 1, 1])


def test_equal_tasks_are_one_and_their_mean_costs_nothing() -> None:
    one = random_update(8, 6, 3, seed=0)
    half = replace(one, scaling=0.5)
    known = (statistics(8, 6, seed=1), statistics(8, 6, seed=3))
    report = report_of({"fc": (half, half)}, known={"fc": known}, weights=(0.5, 0.5))
    (pair,) = report.modules["fc"].pairs
    assert pair is not None
    assert (pair.cosine, pair.row_overlap, pair.column_overlap) == pytest.approx((1, 1, 1), abs=1e-12)
    assert (pair.row_angle, pair.column_angle) == pytest.approx((0, 0), abs=1e-12)
    assert pair.sign_conflict == 0.0
    assert report.modules["fc"].cancelled == pytest.approx(0, abs=1e-15)
    assert list(report.predicted.values()) == pytest.approx([0, 0], abs=1e-24)
    assert list(report.projections.values()) == pytest.approx([1, 1])
    assert list(report.distances.values()) == pytest.approx([0, 0], abs=1e-14)


def test_one_task_alone_costs_nothing() -> None:
    report = report_of({"fc": (random_update(5, 4, 2, seed=0),)}, known={"fc": (statistics(5, 4, seed=1),)})
    assert report.predicted["a"] == pytest.approx(0, abs=1e-24)
    assert report.modules["fc"].pairs == ()
    assert report.modules["fc"].singular_task_interference == pytest.approx(0, abs=1e-10)
    assert report.agreement is None


def test_a_merge_that_keeps_nothing_loses_what_no_adapter_would() -> None:
    zero = LowRankUpdate(torch.ones(1, 4), torch.zeros(5, 1))
    updates = (random_update(5, 4, 2, seed=0), random_update(5, 4, 1, seed=5))
    known = (statistics(5, 4, seed=1), statistics(5, 4, seed=3))
    report = report_of({"fc": updates}, {"fc": zero}, {"fc": known})
    assert list(report.predicted.values()) == pytest.approx([1, 1])
    assert report.energy_kept == 0.0
    assert list(report.distances.values()) == pytest.approx([1, 1])


def test_updates_that_cancel_keep_an_energy_that_is_not_known() -> None:
    one = random_update(5, 4, 2, seed=0)
    report = report_of({"fc": (one, replace(one, scaling=-1.0))})
    assert report.modules["fc"].sum_energy == 0.0
    assert report.energy_kept is None
    assert report.modules["fc"].cancelled == pytest.approx(1)
    assert report.pair_means("cosine") == pytest.approx({("a", "b"): -1.0})


def test_a_weight_by_module_is_taken_out_of_that_module() -> None:
    plain = (random_update(5, 4, 2, seed=0), random_update(5, 4, 2, seed=5))
    weights = {"fc": 0.5, "out": -3.0}
    weighted = {name: (replace(plain[0], scaling=w), plain[1]) for name, w in weights.items()}
    merged = dict.fromkeys(weights, random_update(5, 4, 2, seed=9))
    report = report_of(weighted, merged, weights=(weights, 1.0))
    expected = report_of({"fc": plain, "out": plain}, merged)
    assert report.projections == pytest.approx(expected.projections)
    assert report.distances == pytest.approx(expected.distances)
    assert [report.modules[name].tasks[0].weight for name in weights] == [0.5, -3.0]


def test_what_a_truncation_lost_is_told() -> None:
    updates = (random_update(9, 8, 3, seed=0), random_update(9, 8, 3, seed=5))
    cut = truncated(sum_of(updates), rank=2)
    report = report_of({"fc": updates}, {"fc": cut})
    assert report.modules["fc"].truncation_loss == pytest.approx(cut.relative_loss)
    assert report.energy_kept == pytest.approx(1 - cut.relative_loss)
    assert report_of({"fc": updates}).modules["fc"].truncation_loss is None


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


def test_without_signs_nothing_larger_than_stacked_factors_is_made() -> None:
    m, n, stacked = 300, 200, 24  # the merged update stands beside one of a task, or beside itself
    updates = tuple(random_update(m, n, 4, seed=seed) for seed in range(3))
    diagonal = ModuleStatistics(inputs=torch.ones(n), outputs=torch.ones(m))
    module = ModuleUpdates(name="fc", updates=updates, statistics=(diagonal,) * 3)
    merged = sum_of(updates)
    meter = InterferenceMeter(tasks=("a", "b", "c"), signs=False)
    with LargestTensor() as watch:
        meter.add(module, merged)
        assert watch.largest <= m * stacked
        merged.delta_weight()
        assert watch.largest == m * n  # the watch would have seen it
    (pair, *_) = meter.report().modules["fc"].pairs
    assert pair is not None
    assert pair.sign_conflict is None
    assert meter.report().modules["fc"].cancelled is None


# scores


def scored(report: InterferenceReport, *scores: tuple[float, float, float]) -> InterferenceReport:
    named = {
        name: TaskScores(base=base, single=single, merged=merged)
        for name, (base, single, merged) in zip(report.tasks, scores, strict=True)
    }
    return replace(report, scores=named)


def three_tasks() -> InterferenceReport:
    """Return a report in which a, b and c are predicted to lose more and more."""
    q = torch.linalg.qr(normal(6, 6, seed=0)).Q
    updates = tuple(LowRankUpdate(q[i : i + 1], normal(5, 1, seed=i), 1.0) for i in range(3))
    known = tuple(ModuleStatistics(inputs=q[i : i + 1].T @ q[i : i + 1]) for i in range(3))
    merged = LowRankUpdate(
        q[:3], torch.cat([s * each.lora_B for s, each in zip((0.9, 0.7, 0.5), updates, strict=True)], 1)
    )
    return report_of({"fc": updates}, {"fc": merged}, {"fc": known})


def test_the_share_of_the_gain_that_is_lost() -> None:
    report = scored(three_tasks(), (0.5, 0.9, 0.88), (0.6, 0.8, 0.6), (0.5, 0.7, 0.75))
    assert report.predicted == pytest.approx({"a": 0.01, "b": 0.09, "c": 0.25})
    measured = report.measured
    assert [one.interference for one in measured.values()] == pytest.approx([0.05, 1.0, -0.25])
    assert [one.retention for one in measured.values()] == pytest.approx([0.88 / 0.9, 0.75, 0.75 / 0.7])
    assert [one.drop for one in measured.values()] == pytest.approx([0.02, 0.2, -0.05])
    assert report.worst_task == ("b", pytest.approx(1.0))
    assert report.largest_drop == ("b", pytest.approx(0.2))
    assert report.agreement == pytest.approx(-0.5)


def test_without_scores_the_prediction_says_which_task_is_worst() -> None:
    report = three_tasks()
    assert report.worst_task == ("c", pytest.approx(0.25))
    assert report.largest_drop is None
    assert report.measured == {}
    assert report_of({"fc": (random_update(3, 4, 1, seed=0),)}).worst_task is None


def test_an_adapter_that_gains_nothing_has_no_share_to_lose() -> None:
    report = scored(three_tasks(), (0.5, 0.5, 0.4), (0.5, 0.4, 0.5), (-0.7, -0.2, -0.3))
    a, b, c = report.measured.values()
    assert (a.interference, b.interference) == (None, None)
    assert (a.retention, c.retention) == (pytest.approx(0.8), None)
    assert c.interference == pytest.approx(0.2)
    assert report.agreement is None


@pytest.mark.parametrize(
    ("merged", "expected"),
    [((0.89, 0.78, 0.6), 1.0), ((0.8, 0.7, 0.6), 1.0), ((0.6, 0.7, 0.79), -1.0), ((0.8, 0.75, 0.65), None)],
    ids=["same", "same order", "opposite", "no variation"],
)
def test_agreement_is_spearman_s_correlation(merged: tuple[float, float, float], expected: float | None) -> None:
    single = (0.9, 0.85, 0.8) if expected is not None else (0.9, 0.85, 0.75)
    triples = [(each - 0.4, each, one) for each, one in zip(single, merged, strict=True)]
    found = scored(three_tasks(), *triples).agreement
    assert found == (None if expected is None else pytest.approx(expected))


# refusals


@pytest.mark.parametrize("names", [(), ("a", "a"), ("a", ""), ("a", 3)], ids=str)
def test_tasks_must_be_distinct_names(names: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="tasks must be distinct names, at least one"):
        InterferenceMeter(tasks=names)


def test_what_does_not_fit_the_meter_is_refused() -> None:
    one = random_update(3, 4, 2, seed=0)
    with pytest.raises(ValueError, match="weights must be one for each task, got 1 for"):
        InterferenceMeter(tasks=("a", "b"), weights=(1.0,))
    meter = InterferenceMeter(tasks=("a", "b"))
    with pytest.raises(ValueError, match="modules must be at least one"):
        meter.report()
    with pytest.raises(ValueError, match="module must have updates of 2 tasks, got 1 for 'fc'"):
        meter.add(ModuleUpdates(name="fc", updates=(one,), statistics=(None,)), one)
    module = ModuleUpdates(name="fc", updates=(one, one), statistics=(None, None))
    with pytest.raises(ValueError, match=r"merged must be the update of a new module, of its shape, got \(4, 3\)"):
        meter.add(module, random_update(4, 3, 1, seed=0))
    meter.add(module, one)
    with pytest.raises(ValueError, match=r"merged must be the update of a new module, .* got one that has been added"):
        meter.add(module, one)
    with pytest.raises(ValueError, match=r"scores must be those of \['a', 'b'\], got \['a'\]"):
        meter.report({"a": TaskScores(base=0, single=1, merged=1)})


def test_statistics_of_another_shape_or_kind_are_refused() -> None:
    one = random_update(3, 4, 2, seed=0)
    meter = InterferenceMeter(tasks=("a",))
    wrong = ModuleUpdates(name="fc", updates=(one,), statistics=(ModuleStatistics(inputs=torch.eye(3)),))
    with pytest.raises(ValueError, match=r"statistics must be of 4 inputs and 3 outputs, got \(3, 3\) for 'fc'"):
        meter.add(wrong, one)
    meter.add(replace(wrong, statistics=(ModuleStatistics(inputs=torch.eye(4)),)), one)
    both = (ModuleStatistics(inputs=torch.eye(4), outputs=torch.eye(3)),)
    with pytest.raises(ValueError, match="must hold the same in all modules, got inputs_and_outputs for 'out' after"):
        meter.add(replace(wrong, name="out", statistics=both), one)


# the file


def whole() -> InterferenceReport:
    """Return a report that knows everything, of three tasks, one of which leaves a module alone."""
    modules: dict[str, Updates] = {
        "fc": tuple(random_update(5, 4, 2, seed=3 * i) for i in range(3)),
        "out": (random_update(3, 6, 1, seed=20), None, random_update(3, 6, 2, seed=22)),
    }
    known = {"fc": tuple(statistics(5, 4, seed=i) for i in range(3)), "out": (statistics(3, 6, seed=5), None, None)}
    merged = {name: truncated(sum_of(updates), rank=2) for name, updates in modules.items()}
    report = report_of(modules, merged, known, weights=(1.0, 2.0, -0.5))
    report = replace(report, settings={"rule": "truncated_svd", "rank": 2, "density": 0.5})
    return scored(report, (0.5, 0.9, 0.88), (0.6, 0.8, 0.6), (0.5, 0.7, 0.75))


@pytest.mark.parametrize("scores", [True, False])
def test_a_report_comes_back_from_its_file_as_it_was(scores: bool, tmp_path: Path) -> None:
    report = whole() if scores else replace(whole(), scores=None)
    assert from_json(to_json(report)) == report
    path = write_interference(report, tmp_path / "new")
    assert read_interference(path.parent) == report
    before = path.read_bytes()
    write_interference(read_interference(path.parent), path.parent)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["interference.json"]


def edited(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:  # noqa: ANN401
    def edit(content: dict[str, Any]) -> None:
        place: Any = content
        for key in path[:-1]:
            place = place[key]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return edit


FC = ("modules", "fc")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited("format_version", value=1), "format_version must be 2, got 1"),
        (edited("format_version", value=True), "format_version must be 2, got True"),
        (edited("surplus", value=1), "unexpected keyword argument 'surplus'"),
        (edited(*FC, "surplus", value=1), "unexpected keyword argument 'surplus'"),
        (edited(*FC, "tasks", 0, "surplus", value=1), "unexpected keyword argument 'surplus'"),
        (edited(*FC, "pairs", 0, "surplus", value=1), "unexpected keyword argument 'surplus'"),
        (edited("tasks", value=["a", "b", "a"]), "tasks must be distinct names"),
        (edited("tasks", value="abc"), "a list is needed, got 'abc'"),
        (edited("tasks", value=[[], {}, 1]), "tasks must be distinct names"),
        (edited("tasks", value=["a", "b"]), "module must have 2 tasks and 1 pairs, got 3 and 3 for 'fc'"),
        (edited("metric", value="outputs"), "metric must be 'inputs', 'inputs_and_outputs' or None, got 'outputs'"),
        (edited("metric", value=[]), "TypeError"),
        (edited("metric", value=None), "metric must be there if and only if something is missed in it, got None"),
        (edited("scores", value={}), r"scores must be those of \['a', 'b', 'c'\], got \[\]"),
        (edited("scores", value=[1]), "AttributeError"),
        (edited("scores", "a", "merged", value="high"), "merged must be a finite number, got 'high'"),
        (edited("scores", "a", "merged", value=10**400), "merged must be a finite number, got 1000"),
        (edited("scores", "a", "merged", value=...), "missing 1 required keyword-only argument: 'merged'"),
        (edited("settings", value=...), "KeyError: 'settings'"),
        (edited("settings", value=["ties"]), "an object is needed"),
        (
            edited("settings", "rule", value=None),
            "settings must be text or finite numbers by name, got None for 'rule'",
        ),
        (
            edited("settings", "rule", value=True),
            "settings must be text or finite numbers by name, got True for 'rule'",
        ),
        (edited("settings", "rule", value=["ties"]), "settings must be text or finite numbers by name"),
        (edited("modules", value={}), "modules must be at least one, got none"),
        (edited("modules", value=[]), "AttributeError"),
        (edited("modules", "fc", value=[["shape", [1, 2]]]), "an object is needed"),
        (edited(*FC, "shape", value=[5]), "not enough values"),
        (edited(*FC, "shape", value=[5, 0]), r"shape must have no empty side, got \(5, 0\)"),
        (edited(*FC, "shape", value=[5, 4.0]), r"shape must be a whole number ≥ 0, got 4\.0"),
        (edited(*FC, "merged_energy", value=-1.0), "merged_energy must be a finite number .* got -1.0"),
        (edited(*FC, "merged_energy", value=True), "merged_energy must be a finite number .* got True"),
        (edited(*FC, "cancelled", value=1.5), "cancelled must be a finite number .* got 1.5"),
        (edited(*FC, "truncation_loss", value="x"), "truncation_loss must be a finite number .* got 'x'"),
        (edited(*FC, "tasks", 0, "rank", value=-1), "rank must be a whole number ≥ 0, got -1"),
        (edited(*FC, "tasks", 0, "rank", value=0), "pair must be there where both tasks have a rank"),
        (edited(*FC, "tasks", 0, "weight", value=0), "weight must not be 0 where the task changes the module"),
        (edited(*FC, "tasks", 0, "missed", value=None), "missed and response must be there together"),
        (edited(*FC, "tasks", 0, value=3), "an object is needed, got 3"),
        (edited(*FC, "pairs", 0, value=None), "pair must be there where both tasks have a rank, got None of 0, 1"),
        (edited(*FC, "pairs", 0, "cosine", value=1.01), "cosine must be a finite number .* got 1.01"),
        (edited(*FC, "pairs", 0, "row_angle", value=1.6), "row_angle must be a finite number .* got 1.6"),
        (edited(*FC, "pairs", 0, "row_overlap", value=None), "row_overlap must be a finite number .* got None"),
    ],
    ids=lambda each: each if isinstance(each, str) else None,
)
def test_a_damaged_report_is_refused_in_one_line(
    edit: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    content = json.loads(to_json(whole()))
    edit(content)
    (tmp_path / "interference.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        read_interference(tmp_path)
    said = str(caught.value)
    assert said.startswith("interference report must follow docs/formats/interference.md, got ")
    assert said.endswith("; in " + str(tmp_path / "interference.json"))
    assert "\n" not in said


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"a"', "{}", "[" * 100_000, '{"format_version": 1}', '{"format_version": NaN}'],
    ids=lambda text: text[:12],
)
def test_what_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "interference.json").write_text(text)
    with pytest.raises(ValueError, match="interference report must follow"):
        read_interference(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str, tmp_path: Path) -> None:
    text = to_json(whole()).replace('"base": 0.5', f'"base": {number}', 1)
    (tmp_path / "interference.json").write_text(text)
    with pytest.raises(ValueError, match=r"numbers must be finite|base must be a finite number"):
        read_interference(tmp_path)


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="interference report must be a file of at most"):
        read_interference(tmp_path)
    with (tmp_path / "interference.json").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(ValueError, match="interference report must be a file of at most"):
        read_interference(tmp_path)


def test_a_write_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = write_interference(whole(), tmp_path)
    before = path.read_bytes()
    broken = whole()
    object.__setattr__(broken.modules["fc"], "merged_energy", math.nan)
    with pytest.raises(ValueError, match="Out of range float values"):
        write_interference(broken, tmp_path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["interference.json"]


def test_the_docstrings_are_true() -> None:
    module = importlib.import_module("flowra_compose.interference")
    assert doctest.testmod(module).failed == 0


def test_a_module_that_a_budget_left_out_counts_as_an_update_of_zero() -> None:
    module = ModuleUpdates(
        name="fc",
        updates=(LowRankUpdate(torch.ones(1, 3), torch.ones(2, 1)),),
        statistics=(ModuleStatistics(inputs=torch.eye(3)),),
    )
    reports = []
    for merged in (None, LowRankUpdate(torch.zeros(1, 3), torch.zeros(2, 1))):
        meter = InterferenceMeter(tasks=("a",))
        meter.add(module, merged)
        reports.append(meter.report())
    assert reports[0] == reports[1]
    assert reports[0].predicted == pytest.approx({"a": 1.0})
