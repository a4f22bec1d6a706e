"""The starts of LoRA against exact decompositions, their laws, golden values and PEFT."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraGAConfig
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

from flowra_adapters.initialisation import (
    Initialisation,
    flow_v,
    leading_svd,
    lora_ga,
    lora_one,
    milora,
    olora,
    orthogonal,
    pissa,
)
from flowra_adapters.input_pca import InputPCA, eva, eva_ranks

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lora_family.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
FROM_WEIGHT = [pissa, milora, olora]
close = torch.testing.assert_close


def product(start: Initialisation) -> Tensor:
    return start.lora_B @ start.lora_A


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def with_spectrum(m: int, n: int, sigma: Tensor, *, seed: int = 0) -> Tensor:
    u, v = (torch.linalg.qr(gaussian(size, len(sigma), seed=seed + i)).Q for i, size in enumerate((m, n)))
    return (u * sigma) @ v.T


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int, float]:
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    scaling = draw(st.floats(1e-3, 1e3)) * draw(st.sampled_from([1.0, -1.0]))
    return gaussian(m, n, seed=draw(st.integers(0, 999))), draw(st.integers(1, min(m, n))), scaling


# Golden values: peft 0.21.2 (PiSSA, OLoRA), and MiLoRA by its definition.


def test_pissa_equals_the_golden_update_and_residual() -> None:
    case, weight = CASES["pissa"], torch.tensor(GOLDEN["W"])
    update = case["scaling"] * product(pissa(weight, GOLDEN["r"], scaling=case["scaling"]))
    close(update, torch.tensor(case["delta_W"]), rtol=0, atol=1e-6)
    close(weight - update, torch.tensor(case["residual_W"]), rtol=0, atol=1e-6)


def test_olora_times_its_scaling_is_the_golden_update_which_peft_does_not_divide() -> None:
    case = CASES["olora"]
    update = case["scaling"] * product(olora(torch.tensor(GOLDEN["W"]), GOLDEN["r"], scaling=case["scaling"]))
    close(case["scaling"] * update, torch.tensor(case["delta_W"]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_milora_equals_the_golden_update_and_residual(scaling: float) -> None:
    case, weight = CASES["milora_definition_r1"], torch.tensor(GOLDEN["W"])
    update = scaling * product(milora(weight, 1, scaling=scaling))
    close(update, torch.tensor(case["delta_W"]), rtol=0, atol=1e-6)
    close(weight - update, torch.tensor(case["residual_W"]), rtol=0, atol=1e-6)


# PiSSA, MiLoRA, OLoRA: exact oracles and laws.


@given(weights())
def test_pissa_takes_the_largest_triplets_whatever_the_scaling(drawn: tuple[Tensor, int, float]) -> None:
    weight, rank, scaling = drawn
    start = pissa(weight, rank, scaling=scaling)
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    close(scaling * product(start), (u[:, :rank] * sigma[:rank]) @ vh[:rank])
    left = torch.linalg.svdvals(weight - scaling * product(start))
    close(left, torch.cat([sigma[rank:], torch.zeros(rank, dtype=torch.float64)]))
    for gram in (start.lora_A @ start.lora_A.T, start.lora_B.T @ start.lora_B):
        close(gram, torch.diag(sigma[:rank] / abs(scaling)))
    assert start.offset


@given(weights())
def test_milora_takes_the_smallest_triplets_whatever_the_scaling(drawn: tuple[Tensor, int, float]) -> None:
    weight, rank, scaling = drawn
    start = milora(weight, rank, scaling=scaling)
    sigma = torch.linalg.svdvals(weight)
    close(torch.linalg.svdvals(weight - scaling * product(start))[: len(sigma) - rank], sigma[: len(sigma) - rank])
    for gram in (start.lora_A @ start.lora_A.T, start.lora_B.T @ start.lora_B):
        close(gram, torch.diag(sigma[-rank:] / abs(scaling)))
    assert start.offset


@given(weights())
def test_olora_has_an_orthonormal_b_and_takes_the_first_columns_out(drawn: tuple[Tensor, int, float]) -> None:
    weight, rank, scaling = drawn
    start = olora(weight, rank, scaling=scaling)
    close(start.lora_B.T @ start.lora_B, torch.eye(rank, dtype=torch.float64))
    residual = weight - scaling * product(start)
    close(residual[:, :rank], torch.zeros_like(residual[:, :rank]))
    close(start.lora_B.T @ residual, torch.zeros(rank, weight.shape[1], dtype=torch.float64))
    assert (scaling * start.lora_A[:, :rank].diagonal() >= 0).all()
    assert start.offset


@given(weights())
def test_pissa_and_milora_of_complementary_ranks_make_the_weight(drawn: tuple[Tensor, int, float]) -> None:
    weight, rank, scaling = drawn
    rest = min(weight.shape) - rank
    update = product(pissa(weight, rank, scaling=scaling))
    if rest:
        update = update + product(milora(weight, rest, scaling=scaling))
    close(scaling * update, weight)


@pytest.mark.parametrize("initialise", FROM_WEIGHT)
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_factors_have_at_least_float32_and_belong_to_nobody_else(
    initialise: Any,  # noqa: ANN401 - one of several functions
    dtype: torch.dtype,
    expected: torch.dtype,
) -> None:
    weight = nn.Parameter(gaussian(5, 3).to(dtype))
    start = initialise(weight, 3, scaling=2.0)
    before = product(start).clone()
    close((2 * before).double(), weight.detach().double(), rtol=0, atol=1e-5)
    weight.data.zero_()
    for factor in (start.lora_A, start.lora_B):
        assert factor.dtype == expected
        assert factor.is_contiguous()
        assert not factor.requires_grad
    assert torch.equal(product(start), before)


def test_signs_do_not_depend_on_those_of_the_decomposition() -> None:
    weight = gaussian(6, 9)
    starts = [pissa(each, 4, scaling=0.5) for each in (weight, -weight)]
    close(starts[0].lora_A, starts[1].lora_A)
    close(starts[0].lora_B, -starts[1].lora_B)
    rows = starts[0].lora_A
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()


def test_randomised_pissa_nears_the_exact_one_with_more_iterations() -> None:
    weight = with_spectrum(80, 60, torch.arange(1, 61, dtype=torch.float64) ** -0.5)
    best = float(torch.linalg.svdvals(weight)[4:].square().sum().sqrt())
    errors = [
        float((weight - 3 * product(pissa(weight, 4, scaling=3.0, iterations=k, generator=generator()))).norm()) / best
        for k in (0, 2, 30)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(1, abs=1e-9)


def test_randomised_pissa_is_exact_without_iterations_up_to_ten_ranks_more_than_its_own() -> None:
    weight = with_spectrum(80, 60, torch.linspace(3, 1, 14, dtype=torch.float64))
    randomised = pissa(weight, 4, scaling=2.0, iterations=0, generator=generator())
    close(product(randomised), product(pissa(weight, 4, scaling=2.0)))


def test_randomised_pissa_repeats_with_its_generator_and_leaves_the_global_one() -> None:
    weight, state = gaussian(40, 30), torch.get_rng_state()
    first, again, other = (
        pissa(weight, 2, scaling=1.0, iterations=1, generator=generator(seed)).lora_A for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_randomised_decomposition_of_as_many_probes_as_columns_is_exact_and_draws_nothing() -> None:
    weight, drawn_from = gaussian(12, 7), generator()
    state = drawn_from.get_state()
    u, sigma, vh = leading_svd(weight, 7, generator=drawn_from)
    close(sigma, torch.linalg.svdvals(weight))
    close((u * sigma) @ vh, weight)
    assert torch.equal(drawn_from.get_state(), state)


# Orthogonal.


@pytest.mark.parametrize(("m", "n", "rank"), [(4, 4, 2), (7, 12, 6), (30, 8, 8)])
def test_orthogonal_factors_are_not_zero_and_their_product_is(m: int, n: int, rank: int) -> None:
    start = orthogonal(m, n, rank, generator=generator(), dtype=torch.float64)
    assert (start.lora_A.shape, start.lora_B.shape, start.offset) == ((rank, n), (m, rank), False)
    assert product(start).abs().max() < 1e-16
    assert torch.linalg.matrix_rank(start.lora_A) == torch.linalg.matrix_rank(start.lora_B) == rank // 2


def test_orthogonal_product_in_a_narrow_dtype_is_zero_to_its_rounding_only() -> None:
    products = [
        float(product(orthogonal(64, 64, 16, generator=generator(), dtype=dtype)).abs().max())
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    ]
    assert products[0] > 1e-4 > 1e-7 > products[1] > products[2]


# LoRA-GA and LoRA-One.


def step(start: Initialisation, gradient: Tensor, *, scaling: float, rate: float) -> Tensor:
    """Change of s · B A in one step of gradient descent on a loss whose gradient in the weight is constant."""
    factors = [each.clone().requires_grad_() for each in (start.lora_A, start.lora_B)]
    loss = (gradient * (scaling * factors[1] @ factors[0])).sum()
    a, b = (each - rate * slope for each, slope in zip(factors, torch.autograd.grad(loss, factors), strict=True))
    return scaling * (b @ a - product(start)).detach()


def alignment(change: Tensor, gradient: Tensor) -> float:
    return float(-(change * gradient).sum() / (change.norm() * gradient.norm()))


@pytest.mark.parametrize(("m", "n", "rank"), [(6, 5, 2), (10, 16, 5), (300, 260, 3)])
def test_lora_ga_product_is_the_paper_s(m: int, n: int, rank: int) -> None:
    gradient = with_spectrum(m, n, 0.7 ** torch.arange(min(m, n), dtype=torch.float64))
    start = lora_ga(gradient, rank, gamma=9.0, generator=generator())
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    a, b = (m**0.25 / 3 * each for each in (vh[:rank], u[:, rank : 2 * rank]))
    signs = (start.lora_A * a).sum(1).sign()
    close(start.lora_A, signs[:, None] * a, rtol=0, atol=1e-6)
    close((start.lora_B * b).sum(0).abs(), torch.full((rank,), m**0.5 / 9, dtype=torch.float64))
    close(start.lora_A @ start.lora_A.T, m**0.5 / 9 * torch.eye(rank, dtype=torch.float64))
    assert start.offset


def test_lora_ga_first_step_is_along_the_best_approximation_of_twice_the_rank() -> None:
    gradient = gaussian(12, 9)
    start = lora_ga(gradient, 3, generator=generator())
    u, sigma, vh = torch.linalg.svd(gradient, full_matrices=False)
    change = step(start, gradient, scaling=2.0, rate=1e-7)
    close(change / (1e-7 * 4 * 12**0.5 / 16), -(u[:, :6] * sigma[:6]) @ vh[:6], rtol=1e-5, atol=1e-5)


def test_lora_ga_first_step_aligns_with_a_well_conditioned_gradient_better_than_kaiming_s() -> None:
    n, rank = 16, 2
    gradient = with_spectrum(n, n, torch.linspace(2, 1, n, dtype=torch.float64))
    ours = alignment(step(lora_ga(gradient, rank, generator=generator()), gradient, scaling=1.0, rate=1e-6), gradient)
    theirs = []
    for seed in range(20):
        a = (torch.rand(rank, n, generator=generator(seed), dtype=torch.float64) * 2 - 1) / math.sqrt(n)
        kaiming = Initialisation(a, torch.zeros(n, rank, dtype=torch.float64), offset=False)
        theirs.append(alignment(step(kaiming, gradient, scaling=1.0, rate=1e-6), gradient))
    energy = torch.linalg.svdvals(gradient).square().cumsum(0)
    assert ours == pytest.approx(math.sqrt(energy[3] / energy[-1]), abs=1e-5)  # rank 4 of 16: 0.621
    assert max(theirs) < math.sqrt(energy[1] / energy[-1]) < ours  # what rank 2 can do at best: 0.454
    assert sum(theirs) / 20 == pytest.approx(0.35, abs=0.02)  # about √(r/n)


@pytest.mark.parametrize(("m", "n", "rank"), [(6, 5, 2), (5, 6, 5), (300, 260, 3)])
def test_lora_one_is_a_balanced_step_down_the_gradient(m: int, n: int, rank: int) -> None:
    gradient = with_spectrum(m, n, 0.7 ** torch.arange(min(m, n), dtype=torch.float64))
    start = lora_one(gradient, rank, gamma=4.0, generator=generator())
    u, sigma, vh = torch.linalg.svd(gradient, full_matrices=False)
    close(product(start), -(u[:, :rank] * sigma[:rank]) @ vh[:rank] / (4 * sigma[0]), rtol=0, atol=1e-6)
    close(start.lora_A @ start.lora_A.T, start.lora_B.T @ start.lora_B, rtol=0, atol=1e-6)
    assert start.offset
    assert alignment(product(start), gradient) > 0.8
    assert replace(start, offset=False).lora_A is start.lora_A  # the paper's start


@pytest.mark.parametrize("initialise", [lora_ga, lora_one])
def test_scale_of_the_gradient_does_not_matter(initialise: Any) -> None:  # noqa: ANN401
    gradient = with_spectrum(270, 260, 0.7 ** torch.arange(260, dtype=torch.float64)).float()
    starts = [initialise(scale * gradient, 2, generator=generator()) for scale in (1.0, 1e-12, 1e12)]
    for start in starts[1:]:
        close(start.lora_A, starts[0].lora_A)
        close(start.lora_B, starts[0].lora_B)


# flow_v.


def test_flow_v_is_an_orthonormal_nested_basis_with_b_zero() -> None:
    directions = gaussian(5, 8) * torch.tensor([[1e6], [1.0], [1e-6], [3.0], [1.0]], dtype=torch.float64)
    start = flow_v(directions, 4, out_features=6)
    close(start.lora_A @ start.lora_A.T, torch.eye(4, dtype=torch.float64))
    projected = directions[:4] @ start.lora_A.T @ start.lora_A
    close(projected, directions[:4])
    close(flow_v(directions, 2, out_features=6).lora_A, start.lora_A[:2])
    assert start.lora_B.shape == (6, 4)
    assert not start.lora_B.any()
    assert not start.offset


def test_flow_v_keeps_orthonormal_directions_as_they_are() -> None:
    directions = torch.linalg.svd(gaussian(6, 9)).Vh
    close(flow_v(directions, 3, out_features=5).lora_A, directions[:3])


def test_flow_v_first_step_captures_the_leading_energy_of_the_gradient() -> None:
    gradient = gaussian(7, 9)
    _, sigma, vh = torch.linalg.svd(gradient, full_matrices=False)
    change = step(flow_v(vh, 3, out_features=7), gradient, scaling=2.0, rate=0.1)
    close(change, -0.4 * gradient @ vh[:3].T @ vh[:3])
    assert float(change.norm() / (0.4 * sigma.norm())) ** 2 == pytest.approx(
        float(sigma[:3].norm() / sigma.norm()) ** 2
    )


# EVA.


def exact_pca(x: Tensor) -> tuple[Tensor, Tensor]:
    _, sigma, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return sigma, vh


def streamed(batches: list[Tensor], components: int) -> InputPCA:
    pca = InputPCA.init(batches[0].shape[-1], components, dtype=torch.float64)
    for batch in batches:
        pca = pca.update(batch)
    return pca


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_input_pca_with_room_for_all_components_is_exact_for_every_split(sizes: list[int], seed: int) -> None:
    x = gaussian(2 + sum(sizes), 6, seed=seed) * 3.0 ** -torch.arange(6) + 5
    pca = streamed(list(x.split([2, *sizes])), 6)
    sigma, vh = exact_pca(x)
    found = min(6, len(x) - 1)
    close(pca.singular_values, sigma[:found])
    close((pca.components * vh[:found]).sum(1).abs(), torch.ones(found, dtype=torch.float64))
    close(pca.mean, x.mean(0))
    close(pca.explained().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert pca.count == len(x)


def test_input_pca_of_one_batch_is_exact_whatever_it_keeps() -> None:
    x = gaussian(8, 30)
    pca = streamed([x], 4)
    sigma, _ = exact_pca(x)
    close(pca.singular_values, sigma[:4])
    close(pca.explained(), sigma[:4].square() / sigma.square().sum())


def test_input_pca_of_many_batches_never_overstates_and_finds_the_leading_space() -> None:
    x = gaussian(600, 40) * 0.8 ** torch.arange(40)
    pca = streamed(list(x.split(50)), 8)
    sigma, vh = exact_pca(x)
    assert (pca.singular_values <= sigma[:8] * (1 + 1e-12)).all()
    close(pca.variation, sigma.square().sum())  # what was truncated counts as variance, too
    close(pca.singular_values[:4], sigma[:4], rtol=0.01, atol=0)
    kept = (vh[:4] @ pca.components.T).square().sum() / 4
    assert kept > 0.98


def test_input_pca_equals_peft_s_on_the_same_batches() -> None:
    x = gaussian(120, 12) * 0.6 ** torch.arange(12) + 2
    theirs = IncrementalPCA(n_components=5)
    for batch in x.split(30):
        theirs.partial_fit(batch)
    pca = streamed(list(x.split(30)), 5)
    exact = 1e-6 * float(pca.singular_values[0])
    close(pca.singular_values, theirs.singular_values_, rtol=0, atol=exact)  # both truncate; ours from 10 probes
    close(pca.components, theirs.components_, rtol=0, atol=1e-5)
    close(pca.explained(), theirs.explained_variance_ratio_, rtol=0, atol=1e-6)


def test_input_pca_is_centred_so_that_a_constant_changes_nothing() -> None:
    x = gaussian(30, 5) * 2.0 ** -torch.arange(5)
    plain, shifted = (streamed(list(each.split(10)), 3) for each in (x, x + 100))
    close(plain.components, shifted.components)
    close(plain.explained(), shifted.explained())
    uncentred = torch.linalg.svd(x + 100, full_matrices=False).Vh[0]  # the mean, which explains no variance
    assert (shifted.components[0] * uncentred).sum().abs() < 0.7


def test_input_pca_flattens_tokens_and_ignores_an_empty_batch() -> None:
    x = gaussian(4, 5, 7)
    close(streamed([x], 3).components, streamed([x.flatten(0, 1)], 3).components)
    pca = streamed([x], 3)
    assert pca.update(x[:0]) is pca


def test_input_pca_finds_no_component_in_constant_inputs() -> None:
    x = torch.full((10, 4), 1 / 3)
    pca = InputPCA.init(4, 2).update(x[:3]).update(x)
    assert len(pca.explained()) == 0
    assert not pca.converged()
    with pytest.raises(ValueError, match="0 components found"):
        eva(pca, 1, out_features=4)


def test_input_pca_converges_when_an_update_leaves_its_components() -> None:
    x = gaussian(40, 6) * 2.0 ** -torch.arange(6)
    once = streamed([x], 3)
    assert not once.converged()
    assert not once.converged(tau=0.01, rank=1)
    assert once.converged(rank=0)
    assert once.update(x).converged(tau=1 - 1e-9)
    disturbed = once.update(100 * gaussian(40, 6, seed=1) * 2.0 ** torch.arange(6))
    assert not disturbed.converged()
    assert not disturbed.converged(rank=2)


def test_input_pca_similarity_looks_at_each_component_alone() -> None:
    axes = torch.eye(3, dtype=torch.float64)
    wide, narrow = 10 * torch.stack([axes[0], -axes[0]]), torch.stack([axes[1], -axes[1]])
    pca = streamed([torch.cat([wide, narrow]), 2 * torch.stack([axes[2], -axes[2]])], 2)
    close(pca.similarity, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert pca.converged(rank=1)
    assert not pca.converged(rank=2)


def test_input_pca_similarity_is_the_cosine_with_the_component_before() -> None:
    x = gaussian(60, 4)
    pca = streamed([x[:40], x[40:]], 4)
    before, after = exact_pca(x[:40])[1], exact_pca(x)[1]
    close(pca.similarity, (before * after).sum(1).abs())
    assert 0.1 < pca.similarity.min() < 0.95


def test_eva_has_the_leading_components_and_b_zero() -> None:
    x = gaussian(50, 8) * 2.0 ** -torch.arange(8)
    pca = streamed([x], 4)
    start = eva(pca, 3, out_features=5)
    close(start.lora_A @ start.lora_A.T, torch.eye(3, dtype=torch.float64))
    close(start.lora_A, pca.components[:3])
    assert start.lora_B.shape == (5, 3)
    assert not start.lora_B.any()
    assert not start.offset
    assert start.lora_A.data_ptr() != pca.components.data_ptr()


@st.composite
def shares(draw: st.DrawFn) -> tuple[dict[str, Tensor], int, float]:
    rank, rho = draw(st.integers(1, 2)), draw(st.sampled_from([1.0, 1.5, 2.0]))
    value = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5])  # few values, so that ties are common
    drawn = {
        name: torch.tensor(sorted(draw(st.lists(value, min_size=rank, max_size=5)), reverse=True))
        for name in ["a", "b", "c"]
    }
    return drawn, rank, rho


@given(shares(), st.permutations(["a", "b", "c"]))
def test_eva_ranks_explain_the_most_variance_within_the_cap(
    drawn: tuple[dict[str, Tensor], int, float], order: list[str]
) -> None:
    explained, rank, rho = drawn
    ranks = eva_ranks(explained, rank=rank, rho=rho)
    limits = {name: min(len(each), math.floor(rho * rank)) for name, each in explained.items()}
    assert sum(ranks.values()) == 3 * rank
    assert all(ranks[name] <= limits[name] for name in ranks)
    every = itertools.product(*(range(limits[name] + 1) for name in explained))
    best = max(
        sum(float(explained[name][:k].sum()) for name, k in zip(explained, each, strict=True))
        for each in every
        if sum(each) == 3 * rank
    )
    assert sum(float(explained[name][:k].sum()) for name, k in ranks.items()) == pytest.approx(best)
    assert eva_ranks({name: explained[name] for name in order}, rank=rank, rho=rho) == ranks


def test_eva_ranks_break_ties_by_place_and_then_by_name() -> None:
    flat = torch.full((4,), 0.25)
    assert eva_ranks({"b": flat, "a": flat, "c": flat}, rank=2) == {"b": 2, "a": 2, "c": 2}
    layers = {"c": torch.tensor([0.5, 0.1]), "b": torch.tensor([0.5, 0.1]), "a": torch.tensor([0.4, 0.1])}
    assert eva_ranks(layers, rank=1) == {"c": 1, "b": 1, "a": 1}
    layers["a"] = torch.tensor([0.1, 0.1])
    assert eva_ranks(layers, rank=1) == {"c": 1, "b": 1, "a": 1}
    layers["b"] = torch.tensor([0.5, 0.2])
    assert eva_ranks(layers, rank=1) == {"c": 1, "b": 2, "a": 0}


def test_eva_ranks_with_rho_one_are_equal() -> None:
    layers = {"a": torch.tensor([0.9, 0.05, 0.05]), "b": torch.tensor([0.01, 0.01, 0.01])}
    assert eva_ranks(layers, rank=2, rho=1.0) == {"a": 2, "b": 2}


# PEFT as a second judge.


def in_peft(weight: Tensor, rank: int, *, alpha: int, **config: Any) -> Any:  # noqa: ANN401 - a PEFT layer
    model = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))
    model[0].weight.data = weight.clone()
    if "lora_ga_config" in config:
        model[0]._peft_loraga_grad = config.pop("gradient").clone()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], **config))
    return wrapped.base_model.model[0]


def factors(layer: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.mark.parametrize("alpha", [4, 16])
def test_pissa_equals_peft_s_up_to_signs(alpha: int) -> None:
    weight = gaussian(9, 7).float()
    a, b = factors(in_peft(weight, 4, alpha=alpha, init_lora_weights="pissa"))
    start = pissa(weight, 4, scaling=alpha / 4)
    close(product(start), b @ a)
    close(start.lora_A.abs(), a.abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("m", "n"), [(9, 7), (7, 9)])
def test_olora_equals_peft_s_where_the_scaling_is_one(m: int, n: int) -> None:
    weight = gaussian(m, n).float()
    layer = in_peft(weight, 4, alpha=4, init_lora_weights="olora")
    start = olora(weight, 4, scaling=1.0)
    a, b = factors(layer)
    close(product(start), b @ a)
    close(start.lora_A.abs(), a.abs())
    close(weight - product(start), layer.get_base_layer().weight.detach())


def test_milora_chooses_the_left_vectors_of_peft_s_mica() -> None:
    weight = gaussian(9, 7).float()
    _, b = factors(in_peft(weight, 3, alpha=3, init_lora_weights="mica"))
    ours = milora(weight, 3, scaling=1.0).lora_B
    close((ours / ours.norm(dim=0)).abs(), b.abs(), rtol=1e-4, atol=1e-5)


def test_orthogonal_equals_peft_s_from_the_same_seed() -> None:
    layer = in_peft(gaussian(9, 7).float(), 4, alpha=4, init_lora_weights="orthogonal")
    torch.manual_seed(3)
    layer.orthogonal_init("default")
    a, b = factors(layer)
    start = orthogonal(9, 7, 4, generator=generator(3))
    close(start.lora_A, a)
    close(start.lora_B, b)


def test_lora_ga_takes_peft_s_directions_and_the_paper_s_scales() -> None:
    weight, gradient = gaussian(9, 7).float(), gaussian(9, 7, seed=1).float()
    config = LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16)
    layer = in_peft(weight, 2, alpha=2, init_lora_weights="lora_ga", lora_ga_config=config, gradient=gradient)
    start, scale = lora_ga(gradient, 2, generator=generator()), 9**0.25 / 4
    a, b = factors(layer)
    close((start.lora_A / scale).abs(), a.abs(), rtol=1e-4, atol=1e-5)
    close((start.lora_B * torch.linalg.svdvals(gradient)[2:4]).abs(), b.abs(), rtol=1e-4, atol=1e-5)


# Refusals.


@pytest.mark.parametrize("initialise", FROM_WEIGHT)
def test_weights_that_cannot_be_decomposed_are_refused(initialise: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=r"weight must be floating point, got torch.int8\. Dequantise"):
        initialise(torch.zeros(3, 3, dtype=torch.int8), 1, scaling=1.0)
    with pytest.raises(ValueError, match="weight must be finite"):
        initialise(torch.tensor([[1.0, math.nan]]), 1, scaling=1.0)
    with pytest.raises(ValueError, match=r"weight must be a matrix, got shape \(2, 2, 3\)"):
        initialise(torch.ones(2, 2, 3), 1, scaling=1.0)
    for rank in (0, 4):
        with pytest.raises(ValueError, match=rf"rank must be in \[1, min\(m, n\) = 3\], got {rank}"):
            initialise(torch.ones(3, 5), rank, scaling=1.0)
    for scaling in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scaling must be finite and not 0"):
            initialise(torch.ones(3, 5), 1, scaling=scaling)


def test_randomised_pissa_needs_a_generator_and_iterations_of_at_least_zero() -> None:
    with pytest.raises(ValueError, match="generator must be given"):
        pissa(gaussian(30, 30), 2, scaling=1.0, iterations=2)
    with pytest.raises(ValueError, match="iterations must be at least 0, got -1"):
        pissa(gaussian(30, 30), 2, scaling=1.0, iterations=-1, generator=generator())


@pytest.mark.parametrize(("rank", "message"), [(3, "must be even"), (0, r"in \[1"), (6, r"min\(m, n\) = 4")])
def test_orthogonal_refuses_ranks_it_cannot_have(rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonal(4, 9, rank, generator=generator())


@pytest.mark.parametrize("initialise", [lora_ga, lora_one])
def test_gradients_that_say_nothing_are_refused(initialise: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="gradient must not be 0"):
        initialise(torch.zeros(4, 4), 1, generator=generator())
    with pytest.raises(ValueError, match="gradient must be finite"):
        initialise(torch.full((4, 4), math.inf), 1, generator=generator())
    with pytest.raises(TypeError, match="gradient must be floating point"):
        initialise(torch.ones(4, 4, dtype=torch.long), 1, generator=generator())
    for gamma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="gamma must be finite and > 0"):
            initialise(torch.ones(4, 4), 1, gamma=gamma, generator=generator())


def test_lora_ga_refuses_a_rank_without_twice_as_many_directions() -> None:
    with pytest.raises(ValueError, match=r"2 · rank must be in \[1, min\(m, n\) = 5\], got 6"):
        lora_ga(gaussian(5, 9), 3, generator=generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_v_refuses_dependent_directions(dtype: torch.dtype) -> None:
    directions = gaussian(3, 6).to(dtype)
    directions[2] = directions[0] - 2 * directions[1]
    assert flow_v(directions, 2, out_features=4).lora_A.shape == (2, 6)
    with pytest.raises(ValueError, match=r"row 2 in the span .* Lower the rank to 2"):
        flow_v(directions, 3, out_features=4)
    with pytest.raises(ValueError, match="got row 0"):
        flow_v(torch.zeros(1, 6, dtype=dtype), 1, out_features=4)
    with pytest.raises(ValueError, match=r"min\(k, n, m\) = 1"):
        flow_v(directions, 2, out_features=1)


def test_input_pca_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match=r"components must be in \[1, 4\], got 5"):
        InputPCA.init(4, 5)
    with pytest.raises(ValueError, match="dtype must be"):
        InputPCA.init(4, 2, dtype=torch.bfloat16)
    pca = InputPCA.init(4, 2)
    with pytest.raises(ValueError, match=r"inputs must have shape \(…, 4\), got \(2, 3\)"):
        pca.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="inputs must be finite"):
        pca.update(torch.full((2, 4), math.nan))
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\], got 1.5"):
        pca.converged(tau=1.5)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\], got 3"):
        pca.converged(rank=3)


@pytest.mark.parametrize(
    ("shares", "rank", "rho", "message"),
    [
        ([0.5, 0.1], 0, 2.0, "rank must be at least 1, got 0"),
        ([0.5, 0.1], 1, 0.5, "rho must be finite and at least 1, got 0.5"),
        ([0.5, math.nan], 1, 2.0, "non-increasing, got .*; in 'layer'"),
        ([0.1, 0.5], 1, 2.0, "non-increasing"),
        ([0.5, -0.1], 1, 2.0, "≥ 0"),
        ([0.5, 0.1], 3, 2.0, "at least 3 shares, 6 of a layer at most, got 2"),
    ],
)
def test_eva_ranks_refuse_bad_input(shares: list[float], rank: int, rho: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eva_ranks({"layer": torch.tensor(shares)}, rank=rank, rho=rho)
