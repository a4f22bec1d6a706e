"""Processes that are given the same folder share its work: each piece is done by whoever claims it first."""

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Elsewhere", "claimed", "kept", "share"]

PAUSE = 15
"""Seconds before looking again, where all that is left is done by others."""


def kept(file: Path, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - what JSON holds
    """Return what a file says; where there is none yet, it is made first."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
        partial.rename(file)
    return json.loads(file.read_text(encoding="utf-8"))


class Elsewhere(Exception):
    """Another process is doing this piece."""


def share(pieces: Iterable[Callable[[], object]]) -> None:
    """Do all pieces, those that another process is at last, in case it breaks off; each may raise Elsewhere."""
    left = list(pieces)
    while left:
        others = []
        for piece in left:
            try:
                piece()
            except Elsewhere:
                others.append(piece)
        if len(others) == len(left):
            time.sleep(PAUSE)
        left = others


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Claim the work whose result will lie at a path; a process that dies lets go of its claims.

    Args:
        path: of the result.
        wait: until nobody else has it.

    Yields:
        Whether this process is to do it: nobody else does, and it is not done.
    """
    lock = path.with_name(f"{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield not path.exists()
