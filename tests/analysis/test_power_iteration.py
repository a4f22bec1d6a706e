import json
import math
import warnings
from itertools import pairwise
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from flowra_analysis import JacobianProducts, power_iteration, weight_matrix

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # linear_operator uses torch.jit.script
    from curvlinops import JacobianLinearOperator

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/flowra_estimators.json").read_text())["power_iteration"]


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


def matrix(sigma: Tensor, *, rows: int = 9, columns: int = 7) -> Tensor:
    u, v = (torch.linalg.qr(torch.randn(d, len(sigma), dtype=torch.float64)).Q for d in (rows, columns))
    return u * sigma @ v.T


def by_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


class SelfAttention(nn.Module):
    """Two heads, a residual and a non-linear map; sdpa or the formula."""

    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        self.is_fused = is_fused
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, 3)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        attend = F.scaled_dot_product_attention if self.is_fused else by_formula
        mixed = attend(q, k, v)
        return x + torch.tanh(self.out(mixed.transpose(1, 2).flatten(2)))


class Once(torch.autograd.Function):
    """x², whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, u: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * u


class Hiding(Once):
    """x², whose gradient looks like a constant to the second derivative."""

    @staticmethod
    def backward(ctx: FunctionCtx, u: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * u.detach()


def exact(function: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian of each example, (N, out, in)."""
    each = [torch.autograd.functional.jacobian(lambda one: function(one[None])[0], row) for row in x]
    return torch.stack([jacobian.reshape(-1, x[0].numel()) for jacobian in each])


def test_golden_estimates() -> None:
    layer = linear(torch.tensor(GOLDEN["W"], dtype=torch.float64))
    products = JacobianProducts(layer, torch.zeros(1, 3, dtype=torch.float64))
    start = torch.ones(1, 3) * 5  # of any length
    found = power_iteration(products, max_iterations=10, tolerance=0, start=start)
    assert found.estimates.squeeze(1).tolist() == pytest.approx(GOLDEN["estimates_of_spectral_norm"], rel=1e-9)
    assert found.num_iterations == 10
    assert float(found.spectral_norm) == pytest.approx(GOLDEN["exact"], rel=1e-9)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4), (4, 1), (1, 1)], ids=str)
def test_a_linear_layer_has_the_norm_of_its_weight_at_any_input(shape: tuple[int, int]) -> None:
    layer = linear(torch.randn(shape, dtype=torch.float64))
    expected = torch.linalg.matrix_norm(layer.weight.detach(), 2)
    products = JacobianProducts(layer, torch.randn(3, shape[1], dtype=torch.float64))
    found = power_iteration(products, max_iterations=2000, tolerance=0).spectral_norm
    torch.testing.assert_close(found, expected.expand(3), rtol=1e-8, atol=0)


