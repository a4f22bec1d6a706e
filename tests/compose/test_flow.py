"""Composition by matching outputs: its guarantees, and the full linear system as the judge."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowra_compose import (
    LowRankUpdate,
    MergeOptions,
    ModuleStatistics,
    cross_talk,
    matching_energy,
    matching_objective,
    merge_updates,
)

GOLDEN = Path(__file__).parents[1] / "golden"
MERGE = json.loads((GOLDEN / "flowra_merge.json").read_text())
CORE = json.loads((GOLDEN / "flowra_core_merge.json").read_text())

Updates = Sequence[LowRankUpdate | None]
Statistics = Sequence[ModuleStatistics | None]


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flow(
    updates: Updates, statistics: Statistics, *, shrinkage: float | None = None, weights: Sequence[float] | None = None
) -> LowRankUpdate:
    merged = merge_updates(
        [{} if update is None else {"fc": update} for update in updates],
        [1.0] * len(updates) if weights is None else weights,
        rule="flow",
        options=MergeOptions(shrinkage=shrinkage),
        statistics=[{} if known is None else {"fc": known} for known in statistics],
    )
    return merged["fc"]


def shrunk(moment: Tensor, shrinkage: float) -> Tensor:
    full = moment if moment.ndim == 2 else torch.diag(moment)
    return (1 - shrinkage) * full + shrinkage * full.trace() / len(full) * torch.eye(len(full), dtype=full.dtype)


@dataclass(frozen=True)
class Dense:
    """τᵢ, Cᵢ and Sᵢ of the tasks as matrices, and what follows from the definition."""

    tau: list[Tensor]
    c: list[Tensor]
    s: list[Tensor]

    @classmethod
    def of(cls, updates: Updates, statistics: Statistics, shrinkage: float) -> "Dense":
        tasks = [(update, known) for update, known in zip(updates, statistics, strict=True) if known is not None]
        m, n = next(update.shape for update, _ in tasks if update is not None)
        return cls(
            [tensor([[0.0] * n] * m) if update is None else update.delta_weight() for update, _ in tasks],
            [shrunk(known.inputs, shrinkage) for _, known in tasks if known.inputs is not None],
            [
                shrunk(torch.ones(m) if known.outputs is None else known.outputs, shrinkage).double()
                for _, known in tasks
            ],
        )

    def objective(self, merged: Tensor) -> float:
        tasks = zip(self.tau, self.c, self.s, strict=True)
        return float(sum(torch.trace(s @ (merged - tau) @ c @ (merged - tau).T) for tau, c, s in tasks))

    def gradient(self, merged: Tensor) -> Tensor:
        tasks = zip(self.tau, self.c, self.s, strict=True)
        return torch.stack([s @ (merged - tau) @ c for tau, c, s in tasks]).sum(0)

    def size(self) -> float:
        """Σ ‖Sᵢ τᵢ Cᵢ‖, what a gradient is measured against."""
        return sum(float((s @ tau @ c).norm()) for tau, c, s in zip(self.tau, self.c, self.s, strict=True))

    def solved(self) -> Tensor:
        """The minimum over all matrices, by the linear system of m n unknowns."""
        system = torch.stack([torch.kron(s, c) for c, s in zip(self.c, self.s, strict=True)]).sum(0)
        right = torch.stack([s @ tau @ c for tau, c, s in zip(self.tau, self.c, self.s, strict=True)]).sum(0)
        return torch.linalg.solve(system, right.flatten()).view_as(right)

    def core(self) -> tuple[Tensor, Tensor]:
        """Spanning columns of the extended core: of the inputs, and of the outputs."""
        c_mean, s_mean = torch.stack(self.c).sum(0), torch.stack(self.s).sum(0)
        rows = [
            torch.cat([tau.T, torch.linalg.solve(c_mean, c @ tau.T)], 1)
            for tau, c in zip(self.tau, self.c, strict=True)
        ]
        columns = [
            torch.cat([tau, torch.linalg.solve(s_mean, s @ tau)], 1) for tau, s in zip(self.tau, self.s, strict=True)
        ]
        return torch.cat(rows, 1), torch.cat(columns, 1)


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_update(m: int, n: int, rank: int, *, seed: int, scaling: float = 1.0) -> LowRankUpdate:
    return LowRankUpdate(random_tensor(rank, n, seed=seed), random_tensor(m, rank, seed=seed + 1), scaling)


def random_moment(dim: int, examples: int, *, seed: int, size: float = 1.0) -> Tensor:
    x = random_tensor(examples, dim, seed=seed)
    return size * x.T @ x / examples


@dataclass(frozen=True)
class Case:
    updates: list[LowRankUpdate | None]
    statistics: list[ModuleStatistics | None]
    shrinkage: float

    @property
    def dense(self) -> Dense:
        return Dense.of(self.updates, self.statistics, self.shrinkage)

    def merged(self) -> LowRankUpdate:
        return flow(self.updates, self.statistics, shrinkage=self.shrinkage)


@st.composite
def cases(
    draw: st.DrawFn, *, outputs: bool | None = None, same_inputs: bool = False, absent: bool = True, side: int = 6
) -> Case:
    m, n = draw(st.integers(1, side)), draw(st.integers(1, side))
    tasks = draw(st.integers(1, 4))
    seeds = st.integers(0, 10**6)
    with_outputs = draw(st.booleans()) if outputs is None else outputs
    examples = st.integers(1, 9)
    sizes = st.sampled_from([0.1, 1.0, 10.0])
    updates: list[LowRankUpdate | None] = [
        random_update(m, n, draw(st.integers(1, 3)), seed=draw(seeds), scaling=draw(st.sampled_from([-2.0, 0.1, 1.0])))
        for _ in range(tasks)
    ]
    if absent:
        updates = [updates[0], *(None if draw(st.booleans()) else update for update in updates[1:])]
    shared = random_moment(n, draw(examples), seed=draw(seeds))
    statistics: list[ModuleStatistics | None] = [
        ModuleStatistics(
            inputs=shared if same_inputs else random_moment(n, draw(examples), seed=draw(seeds), size=draw(sizes)),
            outputs=random_moment(m, draw(examples), seed=draw(seeds), size=draw(sizes)) if with_outputs else None,
        )
        for _ in range(tasks)
    ]
    return Case(updates, statistics, draw(st.sampled_from([0.02, 0.1, 0.5])))


def span(columns: Tensor) -> Tensor:
    u, sigma, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, sigma > 1e-9 * sigma[0]]


def near(found: Tensor, expected: Tensor, size: float, tolerance: float = 1e-7) -> bool:
    return float((found - expected).norm()) <= tolerance * size


# golden


@pytest.mark.parametrize(("outputs", "expected"), [(True, "kfac"), (False, "regmean_S_identity")])
def test_golden_merge_of_two_tasks(outputs: bool, expected: str) -> None:
    updates = [LowRankUpdate.of_delta_weight(tensor(MERGE[name])) for name in ("D1", "D2")]
    statistics = [
        ModuleStatistics(inputs=tensor(MERGE[f"C{i}"]), outputs=tensor(MERGE[f"S{i}"]) if outputs else None)
        for i in (1, 2)
    ]
    found = flow(updates, statistics, shrinkage=0.0).delta_weight()
    torch.testing.assert_close(found, tensor(MERGE[expected]), rtol=0, atol=1e-9)
    alone = flow(updates[:1], statistics[:1], shrinkage=0.0).delta_weight()
    torch.testing.assert_close(alone, tensor(MERGE["single_task"]), rtol=0, atol=1e-9)
    equal = flow(updates, statistics[:1] * 2, shrinkage=0.0).delta_weight()
    torch.testing.assert_close(equal, tensor(MERGE["equal_statistics_gives_mean"]), rtol=0, atol=1e-9)


def test_golden_disjoint_inputs_do_not_interfere() -> None:
    updates = [LowRankUpdate.of_delta_weight(tensor(MERGE[name])) for name in ("D1", "D2")]
    moments = [tensor(MERGE["disjoint_inputs"][name]) for name in ("C1", "C2")]
    found = flow(updates, [ModuleStatistics(inputs=each) for each in moments], shrinkage=0.0).delta_weight()
    torch.testing.assert_close(found, tensor(MERGE["disjoint_inputs"]["M"]), rtol=0, atol=1e-9)


def test_golden_extended_core() -> None:
    updates = [LowRankUpdate(tensor(each["A"]), tensor(each["B"])) for each in CORE["factors"]]
    statistics = [
        ModuleStatistics(inputs=tensor(c), outputs=tensor(s)) for c, s in zip(CORE["C"], CORE["S"], strict=True)
    ]
    values = CORE["objective_values"]
    found = flow(updates, statistics, shrinkage=0.0)
    torch.testing.assert_close(found.delta_weight(), tensor(CORE["M_extended_core"]), rtol=0, atol=1e-7)
    assert matching_objective(found, updates, statistics) == pytest.approx(values["extended_core"], rel=1e-8)
    mean = merge_updates([{"fc": update} for update in updates], [0.5, 0.5])["fc"]
    assert matching_objective(mean, updates, statistics) == pytest.approx(values["mean"], rel=1e-8)
    assert matching_objective(found, updates, statistics) <= 1.01 * values["full"]
    without = [ModuleStatistics(inputs=tensor(c)) for c in CORE["C"]]
    closed = tensor(CORE["S_identity"]["regmean_closed_form"])
    torch.testing.assert_close(flow(updates, without, shrinkage=0.0).delta_weight(), closed, rtol=0, atol=1e-9)


# the full system as the judge


@settings(max_examples=80)
@given(cases())
def test_it_is_the_minimum_over_the_extended_core(case: Case) -> None:
    merged, dense = case.merged().delta_weight(), case.dense
    q_a, q_b = (span(each) for each in dense.core())
    size = sum(float(tau.norm()) for tau in dense.tau)
    assert near(q_b @ q_b.T @ merged @ q_a @ q_a.T, merged, size)
    assert float((q_b.T @ dense.gradient(merged) @ q_a).norm()) <= 1e-8 * dense.size()
    assert dense.objective(dense.solved()) - dense.objective(merged) <= 1e-12 * size * dense.size()


@settings(max_examples=60)
@given(cases(outputs=False))
def test_without_output_moments_it_is_the_full_solution(case: Case) -> None:
    merged, dense = case.merged().delta_weight(), case.dense
    c_mean = torch.stack(dense.c).sum(0)
    right = torch.stack([tau @ c for tau, c in zip(dense.tau, dense.c, strict=True)]).sum(0)
    size = sum(float(tau.norm()) for tau in dense.tau)
    assert near(merged, torch.linalg.solve(c_mean, right.T).T, size)
    assert near(merged, dense.solved(), size)


@settings(max_examples=60)
@given(cases(outputs=True, same_inputs=True))
def test_with_equal_input_moments_it_is_the_full_solution(case: Case) -> None:
    dense = case.dense
    assert near(case.merged().delta_weight(), dense.solved(), sum(float(tau.norm()) for tau in dense.tau))


@settings(max_examples=40)
@given(cases(outputs=True, side=3, absent=False))
def test_updates_of_full_rank_give_the_full_solution(case: Case) -> None:
    full = [LowRankUpdate.of_delta_weight(random_tensor(*u.shape, seed=i)) for i, u in enumerate(case.updates) if u]
    dense = Dense.of(full, case.statistics, case.shrinkage)
    merged = flow(full, case.statistics, shrinkage=case.shrinkage).delta_weight()
    assert near(merged, dense.solved(), sum(float(tau.norm()) for tau in dense.tau))


# guarantees


@settings(max_examples=40)
@given(cases(absent=False))
def test_one_task_gives_its_own_update(case: Case) -> None:
    update = case.updates[0]
    assert update is not None
    found = flow(case.updates[:1], case.statistics[:1], shrinkage=case.shrinkage).delta_weight()
    assert near(found, update.delta_weight(), float(update.delta_weight().norm()), 1e-8)


@settings(max_examples=40)
@given(cases(absent=False))
def test_equal_updates_give_that_update_whatever_the_statistics(case: Case) -> None:
    update = case.updates[0]
    assert update is not None
    found = flow([update] * len(case.updates), case.statistics, shrinkage=case.shrinkage).delta_weight()
    assert near(found, update.delta_weight(), float(update.delta_weight().norm()), 1e-8)


@settings(max_examples=40)
@given(cases())
def test_equal_statistics_give_the_mean(case: Case) -> None:
    found = flow(case.updates, case.statistics[:1] * len(case.updates), shrinkage=case.shrinkage).delta_weight()
    tau = case.dense.tau
    assert near(found, torch.stack(tau).mean(0), sum(float(each.norm()) for each in tau), 1e-8)


@settings(max_examples=40)
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_tasks_does_not_matter(case: Case, random: object) -> None:
    order = list(range(len(case.updates)))
    random.shuffle(order)  # type: ignore[attr-defined]
    other = Case([case.updates[i] for i in order], [case.statistics[i] for i in order], case.shrinkage)
    size = sum(float(tau.norm()) for tau in case.dense.tau)
    assert near(other.merged().delta_weight(), case.merged().delta_weight(), size)


@settings(max_examples=60)
@given(cases())
def test_the_mean_and_every_single_update_are_no_better(case: Case) -> None:
    dense = case.dense
    best = dense.objective(case.merged().delta_weight())
    for other in (torch.stack(dense.tau).mean(0), *dense.tau):
        assert best <= dense.objective(other) * (1 + 1e-9) + 1e-12 * dense.size()


@pytest.mark.parametrize("outputs", [True, False], ids=["outputs", "inputs"])
def test_tasks_whose_inputs_are_orthogonal_keep_their_own_outputs(outputs: bool) -> None:
    m, n, tasks = 7, 12, 3
    basis = torch.linalg.qr(random_tensor(n, n, seed=1))[0].chunk(tasks, dim=1)
    x = [random_tensor(50, each.shape[1], seed=10 + i) @ each.T for i, each in enumerate(basis)]
    updates = [random_update(m, n, 2, seed=20 + 2 * i) for i in range(tasks)]
    statistics = [
        ModuleStatistics(
            inputs=each.T @ each / 50, outputs=random_moment(m, 20, seed=30 + i, size=10.0**i) if outputs else None
        )
        for i, each in enumerate(x)
    ]
    merged = flow(updates, statistics, shrinkage=0.0)
    for each, update, known in zip(x, updates, statistics, strict=True):
        own = each @ update.delta_weight().T
        assert near(each @ merged.delta_weight().T, own, float(own.norm()), 1e-8)
        assert cross_talk(merged, update, known) <= 1e-14
    summed = merge_updates([{"fc": update} for update in updates], [1.0] * tasks)["fc"]
    assert cross_talk(summed, updates[0], statistics[0]) > 0.1  # the plain sum is not free of it


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_unit_of_the_moments_does_not_matter(scale: float) -> None:
    updates = [random_update(5, 6, 2, seed=i) for i in range(3)]
    plain = [
        ModuleStatistics(inputs=random_moment(6, 4, seed=i), outputs=random_moment(5, 4, seed=9 + i)) for i in range(3)
    ]
    scaled = [
        ModuleStatistics(inputs=scale * each.inputs, outputs=scale * each.outputs)
        for each in plain
        if each.inputs is not None and each.outputs is not None
    ]
    found, expected = flow(updates, scaled).delta_weight(), flow(updates, plain).delta_weight()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_weights_multiply_the_updates_first() -> None:
    case = [random_update(4, 5, 2, seed=i) for i in range(2)]
    statistics = [ModuleStatistics(inputs=random_moment(5, 9, seed=i)) for i in range(2)]
    doubled = [LowRankUpdate(each.lora_A, each.lora_B, 2.0) for each in case]
    found = flow(case, statistics, weights=[2.0, 2.0]).delta_weight()
    torch.testing.assert_close(found, flow(doubled, statistics).delta_weight(), rtol=1e-9, atol=1e-9)


# who takes part


def test_a_task_without_an_update_asks_for_its_outputs_to_stay() -> None:
    update = random_update(4, 5, 2, seed=0)
    statistics = [ModuleStatistics(inputs=random_moment(5, 9, seed=i)) for i in range(2)]
    zero = LowRankUpdate(torch.zeros(1, 5).double(), torch.zeros(4, 1).double())
    found = flow([update, None], statistics).delta_weight()
    torch.testing.assert_close(found, flow([update, zero], statistics).delta_weight(), rtol=1e-9, atol=1e-9)
    assert float(found.norm()) < 0.9 * float(update.delta_weight().norm())


def test_a_task_without_update_and_statistics_takes_no_part() -> None:
    updates = [random_update(4, 5, 2, seed=i) for i in range(2)]
    statistics = [ModuleStatistics(inputs=random_moment(5, 9, seed=i)) for i in range(2)]
    found = flow([*updates, None], [*statistics, None]).delta_weight()
    torch.testing.assert_close(found, flow(updates, statistics).delta_weight(), rtol=0, atol=0)


def test_updates_of_zero_give_zero() -> None:
    zero = LowRankUpdate(torch.randn(2, 5), torch.zeros(4, 2))
    found = flow([zero, None], [ModuleStatistics(inputs=random_moment(5, 3, seed=i)) for i in range(2)])
    assert found.rank == 1
    assert not found.delta_weight().any()


def test_diagonal_moments_are_those_of_the_full_matrix() -> None:
    updates = [random_update(4, 7, 2, seed=i) for i in range(3)]
    seen = [random_tensor(7, seed=i).square() * (random_tensor(7, seed=50 + i) > 0) for i in range(3)]
    outputs = [random_moment(4, 5, seed=90 + i) for i in range(3)]
    diagonal, full, mixed = (
        flow(updates, [ModuleStatistics(inputs=c, outputs=s) for c, s in zip(inputs, outputs, strict=True)])
        for inputs in (seen, [torch.diag(each) for each in seen], [seen[0], *(torch.diag(each) for each in seen[1:])])
    )
    torch.testing.assert_close(diagonal.delta_weight(), full.delta_weight(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(mixed.delta_weight(), full.delta_weight(), rtol=1e-8, atol=1e-8)


def test_beyond_the_largest_side_the_minimum_is_over_the_plain_core(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [random_update(9, 10, 2, seed=i) for i in range(2)]
    statistics = [
        ModuleStatistics(inputs=random_moment(10, 8, seed=i), outputs=random_moment(9, 8, seed=5 + i)) for i in range(2)
    ]
    extended = flow(updates, statistics).delta_weight()
    monkeypatch.setattr(importlib.import_module("flowra_compose.extended_core"), "LARGEST_SOLVED_SIDE", 8)
    plain, dense = flow(updates, statistics).delta_weight(), Dense.of(updates, statistics, 0.02)
    q_a = torch.linalg.qr(torch.cat([update.lora_A for update in updates]).T)[0]
    q_b = torch.linalg.qr(torch.cat([update.lora_B for update in updates], dim=1))[0]
    assert near(q_b @ q_b.T @ plain @ q_a @ q_a.T, plain, float(plain.norm()), 1e-10)
    assert float((q_b.T @ dense.gradient(plain) @ q_a).norm()) <= 1e-8 * dense.size()
    assert dense.objective(extended) < dense.objective(plain) < dense.objective(torch.stack(dense.tau).mean(0))


def test_moments_of_less_precision_and_blocks_of_rows_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [random_update(5, 6, 2, seed=i) for i in range(2)]
    moments = [random_moment(6, 9, seed=i).to(torch.bfloat16) for i in range(2)]
    expected = flow(updates, [ModuleStatistics(inputs=each.double()) for each in moments]).delta_weight()
    monkeypatch.setattr(importlib.import_module("flowra_compose.side_moments"), "ROWS", 4)
    found = flow(updates, [ModuleStatistics(inputs=each) for each in moments]).delta_weight()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_result_has_the_dtype_of_the_updates_and_no_factor_leaves_its_range(dtype: torch.dtype) -> None:
    plain = random_update(6, 8, 2, seed=0)
    update = LowRankUpdate(plain.lora_A.to(dtype), plain.lora_B.to(dtype))
    known = ModuleStatistics(inputs=random_moment(8, 9, seed=1), outputs=random_moment(6, 9, seed=2, size=1e-12))
    found = flow([update], [known])
    assert found.lora_A.dtype == found.lora_B.dtype == dtype
    expected = update.lora_B.double() @ update.lora_A.double()
    assert near(
        found.lora_B.double() @ found.lora_A.double(), expected, float(expected.norm()), 4 * torch.finfo(dtype).eps
    )


# the objective from factors


@settings(max_examples=60)
@given(cases(), st.sampled_from([0.0, 0.1]))
def test_objective_energy_and_cross_talk_are_those_of_the_matrices(case: Case, shrinkage: float) -> None:
    merged = random_update(*next(u for u in case.updates if u is not None).shape, 2, seed=7)
    dense = Dense.of(case.updates, case.statistics, shrinkage)
    found = matching_objective(merged, case.updates, case.statistics, shrinkage=shrinkage)
    assert found == pytest.approx(dense.objective(merged.delta_weight()), rel=1e-9)
    update, known = case.updates[0], case.statistics[0]
    assert update is not None
    assert known is not None
    first = Dense.of([update], [known], shrinkage)
    own = first.objective(torch.zeros(update.shape).double())
    assert matching_energy(update, known, shrinkage=shrinkage) == pytest.approx(own, rel=1e-9)
    expected = first.objective(merged.delta_weight()) / own
    assert cross_talk(merged, update, known, shrinkage=shrinkage) == pytest.approx(expected, rel=1e-9)


def test_cross_talk_of_a_task_with_itself_is_0_and_with_nothing_is_1() -> None:
    update, known = random_update(5, 6, 2, seed=0), ModuleStatistics(inputs=random_moment(6, 9, seed=1))
    zero = LowRankUpdate(update.lora_A, 0 * update.lora_B)
    assert cross_talk(update, update, known) <= 1e-25
    assert cross_talk(zero, update, known) == pytest.approx(1.0, rel=1e-12)
    assert cross_talk(zero, zero, known) == 0.0
    assert cross_talk(update, zero, known) == float("inf")


def test_energy_needs_the_moments_of_the_inputs() -> None:
    with pytest.raises(ValueError, match="statistics must hold the inputs, got none"):
        matching_energy(random_update(2, 3, 1, seed=0), ModuleStatistics(outputs=torch.eye(2)))


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


def test_with_diagonal_moments_nothing_of_the_size_of_the_weight_is_made() -> None:
    m, n, tasks, rank = 300, 400, 3, 4
    updates = [random_update(m, n, rank, seed=i) for i in range(tasks)]
    statistics = [
        ModuleStatistics(inputs=random_tensor(n, seed=i).square(), outputs=random_tensor(m, seed=9 + i).square())
        for i in range(tasks)
    ]
    with LargestTensor() as watch:
        merged = flow(updates, statistics)
        matching_objective(merged, updates, statistics)
        cross_talk(merged, updates[0], statistics[0])
        assert watch.largest <= 2 * tasks * rank * (n + 2 * tasks * rank * tasks)
        merged.delta_weight()
        assert watch.largest == m * n  # the watch would have seen it


# refusals


def test_an_update_without_statistics_is_refused() -> None:
    updates = [random_update(2, 3, 1, seed=i) for i in range(2)]
    known = ModuleStatistics(inputs=random_moment(3, 4, seed=1))
    with pytest.raises(ValueError, match=r"must hold the inputs of every task.* got none of task 1 for 'fc'\. Measure"):
        flow(updates, [known, None])
    with pytest.raises(ValueError, match=r"must hold the inputs of every task.* got none of task 0 for 'fc'"):
        flow(updates, [ModuleStatistics(outputs=torch.eye(2)), known])


@pytest.mark.parametrize(
    ("field", "moment"), [("inputs", torch.eye(2)), ("outputs", torch.eye(3)), ("outputs", torch.ones(5))], ids=str
)
def test_moments_of_another_shape_are_refused(field: str, moment: Tensor) -> None:
    known = ModuleStatistics(**{"inputs": torch.eye(3), field: moment})
    with pytest.raises(ValueError, match=rf"must hold the {field} of every task .* got one of shape .* for 'fc'"):
        flow([random_update(2, 3, 1, seed=0)], [known])


def test_output_moments_of_some_tasks_only_are_refused() -> None:
    updates = [random_update(2, 3, 1, seed=i) for i in range(2)]
    statistics = [ModuleStatistics(inputs=torch.eye(3), outputs=each) for each in (torch.eye(2), None)]
    with pytest.raises(ValueError, match=r"outputs of all tasks or of none, got 1 of 2; for 'fc'"):
        flow(updates, statistics)


@pytest.mark.parametrize("inputs", [torch.diag(torch.tensor([1.0, 0.0, 0.0])), torch.tensor([1.0, 0.0, 0.0])], ids=str)
def test_singular_moments_are_refused_at_shrinkage_0(inputs: Tensor) -> None:
    with pytest.raises(ValueError, match=r"positive definite, got singular ones; 'fc', shrinkage 0\.0\. Raise the"):
        flow([random_update(2, 3, 1, seed=0)], [ModuleStatistics(inputs=inputs)], shrinkage=0.0)


def test_output_moments_that_are_0_for_all_tasks_are_refused() -> None:
    known = ModuleStatistics(inputs=torch.eye(3), outputs=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"got singular ones; 'fc', shrinkage 0\.02.* measure what is 0 everywhere"):
        flow([random_update(2, 3, 1, seed=0)], [known])


def test_an_equation_that_is_not_solved_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("flowra_compose.flow"), "MOST_STEPS", 2)
    updates = [random_update(6, 6, 2, seed=i) for i in range(4)]
    statistics = [
        ModuleStatistics(inputs=random_moment(6, 3, seed=i), outputs=random_moment(6, 3, seed=9 + i)) for i in range(4)
    ]
    with pytest.raises(ArithmeticError, match=r"relative residual of 1e-10 in 2 steps, got .*; for 'fc', shrinkage 0"):
        flow(updates, statistics)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"inputs": -torch.eye(2)}, "inputs must have a diagonal ≥ 0"),
        ({"outputs": torch.tensor([1.0, -1.0])}, "outputs must have a diagonal ≥ 0"),
        ({"fisher": torch.tensor([[1.0, -1.0]])}, "fisher must be ≥ 0, got -1.0"),
    ],
    ids=str,
)
def test_statistics_that_cannot_be_second_moments_are_refused(known: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModuleStatistics(**known)
