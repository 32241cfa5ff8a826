"""Terminals: whether a stream is one, and messages and text from data there, where control characters are obeyed."""

from __future__ import annotations

import logging
import sys
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


class Messages(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stderr is at the moment: a progress bar puts itself there to stay below what is written."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")
