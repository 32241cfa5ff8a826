"""Selected records on disk: JSON lines, Parquet or a `datasets` folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from miwv_fast.files import Location, temporary_path, write_jsonl
from miwv_fast.sources import FileSource, Source
from miwv_fast.store import FILES

# Parquet's reader and `datasets` take some 50 levels; far more overflow Arrow's stack.
_DEEPEST = 32

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


def check_not_lost(path: str | os.PathLike[str], source: Source | None, scores: str | None = None) -> None:
    """Raises ValueError where writing `path` would replace the scored data, the scores, or a file of a run."""
    target = Path(path).resolve()
    scored = source.paths if isinstance(source, FileSource) else []
    if target in [each.resolve() for each in scored]:
        raise ValueError(f"{path} is the data that was scored, and would be lost; give another file")
    if scores is not None and target == Path(scores).resolve() and target.is_file():
        raise ValueError(f"{path} holds the scores, which would be lost; give another file")
    if target.name in FILES and (target.parent / "manifest.json").is_file():
        raise ValueError(f"{path} belongs to the run in {target.parent}, and would be lost; give another file")


def write_records(path: Path, rows: Sequence[Mapping[str, Any]], kind: str) -> None:
    """Writes records as `kind`: a file is replaced, whole or not at all; a folder must not be there yet.

    A table has a column for every field of any record, null where a record doesn't have it or has NaN. Raises
    ValueError where a field's values are of types that a column cannot hold together, or nested more than 32 deep, or
    `datasets` is not installed.
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
            values = [row.get(name) for row in rows]
            _check_depth(values)
            columns[name] = pa.array(values, from_pandas=True)
    return columns


def _check_depth(values: Iterable[Any]) -> None:
    """ValueError where lists or objects are nested deeper than a column can be read again."""
    nested = list(filter(_is_nested, values))
    for _ in range(_DEEPEST):
        parts = chain.from_iterable(value.values() if isinstance(value, Mapping) else value for value in nested)
        nested = list({id(part): part for part in parts if _is_nested(part)}.values())
    if nested:
        raise ValueError(f"they are nested more than {_DEEPEST} deep")


def _is_nested(value: object) -> bool:
    return isinstance(value, list | tuple | Mapping)


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
    temporary = temporary_path(folder)
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
