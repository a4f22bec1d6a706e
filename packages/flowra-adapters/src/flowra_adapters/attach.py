"""Put adapters on a model and take them off again.

A layer keeps its place, class and parameters; it gains a child ``adapters`` that holds its adapters by name, and one
forward hook that adds their updates to its output. So the base's state dict keys do not change, code that reads
``layer.weight`` keeps working, and taking adapters off restores the model object as it was.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter, AdapterDict
from flowra_adapters.fused import can_fuse, fused_update
from flowra_adapters.layers import linear_size
from flowra_adapters.lora import LoRA
from flowra_adapters.matching import adaptable_modules, match_modules

__all__ = ["METHODS", "AdapterMethod", "adapters", "attach", "delete", "detach", "disable", "disabled", "enable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterMethod:
    """A row of :data:`METHODS`."""

    adapter: Callable[..., Adapter]
    """The class, called with the layer's sizes and the rank."""
    scaling: Callable[[float, int], float]
    """s from α and the reference rank."""


METHODS: Mapping[str, AdapterMethod] = MappingProxyType({
    "lora": AdapterMethod(adapter=LoRA, scaling=lambda alpha, rank: alpha / rank),
    # Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2: the only power of the rank that keeps learning stable.
    "rslora": AdapterMethod(adapter=LoRA, scaling=lambda alpha, rank: alpha / math.sqrt(rank)),
})
DEFAULT_SCALING = 2.0


def attach(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    method: str = "lora",
    scaling: float | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    modules_to_save: Iterable[str] = (),
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Adapter]:
    """Attach an adapter to each named module, and freeze the base.

    After the call only adapters and ``modules_to_save`` have ``requires_grad``. The model's output is unchanged.
    Nothing is changed if an argument is wrong.

    Args:
        model: changed in place.
        ranks: exact module name or pattern (see :func:`match_modules`) to rank; an exact name wins over patterns.
            Rank 0 attaches an empty adapter that may grow later.
        method: name of the adapter method, a key of :data:`METHODS`.
        scaling: s of ΔW = s · B A, the same for all modules and fixed for the life of the adapter; by default 2.
        alpha: α, instead of ``scaling``: s = α/r with ``lora``, α/√r with ``rslora``, where r is the module's rank at
            birth (for a module that starts at rank 0, the largest rank given). ``rslora`` needs it.
        dropout: probability in [0, 1) of dropping an input element on the adapter's path, in training.
        modules_to_save: qualified names of modules trained in full, such as a new head.
        adapter: name of this set of adapters.
        dtype: of the adapter's tensors; by default that of the layer's weight, but at least float32.
        generator: source of randomness, by default one seeded with 0.

    Returns:
        The new adapters by module name, in the model's own order.

    Raises:
        ValueError: if a pattern matches nothing or two patterns disagree, a rank is out of range, a name is taken, or
            the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    if not adapter or "." in adapter:
        raise ValueError(f"adapter must be a name without dots, got {adapter!r}")
    saved_names = list(modules_to_save)
    to_save = [_submodule(model, name, "modules_to_save") for name in saved_names]
    resolved = _resolve(model, ranks)
    inside = [name for name in resolved if any(f"{name}.".startswith(f"{saved}.") for saved in saved_names)]
    if inside:
        raise ValueError(f"modules_to_save must not be adapted too, got {inside[0]!r}. Exclude it from the ranks.")
    scalings = _scalings(resolved, method, scaling, alpha)
    modules = adaptable_modules(model)
    occupied = [name for name in resolved if hasattr(modules[name], "adapters") and not _held(modules[name])]
    if occupied:
        raise ValueError(f"layer must have no attribute 'adapters' of its own, got one at {occupied[0]!r}")
    taken = [name for name in resolved if adapter in (_held(modules[name]) or {})]
    if taken:
        raise ValueError(f"adapter must be a new name, got {adapter!r}, which is already attached to {taken[0]!r}")
    generator = generator or torch.Generator().manual_seed(0)
    created = {}
    for name, rank in resolved.items():
        layer = modules[name]
        assert isinstance(layer.weight, Tensor)
        out_features, in_features = linear_size(layer)
        try:
            created[name] = METHODS[method].adapter(
                in_features,
                out_features,
                rank=rank,
                scaling=scalings[name],
                dropout=dropout,
                dtype=dtype or torch.promote_types(layer.weight.dtype, torch.float32),
                generator=generator,
            )
        except ValueError as error:
            raise ValueError(f"{error}; for module {name!r}. Choose another value or exclude the module.") from None
    _freeze_base(model)
    for module in to_save:
        module.requires_grad_(True)
    for name, new in created.items():
        layer = modules[name]
        assert isinstance(layer.weight, Tensor)
        _adapter_dict(layer)[adapter] = new.to(device=layer.weight.device).train(layer.training)
    return created


def adapters(model: nn.Module, adapter: str = "default") -> dict[str, Adapter]:
    """Return the attached adapters of this name by module name, in the model's own order.

    Raises:
        ValueError: if no adapter of this name is attached.
    """
    found = {}
    for name, layers_adapters in adapter_dicts(model).items():
        if adapter in layers_adapters:
            one = layers_adapters[adapter]
            assert isinstance(one, Adapter)
            found[name] = one
    if not found:
        known = sorted({key for each in adapter_dicts(model).values() for key in each})
        raise ValueError(f"adapter must be attached to the model, got {adapter!r}; attached: {known or 'none'}")
    return found


def adapter_dicts(model: nn.Module) -> dict[str, AdapterDict]:
    """Return what hangs on each adapted module, by module name."""
    return {name: held for name, module in model.named_modules() if (held := _held(module)) is not None}


def enable(model: nn.Module, adapter: str = "default") -> None:
    """Add this adapter's updates to the outputs again. The adapter must be attached."""
    for one in adapters(model, adapter).values():
        one.enabled = True


