"""Isotropic merges against dense decompositions."""

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowra_compose import LowRankUpdate, MergeOptions, merge_updates

SHAPES = [(5, 30), (30, 5), (6, 6), (1, 4), (4, 1), (12, 9), (40, 50)]
RULES = ["iso_c", "iso_cts"]


def random_update(m: int, n: int, rank: int, *, scaling: float = 1.0, seed: int = 0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    return LowRankUpdate(a, b, scaling)


def merged(
    rule: str, updates: Sequence[LowRankUpdate], weights: Sequence[float], *, common: float | None = None
) -> Tensor:
    found = merge_updates([{"fc": one} for one in updates], weights, rule=rule, options=MergeOptions(common=common))
    return found["fc"].delta_weight()


def dense(updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * one.delta_weight() for w, one in zip(weights, updates, strict=True)]).sum(0)


def nonzero(delta: Tensor, *, size: float) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(delta, full_matrices=False)
    rank = int((sigma > 1e-11 * size).sum())
    return u[:, :rank], sigma[:rank], vh[:rank]


def size_of(updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> float:
    return sum(abs(w) * float(one.delta_weight().norm()) for w, one in zip(weights, updates, strict=True))


def orthogonalised(columns: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    kept = values > 1e-12 * values[-1]
    return columns @ (vectors[:, kept] / values[kept].sqrt()) @ vectors[:, kept].T


@st.composite
def inputs(draw: st.DrawFn) -> tuple[list[LowRankUpdate], list[float]]:
    m, n = draw(st.sampled_from(SHAPES))
    scalings = st.sampled_from([-1.5, 0.25, 1.0, 4.0])
    seed = draw(st.integers(0, 10**6))
    updates = [
        random_update(m, n, draw(st.integers(1, 7)), scaling=draw(scalings), seed=seed + task)
        for task in range(draw(st.integers(1, 4)))
    ]
    weight = st.floats(0.2, 3) | st.floats(-3, -0.2)
    return updates, draw(st.lists(weight, min_size=len(updates), max_size=len(updates)))


def gap(case: tuple[list[LowRankUpdate], list[float]]) -> float:
    """The smallest distance of two singular values of the sum: directions are known as well as they differ."""
    _, sigma, _ = nonzero(dense(*case), size=size_of(*case))
    return float((torch.cat([sigma, sigma.new_zeros(1)]).diff().abs()).min()) / size_of(*case)


# exact


@settings(max_examples=60)
@given(inputs())
def test_iso_c_flattens_the_singular_values_of_the_dense_sum(case: tuple[list[LowRankUpdate], list[float]]) -> None:
    assume(gap(case) > 1e-4)
    u, sigma, vh = nonzero(dense(*case), size=size_of(*case))
    found = merged("iso_c", *case)
    assert float((found - sigma.mean() * (u @ vh)).norm()) <= 1e-9 * size_of(*case)
    values = torch.linalg.svdvals(found)
    torch.testing.assert_close(values[: len(sigma)], sigma.mean().expand(len(sigma)), rtol=1e-9, atol=0)
    assert float(values[len(sigma) :].sum()) <= 1e-12 * size_of(*case)


@settings(max_examples=80)
@given(inputs(), st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]))
def test_iso_cts_is_that_of_dense_residuals(
    case: tuple[list[LowRankUpdate], list[float]], common: float | None
) -> None:
    assume(gap(case) > 1e-4)
    updates, weights = case
    u, sigma, vh = nonzero(dense(*case), size=size_of(*case))
    rank, tasks = len(sigma), len(updates)
    each = min(rank // tasks, round((rank - int((0.8 if common is None else common) * rank)) / tasks))
    lead = rank - tasks * each
    us, sigmas, vs = [u[:, :lead]], [sigma[:lead]], [vh[:lead].T]
    for weight, one in zip(weights, updates, strict=True):
        residual = weight * (one.delta_weight() - u[:, :lead] @ (u[:, :lead].T @ one.delta_weight()))
        own = nonzero(residual, size=size_of(*case))
        assume(each == 0 or len(own[1]) <= each or float(own[1][each - 1] - own[1][each]) > 1e-4 * size_of(*case))
        us.append(own[0][:, :each])
        sigmas.append(own[1][:each])
        vs.append(own[2][:each].T)
    left, right = torch.cat(us, dim=1), torch.cat(vs, dim=1)
    values = torch.cat([torch.linalg.svdvals(left), torch.linalg.svdvals(right)])
    least = float(values[values > 1e-6].min())
    expected = torch.cat(sigmas).mean() * orthogonalised(left) @ orthogonalised(right).T
    assert float((merged("iso_cts", *case, common=common) - expected).norm()) <= 1e-9 * size_of(*case) / least**3


def test_the_mean_leaves_out_the_zeros_of_a_sum_of_low_rank() -> None:
    update = LowRankUpdate(torch.eye(8)[:2], torch.eye(6)[:, :2] * torch.tensor([3.0, 1.0]))
    expected = torch.zeros(6, 8)
    expected[0, 0] = expected[1, 1] = 2.0  # the mean of 3 and 1; of 3, 1, 0, 0, 0, 0 it would be 2/3
    torch.testing.assert_close(merged("iso_c", [update], [1]), expected)


def test_iso_cts_gives_directions_to_a_task_that_the_sum_drowns() -> None:
    eye = torch.eye(10, dtype=torch.float64)
    strong = LowRankUpdate(eye[:4], eye[:, :4] * torch.tensor([9.0, 8.0, 7.0, 6.0]))
    weak = LowRankUpdate(eye[4:5], eye[:, 4:5] * 0.1)
    found = merged("iso_cts", [strong, weak], [1, 1], common=0.6)  # three common directions, one of each task
    torch.testing.assert_close(found, torch.diag(eye[:5].sum(0)) * (9 + 8 + 7 + 6 + 0.1) / 5, rtol=0, atol=1e-12)
    weak = LowRankUpdate(eye[4:8], eye[:, 4:8] * torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64))
    found = merged("iso_cts", [strong, weak], [1, 1], common=0.25)  # two common; three of each, strong has two left
    level = (9 + 8 + 7 + 6 + 0.4 + 0.3 + 0.2) / 7
    torch.testing.assert_close(found, torch.diag(eye[:7].sum(0)) * level, rtol=0, atol=1e-12)


