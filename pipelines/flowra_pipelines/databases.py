"""Databases that are not there yet: made elsewhere, then put in their place whole.

MLflow and Prefect make theirs step by step in the place itself. A run killed meanwhile, or two begun at once, can leave
a file there that no later run can use. One that is finished elsewhere and then linked to its name is there whole or not
at all, and of several runs the first one's stays.
"""

import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from uuid import uuid4

__all__ = ["put_database", "sqlite_file"]


def sqlite_file(url: str) -> Path | None:
    """Return the file that a database's URL names; None for a server, for memory, and for a URL with options."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///(?!:memory:|file:)([^?]+)", url)
    return None if found is None else Path(found[1])


def put_database(made: Path, path: Path) -> None:
    """Put a finished sqlite database in its place; a file that is there by now stays as it is.

    Args:
        made: the database, which nobody writes to any more.
        path: its place; missing folders are made.

    Raises:
        OSError: if the place cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    partial.touch()
    try:
        with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(partial)) as target:
            source.backup(target)
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
