"""Scoring on a Ray cluster of several node processes: the same scores, whatever dies on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("ray", reason="ray is not installed")

import ray
import torch
from ray.cluster_utils import Cluster

import miwv_fast
from miwv_fast import job, ray_cluster, ray_engine, ray_stage, scorer
from miwv_fast.assembly import TokenSequence
from miwv_fast.errors import Interrupted
from miwv_fast.forest import Unit
from miwv_fast.ray_stage import run_stage
from miwv_fast.ray_worker import Score
from miwv_fast.runner import Trees
from support import byte_level, text_embedder, tiny_model
from test_scorer import make_rows

OPTIONS: dict[str, Any] = {"embedder": text_embedder, "batch_tokens": 300, "progress": False}
ON_RAY = {"engine": "ray", "workers": 2}


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Many units, so that there is something between the first and the last."""
    monkeypatch.setattr(job, "UNIT_BATCHES", 1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the workers have: with two, torch rounds some shapes otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a model, and a run of this process alone."""
    made = tmp_path_factory.mktemp("ray")
    rows = "".join(json.dumps(row) + "\n" for row in make_rows("alpaca", 60))
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


@pytest.mark.long
def test_local_ray_local(folder, cluster, monkeypatch, minilm):
    """Begun here, gone on with on Ray until it is stopped, finished here: the same bytes, each unit once."""
    options = {"embedder": minilm}
    score(folder, "named", **options)
    stops = iter([False] * 6 + [True] * 99)
    monkeypatch.setattr(scorer, "finishing", lambda: nullcontext(lambda: next(stops)))
    with pytest.raises(Interrupted):
        score(folder, "mixed", **options)
    begun = set((folder / "mixed" / "parts").iterdir())
    stops = iter([False] * 6 + [True] * 99)
    with pytest.raises(Interrupted):
        score(folder, "mixed", **options, **ON_RAY)
    gone_on = set((folder / "mixed" / "parts").iterdir())
    assert begun < gone_on and len(gone_on) < len(set((folder / "named" / "parts").iterdir()))
    stops = iter([False] * 99)
    score(folder, "mixed", **options)
    assert outcome(folder, "mixed") == outcome(folder, "named")
    assert {path.name for path in gone_on} <= {path.name for path in (folder / "mixed" / "parts").iterdir()}


@pytest.mark.long
def test_a_worker_with_another_model(folder, cluster):
    """Each side is named; a worker without the file says so."""
    engine = ray_engine.RayEngine(folder / "model", None, "auto", "auto", 300, workers=1)
    facts = replace(engine.facts, versions={**engine.facts.versions, "torch": "1.0"})
    missing = replace(engine._choice, model=str(folder / "nowhere"))
    for task, message in (
        (Score(engine._choice, facts, engine.fingerprint()), "versions.*here.*1.0.*on the first worker"),
        (Score(missing, facts, engine.fingerprint()), "no such model folder"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            task.start()
    engine._fingerprint = "0" * 64
    unit = Unit(*(np.empty(0, np.int64) for _ in range(4)), np.array([0]), np.empty(0, np.int64))
    one = TokenSequence(*(np.array(values, np.int32) for values in ([1, 2], [0], [2])))
    sequences = SimpleNamespace(trees=lambda unit: Trees([one], np.array([-1])))
    with pytest.raises(ValueError, match=r"worker on .*weights .* here, 0000.* on the first worker"):
        list(engine.run([(0, unit)], sequences, lambda tokens: None))


@pytest.mark.long
def test_a_node_dies(folder, cluster, monkeypatch):
    """A whole machine with its worker goes; the other one does all that is left, neighbours and scores as ever."""
    embeddings = text_embedder([str(row) for row in range(61)])
    score(folder, "array", embedder=embeddings)
    after(monkeypatch, 6, lambda worker: cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False))
    score(folder, "node", embedder=embeddings, **ON_RAY)
    assert outcome(folder, "node") == outcome(folder, "array")


def test_versions_that_differ(cluster, monkeypatch):
    """Told before anything is loaded: which machines, what they have, and what this process has."""
    there = ray_cluster.share([{"CPU": 1}], 1, None, own=False, verbose=False)
    ray_cluster.check_versions(there)
    monkeypatch.setattr(ray_cluster, "_SHARED", ("miwv-fast", "transformers", "nowhere"))
    own = {"miwv-fast": "0.0.1", "transformers": version("transformers"), "nowhere": "2.0"}
    monkeypatch.setattr(ray_cluster, "package_versions", lambda names: own)
    with pytest.raises(ValueError, match="every machine needs the same") as raised:
        ray_cluster.check_versions(there)
    for expected in (f"has miwv-fast {version('miwv-fast')}, ", "has no nowhere", "this process has miwv-fast 0.0.1, "):
        assert expected in str(raised.value)
    assert "has transformers" not in str(raised.value).partition(";")[0]


def test_an_error_of_rays_is_told(cluster):
    """What no worker can even receive."""
    vanished = ModuleType("vanished")
    exec("class Task:\n    def start(self):\n        return lambda table: table\n", vanished.__dict__)
    vanished.Task.__module__ = "vanished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vanished", vanished)
        patch.setattr(ray_cluster, "_INIT_DEATHS", 0)
        there = ray_cluster.share([{"CPU": 1}], 1, None, own=False, verbose=False)
        with pytest.raises(OSError, match=r"Ray has given up: .*No module named 'vanished'"):
            list(run_stage(there, vanished.Task(), iter([pa.table({"a": [1]})]), 1))


class Odd:
    """A task that does `strike` where it works, or where it starts."""

    def __init__(self, strike: Any, at_start: bool = False) -> None:
        self.strike, self.at_start = strike, at_start

    def start(self) -> Any:
        if self.at_start:
            self.strike()
        return lambda table: table if self.at_start else self.strike() or table


def fail() -> None:
    raise RuntimeError("out of the ordinary")


def run_odd(task: Odd) -> list[Any]:
    there = ray_cluster.share([{"CPU": 1}], 1, None, own=False, verbose=False)
    return list(run_stage(there, task, iter([pa.table({"a": [1]})] * 3), 3))


@pytest.fixture
def by_value(monkeypatch):
    """What stands in this file reaches workers, which cannot import it."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.parametrize("at_start", [False, True])
def test_what_no_task_should_raise_is_told(cluster, by_value, at_start):
    with pytest.raises(OSError, match=r"^worker on .*, process \d+: RuntimeError: out of the ordinary$"):
        run_odd(Odd(fail, at_start))


def test_an_error_over_work_that_is_done_already(cluster, by_value, monkeypatch):
    """What was lost with its machine is worked on again, by whom its answer, were it an error, no longer concerns."""

    def twice(batches):
        for batch in batches:
            yield batch
            yield batch.set_column(3, "error", pa.array(["ValueError: too late"] * len(batch)))

    told = ray_stage._told
    monkeypatch.setattr(ray_stage, "_told", lambda batches: twice(told(batches)))
    assert sorted(answer.place for answer in run_odd(Odd(lambda: None))) == [0, 1, 2]


def misread() -> None:
    b"\xff".decode()


def test_an_error_that_takes_more_than_a_text(cluster, by_value):
    engine = object.__new__(ray_engine.RayEngine)
    engine._cluster = ray_cluster.share([{"CPU": 1}], 1, None, own=False, verbose=False)
    with pytest.raises(ValueError, match="on a worker: 'utf-8' codec can't decode byte 0xff"):
        engine._on_a_worker(misread)


def test_work_that_kills_its_workers(cluster, by_value, monkeypatch):
    """It is not sent again for ever."""
    monkeypatch.setattr(ray_stage, "_DEATHS", 1)
    with pytest.raises(OSError, match="1 workers died over this piece of work, perhaps for want of memory"):
        run_odd(Odd(lambda: os.kill(os.getpid(), signal.SIGKILL)))


def test_answers_that_never_come(cluster, by_value, monkeypatch):
    """Ray may be told to go on without what failed, and its processes may not see a folder of this one."""
    monkeypatch.setattr(ray_stage, "_write", lambda folder, place, table: shutil.rmtree(folder, ignore_errors=True))
    with pytest.raises(OSError, match=r"Ray has ended behind 0 of 3 pieces of work; .*temporary folder"):
        run_odd(Odd(lambda: None))


def test_a_cluster_without_room(cluster, monkeypatch, caplog):
    there = ray_cluster.share([{"CPU": 1}], 1, None, own=False, verbose=False)
    monkeypatch.setattr(ray_cluster, "_PATIENCE", 60)  # for those of other tests to end
    there.tell_of_waiting()
    assert not caplog.text
    monkeypatch.setattr(ray_cluster, "_PATIENCE", 1)
    replace(there, cpus_per_worker=3.0).tell_of_waiting()
    expected = r"waiting for room in the Ray cluster: a worker takes 3 processors and 0 GPUs, free are \d and 0"
    assert re.search(expected, caplog.text)


def test_a_relative_path_is_found_by_workers(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert ray_engine._everywhere("model") == str(folder / "model")
    assert ray_engine._everywhere(Path("someone/model")) == "someone/model"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "ray", "model": ("model", "tokenizer")}, TypeError, "name or folder"),
        ({"engine": "dask"}, ValueError, "'local' or 'ray'"),
        ({"workers": 2}, ValueError, "workers is for engine='ray'"),
        ({"engine": "ray", "workers": 0}, ValueError, "at least 1"),
        ({"engine": "ray", "gpus_per_worker": 1.5}, ValueError, "whole number"),
        ({"engine": "ray", "device": "cuda:1"}, ValueError, "use auto, cpu or cuda"),
    ],
)
def test_wrong_arguments(folder, options, error, message):
    model = options.pop("model", str(folder / "model"))
    with pytest.raises(error, match=message):
        miwv_fast.score(folder / "data.jsonl", model, **options)


