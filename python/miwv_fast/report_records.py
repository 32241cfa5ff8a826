"""What the report tells of the data itself: the text of chosen records, and the field that groups them."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from miwv_fast.fields import MalformedRecord
from miwv_fast.formats import Row
from miwv_fast.shapes import PAIRS, SYSTEM_FIELDS, parse_record

MAX_GROUPS = 30
# Of each text, and of all turns of a record together.
_TEXT_CHARACTERS = 2000
_RECORD_CHARACTERS = 6000
_VALUE_CHARACTERS = 60
_TEXT_FIELDS = {"id", "text", *SYSTEM_FIELDS}.union(*(pair.fields for pair in PAIRS))
_UNSAFE = re.compile("[<>&\u2028\u2029]")
_LIKELY_FIELDS = ("source", "category", "dataset", "task", "type", "topic", "domain", "language")


@dataclass(frozen=True)
class Grouping:
    """A field of the data: its values, and for each record the place of its value among them, uint8 [N]."""

    name: str
    values: list[str]
    codes: np.ndarray


def page_json(value: object) -> str:
    """JSON that stays data wherever it stands in HTML: no `<`, `>` or `&`, no line ends that only JavaScript knows.

    A lone surrogate is left as it is, for `errors="backslashreplace"` turns it into the JSON escape of itself.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def describe_record(row: Row) -> dict[str, Any]:
    """A record for the page: `turns`, pairs of prompt and response, each text cut to 2,000 characters.

    A row that is no record has its own text under `raw` and under `reason` why.
    """
    try:
        if row.error is not None:
            raise MalformedRecord(row.error)
        record = parse_record(row.value)
    except MalformedRecord as error:
        return {"raw": _cut(row.text()), "reason": str(error)}
    left = _RECORD_CHARACTERS
    turns: list[list[str]] = []
    for turn in record.turns:
        pair = [_cut(turn.prompt), _cut(turn.response)]
        left -= len(pair[0]) + len(pair[1])
        if turns and left < 0:
            turns.append([f"… {len(record.turns) - len(turns)} more turns", ""])
            break
        turns.append(pair)
    described: dict[str, Any] = {"turns": turns}
    if record.id is not None:
        described["id"] = record.id[:_VALUE_CHARACTERS]
    if record.system:
        described["system"] = _cut(record.system)
    return described


def take_within(records: Iterable[Sequence[int]], described: Mapping[int, Any], budget: int) -> dict[str, Any]:
    """The described records of each group of numbers in turn, until their JSON would exceed `budget` bytes."""
    taken: dict[str, Any] = {}
    for numbers in records:
        new = {str(n): described[n] for n in numbers if n in described and str(n) not in taken}
        budget -= len(page_json(new).encode(errors="backslashreplace"))
        if budget < 0:
            break
        taken |= new
    return taken


class FieldFinder:
    """Looks at one record after the other for a field that groups them.

    Without a `name` it looks for strings of 2 to 30 distinct values that at least half of the records have, those
    called source, category, dataset and the like first. A named field may hold anything; of more than 30 values the
    most frequent are kept apart and the others make up one group.
    """

    def __init__(self, name: str | None = None) -> None:
        self._name = name
        self._values: dict[str, dict[str, int]] = {}
        self._records: dict[str, array[int]] = {}  # that have the field, and the codes of their values
        self._codes: dict[str, array[int]] = {}
        self._dropped: set[str] = set()
        self._seen: dict[str, None] = {}
        self._count = 0

    def add(self, value: object) -> None:
        """The next record, whatever it is."""
        items = value.items() if isinstance(value, Mapping) else ()
        for key, item in items:
            if item is not None and isinstance(key, str):
                self._note(key, item)
        self._count += 1

    def _note(self, key: str, item: object) -> None:
        if self._name is not None:
            self._seen.setdefault(key)
            if key != self._name:
                return
            item = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False, default=str)
        elif key in self._dropped or key in _TEXT_FIELDS:
            return
        elif not isinstance(item, str) or len(item) > _VALUE_CHARACTERS:
            return self._drop(key)
        values = self._values.setdefault(key, {})
        code = values.setdefault(item, len(values))
        if self._name is None and len(values) > MAX_GROUPS:
            return self._drop(key)
        self._records.setdefault(key, array("q")).append(self._count)
        self._codes.setdefault(key, array("i")).append(code)

    def _drop(self, key: str) -> None:
        self._dropped.add(key)
        for kept in (self._values, self._records, self._codes):
            kept.pop(key, None)

    def result(self) -> Grouping | None:
        """The field, None where there is none. Raises ValueError if the named one is in no record."""
        if self._name is not None:
            if self._name not in self._values:
                there = ", ".join(list(self._seen)[:20]) or "none"
                raise ValueError(f"no record has a field {self._name!r}; there are: {there}")
            return self._grouping(self._name)
        usable = [
            key for key, codes in self._codes.items() if len(self._values[key]) > 1 and 2 * len(codes) >= self._count
        ]
        likely = [key for key in _LIKELY_FIELDS if key in usable]
        return self._grouping((likely or usable)[0]) if usable else None

    def _grouping(self, key: str) -> Grouping:
        codes = np.full(self._count, -1, np.int64)
        codes[self._records[key]] = self._codes[key]
        names = [name[:_VALUE_CHARACTERS] for name in self._values[key]]
        frequency = np.bincount(codes[codes >= 0], minlength=len(names))
        order = np.argsort(-frequency, kind="stable")
        place = np.empty(len(names) + 1, np.int64)
        place[order] = np.minimum(np.arange(len(names)), MAX_GROUPS - 1)
        values = [names[code] for code in order[:MAX_GROUPS]]
        if len(names) > MAX_GROUPS:
            values[-1] = f"{len(names) - MAX_GROUPS + 1} other values"
        place[-1] = len(values)
        if (codes < 0).any():
            values.append("(none)")
        return Grouping(key, values, place[codes].astype(np.uint8))


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]}… ({len(text):,} characters)"
