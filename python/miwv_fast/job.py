"""A scoring job: what is known of each record, stage by stage, until its row can be written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from miwv_fast.engine import Engine
from miwv_fast.errors import Interrupted
from miwv_fast.forest import forwarded_tokens, plan_units
from miwv_fast.neighbors import Neighbors
from miwv_fast.progress import Progress
from miwv_fast.records import Record, Records, Rejection
from miwv_fast.runner import UnitResult
from miwv_fast.scores import MULTI_SCHEMA, SCHEMA
from miwv_fast.sources import Source
from miwv_fast.store import Run
from miwv_fast.templates import Template, TokenSequence

UNIT_BATCHES = 64


@dataclass
class Job:
    """What is known of each record so far; N input records, k demonstrations for each.

    One-shot passes are numbered `record * k + rank`.
    """

    records: Records
    template: Template
    max_length: int | None
    status: list[str | None]
    rejections: list[Rejection]
    scored_tokens: np.ndarray  # int32 [N], equal in all passes of a record
    zero_length: np.ndarray  # int32 [N], positions of the zero-shot pass once it is cut
    one_length: np.ndarray  # int32 [N, k], 0 where the demonstration leaves no room
    prefix_length: np.ndarray  # int32 [N], positions of the whole record, as a demonstration
    parents: np.ndarray  # int64 [N, k], the record behind whose kept keys and values the pass runs, or -1
    nll_zero: np.ndarray  # float32 [N]
    nll_one: np.ndarray  # float32 [N, k]
    neighbors: Neighbors
    stats: dict[str, float] = field(default_factory=lambda: {"forwarded_tokens": 0, "padding_tokens": 0})

    @classmethod
    def start(cls, records: Records, template: Template, max_length: int | None, k: int) -> Job:
        """A job of which nothing is known but what reading the records has shown."""
        n = len(records)
        return cls(
            records=records,
            template=template,
            max_length=max_length,
            status=list(records.status),
            rejections=list(records.rejections),
            scored_tokens=np.zeros(n, np.int32),
            zero_length=np.zeros(n, np.int32),
            one_length=np.zeros((n, k), np.int32),
            prefix_length=np.zeros(n, np.int32),
            parents=np.full((n, k), -1, np.int64),
            nll_zero=np.full(n, np.nan, np.float32),
            nll_one=np.full((n, k), np.nan, np.float32),
            neighbors=Neighbors.none(n, k),
        )

    def pending(self) -> np.ndarray:
        """bool [N]: the records that nothing speaks against so far."""
        return np.array([status in (None, "truncated") for status in self.status])

    def require_two(self, source: Source) -> None:
        """Raises ValueError, with what there is instead, unless two records can be scored."""
        if self.pending().sum() >= 2:
            return
        counts = ", ".join(f"{count} {status or 'scorable'}" for status, count in Counter(self.status).items())
        reason = f"; {self.rejections[0].location}: {self.rejections[0].reason}" if self.rejections else ""
        raise ValueError(
            f"{source.name}: at least two records that can be scored are needed, since each is the other's "
            f"demonstration; found {counts}{reason}"
        )

    def measure_zero_shot(self, bars: Progress) -> None:
        """Tokenizes every record once: what is too long or has no response token falls out here."""

        def measure(i: int, record: Record) -> None:
            sequence = self.template.zero_shot(record)
            room = sequence.room(self.max_length)
            if not len(sequence.targets):
                self.status[i] = "empty_response"
            elif not room:
                self.status[i] = "too_long"
            self.scored_tokens[i] = room
            self.prefix_length[i] = len(sequence.ids)

        self._each("tokens", measure, bars)

    def measure_one_shot(self, bars: Progress, shared_length: int) -> None:
        """Lengths of all passes; a demonstration may cost a response its tail or all of its room.

        Where a one-shot sequence begins, token for token, with the demonstration's own sequence, it can be run behind
        it: up to `shared_length` positions.
        """

        def measure(i: int, record: Record) -> None:
            demonstrations = [int(j) for j in self.neighbors.index[i] if j >= 0]
            if not demonstrations:
                self.status[i] = "no_neighbor"
                return
            zero = self.template.zero_shot(record)
            passes = [self.template.one_shot(self.records[j], record) for j in demonstrations]
            rooms = [one.room(self.max_length) for one in passes]
            # A demonstration that leaves no room is left out; the others share what the tightest of them leaves.
            room = min([zero.room(self.max_length), *(room for room in rooms if room)])
            if not any(rooms):
                self.status[i] = "demonstration_too_long"
                return
            self.scored_tokens[i] = room
            if room < len(zero.targets):
                self.status[i] = "truncated"
            self.zero_length[i] = len(zero.cut(room).ids)
            for rank, (j, one) in enumerate(zip(demonstrations, passes, strict=True)):
                if not rooms[rank]:
                    continue
                one = one.cut(room)
                self.one_length[i, rank] = len(one.ids)
                prefix = self.template.zero_shot(self.records[j]).ids
                inside = len(one.ids) <= shared_length and len(prefix) <= one.rows[0]
                if inside and np.array_equal(one.ids[: len(prefix)], prefix):
                    self.parents[i, rank] = j

        self._each("plan", measure, bars)

    def run(
        self, engine: Engine, bars: Progress, run: Run | None = None, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        """All passes of every record that is left, unit by unit; those that `run` holds already are taken from there.

        Raises Interrupted behind the unit during which `stopping` became true.
        """
        left = self.pending()
        zero = np.where(left, self.zero_length, 0)
        one = np.where(left[:, None], self.one_length, 0).ravel()
        parents = self.parents.ravel()
        units = plan_units(
            zero,
            one,
            self.prefix_length,
            parents,
            cache_tokens=engine.facts.cache_tokens,
            unit_tokens=UNIT_BATCHES * engine.facts.batch_tokens,
        )
        planned = sum(forwarded_tokens(unit, zero, one, self.prefix_length, parents) for unit in units)
        finished = dict(run.parts()) if run is not None else {}
        if run is not None:
            run.save_plan(len(units), planned)
        begin = time.perf_counter()
        with bars.task("scoring", planned, "tokens") as advance:
            for result in finished.values():
                self._take(result)
                advance(result.forwarded_tokens)
            left_units = [(number, unit) for number, unit in enumerate(units) if number not in finished]
            if left_units and stopping():
                raise Interrupted(f"stopped after {len(finished)} of {len(units)} units")
            for count, done in enumerate(engine.run(left_units, self, advance), len(finished) + 1):
                if run is not None:
                    run.save_part(done.number, done.result, done.seconds)
                self._take(done.result)
                if stopping() and count < len(units):
                    raise Interrupted(f"stopped after {count} of {len(units)} units")
        self.stats["scoring_seconds"] = time.perf_counter() - begin
        finite = np.isfinite(self.nll_zero) & (np.isfinite(self.nll_one) | (self.one_length == 0)).all(axis=1)
        for i in np.flatnonzero(left & ~finite):
            self.status[i] = "non_finite"

    def _take(self, result: UnitResult) -> None:
        for (numbers, losses), column in (
            (result.zero_shot, self.nll_zero),
            (result.one_shot, self.nll_one.reshape(-1)),
        ):
            column[numbers] = losses
        self.stats["forwarded_tokens"] += result.forwarded_tokens
        self.stats["padding_tokens"] += result.padding_tokens

    def zero_shot(self, record: int) -> TokenSequence:
        """The record alone, cut to what is scored."""
        return self.template.zero_shot(self.records[record]).cut(int(self.scored_tokens[record]))

    def one_shot(self, number: int) -> TokenSequence:
        """A record behind a demonstration, cut to what is scored."""
        record, rank = divmod(number, self.parents.shape[1])
        demonstration = self.records[int(self.neighbors.index[record, rank])]
        return self.template.one_shot(demonstration, self.records[record]).cut(int(self.scored_tokens[record]))

    def prefix(self, record: int, scored: bool) -> TokenSequence:
        """All of the record, as others continue it, with its own targets where it is scored."""
        return self.template.zero_shot(self.records[record]).prefix(int(self.scored_tokens[record]) if scored else 0)

    def parent(self, number: int) -> int:
        """The record that a one-shot pass continues."""
        return int(self.parents.flat[number])

    def table(self) -> pa.Table:
        """A row per input record, as `Scores.table` describes it."""
        n, k = self.parents.shape
        status = ["ok" if status is None else status for status in self.status]
        unscored = np.array([name not in ("ok", "truncated") for name in status])
        no_tokens = np.array([name not in ("ok", "truncated", "non_finite") for name in status])
        no_neighbor = self.neighbors.index[:, 0] < 0
        used = self.one_length > 0
        # Without a pass there is no loss; a mean over nothing is never shown, its record being unscored.
        nll_one = self.nll_one[:, 0] if k == 1 else _mean(self.nll_one, used)
        columns = {
            "index": pa.array(np.arange(n)),
            "id": self.records.ids(),
            "miwv": pa.array(nll_one - self.nll_zero, mask=unscored),
            "nll_one_shot": pa.array(nll_one, mask=unscored),
            "nll_zero_shot": pa.array(self.nll_zero, mask=unscored),
            "response_tokens": pa.array(self.scored_tokens, mask=no_tokens),
            "neighbor": pa.array(self.neighbors.index[:, 0], mask=no_neighbor),
            "similarity": pa.array(self.neighbors.similarity[:, 0], mask=no_neighbor),
            "status": pa.array(status),
        }
        if k > 1:
            deviation = (self.nll_one - nll_one[:, None]) ** 2
            columns["miwv_spread"] = pa.array(np.sqrt(_mean(deviation, used)), mask=unscored)
            lists = [[int(j) for j in row if j >= 0] for row in self.neighbors.index]
            columns["neighbors"] = pa.array(lists, pa.list_(pa.int64()))
        return pa.table(columns, schema=SCHEMA if k == 1 else MULTI_SCHEMA)

    def _each(self, name: str, measure: Callable[[int, Record], None], bars: Progress) -> None:
        left = np.flatnonzero(self.pending())
        with bars.task(name, len(left), "records") as advance:
            for i in left.tolist():
                record = self.records[i]
                try:
                    measure(i, record)
                except ValueError as error:
                    self.status[i] = "malformed"
                    self.rejections.append(Rejection(i, f"record {i}", str(error), record.embedded_text))
                advance(1)


def _mean(values: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the used entries, float32 [N], NaN where none is used."""
    total = np.where(used, values, 0).sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = (total / used.sum(axis=1)).astype(np.float32)
    return mean
