"""Units of the plan as rows of an Arrow table, with all that a worker needs to run them, and their results as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from miwv_fast.assembly import TokenSequence
from miwv_fast.exact import Near
from miwv_fast.forest import Unit
from miwv_fast.runner import Sequences, Trees, UnitResult

_NUMBERS = pa.large_list(pa.int64())
_TOKENS = pa.large_list(pa.int32())
_LOSSES = pa.large_list(pa.float32())

# A unit's own fields, and its trees, whose sequences stand one after the other.
_UNIT = ("preambles", "roots", "scored", "children", "zero_shot", "one_shot")
UNIT_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        *((name, pa.large_list(pa.bool_()) if name == "scored" else _NUMBERS) for name in _UNIT),
        ("parents", _NUMBERS),
        ("ids", _TOKENS),
        ("rows", _TOKENS),
        ("targets", _TOKENS),
        ("id_counts", _TOKENS),
        ("row_counts", _TOKENS),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("zero_shot", _NUMBERS),
        ("zero_shot_nll", _LOSSES),
        ("one_shot", _NUMBERS),
        ("one_shot_nll", _LOSSES),
        ("forwarded_tokens", pa.int64()),
        ("padding_tokens", pa.int64()),
        ("seconds", pa.float64()),
    ]
)

NEAR_SCHEMA = pa.schema([("groups", _NUMBERS), ("ends", _NUMBERS), ("other", _NUMBERS), ("similarity", _LOSSES)])


def pack(number: int, unit: Unit, sequences: Sequences) -> pa.Table:
    """A unit as one row of `UNIT_SCHEMA`; a sequence that continues another is there without that one's tokens."""
    trees = sequences.trees(unit)
    return _row(
        UNIT_SCHEMA,
        number=number,
        **{name: getattr(unit, name) for name in _UNIT},
        parents=trees.parents,
        ids=_join([sequence.ids for sequence in trees.sequences]),
        rows=_join([sequence.rows for sequence in trees.sequences]),
        targets=_join([sequence.targets for sequence in trees.sequences]),
        id_counts=np.array([len(sequence.ids) for sequence in trees.sequences], np.int32),
        row_counts=np.array([len(sequence.rows) for sequence in trees.sequences], np.int32),
    )


class PackedUnit:
    """A unit and its sequences, taken out of one row of a table; it takes the place of `Sequences` for this unit."""

    def __init__(self, table: pa.Table, row: int) -> None:
        column = {name: read_list(table, name, row) for name in UNIT_SCHEMA.names[1:]}
        self.number = int(table["number"][row].as_py())
        self.unit = Unit(**{name: column[name] for name in _UNIT})
        ids, rows, targets = (
            np.split(column[name], np.cumsum(column[counts])[:-1])
            for name, counts in (("ids", "id_counts"), ("rows", "row_counts"), ("targets", "row_counts"))
        )
        self._trees = Trees(
            [TokenSequence(*parts) for parts in zip(ids, rows, targets, strict=True)], column["parents"]
        )

    def trees(self, unit: Unit) -> Trees:
        """The sequences of the unit."""
        return self._trees


def pack_result(number: int, result: UnitResult, seconds: float) -> pa.Table:
    """A finished unit as one row of `RESULT_SCHEMA`."""
    return _row(
        RESULT_SCHEMA,
        number=number,
        zero_shot=result.zero_shot[0],
        zero_shot_nll=result.zero_shot[1],
        one_shot=result.one_shot[0],
        one_shot_nll=result.one_shot[1],
        forwarded_tokens=result.forwarded_tokens,
        padding_tokens=result.padding_tokens,
        seconds=seconds,
    )


def unpack_result(table: pa.Table, row: int) -> tuple[int, UnitResult, float]:
    """The unit's number, its losses and the seconds it took, out of one row of a table."""
    zero = read_list(table, "zero_shot", row), read_list(table, "zero_shot_nll", row)
    one = read_list(table, "one_shot", row), read_list(table, "one_shot_nll", row)
    number, forwarded, padding, seconds = (
        table[name][row].as_py() for name in ("number", "forwarded_tokens", "padding_tokens", "seconds")
    )
    return number, UnitResult(zero, one, forwarded, padding), seconds


def pack_near(near: Near) -> pa.Table:
    """Similar groups as one row of `NEAR_SCHEMA`."""
    return _row(NEAR_SCHEMA, **{name: getattr(near, name) for name in NEAR_SCHEMA.names})


def unpack_near(table: pa.Table) -> Near:
    """Similar groups out of the one row of a table."""
    return Near(*(read_list(table, name, 0) for name in NEAR_SCHEMA.names))


def read_list(table: pa.Table, name: str, row: int) -> np.ndarray:
    """The values of a list in a table, of any length."""
    array: np.ndarray = table[name][row].values.to_numpy(zero_copy_only=False)
    return array


def _row(schema: pa.Schema, **values: Any) -> pa.Table:
    def column(field: pa.Field) -> pa.Array:
        value = values[field.name]
        if not isinstance(value, np.ndarray):
            return pa.array([value], field.type)
        items = pa.array(value, field.type.value_type)
        return pa.LargeListArray.from_arrays(pa.array([0, len(items)], pa.int64()), items)

    return pa.table([column(field) for field in schema], schema=schema)


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)
