"""Where the models run: what a job asks of them, and the answer of this process alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from miwv_fast import ops
from miwv_fast.embedding import Embedder, Kept, embed
from miwv_fast.forest import Unit
from miwv_fast.info import package_versions
from miwv_fast.model import load_model
from miwv_fast.neighbors import Neighbors, nearest
from miwv_fast.progress import Progress
from miwv_fast.runner import Runner, Sequences, UnitResult


@dataclass(frozen=True)
class ModelFacts:
    """What a plan and a manifest need to know of a model, without the model.

    `vocab_size` is how many tokens it knows; `max_length` is None where it has no limit; `shared_length` 0 where no
    prefix can be shared; `cache_tokens` is how many tokens' keys and values a unit may keep. `kernels` is the
    instruction set of the CPU kernels, and whether oneDNN multiplies; `versions` those of the packages that the model
    runs on.
    """

    name: str
    device: str
    dtype: str
    vocab_size: int
    max_length: int | None
    shared_length: int
    batch_tokens: int
    cache_tokens: int
    kernels: str
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Done:
    """A finished unit: its number in the plan, its losses, the seconds it took, and who ran it."""

    number: int
    result: UnitResult
    seconds: float
    worker: str = ""


class Engine(Protocol):
    """Embeds texts, finds neighbours and runs units of the plan, here or elsewhere."""

    facts: ModelFacts
    tokenizer: Any
    workers: int  # that run units side by side

    def fingerprint(self) -> str:
        """SHA-256 of the model's configuration and weights, hexadecimal."""
        ...

    def embed(self, texts: pa.ChunkedArray, embedder: Embedder | Kept, bars: Progress) -> np.ndarray:
        """Embeddings float32 [N, D] of `texts`, large_string [N]; rows of null texts are 0."""
        ...

    def nearest(self, embeddings: np.ndarray, scorable: np.ndarray, k: int, bars: Progress) -> Neighbors:
        """The k nearest scorable records of each."""
        ...

    def run(
        self, units: Iterable[tuple[int, Unit]], sequences: Sequences, advance: Callable[[int], None]
    ) -> Generator[Done]:
        """Runs units, finished ones in any order; `advance` is called with the tokens of what was forwarded.

        The caller may stop asking for more at any time.
        """
        ...

    def close(self) -> None:
        """Gives back what the engine holds beyond memory."""
        ...


class LocalEngine:
    """One model in this process; units run one after the other."""

    workers = 1

    def __init__(
        self,
        model: str | Path | tuple[Any, Any],
        tokenizer: Any,
        device: str,
        dtype: str | torch.dtype,
        batch_tokens: int | None,
        device_map: str | None = None,
    ) -> None:
        lm = load_model(model, tokenizer, device, dtype, device_map)
        self._runner = Runner(lm, lm.default_batch_tokens() if batch_tokens is None else batch_tokens)
        self.tokenizer = lm.tokenizer
        build = ops.build_info()
        self.facts = ModelFacts(
            name=lm.name,
            device=str(lm.device),
            dtype=str(lm.model.dtype).removeprefix("torch."),
            vocab_size=lm.vocab_size,
            max_length=lm.max_length,
            shared_length=lm.shared_length,
            batch_tokens=self._runner.batch_tokens,
            cache_tokens=self._runner.cache_tokens(),
            kernels=f"{build['isa']}, onednn" if build["onednn"] else str(build["isa"]),
            versions=package_versions(
                ("miwv-fast", "torch", "transformers", "sentence-transformers", "tokenizers", "numpy")
            ),
        )

    def close(self) -> None:
        """Holds nothing beyond memory."""

    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of every weight as it is in memory, hexadecimal."""
        return self._runner.lm.fingerprint()

    def embed(self, texts: pa.ChunkedArray, embedder: Embedder | Kept, bars: Progress) -> np.ndarray:
        """Embeddings float32 [N, D], by an embedder on the model's device."""
        return embed(texts, embedder, self.facts.device, bars)

    def nearest(self, embeddings: np.ndarray, scorable: np.ndarray, k: int, bars: Progress) -> Neighbors:
        """The k nearest scorable records of each, searched on the model's device."""
        return nearest(embeddings, scorable, k, self.facts.device, bars)

    def run(
        self, units: Iterable[tuple[int, Unit]], sequences: Sequences, advance: Callable[[int], None]
    ) -> Generator[Done]:
        """Runs units in their order, each when it is asked for."""
        for number, unit in units:
            since = time.perf_counter()
            result = self._runner.run(unit, sequences, advance)
            yield Done(number, result, time.perf_counter() - since)
