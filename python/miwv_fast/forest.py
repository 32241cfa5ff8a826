"""The plan: which sequences run behind a shared prefix, and which run together.

A record's zero-shot sequence is the prefix of every one-shot sequence that demonstrates with it, so the records form
trees: the root is run once, with its keys and values kept, and each child only as the continuation behind it. Where it
is not, what all these one-shot sequences begin with is a root of its own, which is not scored. What many roots and
single sequences begin with, a preamble, is run once for each unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# What a batch costs beside its tokens, in tokens. Measured on two CPU cores with a model of 135M parameters: a pass of
# 200 tokens takes 10 % longer per token than one of 400. On a GPU it is the time to read the weights once.
BATCH_OVERHEAD = 16
GPU_BATCH_OVERHEAD = 128

# What it takes to continue a prefix: its keys and values are picked, attended to, and held for the time of a layer. As
# many of its tokens take the time of one that is forwarded (for a 7B shape on an H100 about 30, for 135M parameters on
# a CPU as well, by bytes and operations), and a batch picks this many times its own tokens at most.
PREFIX_TOKENS = 32
PREFIXES = 8

_NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True)
class Unit:
    """Work that depends on no other unit: five kinds of forward pass, int64.

    `preambles` and `roots` are not scored for their own sake: their keys and values are kept. A root runs behind its
    preamble where it has one; `scored`, bool, says for which roots, as records, this unit gives the zero-shot loss.
    `children` are one-shot passes run behind their parents, all of which are among these two. `zero_shot` (records)
    run behind their preambles or whole, `one_shot` (passes) whole.
    """

    preambles: np.ndarray
    roots: np.ndarray
    scored: np.ndarray
    children: np.ndarray
    zero_shot: np.ndarray
    one_shot: np.ndarray

    def parts(self) -> tuple[np.ndarray, ...]:
        """All sequences, in the order in which they are handed on."""
        return self.preambles, self.roots, self.children, self.zero_shot, self.one_shot

    def scored_passes(self) -> tuple[np.ndarray, np.ndarray]:
        """The records and the one-shot passes whose losses the unit gives, in their order."""
        return np.concatenate([self.roots[self.scored], self.zero_shot]), np.concatenate([self.children, self.one_shot])


@dataclass(frozen=True)
class Passes:
    """All passes of a job, by their lengths in tokens; 0 where there is none.

    `zero` int [R] and `one` int [P] are the zero-shot and one-shot passes, `root` int [R] the roots, which are the
    records and whatever else passes continue. `preamble` int64 [R] is the root that a root, or the zero-shot pass of
    this number, begins with, -1 where there is none; `parent` int64 [P] the root behind which a one-shot pass runs, -1
    where it runs whole.
    """

    zero: np.ndarray
    one: np.ndarray
    root: np.ndarray
    preamble: np.ndarray
    parent: np.ndarray

    @cached_property
    def before(self) -> np.ndarray:
        """int64 [R]: the length of each root's preamble."""
        return np.where(self.preamble >= 0, self.root[self.preamble], 0)

    def forwarded_tokens(self, unit: Unit) -> int:
        """The tokens that a unit of `plan_units` forwards, padding not counted."""
        roots = self.root[unit.roots] - self.before[unit.roots]
        children = self.one[unit.children] - self.root[self.parent[unit.children]]
        zero = self.zero[unit.zero_shot] - self.before[unit.zero_shot]
        parts = self.root[unit.preambles], roots, children, zero, self.one[unit.one_shot]
        return int(sum(part.sum() for part in parts))


def plan_units(passes: Passes, *, cache_tokens: int, unit_tokens: int) -> list[Unit]:
    """All passes, packed into units.

    A unit keeps at most `cache_tokens` of roots and preambles (at least one of each) and forwards about `unit_tokens`
    beside its preambles; a root with more children than that is run again in the next unit, where it is not scored.
    What shares a preamble stands together, so that few units run the same one.
    """
    units = list(_plan_trees(passes, cache_tokens, unit_tokens))
    whole = np.flatnonzero((passes.one > 0) & (passes.parent < 0))
    whole = whole[np.argsort(-passes.one[whole], kind="stable")]
    tokens = np.cumsum(passes.one[whole])
    ends = np.searchsorted(tokens, np.arange(unit_tokens, tokens.max(initial=0), unit_tokens))
    no_roots = _NOTHING, _NOTHING, _NOTHING.astype(bool), _NOTHING, _NOTHING
    return units + [Unit(*no_roots, part) for part in np.split(whole, ends) if len(part)]


