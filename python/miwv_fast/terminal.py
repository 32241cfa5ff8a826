"""Text from data on a terminal, which obeys control characters."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """The text with a replacement character for each that is not printable and not among `keep`.

    >>> printable("red \\x1b[31m")
    'red \\ufffd[31m'
    """
    return "".join(letter if letter.isprintable() or letter in keep else "\ufffd" for letter in text)
