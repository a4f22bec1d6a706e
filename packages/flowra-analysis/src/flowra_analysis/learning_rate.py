"""A peak learning rate for AdamW from the curvature after its first steps.

Adam divides by P = √v, the root of its second moments. Where the loss is quadratic with Hessian H and P stays as it is,
full-batch Adam is stable as long as

    λ_max(P^-1/2 H P^-1/2) < (2 + 2 β₁) / ((1 - β₁) η)                38 / η for β₁ = 0.9

(Cohen et al. 2022, arXiv:2207.14484). So the threshold is η* = 38 / λ: the rate at which training turns
unstable at these parameters. P is what Adam's second moments would be there: the root mean square of gradients of
batches of the training's own size.

At birth this tells little of what is to come: B = 0 hides half of a LoRA, and a new head has random weights. So a few
steps of Adam are made first, at a small rate, and undone afterwards. The proposed peak is a fixed share of the
threshold there, for batches are noisy and P shrinks as training goes on. That share is the one constant, :data:`SHARE`;
docs/results/learning_rate.md says on which tasks it was set, and where it does not hold: it is a guess to start a
search from, and for a new head on noisy gradients it can be several times too high.

Parameters whose gradient is zero are not moved by Adam and do not count.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowra_analysis.hessian import Eigenvalue, HessianProducts, largest_eigenvalue, mean_gradient
from flowra_analysis.per_example_signals import Batch

__all__ = ["LearningRate", "propose_learning_rate"]

SHARE = 0.2
"""Proposed rate over the threshold of stability."""
PRODUCT = 4
"""Price of a product with a Hessian, in forward and backward passes."""


class LearningRate(NamedTuple):
    """What was proposed, and what it rests on."""

    rate: float
    """Peak learning rate."""
    standard_error: float
    """Of the rate, from that of the eigenvalue."""
    threshold: float
    """η*, the rate at which full-batch Adam turns unstable at these parameters."""
    eigenvalue: float
    """λ, the largest eigenvalue of P^-1/2 H P^-1/2."""
    eigenvalue_standard_error: float
    """Over the batches of the Hessian, each one's curvature along the same eigenvector. Few batches: a rough figure."""
    residual: float
    """Some eigenvalue lies within this distance of λ."""
    converged: bool
    """Whether the residual is within the tolerance."""
    passes: int
    """Price: forward and backward passes over a batch, a product with a Hessian counted as :data:`PRODUCT`."""


