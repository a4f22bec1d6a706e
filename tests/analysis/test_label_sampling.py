import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowra_analysis import (
    DiagonalFisher,
    drawn_class_losses,
    drawn_target_losses,
    drawn_token_losses,
    fisher_trace,
    kronecker_factors,
    label_sampling,
    measure,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # linear_operator uses torch.jit.script
    from curvlinops import GGNLinearOperator

NAMES = ["0", "2"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def inputs(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def squared_gradients(model: nn.Sequential, loss: Tensor) -> list[Tensor]:
    weights = [model.get_submodule(name).weight for name in NAMES]
    return [each.square() for each in torch.autograd.grad(loss, weights, retain_graph=True)]


class Exact:
    """The Fisher's diagonal over every label of every example, and the variance of one draw's trace."""

    def __init__(self) -> None:
        self.diagonals = [torch.zeros(5, 4).double(), torch.zeros(3, 5).double()]
        self.variances = torch.zeros(2).double()
        self.num = 0

    def add(self, outcomes: list[tuple[float, list[Tensor]]]) -> None:
        """Add an example: the probability of each outcome and the squares of its gradients."""
        self.num += 1
        for layer, diagonal in enumerate(self.diagonals):
            probabilities = torch.tensor([p for p, _ in outcomes]).double()
            squares = torch.stack([each[layer] for _, each in outcomes])
            diagonal += torch.einsum("k,kij->ij", probabilities, squares)
            norms = squares.sum((1, 2))
            self.variances[layer] += probabilities @ norms.square() - (probabilities @ norms).square()

    def check(self, model: nn.Module, batch: object, loss: Callable[[nn.Module, object], Tensor], draws: int) -> Tensor:
        """Compare with sampled Fishers of as many draws for each example; return the errors of traces over their σ."""
        exact = [each / self.num for each in self.diagonals]
        sigma = (self.variances / draws).sqrt() / self.num
        errors = []
        for _ in range(60):  # the generator of the loss goes on
            begun = {"fisher": DiagonalFisher.init()}
            found = measure(model, [batch], loss, NAMES, begun)["fisher"].finalise()
            errors.append([found[name].trace.mean - float(each.sum()) for name, each in zip(NAMES, exact, strict=True)])
            self.last = [found[name].values for name in NAMES]
        return torch.tensor(errors).double() / sigma


def assert_standard_normal(scores: Tensor) -> None:
    """Check mean and spread of 60 scores per layer: within their interval, and the interval is not too wide."""
    assert scores.mean(0).abs().max() < 4 / math.sqrt(60)
    assert scores.abs().max() < 5
    assert ((scores.square().mean(0).sqrt() > 0.7) & (scores.square().mean(0).sqrt() < 1.4)).all()


@pytest.mark.parametrize("draws", [4, 64])
def test_drawn_classes_give_the_fisher_with_an_error_of_one_over_the_root_of_draws(draws: int) -> None:
    model, x, generator = network(), inputs(5, 4), seeded(0)
    exact = Exact()
    for row in x:
        log_p = model(row).log_softmax(0)
        exact.add([(float(each.detach().exp()), squared_gradients(model, each)) for each in log_p])
    scores = exact.check(
        model, x.repeat(draws, 1), lambda model, x: drawn_class_losses(model(x), generator=generator), draws
    )
    assert_standard_normal(scores)


@pytest.mark.parametrize("draws", [4, 64])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_drawn_tokens_give_the_fisher_of_the_whole_text(reduction: str, draws: int) -> None:
    model, x, generator = network(), inputs(3, 3, 4), seeded(0)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0]])
    exact = Exact()
    for row, real in zip(x, mask.bool(), strict=True):
        log_p = model(row[real]).log_softmax(1)
        outcomes = []
        for labels in itertools.product(range(3), repeat=len(log_p)):
            joint = sum(log_p[position, label] for position, label in enumerate(labels))
            loss = joint / len(log_p) if reduction == "mean" else joint
            outcomes.append((float(joint.detach().exp()), squared_gradients(model, loss)))
        exact.add(outcomes)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return drawn_token_losses(model(x), mask.repeat(draws, 1), reduction=reduction, generator=generator)

    assert_standard_normal(exact.check(model, x.repeat(draws, 1, 1), loss, draws))


