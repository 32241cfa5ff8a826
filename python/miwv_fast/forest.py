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
    """Trees and single sequences, packed into units.

    A unit keeps at most `cache_tokens` of roots and preambles (at least one of each) and forwards about `unit_tokens`
    beside its preambles; a root with more children than that is run again in the next unit, where it is not scored.
    """
    units = list(_plan_trees(passes, cache_tokens, unit_tokens))
    is_root = np.zeros(len(passes.root), bool)
    is_root[passes.parent[(passes.parent >= 0) & (passes.one > 0)]] = True
    zero = passes.zero - np.where(passes.zero > 0, passes.before, 0)
    singles = [(np.flatnonzero((zero > 0) & ~is_root), zero)]
    singles += [(np.flatnonzero((passes.one > 0) & (passes.parent < 0)), passes.one)]
    nothing = np.empty(0, np.int64)
    for kind, (records, length) in enumerate(singles):
        records = records[np.argsort(-length[records], kind="stable")]
        ends = np.searchsorted(np.cumsum(length[records]), np.arange(unit_tokens, length[records].sum(), unit_tokens))
        for part in np.split(records, ends):
            if kind == 0:
                for zero_shot in _split_by_preambles(part, passes, cache_tokens):
                    preambles = _used(passes.preamble[zero_shot])
                    units.append(Unit(preambles, nothing, nothing.astype(bool), nothing, zero_shot, nothing))
            elif len(part):
                units.append(Unit(nothing, nothing, nothing.astype(bool), nothing, nothing, part))
    return units


def _split_by_preambles(records: np.ndarray, passes: Passes, cache_tokens: int) -> Iterator[np.ndarray]:
    """The records in turn, as many at a time as there is room for their preambles; at least one."""
    begin = cached = 0
    held: set[int] = set()
    for place, preamble in enumerate(passes.preamble[records].tolist()):
        if preamble < 0 or preamble in held:
            continue
        if place > begin and cached + int(passes.root[preamble]) > cache_tokens:
            yield records[begin:place]
            begin, cached, held = place, 0, set()
        held.add(preamble)
        cached += int(passes.root[preamble])
    if len(records):
        yield records[begin:]


def _used(preambles: np.ndarray) -> np.ndarray:
    return np.unique(preambles[preambles >= 0])


def _plan_trees(passes: Passes, cache_tokens: int, unit_tokens: int) -> Iterator[Unit]:
    one, parent, length = passes.one, passes.parent, passes.root
    own = length - passes.before
    children = np.flatnonzero((one > 0) & (parent >= 0))
    # Roots of like length share a unit, so that their caches stand side by side almost without padding.
    order = np.lexsort((children, parent[children], -length[parent[children]]))
    roots: list[int] = []
    scored: list[bool] = []
    held: list[int] = []
    preambles: set[int] = set()
    cached = forwarded = 0
    last_root = -1
    nothing = np.empty(0, np.int64)

    def unit() -> Unit:
        kept = np.array(roots, np.int64)
        used = _used(passes.preamble[kept])
        other = ~np.isin(kept, used)
        return Unit(used, kept[other], np.array(scored, bool)[other], np.array(held, np.int64), nothing, nothing)

    def room(root: int) -> int:
        preamble = int(passes.preamble[root])
        return int(own[root]) + (int(length[preamble]) if preamble >= 0 and preamble not in preambles else 0)

    for child in children[order].tolist():
        root = int(parent[child])
        new = not roots or root != roots[-1]
        grown = cached + (room(root) if new else 0)
        if held and (grown > cache_tokens or forwarded >= unit_tokens):
            yield unit()
            roots, scored, held, preambles = [], [], [], set()
            cached = forwarded = 0
            new = True
        if new:
            roots.append(root)
            scored.append(root != last_root and bool(passes.zero[root] > 0))
            cached += room(root)
            preambles.add(int(passes.preamble[root]))
            forwarded += int(own[root])
            last_root = root
        held.append(child)
        forwarded += int(one[child] - length[root])
    if held:
        yield unit()


def plan_batches(
    lengths: np.ndarray, batch_tokens: int, overhead: int = BATCH_OVERHEAD, before: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Places of sequences of like length, int64, batch by batch, longest first so that memory is asked for early.

    A batch costs its padded size, its longest sequence times its sequences, and `overhead` tokens for being a batch;
    the cuts that cost least in all are found by dynamic programming. The padded size is at most `batch_tokens`; a
    sequence longer than that is a batch by itself. `before` are the lengths of the prefixes that they continue: those
    of a batch are padded, too, and take a little of the time and at most `PREFIXES` times as many tokens.
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
