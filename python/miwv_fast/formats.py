"""Rows from the bytes of a file: JSON lines, a JSON array, CSV and Parquet, packed or not, in bounded memory."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc

from miwv_fast.json_array import read_json_array
from miwv_fast.unpack import BLOCK_BYTES, MAX_RECORD_BYTES, open_file, split_suffixes

_SHOWN = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it came: where it stood, and its value or, with `error`, its text and why it has no value."""

    location: str
    value: Any
    error: str | None = None

    def text(self) -> str:
        """The row for a list of rejected rows: its own text, or JSON of its value."""
        if isinstance(self.value, str):
            return self.value.encode(errors="backslashreplace").decode()
        try:
            return json.dumps(self.value, default=repr)
        except (TypeError, ValueError, RecursionError) as error:
            return f"{type(self.value).__name__} that cannot be written as JSON: {error}"


def read_file(path: Path) -> Iterator[Row]:
    """Every row of a file, in order, whatever its format.

    A line, an element of a JSON array or a row of CSV may have 64 MiB. A longer line of JSONL is a row with an error;
    elsewhere it is a ValueError, since the next row cannot be found. So is a packed file that unpacks to more than 1
    GiB and more than 200 times its size. Where a JSON object has a key twice, the last one counts, as everywhere.
    """
    kind, compression = split_suffixes(path)
    if kind == ".parquet":
        yield from _read_parquet(path, compression)
        return
    is_array = _check_beginning(path, compression) == b"["
    with open_file(path, compression) as stream:
        if kind == ".csv":
            yield from _read_csv(path, stream)
        elif is_array:
            for number, value in enumerate(read_json_array(path, stream)):
                yield Row(f"{path}[{number}]", value)
        else:
            yield from _read_json_lines(path, stream)


def _check_beginning(path: Path, compression: str) -> bytes:
    """The first byte that is neither byte order mark nor blank."""
    with open_file(path, compression) as stream:
        block = stream.read(4096)
        if block.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{path} is UTF-16; text is read as UTF-8: convert it first")
        block = block.removeprefix(b"\xef\xbb\xbf").lstrip()
        while not block and (more := stream.read(BLOCK_BYTES)):
            block = more.lstrip()
    return block[:1]


def _read_json_lines(path: Path, stream: BinaryIO) -> Iterator[Row]:
    number = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        location = f"{path}:{number}"
        if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
            yield Row(location, _shown(line), f"the line has more than {MAX_RECORD_BYTES} bytes")
            while (rest := stream.readline(BLOCK_BYTES)) and not rest.endswith(b"\n"):
                pass
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        line = line.rstrip(b"\r\n")
        if not line.strip():
            continue
        try:
            yield Row(location, json.loads(line.decode()))
        except UnicodeDecodeError as error:
            yield Row(location, line.decode(errors="backslashreplace"), f"not UTF-8 at byte {error.start} of the line")
        except json.JSONDecodeError as error:
            goes_on = error.pos == len(error.doc)
            hint = ", the end of the line; a file has a record on each line, or is an array of records"
            yield Row(location, line.decode(), f"not JSON: {error.msg} at column {error.colno}{hint * goes_on}")
        except (ValueError, RecursionError) as error:
            yield Row(location, line.decode(), f"not readable JSON: {error}")


def _shown(line: bytes) -> str:
    return line[:_SHOWN].decode(errors="backslashreplace") + "..."


def _read_csv(path: Path, stream: BinaryIO) -> Iterator[Row]:
    # Python's reader and not pyarrow's: it goes on after a bad row and says on which line it stood. Its own limit of
    # a field is one for the whole process and must not be what stops a row here.
    csv.field_size_limit(max(csv.field_size_limit(), 2 * MAX_RECORD_BYTES))
    # Bytes that are not UTF-8 become lone surrogates, which reject their own row and no other.
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        lines = _CsvLines(path, text)
        reader = csv.reader(lines)
        header: list[str] | None = []
        while header == []:  # blank lines
            lines.begin_row()
            try:
                header = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{path}: the header is not CSV: {error}") from error
        if header is None:
            return
        if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
            raise ValueError(f"{path}: the header is one column, {header[0][:80]!r}; separate columns by commas")
        twice = sorted({name for name in header if name and header.count(name) > 1})
        if twice:
            raise ValueError(f"{path}: the header names {twice[0]!r} twice")
        while True:
            lines.begin_row()
            location = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Row(location, "", f"not CSV: {error}")
                continue
            if cells is None:
                return
            if len(cells) == len(header):
                yield Row(location, dict(zip(header, cells, strict=True)))
            elif cells:
                yield Row(location, ",".join(cells), f"{len(cells)} columns where the header has {len(header)}")


