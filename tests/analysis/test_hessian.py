import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowra_analysis import HessianProducts, largest_eigenvalue, per_example_gradients

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, by what curvlinops imports
    from curvlinops import EFLinearOperator, HessianLinearOperator

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/flowra_estimators.json").read_text())
Batch = dict[str, Tensor]


class Network(nn.Module):
    """Embedding, attention with a padding mask, one module called twice, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.query, self.key, self.value, self.shared = (nn.Linear(4, 4) for _ in range(4))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, batch: Batch) -> Tensor:
        h, mask = self.embedding(batch["tokens"]), batch["mask"]
        q, k, v = self.query(h), self.key(h), self.value(h)
        h = h + F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None].bool())
        h = h + self.shared(torch.tanh(self.shared(self.dropout(h))))
        logits: Tensor = self.head((h * mask[..., None]).sum(1))
        return logits


def batch_of(num: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens": torch.randint(7, (num, 6), generator=generator),
        "mask": (torch.arange(6) < torch.randint(1, 7, (num, 1), generator=generator)).long(),
        "labels": torch.randint(3, (num,), generator=generator),
    }


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch), batch["labels"], reduction="none")


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def exact_hessian(model: nn.Module, batch: Batch) -> Tensor:
    named = parameters_of(model)
    sizes = [each.numel() for each in named.values()]

    def mean_loss(flat: Tensor) -> Tensor:
        pieces = [piece.view_as(p) for piece, p in zip(flat.split(sizes), named.values(), strict=True)]
        logits = torch.func.functional_call(model, dict(zip(named, pieces, strict=True)), (batch,))
        return F.cross_entropy(logits, batch["labels"])

    flat = torch.cat([each.detach().reshape(-1) for each in named.values()])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(mean_loss, flat)
    assert isinstance(hessian, Tensor)
    return hessian


def test_products_are_the_hessian_of_the_mean_loss() -> None:
    model = Network().eval()
    found = HessianProducts(model, batch_of(), loss, parameters_of(model))
    expected = exact_hessian(model, batch_of())
    columns = torch.stack([found.product(each) for each in torch.eye(len(expected), dtype=torch.float64)])
    torch.testing.assert_close(columns, expected, rtol=1e-10, atol=1e-12)
    assert float(expected.abs().max()) > 0.1
    assert found.num_examples == 5
    assert found.loss == pytest.approx(loss(model, batch_of()).mean().item(), rel=1e-12)
    mean = torch.autograd.grad(loss(model, batch_of()).mean(), list(model.parameters()))
    torch.testing.assert_close(found.gradient, torch.cat([each.reshape(-1) for each in mean]))


def test_products_over_some_parameters_are_the_block_of_theirs() -> None:
    model = Network().eval()
    named = parameters_of(model)
    chosen = {name: named[name] for name in ("head.bias", "shared.weight")}
    found = HessianProducts(model, batch_of(), loss, chosen)
    places, start = {}, 0
    for name, parameter in named.items():
        places[name] = torch.arange(start, start + parameter.numel())
        start += parameter.numel()
    rows = torch.cat([places[name] for name in chosen])
    v = torch.randn(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = exact_hessian(model, batch_of())[rows][:, rows] @ v
    torch.testing.assert_close(found.product(v), expected, rtol=1e-10, atol=1e-12)


class Plain(nn.Sequential):
    """Something curvlinops takes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.double()


def plain_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 4, dtype=torch.float64, generator=generator), torch.tensor([0, 1, 2, 2, 1, 0])


def plain_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


