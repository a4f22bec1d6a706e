"""Which modules of a profile or a plan are meant by names, patterns and roles; their names alone decide."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from flowra_analysis import layer_type
from flowra_pipelines.errors import UserError

__all__ = ["modules_called"]

ROLES = {"q": {"Q", "QKV"}, "k": {"K", "QKV"}, "v": {"V", "QKV"}, "o": {"O"}}


def modules_called(names: Iterable[str], patterns: Sequence[str], what: str) -> list[str]:
    """Resolve exact names, tails of names, shell patterns over either, and ``q``, ``k``, ``v``, ``o``.

    Args:
        names: qualified names of modules.
        patterns: what is asked for; spaces around one do not matter.
        what: asks, for the message.

    Returns:
        Those names that at least one pattern means, in their order.

    Raises:
        UserError: if a pattern means none.
    """
    known = list(names)
    found: set[str] = set()
    for pattern in (each.strip() for each in patterns):
        own = {
            name
            for name in known
            if any(fnmatchcase(tail, pattern) for tail in (name, *_tails(name)))
            or layer_type(name) in ROLES.get(pattern, ())
        }
        if not own:
            tails = sorted({tail for name in known for tail in (name, *_tails(name))})
            near = difflib.get_close_matches(pattern, tails, n=1, cutoff=0.0)
            raise UserError(f"{what} must name modules of the plan, got {pattern!r}; nearest: {', '.join(near)}")
        found |= own
    return [name for name in known if name in found]


def _tails(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]
