"""The most similar other embeddings, each compared with all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from miwv_fast.ops.matmul import linear
from miwv_fast.progress import Progress

TIE = 1e-6
BLOCK_ELEMENTS = 1 << 26  # similarities held at a time: 256 MiB of float32

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Groups:
    """Records with byte-identical embeddings, numbered by their first record; group g is
    `members[start[g]:start[g + 1]]`, ascending. `unit(groups)` gives their embeddings, float32 of length 1."""

    members: np.ndarray
    start: np.ndarray
    unit: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return len(self.start) - 1

    @property
    def first(self) -> np.ndarray:
        """The lowest record of each group."""
        lowest: np.ndarray = self.members[self.start[:-1]]
        return lowest


@dataclass(frozen=True)
class Near:
    """Other groups similar to some groups: to `groups[r]` those in `other[ends[r]:ends[r + 1]]`, ascending."""

    groups: np.ndarray
    ends: np.ndarray
    other: np.ndarray
    similarity: np.ndarray


def exact_near(groups: Groups, wanted: np.ndarray, k: int, device: str, progress: Progress) -> Iterator[Near]:
    """The k most similar other groups of the wanted ones, and their ties, block by block."""
    unit = torch.from_numpy(groups.unit(np.arange(len(groups)))).to(device)
    block = block_rows(len(groups))
    begun = time.perf_counter()
    with progress.task("neighbours", len(wanted), "records") as advance:
        for begin in range(0, len(wanted), block):
            rows = wanted[begin : begin + block]
            yield search_rows(unit, rows, k)
            advance(len(rows))
            if begin == 0 and len(wanted) > 20 * block:
                minutes = (time.perf_counter() - begun) * len(wanted) / len(rows) / 60
                _log.info("the exact neighbours of %d records take about %.0f minutes", len(wanted), minutes)


def block_rows(groups: int) -> int:
    """How many rows are searched at a time: their similarities fill 256 MiB."""
    return max(1, BLOCK_ELEMENTS // groups)


def search_rows(unit: torch.Tensor, wanted: np.ndarray, k: int) -> Near:
    """The k most similar other rows of some rows of `unit`, float32 [G, D] of length 1, and their ties."""
    rows = torch.from_numpy(wanted).to(unit.device)
    similarity = linear(unit[rows], unit).clamp_(-1, 1)
    similarity[torch.arange(len(rows), device=unit.device), rows] = -2.0
    # Whoever ties with the k-th best may stand in the place of one of the best k.
    best = min(k, len(unit))
    kth = similarity.amax(dim=1) if best == 1 else similarity.topk(best, dim=1).values[:, -1]
    row, other = (similarity >= (kth[:, None] - TIE).clamp(min=-1.5)).nonzero(as_tuple=True)
    near = similarity[row, other].cpu().numpy()
    ends = np.searchsorted(row.cpu().numpy(), np.arange(len(rows) + 1))
    return Near(wanted, ends, other.cpu().numpy(), near)