CURVLINOPS = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@CURVLINOPS
def test_products_agree_with_curvlinops() -> None:
    model = Plain()
    found = HessianProducts(model, plain_data(), plain_loss, parameters_of(model))
    judge = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [plain_data()])
    v = torch.randn(len(found.gradient), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(found.product(v), judge @ v, rtol=1e-9, atol=1e-12)


@CURVLINOPS
def test_example_gradients_give_the_empirical_fisher_of_curvlinops() -> None:
    model = Plain()
    rows = per_example_gradients(model, plain_data(), plain_loss, parameters_of(model))
    assert rows.shape == (6, 43)
    judge = EFLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [plain_data()])
    v = torch.randn(43, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(rows.T @ (rows @ v) / 6, judge @ v, rtol=1e-9, atol=1e-12)


def test_the_model_is_left_bitwise_as_it_was() -> None:
    model = Network()
    model.head.eval()
    model.shared.weight.grad = torch.ones_like(model.shared.weight)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    rng = torch.get_rng_state()
    products = HessianProducts(model, batch_of(), loss, parameters_of(model))
    products.product(products.gradient)
    per_example_gradients(model, batch_of(), loss, parameters_of(model))
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert model.training
    assert model.dropout.training
    assert not model.head.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert [name for name, each in model.named_parameters() if each.grad is not None] == ["shared.weight"]
    assert torch.equal(model.shared.weight.grad, torch.ones_like(model.shared.weight))


def test_a_loss_linear_in_the_parameters_has_no_curvature() -> None:
    model = nn.Linear(3, 2)
    found = HessianProducts(model, torch.ones(2, 3), lambda model, x: model(x).sum(1), parameters_of(model))
    assert torch.equal(found.product(torch.ones(8)), torch.zeros(8))


def symmetric(values: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


def start_of(size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def test_golden_spectral_norm() -> None:
    weight = torch.tensor(GOLDEN["power_iteration"]["W"], dtype=torch.float64)
    start = torch.ones(3, dtype=torch.float64)
    found = largest_eigenvalue(lambda v: weight.T @ (weight @ v), start, tolerance=0)
    assert math.sqrt(found.value) == pytest.approx(GOLDEN["power_iteration"]["exact"], rel=1e-8)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([5.0, 4.9, 1.0, 0.0, -2.0, 0.3, 0.2, 0.1], id="close"),
        pytest.param([3.0, 3.0, 3.0, 1.0, 1.0, 0.0, 0.0, 0.0], id="repeated"),
        pytest.param([2.0, -50.0, 1.0, 0.0, -20.0, 0.5, 0.4, 0.3], id="larger below zero"),
        pytest.param([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0], id="all below zero"),
        pytest.param([1e-12, 1e-13, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], id="tiny"),
        pytest.param([1e12, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], id="huge"),
    ],
)
def test_the_largest_eigenvalue_is_found(values: list[float]) -> None:
    matrix = symmetric(values)
    found = largest_eigenvalue(lambda v: matrix @ v, start_of(8), tolerance=1e-10)
    scale = max(abs(each) for each in values)
    assert found.converged
    assert found.value == pytest.approx(max(values), abs=1e-9 * scale)
    torch.testing.assert_close(matrix @ found.vector, found.value * found.vector, rtol=0, atol=1e-6 * scale)
    assert float(found.vector.norm()) == pytest.approx(1, rel=1e-9)


def test_in_a_metric_it_is_the_generalised_eigenvalue() -> None:
    matrix, metric = symmetric([5.0, 2.0, 1.0, -1.0, 0.5, 0.0]), torch.tensor([1e-4, 1.0, 3.0, 0.2, 50.0, 7.0]).double()
    found = largest_eigenvalue(lambda v: matrix @ v, start_of(6), metric=metric, tolerance=0)
    assert found.value == pytest.approx(float(torch.linalg.eigvals(matrix / metric[:, None]).real.max()), rel=1e-9)
    torch.testing.assert_close(matrix @ found.vector, found.value * metric * found.vector, rtol=1e-7, atol=1e-8)
    assert float(found.vector @ (metric * found.vector)) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("iterations", range(1, 9))
def test_an_eigenvalue_lies_within_the_residual(iterations: int) -> None:
    values = [7.0, 6.0, 5.0, 1.0, 0.5, 0.2, -1.0, -6.0]
    matrix = symmetric(values)
    found = largest_eigenvalue(lambda v: matrix @ v, start_of(8), max_iterations=iterations, tolerance=0)
    assert found.iterations == iterations
    assert min(abs(found.value - each) for each in values) <= found.residual + 1e-10
    image = matrix @ found.vector
    assert found.residual == pytest.approx(float((image - found.value * found.vector).norm()), abs=1e-8)
    assert found.value <= 7 + 1e-10


def test_more_products_never_give_less() -> None:
    matrix = symmetric([7.0, 6.5, 5.0, 1.0, 0.5, 0.2, -1.0, -6.0])
    found = [
        largest_eigenvalue(lambda v: matrix @ v, start_of(8), max_iterations=k, tolerance=0).value for k in range(1, 9)
    ]
    assert found == sorted(found)
    assert found[0] < found[-1] - 0.1


def test_no_convergence_is_told() -> None:
    matrix = symmetric([7.0, 6.5, 5.0, 1.0, 0.5, 0.2, -1.0, -6.0])
    found = largest_eigenvalue(lambda v: matrix @ v, start_of(8), max_iterations=2, tolerance=1e-6)
    assert (found.iterations, found.converged) == (2, False)


def test_a_start_in_a_small_invariant_space_ends_there() -> None:
    matrix = torch.diag(torch.tensor([9.0, 4.0, 1.0]).double())
    found = largest_eigenvalue(lambda v: matrix @ v, torch.tensor([0.0, 1.0, 1.0]).double(), tolerance=0)
    assert (found.iterations, found.converged) == (2, True)
    assert found.value == pytest.approx(4, rel=1e-12)


def test_the_hessians_largest_eigenvalue_is_found_from_products() -> None:
    model = Network().eval()
    products = HessianProducts(model, batch_of(), loss, parameters_of(model))
    found = largest_eigenvalue(products.product, products.gradient, max_iterations=60, tolerance=1e-8)
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(exact_hessian(model, batch_of()))[-1]), rel=1e-8)