def disable(model: nn.Module, adapter: str = "default") -> None:
    """Leave this adapter's updates out: the model answers as without it.

    Raises:
        ValueError: if the adapter is merged; unmerge it first.
    """
    _refuse_merged(model, adapter)
    for one in adapters(model, adapter).values():
        one.enabled = False


@contextmanager
def disabled(model: nn.Module, adapter: str = "default") -> Iterator[None]:
    """Leave this adapter's updates out inside the ``with`` block, and restore the previous state after it."""
    before = {name: one.enabled for name, one in adapters(model, adapter).items()}
    disable(model, adapter)
    try:
        yield
    finally:
        for name, one in adapters(model, adapter).items():
            one.enabled = before[name]


def delete(model: nn.Module, adapter: str) -> None:
    """Take the adapters of this name off; others stay as they are. Frozen parameters stay frozen.

    Raises:
        ValueError: if no adapter of this name is attached, or it is merged; unmerge it first.
    """
    adapters(model, adapter)  # it must be there
    _refuse_merged(model, adapter)
    for name, held in adapter_dicts(model).items():
        if adapter in held:
            del held[adapter]
        if not held:
            _take_off(model.get_submodule(name), held)


def detach(model: nn.Module) -> None:
    """Take all adapters off.

    Merged updates stay in the weights; unmerged ones are gone. Frozen parameters stay frozen.
    """
    for name, held in adapter_dicts(model).items():
        _take_off(model.get_submodule(name), held)


def _take_off(layer: nn.Module, held: AdapterDict) -> None:
    assert held.hook is not None
    held.hook.remove()
    del layer.adapters


def _refuse_merged(model: nn.Module, adapter: str) -> None:
    merged_in = [name for name, held in adapter_dicts(model).items() if adapter in held.merged]
    if merged_in:
        raise ValueError(
            f"adapter must not be merged, got {adapter!r}, merged into {merged_in[0]!r}. Unmerge it first."
        )


def _scalings(ranks: Mapping[str, int], method: str, scaling: float | None, alpha: float | None) -> dict[str, float]:
    """Return s of each module."""
    if scaling is not None and alpha is not None:
        raise ValueError(f"scaling and alpha must not both be given, got {scaling} and {alpha}")
    if alpha is not None:
        largest = max(ranks.values()) or 1
        return {name: METHODS[method].scaling(alpha, rank or largest) for name, rank in ranks.items()}
    if method == "rslora":
        raise ValueError(f"rslora must be given alpha, got scaling={scaling}: it is the rule s = α/√r")
    return dict.fromkeys(ranks, DEFAULT_SCALING if scaling is None else scaling)


def _resolve(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """Turn names and patterns into exact names; an exact name wins, patterns must agree."""
    if not ranks:
        raise ValueError("ranks must name at least one module or pattern, got none")
    for pattern, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise ValueError(f"rank must be a whole number, got {rank!r} for {pattern!r}")
    order = list(adaptable_modules(model))
    known = set(order)
    by_pattern: dict[str, tuple[str, int]] = {}
    patterns = {pattern: rank for pattern, rank in ranks.items() if pattern not in known}
    if patterns:
        match_modules(model, patterns)  # reports every pattern that matches nothing at once
    for pattern, rank in patterns.items():
        for name in match_modules(model, [pattern]):
            other = by_pattern.setdefault(name, (pattern, rank))
            if other[1] != rank and name not in ranks:
                raise ValueError(
                    f"patterns must agree on a rank, got {other[0]!r}: {other[1]} and {pattern!r}: {rank} for {name!r}"
                )
    return {
        name: ranks[name] if name in ranks else by_pattern[name][1]
        for name in order
        if name in ranks or name in by_pattern
    }


def _submodule(model: nn.Module, name: str, argument: str) -> nn.Module:
    try:
        if not name:  # the whole model
            raise AttributeError
        return model.get_submodule(name)
    except AttributeError:
        children = [child for child, _ in model.named_children()]
        raise ValueError(f"{argument} must name modules of the model, got {name!r}. Top level: {children}") from None


def _freeze_base(model: nn.Module) -> None:
    in_adapters = {id(parameter) for held in adapter_dicts(model).values() for parameter in held.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in in_adapters:
            parameter.requires_grad_(False)


def _adapter_dict(layer: nn.Module) -> AdapterDict:
    """Return the layer's adapters; the first call gives it an empty dict and the hook."""
    existing = _held(layer)
    if existing is not None:
        return existing
    created = AdapterDict()
    layer.adapters = created
    created.hook = layer.register_forward_hook(_add_updates, with_kwargs=True)
    return created


def _held(layer: nn.Module) -> AdapterDict | None:
    """Return the layer's adapters, if it has any."""
    candidate = getattr(layer, "adapters", None)
    return candidate if isinstance(candidate, AdapterDict) else None


def _add_updates(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    held = layer.adapters
    assert isinstance(held, AdapterDict)
    x = args[0] if args else next(iter(kwargs.values()))
    active = list(held.active().values())
    factors = active[0].plain_factors() if len(active) == 1 else None
    if factors is not None and can_fuse(layer, x, output, factors[0]):
        return fused_update(layer, x, output, *factors, active[0].scaling)
    for adapter in active:
        output = output + adapter(x).to(output.dtype)
    return output