@pytest.mark.parametrize("draws", [4, 64])
def test_drawn_targets_give_the_fisher_of_regression(draws: int) -> None:
    model, x, generator = network(), inputs(5, 4), seeded(0)
    exact = Exact()
    for row in x:
        exact.num += 1
        jacobians = [
            torch.autograd.grad(each, [model[0].weight, model[2].weight], retain_graph=True) for each in model(row)
        ]
        for layer, diagonal in enumerate(exact.diagonals):
            jacobian = torch.stack([each[layer] for each in jacobians])
            diagonal += jacobian.square().sum(0)
            exact.variances[layer] += 2 * (jacobian.flatten(1) @ jacobian.flatten(1).T).square().sum()
    scores = exact.check(
        model, x.repeat(draws, 1), lambda model, x: drawn_target_losses(model(x), generator=generator), draws
    )
    assert_standard_normal(scores)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # linear_operator uses it
@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_every_entry_approaches_the_gauss_newton_matrix_of_curvlinops(kind: str) -> None:
    model, x, generator = network(), inputs(5, 4), seeded(0)
    weights = [model[0].weight, model[2].weight]
    if kind == "classes":
        criterion, targets, scale = nn.CrossEntropyLoss(reduction="sum"), torch.zeros(5, dtype=torch.long), 1.0
        draw = drawn_class_losses
    else:
        criterion, targets, scale = nn.MSELoss(reduction="sum"), torch.zeros(5, 3).double(), 0.5
        draw = drawn_target_losses
    for parameter in (model[0].bias, model[2].bias):
        parameter.requires_grad_(False)
    operator = GGNLinearOperator(model, criterion, weights, [(x, targets)], check_deterministic=False)
    diagonal = scale / 5 * (operator @ torch.eye(35).double()).diagonal()
    begun = {"fisher": DiagonalFisher.init()}
    batches = [x.repeat(4000, 1)] * 2
    found = measure(model, batches, lambda model, x: draw(model(x), generator=generator), NAMES, begun)
    entries = torch.cat([found["fisher"].finalise()[name].values.flatten() for name in NAMES])
    torch.testing.assert_close(entries, diagonal, rtol=0.05, atol=1e-4)
    assert float(entries.sum()) == pytest.approx(float(diagonal.sum()), rel=0.02)


def test_output_factor_of_kfac_becomes_that_of_the_fisher() -> None:
    model, x, generator = network(), inputs(5, 4), seeded(0)
    p = model(x).softmax(1).detach()
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return drawn_class_losses(model(x), generator=generator)

    found = kronecker_factors(model, [x.repeat(8000, 1)], loss, ["2"])["2"].gradients.dense
    assert found is not None
    torch.testing.assert_close(found, exact, rtol=0, atol=5 / math.sqrt(40_000))


def test_the_empirical_fisher_is_not_the_fisher() -> None:
    """Kunstner et al. (2019): it vanishes where the data are fitted and grows where they surprise."""
    model, x = network(), inputs(200, 4)
    fitted, labels = model(x).detach(), model(x).argmin(1)

    def empirical(targets: Tensor) -> float:
        def loss(model: nn.Module, x: Tensor) -> Tensor:
            return (model(x) - targets).square().sum(1) / 2

        return fisher_trace(model, [x], loss, NAMES)["2"].mean

    drawn = fisher_trace(model, [x], lambda model, x: drawn_target_losses(model(x), generator=seeded(0)), NAMES)["2"]
    assert empirical(fitted) == 0
    assert empirical(fitted + 10) == pytest.approx(100 * drawn.mean, rel=0.2)
    surprised = fisher_trace(model, [x], lambda model, x: F.cross_entropy(model(x), labels, reduction="none"), NAMES)
    fisher = fisher_trace(model, [x], lambda model, x: drawn_class_losses(model(x), generator=seeded(0)), NAMES)
    error = math.hypot(surprised["2"].standard_error, fisher["2"].standard_error)
    assert surprised["2"].mean - fisher["2"].mean > 5 * error


