import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowra_analysis import (
    JacobianProducts,
    TraceEstimate,
    hutch_plus_plus_trace,
    hutchinson_trace,
    squared_jacobian_norms,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # linear_operator uses torch.jit.script
    import curvlinops

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/flowra_estimators.json").read_text())["hutchinson"]
Estimator = Callable[..., TraceEstimate]


def symmetric(eigenvalues: Tensor) -> Tensor:
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64)).Q
    return basis * eigenvalues @ basis.T


def hutchinson(matrix: Tensor, num: int, seed: int) -> TraceEstimate:
    return hutchinson_trace(lambda v: matrix @ v, len(matrix), num_probes=num, seed=seed, dtype=matrix.dtype)


def hutch_plus_plus(matrix: Tensor, num: int, seed: int) -> TraceEstimate:
    return hutch_plus_plus_trace(lambda v: matrix @ v, len(matrix), num_matvecs=num, seed=seed, dtype=matrix.dtype)


def root_mean_square_error(estimator: Estimator, matrix: Tensor, num: int, *, seeds: int = 300) -> float:
    errors = [float(estimator(matrix, num, seed).mean - matrix.trace()) for seed in range(seeds)]
    return math.sqrt(sum(error**2 for error in errors) / seeds)


def test_golden_quadratic_forms_mean_and_variance() -> None:
    matrix = torch.tensor(GOLDEN["M"], dtype=torch.float64)
    values = torch.stack([hutchinson(matrix, 1, seed).mean for seed in range(2000)])
    assert set(values.tolist()) == set(GOLDEN["all_8_rademacher_quadratic_forms"])
    assert abs(float(values.mean()) - GOLDEN["mean"]) < 4 * math.sqrt(GOLDEN["variance"] / 2000)
    assert float(values.var()) == pytest.approx(GOLDEN["variance"], rel=0.1)
    assert GOLDEN["variance"] == 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10], ids="{:g}".format)
def test_one_probe_is_exact_for_a_diagonal_matrix(scale: float) -> None:
    diagonal = scale * torch.randn(20, dtype=torch.float64)
    found = hutchinson(diagonal.diag(), 1, seed=0)
    assert float(found.mean) == pytest.approx(float(diagonal.sum()), rel=1e-12)
    assert found.standard_error.isnan()
    assert float(hutchinson(diagonal.diag(), 2, seed=0).standard_error) <= 1e-12 * scale


@pytest.mark.parametrize("num", [4, 16, 64])
def test_the_error_of_hutchinson_is_that_of_the_formula_and_falls_like_one_over_root_k(num: int) -> None:
    matrix = symmetric(torch.linspace(-1, 3, 30, dtype=torch.float64))
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum()) / num
    assert root_mean_square_error(hutchinson, matrix, num) == pytest.approx(math.sqrt(variance), rel=0.12)


@pytest.mark.parametrize("estimator", [hutchinson, hutch_plus_plus])
def test_estimates_are_unbiased_and_inside_their_own_interval(estimator: Estimator) -> None:
    matrix = symmetric(torch.linspace(-1, 3, 40, dtype=torch.float64))
    found = [estimator(matrix, 48, seed) for seed in range(400)]
    errors = torch.stack([each.mean for each in found]) - matrix.trace()
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / 20
    inside = errors.abs() < 2 * torch.stack([each.standard_error for each in found])
    assert 0.9 < float(inside.double().mean()) < 0.98


def test_hutch_plus_plus_is_better_where_the_spectrum_decays_and_not_where_it_is_flat() -> None:
    decaying = symmetric(1 / torch.arange(1, 201, dtype=torch.float64) ** 2)
    errors = [root_mean_square_error(each, decaying, 30, seeds=60) for each in (hutch_plus_plus, hutchinson)]
    assert errors[0] < errors[1] / 10
    flat = symmetric(torch.linspace(1, 2, 200, dtype=torch.float64))
    errors = [root_mean_square_error(each, flat, 30, seeds=60) for each in (hutch_plus_plus, hutchinson)]
    assert errors[1] < errors[0] < 3 * errors[1]


def test_the_error_of_hutch_plus_plus_falls_faster_than_one_over_root_k() -> None:
    matrix = symmetric(1 / torch.arange(1, 201, dtype=torch.float64))
    few, many = (root_mean_square_error(hutch_plus_plus, matrix, num, seeds=60) for num in (12, 96))
    assert many < few / 4  # eight times the products; the root would be 2.8


@pytest.mark.parametrize("rank", [1, 5, 10])
def test_hutch_plus_plus_is_exact_up_to_rank_k(rank: int) -> None:
    matrix = symmetric(torch.cat([torch.linspace(1, 5, rank), torch.zeros(40 - rank)]).double())
    found = hutch_plus_plus(matrix, 30, seed=1)
    assert float(found.mean) == pytest.approx(float(matrix.trace()), rel=1e-10)
    assert float(found.standard_error) < 1e-9


