"""Instruction records: four shapes of data become one form, and nothing that came in is lost."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miwv_fast.formats import Row
from miwv_fast.rejections import Rejection, Rejections
from miwv_fast.sources import Source

# Characters of a malformed row that its rejection keeps; the row itself stays where it came from.
_KEPT_CHARACTERS = 1 << 16
_BATCH_RECORDS = 8192
_BATCH_CHARACTERS = 1 << 26

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class MalformedRecord(ValueError):
    """A row that is not an instruction record; the message says why."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One instruction, the input that belongs to it (often empty), and the response to be scored."""

    instruction: str
    input: str
    response: str

    @property
    def prompt(self) -> str:
        """The instruction, and the input on a line of its own where there is one."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True, slots=True)
class Record:
    """A record in the one form that the rest of the package knows: a system text and one or more turns."""

    index: int
    id: str | None
    system: str
    turns: tuple[Turn, ...]

    @property
    def embedded_text(self) -> str:
        """What the neighbour search compares: instruction and input, or all user turns, joined by newlines."""
        return "\n".join(turn.prompt for turn in self.turns)


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
        batches = self._batches
        starts = np.cumsum([0, *(len(batch) for batch in batches)])
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

    @property
    def status(self) -> pa.ChunkedArray:
        """For each record null if it can be scored, otherwise `malformed`, `empty_instruction` or `empty_response`."""
        return self.table["status"].cast(pa.string())

    def ids(self) -> pa.ChunkedArray:
        """The records' own ids, null where a record has none."""
        return self.table["id"]

    def embedded_texts(self, wanted: np.ndarray) -> pa.ChunkedArray:
        """`Record.embedded_text` of each record as large_string [N], null where `wanted`, bool [N], is not set."""
        begins = np.cumsum([0, *(len(batch) for batch in self._batches)])
        arrays = [
            pc.if_else(
                pa.array(wanted[begin : begin + len(batch)]), _embedded_texts(batch), pa.scalar(None, pa.string())
            )
            for begin, batch in zip(begins.tolist(), self._batches, strict=False)
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
            record, status = Record(index, None, "", ()), "malformed"
            rejections.append(Rejection(index, row.location, str(error), _shorten(row.text(), _KEPT_CHARACTERS)))
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


def parse_record(value: object, index: int = 0) -> Record:
    """Reads one record of any of the four shapes, recognised by its keys.

    Shapes: Alpaca (`instruction`, `input`, `output`), `prompt` with `completion` or `response`, OpenAI
    `messages`, ShareGPT `conversations`. Raises MalformedRecord (a ValueError) that says what is wrong.

    >>> parse_record({"instruction": "Add.", "input": "1 and 2", "output": "3"}).turns
    (Turn(instruction='Add.', input='1 and 2', response='3'),)
    """
    if not isinstance(value, Mapping):
        raise MalformedRecord(f"a record is an object with named fields, this is {_describe(value)}")
    record_id = _own_id(value.get("id"))
    shape = recognize(value)
    if shape == "messages":
        system, turns = _read_conversation(value["messages"], "messages", "role", "content")
    elif shape == "conversations":
        system, turns = _read_conversation(value["conversations"], "conversations", "from", "value")
        system = system or _text(value, "system")
    elif shape == "output":
        system, turns = "", (Turn(_text(value, "instruction"), _text(value, "input"), _text(value, "output")),)
    elif shape is not None:
        system, turns = "", (Turn(_text(value, "prompt"), "", _text(value, shape)),)
    else:
        keys = ", ".join(_shorten(_printable(str(key)), 40) for key in list(value)[:8]) or "none"
        raise MalformedRecord(
            "its fields name no known shape; expected instruction and output, prompt and completion or response, "
            f"messages, or conversations, found: {keys}"
        )
    return Record(index, record_id, system, turns)


# By the field that holds what is scored, with the field beside it that the shape needs; the first that fits counts.
_SHAPES = {
    "messages": "messages",
    "conversations": "conversations",
    "output": "instruction",
    "completion": "prompt",
    "response": "prompt",
}


def recognize(value: Mapping[str, Any]) -> str | None:
    """A record's shape, named by the field that holds what is scored; None if it has none of the four.

    Fields without a value count where no shape has all of its own: a table of several shapes has nulls.

    >>> recognize({"prompt": "Hi", "response": "Hello"}), recognize({"text": "Hi"})
    ('response', None)
    """
    present = {key for key, item in value.items() if item is not None}
    for known in (present, value.keys() - {"messages", "conversations"}):
        for shape, beside in _SHAPES.items():
            if shape in known and beside in known:
                return shape
    return None


def _read_row(index: int, row: Row) -> Record:
    if row.error is not None:
        raise MalformedRecord(row.error)
    return parse_record(row.value, index)


def _own_id(value: object) -> str | None:
    if not isinstance(value, str | Integral):
        return None
    try:
        text = str(value)
    except ValueError as error:
        raise MalformedRecord(f"'id' cannot be written: {error}") from None
    _check_text("id", text)
    return text


def _emptiness(record: Record) -> str | None:
    if not any(turn.instruction.strip() for turn in record.turns):
        return "empty_instruction"
    if not any(turn.response.strip() for turn in record.turns):
        return "empty_response"
    return None


def _read_conversation(messages: object, name: str, role_key: str, text_key: str) -> tuple[str, tuple[Turn, ...]]:
    """Everything up to the last assistant turn, as a system text and pairs of user and assistant text."""
    if not isinstance(messages, Iterable) or isinstance(messages, str | bytes | Mapping):
        raise MalformedRecord(f"{name!r} should be a list of messages, it is {_describe(messages)}")
    try:
        messages = list(messages)
    except TypeError:  # an array without dimensions
        raise MalformedRecord(f"{name!r} should be a list of messages, it is {_describe(messages)}") from None
    system, turns, user = "", [], None
    for position, message in enumerate(messages):
        where = f"{name}[{position}]"
        if not isinstance(message, Mapping):
            raise MalformedRecord(f"{where} should be an object, it is {_describe(message)}")
        said = message.get(role_key)
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise MalformedRecord(f"{where} has {role_key} {_show(said)}; known are {', '.join(_ROLES)}")
        text = _content(message, text_key, where)
        if role == "system":
            if position:
                raise MalformedRecord(f"{where}: a system message may only come first")
            system = text
        elif role == "user":
            if user is not None:
                raise MalformedRecord(f"{where}: two user messages in a row")
            user = text
        else:
            if user is None:
                raise MalformedRecord(f"{where}: an assistant message that follows no user message")
            turns.append(Turn(user, "", text))
            user = None
    if not turns:
        if user is None:
            raise MalformedRecord(f"{name!r} has no user message")
        turns.append(Turn(user, "", ""))
    return system, tuple(turns)


def _content(message: Mapping[str, Any], key: str, where: str) -> str:
    """A message's text; OpenAI's list of parts is joined where all parts are text."""
    content = message.get(key)
    if not isinstance(content, list):
        return _text(message, key, where)
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind != "text":
            raise MalformedRecord(f"{where}: only text can be scored, found a part that is {_describe(part)}")
        parts.append(_text(part, "text", where))
    return "".join(parts)


def _text(value: Mapping[str, Any], key: str, where: str = "") -> str:
    text = value.get(key)
    name = f"{where}.{key}" if where else key
    if text is None:
        return ""
    if not isinstance(text, str):
        raise MalformedRecord(f"{name!r} should be text, it is {_describe(text)}")
    _check_text(name, text)
    return text


def _check_text(name: str, text: str) -> None:
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


def _describe(value: object) -> str:
    return f"{type(value).__name__} {_show(value)}"


def _show(value: object) -> str:
    try:
        return _shorten(_printable(_SHORT.repr(value)), 60)
    except ValueError:  # an int of more digits than Python writes
        return "of very many digits"


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _shorten(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 3] + "..."
