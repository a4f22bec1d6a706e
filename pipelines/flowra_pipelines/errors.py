"""The error a user sees as one line."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Something the user can put right: shown as one line without a traceback, exit code 2."""
