"""Products with the Jacobians J_n = ∂f(x_n)/∂x_n of a function that treats the examples of a batch independently.

All examples share one pass: v (N, …) stands for N vectors, and J v for the N products J_n v_n. A function of one vector
is a batch of one example.

J v is the gradient by u of ⟨Jᵀ u, v⟩ (the double-vjp trick), since Jᵀ u is linear in u. So f runs once, each product
costs about one backward pass, and nothing needs a forward-mode derivative. Fused attention has neither that nor a
second derivative; ``scaled_dot_product_attention`` is therefore computed by its plain formula.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["ROUNDING", "JacobianProducts", "inner_products"]

ROUNDING = 0.02
"""Relative differences up to this may be rounding: a layer may compute in bfloat16 whatever comes in and out."""


class JacobianProducts:
    """The Jacobian of a function at an input, as what it and its transpose make of vectors.

    Nothing is written to parameters. The graphs of f and of its gradient are kept as long as this is.

    Source: double vjp after Townsend (2017), "A new trick for calculating Jacobian vector products".

    >>> layer = torch.nn.Linear(3, 2)
    >>> products = JacobianProducts(layer, torch.ones(1, 3))
    >>> torch.allclose(products.jvp(torch.eye(3)[:1]), layer.weight[:, 0])
    True
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, *, real: Tensor | None = None) -> None:
        """Run the function, and see whether it can be differentiated as this needs it.

        Args:
            function: ``(N, …)`` to ``(N, …)``, each example's output a function of its own input alone.
            x: ``(N, …)``, floating point: where the Jacobian is taken; not changed.
            real: ``(N, T)``, true at the positions that count. Of an input or output ``(N, T, …)`` the other positions
                are left out: J is then the block of the real ones. Other shapes are whole.

        Raises:
            ValueError: if x or the output is not such a batch, or f is not differentiable twice.
        """
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(f"x must have shape (N, …) and be floating point, got {tuple(x.shape)} of {x.dtype}")
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._x = x.detach().requires_grad_()
            self._y = function(self._x.clone())  # a leaf could not be changed in place
            if self._y.ndim < 1 or len(self._y) != len(x):
                raise ValueError(f"function must give one row per example, got {tuple(self._y.shape)} for {len(x)}")
            self._u = torch.zeros_like(self._y, requires_grad=True)
            self._transposed = self._differentiate(self._y, self._x, self._u, create_graph=True)
        self._absent_x, self._absent_y = (_absent(each, real) for each in (x, self._y))
        self._check_adjoint()

    @property
    def output(self) -> Tensor:
        """f(x), ``(N, …)``, without its graph."""
        return self._y.detach()

    @property
    def num_inputs(self) -> Tensor:
        """``(N,)``, whole numbers: columns of each example's Jacobian."""
        return _count(self._x, self._absent_x)

    @property
    def num_outputs(self) -> Tensor:
        """``(N,)``, whole numbers: rows of each example's Jacobian."""
        return _count(self._y, self._absent_y)

    def jvp(self, v: Tensor) -> Tensor:
        """Compute J_n v_n.

        Args:
            v: like x; what stands at positions that are left out does not matter.

        Returns:
            Like f(x), zero at positions that are left out.

        Raises:
            ValueError: if f is not differentiable twice.
        """
        v = self.input_vectors(v)
        product = self._differentiate(self._transposed, self._u, v)
        return self.output_vectors(product)

    def vjp(self, u: Tensor) -> Tensor:
        """Compute J_nᵀ u_n.

        Args:
            u: like f(x); what stands at positions that are left out does not matter.

        Returns:
            Like x, zero at positions that are left out.

        Raises:
            ValueError: if f is not differentiable.
        """
        u = self.output_vectors(u)
        product = self._differentiate(self._y, self._x, u)
        return self.input_vectors(product)

    def input_vectors(self, values: Tensor) -> Tensor:
        """Return values ``(N, …)`` in dtype and on the device of x, zero at positions that are left out."""
        return _without(values.to(self._x), self._absent_x)

    def output_vectors(self, values: Tensor) -> Tensor:
        """Return values ``(N, …)`` in dtype and on the device of f(x), zero at positions that are left out."""
        return _without(values.to(self._y), self._absent_y)

    def gaussian(self, generator: torch.Generator) -> Tensor:
        """Draw vectors of independent N(0, 1), like x and zero at positions left out; drawn on the CPU in float32."""
        return self.input_vectors(torch.randn(self._x.shape, generator=generator, dtype=torch.float32))

    def rademacher(self, generator: torch.Generator) -> Tensor:
        """Draw vectors of independent ±1, like x and zero at positions that are left out; drawn on the CPU."""
        return self.input_vectors(torch.randint(0, 2, self._x.shape, generator=generator, dtype=torch.int8) * 2 - 1)

    def _differentiate(self, outputs: Tensor, inputs: Tensor, weights: Tensor, *, create_graph: bool = False) -> Tensor:
        try:
            gradient: Tensor = torch.autograd.grad(
                outputs, inputs, weights, retain_graph=True, create_graph=create_graph
            )[0]
            return gradient
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"function must be differentiable twice by its input, got: {error}. If it uses a fused attention"
                ' kernel, load the model with attn_implementation="eager".'
            ) from error

    def _check_adjoint(self) -> None:
        """Compare ⟨Jᵀ u, v⟩ with ⟨u, J v⟩: they differ if part of the gradient hides from the second derivative."""
        v = self.rademacher(torch.Generator().manual_seed(0))
        u = self.jvp(v)
        expected = float(inner_products(u, u).sum().sqrt())  # with u = J v / ‖J v‖
        found = float(inner_products(self.vjp(u / (expected or 1)), v).sum())
        if not math.isfinite(found) or not math.isfinite(expected):
            raise ValueError("products with the Jacobian must be finite, got NaN or infinity. Check the input.")
        if abs(found - expected) > ROUNDING * expected:
            raise ValueError(
                f"function must be differentiable twice by its input, got ⟨Jᵀu, v⟩ = {found} for ⟨u, Jv⟩ = {expected}."
                ' If it uses a fused attention kernel, load the model with attn_implementation="eager".'
            )


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Compute ⟨a_n, b_n⟩ for each example.

    Args:
        a: ``(N, …)``.
        b: of the same shape.

    Returns:
        ``(N,)``, float64, summed in float64.
    """
    products: Tensor = torch.linalg.vecdot(a.flatten(1).double(), b.flatten(1).double())
    return products


def _absent(values: Tensor, real: Tensor | None) -> Tensor | None:
    """Return ``(N, T, 1…)``, true at positions that are left out, or None if the values have no such positions."""
    if real is None or values.shape[:2] != real.shape:
        return None
    return (real == 0).to(values.device).view(*real.shape, *[1] * (values.ndim - 2))


def _without(values: Tensor, absent: Tensor | None) -> Tensor:
    return values if absent is None else values.masked_fill(absent, 0)


def _count(values: Tensor, absent: Tensor | None) -> Tensor:
    if absent is None:
        return torch.full((len(values),), math.prod(values.shape[1:]), device=values.device)
    return (~absent).flatten(1).sum(1) * math.prod(values.shape[2:])
