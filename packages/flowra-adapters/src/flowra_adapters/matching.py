"""Which sites a name or pattern means."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from flowra_adapters.operators import (
    CONVOLUTIONS,
    ConvOperator,
    EmbeddingOperator,
    LinearOperator,
    ParameterOperator,
)
from flowra_adapters.sites import Site, sites

__all__ = [
    "GROUPS",
    "adaptable_modules",
    "adaptable_sites",
    "is_bias",
    "is_norm",
    "low_rank",
    "match_modules",
    "match_sites",
]


def low_rank(site: Site) -> bool:
    """Tell whether a site is a matrix, or a stack of filters, that a low-rank update fits."""
    if not isinstance(site.operator, ParameterOperator):
        return True
    filters = isinstance(site.owner, CONVOLUTIONS) and site.parameter == "weight"
    return filters or (len(site.operator.shape) == 2 and not is_norm(site))


def is_norm(site: Site) -> bool:
    """Tell whether a site is a normalisation's gain or shift.

    That is a parameter of one of PyTorch's norms, or a vector of a module whose class is called a norm and that holds
    nothing else (``LlamaRMSNorm``, ``T5LayerNorm``).

    Returns:
        Whether it is one.
    """
    owner = site.owner
    if isinstance(owner, NORMS):
        return True
    named = "norm" in type(owner).__name__.lower() and all(name == "adapters" for name in owner._modules)
    return named and all(each.ndim == 1 for each in owner._parameters.values() if each is not None)


def is_bias(site: Site) -> bool:
    """Tell whether a site is a bias: ``bias``, also of a norm, ``in_proj_bias``, ``gate_up_proj_bias``."""
    return site.part is None and (site.parameter == "bias" or site.parameter.endswith("_bias"))


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)


GROUPS: Mapping[str, Callable[[Site], bool]] = MappingProxyType({
    "all-linear": lambda site: isinstance(site.operator, LinearOperator) and site.part is None,
    "all-conv": lambda site: isinstance(site.operator, ConvOperator),
    "all-layers": lambda site: isinstance(site.operator, LinearOperator | ConvOperator) and site.part is None,
    "all-embeddings": lambda site: isinstance(site.operator, EmbeddingOperator),
    "all-norms": is_norm,
    "all-biases": is_bias,
})
"""Patterns that mean a kind of site."""


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List the linear layers that can carry an adapter, by qualified name, in the model's own order.

    These are ``nn.Linear``, and the ``Conv1D`` of ``transformers``, whose weight is a parameter of their own and whose
    forward is called. :func:`adaptable_sites` lists everything else, too.

    Returns:
        Name to module.
    """
    return {
        name: site.owner
        for name, site in sites(model).items()
        if isinstance(site.operator, LinearOperator) and site.part is None
    }


def adaptable_sites(model: nn.Module, adapts: Callable[[Site], bool] = low_rank) -> dict[str, Site]:
    """List what can carry an adapter of a method, by name, in the model's own order.

    Args:
        model: any.
        adapts: which sites the method can adapt; by default those that a low-rank update fits.

    Returns:
        Name to site.
    """
    return {name: site for name, site in sites(model).items() if adapts(site)}


def match_modules(model: nn.Module, patterns: Iterable[str], *, exclude: Iterable[str] = ()) -> list[str]:
    """Resolve names and patterns to the names of linear layers, in the model's own order. See :func:`match_sites`."""
    linear = {name: site for name, site in sites(model).items() if GROUPS["all-linear"](site)}
    return match_sites(model, patterns, exclude=exclude, among=linear)


def match_sites(
    model: nn.Module,
    patterns: Iterable[str],
    *,
    exclude: Iterable[str] = (),
    among: Mapping[str, Site] | None = None,
) -> list[str]:
    """Resolve names and patterns to names of sites, in the model's own order.

    A pattern is an exact name (``encoder.layer.0.attention.self.query``), the tail of a name (``query``,
    ``self.query``), a shell pattern over either (``encoder.layer.[0-3].*``, ``*_proj``), or a group of :data:`GROUPS`
    (``all-linear``). A shell pattern means linear layers, convolutions and norms; embeddings, other parameters and
    parts are meant only by their own names (``wte``, ``query.bias``, ``c_attn:q``) and by shell patterns that end in
    such (``*.bias``, ``*c_attn:[qv]``).

    Args:
        model: whose sites are matched.
        patterns: at least one; each must match at least one site.
        exclude: patterns taken out again; each must match something too.
        among: the sites that may be meant; by default those that a low-rank update fits.

    Returns:
        Names, each once.

    Raises:
        ValueError: if a pattern matches nothing, naming the nearest names, or nothing is left.
    """
    known = adaptable_sites(model) if among is None else among
    wanted = _matches(known, list(patterns), model, "patterns")
    unwanted = _matches(known, list(exclude), model, "exclude")
    chosen = [name for name in known if name in wanted and name not in unwanted]
    if not chosen:
        raise ValueError(f"patterns must leave at least one module, got {list(patterns)} without {list(exclude)}")
    return chosen


def matches(site: Site, pattern: str) -> bool:
    """Tell whether a pattern means this site."""
    if pattern in GROUPS:
        return GROUPS[pattern](site)
    if site.name == pattern or site.name.endswith(f".{pattern}"):
        return True
    if not (fnmatchcase(site.name, pattern) or fnmatchcase(site.name, f"*.{pattern}")):
        return False
    usual = site.part is None and (isinstance(site.operator, LinearOperator | ConvOperator) or is_norm(site))
    label = site.part.name if site.part else site.parameter
    return usual or _names_end(pattern, label, ":" if site.part else ".")


def _names_end(pattern: str, label: str, mark: str) -> bool:
    """Tell whether the last piece of a shell pattern speaks of parts or parameters, and means this one."""
    head, found, tail = pattern.rpartition(mark)
    return bool(found) and head != "" and tail != "*" and fnmatchcase(label, tail)


def _matches(known: Mapping[str, Site], patterns: Sequence[str], model: nn.Module, argument: str) -> set[str]:
    found = {pattern: {name for name, site in known.items() if matches(site, pattern)} for pattern in patterns}
    unmatched = [pattern for pattern, names in found.items() if not names]
    if unmatched:
        raise ValueError("; ".join(_explain(pattern, known, model, argument) for pattern in unmatched))
    return set().union(*found.values())


def _explain(pattern: str, known: Mapping[str, Site], model: nn.Module, argument: str) -> str:
    if pattern == "all-biases":
        return f"{argument} must match biases, got {pattern!r}: no layer has one. Call create_missing_biases first"
    if not known:
        return f"{argument} must match what the method can adapt, got {pattern!r}: the model has nothing of that kind"
    others = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    }
    if others:
        name, kind = next(iter(others.items()))
        return f"{argument} must match modules that can carry an adapter, got {pattern!r}: {name!r} is a {kind}"
    names = [name for name, site in known.items() if site.part is None]
    tails = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(pattern, [*tails, *names], n=3, cutoff=0.5) or tails[:8]
    return f"{argument} must match at least one module, got {pattern!r}. Nearest names: {', '.join(near)}"
