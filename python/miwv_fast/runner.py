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


class Sequences(Protocol):
    """Where the token sequences of records come from."""

    def zero_shot(self, record: int) -> TokenSequence:
        """The record alone, cut to what is scored."""
        ...

    def one_shot(self, number: int) -> TokenSequence:
        """A record behind a demonstration, cut to what is scored."""
        ...

    def prefix(self, root: int, scored: bool) -> TokenSequence:
        """All of a root, as others continue it, with its own targets where it is scored."""
        ...

    def parent(self, number: int) -> int:
        """The root that a one-shot pass continues."""
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
        zero, one = [], []
        if len(unit.roots):
            roots = [sequences.prefix(int(i), bool(s)) for i, s in zip(unit.roots, unit.scored, strict=True)]
            prefixes = self.lm.prefixes(np.array([len(root.ids) for root in roots]))
            nll = self._in_batches(
                roots, lambda chosen, places: self.lm.response_nll_and_keep(chosen, prefixes, places), advance
            )
            zero.append((unit.roots[unit.scored], nll[unit.scored]))
            row = {record: place for place, record in enumerate(unit.roots.tolist())}
            parents = np.array([row[sequences.parent(int(i))] for i in unit.children])
            behind = [
                sequences.one_shot(int(i)).behind(int(prefixes.lengths[parent]))
                for i, parent in zip(unit.children, parents, strict=True)
            ]
            one.append((unit.children, self._run_children(behind, parents, prefixes, advance)))
            del prefixes
        for records, make, losses in (
            (unit.zero_shot, sequences.zero_shot, zero),
            (unit.one_shot, sequences.one_shot, one),
        ):
            if len(records):
                whole = [make(int(i)) for i in records]
                losses.append(
                    (records, self._in_batches(whole, lambda chosen, _: self.lm.response_nll(chosen), advance))
                )
        return UnitResult(_join(zero), _join(one), self._forwarded, self._padded)

    def _run_children(
        self, behind: Sequence[TokenSequence], parents: np.ndarray, prefixes: Prefixes, advance: Callable[[int], None]
    ) -> np.ndarray:
        def run(chosen: list[TokenSequence], places: np.ndarray) -> torch.Tensor:
            rows = parents[places]
            width = int(prefixes.lengths[rows].max()) + max(len(sequence.ids) for sequence in chosen)
            if width <= self.lm.shared_length:
                return self.lm.response_nll(chosen, prefixes, rows)
            # Padding between a short prefix and its continuation would push the prefix out of a sliding window.
            alone = [self.lm.response_nll([sequence], prefixes, rows[[place]]) for place, sequence in enumerate(chosen)]
            return torch.cat(alone)

        return self._in_batches(behind, run, advance, prefixes.lengths[parents])

    def _in_batches(
        self,
        sequences: Sequence[TokenSequence],
        run: Callable[[list[TokenSequence], np.ndarray], torch.Tensor],
        advance: Callable[[int], None],
        before: np.ndarray | None = None,
    ) -> np.ndarray:
        """Losses float32 [B] of all sequences; results stay on the device until the last batch is under way."""
        lengths = np.array([len(sequence.ids) for sequence in sequences])
        before = np.zeros_like(lengths) if before is None else before
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
        torch.cuda.empty_cache() if torch.cuda.is_available() else None
        self.batch_tokens = max(1, self.batch_tokens // 2)
        _log.warning("out of memory: going on with batches of %d tokens", self.batch_tokens)


def _join(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    return np.concatenate([records for records, _ in parts]), np.concatenate([losses for _, losses in parts])