def propose_learning_rate(
    model: nn.Module,
    batches: Sequence[Batch],
    per_example_loss: Callable[[nn.Module, Batch], Tensor],
    parameters: Mapping[str, nn.Parameter],
    *,
    factors: Mapping[str, float] | None = None,
    momentum: float = 0.9,
    warm_up_steps: int = 10,
    warm_up_rate: float = 1e-3,
    curvature_examples: int = 32,
    max_iterations: int = 8,
    tolerance: float = 0.25,
    generator: torch.Generator | None = None,
) -> LearningRate:
    """Propose the peak learning rate of AdamW for a training that begins at the parameters as they are.

    The model runs in eval mode and is left bitwise as it was; no ``.grad`` is written. Adam makes one step on each of
    the first batches. Every other batch is run once for P; the first of them also give the Hessian, and their graphs
    are kept meanwhile.

    Args:
        model: with its adapters, and a new head, as training will begin with them.
        batches: of the training's batch size, on which P depends; ``warm_up_steps`` of them and two or more. Eighteen
            do with the default.
        per_example_loss: ``(model, batch)`` to ``(N,)``; its mean over a batch is what is trained.
        parameters: name to parameter: all that will be trained, heads included.
        factors: name to factor of the learning rate, > 0, where a parameter's is not the proposed one itself.
        momentum: β₁ of AdamW, in [0, 1).
        warm_up_steps: steps made before the curvature is measured, ≥ 0.
        warm_up_rate: their learning rate, > 0, low enough to be stable.
        curvature_examples: the Hessian is that of the first batches left that hold so many examples, two at least.
        max_iterations: of Lanczos, ≥ 1.
        tolerance: residual over eigenvalue at which Lanczos stops.
        generator: source of the start vector, by default one seeded with 0.

    Returns:
        The rate and what it rests on.

    Raises:
        ValueError: if there are fewer than two batches after the warm-up, no parameter has a gradient, a number is out
            of range, a loss is not finite, a layer can not be differentiated twice, or the loss curves upwards nowhere.

    Source: Cohen et al. (2022), arXiv:2207.14484, for the threshold. Deviations: P is estimated from gradients at one
    point instead of Adam's running mean; a fixed share of the threshold is proposed.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> batches = [torch.tensor([[1.0]]), torch.tensor([[1.0]])]
    >>> nn.init.constant_(model.weight, 2.0).item()  # loss w², gradient 4, Hessian 2
    2.0
    >>> loss, parameters = lambda model, x: model(x)[:, 0] ** 2, {"weight": model.weight}
    >>> found = propose_learning_rate(model, batches, loss, parameters, warm_up_steps=0)
    >>> round(found.eigenvalue, 4), round(found.threshold, 4), round(found.rate, 4)
    (0.5, 76.0, 15.2)
    """
    if not 0 <= momentum < 1 or curvature_examples < 1 or warm_up_steps < 0 or not 0 < warm_up_rate < math.inf:
        raise ValueError(
            "momentum must be in [0, 1), curvature_examples >= 1, warm_up_steps >= 0 and warm_up_rate > 0, got"
            f" {momentum}, {curvature_examples}, {warm_up_steps} and {warm_up_rate}"
        )
    if len(batches) < warm_up_steps + 2:
        raise ValueError(
            f"batches must be {warm_up_steps} for the warm-up and at least 2 more, got {len(batches)}. Give more, each"
            " of the training's batch size."
        )
    scale = _scale(parameters, factors or {})
    with _restored(parameters):
        gradients = (mean_gradient(model, batch, per_example_loss, parameters) for batch in batches[:warm_up_steps])
        _adam(gradients, parameters, warm_up_rate * scale, momentum)
        curved: list[HessianProducts] = []
        squares, examples = torch.zeros_like(scale), 0
        for batch in batches[warm_up_steps:]:
            if len(curved) < 2 or examples < curvature_examples:
                products = HessianProducts(model, batch, per_example_loss, parameters)
                curved.append(products)
                examples += products.num_examples
                squares += products.gradient.square()
            else:
                squares += mean_gradient(model, batch, per_example_loss, parameters).square()
        root = (squares / (len(batches) - warm_up_steps)).sqrt()
        moved = (root > 0).to(root.dtype)
        if not moved.any():
            raise ValueError("parameters must have gradients, got zero for all of them. Check the loss.")

        def product(v: Tensor) -> Tensor:
            return moved * torch.stack([each.product(moved * v) for each in curved]).mean(0)

        generator = generator or torch.Generator().manual_seed(0)
        found = largest_eigenvalue(
            product,
            torch.randn(len(root), generator=generator).to(root) * moved,
            metric=torch.where(root > 0, root, 1) / scale,
            max_iterations=max_iterations,
            tolerance=tolerance,
        )
        if not found.value > 0:
            raise ValueError(
                f"loss must curve upwards somewhere, got a largest eigenvalue of {found.value}. Set the rate yourself."
            )
        passes = len(batches) + len(curved) * PRODUCT * (found.iterations + 1)
        return _proposal(found, curved, momentum, passes)


def _adam(gradients: Iterable[Tensor], parameters: Mapping[str, nn.Parameter], rates: Tensor, momentum: float) -> None:
    """Make a step of Adam on each gradient, computed where the one before has led; β₂ and ε are PyTorch's defaults.

    Source: Kingma & Ba (2015), arXiv:1412.6980, algorithm 1.
    """
    mean, square = torch.zeros_like(rates), torch.zeros_like(rates)
    sizes = [each.numel() for each in parameters.values()]
    for step, gradient in enumerate(gradients, start=1):
        mean = momentum * mean + (1 - momentum) * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        root = (square / (1 - 0.999**step)).sqrt() + 1e-8
        update = rates * mean / (1 - momentum**step) / root
        with torch.no_grad():
            for parameter, piece in zip(parameters.values(), update.split(sizes), strict=True):
                parameter.sub_(piece.view_as(parameter))


@contextmanager
def _restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Give the parameters back what they held."""
    before = [each.detach().clone() for each in parameters.values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters.values(), before, strict=True):
                parameter.copy_(value)


def _proposal(found: Eigenvalue, curved: list[HessianProducts], momentum: float, passes: int) -> LearningRate:
    each = torch.tensor([float(found.vector @ products.product(found.vector)) for products in curved])
    error = float(each.std()) / math.sqrt(len(each))
    threshold = (2 + 2 * momentum) / ((1 - momentum) * found.value)
    return LearningRate(
        rate=SHARE * threshold,
        standard_error=SHARE * threshold * error / found.value,
        threshold=threshold,
        eigenvalue=found.value,
        eigenvalue_standard_error=error,
        residual=found.residual,
        converged=found.converged,
        passes=passes,
    )


def _scale(parameters: Mapping[str, nn.Parameter], factors: Mapping[str, float]) -> Tensor:
    """Lay the factors of the rate end to end, as the parameters are."""
    unknown = sorted(set(factors) - set(parameters))
    wrong = {name: factor for name, factor in factors.items() if not 0 < factor < math.inf}
    if unknown or wrong:
        raise ValueError(f"factors must be > 0 and name parameters, got {wrong or unknown}")
    if not parameters:
        raise ValueError("parameters must be named, got none. Give all that will be trained.")
    return torch.cat([
        torch.full((each.numel(),), factors.get(name, 1.0), dtype=each.dtype, device=each.device)
        for name, each in parameters.items()
    ])
