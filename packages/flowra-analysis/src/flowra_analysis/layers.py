"""What counts as a layer y = x Wᵀ + b, and how its input and its output's gradient become those of a matrix W (m, n).

Each of these layers multiplies vectors by a matrix that its weight holds, at each of T places: a linear layer each
token, a convolution each patch (T output positions), a transposed convolution each input position, an embedding the
one-hot vector of each id. So the gradient of one example is Σ_t g_t x_tᵀ for all of them, and what is measured on x and
g is measured once. A convolution of G groups has G such matrices, one for each group, stacked along the rows.

The ``Conv1D`` of transformers (GPT-2), which stores Wᵀ, is recognised by its name and module, so transformers is not
imported.

Source: convolutions as weight sharing over patches after Grosse & Martens (2016), arXiv:1602.01407, section 3.1.
"""

import difflib
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Tokens", "is_measurable_layer", "measurable_modules", "stores_transpose", "tokens", "weight_matrix"]

KINDS = "nn.Linear, transformers Conv1D, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d and nn.Embedding"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Tokens(NamedTuple):
    """One call of a layer as the products of a matrix W ``(m, n)`` with vectors."""

    x: Tensor
    """``(N, T, G·n)``, what W multiplies; for an embedding ``(N, T, U)``, one-hot over the ids ``columns``."""
    g: Tensor
    """``(N, T, m)``, the gradient of what comes out; the rows of W are those of the groups, one after the other."""
    columns: Tensor | None
    """``(U,)``, for an embedding: the distinct ids of the call, ascending; all other columns of x are zero."""
    num_columns: int
    """n."""
    groups: int
    """G."""
    is_sequence: bool
    """Whether T is the axis of a text, to which a mask ``(N, T)`` may belong."""


def is_measurable_layer(module: nn.Module) -> bool:
    """Tell whether the functions of this package take a layer.

    Args:
        module: any module.

    Returns:
        True for ``nn.Linear``, the ``Conv1D`` of transformers, ``nn.Conv1d/2d/3d``, their transposed forms and
        ``nn.Embedding``, and for what is derived from them (the linear layers of bitsandbytes are).

    >>> is_measurable_layer(nn.Linear(3, 2)), is_measurable_layer(nn.LayerNorm(3))
    (True, False)
    """
    return isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding)) or _is_transformers_conv1d(module)