def test_a_task_within_the_common_space_gets_no_direction_of_its_own() -> None:
    u, v = (torch.linalg.qr(random_update(d, 4, 4, seed=d).delta_weight()).Q for d in (40, 50))
    strong = LowRankUpdate(v.T, u * torch.tensor([9.0, 8.0, 7.0, 6.0], dtype=torch.float64))
    within = LowRankUpdate(0.5 * v.T[:1], u[:, :1])
    found = merged("iso_cts", [strong, within], [1, 1], common=0.5)  # two common, one of the strong task
    expected = (9.5 + 8 + 7) / 3 * u[:, :3] @ v.T[:3]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


# laws


@settings(max_examples=40)
@given(inputs(), st.sampled_from([0.0, 0.5, 1.0]))
def test_all_directions_common_and_a_single_task_are_iso_c(
    case: tuple[list[LowRankUpdate], list[float]], common: float
) -> None:
    updates, weights = case
    tolerance = 1e-9 * size_of(*case)
    assume(gap(case) > 1e-4 and gap((updates[:1], weights[:1])) > 1e-4)
    assert float((merged("iso_cts", *case, common=1.0) - merged("iso_c", *case)).norm()) <= tolerance
    single = merged("iso_cts", updates[:1], weights[:1], common=common)
    assert float((single - merged("iso_c", updates[:1], weights[:1])).norm()) <= tolerance


@settings(max_examples=40)
@given(inputs(), st.sampled_from(RULES), st.sampled_from([0.125, 3.0, -7.0]), st.randoms(use_true_random=False))
def test_order_and_common_scale_and_alpha_against_b(
    case: tuple[list[LowRankUpdate], list[float]], rule: str, factor: float, chance: random.Random
) -> None:
    assume(gap(case) > 1e-4)
    updates, weights = case
    found, tolerance = merged(rule, updates, weights), 1e-8 * size_of(*case)
    order = list(range(len(updates)))
    chance.shuffle(order)
    shuffled = merged(rule, [updates[each] for each in order], [weights[each] for each in order])
    assert float((shuffled - found).norm()) <= tolerance
    scaled = merged(rule, updates, [factor * weight for weight in weights])
    assert float((scaled - factor * found).norm()) <= abs(factor) * tolerance
    rescaled = [LowRankUpdate(one.lora_A, one.lora_B / factor, one.scaling * factor) for one in updates]
    assert float((merged(rule, rescaled, weights) - found).norm()) <= tolerance


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_adapter_minus_itself_is_zero_and_zeros_take_no_part(rule: str, shape: tuple[int, int]) -> None:
    update = random_update(*shape, 4, scaling=3.0)
    assert not merged(rule, [update, update], [1, -1]).any()
    zero = LowRankUpdate(update.lora_A, torch.zeros_like(update.lora_B))
    assert not merged(rule, [zero, zero], [1, 1]).any()
    torch.testing.assert_close(merged(rule, [zero, update], [1, 1]), merged(rule, [update], [1]))


@pytest.mark.parametrize("rule", RULES)
def test_the_sum_of_vectors_is_left_as_it_is(rule: str) -> None:
    columns = [random_update(6, 1, 1, seed=seed).delta_weight() for seed in range(2)]
    updates = [LowRankUpdate.of_delta_weight(one, layout="vector") for one in columns]
    torch.testing.assert_close(merged(rule, updates, [1, 3]), columns[0] + 3 * columns[1])


# refusals


def test_a_share_out_of_range_or_for_another_rule_is_refused() -> None:
    update = random_update(4, 5, 2)
    with pytest.raises(ValueError, match=r"common must be in \[0, 1\], got 1.5"):
        merged("iso_cts", [update], [1], common=1.5)
    with pytest.raises(ValueError, match=r"common must be left out with the rule 'iso_c', got 0.5. It takes \[\]"):
        merged("iso_c", [update], [1], common=0.5)
