"""Angles and inner products of updates from their factors, against dense matrices in float64."""

import doctest
import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowra_compose import LowRankUpdate
from flowra_compose.pair_geometry import inner_product, pair_geometry, principal_angles, product_energy
from flowra_compose.product_svd import ProductSVD
from flowra_compose.singular_vectors import nonzero_svd

SHAPES = [(5, 30), (30, 5), (6, 6), (1, 4), (4, 1), (12, 9)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decomposed(update: LowRankUpdate) -> ProductSVD:
    return nonzero_svd(update.lora_A, update.scaling * update.lora_B.double())


@st.composite
def two_updates(draw: st.DrawFn) -> tuple[LowRankUpdate, LowRankUpdate]:
    m, n = draw(st.sampled_from(SHAPES))
    made = []
    for _ in range(2):
        rank, seed = draw(st.integers(1, 7)), draw(st.integers(0, 10**6))
        scaling = draw(st.sampled_from([-3.0, 1e-6, 1.0, 1e6]))
        made.append(LowRankUpdate(normal(rank, n, seed=seed), normal(m, rank, seed=seed + 1), scaling))
    return made[0], made[1]


def dense_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines between column spaces, from projectors."""
    bases = []
    for matrix in (first, second):
        u, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
        bases.append(u[:, sigma > 1e-10 * sigma[0]])
    return torch.linalg.svdvals(bases[0] @ bases[0].T @ bases[1])[: min(bases[0].shape[1], bases[1].shape[1])]


@settings(max_examples=100)
@given(two_updates())
def test_all_numbers_are_those_of_the_dense_matrices(pair: tuple[LowRankUpdate, LowRankUpdate]) -> None:
    one, other = (each.delta_weight() for each in pair)
    found = pair_geometry(*map(decomposed, pair))
    assert found.cosine == pytest.approx(float((one * other).sum() / one.norm() / other.norm()), abs=1e-12)
    for rows, overlap, angle in (
        (True, found.row_overlap, found.row_angle),
        (False, found.column_overlap, found.column_angle),
    ):
        cosines = dense_cosines(one.T, other.T) if rows else dense_cosines(one, other)
        assert overlap == pytest.approx(float(cosines.square().mean()), abs=1e-9)
        assert math.cos(angle) == pytest.approx(min(1.0, float(cosines[0])), abs=1e-9)


@settings(max_examples=60)
@given(two_updates())
def test_energies_and_inner_products_are_those_of_the_dense_matrices(pair: tuple[LowRankUpdate, LowRankUpdate]) -> None:
    one, other = (each.delta_weight() for each in pair)
    a, b = pair[0].lora_A, pair[0].scaling * pair[0].lora_B
    assert product_energy(a, b) == pytest.approx(float(one.square().sum()), rel=1e-12)
    size = float(one.norm() * other.norm())
    assert inner_product(a, b, decomposed(pair[1])) == pytest.approx(float((one * other).sum()), abs=1e-12 * size)


@settings(max_examples=40)
@given(two_updates(), st.sampled_from([1e-8, -2.0, 1e8]))
def test_sizes_do_not_matter_but_the_sign_of_the_cosine(
    pair: tuple[LowRankUpdate, LowRankUpdate], scale: float
) -> None:
    first, second = map(decomposed, pair)
    scaled = decomposed(LowRankUpdate(pair[0].lora_A, pair[0].lora_B, pair[0].scaling * scale))
    found, expected = pair_geometry(scaled, second), pair_geometry(first, second)
    assert found.cosine == pytest.approx(math.copysign(1, scale) * expected.cosine, abs=1e-12)
    assert found.row_overlap == pytest.approx(expected.row_overlap, abs=1e-10)
    assert found.column_angle == pytest.approx(expected.column_angle, abs=1e-10)


@pytest.mark.parametrize("angle", [0.0, 1e-13, 1e-9, 1e-4, 0.3, math.pi / 4, 1.2, math.pi / 2 - 1e-9, math.pi / 2])
def test_angles_are_exact_however_small(angle: float) -> None:
    first = torch.eye(5, dtype=torch.float64)[:, :2]
    second = first.clone()
    second[:, 1] = torch.tensor([0, math.cos(angle), 0, math.sin(angle), 0], dtype=torch.float64)
    found = principal_angles(first, second)
    assert found.tolist() == pytest.approx([0.0, angle], rel=1e-12, abs=1e-16)
    assert principal_angles(second, first[:, :1]).tolist() == pytest.approx([0.0], abs=1e-16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_update_lies_at_no_angle_to_itself(shape: tuple[int, int]) -> None:
    one = decomposed(LowRankUpdate(normal(3, shape[1], seed=0), normal(shape[0], 3, seed=1)))
    found = pair_geometry(one, one)
    assert found.cosine == pytest.approx(1, abs=1e-14)
    assert (found.row_overlap, found.column_overlap) == pytest.approx((1, 1), abs=1e-13)
    assert (found.row_angle, found.column_angle) == pytest.approx((0, 0), abs=1e-13)


def test_orthogonal_updates_are_at_right_angles_on_the_side_where_they_are() -> None:
    a, b = torch.linalg.qr(normal(9, 4, seed=0)).Q.T, torch.linalg.qr(normal(8, 4, seed=1)).Q
    shared = normal(8, 2, seed=2)
    first, second = LowRankUpdate(a[:2], b[:, :2]), LowRankUpdate(a[2:], b[:, 2:])
    found = pair_geometry(decomposed(first), decomposed(second))
    assert (found.cosine, found.row_overlap, found.column_overlap) == pytest.approx((0, 0, 0), abs=1e-15)
    assert (found.row_angle, found.column_angle) == pytest.approx((math.pi / 2, math.pi / 2), abs=1e-15)
    found = pair_geometry(decomposed(LowRankUpdate(a[:2], shared)), decomposed(LowRankUpdate(a[2:], shared)))
    assert (found.cosine, found.row_overlap, found.column_overlap) == pytest.approx((0, 0, 1), abs=1e-14)


def test_a_product_that_cancels_has_no_energy() -> None:
    a, b = normal(3, 20, seed=0), normal(15, 3, seed=1)
    assert product_energy(torch.cat([a, a]), torch.cat([b, -b], dim=1)) == 0.0
    left = product_energy(torch.cat([a, a]), torch.cat([b, -(1 - 1e-9) * b], dim=1))
    assert left == pytest.approx(1e-18 * float((b @ a).square().sum()), rel=1e-5)


def test_the_docstrings_are_true() -> None:
    assert doctest.testmod(importlib.import_module("flowra_compose.pair_geometry")).failed == 0
