"""All records of a run, read from their source: nothing that came in is lost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miwv_fast.fields import MalformedRecord, shorten
from miwv_fast.formats import Row
from miwv_fast.rejections import Rejection, Rejections
from miwv_fast.shapes import Record, Turn, parse_record, read_id
from miwv_fast.sources import Source

# Characters of a malformed row that its rejection keeps; the row itself stays where it came from.
_KEPT_CHARACTERS = 1 << 16
_BATCH_RECORDS = 8192
_BATCH_CHARACTERS = 1 << 26

_NOTHING = Record(-1, None, "", ())


@dataclass(frozen=True)
class Records:
    """All records of a run, held as Arrow columns (text size, no Python objects), in input order.

    `records[i]` builds the `Record`; a malformed one has no turns.
    """

    table: pa.Table
    rejections: Rejections = field(default_factory=Rejections)
    texts: str = ""  # SHA-256 as `TextDigest` gives it

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Record:
        return self.take(np.array([index]))[0]

    def take(self, numbers: np.ndarray) -> list[Record]:
        """The records of these numbers, int64 [M], in this order: `records[i]` of each, in a fraction of the time."""
        batches, starts = self._batches, self._starts
        place = np.searchsorted(starts, numbers, side="right") - 1
        taken: list[Record] = [_NOTHING] * len(numbers)
        for which in np.unique(place):
            chosen = np.flatnonzero(place == which)
            rows = batches[which].take(pa.array(numbers[chosen] - starts[which]))
            for number, record in zip(chosen.tolist(), _unpack(rows, numbers[chosen]), strict=True):
                taken[number] = record
        return taken

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return list(self.table.to_batches())

    @cached_property
    def _starts(self) -> np.ndarray:
        """The number of each batch's first record, and that of all, int64."""
        return np.cumsum([0, *(len(batch) for batch in self._batches)])

    @property
    def status(self) -> pa.ChunkedArray:
        """For each record null if it can be scored, otherwise `malformed`, `empty_instruction` or `empty_response`."""
        return self.table["status"].cast(pa.string())

    def embedded_texts(self, wanted: np.ndarray) -> pa.ChunkedArray:
        """`Record.embedded_text` of each record as large_string [N], null where `wanted`, bool [N], is not set."""
        nothing = pa.scalar(None, pa.string())
        arrays = [
            pc.if_else(pa.array(wanted[begin:end]), _embedded_texts(batch), nothing)
            for (begin, end), batch in zip(pairwise(self._starts.tolist()), self._batches, strict=True)
        ]
        return pa.chunked_array(arrays, pa.string()).cast(pa.large_string())


def _embedded_texts(batch: pa.RecordBatch) -> pa.StringArray:
    """`Record.embedded_text` of each record."""
    instruction, input, _ = batch["turns"].flatten().flatten()
    both = pc.binary_join_element_wise(instruction, input, "\n")
    prompts = pc.if_else(pc.equal(input, ""), instruction, both)
    ends = np.cumsum([0, *batch["turns"].value_lengths().to_pylist()])
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), prompts), "\n")


def _unpack(batch: pa.RecordBatch, numbers: np.ndarray) -> Iterator[Record]:
    ids, systems = (batch[name].to_numpy(zero_copy_only=False).tolist() for name in ("id", "system"))
    texts = (field.to_numpy(zero_copy_only=False).tolist() for field in batch["turns"].flatten().flatten())
    turns = list(map(Turn, *texts))
    ends = np.cumsum(batch["turns"].value_lengths().to_numpy()).tolist()
    begin = 0
    for number, record_id, system, end in zip(numbers.tolist(), ids, systems, ends, strict=True):
        yield Record(number, record_id, system, tuple(turns[begin:end]))
        begin = end


_TURN = pa.struct([("instruction", pa.string()), ("input", pa.string()), ("response", pa.string())])
_STATUS = pa.dictionary(pa.int8(), pa.string())
_SCHEMA = pa.schema([("id", pa.string()), ("system", pa.string()), ("turns", pa.list_(_TURN)), ("status", _STATUS)])


def read_records(source: Source) -> Records:
    """Reads every row of a source; rows that are no records are kept as `malformed`, with the reason.

    Of a malformed row's text its rejection keeps 65,536 characters. Raises ValueError if the source has no rows at all
    or none of them is a record.
    """
    rejections, texts = Rejections(), TextDigest()
    table = pa.Table.from_batches(_read_batches(source, rejections, texts), schema=_SCHEMA)
    if not len(table):
        raise ValueError(f"{source.name} has no records")
    if len(rejections) == len(table):
        first = rejections[0]
        raise ValueError(f"{source.name} has no readable record; {first.location}: {first.reason}")
    return Records(table, rejections, texts.sha256())


class TextDigest:
    """Tells whether rows hold the texts that were scored, however they are written and whatever lies beside them."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, row: Row) -> None:
        """The next row; one that is no record counts as such, whatever it holds."""
        try:
            self.add_record(_read_row(0, row))
        except MalformedRecord:
            self.add_record(_NOTHING)

    def add_record(self, record: Record) -> None:
        """The next row, as a record."""
        turns = (text for turn in record.turns for text in (turn.instruction, turn.input, turn.response))
        texts = (record.system, *turns)
        self._digest.update(repr(list(map(len, texts))).encode() + "".join(texts).encode())

    def sha256(self) -> str:
        """Of all rows so far, hexadecimal."""
        return self._digest.hexdigest()


def _read_batches(source: Source, rejections: Rejections, texts: TextDigest) -> Iterator[pa.RecordBatch]:
    pending: list[tuple[Record, str | None]] = []
    size = 0
    for index, row in enumerate(source.rows()):
        try:
            record = _read_row(index, row)
            status = _emptiness(record)
        except MalformedRecord as error:
            record, status = Record(index, read_id(row.value), "", ()), "malformed"
            rejections.append(Rejection(index, row.location, str(error), shorten(row.text(), _KEPT_CHARACTERS)))
        texts.add_record(record)
        pending.append((record, status))
        size += len(record.id or "") + len(record.system)
        size += sum(len(turn.instruction) + len(turn.input) + len(turn.response) for turn in record.turns)
        if len(pending) == _BATCH_RECORDS or size > _BATCH_CHARACTERS:
            yield _pack(pending)
            pending, size = [], 0
    if pending:
        yield _pack(pending)


def _pack(records: list[tuple[Record, str | None]]) -> pa.RecordBatch:
    turns = [turn for record, _ in records for turn in record.turns]
    texts = [pa.array([getattr(turn, name) for turn in turns], pa.string()) for name in _TURN.names]
    ends = np.cumsum([0, *(len(record.turns) for record, _ in records)])
    columns = [
        pa.array([record.id for record, _ in records], pa.string()),
        pa.array([record.system for record, _ in records], pa.string()),
        pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.StructArray.from_arrays(texts, fields=list(_TURN))),
        pa.array([status for _, status in records], _STATUS),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _read_row(index: int, row: Row) -> Record:
    if row.error is not None:
        raise MalformedRecord(row.error)
    return parse_record(row.value, index)


def _emptiness(record: Record) -> str | None:
    if not any(turn.instruction.strip() for turn in record.turns):
        return "empty_instruction"
    if not any(turn.response.strip() for turn in record.turns):
        return "empty_response"
    return None
