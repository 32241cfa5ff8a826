"""Scoring on a Ray cluster of several node processes: the same scores, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed")

import ray
from ray.cluster_utils import Cluster

import miwv_fast
from miwv_fast import job, ray_engine
from support import byte_level, text_embedder, tiny_model
from test_scorer import make_rows

OPTIONS: dict[str, Any] = {"embedder": text_embedder, "batch_tokens": 300, "progress": False}
ON_RAY = {"engine": "ray", "workers": 2}


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Many units, so that there is something between the first and the last."""
    monkeypatch.setattr(job, "UNIT_BATCHES", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a model, and a run of this process alone."""
    made = tmp_path_factory.mktemp("ray")
    rows = "".join(json.dumps(row) + "\n" for row in make_rows("alpaca", 40))
    (made / "data.jsonl").write_text(rows + "broken\n")
    own = byte_level()
    tiny_model("llama", len(own)).save_pretrained(made / "model")
    own.save_pretrained(made / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "UNIT_BATCHES", 1)
        score(made, "local")
    assert len(list((made / "local" / "parts").iterdir())) > 25
    return made


@pytest.fixture(scope="module")
def cluster():
    """A head that computes nothing and two nodes with a processor each, joined by this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options = {"object_store_memory": 100 << 20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **options})
        for _ in range(2):
            made.add_node(num_cpus=1, **options)
        ray.init(made.address, log_to_driver=False, logging_level="ERROR")
        yield made
        ray.shutdown()
        made.shutdown()


def score(folder: Path, run: str, **options: Any) -> miwv_fast.Scores:
    return miwv_fast.score(folder / "data.jsonl", str(folder / "model"), output=folder / run, **{**OPTIONS, **options})


def outcome(folder: Path, run: str) -> tuple[bytes, bytes]:
    return tuple((folder / run / name).read_bytes() for name in ("scores.parquet", "rejected.jsonl"))


def after(monkeypatch: pytest.MonkeyPatch, count: int, strike: Any) -> list[str]:
    """Calls `strike` with the worker that answered, once, behind `count` answers; gives the workers' names."""
    workers: list[str] = []
    run_stage = ray_engine.run_stage

    def struck(*arguments):
        for answer in run_stage(*arguments):
            workers.append(answer.worker)
            if len(workers) == count:
                strike(answer.worker)
            yield answer

    monkeypatch.setattr(ray_engine, "run_stage", struck)
    return workers


def test_an_actor_dies(folder, cluster, monkeypatch):
    """Killed among the first of many units: its work is done by others, the scores are equal to the byte."""
    workers = after(monkeypatch, 3, lambda worker: os.kill(int(worker.rpartition(" ")[2]), signal.SIGKILL))
    score(folder, "actor", **ON_RAY)
    assert outcome(folder, "actor") == outcome(folder, "local")
    assert len(set(workers)) >= 2 and workers[2] not in workers[15:]
    assert ray.is_initialized(), "a session of the caller is left alive"
