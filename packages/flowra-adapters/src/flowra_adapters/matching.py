"""Which modules a name or pattern means."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from flowra_adapters.adapter import AdapterDict
from flowra_adapters.layers import is_linear

__all__ = ["adaptable_modules", "match_modules"]

ALL_LINEAR = "all-linear"


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List the modules that can carry an adapter, by qualified name, in the model's own order.

    These are linear layers (``nn.Linear``, and the ``Conv1D`` of ``transformers``) whose weight is a parameter of their
    own and whose forward is called. Not listed: the model itself, parametrised weights (a merge would be lost), what
    hangs inside ``nn.MultiheadAttention`` (it reads the weights and calls nothing), and the modules of adapters that
    are already attached.

    Returns:
        Name to module.
    """
    closed = [name for name, each in model.named_modules() if isinstance(each, AdapterDict | nn.MultiheadAttention)]
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and is_linear(module)
        and not parametrize.is_parametrized(module)
        and not any(name.startswith(f"{prefix}.") or not prefix for prefix in closed)
    }


def match_modules(model: nn.Module, patterns: Iterable[str], *, exclude: Iterable[str] = ()) -> list[str]:
    """Resolve names and patterns to the qualified names of adaptable modules, in the model's own order.

    A pattern is an exact name (``encoder.layer.0.attention.self.query``), the tail of a name (``query``,
    ``self.query``), a shell pattern over either (``encoder.layer.[0-3].*``, ``*_proj``), or ``all-linear``.

    Args:
        model: whose modules are matched.
        patterns: at least one; each must match at least one adaptable module.
        exclude: patterns taken out again; each must match something too.

    Returns:
        Names, each once.

    Raises:
        ValueError: if a pattern matches nothing, naming the nearest module names, or nothing is left.
    """
    names = list(adaptable_modules(model))
    wanted = _matches(names, list(patterns), model, "patterns")
    unwanted = _matches(names, list(exclude), model, "exclude")
    chosen = [name for name in names if name in wanted and name not in unwanted]
    if not chosen:
        raise ValueError(f"patterns must leave at least one module, got {list(patterns)} without {list(exclude)}")
    return chosen


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern means this module name."""
    return pattern == ALL_LINEAR or fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _matches(names: Sequence[str], patterns: Sequence[str], model: nn.Module, argument: str) -> set[str]:
    unmatched = [pattern for pattern in patterns if not any(matches(name, pattern) for name in names)]
    if unmatched:
        raise ValueError("; ".join(_explain(pattern, names, model, argument) for pattern in unmatched))
    return {name for name in names for pattern in patterns if matches(name, pattern)}


def _explain(pattern: str, names: Sequence[str], model: nn.Module, argument: str) -> str:
    others = {name: type(module).__name__ for name, module in model.named_modules() if matches(name, pattern)}
    if others:
        name, kind = next(iter(others.items()))
        return f"{argument} must match modules that can carry an adapter, got {pattern!r}: {name!r} is a {kind}"
    tails = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(pattern, [*tails, *names], n=3, cutoff=0.5) or tails[:8]
    return f"{argument} must match at least one module, got {pattern!r}. Nearest names: {', '.join(near)}"
