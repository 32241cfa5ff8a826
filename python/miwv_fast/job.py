"""A scoring job: what is known of each record, stage by stage, until its row can be written."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miwv_fast.corpus import Corpus, count_scored, cut_lengths, tokenize, tokenize_behind
from miwv_fast.engine import Engine
from miwv_fast.errors import Interrupted
from miwv_fast.forest import plan_units
from miwv_fast.neighbors import Neighbors
from miwv_fast.progress import Progress, Tally
from miwv_fast.records import Records
from miwv_fast.rejections import Rejection, Rejections
from miwv_fast.runner import UnitResult
from miwv_fast.scores import MULTI_SCHEMA, SCHEMA, STATUSES
from miwv_fast.sharing import PassSequences
from miwv_fast.sources import Source
from miwv_fast.store import Run
from miwv_fast.templates import Template

# More make a unit cheaper by a percent (less padding), and longer to wait for, to lose and to share among workers.
UNIT_BATCHES = 16
_OK, _TRUNCATED, _MALFORMED = (STATUSES.index(name) for name in ("ok", "truncated", "malformed"))


@dataclass
class Job:
    """What is known of each record so far; N input records, k demonstrations for each.

    One-shot passes are numbered `record * k + rank`.
    """

    records: Records
    template: Template
    max_length: int | None
    status: np.ndarray  # int8 [N], places in STATUSES; `ok` until something speaks against it
    corpus: Corpus = field(init=False)  # set by `measure_zero_shot`
    rejections: Rejections
    scored_tokens: np.ndarray  # int32 [N], equal in all passes of a record
    zero_length: np.ndarray  # int32 [N], positions of the zero-shot pass once it is cut
    one_length: np.ndarray  # int32 [N, k], 0 where the demonstration leaves no room
    parents: np.ndarray  # int64 [N, k], the demonstration where the pass begins with that as it stands alone, or -1
    nll_zero: np.ndarray  # float32 [N]
    nll_one: np.ndarray  # float32 [N, k]
    neighbors: Neighbors
    stats: dict[str, float] = field(
        default_factory=lambda: {"forwarded_tokens": 0, "resumed_tokens": 0, "padding_tokens": 0}
    )

    @classmethod
    def start(cls, records: Records, template: Template, max_length: int | None, k: int) -> Job:
        """A job of which nothing is known but what reading the records has shown."""
        n = len(records)
        return cls(
            records=records,
            template=template,
            max_length=max_length,
            status=pc.index_in(records.status, pa.array(STATUSES)).fill_null(_OK).to_numpy().astype(np.int8),
            rejections=Rejections(records.rejections),
            scored_tokens=np.zeros(n, np.int32),
            zero_length=np.zeros(n, np.int32),
            one_length=np.zeros((n, k), np.int32),
            parents=np.full((n, k), -1, np.int64),
            nll_zero=np.full(n, np.nan, np.float32),
            nll_one=np.full((n, k), np.nan, np.float32),
            neighbors=Neighbors.none(n, k),
        )

    @property
    def k(self) -> int:
        """How many demonstrations a record is scored with."""
        return int(self.parents.shape[1])

    def pending(self) -> np.ndarray:
        """bool [N]: the records that nothing speaks against so far."""
        pending: np.ndarray = (self.status == _OK) | (self.status == _TRUNCATED)
        return pending

    def require_two(self, source: Source) -> None:
        """Raises ValueError, with what there is instead, unless two records can be scored."""
        if self.pending().sum() >= 2:
            return
        numbers = np.bincount(self.status, minlength=len(STATUSES)).tolist()
        names = ("scorable", *STATUSES[1:])
        counts = ", ".join(f"{count} {name}" for name, count in zip(names, numbers, strict=True) if count)
        reason = f"; {self.rejections[0].location}: {self.rejections[0].reason}" if self.rejections else ""
        raise ValueError(
            f"{source.name}: at least two records that can be scored are needed, since each is the other's "
            f"demonstration; found {counts}{reason}"
        )

    def require_known(self, vocab_size: int) -> None:
        """Raises ValueError if there is a token that the model does not know."""
        highest = int(self.corpus.alone.ids.values.max())
        if highest >= vocab_size:
            raise ValueError(
                f"the tokenizer gives token {highest}, but the model knows {vocab_size}: do they belong together?"
            )

    def measure_zero_shot(self, bars: Progress) -> None:
        """Tokenizes every record once: what is too long or has no response token falls out here."""
        left = self.pending()
        with bars.task("tokens", int(left.sum()), "records") as advance:
            self.corpus = tokenize(self.records, left, self.template, self._reject, advance)
        left = self.pending()
        spans, eos = self.corpus.alone.spans, self.corpus.end_of_turn is not None
        self.scored_tokens[:] = count_scored(spans, 0, self.max_length, eos)
        self._set(left & (self.scored_tokens == 0), "too_long")
        self._set(left & (count_scored(spans, 0, None, eos) == 0), "empty_response")

    def measure_one_shot(self, bars: Progress, shared_length: int) -> None:
        """Lengths of all passes; a demonstration may cost a response its tail or all of its room.

        Where a one-shot sequence begins, token for token, with the demonstration's own sequence, it can be run behind
        it: up to `shared_length` positions.
        """
        corpus, left = self.corpus, self.pending()
        self._set(left & (self.neighbors.index < 0).all(axis=1), "no_neighbor")
        if not corpus.tails:
            self._tokenize_behind(bars)
        left = self.pending()
        spans, eos = corpus.alone.spans, corpus.end_of_turn is not None
        rooms = []
        for rank in range(self.k):
            room = count_scored(corpus.tail(rank).spans, self._base(rank), self.max_length, eos)
            rooms.append(np.where(left & (self.neighbors.index[:, rank] >= 0), room, 0))
        # A demonstration that leaves no room is left out; the others share what the tightest of them leaves.
        self._set(left & ~np.any(rooms, axis=0), "demonstration_too_long")
        left = self.pending()
        for room in rooms:
            np.minimum(self.scored_tokens, room, out=self.scored_tokens, where=room > 0)
        self._set(left & (self.scored_tokens < count_scored(spans, 0, None, eos)), "truncated")
        self.zero_length[left] = cut_lengths(spans, self.scored_tokens, eos)[left]
        for rank, room in enumerate(rooms):
            tail = corpus.tail(rank)
            length = self._base(rank) + cut_lengths(tail.spans, self.scored_tokens, eos)
            length = np.where(room > 0, length, 0)
            # The first scored token is predicted behind all of the demonstration.
            first = np.concatenate([tail.spans.values[:, 0], [0]])[tail.spans.offsets[:-1]]
            shared = (length > 0) & tail.behind & (first > 0) & (length <= shared_length)
            self.one_length[:, rank] = length
            self.parents[shared, rank] = self.neighbors.index[shared, rank]

    def _tokenize_behind(self, bars: Progress) -> None:
        """Every record behind each of its demonstrations, where the template looks at both."""
        with bars.task("plan", self.k * int(self.pending().sum()), "passes") as advance:
            for rank in range(self.k):
                demonstration = np.where(self.pending(), self.neighbors.index[:, rank], -1)
                tails = tokenize_behind(self.corpus, self.records, demonstration, self.template, self._reject, advance)
                self.corpus.tails.append(tails)

    def _base(self, rank: int) -> np.ndarray:
        """Where the tails of this rank begin, int64 [N]."""
        lengths = self.corpus.alone.ids.lengths
        return np.where(self.corpus.tail(rank).behind, lengths[self.neighbors.index[:, rank]], 0)

    def _set(self, which: np.ndarray, status: str) -> None:
        self.status[which] = STATUSES.index(status)

    def _reject(self, record: int, reason: str) -> None:
        self.status[record] = _MALFORMED
        self.rejections.append(Rejection(record, f"record {record}", reason, self.records[record].embedded_text))

    def run(
        self,
        engine: Engine,
        bars: Progress,
        shared_length: int,
        run: Run | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """All passes of every record that is left, unit by unit; those that `run` holds already are taken from there.

        What passes of up to `shared_length` positions have in common is run once. Raises Interrupted behind the unit
        during which `stopping` became true.
        """
        left = self.pending()
        zero_length, one_length = np.where(left, self.zero_length, 0), np.where(left[:, None], self.one_length, 0)
        unit_tokens = UNIT_BATCHES * engine.facts.batch_tokens
        sequences = PassSequences(
            self.corpus, self.neighbors.index, self.scored_tokens, zero_length, one_length, self.parents
        )
        sequences.share(shared_length, unit_tokens)
        units = plan_units(sequences.passes, cache_tokens=engine.facts.cache_tokens, unit_tokens=unit_tokens)
        planned = sum(map(sequences.passes.forwarded_tokens, units))
        if run is not None:
            run.save_plan(len(units), planned, engine.workers)
        tally = Tally(len(units), int(np.count_nonzero(zero_length)))
        begin = time.perf_counter()
        with bars.task("scoring", planned, "tokens") as advance:
            finished = set()
            for number, result in run.parts(units) if run is not None else ():
                if number in finished:  # two processes have written it, where a file system has no locks
                    continue
                finished.add(number)
                self._take(result)
                self.stats["resumed_tokens"] += result.forwarded_tokens
                advance(result.forwarded_tokens, tally.add(len(result.zero_shot[0])))
            left_units = [(number, unit) for number, unit in enumerate(units) if number not in finished]
            if left_units and stopping():
                raise Interrupted(f"stopped after {len(finished)} of {len(units)} units")
            with closing(engine.run(left_units, sequences, advance)) as results:
                for count, done in enumerate(results, len(finished) + 1):
                    if run is not None:
                        run.save_part(done.number, done.result, done.seconds)
                    self._take(done.result)
                    records, tokens = len(done.result.zero_shot[0]), done.result.forwarded_tokens
                    advance(0, tally.add(records, tokens, done.seconds, done.worker))
                    if stopping() and count < len(units):
                        raise Interrupted(f"stopped after {count} of {len(units)} units")
        self.stats["scoring_seconds"] = time.perf_counter() - begin
        finite = np.isfinite(self.nll_zero) & (np.isfinite(self.nll_one) | (self.one_length == 0)).all(axis=1)
        self._set(left & ~finite, "non_finite")

    def _take(self, result: UnitResult) -> None:
        for (numbers, losses), column in (
            (result.zero_shot, self.nll_zero),
            (result.one_shot, self.nll_one.reshape(-1)),
        ):
            column[numbers] = losses
        self.stats["forwarded_tokens"] += result.forwarded_tokens
        self.stats["padding_tokens"] += result.padding_tokens

    def table(self) -> pa.Table:
        """A row per input record, as `Scores.table` describes it."""
        unscored = ~self.pending()
        no_tokens = unscored & (self.status != STATUSES.index("non_finite"))
        used = self.one_length > 0
        # The nearest that was used; where none was, the nearest there is.
        rows = np.arange(len(used))
        nearest = rows, np.argmax(used, axis=1)
        neighbor, similarity = self.neighbors.index[nearest], self.neighbors.similarity[nearest]
        no_neighbor = neighbor < 0
        # Without a pass there is no loss; a mean over nothing is never shown, its record being unscored.
        nll_one = self.nll_one[:, 0] if self.k == 1 else _mean(self.nll_one, used)
        columns = {
            "index": pa.array(rows),
            "id": self.records.table["id"],
            "miwv": pa.array(nll_one - self.nll_zero, mask=unscored),
            "nll_one_shot": pa.array(nll_one, mask=unscored),
            "nll_zero_shot": pa.array(self.nll_zero, mask=unscored),
            "response_tokens": pa.array(self.scored_tokens, mask=no_tokens),
            "neighbor": pa.array(neighbor, mask=no_neighbor),
            "similarity": pa.array(similarity, mask=no_neighbor),
            "status": pa.array(STATUSES).take(pa.array(self.status)),
        }
        if self.k > 1:
            deviation = (self.nll_one - nll_one[:, None]) ** 2
            columns["miwv_spread"] = pa.array(np.sqrt(_mean(deviation, used)), mask=unscored)
            there = (self.neighbors.index >= 0) & (used | ~used.any(axis=1, keepdims=True))
            ends = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
            columns["neighbors"] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), self.neighbors.index[there])
        return pa.table(columns, schema=SCHEMA if self.k == 1 else MULTI_SCHEMA)


def _mean(values: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the used entries, float32 [N], NaN where none is used."""
    total = np.where(used, values, 0).sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = (total / used.sum(axis=1)).astype(np.float32)
    return mean
