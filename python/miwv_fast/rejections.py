"""Rows that could not be read as records: what was wrong with each, kept as bytes, whatever their number."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Rejection:
    """A row that could not be read as a record: where it stood, what was wrong, and the row itself."""

    index: int
    location: str
    reason: str
    row: str


class Rejections:
    """A list of Rejections that only grows, without a Python object for each."""

    def __init__(self, rejections: Iterable[Rejection] = ()) -> None:
        self._index = array("q")
        self._ends = array("q", [0])
        self._text = bytearray()
        for rejection in rejections:
            self.append(rejection)

    def append(self, rejection: Rejection) -> None:
        """Adds one at the end."""
        self._index.append(rejection.index)
        for text in (rejection.location, rejection.reason, rejection.row):
            # A file's name need not be Unicode.
            self._text += text.encode(errors="surrogatepass")
            self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Rejection]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> Rejection:
        if not 0 <= place < len(self):
            raise IndexError(place)
        ends = self._ends[3 * place : 3 * place + 4]
        texts = (self._text[ends[part] : ends[part + 1]].decode(errors="surrogatepass") for part in range(3))
        return Rejection(self._index[place], *texts)