def test_without_ray(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ValueError, match=r"pip install 'miwv-fast\[ray\]'"):
        score(folder, "never", engine="ray")


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "expected"),
    [
        ([{"CPU": 8, "GPU": 8}], None, None, (8, 0, 1)),
        ([{"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 4}], None, 4, (3, 0, 4)),
        ([{"CPU": 8}, {"CPU": 16}], None, None, (2, 8, 0)),
        ([{"CPU": 8}, {"CPU": 16}], 6, None, (6, 4, 0)),
        ([{"CPU": 8, "GPU": 2}], None, 4, "no machine of the Ray cluster has 4 GPUs; they have 2"),
        ([{"CPU": 8, "GPU": 2}], 3, 1, "room for 2"),
        ([{"CPU": 2}], 3, None, "2 processors"),
    ],
)
def test_how_workers_share_machines(nodes, workers, gpus, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            ray_cluster.share(nodes, workers, gpus, own=False, verbose=False)
        return
    found = ray_cluster.share(nodes, workers, gpus, own=False, verbose=False)
    assert (found.workers, found.cpus_per_worker, found.gpus_per_worker) == expected


def test_unreachable_address(folder):
    with pytest.raises(ValueError, match="Ray Client is not supported"):
        ray_cluster.start("ray://nowhere:1", verbose=False)
    with pytest.raises(ValueError, match=r"cannot reach a Ray cluster at '127\.0\.0\.1:1'"):
        ray_cluster.start("127.0.0.1:1", verbose=False)
    with pytest.raises(ValueError, match=r"cannot reach a Ray cluster at 'no\.such\.host\.invalid:99999'"):
        ray_cluster.start("no.such.host.invalid:99999", verbose=False)


def test_signals_reach_the_caller():
    """Ray's own handlers would abort the process; a run is to finish its unit instead."""
    code = (
        "import os, signal\n"
        "from miwv_fast import ray_cluster\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: print('told', number))\n"
        "made = ray_cluster.connect(None, 1, 0.0)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "made.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["told", "15"]), done.stderr