def test_a_quantised_layer_has_the_norm_of_the_weight_it_computes_with() -> None:
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    found = power_iteration(JacobianProducts(layer, torch.randn(2, 64)), max_iterations=1000, tolerance=1e-7)
    expected = torch.linalg.matrix_norm(weight_matrix(layer), 2).double()
    torch.testing.assert_close(found.spectral_norm, expected.expand(2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_estimates_never_fall_stay_below_the_norm_and_converge_at_the_known_rate(seed: int) -> None:
    sigma = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.1], dtype=torch.float64)
    weight = matrix(sigma)
    start = torch.randn(1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    products = JacobianProducts(linear(weight), torch.zeros(1, 7, dtype=torch.float64))
    estimates = power_iteration(products, max_iterations=12, tolerance=0, start=start).estimates.squeeze(1)
    assert all(low <= high <= 2 * (1 + 1e-12) for low, high in pairwise(estimates.tolist()))
    leading = torch.linalg.svd(weight).Vh[0]
    squared_tangent = float(start.square().sum() / (start[0] @ leading).square()) - 1
    for k, estimate in enumerate(estimates.tolist()):  # Golub & Van Loan (2013), theorem 8.2.1, with eigenvalues σ²
        assert 4 - estimate**2 <= 4 * squared_tangent * (1.5 / 2) ** (4 * k) * (1 + 1e-9)


@pytest.mark.parametrize("is_fused", [True, False], ids=["sdpa", "formula"])
def test_each_example_has_the_norm_of_its_own_jacobian(*, is_fused: bool) -> None:
    block, x = SelfAttention(is_fused=is_fused).double(), torch.randn(4, 5, 6, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(exact(block, x), 2)
    assert expected.std() > 0.01
    found = power_iteration(JacobianProducts(block, x), max_iterations=3000, tolerance=0).spectral_norm
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_products_are_those_with_the_exact_jacobian() -> None:
    block, x = SelfAttention(is_fused=True).double(), torch.randn(3, 5, 6, dtype=torch.float64)
    products, jacobians = JacobianProducts(block, x), exact(block, x)
    v, u = torch.randn_like(x), torch.randn_like(x)
    torch.testing.assert_close(products.jvp(v).flatten(1), torch.einsum("nij,nj->ni", jacobians, v.flatten(1)))
    torch.testing.assert_close(products.vjp(u).flatten(1), torch.einsum("nij,ni->nj", jacobians, u.flatten(1)))
    assert products.num_inputs.tolist() == products.num_outputs.tolist() == [30, 30, 30]
    torch.testing.assert_close(products.output, block(x).detach())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # curvlinops, when it begins
def test_products_are_those_of_curvlinops() -> None:
    class OfItsInput(nn.Module):
        """A model whose parameter is the input of the block."""

        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.randn(1, 5, 6, dtype=torch.float64))
            self.block = SelfAttention(is_fused=False).double().requires_grad_(requires_grad=False)

        def forward(self, scale: Tensor) -> Tensor:
            return self.block(self.x) * scale

    model = OfItsInput()
    data = [(torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(1, 5, 6, dtype=torch.float64))]
    theirs = JacobianLinearOperator(model, [model.x], data)
    ours = JacobianProducts(model.block, model.x.detach())
    v = torch.randn(30, dtype=torch.float64)
    torch.testing.assert_close(ours.jvp(v.view(1, 5, 6)).flatten(), theirs @ v)
    torch.testing.assert_close(ours.vjp(v.view(1, 5, 6)).flatten(), theirs.adjoint() @ v)


def test_positions_that_are_not_real_are_left_out_of_input_and_output() -> None:
    block, x = SelfAttention(is_fused=True).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])
    products = JacobianProducts(block, x, real=real)
    assert products.num_inputs.tolist() == products.num_outputs.tolist() == [30, 18]
    kept = exact(block, x)[1][6:18, 6:18]  # two of the three real positions
    v = torch.zeros_like(x)
    v[1, 1:3] = torch.randn(2, 6, dtype=torch.float64)
    image = products.jvp(v + (1 - real).unsqueeze(-1) * 100)
    torch.testing.assert_close(image[1, 1:3].flatten(), kept @ v[1, 1:3].flatten())
    assert not image[1, [0, 3]].any()
    assert not products.vjp(torch.ones_like(x))[1, [0, 3]].any()
    found = power_iteration(products, max_iterations=3000, tolerance=0).spectral_norm[1]
    rows = real[1].bool().repeat_interleave(6)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(exact(block, x)[1][rows][:, rows], 2), rtol=1e-8, atol=0)


def test_the_iteration_ends_when_no_example_changes_by_more_than_the_tolerance() -> None:
    layer = linear(matrix(torch.tensor([2.0, 1.9, 0.5], dtype=torch.float64)))
    products = JacobianProducts(layer, torch.zeros(6, 7, dtype=torch.float64))
    found = power_iteration(products, max_iterations=100, tolerance=1e-3)
    assert 1 < found.num_iterations < 100
    changes = (found.estimates[1:] - found.estimates[:-1]) / found.estimates[1:]
    assert (changes.amax(1)[:-1] > 1e-3).all()
    torch.testing.assert_close(found.relative_change, changes[-1])
    assert found.relative_change.max() <= 1e-3
    few = power_iteration(products, max_iterations=1, tolerance=1e-3)
    assert few.num_iterations == 1
    assert few.relative_change.max() > 1e-3


