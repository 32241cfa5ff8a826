"""Where rows come from: files of several kinds, data sets, iterables; each can be read again from the start."""

from __future__ import annotations

import hashlib
import itertools
import logging
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from miwv_fast.formats import Row, read_batch, read_file
from miwv_fast.unpack import FORMATS, split_suffixes

_DAMAGE = (EOFError, OSError, UnicodeDecodeError, zlib.error, lzma.LZMAError, pa.ArrowException)
# What an iterable without a length may give: it is held in memory, and may have no end.
MAX_ITERABLE_RECORDS = 5_000_000
_BATCH_ROWS = 1024

_log = logging.getLogger(__name__)


class Source(Protocol):
    """Rows that can be read more than once, in the same order."""

    name: str
    own: bool  # a run's own copy of its rows, as JSON

    def rows(self) -> Iterator[Row]:
        """Every row, malformed ones included, in input order; blank lines of JSONL are not rows."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies the data in a run's manifest."""
        ...


def open_source(data: object) -> Source:
    """Recognises `data`: path(s), a Hugging Face data set or its name, a table, a source, or an iterable of dicts.

    Of a data set with splits `train` is read, or its only one. Raises FileNotFoundError for a missing file, ValueError
    for an unknown format or where a split has to be chosen, TypeError for anything else.
    """
    if isinstance(data, FileSource | ObjectSource | TableSource):
        return data
    if isinstance(data, str | os.PathLike):
        name = os.fspath(data)
        if "://" in str(name):
            raise ValueError(f"data is read from files of this machine: copy {name} here first")
        if not os.path.exists(name) and _is_hub_name(str(name)):
            return ObjectSource(_load_from_hub(str(name)), f"data set {name}", {"data_set": str(name)})
        return FileSource([Path(name)])
    if isinstance(data, Sequence) and data and all(isinstance(item, str | os.PathLike) for item in data):
        return FileSource([Path(item) for item in data])
    if type(data).__module__.partition(".")[0] == "datasets":
        rows = _single_split(data, "the data set", "data[{!r}]")
        rows = rows.with_format(None) if hasattr(rows, "with_format") else rows  # tables, say, are no rows
        return ObjectSource(rows, "the data set", {"fingerprint": getattr(data, "_fingerprint", None)})
    if hasattr(data, "__arrow_c_stream__") or type(data).__name__ == "DataFrame":
        return TableSource(_as_table(data))
    if isinstance(data, Iterable) and not isinstance(data, dict | bytes):
        rows = data if isinstance(data, Sequence) else _collect(data)
        return ObjectSource(rows, "the data")
    raise TypeError(
        "data should be a path, a list of paths, a Hugging Face data set or its name, a table, or an iterable of "
        f"dicts; it is {type(data).__name__}"
    )


def _as_table(data: Any) -> pa.Table:
    try:
        table = pa.table(data)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(
            f"the {type(data).__name__} cannot be read as an Arrow table: {error}; give its rows as a list of dicts"
        ) from error
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise ValueError(f"the {type(data).__name__} has two columns {twice[0]!r}")
    # Row numbers that pandas keeps where rows were chosen from a larger frame; a named index is a column like others.
    return table.drop_columns([name for name in table.column_names if name.startswith("__index_level_")])


def _collect(data: Iterable[Any]) -> list[Any]:
    rows = list(itertools.islice(data, MAX_ITERABLE_RECORDS + 1))
    if len(rows) > MAX_ITERABLE_RECORDS:
        raise ValueError(
            f"the data give more than {MAX_ITERABLE_RECORDS:,} records, perhaps without end; write them to a file, or "
            "give a list"
        )
    return rows


class ObjectSource:
    """Rows that are Python objects already: a sequence of dicts or a `datasets.Dataset`."""

    def __init__(self, rows: Iterable[Any], name: str, identity: dict[str, Any] | None = None) -> None:
        self._rows = rows
        self._identity = identity
        self.name = name
        self.own = False

    def rows(self) -> Iterator[Row]:
        """Every object as a row; its location is its number, counted from 0."""
        for number, value in enumerate(self._rows):
            yield Row(f"record {number}", value)

    def describe(self) -> dict[str, Any]:
        """The data set's name or fingerprint, or the SHA-256 of the rows written as JSON."""
        return _sha256_of_rows(self.rows()) if self._identity is None else self._identity


class TableSource:
    """Rows of an Arrow table."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.name = "the table"
        self.own = False

    def rows(self) -> Iterator[Row]:
        """Every row as a dict; its location is its number, counted from 0."""
        batches = self._table.to_batches(max_chunksize=_BATCH_ROWS)
        for number, (value, error) in enumerate(itertools.chain.from_iterable(map(read_batch, batches))):
            yield Row(f"record {number}", value, error)

    def describe(self) -> dict[str, Any]:
        """The SHA-256 of the rows written as JSON."""
        return _sha256_of_rows(self.rows())


class FileSource:
    """Rows of one or more JSON, JSONL, CSV or Parquet files, compressed or not, one file after the other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(f"no such file: {path}")
            if path.is_dir():
                raise ValueError(f"{path} is a folder; give the data files in it")
            if not path.is_file():
                raise ValueError(
                    f"{path} is no file but a pipe or device, and data is read several times: save it first"
                )
            if split_suffixes(path)[0] not in FORMATS:
                known = ", ".join(FORMATS)
                raise ValueError(
                    f"{path}: cannot tell the format from its name; known are {known}, also with .gz, .xz or .zst"
                )
        self.own = False
        self.paths = list(paths)
        self.name = ", ".join(str(path) for path in paths)

    def rows(self) -> Iterator[Row]:
        """Every row of every file; its location is file and line, or file and row for Parquet and JSON arrays."""
        for path in self.paths:
            try:
                yield from read_file(path)
            except PermissionError:
                raise
            except _DAMAGE as error:
                raise ValueError(f"{path} cannot be read to its end: {error}") from error

    def describe(self) -> dict[str, Any]:
        """The files' absolute paths and SHA-256."""
        return {"files": [{"path": str(path.resolve()), "sha256": _sha256(path)} for path in self.paths]}


def _sha256_of_rows(rows: Iterator[Row]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.text().encode() + b"\n")
    return {"sha256": digest.hexdigest()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_hub_name(name: str) -> bool:
    suffix = split_suffixes(Path(name))[0]
    return suffix not in FORMATS and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _load_from_hub(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise FileNotFoundError(
            f"no such file: {name} (to read it as a Hugging Face data set: pip install 'miwv-fast[datasets]')"
        ) from None
    try:
        loaded = datasets.load_dataset(name)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(f"no file and no Hugging Face data set {name!r} could be found: {reason}") from error
    except ValueError as error:  # such as several configurations, which stand on the lines that follow
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot load the Hugging Face data set {name!r} by its name alone: {reason}; load it in Python: "
            f"score(datasets.load_dataset({name!r}, config, split=...), ...)"
        ) from error
    return _single_split(loaded, f"data set {name}", f"datasets.load_dataset({name!r}, split={{!r}})")


def _single_split(data: Any, name: str, choice: str) -> Any:
    """The rows of a data set, where it has splits those of `train` or the only one; `choice` writes another's."""
    if not isinstance(data, dict):
        return data
    if "train" not in data and len(data) != 1:
        chosen = choice.format(next(iter(data), "train"))
        raise ValueError(f"{name} has the splits {', '.join(data)}; choose one of them in Python: score({chosen}, ...)")
    split = "train" if "train" in data else next(iter(data))
    if len(data) > 1:
        _log.info("%s has the splits %s: reading %s", name, ", ".join(data), split)
    return data[split]