class Once(torch.autograd.Function):
    """A kernel without a double backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_a_kernel_without_a_second_derivative_is_an_error_that_names_eager_attention() -> None:
    def loss_of_once(model: nn.Module, x: Tensor) -> Tensor:
        output: Tensor = Once.apply(model(x))
        return output.square().sum(1)

    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r'differentiable twice, got .*Error.*attn_implementation="eager"'):
        HessianProducts(model, torch.ones(2, 3), loss_of_once, parameters_of(model))
    assert per_example_gradients(model, torch.ones(2, 3), loss_of_once, parameters_of(model)).shape == (2, 8)


def test_parameters_that_cannot_be_meant_are_errors() -> None:
    model = Plain()
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"must have requires_grad, got \['2.weight', '2.bias'\]"):
        HessianProducts(model, plain_data(), plain_loss, parameters_of(model))
    with pytest.raises(ValueError, match="must have requires_grad, got no parameters"):
        per_example_gradients(model, plain_data(), plain_loss, {})
    spare = {"spare": nn.Parameter(torch.ones(2)), "0.bias": model[0].bias}
    with pytest.raises(ValueError, match=r"must take part in the loss, got none of it for \['spare'\]"):
        HessianProducts(model, plain_data(), plain_loss, spare)


def test_losses_that_cannot_be_meant_are_errors() -> None:
    model = Plain()
    with pytest.raises(ValueError, match=r"must give losses \(N,\) that depend on the parameters, got \(\)"):
        HessianProducts(model, plain_data(), lambda *both: plain_loss(*both).mean(), parameters_of(model))
    with pytest.raises(ValueError, match="loss and gradient must be finite, got a loss of inf"):
        HessianProducts(model, plain_data(), lambda *both: plain_loss(*both) * math.inf, parameters_of(model))
    found = HessianProducts(model, plain_data(), plain_loss, parameters_of(model))
    with pytest.raises(ValueError, match=r"v must have shape \(43,\).*got \(42,\)"):
        found.product(torch.ones(42))


def test_arguments_of_the_eigenvalue_out_of_range_are_errors() -> None:
    with pytest.raises(ValueError, match=r"max_iterations must be >= 1 and tolerance >= 0, got 0 and 0.1"):
        largest_eigenvalue(lambda v: v, torch.ones(2), max_iterations=0, tolerance=0.1)
    with pytest.raises(ValueError, match=r"metric must be positive and finite, got entries from 0.0 to 1.0"):
        largest_eigenvalue(lambda v: v, torch.ones(2), metric=torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="start must be a vector that is not zero"):
        largest_eigenvalue(lambda v: v, torch.zeros(2))
    with pytest.raises(ValueError, match="products must be finite, got a norm of nan at iteration 1"):
        largest_eigenvalue(lambda v: v * math.nan, torch.ones(2))
