"""One low-rank update and a gain of each output channel on a frozen linear layer, in few passes over memory.

With base = W x + b and the gain c ``(m,)``, the layer shall answer c ⊙ (W x + s B A x) + b:

    forward    z = x Aᵀ,  y = c ⊙ base + (1 − c) ⊙ b + z (s diag(c) B)ᵀ
    backward   ∂z = g (s diag(c) B),  ∂A = ∂zᵀ x,  ∂B = s diag(c) gᵀ z,  ∂c = Σ g ⊙ (base − b) + s Σ_r B ⊙ gᵀ z,
               ∂x = g diag(c) (W + s B A)

This is the sibling of :mod:`flowra_adapters.fused`. The forward pass makes y in one pass over the output and adds the
product of rank r in place; the base output is kept only if the gain learns. In the backward pass Σ g comes with gᵀ z,
from a column of ones beside z, and c and s B A go into the weight or, with few rows, into g and ∂x: into what is
smaller. c = 1 gives the bits of the base.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowra_adapters.fused import times_narrow

__all__ = ["fused_update_with_gain"]


def fused_update_with_gain(
    layer: nn.Module, x: Tensor, output: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, gain: Tensor
) -> Tensor:
    """Turn the output of a frozen linear layer, base + b, into c ⊙ (base + s · (x Aᵀ) Bᵀ) + b.

    Args:
        layer: that made ``output`` from ``x``.
        x: ``(…, n)``.
        output: ``(…, m)``; its memory may be reused, its graph is not.
        lora_A: ``(r, n)``.
        lora_B: ``(m, r)``.
        scaling: s.
        gain: c ``(m,)``, in the dtype of the output.

    Returns:
        ``(…, m)``, differentiable in x, the factors and the gain, any number of times.
    """
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    in_rows = weight if type(layer) is nn.Linear else weight.T
    y = _FusedUpdateWithGain.apply(x, output.detach(), in_rows, bias, lora_A, lora_B, gain, scaling)  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


class _FusedUpdateWithGain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        x: Tensor,
        base: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        gain: Tensor,
        scaling: float,
    ) -> Tensor:
        z = times_narrow(x.reshape(-1, x.shape[-1]), lora_A.T)
        learns = ctx.needs_input_grad[6]
        y = torch.empty_like(base) if learns else base
        if bias is None:
            torch.mul(base, gain, out=y)
        else:
            torch.addcmul((1 - gain) * bias, base, gain, out=y)
        y.view(-1, y.shape[-1]).addmm_(z, (lora_B * gain.unsqueeze(1)).T, alpha=scaling)
        if not learns:
            ctx.mark_dirty(base)
        ctx.set_materialize_grads(False)
        ctx.scaling = scaling
        ctx.save_for_backward(x, base if learns else None, weight, bias, lora_A, lora_B, gain, z)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        if gradient is None:
            return (None,) * 8
        x, base, weight, bias, lora_A, lora_B, gain, z = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: it must see how these depend on x and A
            z = times_narrow(x.reshape(-1, x.shape[-1]), lora_A.T)
            base = None if base is None else F.linear(x, weight, bias)
        g = gradient.reshape(-1, gradient.shape[-1])
        column = gain.unsqueeze(1)
        acting_B = ctx.scaling * column * lora_B
        dz = times_narrow(g, acting_B)
        dx = dB = dgain = None
        if ctx.needs_input_grad[0]:
            if 2 * weight.numel() < len(g) * sum(weight.shape):
                dx = (g @ (column * weight).addmm_(acting_B, lora_A)).view(x.shape)
            else:
                dx = ((g * gain) @ weight).addmm_(dz, lora_A).view(x.shape)
        dA = dz.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[4] else None
        if ctx.needs_input_grad[5] or ctx.needs_input_grad[6]:
            sums = (torch.cat([z.T, z.new_ones(1, len(z))]) @ g).T
            by_rank = ctx.scaling * sums[:, :-1]
            dB = column * by_rank
            if ctx.needs_input_grad[6]:
                dgain = (g * base.reshape(g.shape)).sum(0) + (lora_B * by_rank).sum(1)
                dgain = dgain if bias is None else dgain - bias * sums[:, -1]
        return dx, None, None, None, dA, dB, dgain, None
