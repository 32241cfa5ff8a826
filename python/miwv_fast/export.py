"""Selected records on disk: JSON lines, Parquet or a `datasets` folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from miwv_fast.files import Location, write_jsonl

FORMATS = {".jsonl": "jsonl", ".parquet": "parquet", "": "datasets"}


def choose_format(path: Path, wanted: str | None = None) -> str:
    """`jsonl`, `parquet` or `datasets`: the one that is wanted, or by the path's suffix. ValueError for another."""
    if wanted is not None:
        if wanted not in FORMATS.values():
            raise ValueError(f"unknown format {wanted!r}; use {', '.join(FORMATS.values())}")
        return wanted
    if path.suffix not in FORMATS:
        raise ValueError(
            f"cannot tell the format from the name of {path}: use .jsonl, .parquet or no suffix (a datasets folder), "
            f"or say --format {'|'.join(FORMATS.values())}"
        )
    return FORMATS[path.suffix]


def write_records(path: Path, rows: Sequence[Mapping[str, Any]], kind: str) -> None:
    """Writes records as `kind`: a file is replaced, whole or not at all; a folder must not be there yet.

    A table has a column for every field of any record, null where a record doesn't have it or has NaN. Raises
    ValueError where a field's values are of types that a column cannot hold together, or `datasets` is not installed.
    """
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "parquet":
        table, stream = pa.table(_columns(rows)), pa.BufferOutputStream()
        with _one_column_each():
            pq.write_table(table, stream)
        Location(path).write_bytes(stream.getvalue().to_pybytes())
    else:
        _write_datasets(path, rows)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        with _one_column_each(f"the values of field {name!r}"):
            columns[name] = pa.array([row.get(name) for row in rows], from_pandas=True)
    return columns


@contextmanager
def _one_column_each(what: str = "some field's values") -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{what} do not go into one column: {error}; write JSON lines instead") from error


def _write_datasets(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    try:
        import datasets
    except ImportError:
        raise ValueError("a datasets folder needs the package datasets: pip install 'miwv-fast[datasets]'") from None
    if folder.exists():
        raise ValueError(f"{folder} is there already; give a folder that is not, or a .jsonl or .parquet file")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        columns = _columns(rows)
        with _one_column_each():
            datasets.Dataset.from_dict(columns).save_to_disk(str(temporary))
        for path in temporary.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
