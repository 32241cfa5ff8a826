"""What a worker does in each stage: loads a model once, and checks that it is the one that the run was planned with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from miwv_fast.devices import choose_device
from miwv_fast.embedding import load_embedder
from miwv_fast.engine import LocalEngine, ModelFacts
from miwv_fast.exact import search_rows
from miwv_fast.model import NO_TOKENIZER
from miwv_fast.ops.matmul import fast_linear
from miwv_fast.packing import PackedUnit, pack_near, pack_result


@dataclass(frozen=True)
class ModelChoice:
    """How a worker loads the model."""

    model: str
    device: str
    dtype: Any
    batch_tokens: int | None
    gpus: float
    threads: int

    def load(self) -> LocalEngine:
        """The model in this process."""
        torch.set_num_threads(self.threads)
        spread = "auto" if self.gpus > 1 else None
        return LocalEngine(self.model, NO_TOKENIZER, self.device, self.dtype, self.batch_tokens, spread)


def describe(choice: ModelChoice) -> tuple[ModelFacts, str]:
    """What a model's facts and its fingerprint are on the machine where this runs."""
    engine = choice.load()
    return engine.facts, engine.fingerprint()


@dataclass(frozen=True)
class Score:
    """Runs units; refuses to where the model is not the one that the run was planned with."""

    choice: ModelChoice
    facts: ModelFacts
    fingerprint: str

    def start(self) -> Callable[[pa.Table], pa.Table]:
        """Loads the model. Raises ValueError naming what differs and both sides."""
        engine = self.choice.load()
        expected = {**asdict(self.facts), "weights": self.fingerprint}
        found = {**asdict(engine.facts), "weights": engine.fingerprint()}
        differing = [name for name in expected if expected[name] != found[name]]
        if differing:
            lines = ", ".join(f"{name} {found[name]} here, {expected[name]} on the first worker" for name in differing)
            raise ValueError(f"this machine differs: {lines}; every machine needs the same model and versions")

        def work(table: pa.Table) -> pa.Table:
            results = []
            for row in range(len(table)):
                packed = PackedUnit(table, row)
                [done] = engine.run([(packed.number, packed.unit)], packed, lambda _: None)
                results.append(pack_result(done.number, done.result, done.seconds))
            return pa.concat_tables(results)

        return work


@dataclass(frozen=True)
class Embed:
    """Embeds texts with a model of sentence-transformers."""

    embedder: str
    device: str
    threads: int

    def start(self) -> Callable[[pa.Table], pa.Table]:
        """Loads the embedder."""
        torch.set_num_threads(self.threads)
        encode = load_embedder(self.embedder, choose_device(self.device))

        def work(table: pa.Table) -> pa.Table:
            with fast_linear():
                rows = encode(table["text"].to_pylist()).astype(np.float32, copy=False)
            values = pa.array(rows.ravel(), pa.float32())
            return pa.table({"embedding": pa.FixedSizeListArray.from_arrays(values, rows.shape[1])})

        return work


@dataclass(frozen=True)
class Search:
    """Searches blocks of rows among all of them, which lie in the object store once for each machine."""

    unit: ray.ObjectRef
    k: int
    device: str
    threads: int

    def start(self) -> Callable[[pa.Table], pa.Table]:
        """Takes the rows out of the object store, onto the GPU where there is one."""
        torch.set_num_threads(self.threads)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            unit = torch.from_numpy(ray.get(self.unit)).to(choose_device(self.device))

        def work(table: pa.Table) -> pa.Table:
            begin, end = (table[name][0].as_py() for name in ("begin", "end"))
            return pack_near(search_rows(unit, np.arange(begin, end), self.k))

        return work