def test_labels_follow_the_softmax_and_impossible_ones_never_come() -> None:
    logits = torch.tensor([0.3, -torch.inf, 2.0, -1.0, -torch.inf]).double()
    losses = drawn_class_losses(logits.expand(100_000, 5), generator=seeded(0))
    for p in logits.softmax(0)[[0, 2, 3]]:
        share = float((losses + p.log()).abs().lt(1e-9).double().mean())
        assert share == pytest.approx(float(p), abs=4 * math.sqrt(float(p * (1 - p)) / 100_000))
    assert losses.isfinite().all()


def test_a_generator_repeats_and_goes_on_and_the_global_one_is_left_alone() -> None:
    logits, generator = inputs(50, 7), seeded(0)
    state = torch.get_rng_state()
    first, second = (drawn_class_losses(logits, generator=generator) for _ in range(2))
    assert torch.equal(first, drawn_class_losses(logits, generator=seeded(0)))
    assert not torch.equal(first, second)
    assert torch.equal(
        drawn_target_losses(logits, generator=seeded(0)), drawn_target_losses(logits, generator=seeded(0))
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_are_drawn_without_the_graph() -> None:
    logits = inputs(6, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(drawn_class_losses(logits, generator=seeded(0)).sum(), logits)
    one_hot = logits.softmax(1).detach() - gradient
    torch.testing.assert_close(one_hot.sort(1).values, torch.tensor([0.0, 0, 0, 1]).double().expand(6, 4))
    predictions = inputs(6, 4).requires_grad_()
    losses = drawn_target_losses(predictions, generator=seeded(0))
    (gradient,) = torch.autograd.grad(losses.sum(), predictions)
    torch.testing.assert_close(gradient.square().sum(1) / 2, losses)


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = inputs(20, 7)
    whole = drawn_class_losses(logits, generator=seeded(0))
    monkeypatch.setattr(label_sampling, "CHUNK_NUMBERS", 15)
    assert torch.equal(drawn_class_losses(logits, generator=seeded(0)), whole)


def test_what_stands_at_padding_does_not_matter() -> None:
    logits, mask = inputs(3, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])
    clean = drawn_token_losses(logits, mask, reduction="mean", generator=seeded(0))
    spoilt = logits.masked_fill(mask[..., None] == 0, torch.nan)
    assert torch.equal(drawn_token_losses(spoilt, mask, reduction="mean", generator=seeded(0)), clean)
    sums = drawn_token_losses(logits, mask, reduction="sum", generator=seeded(0))
    torch.testing.assert_close(sums / torch.tensor([2, 4, 2]), clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = inputs(50, 7).to(dtype)
    assert torch.equal(
        drawn_class_losses(logits, generator=seeded(0)), drawn_class_losses(logits.float(), generator=seeded(0))
    )
    assert drawn_target_losses(logits, generator=seeded(0)).dtype == torch.float32


def test_what_is_no_distribution_is_refused() -> None:
    logits = inputs(3, 4)
    logits[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"log Σ exp = nan for distribution 1\. Check the inputs"):
        drawn_class_losses(logits, generator=seeded(0))
    with pytest.raises(ValueError, match="log Σ exp = -inf for distribution 0"):
        drawn_class_losses(torch.full((2, 3), -torch.inf), generator=seeded(0))
    with pytest.raises(ValueError, match=r"\(N, K\), got torch.float64 \(4,\)"):
        drawn_class_losses(inputs(4), generator=seeded(0))
    with pytest.raises(ValueError, match=r"\(N, T, K\) and \(N, T\), got torch.float64 \(2, 3, 4\) and \(2, 4\)"):
        drawn_token_losses(inputs(2, 3, 4), torch.ones(2, 4), reduction="sum", generator=seeded(0))
    with pytest.raises(ValueError, match="real position in each example, got none in example 1"):
        drawn_token_losses(inputs(2, 3, 4), torch.tensor([[1, 0, 1], [0, 0, 0]]), reduction="sum", generator=seeded(0))
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'none'"):
        drawn_token_losses(inputs(2, 3, 4), torch.ones(2, 3), reduction="none", generator=seeded(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"floating point \(N, …\), got torch.int64 \(3,\)"):
        drawn_target_losses(torch.ones(3, dtype=torch.long), generator=seeded(0))
