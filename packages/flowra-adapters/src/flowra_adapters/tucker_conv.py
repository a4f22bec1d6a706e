"""FLoRA on convolutions: three small convolutions in a row, and never ΔW (Si et al. 2024, arXiv:2405.14739, eq. 5).

    K = G ×_3 C_1 ×_4 C_2 …          on parameters only, (r_1, r_2, *kernel)
    z = U_2ᵀ * x                     1×1, n/g → r_2 channels
    z = K * z                        the layer's kernel, stride, padding, dilation, r_2 → r_1
    y += s · U_1 * z                 1×1, r_1 → m

The first, which has no bias, commutes with every padding mode, so the padding comes after it. Groups share U_2 and K:
they are folded into the batch for the first two, and the third is grouped. Where it costs less, U_2 is multiplied into
K, which saves a convolution; where W + ΔW in the weight's place costs less than any chain (depthwise layers, or large
images when nothing learns), that is done.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial, reduce
from typing import Literal

import torch
from torch import Tensor

from flowra_adapters.adapter import Base
from flowra_adapters.multilinear import along_axis
from flowra_adapters.operators import ConvOperator, Operator
from flowra_adapters.tucker import Tucker
from flowra_adapters.tucker_ranks import TuckerRanks

__all__ = ["TuckerConv", "flora"]


def flora(
    operator: Operator,
    *,
    rank: int,
    scaling: float,
    dropout: float,
    dtype: torch.dtype,
    generator: torch.Generator,
    ranks: TuckerRanks = TuckerRanks(),  # noqa: B008 - a constant
    init: Literal["normal", "kaiming"] = "normal",
) -> Tucker:
    """Make the Tucker adapter of a weight; arguments as of :class:`~flowra_adapters.Tucker`."""
    kind: Callable[..., Tucker] = (
        partial(TuckerConv, operator) if isinstance(operator, ConvOperator) else partial(Tucker, operator)
    )
    return kind(rank=rank, scaling=scaling, dropout=dropout, dtype=dtype, generator=generator, ranks=ranks, init=init)


class TuckerConv(Tucker):
    """Tucker update of a convolution or transposed convolution; see :class:`~flowra_adapters.Tucker`."""

    operator: ConvOperator

    def forward(self, x: Tensor, base: Base | None = None) -> Tensor:
        """Map the layer's input to the update of its output; computed in the dtype of the factors."""
        operator, dimensions = self.operator, self.operator.dimensions
        one, kernel = self._one_group, self._kernel() * self.scaling
        z = self._dropped(x).to(kernel.dtype)
        if operator.groups > 1:
            z = z.reshape(-1, operator.shape[1], *x.shape[-dimensions:])
        if self._folds(*self._positions(x)):
            z = one.apply(z, along_axis(kernel, self.factor_1, 1))
        else:
            z = one.apply(one.pointwise(z, self.factor_1.T), kernel)
        if operator.groups > 1:
            z = z.reshape(*x.shape[: operator.channel_dim], operator.groups * len(kernel), *z.shape[-dimensions:])
        return operator.pointwise(z, self.factor_0)

    def materialises(self, x: Tensor) -> bool:
        """Tell whether W + ΔW in the weight's place takes fewer multiplications than the chain, in this pass.

        Counted with P positions going in and P' coming out, over the batch: the chain takes
        P n r_2 + P' g r_1 r_2 ∏k + P' m r_1, or P' g r_1 (n/g) ∏k + P' m r_1 where U_2 is folded into K; ΔW takes
        r_1 (n/g) ∏k (r_2 + m), whatever P. Where the adapter learns, the backward pass is twice the forward one, and
        that through W + ΔW needs the gradient of a whole weight: P' m (n/g) ∏k more. Additions are not counted.

        Returns:
            Whether to do so. Never while dropout acts, nor for an input of a narrower dtype than the adapter's: W + ΔW
            would be rounded to it, and small steps of the training lost.
        """
        if (self.dropout > 0 and self.training) or torch.promote_types(x.dtype, self.core.dtype) != x.dtype:
            return False
        taken, given = self._positions(x)
        m, n, *kernel = self.operator.shape
        r_1, r_2 = self.core.shape[:2]
        dense = r_1 * n * math.prod(kernel) * (r_2 + m)
        if not (torch.is_grad_enabled() and self.core.requires_grad):
            return dense < self._chain(taken, given)
        return 3 * dense + given * m * n * math.prod(kernel) < 3 * self._chain(taken, given)

    def _positions(self, x: Tensor) -> tuple[int, int]:
        """Count the positions in a batch and, but for its margins, those in the layer's output."""
        taken, stride = x.numel() // (self.operator.groups * self.operator.shape[1]), math.prod(self.operator.stride)
        return taken, taken * stride if self.operator.transposed else -(-taken // stride)

    def _chain(self, taken: int, given: int) -> int:
        """Count the multiplications of the chain."""
        return min(self._down_products(taken, given)) + given * self.operator.shape[0] * self.core.shape[0]

    def _folds(self, taken: int, given: int) -> bool:
        """Tell whether U_2 is multiplied into the kernel."""
        folded, separate = self._down_products(taken, given)
        return folded <= separate

    def _down_products(self, taken: int, given: int) -> tuple[int, int]:
        """Count the multiplications that make r_1 channels, with U_2 folded into the kernel and without."""
        _, n, *kernel = self.operator.shape
        r_1, r_2 = self.core.shape[:2]
        groups, size = self.operator.groups, math.prod(kernel)
        return given * groups * r_1 * n * size, groups * (taken * n * r_2 + given * r_1 * r_2 * size)

    def _kernel(self) -> Tensor:
        """Return K = G ×_3 C_1 ×_4 C_2 …, ``(r_1, r_2, *kernel)``, as one product with the Kronecker product of C."""
        spatial = [each for axis, each in self.factors.items() if axis > 1]
        if not spatial:
            return self.core
        rows = self.core.flatten(2) @ reduce(torch.kron, spatial).T
        return rows.view(*self.core.shape[:2], *self.operator.shape[2:])

    @cached_property
    def _one_group(self) -> ConvOperator:
        """How the layer treats each of its groups."""
        if self.operator.groups == 1:
            return self.operator
        m, *rest = self.operator.shape
        return replace(self.operator, shape=(m // self.operator.groups, *rest), groups=1)

    @torch.no_grad()
    def conv_chain(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Write the update as the three convolutions of a LyCORIS or kohya file; exact.

        With r = max(r_1, r_2), smaller axes filled up with zeros, since these files have one rank: their readers make
        ΔW[o, i, h, w] = (alpha / r) Σ up[o, p] mid[p, q, h, w] down[q, i], so alpha = s · r. Of grouped convolutions
        LyCORIS reads this; readers that run the three as a chain do not.

        Returns:
            ``lora_down`` ``(r, n/g, 1, …)``, ``lora_mid`` ``(r, r, *kernel)`` and ``lora_up`` ``(m, r, 1, …)``; None
            where such a file has no place for it: a kernel of one position, which needs no middle and is written by
            :meth:`to_lora`, and a transposed convolution.
        """
        kernel = self.operator.shape[2:]
        if self.operator.transposed or math.prod(kernel) == 1:
            return None
        ones, rank = (1,) * len(kernel), max(self.core.shape[:2])
        down = self.core.new_zeros(rank, self.operator.shape[1], *ones)
        mid = self.core.new_zeros(rank, rank, *kernel)
        up = self.core.new_zeros(self.operator.shape[0], rank, *ones)
        r_1, r_2 = self.core.shape[:2]
        down[:r_2] = self.factor_1.T.view(r_2, -1, *ones)
        mid[:r_1, :r_2] = self._kernel()
        up[:, :r_1] = self.factor_0.view(-1, r_1, *ones)
        return down, mid, up
