"""The token sequences of all passes, and what they have in common: found on the tokens, to be run once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from miwv_fast.assembly import TokenSequence
from miwv_fast.corpus import Corpus
from miwv_fast.forest import Passes, Unit
from miwv_fast.ragged import Ragged
from miwv_fast.runner import Trees

# Fewer tokens in common are not worth a pass of their own.
LEAST_SHARED = 16
# Sequences that stand together begin in one unit and may end in the next, however few they are.
LEAST_UNITS = 2

_NOTHING = np.empty(0, np.int32)


class PassSequences:
    """The sequences of N records' passes, each cut to what is scored, with k demonstrations for each record.

    One-shot passes are numbered `record * k + rank`. What passes continue are roots: root d < N is record d, and what
    the passes with this demonstration go on with in common. Then come fronts, which are what passes with one
    demonstration begin with where that is not the demonstration as it stands alone, and preambles, with which many of
    all these begin. `passes` says how long they are, and what continues what.
    """

    passes: Passes

    def __init__(
        self,
        corpus: Corpus,
        demonstrations: np.ndarray,
        scored_tokens: np.ndarray,
        zero_length: np.ndarray,
        one_length: np.ndarray,
        parents: np.ndarray,
    ) -> None:
        """`demonstrations`, `one_length`, `parents` int [N, k]; `scored_tokens`, `zero_length` int [N].

        Lengths are 0 where there is no pass. A parent is a demonstration whose own sequence the pass begins with, -1
        where there is none.
        """
        self._corpus = corpus
        self._demonstrations, self._k = demonstrations.ravel(), demonstrations.shape[1]
        self._scored_tokens = scored_tokens
        lengths = corpus.alone.ids.lengths
        self._longer = np.full(len(lengths), -1)  # a pass that begins with the root where that is more than its record
        self._extra: list[np.ndarray] = []  # the tokens of all other roots
        self.passes = Passes(zero_length, one_length.ravel(), lengths, np.full(len(lengths), -1), parents.flatten())

    def share(self, shared_length: int, unit_tokens: int) -> None:
        """Finds what can be run once by units of `unit_tokens`; nothing longer than `shared_length` shares anything."""
        one, parent = self.passes.one, self.passes.parent
        fits = (one > 0) & (one <= shared_length)
        for group in self._by_demonstration(fits & (parent >= 0)):
            if len(group) > 1:
                self.passes.root[parent[group[0]]] = self._in_common(group)
                self._longer[parent[group[0]]] = group[0]
        singles: list[int] = []
        for group in self._by_demonstration(fits & (parent < 0)):
            if len(group) > 1 and (common := self._in_common(group)) >= LEAST_SHARED:
                parent[group] = len(self._corpus.alone) + len(self._extra)
                self._extra.append(self._one_shot(int(group[0])).ids[:common])
            else:
                singles += group.tolist()
        self._share_preambles(np.array(singles, np.int64), shared_length, unit_tokens)

    def _by_demonstration(self, which: np.ndarray) -> Iterator[np.ndarray]:
        """These passes, bool [P], in groups with the same demonstration."""
        numbers = np.flatnonzero(which)
        numbers = numbers[np.argsort(self._demonstrations[numbers], kind="stable")]
        if len(numbers):
            yield from np.split(numbers, np.flatnonzero(np.diff(self._demonstrations[numbers])) + 1)

    def _in_common(self, group: np.ndarray) -> int:
        """How many tokens all passes of a group begin with, none of which is read for a target."""
        first = self._one_shot(int(group[0]))
        length = int(first.rows[0])
        for other in map(self._one_shot, group[1:].tolist()):
            length = min(length, int(other.rows[0]))
            length = int(np.argmin(np.append(first.ids[:length] == other.ids[:length], False)))
        return length

    def _share_preambles(self, singles: np.ndarray, shared_length: int, unit_tokens: int) -> None:
        """Records, fronts and one-shot passes that continue nothing so far run behind what many of them begin with."""
        alone, known, records = self._corpus.alone, self.passes, len(self._corpus.alone)
        roots = records + len(self._extra)
        lengths = np.append(known.root, np.array([len(front) for front in self._extra], np.int64))
        continues = (known.one > 0) & (known.parent >= 0)
        parents = known.parent[continues]
        # Records that are run, alone or for others to continue, share what stands before the first row that is read.
        runs = (known.zero > 0) & (known.zero <= shared_length)
        runs[parents[parents < records]] = True
        first = np.append(alone.spans.values[:, 0], 1)[alone.spans.offsets[:-1]]
        whole = (sequence.ids[: sequence.rows[0]] for sequence in map(self._one_shot, singles.tolist()))
        beginnings = alone.ids.followed_by(chain((front[:-1] for front in self._extra), whole))
        reach = np.concatenate([np.where(runs, first - 1, 0), beginnings.lengths[records:]])
        # What each brings into a unit: its own tokens, and those of the passes that continue it.
        behind = np.bincount(parents, known.one[continues] - lengths[parents], minlength=roots).astype(np.int64)
        tokens = np.append(np.append(known.zero, lengths[records:]) + behind, known.one[singles])
        found = find_preambles(beginnings, reach, tokens, unit_tokens)
        of = np.where(found.of >= 0, roots + found.of, -1)
        known.parent[singles] = of[roots:]
        self._extra += found.tokens
        self.passes = Passes(
            zero=np.append(known.zero, np.zeros(len(self._extra), known.zero.dtype)),
            one=known.one,
            root=np.append(lengths, np.array([len(preamble) for preamble in found.tokens], np.int64)),
            preamble=np.append(of[:roots], np.full(len(found.tokens), -1)),
            parent=known.parent,
        )

    def trees(self, unit: Unit) -> Trees:
        """The sequences of a unit, each as what follows the one that it continues."""
        place = {root: place for place, root in enumerate([*unit.preambles.tolist(), *unit.roots.tolist()])}
        sequences: list[TokenSequence] = []
        parents: list[int] = []

        def add(sequence: TokenSequence, behind: int) -> None:
            parents.append(place.get(behind, -1))
            sequences.append(sequence if behind < 0 else sequence.behind(int(self.passes.root[behind])))

        for root in unit.preambles.tolist():
            add(self._root(root, scored=False), -1)
        for root, scored in zip(unit.roots.tolist(), unit.scored.tolist(), strict=True):
            add(self._root(root, scored), int(self.passes.preamble[root]))
        for number in unit.children.tolist():
            add(self._one_shot(number), int(self.passes.parent[number]))
        for record in unit.zero_shot.tolist():
            add(self._zero_shot(record), int(self.passes.preamble[record]))
        for number in unit.one_shot.tolist():
            add(self._one_shot(number), -1)
        return Trees(sequences, np.array(parents, np.int64))

    def _zero_shot(self, record: int) -> TokenSequence:
        return self._corpus.zero_shot(record).cut(int(self._scored_tokens[record]))

    def _one_shot(self, number: int) -> TokenSequence:
        record, rank = divmod(number, self._k)
        whole = self._corpus.one_shot(record, rank, int(self._demonstrations[number]))
        return whole.cut(int(self._scored_tokens[record]))

    def _root(self, root: int, scored: bool) -> TokenSequence:
        """All of a root, with the targets of its record where that is scored."""
        if root >= len(self._corpus.alone):
            return TokenSequence(self._extra[root - len(self._corpus.alone)], _NOTHING, _NOTHING)
        own = self._corpus.zero_shot(root).prefix(int(self._scored_tokens[root]) if scored else 0)
        longer = int(self._longer[root])
        if longer < 0:
            return own
        return TokenSequence(self._one_shot(longer).ids[: self.passes.root[root]], own.rows, own.targets)


@dataclass(frozen=True)
class Preambles:
    """What many of N sequences begin with: the words of a template, a system text.

    `of` int64 [N] is the preamble of each, -1 where it has none; `tokens` int32 [length] are those of each preamble.
    """

    of: np.ndarray
    tokens: list[np.ndarray]


@dataclass
class _Node:
    """Sequences `begin` to `end` of an order, whose first `depth` tokens are the same: some of those of node `parent`.

    `price` is how many units run these tokens for them, `saved_below` how many tokens nodes further down save.
    """

    begin: int
    end: int
    depth: int
    parent: int
    price: int
    saved_below: int = 0

    @property
    def saved(self) -> int:
        return (self.end - self.begin - self.price) * self.depth if self.depth >= LEAST_SHARED else 0


def find_preambles(ids: Ragged, reach: np.ndarray, tokens: np.ndarray, unit_tokens: int) -> Preambles:
    """The preambles that save most tokens if sequences with the same one fill units of `unit_tokens` one by one.

    Of sequence i the first `reach[i]` (int64 [N]) tokens can be shared; it and what continues it takes `tokens[i]`
    (int64 [N]) of a unit. Each unit runs its preambles. No preamble is the beginning of another.
    """
    order = np.flatnonzero(reach >= LEAST_SHARED)

    def node(begin: int, end: int, depth: int, parent: int) -> _Node:
        return _Node(begin, end, depth, parent, LEAST_UNITS + int(tokens[order[begin:end]].sum()) // unit_tokens)

    nodes = [node(0, len(order), 0, -1)]
    for place, each in enumerate(nodes):  # which grows
        members = order[each.begin : each.end]  # a view: sorting them leaves every node its own
        while (goes_on := reach[members] > each.depth).sum() > LEAST_UNITS:
            next_token = np.full(len(members), -1)
            next_token[goes_on] = ids.values[ids.offsets[members[goes_on]] + each.depth]
            if (next_token == next_token[0]).all():
                each.depth += 1
                continue
            by_token = np.argsort(next_token, kind="stable")
            members[:], next_token = members[by_token], next_token[by_token]
            cuts = each.begin + np.flatnonzero(np.diff(next_token, prepend=-1, append=-1))
            for begin, end in pairwise(cuts.tolist()):
                if end - begin > LEAST_UNITS:
                    nodes.append(node(begin, end, each.depth + 1, place))
            break
    for each in reversed(nodes[1:]):
        nodes[each.parent].saved_below += max(each.saved, each.saved_below)
    found = Preambles(np.full(len(ids), -1), [])
    passed = {-1}  # nodes on the way to which nothing was taken, nor at them
    for place, each in enumerate(nodes):
        if each.parent not in passed:
            continue
        if each.saved > each.saved_below:
            members = order[each.begin : each.end]
            found.of[members] = len(found.tokens)
            found.tokens.append(ids[int(members[0])][: each.depth])
        else:
            passed.add(place)
    return found
