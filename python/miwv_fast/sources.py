"""Where rows come from: files of several kinds, data sets, iterables; each can be read again from the start."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import pyarrow as pa

_FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
_COMPRESSIONS = (".gz", ".xz", ".zst")
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)


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
        return json.dumps(self.value, default=repr)


class Source(Protocol):
    """Rows that can be read more than once, in the same order."""

    name: str

    def rows(self) -> Iterator[Row]:
        """Every row, malformed ones included, in input order; blank lines of JSONL are not rows."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies the data in a run's manifest."""
        ...


def open_source(data: object) -> Source:
    """Recognises `data`: path(s), a Hugging Face data set or its name, a source, or an iterable of dicts.

    Raises FileNotFoundError for a missing file, ValueError for an unknown format, TypeError for anything else.
    """
    if isinstance(data, FileSource | ObjectSource):
        return data
    if isinstance(data, str | os.PathLike):
        name = os.fspath(data)
        if not os.path.exists(name) and _is_hub_name(str(name)):
            return ObjectSource(_load_from_hub(str(name)), f"data set {name}", {"data_set": str(name)})
        return FileSource([Path(name)])
    if isinstance(data, Sequence) and data and all(isinstance(item, str | os.PathLike) for item in data):
        return FileSource([Path(item) for item in data])
    if type(data).__module__.partition(".")[0] == "datasets":
        return ObjectSource(_single_split(data), "the data set", {"fingerprint": getattr(data, "_fingerprint", None)})
    if isinstance(data, Iterable) and not isinstance(data, dict | bytes):
        rows = data if isinstance(data, Sequence) else list(data)
        return ObjectSource(rows, "the data")
    raise TypeError(
        "data should be a path, a list of paths, a Hugging Face data set or its name, or an iterable of dicts; "
        f"it is {type(data).__name__}"
    )


class ObjectSource:
    """Rows that are Python objects already: a sequence of dicts or a `datasets.Dataset`."""

    def __init__(self, rows: Iterable[Any], name: str, identity: dict[str, Any] | None = None) -> None:
        self._rows = rows
        self._identity = identity
        self.name = name

    def rows(self) -> Iterator[Row]:
        """Every object as a row; its location is its number, counted from 0."""
        for number, value in enumerate(self._rows):
            yield Row(f"record {number}", value)

    def describe(self) -> dict[str, Any]:
        """The data set's name or fingerprint, or the SHA-256 of the rows written as JSON."""
        if self._identity is not None:
            return self._identity
        digest = hashlib.sha256()
        for row in self.rows():
            digest.update(row.text().encode() + b"\n")
        return {"sha256": digest.hexdigest()}


class FileSource:
    """Rows of one or more JSON, JSONL, CSV or Parquet files, compressed or not, one file after the other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(f"no such file: {path}")
            if path.is_dir():
                raise ValueError(f"{path} is a folder; give the data files in it")
            if _suffixes(path)[0] not in _FORMATS:
                known = ", ".join(_FORMATS)
                raise ValueError(
                    f"{path}: cannot tell the format from its name; known are {known}, also with .gz, .xz or .zst"
                )
        self.paths = list(paths)
        self.name = ", ".join(str(path) for path in paths)

    def rows(self) -> Iterator[Row]:
        """Every row of every file; its location is file and line, or file and row for Parquet and JSON arrays."""
        for path in self.paths:
            try:
                yield from _read_file(path)
            except PermissionError:
                raise
            except _DAMAGE as error:
                raise ValueError(f"{path} cannot be read to its end: {error}") from error

    def describe(self) -> dict[str, Any]:
        """The files' absolute paths and SHA-256."""
        return {"files": [{"path": str(path.resolve()), "sha256": _sha256(path)} for path in self.paths]}


def _read_file(path: Path) -> Iterator[Row]:
    kind, compression = _suffixes(path)
    if kind == ".parquet":
        yield from _read_parquet(path, compression)
        return
    with _open(path, compression) as stream:
        if kind == ".csv":
            yield from _read_csv(path, stream)
        else:
            start = stream.peek(64)
            if start.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ValueError(f"{path} is UTF-16; JSON is read as UTF-8: convert it first")
            if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                yield from _read_json_array(path, stream)
            else:
                yield from _read_json_lines(path, stream)


def _read_json_lines(path: Path, stream: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        line = line.rstrip(b"\r\n")
        if not line.strip():
            continue
        location = f"{path}:{number}"
        try:
            yield Row(location, json.loads(line.decode()))
        except UnicodeDecodeError as error:
            yield Row(location, line.decode(errors="backslashreplace"), f"not UTF-8 at byte {error.start} of the line")
        except json.JSONDecodeError as error:
            yield Row(location, line.decode(), f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            yield Row(location, line.decode(), f"not readable JSON: {error}")


def _read_json_array(path: Path, stream: BinaryIO) -> Iterator[Row]:
    try:
        values = json.loads(stream.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a valid JSON array: {error}") from error
    for number, value in enumerate(values):
        yield Row(f"{path}[{number}]", value)


def _read_csv(path: Path, stream: BinaryIO) -> Iterator[Row]:
    # Python's reader and not pyarrow's: it goes on after a bad row and says on which line it stood.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # Bytes that are not UTF-8 become lone surrogates, which reject their own row and no other.
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    with lines:
        yield from _read_csv_rows(path, csv.reader(lines))


def _read_csv_rows(path: Path, reader: Any) -> Iterator[Row]:
    header = next(reader, None)
    if header is None:
        return
    while True:
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


def _read_parquet(path: Path, compression: str) -> Iterator[Row]:
    import pyarrow.parquet as pq

    if compression:
        raise ValueError(f"{path}: Parquet has its own compression; unpack the file first")
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                yield Row(f"{path} row {number}", value)
                number += 1


def _open(path: Path, compression: str) -> io.BufferedReader:
    if compression == ".gz":
        return cast(io.BufferedReader, gzip.open(path, "rb"))
    if compression == ".xz":
        return cast(io.BufferedReader, lzma.open(path, "rb"))
    if compression == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _suffixes(path: Path) -> tuple[str, str]:
    """The format's suffix and the compression's, both lower case, the latter empty where there is none."""
    name = path.name.lower()
    compression = next((suffix for suffix in _COMPRESSIONS if name.endswith(suffix)), "")
    return Path(name.removesuffix(compression)).suffix, compression


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_hub_name(name: str) -> bool:
    return _suffixes(Path(name))[0] not in _FORMATS and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _load_from_hub(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise FileNotFoundError(
            f"no such file: {name} (to read it as a Hugging Face data set: pip install 'miwv-fast[datasets]')"
        ) from None
    try:
        return _single_split(datasets.load_dataset(name))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(f"no file and no Hugging Face data set {name!r} could be found: {reason}") from error


def _single_split(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    if "train" not in data and len(data) != 1:
        raise ValueError(f"the data set has splits {', '.join(data)}; choose one of them")
    return data["train"] if "train" in data else next(iter(data.values()))
