"""Embeddings of the records and, for each, the most similar other record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miwv_fast.progress import Progress

DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
TIE = 1e-6
_BLOCK_ELEMENTS = 1 << 26  # similarities held at a time: 256 MiB of float32

_log = logging.getLogger(__name__)

Embedder = str | Path | np.ndarray | torch.Tensor | Callable[[list[str]], Any]


@dataclass(frozen=True)
class Neighbors:
    """Each record's most similar other records, nearest first: `index` int64 [N, k], -1 where there are no more, and
    `similarity` float32 [N, k], NaN there."""

    index: np.ndarray
    similarity: np.ndarray

    @staticmethod
    def none(n: int, k: int) -> Neighbors:
        """Nobody has a neighbour yet."""
        return Neighbors(np.full((n, k), -1, np.int64), np.full((n, k), np.nan, np.float32))


def embed(texts: Sequence[str], wanted: np.ndarray, embedder: Embedder, device: str, progress: Progress) -> np.ndarray:
    """Embeddings float32 [N, D] of the records whose place in `wanted` (bool [N]) is set; the other rows are 0.

    An array is checked and returned as it is. Equal texts are embedded once, so that their embeddings are equal
    to the byte. Raises ValueError if the embedder's result is not one row per text, or it cannot be loaded.
    """
    if isinstance(embedder, np.ndarray | torch.Tensor):
        return check_embeddings(embedder, len(texts))
    first: dict[str, int] = {}
    place = np.array([first.setdefault(texts[i], len(first)) for i in np.flatnonzero(wanted)], np.int64)
    unique = list(first)
    encode = embedder if callable(embedder) else _load_embedder(embedder, device, progress)
    rows = np.asarray(encode(unique), np.float32)
    if rows.ndim != 2 or len(rows) != len(unique):
        raise ValueError(f"the embedder should give [{len(unique)}, D] for {len(unique)} texts, got {list(rows.shape)}")
    embeddings = np.zeros((len(texts), rows.shape[1]), np.float32)
    embeddings[wanted] = rows[place]
    return embeddings


def check_embeddings(embeddings: np.ndarray | torch.Tensor, records: int) -> np.ndarray:
    """The embeddings as float32 [N, D]; ValueError unless there is a row of floats for every input record."""
    array = embeddings.detach().float().cpu().numpy() if isinstance(embeddings, torch.Tensor) else embeddings
    if array.ndim != 2 or len(array) != records or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"an embedding array has a row of floats for every input record: expected [{records}, D], "
            f"got {list(array.shape)} of {array.dtype}"
        )
    return array.astype(np.float32, copy=False)


def nearest(embeddings: np.ndarray, candidates: np.ndarray, k: int, device: str, progress: Progress) -> Neighbors:
    """The k most similar other records by cosine, exactly, for each record in `candidates` (bool [N]), among them.

    Byte-identical embeddings form one group; similarities within 1e-6 of the best of those that are left are ties;
    ties go to the lowest index. A record whose embedding is zero or not finite has no neighbour and is nobody's.
    Memory is one block of rows of the similarity matrix, 256 MiB; N² D multiplications and additions.
    """
    n = len(embeddings)
    result = Neighbors.none(n, k)
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    members = np.flatnonzero(candidates & np.isfinite(norms) & (norms > 0))
    if len(members) < 2:
        return result
    groups = _group(embeddings, members)
    first = np.array([group[0] for group in groups])
    unit = torch.from_numpy((embeddings[first] / norms[first, None]).astype(np.float32)).to(device)
    block = max(1, _BLOCK_ELEMENTS // len(groups))
    with progress.task("neighbours", len(groups), "records") as advance:
        for begin in range(0, len(groups), block):
            similarity = (unit[begin : begin + block] @ unit.T).clamp_(-1, 1)
            _choose(similarity, begin, groups, first, k, result)
            advance(len(similarity))
    return result


def _group(embeddings: np.ndarray, members: np.ndarray) -> list[np.ndarray]:
    """Records with byte-identical embeddings, each group ascending, the groups by their first record."""
    rows = np.ascontiguousarray(embeddings[members] + 0.0).view(f"V{embeddings.shape[1] * 4}").ravel()
    _, inverse = np.unique(rows, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    groups = np.split(members[order], np.cumsum(np.bincount(inverse))[:-1])
    return sorted(groups, key=lambda group: int(group[0]))


def _choose(
    similarity: torch.Tensor, begin: int, groups: list[np.ndarray], first: np.ndarray, k: int, result: Neighbors
) -> None:
    """Fills in the neighbours of the groups whose rows of the similarity matrix these are."""
    itself = torch.arange(begin, begin + len(similarity), device=similarity.device)
    similarity[itself - begin, itself] = -2.0
    wanted = min(k, len(first))
    # Whoever ties with the k-th best may stand in the place of one of the best k.
    kth = similarity.amax(dim=1) if wanted == 1 else similarity.topk(wanted, dim=1).values[:, -1]
    floor = kth[:, None] - TIE
    row, other = (similarity >= floor).nonzero(as_tuple=True)
    near = similarity[row, other].cpu().numpy()
    row, other = row.cpu().numpy(), other.cpu().numpy()
    ends = np.searchsorted(row, np.arange(len(similarity) + 1))
    for place in range(len(similarity)):
        group = groups[begin + place]
        inside = slice(ends[place], ends[place + 1])
        values, found = near[inside], other[inside]
        if len(group) == 1 and k == 1:
            # By far the most frequent case: the lowest index is the first, since groups are in the order of theirs.
            if values[0] > -2:
                result.index[group[0], 0], result.similarity[group[0], 0] = first[found[0]], values[0]
            continue
        near_by = [(float(v), int(i)) for v, g in zip(values, found, strict=True) if v > -2 for i in groups[g][: k + 1]]
        near_by += [(1.0, int(i)) for i in group[: k + 1]]
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


def _load_embedder(name: str | Path, device: str, progress: Progress) -> Callable[[list[str]], np.ndarray]:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(name), device=device)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot load the embedder {str(name)!r}: {reason}") from error

    def encode(texts: list[str]) -> np.ndarray:
        # Longest first: batches of like lengths, and running out of memory happens at once or never.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        result: np.ndarray | None = None
        with progress.task("embedding", len(texts), "records") as advance:
            for begin in range(0, len(order), 512):
                chunk = order[begin : begin + 512]
                rows = model.encode([texts[i] for i in chunk], batch_size=32, show_progress_bar=False)
                if result is None:
                    result = np.empty((len(texts), rows.shape[1]), np.float32)
                result[chunk] = rows
                advance(len(chunk))
        assert result is not None
        return result

    return encode
