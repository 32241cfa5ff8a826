"""What a run computes, as files that know whether they are whole: finished units, neighbours, embeddings."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from miwv_fast.files import Location
from miwv_fast.neighbors import Neighbors
from miwv_fast.runner import UnitResult

_PART = pa.schema([("one_shot", pa.bool_()), ("number", pa.int64()), ("nll", pa.float32())])


@dataclass(frozen=True)
class Part:
    """A file under parts/: its unit and its result, or None and what is wrong with it."""

    path: Location
    unit: int
    result: UnitResult | None
    seconds: float = 0.0
    damage: str = ""


def write_part(folder: Location, unit: int, result: UnitResult, seconds: float) -> None:
    """Writes a finished unit; it is there whole or not at all."""
    one_shot = np.repeat([False, True], [len(result.zero_shot[0]), len(result.one_shot[0])])
    columns = [np.concatenate(pair) for pair in zip(result.zero_shot, result.one_shot, strict=True)]
    cost = {"forwarded": result.forwarded_tokens, "padding": result.padding_tokens, "seconds": seconds}
    table = pa.table([one_shot, *columns], schema=_PART.with_metadata({"cost": json.dumps(cost)}))
    write_checked(folder, unit, _to_bytes(table), "parquet")


def read_parts(folder: Location) -> Iterator[Part]:
    """Every part in a folder, verified. Raises ValueError for one that is whole but was not written by `write_part`."""
    for path, unit, content in read_checked(folder, "parquet"):
        if content is None:
            yield Part(path, -1, None, damage="its content does not match its checksum")
            continue
        try:
            table = read_table(content)
            cost = json.loads((table.schema.metadata or {})[b"cost"])
            if not table.schema.equals(_PART) or any(column.null_count for column in table.columns):
                raise ValueError(f"its columns are {', '.join(map(str, table.schema))}")
            one_shot, number, nll = (table[name].to_numpy() for name in _PART.names)
            zero, one = ((number[chosen], nll[chosen]) for chosen in (~one_shot, one_shot))
            result = UnitResult(zero, one, int(cost["forwarded"]), int(cost["padding"]))
            yield Part(path, unit, result, float(cost["seconds"]))
        except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is whole, but no part of a run: {error}; move it away") from error


def write_checked(folder: Location, number: int, content: bytes, suffix: str) -> None:
    """Writes a numbered file with its checksum in its name."""
    (folder / f"{number:08d}-{_digest(content)}.{suffix}").write_bytes(content)


def read_checked(folder: Location, suffix: str) -> Iterator[tuple[Location, int, bytes | None]]:
    """The numbered files of a folder in their order, None for the content of one that does not match its name."""
    for name in folder.names():
        stem, _, kind = name.rpartition(".")
        if kind != suffix or name.startswith("."):
            continue
        number, _, digest = stem.partition("-")
        content = (folder / name).read_bytes()
        good = number.isdecimal() and number.isascii() and _digest(content) == digest
        yield folder / name, int(number) if good else -1, content if good else None


def neighbors_to_bytes(neighbors: Neighbors) -> bytes:
    """Neighbours as a Parquet file of two columns of lists."""
    k = neighbors.index.shape[1]
    columns = [pa.FixedSizeListArray.from_arrays(each.ravel(), k) for each in (neighbors.index, neighbors.similarity)]
    table = pa.table(columns, ["index", "similarity"])
    return _to_bytes(table)


def neighbors_from_bytes(content: bytes, records: int, k: int, recall: float | None = None) -> Neighbors:
    """Neighbours of so many records as they were written. ValueError, saying why, for anything else."""
    try:
        table = read_table(content)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    expected = pa.schema([("index", pa.list_(pa.int64(), k)), ("similarity", pa.list_(pa.float32(), k))])
    if not table.schema.equals(expected) or table.num_rows != records:
        raise ValueError(
            f"expected {records} rows of {', '.join(map(str, expected))}, "
            f"got {table.num_rows} of {', '.join(map(str, table.schema))}"
        )
    index, similarity = (
        column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, k) for column in table.columns
    )
    if index.shape != (records, k) or not np.issubdtype(index.dtype, np.integer):
        raise ValueError("there are rows without values")
    if ((index < -1) | (index >= records) | (index == np.arange(records)[:, None])).any():
        raise ValueError(f"a neighbour is no other of the {records} records")
    return Neighbors(index, similarity, recall)


def array_to_bytes(array: np.ndarray) -> bytes:
    """An array as the content of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def array_from_bytes(content: bytes) -> np.ndarray:
    """The array in a .npy file."""
    array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def read_table(content: bytes) -> pa.Table:
    """A Parquet file's table, read by this thread alone.

    `pq.read_table` leaves the content to a thread of Arrow's, which may drop it, and ask for the GIL, while the
    interpreter ends: the process then aborts.
    """
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        return file.read(use_threads=False)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
