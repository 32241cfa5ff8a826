"""For each record, the most similar other records: exactly, or among candidates that an index finds."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch

from miwv_fast.exact import TIE, Groups, Near, exact_near
from miwv_fast.progress import Progress

# Above this many distinct embeddings an index is asked. N² D operations: an hour at a million records on two cores.
APPROXIMATE_ABOVE = {"cpu": 200_000, "cuda": 4_000_000}
_BLOCK_ROWS = 8192

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Neighbors:
    """Each record's most similar other records, nearest first: `index` int64 [N, k], -1 where there are no more, and
    `similarity` float32 [N, k], NaN there.

    `recall` is the share of a sample of records whose nearest is the exact one, None where the search was exact.
    """

    index: np.ndarray
    similarity: np.ndarray
    recall: float | None = None

    @staticmethod
    def none(n: int, k: int) -> Neighbors:
        """Nobody has a neighbour yet."""
        return Neighbors(np.full((n, k), -1, np.int64), np.full((n, k), np.nan, np.float32))


Search = Callable[[Groups, int], Generator[Near]]


def nearest(
    embeddings: np.ndarray,
    candidates: np.ndarray,
    k: int,
    device: str,
    progress: Progress,
    elsewhere: Search | None = None,
    workers: int = 1,
) -> Neighbors:
    """The k most similar other records by cosine, for each record in `candidates` (bool [N]), among them.

    Byte-identical embeddings form one group; similarities within 1e-6 of the best of those that are left are ties;
    ties go to the lowest index. A record whose embedding is zero or not finite has no neighbour and is nobody's; a
    warning says how many there are.

    Exact, with N² D multiplications and additions, up to 200,000 groups (4 million on a GPU): memory beside the
    embeddings is a copy of them and 256 MiB. Above, where FAISS is installed, its k-means divides them into cells,
    those of the nearest cells are compared, and `recall` says how many of the nearest were found. The exact search runs
    `elsewhere` where that is given, shared by `workers`; the limit then grows with the square root of their number, so
    that it takes no longer.
    """
    n = len(embeddings)
    result = Neighbors.none(n, k)
    groups = _find_groups(embeddings, candidates)
    if len(groups.members) < 2:
        return result
    limit = APPROXIMATE_ABOVE.get(torch.device(device).type, APPROXIMATE_ABOVE["cpu"])
    if len(groups) > limit * workers**0.5 and _has_index(len(groups)):
        from miwv_fast.approximate import find_near

        near, recall = find_near(groups, k, progress)
        result = replace(result, recall=recall)
    elif elsewhere is not None:
        near = _with_progress(elsewhere(groups, k), len(groups), progress)
    else:
        near = exact_near(groups, np.arange(len(groups)), k, device, progress)
    for part in near:
        _choose(part, groups, k, result)
    return result


def _with_progress(parts: Generator[Near], total: int, progress: Progress) -> Iterator[Near]:
    with progress.task("neighbours", total, "records") as advance, closing(parts):
        for part in parts:
            yield part
            advance(len(part.groups))


def _has_index(size: int) -> bool:
    try:
        import faiss  # noqa: F401
    except ImportError:
        _log.warning(
            "the neighbours of %d records are searched exactly, which takes long; with pip install 'miwv-fast[faiss]' "
            "nearly all of them are found in a fraction of the time",
            size,
        )
        return False
    return True


def _find_groups(embeddings: np.ndarray, candidates: np.ndarray) -> Groups:
    """Groups of the candidates whose embeddings have a direction."""
    norms = np.zeros(len(embeddings))
    for begin in range(0, len(embeddings), _BLOCK_ROWS):
        block = slice(begin, begin + _BLOCK_ROWS)
        norms[block] = np.linalg.norm(embeddings[block].astype(np.float64), axis=1)
    directed = np.isfinite(norms) & (norms > 0)
    without = np.flatnonzero(candidates & ~directed)
    if len(without):
        _log.warning(
            "%d embeddings are zero or not finite: these records have no neighbour, the first is record %d",
            len(without),
            without[0],
        )
    members = np.flatnonzero(candidates & directed)
    group = _number_distinct(embeddings, members)
    ordered = members[np.argsort(group, kind="stable")]
    start = np.concatenate([[0], np.cumsum(np.bincount(group))])
    first = ordered[start[:-1]]

    def unit(chosen: np.ndarray) -> np.ndarray:
        result = np.empty((len(chosen), embeddings.shape[1]), np.float32)
        for begin in range(0, len(chosen), _BLOCK_ROWS):
            rows = first[chosen[begin : begin + _BLOCK_ROWS]]
            result[begin : begin + _BLOCK_ROWS] = embeddings[rows] / norms[rows, None]
        return result

    return Groups(ordered, start, unit)


def _number_distinct(embeddings: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The number of each member's embedding among the distinct ones, as they come, int64 [M]."""
    digests = np.empty((len(members), 16), np.uint8)
    for begin in range(0, len(members), _BLOCK_ROWS):
        rows = embeddings[members[begin : begin + _BLOCK_ROWS]] + 0.0  # -0.0 is 0.0
        parts = (hashlib.blake2b(row, digest_size=16).digest() for row in rows)
        digests[begin : begin + _BLOCK_ROWS] = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 16)
    _, index, inverse = np.unique(digests.view("V16").ravel(), return_index=True, return_inverse=True)
    number = np.empty(len(index), np.int64)
    number[np.argsort(index)] = np.arange(len(index))
    numbered: np.ndarray = number[inverse]
    return numbered


def _choose(near: Near, groups: Groups, k: int, result: Neighbors) -> None:
    """Fills in the neighbours of the records of these groups."""
    rows, begins, ends = near.groups, near.ends[:-1], near.ends[1:]
    first, size = groups.first, np.diff(groups.start)
    if k == 1:
        # By far the most frequent case: the lowest index is the first, since groups are in the order of theirs.
        alone = size[rows] == 1
        found = alone & (begins < ends)
        result.index[first[rows[found]], 0] = first[near.other[begins[found]]]
        result.similarity[first[rows[found]], 0] = near.similarity[begins[found]]
        rows, begins, ends = rows[~alone], begins[~alone], ends[~alone]
    for row, begin, end in zip(rows.tolist(), begins.tolist(), ends.tolist(), strict=True):
        group = groups.members[groups.start[row] : groups.start[row + 1]]
        near_by = [(1.0, int(i)) for i in group[: k + 1]]
        for other, similarity in zip(near.other[begin:end], near.similarity[begin:end], strict=True):
            begin_other = groups.start[other]
            some = groups.members[begin_other : min(begin_other + k + 1, groups.start[other + 1])]
            near_by += [(float(similarity), int(i)) for i in some]
        for record in group.tolist():
            _take(record, [pair for pair in near_by if pair[1] != record], k, result)


def _take(record: int, near_by: list[tuple[float, int]], k: int, result: Neighbors) -> None:
    """The best, ties to the lowest index, then the best of those that are left, and so on."""
    for rank in range(min(k, len(near_by))):
        best = max(similarity for similarity, _ in near_by)
        chosen = min((pair for pair in near_by if pair[0] >= best - TIE), key=lambda pair: pair[1])
        near_by.remove(chosen)
        result.index[record, rank] = chosen[1]
        result.similarity[record, rank] = chosen[0]
