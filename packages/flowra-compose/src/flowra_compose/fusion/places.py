"""Where on a model adapters are fused: its adapted modules, and the repeated blocks that hold them."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from flowra_compose.fusion.gates import Level

__all__ = ["block_of", "blocks_of", "check_modules", "first_of", "gate_places"]


def check_modules(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, nn.Module]:
    """Find the modules that adapters update.

    Args:
        model: the base, without adapters.
        shapes: module name to (m, n) of its updates.

    Returns:
        Name to module, sorted by name.

    Raises:
        ValueError: if one is missing, of other sides, or is not called as a layer, so that nothing could be added.
    """
    modules = dict(model.named_modules())
    missing = [name for name in sorted(shapes) if name not in modules]
    if missing:
        known = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"adapters must update modules of the model, got {missing[0]!r} and {len(missing) - 1} more that it lacks;"
            f" it has {known[:2]}…. Were they trained on another base?"
        )
    found = {}
    for name, (m, n) in sorted(shapes.items()):
        module = modules[name]
        if type(module).__name__ == "NonDynamicallyQuantizableLinear":
            raise ValueError(
                f"modules must be called as layers, got {name!r} of an nn.MultiheadAttention, which reads its weight."
                " Merge the adapters instead, or leave it out of them."
            )
        sides = _sides(module)
        if sides is None:
            raise ValueError(f"modules must be linear layers, got {type(module).__name__} at {name!r}")
        if sides != (m, n):
            raise ValueError(
                f"updates must fit the model, got {(m, n)} for {name!r} of {sides}. Were they trained on another base?"
            )
        found[name] = module
    return found


def gate_places(model: nn.Module, shapes: Mapping[str, tuple[int, int]], level: Level) -> dict[str, int]:
    """Say where gates stand, and how wide what they look at is.

    Args:
        model: the base.
        shapes: module name to (m, n) of its updates.
        level: see :class:`GateOptions`.

    Returns:
        Name of the block (``layer``), ``""`` (``step``), or of the module (``module``) to d.

    Raises:
        ValueError: if the model has no repeated blocks that hold every module, or says no ``hidden_size``.
    """
    if level == "module":
        return {name: n for name, (_, n) in sorted(shapes.items())}
    blocks = blocks_of(model, shapes)
    width = _width(model)
    return {"": width} if level == "step" else dict.fromkeys(blocks, width)


def blocks_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the repeated blocks that hold the modules, in the model's order.

    Raises:
        ValueError: if a module lies in no block, or the model has several stacks of blocks.
    """
    holders: dict[str, str | None] = {name: block_of(model, name) for name in names}
    outside = sorted(name for name, block in holders.items() if block is None)
    if outside:
        raise ValueError(
            f"adapted modules must lie in repeated blocks for gates of layers, got {outside[:3]} outside of them."
            " Use level='module', or leave them out of the adapters."
        )
    found = set(holders.values())
    order = [name for name, _ in model.named_modules() if name in found]
    stacks = {name.rpartition(".")[0] for name in order}
    if len(stacks) > 1 or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"gates of layers must have one stack of blocks, got {sorted(stacks)}: what a decoder's cross-attention"
            " reads are other positions. Use level='module'."
        )
    return order


def first_of(model: nn.Module, block: str) -> str:
    """Return the name of the first block of the stack that a block is in, which sees the hidden states first."""
    stack = block.rpartition(".")[0]
    return f"{stack}.{next(name for name, _ in model.get_submodule(stack).named_children())}"


def block_of(model: nn.Module, name: str) -> str | None:
    """Return the outermost repeated block around a module, an item of an ``nn.ModuleList``; None if there is none."""
    parts = name.split(".")
    at: Any = model
    for index, part in enumerate(parts[:-1]):
        at = getattr(at, part)
        if isinstance(at, nn.ModuleList):
            return ".".join(parts[: index + 2])
    return None


def _sides(module: nn.Module) -> tuple[int, int] | None:
    """Return (m, n) of a linear layer, quantised ones and GPT-2's ``Conv1D`` included."""
    m, n = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(m, int) and isinstance(n, int):
        return m, n
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2:
        return weight.shape[1], weight.shape[0]
    return None


def _width(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None)
    if type(width) is not int or width < 1:
        raise ValueError("the model's config must say hidden_size for gates of layers, got none. Use level='module'.")
    return width
