"""Runs units of the plan on a model: roots, what continues them, and whole sequences, in batches of like length."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from miwv_fast.assembly import TokenSequence
from miwv_fast.forest import BATCH_OVERHEAD, GPU_BATCH_OVERHEAD, Unit, plan_batches
from miwv_fast.model import CausalLM

if TYPE_CHECKING:
    from miwv_fast.prefixes import Prefixes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trees:
    """The sequences of a unit, each as what follows the one that it continues: an earlier one, `parents` int64 [S], or
    none, -1. They stand in the order of the unit's fields."""

    sequences: list[TokenSequence]
    parents: np.ndarray


class Sequences(Protocol):
    """Where the token sequences of units come from."""

    def trees(self, unit: Unit) -> Trees:
        """What is to be run."""
        ...


@dataclass(frozen=True)
class UnitResult:
    """Losses of a unit in nats, float32, with the records and the one-shot passes they belong to; and tokens spent."""

    zero_shot: tuple[np.ndarray, np.ndarray]
    one_shot: tuple[np.ndarray, np.ndarray]
    forwarded_tokens: int
    padding_tokens: int


class Runner:
    """A model and its token budget, which is halved for good when a batch does not fit into memory."""

    def __init__(self, lm: CausalLM, batch_tokens: int) -> None:
        self.lm = lm
        self.batch_tokens = batch_tokens
        self._overhead = GPU_BATCH_OVERHEAD if lm.device.type == "cuda" else BATCH_OVERHEAD
        self._forwarded = self._padded = 0

    def cache_tokens(self) -> int:
        """How many tokens' keys and values a unit may keep: 1 GiB on a CPU, a quarter of the room on a GPU."""
        budget = self.lm.room() // 4 if self.lm.device.type == "cuda" else 1 << 30
        return max(self.batch_tokens, budget // max(1, self.lm.cache_bytes_per_token))

    def run(self, unit: Unit, sequences: Sequences, advance: Callable[[int], None]) -> UnitResult:
        """All passes of a unit; `advance` is called with the tokens of each batch."""
        self._forwarded = self._padded = 0
        nll = self._run_trees(sequences.trees(unit), advance)
        _, roots, children, zero, one = np.split(nll, np.cumsum([len(part) for part in unit.parts()])[:-1])
        records, passes = unit.scored_passes()
        return UnitResult(
            (records, np.concatenate([roots[unit.scored], zero])),
            (passes, np.concatenate([children, one])),
            self._forwarded,
            self._padded,
        )

    def _run_trees(self, trees: Trees, advance: Callable[[int], None]) -> np.ndarray:
        """Losses float32 [S]: first of those that others continue, which are kept, level by level."""
        parents = trees.parents
        kept = np.unique(parents[parents >= 0])
        row = np.full(len(parents) + 1, -1)  # among the kept; the last for those without a parent
        row[kept] = np.arange(len(kept))
        behind, keep = row[parents], row[:-1]
        prefixes = None
        if len(kept):
            own = np.array([len(trees.sequences[place].ids) for place in kept.tolist()], np.int64)
            prefixes = self.lm.prefixes(own, behind[kept])
        level = np.zeros(len(parents), np.int64)
        for place in np.flatnonzero(parents >= 0).tolist():
            level[place] = level[parents[place]] + 1
        groups = [(keep >= 0) & (level == depth) for depth in range(level.max())]
        groups += [(keep < 0) & (level > 0), (keep < 0) & (level == 0)]
        nll = np.empty(len(parents), np.float32)
        for which in map(np.flatnonzero, groups):
            if len(which):
                chosen = [trees.sequences[place] for place in which.tolist()]
                nll[which] = self._run_alike(chosen, prefixes, keep[which], behind[which], advance)
        return nll

    def _run_alike(
        self,
        sequences: Sequence[TokenSequence],
        prefixes: Prefixes | None,
        keep: np.ndarray,
        behind: np.ndarray,
        advance: Callable[[int], None],
    ) -> np.ndarray:
        """Losses float32 [B] of sequences that all become a prefix, or none, and that all continue one, or none."""
        continues = prefixes is not None and behind[0] >= 0
        before = prefixes.lengths[behind] if prefixes is not None and continues else np.zeros(len(sequences), np.int64)

        def run(chosen: list[TokenSequence], places: np.ndarray) -> torch.Tensor:
            if keep[0] >= 0:
                return self.lm.response_nll(chosen, prefixes, keep=keep[places])
            return self.lm.response_nll(chosen, prefixes, behind=behind[places] if continues else None)

        return self._in_batches(sequences, run, advance, before)

    def _in_batches(
        self,
        sequences: Sequence[TokenSequence],
        run: Callable[[list[TokenSequence], np.ndarray], torch.Tensor],
        advance: Callable[[int], None],
        before: np.ndarray,
    ) -> np.ndarray:
        """Losses float32 [B] of all sequences; results stay on the device until the last batch is under way."""
        lengths = np.array([len(sequence.ids) for sequence in sequences])
        left = np.arange(len(sequences))
        done: list[tuple[np.ndarray, torch.Tensor]] = []
        while len(left):
            for batch in plan_batches(lengths[left], self.batch_tokens, self._overhead, before[left]):
                places = left[batch]
                try:
                    nll = run([sequences[place] for place in places], places)
                except RuntimeError as error:
                    self._halve(error, len(places))
                    break
                done.append((places, nll))
                tokens = int(lengths[places].sum())
                self._forwarded += tokens
                self._padded += len(places) * int(lengths[places].max()) - tokens
                advance(tokens)
            finished = np.concatenate([places for places, _ in done]) if done else np.empty(0, np.int64)
            left = np.setdiff1d(np.arange(len(sequences)), finished)
        result = np.empty(len(sequences), np.float32)
        for places, nll in done:
            result[places] = nll.float().cpu().numpy()
        return result

    def _halve(self, error: RuntimeError, count: int) -> None:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise error
        if count == 1:
            raise MemoryError(
                "one sequence alone does not fit into memory; use a smaller model or max_length"
            ) from error
        torch.cuda.empty_cache()
        self.batch_tokens = max(1, self.batch_tokens // 2)
        _log.warning("out of memory: going on with batches of %d tokens", self.batch_tokens)
