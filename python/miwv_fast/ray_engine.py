"""Many GPUs and many machines: the same units of the plan, run by a pool of Ray Data's actors."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from miwv_fast.embedding import Embedder, Kept, embed
from miwv_fast.engine import Done
from miwv_fast.exact import Groups, Near, block_rows
from miwv_fast.forest import Unit
from miwv_fast.model import load_tokenizer
from miwv_fast.neighbors import Neighbors, nearest
from miwv_fast.packing import pack, unpack_near, unpack_result
from miwv_fast.progress import Progress
from miwv_fast.ray_cluster import check_versions, connect, ray_errors_told
from miwv_fast.ray_stage import kind_of, run_stage
from miwv_fast.ray_worker import Embed, ModelChoice, Score, Search, describe
from miwv_fast.runner import Sequences

_STAGE_TABLES = 4096


class RayEngine:
    """Workers with a model each, on a Ray cluster; this process has the tokenizer and needs neither GPU nor weights."""

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any,
        device: str,
        dtype: str | torch.dtype,
        batch_tokens: int | None,
        *,
        address: str | None = None,
        workers: int | None = None,
        gpus_per_worker: float | None = None,
    ) -> None:
        self.tokenizer = load_tokenizer(model, tokenizer)
        self._cluster = connect(address, workers, 0.0 if device == "cpu" else gpus_per_worker)
        self.workers = self._cluster.workers
        self._choice = ModelChoice(
            _everywhere(model), device, dtype, batch_tokens, self._cluster.gpus_per_worker, self._cluster.threads
        )
        try:
            check_versions(self._cluster)
            self.facts, self._fingerprint = self._on_a_worker(describe, self._choice)
        except BaseException:
            self.close()
            raise

    def fingerprint(self) -> str:
        """SHA-256 of the model's configuration and weights as they are on the workers, hexadecimal."""
        return str(self._fingerprint)

    def close(self) -> None:
        """Leaves the Ray session, unless it was the caller's."""
        self._cluster.close()

    def embed(self, texts: pa.ChunkedArray, embedder: Embedder | Kept, bars: Progress) -> np.ndarray:
        """Embeddings float32 [N, D] of `texts`: by the workers where the embedder is named, a callable runs here."""
        name = _everywhere(embedder.embedder if isinstance(embedder, Kept) else embedder)
        return embed(texts, embedder, "cpu", bars, lambda chunks, count: self._embed(name, chunks, count))

    def nearest(self, embeddings: np.ndarray, scorable: np.ndarray, k: int, bars: Progress) -> Neighbors:
        """The k nearest scorable records of each, searched exactly by the workers.

        Above 200,000 distinct records (4 million where the workers have GPUs), times the square root of the number of
        workers, this process searches in cells instead, where FAISS is installed.
        """
        return nearest(embeddings, scorable, k, self.facts.device, bars, self._search, self._cluster.workers)

    def run(
        self, units: Iterable[tuple[int, Unit]], sequences: Sequences, advance: Callable[[int], None]
    ) -> Generator[Done]:
        """Runs units on the workers, finished ones in any order; they are packed when there is room for them."""
        left = list(units)
        # Ray Data keeps a note of each table of a stage: there are never more than a few thousand.
        size = max(1, len(left) // _STAGE_TABLES)
        chunks = [left[begin : begin + size] for begin in range(0, len(left), size)]
        tables = (pa.concat_tables([pack(number, unit, sequences) for number, unit in chunk]) for chunk in chunks)
        task = Score(self._choice, self.facts, self._fingerprint)
        with closing(run_stage(self._cluster, task, tables, len(chunks))) as answers:
            for answer in answers:
                for row in range(len(answer.table)):
                    number, result, seconds = unpack_result(answer.table, row)
                    advance(result.forwarded_tokens)
                    yield Done(number, result, seconds, answer.worker)

    def _embed(self, embedder: str, chunks: Iterator[pa.Array], count: int) -> Generator[tuple[int, Any]]:
        task = Embed(embedder, self._choice.device, self._cluster.threads)
        tables = (pa.table({"text": chunk}) for chunk in chunks)
        with closing(run_stage(self._cluster, task, tables, count)) as answers:
            for answer in answers:
                rows = answer.table["embedding"].combine_chunks()
                yield answer.place, rows.flatten().to_numpy().reshape(len(rows), -1)

    def _search(self, groups: Groups, k: int) -> Generator[Near]:
        unit = ray.put(groups.unit(np.arange(len(groups))))
        size = block_rows(len(groups))
        begins = range(0, len(groups), size)
        task = Search(unit, k, self._choice.device, self._cluster.threads)
        tables = (pa.table({"begin": [begin], "end": [min(begin + size, len(groups))]}) for begin in begins)
        with closing(run_stage(self._cluster, task, tables, len(begins))) as answers:
            for answer in answers:
                yield unpack_near(answer.table)

    def _on_a_worker(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._cluster.tell_of_waiting()
        with ray_errors_told():
            try:
                return ray.get(ray.remote(**self._cluster.resources)(function).remote(*arguments))
            except ray.exceptions.RayTaskError as error:
                if (kind := kind_of(error.cause)) is None:
                    raise
                raise kind(f"on a worker: {error.cause}") from None


def _everywhere(name: object) -> str:
    """A name as workers, which run in folders of their own, find what it is here."""
    return os.path.abspath(str(name)) if os.path.exists(str(name)) else str(name)
