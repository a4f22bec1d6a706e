"""Put adapters on a model and take them off again.

A layer keeps its place, class and parameters; it gains a child ``adapters`` that holds its adapters by name, and
forward hooks that apply them (:mod:`flowra_adapters.applying`). So the base's state dict keys do not change, code that
reads ``layer.weight`` keeps working, and taking adapters off restores the model object as it was.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from flowra_adapters.adapter import Adapter, AdapterDict
from flowra_adapters.applying import adapter_dicts, held_by, put, take_off
from flowra_adapters.matching import adaptable_sites, match_sites
from flowra_adapters.methods import METHODS, AdapterMethod, instead_of
from flowra_adapters.quantised import is_quantised, keep_gradients, refuse_blocked_gradients
from flowra_adapters.running_statistics import freeze_statistics, thaw_statistics
from flowra_adapters.sites import Site, sites

__all__ = ["adapters", "attach", "delete", "detach", "disable", "disabled", "enable"]

DEFAULT_SCALING = 2.0


def attach(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    method: str | AdapterMethod = "lora",
    scaling: float | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    bias: Literal["none", "adapted", "all"] = "none",
    modules_to_save: Iterable[str] = (),
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Adapter]:
    """Attach an adapter to each named site, and freeze the base.

    After the call only adapters and ``modules_to_save`` have ``requires_grad``. The model's output is unchanged; in
    training, that of norms with running statistics (BatchNorm) becomes what it is in evaluation, for these statistics
    belong to the base (:mod:`flowra_adapters.running_statistics`). Nothing is changed if an argument is wrong.

    A quantised base (bitsandbytes, torchao) stays as it is, with one exception: on processors with AVX512-BF16 the
    4-bit layers of bitsandbytes leave their inference format, which passes no gradient, for good. Those that were in it
    then answer in the dtype of their input and no longer in bfloat16, so there the output changes by that rounding.

    Args:
        model: changed in place.
        ranks: exact name or pattern (see :func:`match_sites`) to rank; an exact name wins over patterns. Rank 0
            attaches an empty adapter that may grow later.
        method: name of the adapter method, a key of :data:`METHODS`, or a method of your own.
        scaling: s of ΔW = s · B A, the same for all modules and fixed for the life of the adapter; by default 2.
        alpha: α, instead of ``scaling``: s = α/r with ``lora``, α/√r with ``rslora``, where r is the module's rank at
            birth (for a module that starts at rank 0, the largest rank given). ``rslora`` needs it.
        dropout: probability in [0, 1) of dropping an input element on the adapter's path, in training.
        bias: whose biases are trained, too, each as an offset under the same name (method ``bitfit``): those of no
            layer, of the modules that are adapted, or of all modules, norms included.
        modules_to_save: qualified names of modules trained in full, such as a new head.
        adapter: name of this set of adapters.
        dtype: of the adapter's tensors; by default that of the layer's weight, but at least float32.
        generator: source of randomness, by default one seeded with 0.

    Returns:
        The new adapters by site name, in the model's own order.

    Raises:
        ValueError: if a pattern matches nothing or two patterns disagree, a rank is out of range, a name is taken, or
            the method is unknown, there is no bias to train, a module to train in full is quantised, or weights of
            torchao quantise the inputs of their layers, too.
    """
    row = _method(method)
    if not adapter or "." in adapter or ":" in adapter:
        raise ValueError(f"adapter must be a name without dots and colons, got {adapter!r}")
    if hasattr(AdapterDict(), adapter):
        raise ValueError(f"adapter must be a name that modules do not use themselves, got {adapter!r}")
    saved_names = list(modules_to_save)
    to_save = [_submodule(model, name, "modules_to_save") for name in saved_names]
    _refuse_quantised(saved_names, to_save)
    refuse_blocked_gradients(model)
    places = adaptable_sites(model, row.adapts)
    resolved = _resolve(model, places, ranks)
    inside = [name for name in resolved if any(f"{name}.".startswith(f"{saved}.") for saved in saved_names)]
    if inside:
        raise ValueError(f"modules_to_save must not be adapted too, got {inside[0]!r}. Exclude it from the ranks.")
    scalings = _scalings(resolved, row, scaling, alpha)
    biases = _biases(model, bias, [places[name] for name in resolved], saved_names)
    chosen = {name: places.get(name) or biases[name] for name in sites(model) if name in resolved or name in biases}
    keys = {name: _key(adapter, site) for name, site in chosen.items()}
    _refuse_taken(chosen, keys, adapter)
    generator = generator or torch.Generator().manual_seed(0)
    created = {}
    for name, site in chosen.items():
        own_row = instead_of(row, site) if name in resolved else METHODS["bitfit"]
        scaled = name in resolved and own_row.scaling is not None
        weight = site.owner._parameters[site.parameter]
        assert weight is not None
        own = weight.dtype if weight.is_floating_point() else torch.float32
        try:
            created[name] = own_row.adapter(
                site.operator,
                rank=resolved.get(name, 1),
                scaling=scalings[name] if scaled else 1.0,
                dropout=dropout if scaled or own_row is row else 0.0,
                dtype=dtype or torch.promote_types(own, torch.float32),
                generator=generator,
            ).to(device=weight.device)
        except ValueError as error:
            raise ValueError(f"{error}; for module {name!r}. Choose another value or exclude the module.") from None
    _freeze_base(model)
    freeze_statistics(model, trained=to_save)
    keep_gradients(model)
    for module in to_save:
        module.requires_grad_(True)
    for name, new in created.items():
        put(chosen[name], keys[name], new.train(chosen[name].owner.training))
    return created


def adapters(model: nn.Module, adapter: str = "default") -> dict[str, Adapter]:
    """Return the attached adapters of this name by site name, in the model's own order.

    Raises:
        ValueError: if no adapter of this name is attached.
    """
    held_by_name = adapter_dicts(model)
    found = {
        held.sites[key].name_at(module): one
        for module, held in held_by_name.items()
        for key, one in held.named(adapter).items()
    }
    if not found:
        known = sorted({key.partition(":")[0] for held in held_by_name.values() for key in held})
        raise ValueError(f"adapter must be attached to the model, got {adapter!r}; attached: {known or 'none'}")
    return found


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
        for key in held.named(adapter):
            del held[key], held.sites[key]
        if not held:
            take_off(model.get_submodule(name), held)
    if not adapter_dicts(model):
        thaw_statistics(model)


def detach(model: nn.Module) -> None:
    """Take all adapters off.

    Merged updates stay in the weights; unmerged ones are gone. Frozen parameters stay frozen.
    """
    for name, held in adapter_dicts(model).items():
        take_off(model.get_submodule(name), held)
    thaw_statistics(model)


def _refuse_merged(model: nn.Module, adapter: str) -> None:
    merged_in = [
        name for name, held in adapter_dicts(model).items() if any(key in held.merged for key in held.named(adapter))
    ]
    if merged_in:
        raise ValueError(
            f"adapter must not be merged, got {adapter!r}, merged into {merged_in[0]!r}. Unmerge it first."
        )


def _method(method: str | AdapterMethod) -> AdapterMethod:
    if isinstance(method, AdapterMethod):
        return method
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    return METHODS[method]


def _key(adapter: str, site: Site) -> str:
    return f"{adapter}:{site.label}" if site.label else adapter


def _refuse_taken(places: Mapping[str, Site], keys: Mapping[str, str], adapter: str) -> None:
    """Refuse a site that has an adapter of this name. One of the whole weight may lie beside one of a part of it."""
    for name, site in places.items():
        held = held_by(site.owner)
        if held is None:
            if hasattr(site.owner, "adapters"):
                raise ValueError(f"layer must have no attribute 'adapters' of its own, got one at {name!r}")
            continue
        if keys[name] in held:
            raise ValueError(f"adapter must be a new name, got {adapter!r}, which is already attached to {name!r}")


def _scalings(
    ranks: Mapping[str, int], row: AdapterMethod, scaling: float | None, alpha: float | None
) -> dict[str, float]:
    """Return s of each site."""
    if scaling is not None and alpha is not None:
        raise ValueError(f"scaling and alpha must not both be given, got {scaling} and {alpha}")
    if row.scaling is None:
        if scaling is not None or alpha is not None:
            raise ValueError(f"{row.name} must be given neither scaling nor alpha, got {scaling} and {alpha}")
        return dict.fromkeys(ranks, 1.0)
    if alpha is not None:
        largest = max(ranks.values()) or 1
        return {name: row.scaling(alpha, rank or largest) for name, rank in ranks.items()}
    if row.needs_alpha:
        raise ValueError(f"{row.name} must be given alpha, got scaling={scaling}: it is a rule for s")
    return dict.fromkeys(ranks, DEFAULT_SCALING if scaling is None else scaling)


def _resolve(model: nn.Module, places: Mapping[str, Site], ranks: Mapping[str, int]) -> dict[str, int]:
    """Turn names and patterns into exact names; an exact name wins, patterns must agree."""
    if not ranks:
        raise ValueError("ranks must name at least one module or pattern, got none")
    for pattern, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise ValueError(f"rank must be a whole number, got {rank!r} for {pattern!r}")
    by_pattern: dict[str, tuple[str, int]] = {}
    patterns = {pattern: rank for pattern, rank in ranks.items() if pattern not in places}
    if patterns:
        match_sites(model, patterns, among=places)  # reports every pattern that matches nothing at once
    for pattern, rank in patterns.items():
        for name in match_sites(model, [pattern], among=places):
            other = by_pattern.setdefault(name, (pattern, rank))
            if other[1] != rank and name not in ranks:
                raise ValueError(
                    f"patterns must agree on a rank, got {other[0]!r}: {other[1]} and {pattern!r}: {rank} for {name!r}"
                )
    return {
        name: ranks[name] if name in ranks else by_pattern[name][1]
        for name in places
        if name in ranks or name in by_pattern
    }


def _biases(model: nn.Module, which: str, adapted: Iterable[Site], saved: Iterable[str]) -> dict[str, Site]:
    """Return the biases that the option ``bias`` means, by name; those of modules trained in full are left out."""
    if which not in ("none", "adapted", "all"):
        raise ValueError(f"bias must be 'none', 'adapted' or 'all', got {which!r}")
    if which == "none":
        return {}
    owners = {id(site.owner) for site in adapted}
    found = {
        name: site
        for name, site in adaptable_sites(model, METHODS["bitfit"].adapts).items()
        if (which == "all" or id(site.owner) in owners) and not any(f"{name}.".startswith(f"{each}.") for each in saved)
    }
    if not found:
        raise ValueError(
            f"bias must be 'none' where no {'adapted layer' if which == 'adapted' else 'layer'} has a bias, got"
            f" {which!r}. Call create_missing_biases first."
        )
    return found


def _submodule(model: nn.Module, name: str, argument: str) -> nn.Module:
    try:
        if not name:  # the whole model
            raise AttributeError
        return model.get_submodule(name)
    except AttributeError:
        children = [child for child, _ in model.named_children()]
        raise ValueError(f"{argument} must name modules of the model, got {name!r}. Top level: {children}") from None


def _refuse_quantised(names: Iterable[str], modules: Iterable[nn.Module]) -> None:
    for name, module in zip(names, modules, strict=True):
        if any(is_quantised(parameter) for parameter in module.parameters()):
            raise ValueError(f"modules_to_save must not be quantised, got {name!r}. Adapt it, or leave it as it was.")


def _freeze_base(model: nn.Module) -> None:
    in_adapters = {id(parameter) for held in adapter_dicts(model).values() for parameter in held.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in in_adapters:
            parameter.requires_grad_(False)
