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
    """`index` int64 [N] is each record's most similar other record, -1 where there is none; `similarity` float32."""

    index: np.ndarray
    similarity: np.ndarray


def embed(texts: Sequence[str], wanted: np.ndarray, embedder: Embedder, device: str, progress: Progress) -> np.ndarray:
    """Embeddings float32 [N, D] of the records whose place in `wanted` (bool [N]) is set; the other rows are 0.

    An array is checked and returned as it is. Equal texts are embedded once, so that their embeddings are equal
    to the byte. Raises ValueError if the embedder's result is not one row per text, or it cannot be loaded.
    """
    if isinstance(embedder, np.ndarray | torch.Tensor):
        array = np.asarray(embedder.detach().float().cpu() if isinstance(embedder, torch.Tensor) else embedder)
        if array.ndim != 2 or len(array) != len(texts) or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f"an embedding array has a row of floats for every input record: expected [{len(texts)}, D], "
                f"got {list(array.shape)} of {array.dtype}"
            )
        return array.astype(np.float32, copy=False)
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


def nearest(embeddings: np.ndarray, candidates: np.ndarray, device: str, progress: Progress) -> Neighbors:
    """The most similar other record by cosine, exactly, for each record in `candidates` (bool [N]), among them.

    Byte-identical embeddings form one group; similarities within 1e-6 of the best are ties; ties go to the
    lowest index. A record whose embedding is zero or not finite has no neighbour and is nobody's. Memory is
    one block of rows of the similarity matrix, 256 MiB; N² D multiplications and additions.
    """
    n = len(embeddings)
    result = Neighbors(np.full(n, -1, np.int64), np.full(n, np.nan, np.float32))
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    members = np.flatnonzero(candidates & np.isfinite(norms) & (norms > 0))
    if len(members) < 2:
        return result
    # Groups in the order of their first members, so that the first maximum found is the lowest index.
    bytes_of_rows = np.ascontiguousarray(embeddings[members] + 0.0).view(f"V{embeddings.shape[1] * 4}").ravel()
    _, first, group = np.unique(bytes_of_rows, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    group, first = rank[group], members[first[order]]
    size = np.bincount(group)
    # The second member of each group: the neighbour of the first one within its group.
    rest = np.flatnonzero(first[group] != members)
    second = np.full(len(first), n, np.int64)
    np.minimum.at(second, group[rest], members[rest])

    unit = torch.from_numpy((embeddings[first] / norms[first, None]).astype(np.float32)).to(device)
    own = torch.from_numpy(size > 1).to(device)
    best = np.empty(len(first), np.float32)
    other = np.full(len(first), n, np.int64)
    block = max(1, _BLOCK_ELEMENTS // len(first))
    with progress.task("neighbours", len(first), "records") as advance:
        for begin in range(0, len(first), block):
            end = min(begin + block, len(first))
            similarity = (unit[begin:end] @ unit.T).clamp_(-1, 1)
            itself = torch.arange(begin, end, device=similarity.device)
            similarity[itself - begin, itself] = torch.where(own[begin:end], 1.0, -2.0)
            top = similarity.max(dim=1).values
            similarity[itself - begin, itself] = -2.0
            found, lowest = (similarity >= (top - TIE)[:, None]).max(dim=1)
            best[begin:end] = top.cpu()
            other[begin:end] = np.where(found.cpu(), first[lowest.cpu()], n)
            advance(end - begin)
    within = np.where(first[group] == members, second[group], first[group])
    within[size[group] == 1] = n
    chosen = np.minimum(other[group], within)
    found_any = chosen < n
    result.index[members[found_any]] = chosen[found_any]
    result.similarity[members[found_any]] = best[group][found_any]
    return result


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
