"""Files that belong together are written whole, or not at all.

This file is the same in every package of Flowra (docs/decisions, 0008).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Give a temporary name beside each path to write to, and rename them all at the end of the ``with`` block.

    If the block or a renaming fails, what is left under a temporary name is removed. An older file keeps its content
    until every new one is complete. The last of several is what readers look for: its older one is removed before the
    first is renamed, so a kill in between leaves what nobody reads, and never files of two writes.

    Yields:
        The temporary names, in the order of the paths.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    partials = [path.with_name(f"{path.name}.partial") for path in paths]
    try:
        yield partials
        for path in paths[1:][-1:]:
            path.unlink(missing_ok=True)
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
