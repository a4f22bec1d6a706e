"""One low-rank update on a frozen linear layer, in the fewest passes over memory.

    forward    z = x Aᵀ,  y = base + s z Bᵀ           added in place into the base's output
    backward   ∂z = s g B,  ∂A = ∂zᵀ x,  ∂B = s gᵀ z,  ∂x = g W + ∂z A       one buffer for ∂x

Where somebody observes z, it is made outside, in the graph: ∂A and ∂z A are then autograd's.

Composed from separate operations, autograd makes and adds a tensor of the output's size twice in the forward pass and
one of the input's size in the backward pass; on small ranks these passes are most of the price of LoRA. The rest are
products with a narrow matrix, whose speed hangs on the side that the narrow one stands on (:func:`times_narrow`).
The weight takes part only through ∂x, so it must be frozen. Measured in ``benchmarks/bench_adapters.py``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from flowra_adapters.layers import is_conv1d

__all__ = ["autocast", "can_fuse", "fused_update", "times_narrow"]

NARROW = 12
"""Columns from which on a matrix is not narrow."""


def can_fuse(layer: nn.Module, x: Tensor, factor: Tensor) -> bool:
    """Tell whether a fused step may take the place of adding the update to the layer's output.

    Not where the layer's ``forward`` was replaced, where its own parameters learn, where dtypes are mixed, or where the
    pass is transformed or recorded.

    Returns:
        Whether it may.
    """
    own = layer._parameters
    weight, bias = own.get("weight"), own.get("bias")
    return (
        (type(layer) is nn.Linear or is_conv1d(layer))
        and "forward" not in layer.__dict__
        and type(weight) is nn.Parameter  # and not a quantised one
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and x.dtype == factor.dtype
        and x.layout == torch.strided
        and not x.is_nested
        and not autocast(x.device.type)
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def autocast(device: str) -> bool:
    """Tell whether operations on this type of device are cast now."""
    return device != "meta" and torch.is_autocast_enabled(device)


def times_narrow(rows: Tensor, narrow: Tensor) -> Tensor:
    """Multiply a matrix by one of few columns, as (narrowᵀ rowsᵀ)ᵀ.

    Of a product with few columns BLAS libraries make little use; with as few rows, each of them contiguous, it takes
    about half the time at rank 8. From about 12 columns on, with two threads, that is over. Measured in
    ``benchmarks/bench_adapters.py``.

    Args:
        rows: ``(N, k)``.
        narrow: ``(k, r)``.

    Returns:
        ``(N, r)``, laid out by columns if r < 12.
    """
    return rows @ narrow if narrow.shape[1] >= NARROW else (narrow.T.contiguous() @ rows.T).T


def fused_update(
    layer: nn.Module,
    x: Tensor,
    output: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    observer: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Add s · (x Aᵀ) Bᵀ to the output of a frozen linear layer, in place.

    Args:
        layer: that made ``output`` from ``x``.
        x: ``(…, n)``.
        output: ``(…, m)``; its memory is reused, its graph is not.
        lora_A: ``(r, n)``.
        lora_B: ``(m, r)``.
        scaling: s.
        observer: called with z = x Aᵀ ``(…, r)``, a tensor of the graph that gradients pass.

    Returns:
        ``(…, m)``, differentiable in x and the factors, any number of times.
    """
    weight = layer._parameters["weight"]
    assert weight is not None
    in_rows = weight if type(layer) is nn.Linear else weight.T
    z = None
    if observer is not None:
        z = F.linear(x, lora_A)
        observer(z)
    y = _FusedUpdate.apply(x, output.detach(), in_rows, lora_A, lora_B, scaling, z)  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


class _FusedUpdate(torch.autograd.Function):
    """The older form with one ``forward``: a separate ``setup_context`` costs a look at the signature on every call."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        x: Tensor,
        base: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        observed: Tensor | None,
    ) -> Tensor:
        if observed is None:
            z = times_narrow(x.reshape(-1, x.shape[-1]), lora_A.T)
        else:
            z = observed.reshape(-1, observed.shape[-1])
        base.view(-1, base.shape[-1]).addmm_(z, lora_B.T, alpha=scaling)
        ctx.mark_dirty(base)
        ctx.scaling, ctx.observed = scaling, observed is not None
        ctx.save_for_backward(x, weight, lora_A, lora_B, z if observed is None else observed)
        return base

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, lora_A, lora_B, z = ctx.saved_tensors
        of_x, _, _, of_A, of_B, _, _ = ctx.needs_input_grad
        g, rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        dz = times_narrow(g, ctx.scaling * lora_B)
        dx = dA = dB = None
        if of_x:
            dx = g @ weight
            dx = (dx if ctx.observed else dx.addmm_(dz, lora_A)).view(x.shape)
        if of_A and not ctx.observed:
            dA = dz.T @ rows
        if of_B:
            if ctx.observed:
                z = z.reshape(dz.shape)
            elif torch.is_grad_enabled():  # a second derivative is wanted: it must see how z depends on x and A
                z = times_narrow(rows, lora_A.T)
            dB = (ctx.scaling * (z.T @ g)).T  # and not s gᵀ z, which is the same product with a narrow matrix
        return dx, None, None, dA, dB, None, dz.view(*x.shape[:-1], dz.shape[1]) if ctx.observed else None
