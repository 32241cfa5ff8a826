"""Similar records among those in the nearest cells of a k-means clustering, and how many of the nearest these are."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from miwv_fast.exact import BLOCK_ELEMENTS, TIE, Groups, Near, exact_near
from miwv_fast.progress import Progress

RECALL = 0.95
_SAMPLE = 1000
_BLOCK_ROWS = 8192
_BLOCK_QUERIES = 1 << 16
_FIRST_PROBES = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cells:
    """All groups in the order of their cells: cell c holds `order[start[c]:start[c + 1]]`.

    `units` float32 [G, D] are their embeddings in that order, `centroids` float32 [C, D].
    """

    order: np.ndarray
    start: np.ndarray
    units: torch.Tensor
    centroids: torch.Tensor

    def __len__(self) -> int:
        return len(self.centroids)

    def nearest(self, rows: torch.Tensor, count: int) -> np.ndarray:
        """The cells whose centroids are most similar to rows [B, D], int64 [B, count]."""
        parts = [(part @ self.centroids.T).topk(count, dim=1).indices for part in rows.split(_BLOCK_ROWS)]
        return torch.cat(parts).numpy()


def find_near(groups: Groups, k: int, progress: Progress) -> tuple[Iterator[Near], float]:
    """Candidates for the k most similar other groups of every group, and the recall of the nearest in a sample.

    Each group is compared with those in the cells nearest to it: as many cells as it takes to find 95 % of the sample's
    nearest, up to a sixteenth of all. Where they hold fewer than k others, the search is exact. Beside the embeddings
    there is a copy of them.
    """
    cells = _build(groups, progress)
    sample = np.sort(np.random.default_rng(0).choice(len(groups), min(_SAMPLE, len(groups)), replace=False))
    exact = _exact_best(groups, sample)
    probes, most = min(_FIRST_PROBES, len(cells)), max(_FIRST_PROBES, len(cells) // 16)
    while True:
        best = np.full(len(groups), -2.0)
        for part in _search(cells, groups, sample, 1, probes, Progress(False)):
            best[part.groups] = np.maximum.reduceat(part.similarity, part.ends[:-1])
        recall = float((best[sample] >= exact - TIE).mean())
        if recall >= RECALL or probes >= most:
            break
        probes = min(2 * probes, most)
    log = _log.info if recall >= RECALL else _log.warning
    log(
        "approximate neighbours: %d of %d cells visited, recall@1 %.3f in a sample of %d",
        probes,
        len(cells),
        recall,
        len(sample),
    )
    return _search(cells, groups, np.arange(len(groups)), k, probes, progress), recall


def _build(groups: Groups, progress: Progress) -> Cells:
    centroids = _cluster(groups)
    label = np.empty(len(groups), np.int64)
    with progress.task("cells", len(groups), "records") as advance:
        for begin in range(0, len(groups), _BLOCK_ROWS):
            chosen = np.arange(begin, min(begin + _BLOCK_ROWS, len(groups)))
            label[chosen] = (torch.from_numpy(groups.unit(chosen)) @ centroids.T).argmax(dim=1).numpy()
            advance(len(chosen))
    order = np.argsort(label, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(label, minlength=len(centroids)))])
    return Cells(order, start, torch.from_numpy(groups.unit(order)), centroids)


def _cluster(groups: Groups) -> torch.Tensor:
    """Centroids float32 [C, D] of length 1."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    count = int(4 * len(groups) ** 0.5)
    training = np.random.default_rng(0).choice(len(groups), min(len(groups), 40 * count), replace=False)
    rows = groups.unit(np.sort(training))
    kmeans = faiss.Kmeans(rows.shape[1], count, niter=6, spherical=True, min_points_per_centroid=1, seed=0)
    kmeans.train(rows)
    return torch.from_numpy(kmeans.centroids)


