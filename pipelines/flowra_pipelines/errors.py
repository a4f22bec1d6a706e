"""The error a user sees as one line, and others that are the user's to put right, told as one."""

import errno
from collections.abc import Iterator

__all__ = ["UserError", "explain"]

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How libraries that are not Python say it: safetensors with the number of the system's error, sqlite in words.
NO_ROOM_WORDS = (*(f"(os error {number})" for number in sorted(NO_ROOM)), "database or disk is full", "disk I/O error")


class UserError(ValueError):
    """Something the user can put right: shown as one line without a traceback, exit code 2."""


def explain(error: BaseException) -> str | None:
    """Tell in one line what went wrong, if it is the user's or the machine's to put right.

    Args:
        error: that ended a command; what caused it is looked at, too.

    Returns:
        The line, or None for a mistake of our own, which deserves its traceback.
    """
    for each in _chain(error):
        if isinstance(each, UserError):
            return str(each)
        if (isinstance(each, OSError) and each.errno in NO_ROOM) or any(word in str(each) for word in NO_ROOM_WORDS):
            return (
                f"disk must have room for the artifacts, got {_first_line(each)}."
                " Nothing half-written was left. Free some space; the same command continues the run."
            )
        if isinstance(each, PermissionError | FileExistsError | NotADirectoryError | IsADirectoryError):
            return f"folder must be one that can be written to, got {_first_line(each)}. See `output_root`."
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
