"""The scores of a data set: the table, its ranking, and selections."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from miwv_fast import ranker
from miwv_fast.extras import import_extra
from miwv_fast.files import Location
from miwv_fast.fingerprint import hash_array
from miwv_fast.formats import Row
from miwv_fast.records import TextDigest
from miwv_fast.sources import Source, open_source

if TYPE_CHECKING:
    import datasets
    import pandas

STATUSES = (
    "ok",
    "truncated",
    "too_long",
    "demonstration_too_long",
    "empty_instruction",
    "empty_response",
    "malformed",
    "no_neighbor",
    "non_finite",
)
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("miwv", pa.float32()),
        ("nll_one_shot", pa.float32()),
        ("nll_zero_shot", pa.float32()),
        ("response_tokens", pa.int32()),
        ("neighbor", pa.int64()),
        ("similarity", pa.float32()),
        ("status", pa.string()),
    ]
)
# With more than one demonstration per record: how far their scores lie apart, and which they are.
MULTI_SCHEMA = SCHEMA.append(pa.field("miwv_spread", pa.float32())).append(pa.field("neighbors", pa.list_(pa.int64())))
MANIFEST_KEY = b"miwv_fast"


@dataclass(frozen=True, eq=False)
class Scores:
    """One row per input record, in input order.

    `table` columns: `index` int64; `id` string; `miwv`, `nll_one_shot`, `nll_zero_shot` float32 in nats per token,
    null where not scored; `response_tokens` int32, how many tokens were scored; `neighbor` int64, the demonstration;
    `similarity` float32, its cosine; `status`, one of `STATUSES`. `manifest` says how the scores came about; `stats`
    what they cost (`forwarded_tokens`, `resumed_tokens` of them before this call, `padding_tokens`, `scoring_seconds`)
    and, where the search for neighbours was approximate, `neighbor_recall`, the share of a sample whose neighbour is
    the nearest; `stats` is not kept on disk. `source` is the data that was scored, where it can be read again.
    `embeddings` float32 [N, D] are what the neighbours were found by, None where the scores were saved without them.

    With k > 1 demonstrations per record, `miwv` and `nll_one_shot` are means over those that leave room for the
    response, `neighbor` and `similarity` are of the nearest of them, and two columns follow: `miwv_spread` float32, the
    standard deviation over them, and `neighbors`, a list of int64.
    """

    table: pa.Table
    manifest: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    embeddings: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.counts().items())
        return f"Scores({len(self)} records: {counts})"

    def counts(self) -> dict[str, int]:
        """How many records have each status, in the order of `STATUSES`, without the zeros."""
        seen = {pair["values"]: pair["counts"] for pair in self.table["status"].value_counts().to_pylist()}
        return {status: seen[status] for status in STATUSES if status in seen}

    def rank(self) -> np.ndarray:
        """Record numbers, int64 [N], highest MIWV first; ties by the lowest number, records without a score last."""
        miwv = self.table["miwv"].to_numpy(zero_copy_only=False)
        return ranker.rank(miwv.astype(np.float64))

    def select(
        self,
        top: str | float | int | None = None,
        data: object = None,
        *,
        min_miwv: float | None = None,
        min_response_tokens: int | None = None,
        dedup: float | None = None,
        per: str | None = None,
    ) -> list[dict[str, Any]]:
        """The best records, unchanged, best first.

        `top`: "1%" or a float in (0, 1] is a share of all input records, rounded down, at least one record; an int
        is a count; without it all that have a MIWV of at least `min_miwv` nats. `data` replaces the data that was
        scored, if it has moved.

        `min_response_tokens` leaves out records of which fewer tokens were scored; `dedup`, in (0, 1], those whose
        embedding has this cosine or more with that of a better record which was kept. `per` names a field of the
        data: each of its values gets its share of the scored records (largest remainder, ties to the value that comes
        first in the data), and places that a value cannot fill go to the best of the others.

        Raises ValueError if the data cannot be found again or is not what was scored, if neither `top` nor `min_miwv`
        is given, or if the conditions leave no record or cannot be met; TypeError for a value of another type.
        """
        data = None if data is None else open_source(data)  # once, as a generator can be read only once
        chosen = self.choose(
            top, data, min_miwv=min_miwv, min_response_tokens=min_response_tokens, dedup=dedup, per=per
        )
        return self.rows(chosen.records, data)

    def choose(
        self,
        top: str | float | int | None = None,
        data: object = None,
        *,
        min_miwv: float | None = None,
        min_response_tokens: int | None = None,
        dedup: float | None = None,
        per: str | None = None,
    ) -> ranker.Selection:
        """The numbers of the records that `select` returns, int64, best first, and what `dedup` left out for what."""
        return ranker.select(
            self.table["miwv"].to_numpy(zero_copy_only=False),
            self.table["response_tokens"].fill_null(0).to_numpy(zero_copy_only=False),
            top,
            min_miwv=min_miwv,
            min_response_tokens=min_response_tokens,
            embeddings=None if dedup is None else self._embeddings(),
            dedup=dedup,
            groups=None if per is None else self._groups(per, data),
        )

    def rows(self, numbers: Iterable[int], data: object = None) -> list[dict[str, Any]]:
        """The records of these numbers, in this order, as they came. Raises ValueError as `select` does."""
        order = [int(number) for number in numbers]
        wanted = set(order)
        if wanted and not 0 <= min(wanted) <= max(wanted) < len(self):
            raise ValueError(f"there are records 0 to {len(self) - 1}, asked for were {min(wanted)} to {max(wanted)}")
        rows = {number: row.value for number, row in enumerate(self.read_rows(data)) if number in wanted}
        return [rows[number] for number in order]

    def read_rows(self, data: object = None) -> Iterator[Row]:
        """Every row of the scored data in order, malformed ones included. Raises ValueError as `select` does."""
        source = self.source if data is None else open_source(data)
        if source is None:
            raise ValueError(f"{_missing(self.manifest)}; give the data that was scored as `data` (--data)")
        count, texts = 0, TextDigest()
        for row in source.rows():
            yield row
            count += 1
            texts.add(row)
        if count != len(self):
            raise ValueError(f"{source.name} has {count} records, the scores are of {len(self)}: other data")
        if not source.own and texts.sha256() != self.manifest.get("texts", texts.sha256()):
            raise ValueError(f"{source.name} is not the data that was scored: its texts differ")

    def _groups(self, field: str, data: object) -> np.ndarray:
        """The records' values of a field, numbered as they come; a record without it has a value of its own kind."""
        values: dict[str, int] = {}
        names: dict[str, None] = {}
        groups = []
        for row in self.read_rows(data):
            record = row.value if isinstance(row.value, Mapping) else {}
            value = json.dumps(record.get(field), sort_keys=True, default=str)
            groups.append(values.setdefault(value, len(values)))
            names.update(dict.fromkeys(map(str, record)))
        if field not in names:
            raise ValueError(f"no record has a field {field!r}; there are {', '.join(list(names)[:20])}")
        return np.array(groups, np.int64)

    def _embeddings(self) -> np.ndarray:
        if self.embeddings is None:
            raise ValueError(
                "dedup needs the embeddings that the records were scored with, embeddings.npy beside a run's own "
                "scores.parquet: these scores were saved elsewhere, or it is lost or damaged; the command that made "
                "the run makes it again"
            )
        if len(self.embeddings) != len(self):
            raise ValueError(f"there are {len(self.embeddings)} embeddings for {len(self)} records: of another run")
        if self.manifest.get("embeddings") not in (None, hash_array(self.embeddings)):
            raise ValueError("embeddings.npy is damaged or of another run: the records were scored with others")
        return self.embeddings

    def save(self, path: str | os.PathLike[str] | Location) -> None:
        """Writes the table as one Parquet file, the manifest in its metadata; replaces a file that is there.

        `path` may be a URL that fsspec knows, such as s3://bucket/scores.parquet.
        """
        table = self.table.replace_schema_metadata({MANIFEST_KEY: json.dumps(dict(self.manifest)).encode()})
        stream = pa.BufferOutputStream()  # a path that is not UTF-8 is nothing that pyarrow could open
        pq.write_table(table, stream)
        Location(path).write_bytes(stream.getvalue().to_pybytes())

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        top: str | float | int = "1%",
        field: str | None = None,
        data: object = None,
        model: Any = None,
        tokenizer: Any = None,
        device: str = "auto",
    ) -> None:
        """Writes one HTML file that shows these scores, needs no network and opens from disk; replaces a file there.

        `top` is the selection that it opens with, as in `select`. `field` names the field of the data whose values are
        compared; without it one is looked for. `data` replaces the data that was scored, if it has moved; where it is
        not found, the report has no texts. With `model`, a name, folder or loaded pair as for `score`, and `tokenizer`
        where it was given to `score`, the ten best and the ten worst records are explained token by token, on `device`.

        Needs `pip install 'miwv-fast[report]'`. Raises ValueError if no record has a score, the data is not what was
        scored, no record has the field, or the tokenizer is not the one that the records were scored with.
        """
        from miwv_fast.export import check_not_lost
        from miwv_fast.report import write_report

        data = None if data is None else open_source(data)  # once, as a generator can be read only once
        check_not_lost(path, self.source if data is None else data)
        write_report(self, path, top=top, field=field, data=data, model=model, tokenizer=tokenizer, device=device)

    def plot(self, top: str | float | int = "1%") -> np.ndarray:
        """Plots the distribution of MIWV, and one-shot against zero-shot loss, with the selection `top` marked.

        Returns the two matplotlib Axes. Needs `pip install 'miwv-fast[report]'`. Raises ValueError if no record has a
        score.
        """
        from miwv_fast import notebook

        return notebook.plot(self, top)

    def _repr_html_(self) -> str:
        from miwv_fast import notebook

        return notebook.summary_html(self)

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a pandas.DataFrame [N, columns], missing scores as NaN, missing whole numbers as `pandas.NA`.

        Needs `pip install 'miwv-fast[report]'`.
        """
        pandas = import_extra("pandas", "report")
        whole = {pa.int64(): pandas.Int64Dtype(), pa.int32(): pandas.Int32Dtype()}
        return self.table.to_pandas(types_mapper=whole.get)

    def to_dataset(self) -> datasets.Dataset:
        """The table as a `datasets.Dataset` of N rows, in the order of the scored data.

        Needs `pip install 'miwv-fast[datasets]'`.
        """
        return import_extra("datasets", "datasets").Dataset(self.table)


def _missing(manifest: Mapping[str, Any]) -> str:
    """Why there is no data at hand."""
    described = manifest.get("data", {})
    if "data_set" in described:
        return f"the data set {described['data_set']} that was scored cannot be loaded"
    paths = [file["path"] for file in described.get("files", [])]
    missing = [path for path in paths if not Path(path).is_file()]
    return (
        f"the scored file {missing[0]} is not there any more" if missing else "these scores do not hold their records"
    )
