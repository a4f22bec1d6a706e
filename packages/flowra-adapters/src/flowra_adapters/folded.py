"""One low-rank update on a frozen linear layer whose weight it joins for the pass, with gradients of the factors alone.

    forward    W' = W + s B A,  y = x W'ᵀ + b           by the layer itself, which sees W' in its weight's place
    backward   ∂x = g W',  ∂z = s g B,  ∂A = ∂zᵀ x,  ∂B = s gᵀ (x Aᵀ)

Where the rows of a batch outnumber those of the weight, W' costs less than adding to y and to ∂x, see
:func:`folds`; it is kept for the backward pass. No gradient of W' is formed, which would cost as much as the layer.
The sibling of :mod:`flowra_adapters.fused`, which is for all other cases; measured in ``benchmarks/bench_step.py``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from flowra_adapters.fused import times_narrow

__all__ = ["folded_update", "folded_weight", "folds"]


def folds(layer: nn.Module, x: Tensor) -> bool:
    """Tell whether W + s B A takes less time than adding the update: 5 m n < N (m + n) for an input of N rows.

    Both W' and what adding saves are passes over memory, of m n and of N (m + n) numbers; where the two are near one
    another, making and keeping a new W' in every pass is the slower way.

    Only where the sum is not rounded away, in at least single precision, and only on an ``nn.Linear``.

    Returns:
        Whether it does.
    """
    if type(layer) is not nn.Linear or x.is_nested or x.dtype not in {torch.float32, torch.float64}:
        return False
    m, n = layer.out_features, layer.in_features
    return x.shape[-1] == n and 5 * m * n * n < x.numel() * (m + n)


def folded_weight(layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return W + s · B A, detached."""
    weight = layer._parameters["weight"]
    assert weight is not None
    with torch.no_grad():
        return torch.addmm(weight, lora_B, lora_A, alpha=scaling)


def folded_update(
    layer: nn.Module, x: Tensor, output: Tensor, folded: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Give the output of a layer that ran with W' = W + s · B A the gradients of x and of the factors.

    Args:
        layer: that made ``output`` from ``x``.
        x: ``(…, n)``.
        output: ``(…, m)``; its memory is reused, its graph is not.
        folded: W' ``(m, n)``.
        lora_A: ``(r, n)``.
        lora_B: ``(m, r)``.
        scaling: s.

    Returns:
        ``(…, m)``, the same numbers, differentiable in x and the factors, any number of times.
    """
    weight = layer._parameters["weight"]
    y = _FoldedUpdate.apply(x, output.detach(), weight, folded, lora_A, lora_B, scaling)  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


class _FoldedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        x: Tensor,
        output: Tensor,
        weight: Tensor,
        folded: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
    ) -> Tensor:
        ctx.mark_dirty(output)
        ctx.scaling = scaling
        ctx.save_for_backward(x, weight, folded, lora_A, lora_B)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, folded, lora_A, lora_B = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: it must see how W' depends on the factors
            folded = torch.addmm(weight, lora_B, lora_A, alpha=ctx.scaling)
        g, rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (g @ folded).view(x.shape) if ctx.needs_input_grad[0] else None
        dA = times_narrow(g, ctx.scaling * lora_B).T @ rows if ctx.needs_input_grad[4] else None
        dB = (ctx.scaling * (times_narrow(rows, lora_A.T).T @ g)).T if ctx.needs_input_grad[5] else None
        return dx, None, None, None, dA, dB, None