def _search(
    cells: Cells, groups: Groups, wanted: np.ndarray, k: int, probes: int, progress: Progress
) -> Iterator[Near]:
    """The k most similar other groups of the wanted ones, int64, and their ties.

    Groups go in the order of their cells, so that many of a block visit the same ones.
    """
    is_wanted = np.zeros(len(groups), bool)
    is_wanted[wanted] = True
    places = np.flatnonzero(is_wanted[cells.order])
    few: list[np.ndarray] = []
    with progress.task("neighbours", len(wanted), "records") as advance:
        for begin in range(0, len(places), _BLOCK_QUERIES):
            block = places[begin : begin + _BLOCK_QUERIES]
            near, enough = _search_block(cells, block, min(k, len(groups) - 1), probes)
            few.append(cells.order[block[~enough]])
            yield near
            advance(len(block))
    left = np.sort(np.concatenate(few))
    if len(left):
        yield from exact_near(groups, left, k, "cpu", Progress(False))


def _search_block(cells: Cells, places: np.ndarray, k: int, probes: int) -> tuple[Near, np.ndarray]:
    """The k most similar others, and their ties, of those groups that have so many in the cells that they visit.

    `places` int64 [B] are those of the groups in `cells.order`; the second result says which of them have, bool [B].
    """
    rows = cells.units[torch.from_numpy(places)]
    visited = cells.nearest(rows, probes).ravel()
    by_cell = np.argsort(visited, kind="stable")
    ends = np.searchsorted(visited[by_cell], np.arange(len(cells) + 1))
    best = torch.full((len(rows), k), -2.0)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for cell in np.flatnonzero(np.diff(ends) * np.diff(cells.start)).tolist():
        queries = by_cell[ends[cell] : ends[cell + 1]] // probes
        begin, end = cells.start[cell], cells.start[cell + 1]
        for part in np.array_split(queries, -(-len(queries) * (end - begin) // BLOCK_ELEMENTS)):
            found.append(_compare(cells, rows, places, part, range(begin, end), best))
    row, place, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
    enough = (best[:, -1] > -2).numpy()
    kept = enough[row] & (similarity >= best[:, -1].numpy()[row] - TIE)
    row, other, similarity = row[kept], cells.order[place[kept]], similarity[kept]
    order = np.lexsort((other, row))
    chosen = np.flatnonzero(enough)
    ends = np.append(np.searchsorted(row[order], chosen), len(row))
    return Near(cells.order[places[chosen]], ends, other[order], similarity[order]), enough


def _compare(
    cells: Cells, rows: torch.Tensor, places: np.ndarray, queries: np.ndarray, cell: range, best: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some rows with all groups of a cell: pairs of row and place that may be among the row's best, with similarities.

    `best` float32 [B, k], descending, is brought up to date.
    """
    chosen = torch.from_numpy(queries)
    similarity = rows[chosen] @ cells.units[cell.start : cell.stop].T
    own = np.flatnonzero((places[queries] >= cell.start) & (places[queries] < cell.stop))
    similarity[torch.from_numpy(own), torch.from_numpy(places[queries[own]] - cell.start)] = -2.0
    k = best.shape[1]
    here = similarity.amax(dim=1, keepdim=True) if k == 1 else similarity.topk(min(k, len(cell)), dim=1).values
    best[chosen] = torch.cat([best[chosen], here.clamp_(max=1)], dim=1).topk(k, dim=1).values
    least = (best[chosen, -1] - TIE).clamp(min=-1.5)
    # Most cells hold nothing better than what was found before.
    hit = (here[:, 0] >= least).nonzero()[:, 0]
    near = similarity[hit].clamp_(max=1)
    row, column = (part.numpy() for part in (near >= least[hit, None]).nonzero(as_tuple=True))
    return queries[hit.numpy()[row]], cell.start + column, near.numpy()[row, column].clip(-1)


def _exact_best(groups: Groups, sample: np.ndarray) -> np.ndarray:
    """The similarity of the best other group, over blocks of all groups: no copy of the embeddings is made."""
    rows = torch.from_numpy(groups.unit(sample))
    best = torch.full((len(sample),), -1.0)
    for begin in range(0, len(groups), _BLOCK_ROWS):
        block = np.arange(begin, min(begin + _BLOCK_ROWS, len(groups)))
        similarity = rows @ torch.from_numpy(groups.unit(block)).T
        inside = np.flatnonzero((sample >= begin) & (sample < begin + len(block)))
        similarity[inside, sample[inside] - begin] = -1
        best = torch.maximum(best, similarity.amax(dim=1))
    return best.numpy()
