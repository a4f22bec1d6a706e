"""What counts as a linear layer y = x Wᵀ + b, and its weight as ``(m, n)`` = (out, in).

``nn.Linear``, and the ``Conv1D`` of transformers (GPT-2), which stores Wᵀ. The latter is recognised by its name and
module, so transformers is not imported.
"""

import difflib
from collections.abc import Iterable

from torch import Tensor, nn

__all__ = ["is_linear_layer", "linear_modules", "weight_matrix"]


def is_linear_layer(module: nn.Module) -> bool:
    """Tell whether a module is an ``nn.Linear`` or transformers' ``Conv1D``, or derived from one of them.

    Args:
        module: any module.

    Returns:
        True if the functions of this package take it.

    >>> is_linear_layer(nn.Linear(3, 2)), is_linear_layer(nn.Conv1d(3, 2, 1))
    (True, False)
    """
    return isinstance(module, nn.Linear) or _is_transformers_conv1d(module)


def weight_matrix(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as ``(m, n)`` = (out, in).

    Args:
        module: a linear layer, see :func:`is_linear_layer`.

    Returns:
        ``(m, n)``: the weight itself, or for ``Conv1D`` a transposed view of it. Nothing is copied.

    Raises:
        TypeError: if the module is not a linear layer.

    >>> weight_matrix(nn.Linear(in_features=3, out_features=2)).shape
    torch.Size([2, 3])
    """
    if not is_linear_layer(module):
        raise TypeError(f"module must be an nn.Linear or a transformers Conv1D, got {type(module).__name__}")
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if _is_transformers_conv1d(module) else weight


def linear_modules(model: nn.Module, module_names: Iterable[str]) -> dict[str, nn.Module]:
    """Look up linear layers by qualified name.

    Returns:
        Name to module, in the order given.

    Raises:
        ValueError: if there is no name, or one is not that of a linear layer; all such names are reported.
    """
    by_name = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    problems = []
    for name in [module_names] if isinstance(module_names, str) else module_names:
        module = by_name.get(name)
        if module is None:
            linear = [each for each, candidate in by_name.items() if is_linear_layer(candidate)]
            near = difflib.get_close_matches(name, linear, n=3) or linear[:3]
            problems.append(f"no module {name!r}, nearest names: {', '.join(near) or 'none'}")
        elif is_linear_layer(module):
            found[name] = module
        else:
            problems.append(f"{name!r} is a {type(module).__name__}")
    if problems:
        raise ValueError(
            f"module_names must be names of nn.Linear or transformers Conv1D modules, got: {'; '.join(problems)}"
        )
    if not found:
        raise ValueError("module_names must hold at least one name, got none")
    return found


def _is_transformers_conv1d(module: nn.Module) -> bool:
    return any(
        each.__name__ == "Conv1D" and each.__module__.startswith("transformers.") for each in type(module).__mro__
    )
