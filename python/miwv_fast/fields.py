"""Texts and lists out of a record's fields, what counts as empty, and values as a message shows them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any


class MalformedRecord(ValueError):
    """A row that is not an instruction record; the message says why."""


def is_list(value: object) -> bool:
    """Whether a value is a list, or an array or tuple in its place."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def as_list(value: Any, name: str, what: str) -> list[Any]:
    """A list of `what`; MalformedRecord, naming the place, where it is none."""
    try:
        if is_list(value):
            return list(value)
    except TypeError:  # an array without dimensions
        pass
    raise MalformedRecord(f"{name!r} should be a list of {what}, it is {describe(value)}")


def read_text(value: Mapping[str, Any], key: str, where: str = "") -> str:
    """The text of a field, empty where it has no value; MalformedRecord where it is no text."""
    text = value.get(key)
    name = f"{where}.{key}" if where else key
    if is_null(text):
        return ""
    if not isinstance(text, str):
        raise MalformedRecord(f"{name!r} should be text, it is {describe(text)}")
    check_text(name, text)
    return text


def is_null(value: object) -> bool:
    """Whether a field has no value: None, or NaN, which pandas puts into an empty cell."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: object) -> bool:
    """Whether a field has no value or an empty text, as an empty field of a CSV file has."""
    return is_null(value) or (isinstance(value, str) and not value)


def check_text(name: str, text: str) -> None:
    """Raises MalformedRecord for text that cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Bytes that a reader could not decode stand as U+DC80 to U+DCFF.
        escaped = "\udc80" <= text[error.start] <= "\udcff"
        what = "bytes that are not UTF-8, or a lone surrogate" if escaped else "a lone surrogate"
        raise MalformedRecord(f"{name!r} is not valid Unicode at character {error.start}: {what}") from None


# A message about a value must not fail, or grow, by its size or depth.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 50, 50, 50


def describe(value: object) -> str:
    """A value's type, and the value itself, shortened."""
    return f"{type(value).__name__} {show(value)}"


def show(value: object) -> str:
    """A value, shortened, in characters that can be written."""
    try:
        return shorten(_printable(_SHORT.repr(value)), 60)
    except ValueError:  # an int of more digits than Python writes
        return "of very many digits"


def name_fields(value: Mapping[Any, Any]) -> str:
    """The names of an object's first eight fields."""
    return ", ".join(shorten(_printable(str(key)), 40) for key in list(value)[:8]) or "none"


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def shorten(text: str, characters: int) -> str:
    """The text, or as much of its beginning as leaves room for three dots."""
    return text if len(text) <= characters else text[: characters - 3] + "..."
