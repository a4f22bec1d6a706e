"""How the memory of past tasks grows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowra_compose import LowRankUpdate, ModuleMemory, ModuleStatistics, TaskMemory
from flowra_testing.past_tasks import moment

N, M = 12, 5


def empty() -> TaskMemory:
    return TaskMemory.empty({"fc": (M, N)})


def seen(c: Tensor, s: Tensor | None = None) -> dict[str, ModuleStatistics]:
    return {"fc": ModuleStatistics(inputs=c, outputs=s)}


def share(memory: TaskMemory, c: Tensor, columns: int | None = None) -> float:
    u = memory.modules["fc"].basis.double()[:, :columns]
    return ((u.T @ c @ u).trace() / c.trace()).item()


@given(
    ranks=st.lists(st.integers(1, N), min_size=1, max_size=4),
    energy=st.sampled_from([0.5, 0.95, 0.999]),
    cap=st.sampled_from([0.3, 0.7, 1.0]),
    decay=st.sampled_from([0.5, 0.9, 1.0]),
)
def test_the_basis_stays_orthonormal_only_grows_and_is_the_smallest_that_holds_the_energy(
    ranks: list[int], energy: float, cap: float, decay: float
) -> None:
    memory = empty()
    for task, rank in enumerate(ranks):
        c = moment(N, rank, seed=task, decay=decay)
        before, memory = memory, memory.after(seen(c), energy=energy, cap=cap)
        old, new = before.modules["fc"].basis, memory.modules["fc"].basis
        k = new.shape[1]
        assert torch.equal(new[:, : old.shape[1]], old)
        torch.testing.assert_close(new.T @ new, torch.eye(k), rtol=0, atol=1e-6)
        assert k <= max(int(cap * N), old.shape[1])
        assert share(memory, c) >= energy - 1e-6 or k == int(cap * N)
        if k > old.shape[1]:
            assert share(memory, c, columns=k - 1) < energy
        assert memory.modules["fc"].kept[-1] == pytest.approx(share(memory, c), abs=1e-6)
    assert memory.tasks == len(ranks)


def test_new_directions_are_the_leading_eigenvectors_of_the_residual() -> None:
    first, second = moment(N, 3, seed=0), moment(N, N, seed=1, decay=0.6)
    memory = empty().after(seen(first), energy=1.0)
    u = memory.modules["fc"].basis.double()
    off = torch.eye(N).double() - u @ u.T
    leading = torch.linalg.eigh(off @ second @ off).eigenvectors.flip(1)
    new = memory.after(seen(second), energy=0.9).modules["fc"].basis[:, 3:].double()
    assert new.shape[1] >= 2
    torch.testing.assert_close(
        (new.T @ leading[:, : new.shape[1]]).abs(), torch.eye(new.shape[1]).double(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_all_energy_of_few_inputs_is_their_span_and_the_same_task_again_adds_nothing(rank: int) -> None:
    c = moment(N, rank, seed=3)
    memory = empty().after(seen(c), energy=1.0)
    u = memory.modules["fc"].basis.double()
    assert u.shape[1] == rank
    torch.testing.assert_close(u @ (u.T @ c), c, rtol=0, atol=1e-5)
    again = memory.after(seen(2 * c), energy=1.0)
    assert torch.equal(again.modules["fc"].basis, memory.modules["fc"].basis)
    assert again.modules["fc"].kept == pytest.approx((1.0, 1.0))


def test_a_task_without_input_adds_nothing() -> None:
    memory = empty().after(seen(torch.zeros(N, N)))
    assert (memory.modules["fc"].rank, memory.modules["fc"].kept) == (0, (1.0,))


def test_what_the_cap_leaves_out_is_recorded() -> None:
    module = empty().after(seen(torch.eye(N)), cap=0.5).modules["fc"]
    assert module.rank == 6
    assert module.kept == pytest.approx((0.5,))


def test_sums_and_rows_of_past_tasks_are_kept_and_the_value_before_stays_what_it_was() -> None:
    cs, ss = [moment(N, 4, seed=task) for task in (0, 1)], [moment(M, M, seed=task) for task in (2, 3)]
    updates = [LowRankUpdate(torch.randn(rank, N), torch.randn(M, rank)) for rank in (2, 3)]
    first = empty().after(seen(cs[0], ss[0]), {"fc": updates[0]})
    kept = replace(first.modules["fc"])
    second = first.after(seen(cs[1], ss[1]), {"fc": updates[1]}).modules["fc"]
    assert second.inputs is not None
    assert second.outputs is not None
    torch.testing.assert_close(second.inputs, (cs[0] + cs[1]).float())
    torch.testing.assert_close(second.outputs, (ss[0] + ss[1]).float())
    assert torch.equal(second.rows, torch.cat([updates[0].lora_A, updates[1].lora_A]))
    now = first.modules["fc"]
    assert (now.kept, first.tasks) == (kept.kept, 1)
    assert now.basis is kept.basis
    assert len(now.rows) == 2


def test_a_module_that_a_task_does_not_train_still_remembers_the_task() -> None:
    memory = TaskMemory.empty({"a": (M, N), "b": (M, N)})
    statistics = {name: ModuleStatistics(inputs=moment(N, 2, seed=0)) for name in "ab"}
    update = LowRankUpdate(torch.randn(2, N), torch.randn(M, 2))
    after = memory.after(statistics, {"a": update}, energy=1.0)
    assert [after.modules[name].rank for name in "ab"] == [2, 2]
    assert [len(after.modules[name].rows) for name in "ab"] == [2, 0]


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({}, r"statistics must be of every module of the memory, .*got \['fc'\]"),
        (seen(torch.eye(N)) | {"other": ModuleStatistics(inputs=torch.eye(N))}, r"got \['other'\]"),
        (seen(torch.eye(N - 1)), r"statistics must have inputs \(12, 12\).* got \[\(11, 11\), None\]; for 'fc'"),
        (seen(torch.ones(N)), r"got \[\(12,\), None\]"),
        ({"fc": ModuleStatistics()}, r"got \[None, None\]"),
        (seen(torch.eye(N), torch.eye(N)), r"outputs \(5, 5\) or none"),
        (seen(2 * torch.ones(N, N) - torch.eye(N)), "inputs must be positive semi-definite, got an eigenvalue of -1"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(statistics: dict[str, ModuleStatistics], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        empty().after(statistics)


def test_other_arguments_that_do_not_fit_are_refused() -> None:
    good = seen(torch.eye(N))
    for options in ({"energy": 0.0}, {"energy": 1.1}, {"cap": -0.1}, {"cap": 1.1}):
        with pytest.raises(ValueError, match=r"energy must be in \(0, 1\] and cap in \[0, 1\], got"):
            empty().after(good, **options)
    with pytest.raises(ValueError, match=r"updates must have the shape \(5, 12\), got \(12, 5\); for 'fc'"):
        empty().after(good, {"fc": LowRankUpdate(torch.ones(1, M), torch.ones(N, 1))})
    with pytest.raises(ValueError, match="outputs after each task or after none, got a mixture"):
        empty().after(good).after(seen(torch.eye(N), torch.eye(M)))
    with pytest.raises(ValueError, match="modules must have seen equally many tasks"):
        TaskMemory(modules={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"basis": torch.ones(N, 2)}, "basis must have orthonormal columns"),
        ({"basis": torch.eye(N).double()}, "basis must be float32"),
        ({"basis": torch.eye(N - 1)}, r"basis must be float32 \(12, 11\)"),
        ({"rows": torch.full((1, N), torch.nan)}, "rows must be finite"),
        ({"inputs": torch.eye(N)}, "inputs and outputs must be there together"),
        ({"kept": (1.5,)}, r"kept must be shares in \[0, 1\]"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ModuleMemory.empty((M, N)), **changes)
