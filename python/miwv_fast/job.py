"""A scoring job: what is known of each record, stage by stage, until its row can be written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from miwv_fast.forest import plan_units
from miwv_fast.neighbors import Neighbors
from miwv_fast.progress import Progress
from miwv_fast.records import Record, Records, Rejection
from miwv_fast.runner import Runner
from miwv_fast.scores import SCHEMA
from miwv_fast.sources import Source
from miwv_fast.templates import Template, TokenSequence

UNIT_BATCHES = 64


@dataclass
class Job:
    """What is known of each record so far; arrays have one entry per input record."""

    records: Records
    template: Template
    max_length: int | None
    status: list[str | None]
    rejections: list[Rejection]
    scored_tokens: np.ndarray  # int32 [N], equal in both passes
    zero_length: np.ndarray  # int32 [N], positions of the zero-shot pass once it is cut
    one_length: np.ndarray
    prefix_length: np.ndarray  # int32 [N], positions of the whole record, as a demonstration
    parents: np.ndarray  # int64 [N], the record behind whose kept keys and values the one-shot pass runs, or -1
    nll_zero: np.ndarray  # float32 [N]
    nll_one: np.ndarray
    neighbors: Neighbors
    stats: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, records: Records, template: Template, max_length: int | None) -> Job:
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
            one_length=np.zeros(n, np.int32),
            prefix_length=np.zeros(n, np.int32),
            parents=np.full(n, -1, np.int64),
            nll_zero=np.full(n, np.nan, np.float32),
            nll_one=np.full(n, np.nan, np.float32),
            neighbors=Neighbors(np.full(n, -1, np.int64), np.full(n, np.nan, np.float32)),
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
        """Lengths of both passes; the demonstration may cost a response its tail or all of its room.

        Where the one-shot sequence begins, token for token, with the demonstration's own sequence, it can be run
        behind it: up to `shared_length` positions.
        """

        def measure(i: int, record: Record) -> None:
            neighbor = int(self.neighbors.index[i])
            if neighbor < 0:
                self.status[i] = "no_neighbor"
                return
            demonstration = self.records[neighbor]
            zero = self.template.zero_shot(record)
            one = self.template.one_shot(demonstration, record)
            room = min(one.room(self.max_length), zero.room(self.max_length))
            self.scored_tokens[i] = room
            if not room:
                self.status[i] = "demonstration_too_long"
                return
            if room < len(zero.targets):
                self.status[i] = "truncated"
            one = one.cut(room)
            self.zero_length[i] = len(zero.cut(room).ids)
            self.one_length[i] = len(one.ids)
            prefix = self.template.zero_shot(demonstration).ids
            if (
                len(one.ids) <= shared_length
                and len(prefix) <= one.rows[0]
                and np.array_equal(one.ids[: len(prefix)], prefix)
            ):
                self.parents[i] = neighbor

        self._each("plan", measure, bars)

    def run(self, runner: Runner, bars: Progress) -> None:
        """Both passes of every record that is left, unit by unit."""
        left = self.pending()
        units = plan_units(
            np.where(left, self.zero_length, 0),
            np.where(left, self.one_length, 0),
            self.prefix_length,
            self.parents,
            cache_tokens=runner.cache_tokens(),
            unit_tokens=UNIT_BATCHES * runner.batch_tokens,
        )
        begin = time.perf_counter()
        forwarded = padding = 0
        with bars.task("scoring", self._planned_tokens(left), "tokens") as advance:
            for unit in units:
                result = runner.run(unit, self, advance)
                for (records, losses), column in ((result.zero_shot, self.nll_zero), (result.one_shot, self.nll_one)):
                    column[records] = losses
                forwarded += result.forwarded_tokens
                padding += result.padding_tokens
        seconds = time.perf_counter() - begin
        self.stats = {"forwarded_tokens": forwarded, "padding_tokens": padding, "scoring_seconds": seconds}
        for i in np.flatnonzero(left):
            if not np.isfinite(self.nll_one[i] - self.nll_zero[i]):
                self.status[i] = "non_finite"

    def _planned_tokens(self, left: np.ndarray) -> int:
        shared = left & (self.parents >= 0)
        behind = self.prefix_length[self.parents[shared]].sum()
        return int((self.zero_length + self.one_length)[left].sum() - behind)

    def zero_shot(self, record: int) -> TokenSequence:
        """The record alone, cut to what is scored."""
        return self.template.zero_shot(self.records[record]).cut(int(self.scored_tokens[record]))

    def one_shot(self, record: int) -> TokenSequence:
        """The record behind its demonstration, cut to what is scored."""
        demonstration = self.records[int(self.neighbors.index[record])]
        return self.template.one_shot(demonstration, self.records[record]).cut(int(self.scored_tokens[record]))

    def prefix(self, record: int, scored: bool) -> TokenSequence:
        """All of the record, as others continue it, with its own targets where it is scored."""
        return self.template.zero_shot(self.records[record]).prefix(int(self.scored_tokens[record]) if scored else 0)

    def parent(self, record: int) -> int:
        """The record that this one continues."""
        return int(self.parents[record])

    def table(self) -> pa.Table:
        """A row per input record, as `Scores.table` describes it."""
        n = len(self.records)
        status = ["ok" if status is None else status for status in self.status]
        unscored = np.array([name not in ("ok", "truncated") for name in status])
        no_tokens = np.array([name not in ("ok", "truncated", "non_finite") for name in status])
        no_neighbor = self.neighbors.index < 0
        columns = [
            pa.array(np.arange(n)),
            self.records.ids(),
            pa.array(self.nll_one - self.nll_zero, mask=unscored),
            pa.array(self.nll_one, mask=unscored),
            pa.array(self.nll_zero, mask=unscored),
            pa.array(self.scored_tokens, mask=no_tokens),
            pa.array(self.neighbors.index, mask=no_neighbor),
            pa.array(self.neighbors.similarity, mask=no_neighbor),
            pa.array(status),
        ]
        return pa.table(columns, schema=SCHEMA)

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
