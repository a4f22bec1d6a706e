"""Truncation in the metric of second moments, and to a number of parameters, against dense matrices."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowra_compose import (
    LowRankUpdate,
    ModuleStatistics,
    TruncatedUpdate,
    Truncation,
    budget_ranks,
    merge_updates,
    truncated,
)


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_update(m: int, n: int, rank: int, *, seed: int, size: float = 1.0) -> LowRankUpdate:
    return LowRankUpdate(random_tensor(rank, n, seed=seed), random_tensor(m, rank, seed=seed + 1), size)


def random_moment(dim: int, examples: int, *, seed: int) -> Tensor:
    x = random_tensor(examples, dim, seed=seed)
    return x.T @ x / examples


def total(moments: Sequence[Tensor]) -> Tensor:
    """M̄, each moment shrunk by 0.02."""
    full = [each if each.ndim == 2 else torch.diag(each) for each in moments]
    return torch.stack([
        0.98 * each + 0.02 * each.trace() / len(each) * torch.eye(len(each), dtype=each.dtype) for each in full
    ]).sum(0)


def root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.sqrt() @ vectors.T


@st.composite
def cases(draw: st.DrawFn) -> tuple[LowRankUpdate, list[ModuleStatistics], Tensor, Tensor]:
    """An update, statistics, and the roots of S̄ and C̄."""
    m, n, seed = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(0, 10**6))
    outputs, diagonal = draw(st.booleans()), draw(st.booleans())
    c = [random_moment(n, draw(st.integers(1, 9)), seed=seed + i) for i in range(draw(st.integers(1, 3)))]
    c = [each.diagonal() for each in c] if diagonal else c
    s = [random_moment(m, draw(st.integers(1, 9)), seed=seed + 50 + i) for i in range(len(c))]
    statistics = [ModuleStatistics(inputs=x, outputs=y if outputs else None) for x, y in zip(c, s, strict=True)]
    left = root(total(s)) if outputs else torch.eye(m, dtype=torch.float64)
    return random_update(m, n, draw(st.integers(1, 9)), seed=seed), statistics, left, root(total(c))


# the metric


@settings(max_examples=80)
@given(cases(), st.integers(1, 5))
def test_it_is_the_truncated_svd_of_the_weighted_matrix_multiplied_back(
    case: tuple[LowRankUpdate, list[ModuleStatistics], Tensor, Tensor], rank: int
) -> None:
    update, statistics, left, right = case
    delta = update.delta_weight()
    u, sigma, vh = torch.linalg.svd(left @ delta @ right, full_matrices=False)
    found = truncated(update, rank=rank, statistics=statistics)
    size, kept = float(sigma.norm()), found.rank
    assert kept <= rank
    assert float((found.singular_values - sigma[: len(found.singular_values)]).abs().max()) <= 1e-12 * size
    left_over = left @ (delta - found.delta_weight()) @ right
    best = float(sigma[kept:].square().sum())
    assert float(left_over.square().sum()) == pytest.approx(best, rel=1e-7, abs=1e-20 * size**2)
    assert found.loss == pytest.approx(best, rel=1e-7, abs=1e-20 * size**2)
    assert found.relative_loss == pytest.approx(best / size**2, rel=1e-7, abs=1e-20)
    assert found.metric == ("inputs_and_outputs" if statistics[0].outputs is not None else "inputs")
    if kept < len(sigma) and sigma[kept - 1] - sigma[kept] > 1e-3 * size:
        expected = torch.linalg.solve(left, (u[:, :kept] * sigma[:kept]) @ vh[:kept]) @ torch.linalg.inv(right)
        assert float((found.delta_weight() - expected).norm()) <= 1e-7 * float(delta.norm())
    balance = found.lora_A @ found.lora_A.T - found.lora_B.T @ found.lora_B
    assert float(balance.norm()) <= 1e-10 * float(delta.norm())


@settings(max_examples=60)
@given(cases(), st.integers(0, 10**6))
def test_no_other_matrix_of_the_rank_loses_less(
    case: tuple[LowRankUpdate, list[ModuleStatistics], Tensor, Tensor], seed: int
) -> None:
    update, statistics, left, right = case
    found = truncated(update, rank=1, statistics=statistics)
    rivals = [truncated(update, rank=1), random_update(*update.shape, 1, seed=seed)]
    nudge = random_tensor(*found.lora_B.shape, seed=seed)
    rivals += [LowRankUpdate(found.lora_A, found.lora_B + size * nudge) for size in (1e-3, 0.1)]
    for rival in rivals:
        lost = float((left @ (update.delta_weight() - rival.delta_weight()) @ right).square().sum())
        assert found.loss <= lost * (1 + 1e-9) + 1e-20


def test_energy_is_that_of_the_metric() -> None:
    update = LowRankUpdate(torch.eye(3), torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    known = [ModuleStatistics(inputs=torch.tensor([1e-4, 1e-4, 1.0]))]
    assert truncated(update, energy=0.5).rank == 1
    assert truncated(update, energy=0.5).delta_weight().argmax() == 0
    found = truncated(update, energy=0.5, statistics=known)
    assert found.rank == 1
    assert found.delta_weight().argmax() == 8
    assert found.relative_loss < 0.5


def one_module(metric: Any = None, *, statistics: Any = None, **settings: Any) -> TruncatedUpdate:  # noqa: ANN401
    updates = [{"fc": random_update(6, 8, 3, seed=i)} for i in range(2)]
    truncation = Truncation(metric=metric, **{"rank": 2, **settings})
    found = merge_updates(updates, [1.0, 0.5], truncation=truncation, statistics=statistics)["fc"]
    assert isinstance(found, TruncatedUpdate)
    return found


def test_the_metric_of_a_merge_is_that_of_the_moments_if_all_tasks_have_them() -> None:
    c = [random_moment(8, 9, seed=i) for i in range(2)]
    s = [random_moment(6, 9, seed=i) for i in range(2)]
    both = [{"fc": ModuleStatistics(inputs=x, outputs=y)} for x, y in zip(c, s, strict=True)]
    inputs = [{"fc": ModuleStatistics(inputs=x)} for x in c]
    assert one_module().metric == "frobenius"
    assert one_module(statistics=both).metric == "inputs_and_outputs"
    assert one_module(statistics=inputs).metric == "inputs"
    assert one_module(statistics=[both[0], inputs[1]]).metric == "inputs"
    assert one_module(statistics=[both[0], {}]).metric == "frobenius"
    assert one_module("frobenius", statistics=both).metric == "frobenius"
    plain, weighted = one_module("frobenius", statistics=both), one_module("moments", statistics=both)
    assert not torch.allclose(plain.delta_weight(), weighted.delta_weight(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(plain.delta_weight(), one_module().delta_weight(), rtol=0, atol=0)


def test_moments_of_a_task_that_leaves_the_module_alone_count() -> None:
    update = random_update(6, 8, 3, seed=0)
    statistics = [{"fc": ModuleStatistics(inputs=random_moment(8, 9, seed=i))} for i in range(2)]
    found = merge_updates([{"fc": update}, {}], [1.0, 1.0], truncation=Truncation(rank=1), statistics=statistics)["fc"]
    expected = truncated(update, rank=1, statistics=[each["fc"] for each in statistics])
    torch.testing.assert_close(found.delta_weight(), expected.delta_weight(), rtol=1e-12, atol=1e-12)


def test_the_metric_of_moments_without_them_is_refused() -> None:
    known = [{"fc": ModuleStatistics(inputs=torch.eye(8))}, {"fc": ModuleStatistics(outputs=torch.eye(6))}]
    with pytest.raises(ValueError, match=r"metric 'moments', got none of \[1\]; 'fc'\. Measure them, or truncate in"):
        one_module("moments", statistics=known)
    with pytest.raises(ValueError, match=r"metric 'moments', got none of \[0, 1\]"):
        one_module("moments")


def test_moments_that_are_0_for_all_tasks_are_refused() -> None:
    nothing = [{"fc": ModuleStatistics(inputs=torch.zeros(8))}] * 2
    with pytest.raises(ValueError, match=r"positive definite, got singular ones; 'fc'"):
        one_module(statistics=nothing)


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


def test_nothing_of_the_size_of_the_weight_is_made() -> None:
    update, seen = random_update(300, 200, 6, seed=0), random_tensor(200, seed=3).square()
    with LargestTensor() as watch:
        truncated(update, rank=2, statistics=[ModuleStatistics(inputs=seen)])
        assert watch.largest <= 300 * 6
        update.delta_weight()
        assert watch.largest == 300 * 200  # the watch would have seen it


# a number of parameters

SHAPES = {"a": (4, 3), "b": (2, 9), "c": (5, 5)}


def model(seed: int, *, sizes: Sequence[float] = (1.0, 1.0, 1.0)) -> dict[str, LowRankUpdate]:
    return {
        name: random_update(*shape, 3, seed=seed + i, size=size)
        for (i, (name, shape)), size in zip(enumerate(SHAPES.items()), sizes, strict=True)
    }


def known_moments(seed: int) -> dict[str, ModuleStatistics]:
    return {
        name: ModuleStatistics(inputs=random_moment(n, 9, seed=seed), outputs=random_moment(m, 9, seed=seed))
        for name, (m, n) in SHAPES.items()
    }


@pytest.mark.parametrize("metric", ["frobenius", "moments"])
@settings(max_examples=25)
@given(parameters=st.integers(7, 90), seed=st.integers(0, 10**6))
def test_within_the_parameters_the_loss_is_least_but_for_one_unit(metric: Any, parameters: int, seed: int) -> None:  # noqa: ANN401
    tasks, statistics = [model(seed), model(seed + 99)], [known_moments(seed), known_moments(seed + 1)]
    truncation = Truncation(parameters=parameters, metric=metric)
    ranks = budget_ranks(tasks, [1.0, 1.0], truncation=truncation, statistics=statistics)
    found = merge_updates(tasks, [1.0, 1.0], truncation=truncation, statistics=statistics)
    assert {name: update.rank for name, update in found.items()} == {n: r for n, r in ranks.items() if r}
    assert sum(update.parameters for update in found.values()) <= parameters
    whole = merge_updates(tasks, [1.0, 1.0], truncation=Truncation(energy=1.0, metric=metric), statistics=statistics)
    energies = {
        n: each.singular_values.square().tolist() for n, each in whole.items() if isinstance(each, TruncatedUpdate)
    }
    costs = {name: sum(shape) for name, shape in SHAPES.items()}

    def lost(choice: dict[str, int]) -> float:
        return sum(sum(energies[name][rank:]) for name, rank in choice.items())

    choices = (dict(zip(SHAPES, each, strict=True)) for each in product(*(range(len(energies[n]) + 1) for n in SHAPES)))
    best = min(lost(each) for each in choices if sum(costs[n] * r for n, r in each.items()) <= parameters)
    next_units = [energies[name][rank] for name, rank in ranks.items() if rank < len(energies[name])]
    assert best * (1 - 1e-9) <= lost(ranks) <= best + max(next_units, default=0.0) + 1e-9
    for name, update in found.items():
        assert isinstance(update, TruncatedUpdate)
        assert update.loss == pytest.approx(sum(energies[name][update.rank :]), rel=1e-7, abs=1e-12)


def test_modules_that_get_no_parameters_are_left_out_and_named() -> None:
    tasks = [model(0, sizes=(1.0, 1e-6, 0.0))]
    truncation = Truncation(parameters=14)
    assert budget_ranks(tasks, [1.0], truncation=truncation) == {"a": 2, "b": 0, "c": 0}
    assert list(merge_updates(tasks, [1.0], truncation=truncation)) == ["a"]
    everything = Truncation(parameters=10**9)
    assert budget_ranks(tasks, [1.0], truncation=everything) == {"a": 3, "b": 2, "c": 0}  # of a ΔW of 0 nothing is kept


def test_rank_and_energy_bound_what_parameters_give() -> None:
    tasks = [model(0)]
    capped = Truncation(parameters=10**9, rank={"a": 1, "b": 2, "c": 3})
    assert budget_ranks(tasks, [1.0], truncation=capped) == {"a": 1, "b": 2, "c": 3}
    share = Truncation(parameters=10**9, energy=0.5)
    alone = merge_updates(tasks, [1.0], truncation=Truncation(energy=0.5))
    assert budget_ranks(tasks, [1.0], truncation=share) == {name: update.rank for name, update in alone.items()}


def test_every_rule_is_asked_twice_and_one_module_at_a_time() -> None:
    reads: list[str] = []

    class Reading(dict[str, LowRankUpdate]):
        def __getitem__(self, name: str) -> LowRankUpdate:
            reads.append(name)
            return super().__getitem__(name)

    merge_updates([Reading(model(0))], [1.0], truncation=Truncation(parameters=50))
    assert reads == ["a", "b", "c"] * 2


def test_too_few_parameters_for_any_module_are_refused() -> None:
    with pytest.raises(ValueError, match="parameters must be ≥ 7, one unit of rank of the cheapest module, got 6"):
        merge_updates([model(0)], [1.0], truncation=Truncation(parameters=6))


def test_updates_that_are_all_0_have_nothing_to_share_parameters_for() -> None:
    with pytest.raises(ValueError, match="updates must not all merge to 0 where they share parameters"):
        merge_updates([model(0), model(0)], [1.0, -1.0], truncation=Truncation(parameters=60))


def test_modules_of_different_metrics_do_not_share_parameters() -> None:
    some = {"a": known_moments(0)["a"]}
    with pytest.raises(
        ValueError, match=r"same for all modules .* got 'inputs_and_outputs' at 'a' and 'frobenius' at 'b'\. Measure"
    ):
        merge_updates([model(0)], [1.0], truncation=Truncation(parameters=60), statistics=[some])
    found = merge_updates(
        [model(0)], [1.0], truncation=Truncation(parameters=60, metric="frobenius"), statistics=[some]
    )
    assert found


def test_ranks_within_a_budget_need_a_budget() -> None:
    with pytest.raises(ValueError, match=r"truncation must have parameters to choose ranks for, got None\. Give"):
        budget_ranks([model(0)], [1.0], truncation=Truncation(rank=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": 0}, "parameters must be a whole number ≥ 1, got 0"),
        ({"parameters": 1.5}, "parameters must be a whole number ≥ 1, got 1.5"),
        ({"parameters": True}, "parameters must be a whole number ≥ 1, got True"),
        ({"rank": 1, "metric": "kfac"}, "metric must be 'frobenius', 'moments' or None, got 'kfac'"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Truncation(**options)
