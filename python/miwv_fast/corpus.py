"""The tokens of all records, each text tokenized once, and the sequences that are put together from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from miwv_fast.assembly import TokenSequence, TokenTable, assemble, score_spans
from miwv_fast.ragged import GrowingRagged, Ragged
from miwv_fast.records import Records
from miwv_fast.templates import Template

_BATCH_RECORDS = 4096

Reject = Callable[[int, str], None]


@dataclass(frozen=True)
class Tails:
    """What stands behind demonstrations: tail i is `head[i]`, then record i's own sequence from `drop[i]` on.

    `head` int32, `drop` int32 [N]. `spans`: where the scored responses begin and end in the tail. `behind` bool [N]:
    the demonstration's own sequence stands in front, token for token; where not, the tail is the whole sequence.
    """

    head: Ragged
    drop: np.ndarray
    spans: Ragged
    behind: np.ndarray


@dataclass
class Corpus:
    """The sequences of N records: alone, and behind demonstrations.

    `tails` has one member for each demonstration of a record, or a single one where it doesn't matter which it is.
    """

    alone: TokenTable
    tails: list[Tails]
    end_of_turn: int | None

    def tail(self, rank: int) -> Tails:
        """What stands behind the demonstrations of this rank."""
        return self.tails[rank % len(self.tails)]

    def zero_shot(self, record: int) -> TokenSequence:
        """The record alone, every response token scored."""
        return self.alone.sequence(record, self.end_of_turn)

    def one_shot(self, record: int, rank: int, demonstration: int) -> TokenSequence:
        """The record behind its demonstration of this rank; the scored tokens are those of `zero_shot(record)`."""
        tail = self.tail(rank)
        parts = [tail.head[record], self.alone.ids[record][tail.drop[record] :]]
        base = 0
        if tail.behind[record]:
            parts.insert(0, self.alone.ids[demonstration])
            base = len(parts[0])
        return score_spans(np.concatenate(parts), tail.spans[record] + base, self.end_of_turn)


def tokenize(
    records: Records, wanted: np.ndarray, template: Template, reject: Reject, advance: Callable[[int], None]
) -> Corpus:
    """The wanted records (bool [N]) alone and, where the template says that it is the same for all, behind others.

    A record that cannot be tokenized has no tokens; `reject` is called with its number and the reason.
    """
    ids, spans = GrowingRagged(len(records)), GrowingRagged(len(records), columns=2)
    behind = _GrowingTails(len(records))

    def make(numbers: np.ndarray) -> TokenTable:
        chosen = records.take(numbers)
        tails = [layout for record in chosen if (layout := template.tail(record)) is not None]
        return assemble([*(template.alone(record) for record in chosen), *tails], template.encoder)

    for numbers, table in _in_batches(np.flatnonzero(wanted), make, reject, advance):
        own = table.part(0, len(numbers))
        ids.append(numbers, own.ids)
        spans.append(numbers, own.spans)
        if len(table) > len(own):
            behind.append(numbers, table.part(len(numbers), len(table)), own.ids)
    corpus = Corpus(TokenTable(ids.finish(), spans.finish()), [], template.end_of_turn)
    if behind.filled:
        corpus.tails.append(behind.finish())
    return corpus


def tokenize_behind(
    corpus: Corpus,
    records: Records,
    demonstration: np.ndarray,
    template: Template,
    reject: Reject,
    advance: Callable[[int], None],
) -> Tails:
    """Records behind these demonstrations, int64 [N], -1 where a record has none, as the template writes each pair.

    What a demonstration's own sequence begins and what a record's own sequence ends is found on the tokens.
    """
    tails = _GrowingTails(len(records))

    def make(numbers: np.ndarray) -> TokenTable:
        pairs = zip(records.take(demonstration[numbers]), records.take(numbers), strict=True)
        return assemble([template.behind(*pair) for pair in pairs], template.encoder)

    for numbers, table in _in_batches(np.flatnonzero(demonstration >= 0), make, reject, advance):
        starts, behind = [], []
        for row, number in enumerate(numbers.tolist()):
            before, ids = corpus.alone.ids[demonstration[number]], table.ids[row]
            inside = len(before) < table.spans[row][0, 0] and np.array_equal(ids[: len(before)], before)
            starts.append(len(before) if inside else 0)
            behind.append(inside)
        own = Ragged.join([corpus.alone.ids[number] for number in numbers.tolist()])
        shorter = TokenTable(
            Ragged.join([table.ids[row][start:] for row, start in enumerate(starts)]),
            Ragged(table.spans.values - np.repeat(starts, table.spans.lengths)[:, None], table.spans.offsets),
        )
        tails.append(numbers, shorter, own, np.array(behind))
    return tails.finish()


class _GrowingTails:
    """Tails of N records, filled from the first to the last."""

    def __init__(self, rows: int) -> None:
        self._head, self._spans = GrowingRagged(rows), GrowingRagged(rows, columns=2)
        self._drop, self._behind = np.zeros(rows, np.int32), np.ones(rows, bool)
        self.filled = False

    def append(self, numbers: np.ndarray, tails: TokenTable, own: Ragged, behind: np.ndarray | None = None) -> None:
        """What is common to the ends of a tail and of `own`, the record's own sequence, is left out."""
        common = _common_ends(tails.ids, own)
        place = np.arange(len(tails.ids.values)) - np.repeat(tails.ids.offsets[:-1], tails.ids.lengths)
        kept = tails.ids.lengths - common
        head = tails.ids.values[place < np.repeat(kept, tails.ids.lengths)]
        self._head.append(numbers, Ragged(head, np.concatenate([[0], np.cumsum(kept)])))
        self._spans.append(numbers, tails.spans)
        self._drop[numbers] = own.lengths - common
        if behind is not None:
            self._behind[numbers] = behind
        self.filled = True

    def finish(self) -> Tails:
        return Tails(self._head.finish(), self._drop, self._spans.finish(), self._behind)


