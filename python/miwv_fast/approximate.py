"""Similar records among the candidates that an inverted file of FAISS finds, and how many of the nearest those are."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from miwv_fast.neighbors import TIE, Groups, Near, exact_near
from miwv_fast.progress import Progress

RECALL = 0.95
_SAMPLE = 1000
_QUERIES = 8192
_MORE = 15  # candidates beyond the k nearest, for ties

_log = logging.getLogger(__name__)


def find_near(groups: Groups, k: int, progress: Progress) -> tuple[Iterator[Near], float]:
    """Candidates for the k most similar other groups of every group, and the recall of the nearest in a sample.

    As many cells of the index are visited as it takes to find 95 % of the sample's nearest, up to a sixteenth of all.
    Where they hold fewer than k others, the search is exact. The index holds a copy of the embeddings.
    """
    index = _build(groups, progress)
    sample = np.sort(np.random.default_rng(0).choice(len(groups), min(_SAMPLE, len(groups)), replace=False))
    exact = _exact_best(groups, sample)
    index.nprobe = 4
    while True:
        found = np.concatenate([_best(part) for part in _search(index, groups, sample, 1, Progress(False))])
        recall = float((found >= exact - TIE).mean())
        if recall >= RECALL or index.nprobe >= index.nlist // 16:
            break
        index.nprobe *= 2
    log = _log.info if recall >= RECALL else _log.warning
    log(
        "approximate neighbours: %d of %d cells visited, recall@1 %.3f in a sample of %d",
        *(index.nprobe, index.nlist, recall, len(sample)),
    )
    return _search(index, groups, np.arange(len(groups)), k, progress), recall


def _build(groups: Groups, progress: Progress) -> Any:
    """An inverted file of all groups, by inner product."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    cells = int(4 * len(groups) ** 0.5)
    training = np.random.default_rng(0).choice(len(groups), min(len(groups), 40 * cells), replace=False)
    rows = groups.unit(np.sort(training))
    width = rows.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = 6
    index.cp.min_points_per_centroid = 1
    index.train(rows)
    with progress.task("index", len(groups), "records") as advance:
        for begin in range(0, len(groups), _QUERIES):
            chosen = np.arange(begin, min(begin + _QUERIES, len(groups)))
            index.add(groups.unit(chosen))
            advance(len(chosen))
    return index


def _search(index: Any, groups: Groups, wanted: np.ndarray, k: int, progress: Progress) -> Iterator[Near]:
    few: list[np.ndarray] = []
    with progress.task("neighbours", len(wanted), "records") as advance:
        for begin in range(0, len(wanted), _QUERIES):
            rows = wanted[begin : begin + _QUERIES]
            similarity, other = index.search(groups.unit(rows), k + 1 + _MORE)
            usable = (other >= 0) & (other != rows[:, None])
            enough = usable.sum(axis=1) >= min(k, len(groups) - 1)
            few.append(rows[~enough])
            yield _near(rows[enough], np.clip(similarity[enough], -1, 1), other[enough], usable[enough], k)
            advance(len(rows))
    left = np.concatenate(few)
    if len(left):
        yield from exact_near(groups, left, k, "cpu", Progress(False))


def _near(rows: np.ndarray, similarity: np.ndarray, other: np.ndarray, usable: np.ndarray, k: int) -> Near:
    """The best k usable candidates of each row and their ties."""
    similarity = np.where(usable, similarity, -2)
    kth = -np.sort(-similarity, axis=1)[:, k - 1] if len(rows) else np.empty(0)
    row, column = (usable & (similarity >= kth[:, None] - TIE)).nonzero()
    found = other[row, column]
    order = np.lexsort((found, row))
    ends = np.searchsorted(row, np.arange(len(rows) + 1))
    return Near(rows, ends, found[order], similarity[row, column][order])


def _exact_best(groups: Groups, sample: np.ndarray) -> np.ndarray:
    """The similarity of the best other group, over blocks of all groups: no copy of the embeddings is made."""
    rows = torch.from_numpy(groups.unit(sample))
    best = torch.full((len(sample),), -1.0)
    for begin in range(0, len(groups), _QUERIES):
        block = np.arange(begin, min(begin + _QUERIES, len(groups)))
        similarity = rows @ torch.from_numpy(groups.unit(block)).T
        inside = np.flatnonzero((sample >= begin) & (sample < begin + len(block)))
        similarity[inside, sample[inside] - begin] = -1
        best = torch.maximum(best, similarity.amax(dim=1))
    return best.numpy()


def _best(near: Near) -> np.ndarray:
    """The similarity of the best of each row."""
    return np.maximum.reduceat(near.similarity, near.ends[:-1]) if len(near.groups) else np.empty(0)
