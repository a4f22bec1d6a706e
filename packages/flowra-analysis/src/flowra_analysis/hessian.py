"""How a loss curves over chosen parameters: products with its Hessian, and the largest eigenvalue of such products.

The parameters are laid end to end as one vector θ of D numbers, in the order they are given. Near θ the mean loss of a
batch is ℓ(θ + d) ≈ ℓ + ⟨g, d⟩ + ½ ⟨d, H d⟩; g and H d come from autograd, H itself is never formed.

H v is the gradient of ⟨g, v⟩ (Pearlmutter 1994), so every layer on the way must be differentiable twice. Fused
attention is not; ``scaled_dot_product_attention`` is therefore computed by its plain formula. The empirical Fisher
F = 1/N Σ_n g_n g_nᵀ of the examples' own gradients needs one derivative only, and no eigenvalue of it is negative.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowra_analysis.per_example_signals import Batch, evaluation_mode

__all__ = [
    "Eigenvalue",
    "HessianProducts",
    "largest_eigenvalue",
    "mean_gradient",
    "per_example_gradients",
]

Loss = Callable[[nn.Module, Batch], Tensor]
SMALLEST_STEP = 1e-7
"""A new Krylov vector this much shorter than the product it comes from is rounding."""
MISSING = ("torch::autograd::Error", "torch::autograd::NotImplemented")
"""Nodes that stand for a derivative that does not exist."""


class HessianProducts:
    """The mean loss of one batch to second order in the parameters.

    The model runs in eval mode and is afterwards in the modes it was in; no ``.grad`` is written. The graphs of the
    loss and of its gradient are kept as long as this is: about the memory of three training steps.

    Source: Pearlmutter (1994), "Fast exact multiplication by the Hessian", section 2.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 0.0]])
    >>> loss = HessianProducts(model, x, lambda model, x: model(x)[:, 0].square(), {"weight": model.weight})
    >>> loss.product(torch.tensor([1.0, 1.0]))
    tensor([18.,  0.])
    """

    def __init__(
        self, model: nn.Module, batch: Batch, per_example_loss: Loss[Batch], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Run the batch forward and backward.

        Args:
            model: not changed.
            batch: whatever ``per_example_loss`` understands.
            per_example_loss: ``(model, batch)`` to ``(N,)``.
            parameters: name to parameter, each with ``requires_grad`` and used by the loss.

        Raises:
            ValueError: if a parameter does not take part, the losses are not ``(N,)``, or the loss or its gradient is
                not finite, or a layer on the way can not be differentiated twice.
        """
        self._parameters = list(parameters.values())
        with evaluation_mode(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            losses = _losses(model, batch, per_example_loss, parameters)
            self.num_examples = len(losses)
            self._gradients = _gradients(losses.mean(), parameters, create_graph=True)
        _require_second_derivative(self._gradients)
        self.loss = float(losses.detach().mean())
        self.gradient = _flat([each.detach() for each in self._gradients])
        if not math.isfinite(self.loss) or not torch.isfinite(self.gradient).all():
            raise ValueError(f"loss and gradient must be finite, got a loss of {self.loss}. Check this batch.")

    def product(self, v: Tensor) -> Tensor:
        """Compute H v, at about twice the price of a backward pass.

        Args:
            v: ``(D,)``.

        Returns:
            ``(D,)``, in the dtype and on the device of the gradient.

        Raises:
            ValueError: if v has another shape.
        """
        pieces = _like(v, self._parameters)
        curved = [(g, piece) for g, piece in zip(self._gradients, pieces, strict=True) if g.requires_grad]
        if not curved:  # the loss is linear in all of them
            return torch.zeros_like(self.gradient)
        outputs, directions = zip(*curved, strict=True)
        found = torch.autograd.grad(
            outputs, self._parameters, directions, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return _flat(found)


def per_example_gradients(
    model: nn.Module, batch: Batch, per_example_loss: Loss[Batch], parameters: Mapping[str, nn.Parameter]
) -> Tensor:
    """Compute the gradient of each example's own loss, one backward pass for each.

    With the N gradients as rows of J the empirical Fisher is F = JᵀJ / N: F v costs nothing more, and its largest
    eigenvalue is exactly that of the N x N matrix JJᵀ / N.

    Args:
        model: runs in eval mode and is left as it was.
        batch: whatever ``per_example_loss`` understands.
        per_example_loss: ``(model, batch)`` to ``(N,)``, each example's own loss.
        parameters: name to parameter, each with ``requires_grad`` and used by the loss.

    Returns:
        ``(N, D)``.

    Raises:
        ValueError: if a parameter does not take part, or the losses are not ``(N,)``.

    Source: docs/methods.md, section 2.
    """
    with evaluation_mode(model), torch.enable_grad():
        losses = _losses(model, batch, per_example_loss, parameters)
        return torch.stack([_flat(_gradients(loss, parameters, create_graph=False)) for loss in losses])


def mean_gradient(
    model: nn.Module, batch: Batch, per_example_loss: Loss[Batch], parameters: Mapping[str, nn.Parameter]
) -> Tensor:
    """Compute the gradient ``(D,)`` of a batch's mean loss, as :class:`HessianProducts` does, without the Hessian.

    Returns:
        ``(D,)``.

    Raises:
        ValueError: if a parameter does not take part, or the losses are not ``(N,)``.
    """
    with evaluation_mode(model), torch.enable_grad():
        losses = _losses(model, batch, per_example_loss, parameters)
        return _flat(_gradients(losses.mean(), parameters, create_graph=False))


class Eigenvalue(NamedTuple):
    """The largest eigenvalue of a symmetric matrix, as far as it is known."""

    value: float
    """Rayleigh quotient of ``vector``: never above the true one but for rounding."""
    residual: float
    """‖M w - value · w‖ for unit w: some eigenvalue lies within this distance."""
    iterations: int
    """Products made."""
    converged: bool
    """Whether the residual is within the tolerance."""
    vector: Tensor
    """``(D,)``, x with H x = value · P x and ⟨x, P x⟩ = 1; sign as it came."""


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    metric: Tensor | None = None,
    max_iterations: int = 30,
    tolerance: float = 1e-2,
) -> Eigenvalue:
    """Find the largest (most positive) eigenvalue of H, or of P^-1/2 H P^-1/2 for a diagonal metric P.

    Lanczos with full reorthogonalisation: the best Rayleigh quotient over all vectors that k products can reach, which
    power iteration approaches only slowly. Memory: as many vectors ``(D,)`` as iterations.

    Args:
        product: ``(D,)`` to ``(D,)``, v to H v with H symmetric.
        start: ``(D,)``, where to begin; random, or a guess. A guess orthogonal to the eigenvector finds another one.
        metric: ``(D,)``, the diagonal of P, > 0; by default 1.
        max_iterations: products at most, ≥ 1.
        tolerance: ≥ 0, residual over the size of the value at which to stop.

    Returns:
        The eigenvalue; ``converged`` tells whether the tolerance was met.

    Raises:
        ValueError: if the start is zero, the metric is not positive, a number is out of range, or a product is not
            finite.

    Source: Golub & Van Loan (2013), "Matrix Computations", section 10.1; the residual is eq. 10.1.11 there. Deviations:
    none.

    >>> matrix = torch.diag(torch.tensor([4.0, 1.0, -9.0]))
    >>> found = largest_eigenvalue(lambda v: matrix @ v, torch.ones(3))
    >>> round(found.value, 5), found.converged
    (4.0, True)
    """
    if max_iterations < 1 or not tolerance >= 0:
        raise ValueError(f"max_iterations must be >= 1 and tolerance >= 0, got {max_iterations} and {tolerance}")
    if metric is not None and not bool(((metric > 0) & torch.isfinite(metric)).all()):
        raise ValueError(f"metric must be positive and finite, got entries from {metric.min()} to {metric.max()}")
    length = float(start.norm())
    if start.ndim != 1 or not 0 < length < math.inf:
        raise ValueError(f"start must be a vector that is not zero, got shape {tuple(start.shape)}, norm {length}")
    scale = None if metric is None else metric.to(start).rsqrt()
    basis = [start / length]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = _scaled(product(_scaled(basis[-1], scale)), scale)
        size = float(image.norm())
        if not math.isfinite(size):
            raise ValueError(f"products must be finite, got a norm of {size} at iteration {len(basis)}")
        diagonal.append(float(basis[-1] @ image))
        rest = _orthogonal(image, basis)
        step = float(rest.norm())
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        value, last = float(values[-1]), float(vectors[-1, -1])
        exhausted = step <= SMALLEST_STEP * size or len(basis) == len(start)
        residual = 0.0 if exhausted else abs(step * last)
        converged = residual <= tolerance * abs(value)
        if converged or exhausted or len(basis) == max_iterations:
            weights = vectors[:, -1].to(start)
            vector = sum((w * q for w, q in zip(weights, basis, strict=True)), torch.zeros_like(start))
            return Eigenvalue(value, residual, len(basis), converged, _scaled(vector, scale))
        beside.append(step)
        basis.append(rest / step)


def _scaled(v: Tensor, scale: Tensor | None) -> Tensor:
    return v if scale is None else v * scale


def _orthogonal(v: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """Take away what v has along the basis; twice, since once leaves rounding behind."""
    for _ in range(2):
        for each in basis:
            v = v - (v @ each) * each
    return v


def _tridiagonal(diagonal: Sequence[float], beside: Sequence[float]) -> Tensor:
    whole = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for index, value in enumerate(beside):
        whole[index, index + 1] = whole[index + 1, index] = value
    return whole


def _losses(
    model: nn.Module, batch: Batch, per_example_loss: Loss[Batch], parameters: Mapping[str, nn.Parameter]
) -> Tensor:
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen or not parameters:
        raise ValueError(f"parameters must have requires_grad, got {frozen or 'no parameters'}. Leave them out.")
    losses = per_example_loss(model, batch)
    if losses.ndim != 1 or not len(losses) or not losses.requires_grad:
        raise ValueError(
            f"per_example_loss must give losses (N,) that depend on the parameters, got {tuple(losses.shape)},"
            f" requires_grad={losses.requires_grad}. Give one loss per example, with its graph."
        )
    return losses


def _gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter], *, create_graph: bool) -> list[Tensor]:
    found = torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    unused = [name for name, each in zip(parameters, found, strict=True) if each is None]
    if unused:
        raise ValueError(f"parameters must take part in the loss, got none of it for {unused}. Leave them out.")
    return [each for each in found if each is not None]


def _require_second_derivative(gradients: Sequence[Tensor]) -> None:
    """Look through the graph of the gradients for what autograd puts where a derivative is missing.

    It is not always met when products are made: a product that leaves it out would be wrong without a word.

    Raises:
        ValueError: if there is one.
    """
    left = [each.grad_fn for each in gradients if each.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        if node.name() in MISSING:
            raise ValueError(
                f"model must be differentiable twice, got a layer that is not ({node.name()}). If it uses a fused"
                ' attention kernel, load it with attn_implementation="eager".'
            )
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        left += new


def _flat(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat([piece.reshape(-1) for piece in pieces])


def _like(v: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    sizes = [parameter.numel() for parameter in parameters]
    if v.shape != (sum(sizes),):
        raise ValueError(f"v must have shape ({sum(sizes)},), the parameters laid end to end, got {tuple(v.shape)}")
    return [piece.view_as(p).to(p) for piece, p in zip(v.split(sizes), parameters, strict=True)]
