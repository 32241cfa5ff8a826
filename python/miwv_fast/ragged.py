"""Rows of different lengths in one array, and how such an array grows."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """N rows of int32 in one array: row i is `values[offsets[i]:offsets[i + 1]]`.

    `values` int32 [M] or [M, 2], `offsets` int64 [N + 1].
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """A view of one row."""
        view: np.ndarray = self.values[self.offsets[row] : self.offsets[row + 1]]
        return view

    def part(self, begin: int, end: int) -> Ragged:
        """The rows from `begin` up to `end`."""
        first, last = self.offsets[[begin, end]]
        return Ragged(self.values[first:last], self.offsets[begin : end + 1] - first)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """The row of each value, int64 [M]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """For each row the sum of `values` int64 [M], one for each of its own, int64 [N]."""
        total = np.concatenate([[0], np.cumsum(values)])
        sums: np.ndarray = total[self.offsets[1:]] - total[self.offsets[:-1]]
        return sums

    def followed_by(self, rows: Iterable[np.ndarray]) -> Ragged:
        """These rows and more, which are held one at a time; itself where there are no more."""
        values = array("i")
        lengths: list[int] = []
        for row in rows:
            if not lengths and len(self.values):
                values.frombytes(self.values.data.cast("B"))
            values.frombytes(row.astype(np.int32, copy=False).tobytes())
            lengths.append(len(row))
        if not lengths:
            return self
        more = self.offsets[-1] + np.cumsum(lengths, dtype=np.int64)
        return Ragged(np.frombuffer(values, np.int32), np.append(self.offsets, more))

    @staticmethod
    def join(rows: Sequence[np.ndarray]) -> Ragged:
        """One row after the other."""
        values = np.concatenate([np.empty(0, np.int32), *rows])
        return Ragged(values, np.cumsum([0, *map(len, rows)], dtype=np.int64))


class GrowingRagged:
    """A Ragged of N rows that is filled from the first row to the last; rows that are left out are empty.

    It grows in place, so that it never lies in memory twice.
    """

    def __init__(self, rows: int, columns: int | None = None) -> None:
        self._values = array("i")
        self._lengths = np.zeros(rows, np.int64)
        self._columns = columns

    def append(self, rows: np.ndarray, values: Ragged) -> None:
        """Fills these rows, int64 ascending and behind all that were filled before."""
        self._values.frombytes(np.ascontiguousarray(values.values, np.int32).data.cast("B"))
        self._lengths[rows] = values.lengths

    def finish(self) -> Ragged:
        """All rows. Nothing can be appended any more."""
        values = np.frombuffer(self._values, np.int32) if self._values else np.empty(0, np.int32)
        if self._columns is not None:
            values = values.reshape(-1, self._columns)
        return Ragged(values, np.concatenate([[0], np.cumsum(self._lengths)]))
