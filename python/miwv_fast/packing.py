"""Units of the plan as rows of an Arrow table, with all that a worker needs to run them, and their results as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from miwv_fast.assembly import TokenSequence
from miwv_fast.forest import Unit
from miwv_fast.neighbors import Near
from miwv_fast.runner import Sequences, UnitResult

_NUMBERS = pa.large_list(pa.int64())
_TOKENS = pa.large_list(pa.int32())
_LOSSES = pa.large_list(pa.float32())

# Sequences stand one after the other: roots, children behind their roots, zero-shot passes, one-shot passes.
UNIT_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("roots", _NUMBERS),
        ("scored", pa.large_list(pa.bool_())),
        ("children", _NUMBERS),
        ("parents", _NUMBERS),
        ("zero_shot", _NUMBERS),
        ("one_shot", _NUMBERS),
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
    """A unit as one row of `UNIT_SCHEMA`; of a child only what follows its root is in it."""
    parents = np.array([sequences.parent(int(i)) for i in unit.children], np.int64)
    roots = [sequences.prefix(int(i), bool(scored)) for i, scored in zip(unit.roots, unit.scored, strict=True)]
    length = {int(i): len(root.ids) for i, root in zip(unit.roots, roots, strict=True)}
    behind = [
        sequences.one_shot(int(i)).behind(length[parent])
        for i, parent in zip(unit.children, parents.tolist(), strict=True)
    ]
    zero = [sequences.zero_shot(int(i)) for i in unit.zero_shot]
    one = [sequences.one_shot(int(i)) for i in unit.one_shot]
    every = [*roots, *behind, *zero, *one]
    return _row(
        UNIT_SCHEMA,
        number=number,
        roots=unit.roots,
        scored=unit.scored,
        children=unit.children,
        parents=parents,
        zero_shot=unit.zero_shot,
        one_shot=unit.one_shot,
        ids=_join([sequence.ids for sequence in every]),
        rows=_join([sequence.rows for sequence in every]),
        targets=_join([sequence.targets for sequence in every]),
        id_counts=np.array([len(sequence.ids) for sequence in every], np.int32),
        row_counts=np.array([len(sequence.rows) for sequence in every], np.int32),
    )


class PackedUnit:
    """A unit and its sequences, taken out of one row of a table; it takes the place of `Sequences` for this unit."""

    def __init__(self, table: pa.Table, row: int) -> None:
        column = {name: read_list(table, name, row) for name in UNIT_SCHEMA.names[1:]}
        self.number = int(table["number"][row].as_py())
        self.unit = Unit(*(column[name] for name in ("roots", "scored", "children", "zero_shot", "one_shot")))
        self._parent = dict(zip(self.unit.children.tolist(), column["parents"].tolist(), strict=True))
        ids, rows, targets = (
            np.split(column[name], np.cumsum(column[counts])[:-1])
            for name, counts in (("ids", "id_counts"), ("rows", "row_counts"), ("targets", "row_counts"))
        )
        every = iter([TokenSequence(*parts) for parts in zip(ids, rows, targets, strict=True)])
        self._roots, self._children, self._zero, self._one = (
            {int(i): next(every) for i in kind}
            for kind in (self.unit.roots, self.unit.children, self.unit.zero_shot, self.unit.one_shot)
        )

    def zero_shot(self, record: int) -> TokenSequence:
        """The record alone, cut to what is scored."""
        return self._zero[record]

    def one_shot(self, number: int) -> TokenSequence:
        """A record behind a demonstration, cut to what is scored."""
        if number in self._one:
            return self._one[number]
        behind, root = self._children[number], self._roots[self._parent[number]].ids
        return TokenSequence(np.concatenate([root, behind.ids]), behind.rows + len(root), behind.targets)

    def prefix(self, root: int, scored: bool) -> TokenSequence:
        """All of a root, as others continue it, with its own targets where it is scored."""
        return self._roots[root]

    def parent(self, number: int) -> int:
        """The root that a one-shot pass continues."""
        return int(self._parent[number])


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
