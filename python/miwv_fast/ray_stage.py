"""A stage on Ray Data: tables made one by one by the driver, worked on by a pool of actors, results in any order.

The driver writes a table to a scratch folder only when an earlier one is finished, and reads of Ray Data, which run on
the driver's machine, wait for it there: neither the driver nor the object store ever holds more than a window of them.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from miwv_fast.ray_cluster import Cluster, ray_errors_told

_READERS = 2
_AHEAD = 4  # tables per worker that are on their way
_POLL_SECONDS = 0.005
_DEATHS = 5  # of workers over one table; machines may die, but hardly all of them over the same
_IN = pa.schema([("place", pa.int64()), ("table", pa.large_binary())])
_OUT = pa.schema([*_IN, ("worker", pa.string()), ("error", pa.string())])
_KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, OSError, MemoryError)}

_log = logging.getLogger(__name__)


class Task(Protocol):
    """What the actors of a stage do; it travels to each of them."""

    def start(self) -> Callable[[pa.Table], pa.Table]:
        """Called once in an actor: loads what it takes and gives the function that is called for each table."""
        ...


@dataclass(frozen=True)
class Answer:
    """A table that came back, its place among those that were sent, and the worker that made it."""

    place: int
    table: pa.Table
    worker: str


def run_stage(cluster: Cluster, task: Task, tables: Iterable[pa.Table], count: int) -> Generator[Answer]:
    """Sends `count` tables through the actors; each answer comes once, whatever died on the way.

    Ray starts actors anew where a process or a machine died and sends them again what was lost. Raises ValueError,
    TypeError, OSError or MemoryError, naming the worker, for what its task raised of that kind; OSError for anything
    else, for a table over which workers die, and where Ray ends before all answers are there.
    """
    if not count:
        return
    window = _AHEAD * cluster.workers + _READERS
    pending = iter(tables)
    finished: set[int] = set()
    with tempfile.TemporaryDirectory(prefix="miwv-fast-") as scratch, cluster.data_context():
        folder = Path(scratch)
        written = 0

        def write_ahead() -> None:
            nonlocal written
            while written < min(count, len(finished) + window):
                _write(folder, written, next(pending))
                written += 1

        write_ahead()
        source = ray.data.read_datasource(
            _Source(scratch, count), override_num_blocks=count, concurrency=min(_READERS, count), num_cpus=0
        )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        answers = source.map_batches(
            _Actor,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(task, ray.remote(num_cpus=0, scheduling_strategy=here)(_Begun).remote(), _DEATHS),
            compute=ray.data.ActorPoolStrategy(size=min(cluster.workers, count), max_tasks_in_flight_per_actor=2),
            **cluster.resources,
        )
        for batch in _told(answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)):
            for row in batch.to_pylist():
                place = row["place"]
                if place in finished:
                    continue
                if row["error"]:
                    kind, _, reason = row["error"].partition(": ")
                    raise _KINDS[kind](f"worker on {row['worker']}: {reason}")
                finished.add(place)
                yield Answer(place, _read_table(row["table"]), row["worker"])
                # Whoever reads it again, to replace what a machine took with it, need not work on it again.
                _path(folder, place).write_bytes(b"")
                write_ahead()
    if len(finished) < count:
        raise OSError(
            f"Ray has ended behind {len(finished)} of {count} pieces of work; do its processes on this machine see the "
            f"temporary folder of this one, {tempfile.gettempdir()}?"
        )


def _told(batches: Iterable[pa.Table]) -> Generator[pa.Table]:
    with ray_errors_told():
        yield from batches


class _Source(Datasource):  # type: ignore[misc]
    """Tables in the driver's scratch folder, a read for each."""

    def __init__(self, folder: str, count: int) -> None:
        super().__init__()
        self._folder = folder
        self._count = count

    @property
    def supports_distributed_reads(self) -> bool:
        return False

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        folder = self._folder

        def task(place: int) -> ReadTask:
            return ReadTask(lambda: [_await_table(Path(folder), place)], BlockMetadata(1, None, None, None))

        return [task(place) for place in range(self._count)]


class _Begun:
    """How often work on each table was begun: what kills its worker is sent again, and would be for ever."""

    def __init__(self) -> None:
        self._times: Counter[int] = Counter()

    def count(self, place: int) -> int:
        self._times[place] += 1
        return self._times[place]


class _Actor:
    """Holds what a task has loaded; errors come back as answers, whatever Ray would make of them."""

    def __init__(self, task: Task, begun: Any, deaths: int) -> None:
        self._worker = f"{ray.util.get_node_ip_address()}, process {os.getpid()}"
        self._begun, self._deaths = begun, deaths
        self._problem = ""
        try:
            self._work = task.start()
        except Exception as error:
            self._problem = _describe(error)

    def __call__(self, tables: pa.Table) -> pa.Table:
        rows = [self._answer(row["place"], row["table"]) for row in tables.to_pylist() if row["table"]]
        return pa.Table.from_pylist(rows, schema=_OUT)

    def _answer(self, place: int, content: bytes) -> dict[str, Any]:
        answer: dict[str, Any] = {"place": place, "worker": self._worker, "error": self._problem, "table": b""}
        if not self._problem:
            try:
                if ray.get(self._begun.count.remote(place)) > self._deaths:
                    raise ChildProcessError(
                        f"{self._deaths} workers died over this piece of work, perhaps for want of memory"
                    )
                answer["table"] = _to_bytes(self._work(_read_table(content)))
            except Exception as error:
                answer["error"] = _describe(error)
        return answer


def kind_of(error: BaseException | None) -> type[Exception] | None:
    """As which kind an error is told, which takes a text where the error itself may take more; None for any other."""
    return next((kind for kind in _KINDS.values() if isinstance(error, kind)), None)


def _describe(error: Exception) -> str:
    kind = kind_of(error)
    if kind is None:
        _log.exception("unexpected")  # with its traceback, for the worker's log
        return f"OSError: {type(error).__name__}: {error}"
    return f"{kind.__name__}: {error}"


def _path(folder: Path, place: int) -> Path:
    return folder / f"{place}.arrow"


def _write(folder: Path, place: int, table: pa.Table) -> None:
    path = _path(folder, place)
    path.with_suffix(".part").write_bytes(_to_bytes(table))
    path.with_suffix(".part").replace(path)


def _await_table(folder: Path, place: int) -> pa.Table:
    path = _path(folder, place)
    while not path.exists():
        if not folder.exists():
            return _IN.empty_table()  # the stage has been given up
        time.sleep(_POLL_SECONDS)
    return pa.table([[place], [path.read_bytes()]], schema=_IN)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _read_table(content: bytes) -> pa.Table:
    with pa.ipc.open_stream(content) as reader:
        return reader.read_all()
