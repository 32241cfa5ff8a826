"""A run on disk: what it is (manifest), who writes it (lock), what is done (parts), what came out (scores).

RUN/manifest.json      everything that can change a score; a run is continued only by the same manifest
RUN/lock               held by the process that writes
RUN/embeddings.npy, neighbors.parquet
RUN/plan.json          how many units and tokens there are
RUN/parts/             a Parquet file per finished unit, its SHA-256 in its name
RUN/damaged/           parts whose content no longer matches their name, set aside and computed again
RUN/rejected.jsonl, data.jsonl, scores.parquet
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from miwv_fast.neighbors import Neighbors
from miwv_fast.rejections import Rejection
from miwv_fast.runner import UnitResult
from miwv_fast.scores import Scores, write_atomically, write_jsonl
from miwv_fast.sources import Source

_PART = pa.schema([("one_shot", pa.bool_()), ("number", pa.int64()), ("nll", pa.float32())])

_log = logging.getLogger(__name__)


class Run:
    """A run folder that this process writes; a context manager that holds the lock.

    Opening continues the run of the same manifest; without `resume` an old run is moved aside first. Raises ValueError
    if the folder holds a run of another manifest, naming each field that differs, if another process writes it, or if
    it holds something else.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], *, resume: bool = True) -> None:
        self.folder = folder
        self.manifest = json.loads(json.dumps(dict(manifest)))
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output {folder} is a file; give a folder for the run")
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if there - {"lock"} and "manifest.json" not in there:
            raise ValueError(f"output {folder} holds other files than a run; give another folder")
        if not resume and there:
            _lock(folder).close()  # nobody may be writing what is moved away
            _move_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back."""
        if not self._lock.closed:
            self._lock.truncate(0)
            self._lock.close()

    def _open(self) -> None:
        path = self.folder / "manifest.json"
        if not path.exists():
            self._write_manifest()
            return
        old = json.loads(path.read_text(encoding="utf-8"))
        if "neighbor_table" in old:
            found = ("neighbor_table", "neighbor_recall")
            self.manifest.update({name: old[name] for name in found if name in old})
        elif not any((self.folder / "parts").glob("*.parquet")):
            # Nothing was computed yet: somebody mended the call that failed.
            self._write_manifest()
            return
        differing = list(_differences(_identity(old), _identity(self.manifest)))
        if differing:
            lines = "\n".join(f"  {name}: {before} there, {now} now" for name, before, now in differing)
            raise ValueError(
                f"output {self.folder} holds a run that differs in:\n{lines}\n"
                "give another folder, or start over with resume=False (--fresh), which moves the old run aside"
            )

    def _write_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=2) + "\n"
        write_atomically(self.folder / "manifest.json", lambda out: out.write_text(text, encoding="utf-8"))

    def neighbors(self, records: int, k: int) -> Neighbors | None:
        """The neighbours that were found before, None if there are none."""
        path = self.folder / "neighbors.parquet"
        if not path.exists() or "neighbor_table" not in self.manifest:
            return None
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest["neighbor_table"]:
            _set_aside(path, "its content does not match its checksum")
            return None
        table = _read_table(content)
        columns = [table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in table.column_names]
        recall = self.manifest.get("neighbor_recall")
        return Neighbors(columns[0].reshape(records, k), columns[1].reshape(records, k), recall)

    def save_neighbors(self, embeddings: np.ndarray, neighbors: Neighbors) -> None:
        """Keeps embeddings float32 [N, D] and neighbours."""
        write_atomically(self.folder / "embeddings.npy", lambda out: _save_array(out, embeddings))
        k = neighbors.index.shape[1]
        columns = [
            pa.FixedSizeListArray.from_arrays(values.ravel(), k) for values in (neighbors.index, neighbors.similarity)
        ]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, ["index", "similarity"]), sink)
        content = sink.getvalue().to_pybytes()
        write_atomically(self.folder / "neighbors.parquet", lambda out: out.write_bytes(content))
        self.manifest["neighbor_table"] = hashlib.sha256(content).hexdigest()
        self.manifest["neighbor_recall"] = neighbors.recall
        self._write_manifest()

    def save_plan(self, units: int, tokens: int) -> None:
        """Keeps how much there is to do, for `status`."""
        text = json.dumps({"units": units, "tokens": tokens}) + "\n"
        write_atomically(self.folder / "plan.json", lambda out: out.write_text(text))

    def save_part(self, unit: int, result: UnitResult, seconds: float) -> None:
        """Writes a finished unit; it is there whole or not at all."""
        one_shot = np.repeat([False, True], [len(result.zero_shot[0]), len(result.one_shot[0])])
        columns = [np.concatenate(pair) for pair in zip(result.zero_shot, result.one_shot, strict=True)]
        cost = {"forwarded": result.forwarded_tokens, "padding": result.padding_tokens, "seconds": seconds}
        table = pa.table([one_shot, *columns], schema=_PART.with_metadata({"cost": json.dumps(cost)}))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        content = sink.getvalue().to_pybytes()
        name = f"{unit:08d}-{hashlib.sha256(content).hexdigest()[:32]}.parquet"
        write_atomically(self.folder / "parts" / name, lambda out: out.write_bytes(content))

    def parts(self) -> Iterator[tuple[int, UnitResult]]:
        """The finished units; a part that does not match its checksum is set aside with a warning."""
        for part in read_parts(self.folder):
            if part.result is None:
                _set_aside(part.path, part.damage)
            else:
                yield part.unit, part.result

    def save_source(self, source: Source) -> None:
        """Keeps records that came from no file, so that they can be selected later."""
        described = self.manifest["data"]
        if "files" not in described and "data_set" not in described and not (self.folder / "data.jsonl").exists():
            write_jsonl(self.folder / "data.jsonl", (row.value for row in source.rows()))

    def save_rejections(self, rejections: Iterable[Rejection]) -> None:
        """Writes `rejected.jsonl`: number, place, reason and text of each malformed record."""
        rows = ({"index": r.index, "location": r.location, "reason": r.reason, "row": r.row} for r in rejections)
        write_jsonl(self.folder / "rejected.jsonl", rows)

    def finish(self, scores: Scores) -> None:
        """Writes the joined result."""
        scores.save(self.folder / "scores.parquet")


@dataclass(frozen=True)
class Part:
    """A file under parts/: its unit and its result, or None and what is wrong with it."""

    path: Path
    unit: int
    result: UnitResult | None
    seconds: float = 0.0
    damage: str = ""


def read_parts(folder: Path) -> Iterator[Part]:
    """Every part of a run, verified."""
    for path in sorted((folder / "parts").glob("*.parquet")):
        unit, _, digest = path.stem.partition("-")
        content = path.read_bytes()
        if not unit.isdigit() or hashlib.sha256(content).hexdigest()[:32] != digest:
            yield Part(path, -1, None, damage="its content does not match its checksum")
            continue
        table = _read_table(content)
        cost = json.loads(table.schema.metadata[b"cost"])
        one_shot = table["one_shot"].to_numpy()
        number, nll = table["number"].to_numpy(), table["nll"].to_numpy()
        zero, one = ((number[chosen], nll[chosen]) for chosen in (~one_shot, one_shot))
        yield Part(path, int(unit), UnitResult(zero, one, cost["forwarded"], cost["padding"]), cost["seconds"])


def run_status(folder: Path) -> dict[str, Any]:
    """How far a run is: units and tokens done and in all, tokens per second, seconds left, rejected records by reason,
    and `neighbor_recall`, None where the neighbours are exact or not yet found.

    Raises FileNotFoundError if there is no run in the folder.
    """
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"no run at {folder}: it has no manifest.json")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    plan_path = folder / "plan.json"
    plan = json.loads(plan_path.read_text()) if plan_path.exists() else {"units": None, "tokens": None}
    parts = [part for part in read_parts(folder) if part.result is not None]
    tokens = sum(part.result.forwarded_tokens for part in parts if part.result)
    seconds = sum(part.seconds for part in parts)
    reasons: dict[str, int] = {}
    rejected = folder / "rejected.jsonl"
    if rejected.exists():
        with rejected.open(encoding="utf-8") as lines:
            for line in lines:
                reason = json.loads(line)["reason"]
                reasons[reason] = reasons.get(reason, 0) + 1
    rate = tokens / seconds if seconds else None
    return {
        "finished": (folder / "scores.parquet").exists(),
        "units_done": len(parts),
        "units": plan["units"],
        "tokens_done": tokens,
        "tokens": plan["tokens"],
        "tokens_per_second": rate,
        "seconds_left": (plan["tokens"] - tokens) / rate if rate and plan["tokens"] is not None else None,
        "neighbor_recall": manifest.get("neighbor_recall"),
        "written_by": _holder(folder),
        "rejected": dict(sorted(reasons.items(), key=lambda pair: -pair[1])),
    }


def _lock(folder: Path) -> Any:
    """An exclusive lock that the system gives back when the process dies; the file says who holds or held it."""
    stream = (folder / "lock").open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = _read_holder(stream)
        stream.close()
        raise ValueError(f"output {folder} is being written by {holder or 'another process'}") from None
    holder = _read_holder(stream)
    if holder:
        _log.warning("taking over %s from %s, which is gone", folder, holder)
    stream.truncate(0)
    stream.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())}))
    stream.flush()
    return stream


def _read_holder(stream: Any) -> str:
    stream.seek(0)
    try:
        held = json.loads(stream.read())
        return f"process {held['pid']} on {held['host']}"
    except (ValueError, KeyError, TypeError):
        return ""


def _holder(folder: Path) -> str | None:
    path = folder / "lock"
    if not path.exists():
        return None
    with path.open("r") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return _read_holder(stream) or "another process"
    return None


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What can change a score: contents, not the places they were read from."""
    identity = dict(manifest)
    if "files" in identity["data"]:
        identity["data"] = {"sha256": [file["sha256"] for file in identity["data"]["files"]]}
    identity["model"] = identity["model"]["sha256"]
    return identity


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(set(old) | set(new)):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name}", _short(before), _short(now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _move_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    _log.warning("moved the old run to %s", aside)


def _set_aside(path: Path, reason: str) -> None:
    aside = path.parent.parent / "damaged" if path.parent.name == "parts" else path.parent / "damaged"
    aside.mkdir(exist_ok=True)
    os.replace(path, aside / path.name)
    _log.warning("%s: %s; set aside in %s and computed again", path.name, reason, aside)


def _read_table(content: bytes) -> pa.Table:
    """A Parquet file's table, read by this thread alone.

    `pq.read_table` leaves the content to a thread of Arrow's, which may drop it, and ask for the GIL, while the
    interpreter ends: the process then aborts.
    """
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        return file.read(use_threads=False)


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
