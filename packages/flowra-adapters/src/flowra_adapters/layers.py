"""What a linear layer is: y = x Wᵀ + b, and its size.

``nn.Linear`` stores W as ``(m, n)``. The ``Conv1D`` of ``transformers`` (GPT-2 and its kin) is the same map with the
weight stored as ``(n, m)``; it is recognised by name, so that this package does not need ``transformers``.
"""

from typing import cast

from torch import Tensor, nn

__all__ = ["is_conv1d", "is_falcon_linear", "is_linear", "linear_size"]


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer that can carry an adapter."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is the ``Conv1D`` of ``transformers``, whose weight is transposed."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def is_falcon_linear(module: nn.Module) -> bool:
    """Tell whether a module is the ``FalconLinear`` of ``transformers``: ``nn.Linear`` that rounds before the bias."""
    return type(module).__name__ == "FalconLinear" and type(module).__module__.startswith("transformers.")


def linear_size(layer: nn.Module) -> tuple[int, int]:
    """Return (m, n), the sizes of a linear layer's output and input."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    n, m = cast(Tensor, layer.weight).shape
    return m, n