def _plan_trees(passes: Passes, cache_tokens: int, unit_tokens: int) -> Iterator[Unit]:
    """Units of roots with their children, and of single records, which nothing continues."""
    one, length, preamble = passes.one, passes.root, passes.preamble
    children = np.flatnonzero((one > 0) & (passes.parent >= 0))
    children = children[np.argsort(passes.parent[children], kind="stable")]
    begin, end = (np.searchsorted(passes.parent[children], np.arange(len(length)), side) for side in ("left", "right"))
    is_root = end > begin
    own = np.where(is_root, length, passes.zero) - passes.before
    heads = np.flatnonzero(is_root | (passes.zero > 0))
    draft = _Draft()
    for head in heads[_by_preambles(heads, own[heads], ~is_root[heads], preamble)].tolist():
        family, scored, before = children[begin[head] : end[head]], bool(passes.zero[head] > 0), int(preamble[head])
        while True:
            kept = int(own[head] if len(family) else 0) + (0 if before in draft.preambles else int(length[before]))
            if draft.forwarded >= unit_tokens or (draft.kept and draft.kept + kept > cache_tokens):
                yield draft.unit()
                draft = _Draft()
                continue
            draft.preambles.add(before)
            draft.kept += kept
            draft.forwarded += int(own[head])
            if not len(family):
                draft.zero_shot.append(head)
                break
            draft.roots.append(head)
            draft.scored.append(scored)
            tokens = np.cumsum(one[family] - length[head])
            fit = 1 + int(np.searchsorted(tokens[:-1], unit_tokens - draft.forwarded))
            draft.children.append(family[:fit])
            draft.forwarded += int(tokens[fit - 1])
            if fit == len(family):
                break
            family, scored = family[fit:], False
    if draft.forwarded:
        yield draft.unit()


def _by_preambles(heads: np.ndarray, own: np.ndarray, single: np.ndarray, preamble: np.ndarray) -> np.ndarray:
    """The order in which those with one preamble stand together, roots before single records, the longest first."""
    group = preamble.copy()
    used = preamble[preamble >= 0]
    group[used] = used  # a preamble with passes of its own stands with those that begin with it
    group = group[heads]
    longest = np.zeros(len(preamble) + 1, np.int64)  # the last of those without a preamble
    np.maximum.at(longest, group, own)
    return np.lexsort((-own, single, group, -longest[group]))


class _Draft:
    """A unit under way: what it keeps and forwards so far."""

    def __init__(self) -> None:
        self.preambles = {-1}
        self.roots: list[int] = []
        self.scored: list[bool] = []
        self.children = [_NOTHING]
        self.zero_shot: list[int] = []
        self.kept = self.forwarded = 0

    def unit(self) -> Unit:
        """A root that is a preamble of others is kept as that alone."""
        preambles = np.array(sorted(self.preambles - {-1}), np.int64)
        roots = np.array(self.roots, np.int64)
        other = ~np.isin(roots, preambles)
        return Unit(
            preambles,
            roots[other],
            np.array(self.scored, bool)[other],
            np.concatenate(self.children),
            np.array(self.zero_shot, np.int64),
            _NOTHING,
        )


def plan_batches(
    lengths: np.ndarray, batch_tokens: int, overhead: int = BATCH_OVERHEAD, before: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Places of sequences of like length, int64, batch by batch, longest first so that memory is asked for early.

    A batch costs its padded size, its longest sequence times its sequences, and `overhead` tokens for being a batch;
    the cuts that cost least in all are found by dynamic programming. The padded size is at most `batch_tokens`; a
    sequence longer than that is a batch by itself. `before` are the lengths of the prefixes that they continue, which
    are padded to the longest in a batch as well: `PREFIX_TOKENS` tokens of them cost as much as one that is forwarded,
    and a batch has at most `PREFIXES` times `batch_tokens` of them.
    """
    before = np.zeros_like(lengths) if before is None else before
    order = np.lexsort((-before, -lengths))
    longest, prefix = lengths[order].astype(np.int64), before[order].astype(np.int64)
    n = len(order)
    cost = np.zeros(n + 1, np.int64)  # of the sequences from this one on, in parts of a token
    count = np.zeros(n, np.int64)  # of the first batch among them
    for begin in range(n - 1, -1, -1):
        most = max(1, min(n - begin, batch_tokens // max(1, int(longest[begin]))))
        counts = np.arange(1, most + 1)
        widest = np.maximum.accumulate(prefix[begin : begin + most])
        fit = max(1, int(np.count_nonzero(counts * widest <= PREFIXES * batch_tokens)))
        padded = counts * (PREFIX_TOKENS * longest[begin] + widest) + PREFIX_TOKENS * overhead
        choices = (padded + cost[begin + 1 : begin + most + 1])[:fit]
        count[begin] = choices.argmin() + 1
        cost[begin] = choices.min()
    begin = 0
    while begin < n:
        yield order[begin : begin + count[begin]]
        begin += int(count[begin])
