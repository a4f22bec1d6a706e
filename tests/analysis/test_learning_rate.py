import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowra_analysis import HessianProducts, propose_learning_rate

Batch = tuple[Tensor, Tensor]
at_birth = partial(propose_learning_rate, warm_up_steps=0)


class Quadratic(nn.Module):
    """Loss ½ Σ h_i (w_i - x_i)² of an example x."""

    def __init__(self, curvature: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(curvature), dtype=torch.float64))
        self.register_buffer("curvature", torch.tensor(curvature, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.curvature, Tensor)
        return (self.curvature * (self.weight - x).square()).sum(1) / 2


def own_loss(model: nn.Module, batch: Tensor) -> Tensor:
    losses: Tensor = model(batch)
    return losses


def drawn(num: int, size: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [1 + torch.randn(4, size, dtype=torch.float64, generator=generator) for _ in range(num)]


def weight_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def test_of_a_quadratic_the_threshold_is_exact() -> None:
    curvature = [9.0, 1.0, 0.2]
    batches = drawn(5, 3)
    gradients = torch.stack([-torch.tensor(curvature).double() * each.mean(0) for each in batches])
    ratio = torch.tensor(curvature).double() / gradients.square().mean(0).sqrt()  # of H over P, both diagonal
    model = Quadratic(curvature)
    found = at_birth(model, batches, own_loss, weight_of(model), tolerance=0)
    assert found.eigenvalue == pytest.approx(float(ratio.max()), rel=1e-9)
    assert found.threshold == pytest.approx(38 / float(ratio.max()), rel=1e-9)
    assert found.rate == pytest.approx(0.2 * found.threshold, rel=1e-12)
    assert found.converged
    assert found.eigenvalue_standard_error == pytest.approx(0, abs=1e-9)  # every batch has the same Hessian


@pytest.mark.parametrize(("factor", "stable"), [(0.97, True), (1.03, False)])
def test_adam_with_these_second_moments_is_stable_just_below_the_threshold(factor: float, stable: bool) -> None:
    curvature, batches = [9.0, 1.0, 0.2], drawn(5, 3)
    model = Quadratic(curvature)
    threshold = at_birth(model, batches, own_loss, weight_of(model), tolerance=0).threshold
    h = torch.tensor(curvature).double()
    root = torch.stack([h * each.mean(0) for each in batches]).square().mean(0).sqrt()
    at, moment = torch.ones(3).double(), torch.zeros(3).double()
    for _ in range(4000):
        moment = 0.9 * moment + 0.1 * h * at
        at = at - factor * threshold * moment / root
    assert (float(at.norm()) < 1) is stable


def test_momentum_moves_the_threshold_as_the_paper_says() -> None:
    model, batches = Quadratic([3.0, 1.0]), drawn(2, 2)
    without = at_birth(model, batches, own_loss, weight_of(model), momentum=0.0, tolerance=0)
    assert without.threshold == pytest.approx(2 / without.eigenvalue, rel=1e-12)


class Net(nn.Module):
    """Low-rank update W + B A with B = 0, dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64), requires_grad=False)
        self.a = nn.Parameter(torch.randn(2, 5, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(6, 2, dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Parameter(torch.randn(3, 6, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dropout(x @ (self.base + self.b @ self.a).T)) @ self.head.T


def net_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def net_batches(num: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 5, generator=generator).double(), torch.randint(3, (8,), generator=generator))
        for _ in range(num)
    ]


def trained_in(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def dense(model: nn.Module, batches: list[Batch], names: list[str], used: int) -> tuple[Tensor, Tensor]:
    """Exact H, of the first batches, and P, of all, from products with every unit vector."""
    chosen = {name: each for name, each in model.named_parameters() if name in names}
    each = [HessianProducts(model, batch, net_loss, chosen) for batch in batches]
    units = torch.eye(len(each[0].gradient), dtype=torch.float64)
    hessian = torch.stack([torch.stack([one.product(v) for v in units]) for one in each[:used]]).mean(0)
    return hessian, torch.stack([one.gradient for one in each]).square().mean(0).sqrt()


def test_parameters_that_adam_does_not_move_do_not_count() -> None:
    model = Net().eval()
    hessian, root = dense(model, net_batches(), ["b", "head"], used=4)  # A has no gradient while B = 0
    expected = torch.linalg.eigvalsh(hessian / root.sqrt()[:, None] / root.sqrt())[-1]
    found = at_birth(model, net_batches(), net_loss, trained_in(model), max_iterations=40, tolerance=1e-8)
    assert found.eigenvalue == pytest.approx(float(expected), rel=1e-7)


def test_a_factor_of_the_rate_counts_as_a_smaller_p() -> None:
    model = Net().eval()
    hessian, root = dense(model, net_batches(), ["b", "head"], used=4)
    root[12:] /= 30  # the head's rate is 30 times the proposed one
    expected = torch.linalg.eigvalsh(hessian / root.sqrt()[:, None] / root.sqrt())[-1]
    found = at_birth(
        model, net_batches(), net_loss, trained_in(model), factors={"head": 30.0}, max_iterations=40, tolerance=1e-8
    )
    assert found.eigenvalue == pytest.approx(float(expected), rel=1e-7)


def test_the_hessian_is_that_of_the_first_batches_and_the_moments_those_of_all() -> None:
    model = Net().eval()
    hessian, root = dense(model, net_batches(6), ["b", "head"], used=3)
    expected = torch.linalg.eigvalsh(hessian / root.sqrt()[:, None] / root.sqrt())[-1]
    found = at_birth(
        model,
        net_batches(6),
        net_loss,
        trained_in(model),
        curvature_examples=20,
        max_iterations=40,
        tolerance=1e-8,
    )
    assert found.eigenvalue == pytest.approx(float(expected), rel=1e-7)


def test_the_standard_error_is_that_of_the_batches_along_the_eigenvector() -> None:
    model = Net().eval()
    hessian, root = dense(model, net_batches(), ["b", "head"], used=4)
    scaled = hessian / root.sqrt()[:, None] / root.sqrt()
    vector = torch.linalg.eigh(scaled)[1][:, -1] / root.sqrt()
    chosen = {name: each for name, each in trained_in(model).items() if name != "a"}
    each = [HessianProducts(model, batch, net_loss, chosen) for batch in net_batches()]
    values = torch.stack([vector @ one.product(vector) for one in each])
    found = at_birth(model, net_batches(), net_loss, trained_in(model), max_iterations=40, tolerance=1e-9)
    assert found.eigenvalue == pytest.approx(float(values.mean()), rel=1e-6)
    assert found.eigenvalue_standard_error == pytest.approx(float(values.std()) / 2, rel=1e-4)
    relative = found.eigenvalue_standard_error / found.eigenvalue
    assert found.standard_error == pytest.approx(found.rate * relative, rel=1e-9)


def test_the_unit_of_the_loss_does_not_matter() -> None:
    model = Net()
    plain = at_birth(model, net_batches(), net_loss, trained_in(model))
    scaled = at_birth(model, net_batches(), lambda *both: 1e3 * net_loss(*both), trained_in(model))
    assert scaled.rate == pytest.approx(plain.rate, rel=1e-9)


def test_a_parameter_in_larger_units_wants_a_larger_rate() -> None:
    class Rescaled(Quadratic):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.curvature, Tensor)
            return (self.curvature * (self.weight / 8 - x).square()).sum(1) / 2

    found = [
        at_birth(model, drawn(3, 2), own_loss, weight_of(model)).rate
        for model in (Quadratic([3.0, 1.0]), Rescaled([3.0, 1.0]))
    ]
    assert found[1] == pytest.approx(8 * found[0], rel=1e-9)


def test_the_curvature_is_that_after_steps_of_adam() -> None:
    batches = net_batches(7)
    model, moved = Net().eval(), Net().eval()
    optimizer = torch.optim.AdamW(
        [{"params": [moved.a, moved.b], "lr": 1e-2}, {"params": [moved.head], "lr": 3e-2}], weight_decay=0
    )
    for batch in batches[:3]:
        optimizer.zero_grad()
        net_loss(moved, batch).mean().backward()
        optimizer.step()
    options = {"factors": {"head": 3.0}, "max_iterations": 50, "tolerance": 1e-8}
    expected = at_birth(moved, batches[3:], net_loss, trained_in(moved), **options)
    found = propose_learning_rate(
        model, batches, net_loss, trained_in(model), warm_up_steps=3, warm_up_rate=1e-2, **options
    )
    assert found.eigenvalue == pytest.approx(expected.eigenvalue, rel=1e-6)
    birth = at_birth(model, batches[3:], net_loss, trained_in(model), **options)
    assert abs(birth.eigenvalue / found.eigenvalue - 1) > 0.01


def failing(model: nn.Module, batch: Batch) -> Tensor:
    losses = net_loss(model, batch)
    return losses * math.nan if model.get_parameter("b").any() else losses


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_bitwise_as_it_was(fails: bool) -> None:
    model = Net()
    model.head.grad = torch.ones_like(model.head)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    rng = torch.get_rng_state()
    if fails:
        with pytest.raises(ValueError, match="loss and gradient must be finite"):
            propose_learning_rate(model, net_batches(12), failing, trained_in(model))
    else:
        propose_learning_rate(model, net_batches(12), net_loss, trained_in(model), curvature_examples=8)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert model.training
    assert model.dropout.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.b.grad is None
    assert torch.equal(model.head.grad, torch.ones_like(model.head))


def test_the_same_call_gives_the_same_rate() -> None:
    first, second = (at_birth(m, net_batches(), net_loss, trained_in(m)) for m in (Net(), Net()))
    assert first == second


def test_too_few_batches_are_an_error() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"batches must be 10 for the warm-up and at least 2 more, got 11\. Give"):
        propose_learning_rate(model, net_batches(11), net_loss, trained_in(model))


def test_a_loss_that_curves_nowhere_upwards_is_an_error() -> None:
    model = Quadratic([-1.0, -2.0])
    with pytest.raises(ValueError, match=r"loss must curve upwards somewhere, got a largest eigenvalue of -"):
        at_birth(model, drawn(2, 2), own_loss, weight_of(model))


def test_a_loss_at_its_minimum_is_an_error() -> None:
    model = Quadratic([1.0, 2.0])
    with pytest.raises(ValueError, match="parameters must have gradients, got zero for all of them"):
        at_birth(model, [torch.zeros(1, 2).double()] * 2, own_loss, weight_of(model))


def test_arguments_out_of_range_are_errors() -> None:
    model = Quadratic([1.0, 2.0])
    with pytest.raises(ValueError, match=r"momentum must be in .* got 1\.0, 32, 0 and 0\.001"):
        at_birth(model, drawn(2, 2), own_loss, weight_of(model), momentum=1.0)
    with pytest.raises(ValueError, match=r"factors must be > 0 and name parameters, got \['other'\]"):
        at_birth(model, drawn(2, 2), own_loss, weight_of(model), factors={"other": 2.0})
    with pytest.raises(ValueError, match=r"factors must be > 0 and name parameters, got \{'weight': inf\}"):
        at_birth(model, drawn(2, 2), own_loss, weight_of(model), factors={"weight": math.inf})
