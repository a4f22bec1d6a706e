"""Conflicting signs against all entries at once, in float64; and no more of them in memory than allowed."""

import doctest
import importlib
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowra_compose import LowRankUpdate
from flowra_compose.sign_conflicts import sign_conflicts

SHAPES = [(5, 30), (30, 5), (6, 6), (1, 4), (4, 1), (12, 9)]


def random_update(m: int, n: int, rank: int, *, seed: int, scaling: float = 1.0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    return LowRankUpdate(a, b, scaling)


@st.composite
def inputs(draw: st.DrawFn) -> list[LowRankUpdate]:
    m, n = draw(st.sampled_from(SHAPES))
    scalings = st.sampled_from([-1.5, 0.01, 1.0, 16.0])
    return [
        random_update(m, n, draw(st.integers(1, 6)), seed=draw(st.integers(0, 10**6)), scaling=draw(scalings))
        for _ in range(draw(st.integers(1, 4)))
    ]


def dense(updates: Sequence[LowRankUpdate]) -> Tensor:
    return torch.stack([each.delta_weight() for each in updates])


@settings(max_examples=80)
@given(inputs(), st.integers(1, 200))
def test_shares_are_those_of_the_dense_matrices_whatever_the_blocks(updates: list[LowRankUpdate], block: int) -> None:
    found = sign_conflicts(updates, entries_at_once=block)
    entries = dense(updates)
    for i, one in enumerate(entries):
        for j, other in enumerate(entries):
            size = one.abs() + other.abs()
            expected = float(size[one.sign() * other.sign() < 0].sum() / size.sum())
            assert found.shares[i][j] == pytest.approx(expected, abs=1e-12)
    expected = 1 - float(entries.sum(0).abs().sum() / entries.abs().sum())
    assert found.cancelled == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40)
@given(inputs(), st.randoms(use_true_random=False))
def test_the_order_of_tasks_orders_the_shares(updates: list[LowRankUpdate], random: object) -> None:
    order = list(range(len(updates)))
    random.shuffle(order)  # type: ignore[attr-defined]
    found, other = sign_conflicts(updates), sign_conflicts([updates[index] for index in order])
    assert other.cancelled == pytest.approx(found.cancelled, abs=1e-13)
    for i, first in enumerate(order):
        assert other.shares[i] == pytest.approx([found.shares[first][second] for second in order], abs=1e-13)


@pytest.mark.parametrize("factor", [1.0, 0.125, 1e9])
def test_an_update_and_its_multiple_never_conflict_and_with_its_negative_always(factor: float) -> None:
    one = random_update(8, 7, 3, seed=0)
    same = LowRankUpdate(one.lora_A, one.lora_B, factor)
    assert sign_conflicts([one, same]).shares[0][1] == 0.0
    assert sign_conflicts([one, same]).cancelled == pytest.approx(0, abs=1e-15)
    opposed = sign_conflicts([one, LowRankUpdate(one.lora_A, one.lora_B, -factor)])
    assert opposed.shares[0][1] == 1.0
    assert opposed.cancelled == pytest.approx(2 * min(1.0, factor) / (1 + factor), rel=1e-12)


def test_updates_of_other_rows_do_not_conflict_and_rounding_has_no_sign() -> None:
    a = random_update(6, 9, 3, seed=0).lora_A
    upper, lower = torch.zeros(6, 3).double(), torch.zeros(6, 3).double()
    upper[:3], lower[3:] = 1.0, -1.0
    assert sign_conflicts([LowRankUpdate(a, upper), LowRankUpdate(a, lower)]).shares[0][1] == 0.0
    # the same, with zeros that only cancel to rounding
    doubled = torch.cat([a, a * (1 / 3)])
    noise = torch.cat([upper, -3 * upper], dim=1)
    assert sign_conflicts([LowRankUpdate(doubled, noise), LowRankUpdate(a, -upper)]).shares[0][1] == 0.0


def test_nothing_conflicts_with_zero() -> None:
    one, zero = random_update(4, 5, 2, seed=0), LowRankUpdate(torch.ones(2, 5), torch.zeros(4, 2))
    assert sign_conflicts([one, zero]).shares == ((0.0, 0.0), (0.0, 0.0))
    assert sign_conflicts([zero, zero]).shares == ((0.0, 0.0), (0.0, 0.0))
    assert sign_conflicts([zero]).cancelled == 0.0


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


def test_no_more_entries_are_made_at_once_than_allowed() -> None:
    updates = [random_update(120, 100, 4, seed=seed) for seed in range(3)]
    with LargestTensor() as watch:
        sign_conflicts(updates, entries_at_once=6000)
        assert watch.largest == 6000
        sign_conflicts(updates)
        assert watch.largest == 3 * 120 * 100  # the watch would have seen it


def test_the_docstrings_are_true() -> None:
    assert doctest.testmod(importlib.import_module("flowra_compose.sign_conflicts")).failed == 0


@pytest.mark.parametrize("entries", [1, 60, 300, 10**9])
def test_of_large_updates_rows_at_even_distances_are_counted(entries: int) -> None:
    updates = [random_update(50, 30, 4, seed=seed) for seed in range(3)]
    rows = min(50, max(1, entries // 30))
    chosen = [50 * row // rows for row in range(rows)]
    assert len(set(chosen)) == rows
    some = [LowRankUpdate(each.lora_A, each.lora_B[chosen], each.scaling) for each in updates]
    assert sign_conflicts(updates, entries=entries) == sign_conflicts(some)


def test_rows_at_even_distances_say_nearly_what_all_rows_say() -> None:
    updates = [random_update(1500, 700, 8, seed=seed) for seed in range(2)]
    found, exact = sign_conflicts(updates), sign_conflicts(updates, entries=10**9)
    assert found != exact
    assert found.shares[0][1] == pytest.approx(exact.shares[0][1], abs=0.01)
    assert found.cancelled == pytest.approx(exact.cancelled, abs=0.01)