class _CsvLines:
    """Lines of a CSV file, as many as a row may have."""

    def __init__(self, path: Path, text: io.TextIOWrapper) -> None:
        self._path = path
        self._text = text
        self._number = 0
        self.begin_row()

    def begin_row(self) -> None:
        self._first, self._length = self._number + 1, 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_RECORD_BYTES + 1 - self._length)
        self._number += 1
        self._length += len(line)
        if self._length > MAX_RECORD_BYTES:
            raise ValueError(
                f"{self._path}:{self._first}: the row that begins here has more than {MAX_RECORD_BYTES} characters; "
                "is there a quote that is never closed?"
            )
        if not line:
            if self._length:
                raise ValueError(f"{self._path}:{self._first}: in the row that begins here a quote is never closed")
            raise StopIteration
        return line


def _read_parquet(path: Path, compression: str) -> Iterator[Row]:
    import pyarrow.parquet as pq

    if compression:
        raise ValueError(f"{path}: Parquet has its own compression; unpack the file first")
    number = 0
    with pq.ParquetFile(path, read_dictionary=_text_leaves(path)) as file:
        names = file.schema_arrow.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{path} has two columns {twice[0]!r}")
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        widest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
        for batch in file.iter_batches(batch_size=max(1, min(1024, MAX_RECORD_BYTES // max(1, widest)))):
            for value, error in read_batch(batch):
                yield Row(f"{path} row {number}", value, error)
                number += 1


def read_batch(batch: pa.RecordBatch) -> Iterator[tuple[Any, str | None]]:
    """The rows of a batch as dicts, each with why it has no value, or None."""
    for part in _parts(batch):
        if _unpacked_bytes(part) > MAX_RECORD_BYTES:
            yield "", f"the record expands to more than {MAX_RECORD_BYTES} bytes"
        else:
            yield from _read_part(part)


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch whole, or halved until what it expands to, or a single row of it, is no more than a record may be.

    A text stands in a batch once, however often it occurs; as Python objects its rows may take far more.
    """
    if len(batch) <= 1 or _unpacked_bytes(batch) <= MAX_RECORD_BYTES:
        yield batch
    else:
        half = len(batch) // 2
        yield from _parts(batch.slice(0, half))
        yield from _parts(batch.slice(half))


def _text_leaves(path: Path) -> list[str]:
    """The columns of text, nested ones included, by the paths that Parquet knows them by."""
    import pyarrow.parquet as pq

    schema = pq.read_metadata(path).schema
    leaves = (schema.column(place) for place in range(len(schema)))
    return [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]


def _unpacked_bytes(array: pa.Array | pa.RecordBatch) -> int:
    """What the texts of an array take when each stands by itself."""
    if isinstance(array, pa.RecordBatch):
        return sum(_unpacked_bytes(column) for column in array.columns)
    kind = array.type
    if pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type):
        return int(pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(_unpacked_bytes(field) for field in array.flatten())
    if pa.types.is_map(kind):
        begin, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return sum(_unpacked_bytes(part.slice(begin, end - begin)) for part in (array.keys, array.items))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _unpacked_bytes(array.flatten())
    return int(array.nbytes)


def _read_part(batch: pa.RecordBatch) -> Iterator[tuple[Any, str | None]]:
    try:
        rows = batch.to_pylist()
    except Exception:  # what a value of an odd type raises, from zoneinfo to decimal, is nowhere listed
        pass
    else:
        yield from ((row, None) for row in rows)
        return
    for place in range(len(batch)):
        row, error = {}, None
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                row[name] = _read_value(column[place])
            except Exception as reason:
                error = f"column {name!r} cannot be read: {reason}"
        yield row, error


def _read_value(scalar: pa.Scalar) -> Any:
    """The value in Python; a time that Python does not know, for its year or zone, as the number that it is."""
    try:
        return scalar.as_py()
    except Exception:
        if not pa.types.is_temporal(scalar.type):
            raise
        return cast(Any, scalar).value
