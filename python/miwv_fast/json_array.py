"""A JSON array, element by element, of which no more is held than the element at hand and a block."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from miwv_fast.unpack import BLOCK_BYTES, MAX_RECORD_BYTES

_BLANKS = re.compile(r"[ \t\r\n]*")
_IN_NUMBERS = re.compile(r"[-+.0-9eE]*")
_JSON = json.JSONDecoder()


def read_json_array(path: Path, stream: BinaryIO) -> Iterator[Any]:
    """The elements, in order. Raises ValueError, naming file and element, where it is no array of JSON values."""
    text = _Text(path, stream)
    if not text.next_is("["):
        raise text.error("expecting '['")
    if not text.next_is("]"):
        yield text.value()
        while not text.next_is("]"):
            if not text.next_is(","):
                raise text.error("expecting ',' or ']'")
            text.element += 1
            yield text.value()
    if not text.is_over():
        raise text.error("text behind its end")


class _Text:
    """What is left of the text from some place on; `element` counts for messages."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.element = 0
        self._path = path
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._held, self._at, self._ended = "", 0, False

    def error(self, reason: str) -> ValueError:
        return ValueError(f"{self._path} is not a valid JSON array: {reason} (element {self.element}, counted from 0)")

    def next_is(self, sign: str) -> bool:
        """Whether the next sign behind blanks is this one, which is then passed."""
        self._skip_blanks()
        found = self._held.startswith(sign, self._at)
        self._at += found
        return found

    def is_over(self) -> bool:
        """Whether nothing but blanks follows."""
        self._skip_blanks()
        return self._at == len(self._held)

    def value(self) -> Any:
        """The value that stands here; more is read until it is whole."""
        self._skip_blanks()
        while True:
            reason = f"an element has more than {MAX_RECORD_BYTES} characters"
            try:
                value, end = _JSON.raw_decode(self._held, self._at)
                # A number may go on in the next block: 1 as 1e5.
                whole = _IN_NUMBERS.match(self._held, end).end() < len(self._held)  # type: ignore[union-attr]
                if end - self._at <= MAX_RECORD_BYTES and (whole or self._ended):
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                reason = error.msg
                if self._ended:
                    raise self.error(reason) from error
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from error
            if len(self._held) - self._at > MAX_RECORD_BYTES:
                raise self.error(reason)
            self._read()

    def _skip_blanks(self) -> None:
        while True:
            match = _BLANKS.match(self._held, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._held) or self._ended:
                return
            self._read()

    def _read(self) -> None:
        # As much again as is held: an element that is read in n pieces is looked at log n times.
        block = self._stream.read(max(BLOCK_BYTES, len(self._held) - self._at))
        self._ended = not block
        try:
            self._held = self._held[self._at :] + self._utf8.decode(block, self._ended)
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8: {error.reason}") from error
        self._at = 0