def weight_matrix(module: nn.Module) -> Tensor:
    """Return the weight of a layer as the matrix ``(m, n)`` = (out, in) that it multiplies vectors with.

    For a linear layer that is its weight; for a convolution ``(out, in / groups · kernel)``; for a transposed one
    ``(out · kernel, in / groups)``, the groups one after the other along the rows; for an embedding ``(dim, ids)``.

    Args:
        module: see :func:`is_measurable_layer`.

    Returns:
        ``(m, n)``: the weight or a view of it (a copy for a transposed convolution of several groups); for a quantised
        linear layer a new tensor, what it makes of the unit vectors, in the dtype it computes in.

    Raises:
        TypeError: if the module is no such layer.

    >>> weight_matrix(nn.Linear(in_features=3, out_features=2)).shape
    torch.Size([2, 3])
    >>> weight_matrix(nn.Conv2d(in_channels=4, out_channels=6, kernel_size=3, groups=2)).shape
    torch.Size([6, 18])
    """
    if not is_measurable_layer(module):
        raise TypeError(f"module must be one of {KINDS}, got {type(module).__name__}")
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Linear) and _is_quantised(weight):
        return _weight_by_unit_vectors(module)
    if isinstance(module, TRANSPOSED):
        groups = module.groups
        return weight.view(groups, len(weight) // groups, -1).mT.flatten(0, 1)
    if stores_transpose(module):
        return weight.T
    return weight.flatten(1)


def stores_transpose(module: nn.Module) -> bool:
    """Tell whether a layer's weight is the transpose of its :func:`weight_matrix`, for layers without a kernel."""
    return isinstance(module, nn.Embedding) or _is_transformers_conv1d(module)


def tokens(module: nn.Module, x: Tensor, g: Tensor) -> Tokens:
    """Lay out one call of a layer as products of its :func:`weight_matrix` with vectors.

    Args:
        module: see :func:`is_measurable_layer`.
        x: its input, first axis N.
        g: the gradient of its output.

    Returns:
        x and g with N, T as their first axes.

    Raises:
        ValueError: if the input has no example axis.
    """
    if isinstance(module, nn.Embedding):
        return _embedding_tokens(module, x, g)
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        if x.ndim != len(module.kernel_size) + 2:
            raise ValueError(f"input must have shape (N, channels, …), got {tuple(x.shape)}")
        if isinstance(module, TRANSPOSED):
            outer, inner = _transposed_patches(module, g, x.shape[2:]), x.flatten(2).mT
        else:
            outer, inner = g.flatten(2).mT, _conv_patches(module, x)
        return Tokens(inner, outer, None, inner.shape[2] // module.groups, module.groups, is_sequence=False)
    if x.ndim < 2:
        raise ValueError(f"input must have shape (N, …, n), got {tuple(x.shape)}")
    is_sequence = x.ndim == 3
    x, g = x.unsqueeze(1).flatten(1, -2), g.unsqueeze(1).flatten(1, -2)
    return Tokens(x, g, None, x.shape[2], 1, is_sequence=is_sequence)


def measurable_modules(model: nn.Module, module_names: Iterable[str]) -> dict[str, nn.Module]:
    """Look up layers by qualified name.

    Returns:
        Name to module, in the order given.

    Raises:
        ValueError: if there is no name, or one is not that of such a layer; all such names are reported.
    """
    by_name = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    problems = []
    for name in [module_names] if isinstance(module_names, str) else module_names:
        module = by_name.get(name)
        if module is None:
            layers = [each for each, candidate in by_name.items() if is_measurable_layer(candidate)]
            near = difflib.get_close_matches(name, layers, n=3) or layers[:3]
            problems.append(f"no module {name!r}, nearest names: {', '.join(near) or 'none'}")
        elif is_measurable_layer(module):
            found[name] = module
        else:
            problems.append(f"{name!r} is a {type(module).__name__}")
    if problems:
        raise ValueError(f"module_names must be names of layers ({KINDS}), got: {'; '.join(problems)}")
    if not found:
        raise ValueError("module_names must hold at least one name, got none")
    return found


def _embedding_tokens(module: nn.Embedding, ids: Tensor, g: Tensor) -> Tokens:
    is_sequence = ids.ndim == 2
    ids, g = ids.unsqueeze(1).flatten(1), g.unsqueeze(1).flatten(1, -2)
    columns, places = ids.unique(return_inverse=True)
    one_hot = F.one_hot(places, len(columns)).to(g.dtype)
    if module.padding_idx is not None:
        one_hot *= (ids != module.padding_idx).unsqueeze(-1)  # its row gets no gradient
    return Tokens(one_hot, g, columns, module.num_embeddings, 1, is_sequence=is_sequence)


def _conv_patches(module: _ConvNd, x: Tensor) -> Tensor:
    """Return what a convolution multiplies its weight with at each output position, ``(N, T, C·kernel)``."""
    mode = "constant" if module.padding_mode == "zeros" else str(module.padding_mode)
    return _patches(module, F.pad(x, module._reversed_padding_repeated_twice, mode=mode))


def _transposed_patches(module: _ConvNd, g: Tensor, sizes: torch.Size) -> Tensor:
    """Return the output gradient that each input position of a transposed convolution reaches, ``(N, T, C·kernel)``."""
    sides: list[int] = [side for each in reversed(module.padding) for side in (each, each)]  # type: ignore[misc]
    return _patches(module, F.pad(g, sides), sizes)


def _patches(module: _ConvNd, values: Tensor, sizes: torch.Size | None = None) -> Tensor:
    """Cut windows of the kernel's shape, at most ``sizes`` of them along each axis."""
    dims = len(module.kernel_size)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        values = values.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        if sizes is not None:
            values = values.narrow(axis, 0, sizes[axis - 2])  # output_padding may leave room for more
    places, kernel_axes = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    return values.permute(0, *places, 1, *kernel_axes).flatten(1 + dims).flatten(1, dims)


def _weight_by_unit_vectors(module: nn.Linear) -> Tensor:
    """Return what a linear layer, however it stores its weight, makes of the unit vectors."""
    device = module.weight.device
    dtype = getattr(module, "compute_dtype", None) or torch.get_default_dtype()
    units = torch.eye(module.in_features + 1, module.in_features, device=device, dtype=dtype)  # and the zero vector
    with torch.no_grad():
        made: Tensor = module.forward(units)  # without hooks: an adapter on the layer is none of its weight
    return (made[:-1] - made[-1:]).T


def _is_quantised(weight: Tensor) -> bool:
    return type(weight.data) is not Tensor or not weight.is_floating_point()


def _is_transformers_conv1d(module: nn.Module) -> bool:
    return any(
        each.__name__ == "Conv1D" and each.__module__.startswith("transformers.") for each in type(module).__mro__
    )
