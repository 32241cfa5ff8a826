"""Exceptions that mean something to callers; everything else is a ValueError, TypeError or OSError."""


class Interrupted(RuntimeError):
    """A run was asked to stop; what is finished is on disk, and the same call goes on."""