def _common_ends(one: Ragged, other: Ragged) -> np.ndarray:
    """How many values at the end of each row are the same in both, int64 [N]."""
    shorter = np.minimum(one.lengths, other.lengths)
    row = np.repeat(np.arange(len(one)), shorter)
    place = np.arange(len(row)) - np.repeat(np.cumsum(shorter) - shorter, shorter)
    values = (each.values[(each.offsets[1:] - shorter)[row] + place] for each in (one, other))
    differ = np.not_equal(*values)
    last = np.zeros(len(one), np.int64)
    np.maximum.at(last, row[differ], place[differ] + 1)
    common: np.ndarray = shorter - last
    return common


def _in_batches(
    numbers: np.ndarray, make: Callable[[np.ndarray], TokenTable], reject: Reject, advance: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, TokenTable]]:
    """Records and what is made of them; where one cannot be made it is looked for and left out."""
    for begin in range(0, len(numbers), _BATCH_RECORDS):
        batch = numbers[begin : begin + _BATCH_RECORDS]
        yield from _make(batch, make, reject)
        advance(len(batch))


def _make(
    numbers: np.ndarray, make: Callable[[np.ndarray], TokenTable], reject: Reject
) -> Iterator[tuple[np.ndarray, TokenTable]]:
    try:
        table = make(numbers)
    except ValueError as error:
        if len(numbers) == 1:
            reject(int(numbers[0]), str(error))
            return
        for half in np.array_split(numbers, 2):
            yield from _make(half, make, reject)
        return
    yield numbers, table


def count_scored(spans: Ragged, base: np.ndarray | int, limit: int | None, end_of_turn: bool) -> np.ndarray:
    """How many scored tokens of each sequence stand within the first `limit` positions, int64 [N].

    `spans` begin `base` (int64 [N]) positions later than they say.
    """
    start, stop = spans.values.T.astype(np.int64)
    count = stop - start + end_of_turn
    if limit is not None:
        later = np.broadcast_to(base, len(spans))[spans.rows]
        count = np.clip(limit - later - start, 0, count)
    return spans.sum(count)


def cut_lengths(spans: Ragged, scored: np.ndarray, end_of_turn: bool) -> np.ndarray:
    """Positions up to the one that predicts the last of `scored` (int64 [N]) tokens, int64 [N]; 0 where none is."""
    start, stop = spans.values.T.astype(np.int64)
    count, row = stop - start + end_of_turn, spans.rows
    total = np.concatenate([[0], np.cumsum(count)])
    before = total[:-1] - total[spans.offsets[:-1]][row]
    holds = (before < scored[row]) & (scored[row] <= before + count)
    lengths = np.zeros(len(spans), np.int64)
    lengths[row[holds]] = (start + scored[row] - before - 1)[holds]
    return lengths