def test_the_seed_decides_and_the_global_generator_is_not_touched() -> None:
    products = JacobianProducts(SelfAttention(is_fused=True), torch.randn(2, 5, 6))
    before = torch.get_rng_state()
    first, again, other = (power_iteration(products, seed=seed).estimates[0] for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e18], ids="{:g}".format)
def test_estimates_scale_with_the_function_in_float32(scale: float) -> None:
    layer = linear(torch.randn(5, 4))
    base, scaled = (
        power_iteration(
            JacobianProducts(lambda x, s=s: layer(x) * s, torch.zeros(1, 4)), max_iterations=6, tolerance=0
        ).estimates
        for s in (1, scale)
    )
    torch.testing.assert_close(scaled / scale, base, rtol=1e-4, atol=0)


def test_a_zero_jacobian_has_norm_zero() -> None:
    found = power_iteration(JacobianProducts(lambda x: x * torch.tensor([[0.0], [2.0]]), torch.ones(2, 3)))
    assert found.spectral_norm.tolist() == pytest.approx([0, 2], rel=1e-6)
    assert found.relative_change[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_double(dtype: torch.dtype) -> None:
    block, x = SelfAttention(is_fused=True).to(dtype), torch.randn(3, 5, 6).to(dtype)
    half = power_iteration(JacobianProducts(block, x))
    double = power_iteration(JacobianProducts(block.double(), x.double()))
    assert half.estimates.dtype == torch.float64
    torch.testing.assert_close(half.spectral_norm, double.spectral_norm, rtol=0.02, atol=0)


def test_a_function_that_changes_its_input_in_place_is_measured_and_nothing_is_left_behind() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    before = x.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), layer)
    products = JacobianProducts(model, x)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert layer.weight.grad is None
    torch.testing.assert_close(products.jvp(torch.ones(3, 4)), (x > 0).float() @ layer.weight.detach().T)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_grad_mode_around_it_does_not_matter(*, frozen: bool) -> None:
    layer = nn.Linear(3, 3).requires_grad_(requires_grad=not frozen)
    with torch.no_grad():
        found = power_iteration(JacobianProducts(layer, torch.ones(1, 3)), max_iterations=300, tolerance=0)
        expected = float(torch.linalg.matrix_norm(layer.weight, 2))
    assert float(found.spectral_norm) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (Once.apply, r"function must be differentiable twice by its input, got: .*attn_implementation"),
        (
            lambda x: x + Hiding.apply(x),
            r"function must be differentiable twice by its input, got ⟨Jᵀu, v⟩ = .*attn_implementation",
        ),
        (lambda x: x.detach() * 2, "function must be differentiable twice by its input, got: "),
        (lambda x: x.sum(), r"function must give one row per example, got \(\) for 2"),
        (lambda x: x[:1], r"function must give one row per example, got \(1, 3\) for 2"),
        (lambda x: x * torch.nan, "products with the Jacobian must be finite, got NaN or infinity"),
    ],
    ids=["once differentiable", "hidden part", "detached", "scalar", "other N", "NaN"],
)
def test_functions_without_such_a_jacobian_are_refused(function: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JacobianProducts(function, torch.ones(2, 3))


@pytest.mark.parametrize("x", [torch.ones(3), torch.ones(2, 3, dtype=torch.long)], ids=["no batch axis", "integers"])
def test_inputs_that_are_no_batch_of_vectors_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(N, …\) and be floating point, got"):
        JacobianProducts(nn.Identity(), x)


def test_arguments_out_of_range_are_refused() -> None:
    products = JacobianProducts(nn.Identity(), torch.ones(1, 2))
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        power_iteration(products, max_iterations=0)
    with pytest.raises(ValueError, match="tolerance must be at least 0, got nan"):
        power_iteration(products, tolerance=math.nan)
    with pytest.raises(ValueError, match="products with the Jacobian must be finite, got norms"):
        power_iteration(products, start=torch.full((1, 2), torch.nan))