def test_hutch_plus_plus_is_exact_where_the_matrix_is_small() -> None:
    matrix = torch.randn(5, 5, dtype=torch.float64)  # not symmetric
    assert float(hutch_plus_plus(matrix, 15, seed=0).mean) == pytest.approx(float(matrix.trace()), rel=1e-10)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(hutchinson, curvlinops.hutchinson_trace), (hutch_plus_plus, curvlinops.hutchpp_trace)],
    ids=["hutchinson", "hutch++"],
)
def test_mean_and_spread_over_seeds_are_those_of_curvlinops(
    ours: Estimator, theirs: Callable[[Tensor, int], Tensor]
) -> None:
    matrix = symmetric(1 / torch.arange(1, 61, dtype=torch.float64))
    a = torch.stack([ours(matrix, 12, seed).mean for seed in range(2000)])
    b = torch.stack([theirs(matrix, 12) for _ in range(2000)])
    assert abs(float(a.mean() - b.mean())) < 4 * math.sqrt(float(a.var() + b.var()) / 2000)
    assert float(a.std() / b.std()) == pytest.approx(1, abs=0.1)


def test_the_trace_of_a_hessian_needs_only_its_products() -> None:
    weight = torch.randn(12, 12, dtype=torch.float64)

    def loss(point: Tensor) -> Tensor:
        return torch.tanh(weight @ point).square().sum()

    point = torch.randn(12, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(point), point, create_graph=True)

    def matvec(vectors: Tensor) -> Tensor:
        columns = [torch.autograd.grad(gradient, point, each, retain_graph=True)[0] for each in vectors.T]
        return torch.stack(columns, 1)

    exact = float(torch.autograd.functional.hessian(loss, point).trace())
    found = hutchinson_trace(matvec, 12, num_probes=300, dtype=torch.float64)
    assert abs(float(found.mean) - exact) < 3 * float(found.standard_error)
    assert float(hutch_plus_plus_trace(matvec, 12, num_matvecs=36, dtype=torch.float64).mean) == pytest.approx(exact)


def test_squared_norms_of_jacobians_are_each_example_s_own() -> None:
    layer = nn.Linear(8, 6, dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64) * torch.tensor([[0.1], [1], [5]])
    products = JacobianProducts(lambda x: torch.tanh(layer(x)), x)
    slopes = 1 - torch.tanh(layer(x)).detach().square()
    jacobians = slopes.unsqueeze(-1) * layer.weight.detach()
    exact = jacobians.square().sum((1, 2))
    squares = jacobians.mT @ jacobians
    deviations = (2 * (squares.square().sum((1, 2)) - squares.diagonal(dim1=1, dim2=2).square().sum(1))).sqrt()
    assert exact.max() > 2 * exact.min()
    found = [squared_jacobian_norms(products, num_probes=16, seed=seed) for seed in range(200)]
    means = torch.stack([each.mean for each in found])
    torch.testing.assert_close((means - exact).square().mean(0).sqrt(), deviations / 4, rtol=0.15, atol=0)
    assert ((means.mean(0) - exact).abs() < 4 * deviations / 4 / math.sqrt(200)).all()
    errors = torch.stack([each.standard_error for each in found])
    torch.testing.assert_close(errors.square().mean(0).sqrt(), deviations / 4, rtol=0.15, atol=0)
    assert abs(float(torch.corrcoef((means - exact).T)[0, 1])) < 0.25  # independent between examples


def test_one_probe_is_exact_for_a_function_of_each_entry_alone() -> None:
    x = torch.randn(4, 9, dtype=torch.float64)
    found = squared_jacobian_norms(JacobianProducts(torch.sin, x), num_probes=1)
    torch.testing.assert_close(found.mean, x.cos().square().sum(1))
    assert found.standard_error.isnan().all()


@pytest.mark.parametrize("estimator", [hutchinson, hutch_plus_plus])
def test_the_seed_decides_and_the_global_generator_is_not_touched(estimator: Estimator) -> None:
    matrix = symmetric(torch.linspace(-1, 3, 30, dtype=torch.float64))
    before = torch.get_rng_state()
    first, again, other = (estimator(matrix, 12, seed).mean for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert first != other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_products_are_summed_in_double(dtype: torch.dtype) -> None:
    found = hutchinson_trace(lambda v: v, 100_000, num_probes=1, dtype=dtype)
    assert found.mean == 100_000
    assert found.mean.dtype == torch.float64


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ValueError, match="dim and num_probes must be at least 1, got 3 and 0"):
        hutchinson_trace(lambda v: v, 3, num_probes=0)
    with pytest.raises(ValueError, match="dim and num_probes must be at least 1, got 0 and 16"):
        hutchinson_trace(lambda v: v, 0)
    with pytest.raises(ValueError, match="num_matvecs must be at least 3, got 2"):
        hutch_plus_plus_trace(lambda v: v, 3, num_matvecs=2)
    with pytest.raises(ValueError, match=r"matvec must map \(d, K\) = \(3, 16\) to .* got shape \(2, 16\)"):
        hutchinson_trace(lambda v: v[:2], 3)
    with pytest.raises(ValueError, match=r"matvec must map .* got NaN or infinity"):
        hutch_plus_plus_trace(lambda v: v * torch.inf, 3)
    with pytest.raises(ValueError, match="dim and num_probes must be at least 1, got 1 and 0"):
        squared_jacobian_norms(JacobianProducts(nn.Identity(), torch.ones(1, 2)), num_probes=0)
