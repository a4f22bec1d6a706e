"""Processes that are given the same folder share its work: each piece is done by whoever claims it first."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["claimed"]


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
