"""Whether somebody watches, and text from data on a terminal, which obeys control characters."""

from __future__ import annotations

from typing import Any


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; sys.stdout and sys.stderr may be None, or whatever a host has put there."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty())


def printable(text: str, keep: str = "") -> str:
    """The text with a replacement character for each that is not printable and not among `keep`.

    >>> printable("red \\x1b[31m")
    'red \\ufffd[31m'
    """
    return "".join(letter if letter.isprintable() or letter in keep else "\ufffd" for letter in text)
