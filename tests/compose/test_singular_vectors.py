"""Orthogonalised singular vectors against dense decompositions."""

import doctest
import importlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowra_compose import LowRankUpdate, merge_updates, singular_task_interference

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "baseline_merges.json").read_text())
SHAPES = [(5, 30), (30, 5), (6, 6), (1, 4), (4, 1), (12, 9), (40, 50)]
RULES = ["tsv_m", "orth"]


def random_update(m: int, n: int, rank: int, *, scaling: float = 1.0, seed: int = 0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    return LowRankUpdate(a, b, scaling)


def merged(rule: str, updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> Tensor:
    found = merge_updates([{"fc": update} for update in updates], weights, rule=rule)["fc"]
    assert found.rank <= min(found.shape)
    return found.delta_weight()


def size_of(updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> float:
    return sum(abs(w) * float(one.delta_weight().norm()) for w, one in zip(weights, updates, strict=True))


def dense_triplets(updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """[U₁ … U_T], the singular values and [V₁ … V_T] from dense decompositions, as many as the rule keeps."""
    taken = [(w * one.delta_weight(), one.rank) for w, one in zip(weights, updates, strict=True) if w != 0]
    least = min(updates[0].shape)
    ranks = [min(rank, least) for _, rank in taken]
    kept = ranks if sum(ranks) <= least else [min(rank, max(1, least // len(taken))) for rank in ranks]
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta, _ in taken]
    u = torch.cat([part[0][:, :k] for part, k in zip(parts, kept, strict=True)], dim=1)
    sigma = torch.cat([part[1][:k] for part, k in zip(parts, kept, strict=True)])
    v = torch.cat([part[2][:k].T for part, k in zip(parts, kept, strict=True)], dim=1)
    return u, sigma, v


def orthogonalised(columns: Tensor) -> Tensor:
    """C (CᵀC)^(+½) from eigenvectors."""
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    kept = values > 1e-12 * values[-1]
    return columns @ (vectors[:, kept] / values[kept].sqrt()) @ vectors[:, kept].T


def least_value(u: Tensor, v: Tensor) -> float:
    """The smallest singular value of independent columns: the closer they are, the less rounding leaves of them."""
    values = torch.cat([torch.linalg.svdvals(u), torch.linalg.svdvals(v)])
    return float(values[values > 1e-6].min())


@st.composite
def inputs(draw: st.DrawFn) -> tuple[list[LowRankUpdate], list[float]]:
    m, n = draw(st.sampled_from(SHAPES))
    scalings = st.sampled_from([-1.5, 0.01, 1.0, 16.0])
    updates = [
        random_update(m, n, draw(st.integers(1, 7)), scaling=draw(scalings), seed=draw(st.integers(0, 10**6)))
        for _ in range(draw(st.integers(1, 4)))
    ]
    weight = st.floats(-3, 3).filter(lambda value: abs(value) > 1e-3)
    return updates, draw(st.lists(weight, min_size=len(updates), max_size=len(updates)))


# exact


def test_golden_of_two_tasks() -> None:
    updates = [
        LowRankUpdate(*(torch.tensor(GOLDEN[f"{factor}{task}"], dtype=torch.float64) for factor in "AB"))
        for task in (1, 2)
    ]
    expected = torch.tensor(GOLDEN["tsv_m"], dtype=torch.float64)
    torch.testing.assert_close(merged("tsv_m", updates, [1, 1]), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(merged("orth", updates, [1, 1]), expected / math.sqrt(2), rtol=0, atol=1e-9)
    assert singular_task_interference(updates) == pytest.approx(GOLDEN["sti_l1"], abs=1e-9)


@settings(max_examples=80)
@given(inputs())
def test_it_is_the_product_of_the_polar_factors_of_dense_singular_vectors(
    case: tuple[list[LowRankUpdate], list[float]],
) -> None:
    u, sigma, v = dense_triplets(*case)
    expected = (orthogonalised(u) * sigma) @ orthogonalised(v).T
    tolerance = 1e-12 * size_of(*case) / least_value(u, v) ** 3
    assert float((merged("tsv_m", *case) - expected).norm()) <= tolerance
    assert float((merged("orth", *case) - expected / len(case[0]) ** 0.5).norm()) <= tolerance


@settings(max_examples=60)
@given(inputs())
def test_interference_is_that_of_dense_singular_vectors(case: tuple[list[LowRankUpdate], list[float]]) -> None:
    updates = [LowRankUpdate(one.lora_A, one.lora_B, w * one.scaling) for one, w in zip(*case, strict=True)]
    u, sigma, v = dense_triplets(*case)
    identity = torch.eye(len(sigma), dtype=torch.float64)
    expected = float(((u.T @ u - identity) @ torch.diag(sigma) @ (v.T @ v - identity)).abs().sum())
    assert singular_task_interference(updates) == pytest.approx(expected, abs=1e-10 * size_of(*case))


@pytest.mark.parametrize("rule", RULES)
def test_more_triplets_than_fit_keep_the_leading_ones_of_each_task(rule: str) -> None:
    updates = [random_update(9, 12, 9, seed=seed) for seed in range(3)]
    found = merge_updates([{"fc": one} for one in updates], [1, 1, 1], rule=rule)["fc"]
    assert found.rank == 9
    best = []
    for one in updates:
        u, sigma, vh = torch.linalg.svd(one.delta_weight(), full_matrices=False)
        best.append(LowRankUpdate(vh[:3], u[:, :3] * sigma[:3]))
    torch.testing.assert_close(found.delta_weight(), merged(rule, best, [1, 1, 1]), rtol=0, atol=1e-10)
    sigma = torch.cat([torch.linalg.svdvals(one.delta_weight()) for one in best]).sort(descending=True).values[:9]
    expected = sigma / (3**0.5 if rule == "orth" else 1)  # nine orthonormal columns: they are singular vectors
    torch.testing.assert_close(torch.linalg.svdvals(found.delta_weight()), expected, rtol=1e-9, atol=0)


def test_more_tasks_than_fit_keep_one_direction_each() -> None:
    updates = [random_update(2, 7, 1, seed=seed) for seed in range(5)]
    u, sigma, v = dense_triplets(updates, [1] * 5)
    assert u.shape == (2, 5)
    assert torch.linalg.svdvals(orthogonalised(u)) == pytest.approx([
        1,
        1,
    ])  # a partial isometry: its rows are orthonormal
    expected = (orthogonalised(u) * sigma) @ orthogonalised(v).T
    torch.testing.assert_close(merged("tsv_m", updates, [1] * 5), expected, rtol=0, atol=1e-10)


# laws


@settings(max_examples=40)
@given(inputs(), st.sampled_from(RULES))
def test_one_adapter_comes_back(case: tuple[list[LowRankUpdate], list[float]], rule: str) -> None:
    update, weight = case[0][0], case[1][0]
    error = merged(rule, [update], [weight]) - weight * update.delta_weight()
    assert float(error.norm()) <= 1e-13 * size_of([update], [weight])


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_equal_adapters_give_that_adapter_and_its_negative_cancels(tasks: int) -> None:
    update = random_update(40, 50, 4, scaling=3.0)
    torch.testing.assert_close(
        merged("tsv_m", [update] * tasks, [1] * tasks), update.delta_weight(), rtol=0, atol=1e-11
    )
    for rule in RULES:
        assert float(merged(rule, [update, update], [1, -1]).abs().max()) <= 1e-12 * size_of([update], [1])


def test_equal_adapters_of_other_weights_and_factors_are_seen_as_equal() -> None:
    one = random_update(40, 50, 4)
    turn = torch.linalg.qr(random_update(4, 4, 4, seed=1).delta_weight()).Q
    other = LowRankUpdate(turn @ one.lora_A * 3, one.lora_B @ turn.T / 3)
    expected = (1 + 0.7) / 2 * one.delta_weight()
    torch.testing.assert_close(merged("tsv_m", [one, other], [1, 0.7]), expected, rtol=0, atol=1e-10)


def test_small_directions_of_equal_adapters_are_seen_as_equal_though_they_are_known_less_well() -> None:
    u, v = (torch.linalg.qr(random_update(d, 3, 3, seed=d).delta_weight()).Q for d in (40, 50))
    one = LowRankUpdate(v.T, u * torch.tensor([1.0, 1e-3, 1e-7], dtype=torch.float64))
    turn = torch.linalg.qr(random_update(3, 3, 3, seed=1).delta_weight()).Q
    other = LowRankUpdate(turn @ one.lora_A, one.lora_B @ turn.T)
    found = merged("tsv_m", [one, other], [1, 0.7])
    error = (found - 0.85 * one.delta_weight()) @ v  # by direction: the smallest, too, to five digits
    assert float((error.norm(dim=0) / torch.tensor([1.0, 1e-3, 1e-7])).max()) <= 1e-5


def orthogonal_tasks() -> list[LowRankUpdate]:
    inputs, outputs = (torch.linalg.qr(random_update(d, 9, 9, seed=d).delta_weight()).Q for d in (30, 20))
    parts = [slice(0, 3), slice(3, 4), slice(4, 9)]
    mixes = [random_update(p.stop - p.start, p.stop - p.start, 5, seed=p.stop).delta_weight() for p in parts]
    return [LowRankUpdate(mix @ inputs[:, p].T, outputs[:, p], 2.0) for p, mix in zip(parts, mixes, strict=True)]


def test_orthogonal_tasks_are_summed() -> None:
    updates, weights = orthogonal_tasks(), [1.0, -2.0, 0.5]
    total = torch.stack([w * one.delta_weight() for w, one in zip(weights, updates, strict=True)]).sum(0)
    torch.testing.assert_close(merged("tsv_m", updates, weights), total, rtol=0, atol=1e-11)
    torch.testing.assert_close(merged("orth", updates, weights), total / 3**0.5, rtol=0, atol=1e-11)
    assert singular_task_interference(updates) <= 1e-12 * size_of(updates, weights)


def test_tasks_orthogonal_on_one_side_do_not_interfere() -> None:
    shared = random_update(20, 30, 2)
    outputs = torch.linalg.qr(random_update(20, 4, 4, seed=1).delta_weight()).Q
    updates = [LowRankUpdate(shared.lora_A, outputs[:, part]) for part in (slice(0, 2), slice(2, 4))]
    assert singular_task_interference(updates) <= 1e-12 * size_of(updates, [1, 1])
    assert singular_task_interference([shared, shared]) > 0.1 * size_of([shared], [1])


def test_the_energy_of_orth_is_the_mean_of_the_tasks() -> None:
    updates = [random_update(40, 50, rank, seed=rank) for rank in (2, 5, 7)]
    energies = [float(one.delta_weight().square().sum()) for one in updates]
    assert float(merged("orth", updates, [1, 1, 1]).square().sum()) == pytest.approx(sum(energies) / 3)


@settings(max_examples=40)
@given(inputs(), st.sampled_from(RULES), st.sampled_from([0.125, 3.0, -7.0]), st.randoms(use_true_random=False))
def test_order_and_common_scale_and_alpha_against_b(
    case: tuple[list[LowRankUpdate], list[float]], rule: str, factor: float, chance: random.Random
) -> None:
    updates, weights = case
    u, _, v = dense_triplets(*case)
    found, tolerance = merged(rule, updates, weights), 1e-12 * size_of(*case) / least_value(u, v) ** 3
    order = list(range(len(updates)))
    chance.shuffle(order)
    shuffled = merged(rule, [updates[each] for each in order], [weights[each] for each in order])
    assert float((shuffled - found).norm()) <= tolerance
    scaled = merged(rule, updates, [factor * weight for weight in weights])
    assert float((scaled - factor * found).norm()) <= abs(factor) * tolerance
    rescaled = [LowRankUpdate(one.lora_A, one.lora_B / factor, one.scaling * factor) for one in updates]
    assert float((merged(rule, rescaled, weights) - found).norm()) <= tolerance


@pytest.mark.parametrize("rule", RULES)
def test_what_is_zero_takes_no_part(rule: str) -> None:
    updates = [random_update(20, 15, 3, seed=seed) for seed in range(2)]
    zero = LowRankUpdate(torch.randn(4, 15, dtype=torch.float64), torch.zeros(20, 4, dtype=torch.float64))
    expected = merged(rule, updates, [1, 1])
    torch.testing.assert_close(merged(rule, [updates[0], zero, updates[1]], [1, 1, 1]), expected, rtol=0, atol=1e-12)
    assert not merged(rule, [zero, zero], [1, 1]).any()
    assert singular_task_interference([zero, zero]) == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_task_that_leaves_the_module_alone_does_not_count(rule: str) -> None:
    one, two = random_update(20, 15, 3), random_update(20, 15, 3, seed=1)
    found = merge_updates([{"fc": one}, {"fc": two}, {"out": two}], [1, 1, 1], rule=rule)
    torch.testing.assert_close(found["fc"].delta_weight(), merged(rule, [one, two], [1, 1]))
    torch.testing.assert_close(found["out"].delta_weight(), two.delta_weight())


def test_a_vector_is_a_matrix_of_one_column() -> None:
    columns = [random_update(6, 1, 1, seed=seed).delta_weight() for seed in range(3)]
    updates = [LowRankUpdate.of_delta_weight(one, layout="vector") for one in columns]
    found = merge_updates([{"fc.bias": one} for one in updates], [1, 1, 1], rule="tsv_m")["fc.bias"]
    assert (found.layout, found.parameter_shape) == ("vector", (6,))
    directions = orthogonalised(torch.cat([one / one.norm() for one in columns], dim=1))
    expected = directions @ torch.cat([one.norm()[None] for one in columns]) / 3**0.5
    torch.testing.assert_close(found.delta_weight(), expected[:, None])


@pytest.mark.parametrize("rule", [*RULES, "iso_c", "iso_cts", "wudi"])
def test_layout_and_kernel_are_kept(rule: str) -> None:
    updates = [random_update(6, 36, 2, seed=seed) for seed in range(2)]
    kernels = [LowRankUpdate(one.lora_A, one.lora_B, layout="conv", kernel=(3, 3)) for one in updates]
    found = merge_updates([{"fc": one} for one in kernels], [1, 1], rule=rule)["fc"]
    assert (found.layout, found.kernel) == ("conv", (3, 3))
    torch.testing.assert_close(found.delta_weight(), merged(rule, updates, [1, 1]))


# memory


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("rule", [*RULES, "iso_c", "iso_cts", "wudi"])
def test_nothing_larger_than_the_stacked_factors_is_made(rule: str) -> None:
    m, n, stacked = 300, 200, 12
    adapters = [{"fc": random_update(m, n, 4, seed=seed)} for seed in range(3)]
    with LargestTensor() as watch:
        merge_updates(adapters, [1, 1, 1], rule=rule)
        singular_task_interference([one["fc"] for one in adapters])
        assert watch.largest == m * stacked
        adapters[0]["fc"].delta_weight()
        assert watch.largest == m * n  # the watch would have seen it


# refusals


def test_updates_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"updates must be of one shape, at least one, got \[\(3, 4\), \(4, 3\)\]"):
        singular_task_interference([random_update(4, 3, 1), random_update(3, 4, 1)])
    with pytest.raises(ValueError, match=r"updates must be of one shape, at least one, got \[\]"):
        singular_task_interference([])


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(importlib.import_module("flowra_compose.singular_vectors")).failed == 0
