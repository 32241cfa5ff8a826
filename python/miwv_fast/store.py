"""A run on disk or in an object store: what is done is kept there, and the same call goes on.

RUN/manifest.json      everything that can change a score; a run is continued only by the same manifest
RUN/lock               held by the process that writes; lock.taken where a dead one's is being taken over
RUN/embeddings/        embeddings of one call of the embedder each, until all are there
RUN/embeddings.npy, neighbors.parquet
RUN/plan.json          how many units and tokens there are, and how many workers
RUN/parts/             a Parquet file per finished unit, its SHA-256 in its name
RUN/damaged/           files whose content no longer matches their checksum, set aside and computed again
RUN/rejected.jsonl, data.jsonl, scores.parquet
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np

from miwv_fast.files import Location, check_writable, write_jsonl
from miwv_fast.fingerprint import hash_array
from miwv_fast.forest import Unit
from miwv_fast.lock import Lock, read_holder
from miwv_fast.manifest import differences
from miwv_fast.neighbors import Neighbors
from miwv_fast.parts import (
    array_from_bytes,
    array_to_bytes,
    neighbors_from_bytes,
    neighbors_to_bytes,
    read_checked,
    read_parts,
    write_checked,
    write_part,
)
from miwv_fast.rejections import Rejection
from miwv_fast.runner import UnitResult
from miwv_fast.saved import read_embeddings
from miwv_fast.scores import Scores
from miwv_fast.sources import Source

_TEMPORARY = re.compile(r"\.[\w.-]+\.(json|jsonl|npy|parquet)\.[0-9]+")

_LOCKS = {"lock", "lock.taken"}
FILES = {
    *_LOCKS,
    *("manifest.json", "embeddings.npy", "neighbors.parquet", "plan.json"),
    *("rejected.jsonl", "data.jsonl", "scores.parquet"),
}
_FOLDERS = {"parts", "embeddings", "damaged"}

_log = logging.getLogger(__name__)


class Run:
    """A run folder that this process writes; a context manager that holds the lock.

    `folder` is a path or a URL that fsspec knows. Opening continues the run of the same manifest; without `resume` an
    old run is moved aside first. Raises ValueError if the folder holds a run of another manifest, naming each field
    that differs, if another process writes it, or if it holds something else.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | Location, manifest: Mapping[str, Any], *, resume: bool = True
    ) -> None:
        self.folder = Location(folder)
        self.manifest = json.loads(json.dumps(dict(manifest)))
        there = check_output(folder)
        self.folder.make_folder()
        self._calls: dict[int, Location] | None = None
        self._lock = Lock(self.folder)
        try:
            if not resume and there - _LOCKS:
                _move_aside(self.folder)
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
        """Gives the lock back; where that fails, what the run has done or failed in is told all the same."""
        try:
            self._lock.release()
        except OSError as error:
            _log.warning("the lock of %s cannot be given back: %s", self.folder, error)

    def _open(self) -> None:
        for folder in (self.folder, self.folder / "parts", self.folder / "embeddings"):
            for name in folder.names():
                if _TEMPORARY.fullmatch(name):  # of a process that was killed while it wrote
                    (folder / name).remove()
        path = self.folder / "manifest.json"
        if not path.exists():
            self._write_manifest()
            return
        try:
            old = path.read_json()
        except ValueError as error:
            raise ValueError(
                f"{error}; start over with resume=False (--fresh), which moves the old run aside"
            ) from error
        if not isinstance(old, dict):
            raise ValueError(f"{path} should be a JSON object, it is {type(old).__name__}")
        if "neighbor_table" in old:
            found = ("embeddings", "neighbor_table", "neighbor_recall")
            self.manifest.update({name: old[name] for name in found if name in old})
        elif not self._has_parts() and not (self.folder / "embeddings").names():
            # Nothing was computed yet: somebody mended the call that failed.
            (self.folder / "data.jsonl").remove()
            self._write_manifest()
            return
        differing = differences(old, self.manifest)
        if differing:
            lines = "\n".join(f"  {name}: {before} there, {now} now" for name, before, now in differing)
            raise ValueError(
                f"output {self.folder} holds a run that differs in:\n{lines}\n"
                "give another folder, or start over with resume=False (--fresh), which moves the old run aside"
            )
        # The embedder is the one that was used, wherever it is now; of data and model the new places count.
        self.manifest.update({name: old[name] for name in ("embedder", "embedder_content") if name in old})
        if old != self.manifest:
            self._write_manifest()

    def _write_manifest(self) -> None:
        (self.folder / "manifest.json").write_json(self.manifest)

    def _has_parts(self) -> bool:
        return any(name.endswith(".parquet") for name in (self.folder / "parts").names())

    def read_call(self, number: int) -> np.ndarray | None:
        """The rows float32 [M, D] that a call of the embedder gave before, None where it has to be made."""
        if self._calls is None:
            self._calls = {}
            for path, kept, content in read_checked(self.folder / "embeddings", "npy"):
                if content is None:
                    self._set_aside(path, "its content does not match its checksum")
                else:
                    self._calls[kept] = path
        found = self._calls.get(number)
        return None if found is None else array_from_bytes(found.read_bytes())

    def keep_call(self, number: int, rows: np.ndarray) -> None:
        """Keeps the rows float32 [M, D] that a call of the embedder gave."""
        write_checked(self.folder / "embeddings", number, array_to_bytes(rows), "npy")

    def neighbors(self, records: int, k: int) -> Neighbors | None:
        """The neighbours that were found before, None if there are none.

        Raises ValueError where the file matches its checksum and yet is none of this run.
        """
        path, embeddings = self.folder / "neighbors.parquet", self.folder / "embeddings.npy"
        if "neighbor_table" not in self.manifest or not path.exists():
            return None
        if not embeddings.is_file() or (embeddings.local and read_embeddings(self.folder) is None):
            _log.warning("%s is not there or damaged: computed again", embeddings)
            return None
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest["neighbor_table"]:
            self._set_aside(path, "its content does not match its checksum")
            return None
        (self.folder / "embeddings").remove_folder()  # left where the process died behind `save_neighbors`
        try:
            return neighbors_from_bytes(content, records, k, self.manifest.get("neighbor_recall"))
        except ValueError as error:
            raise ValueError(
                f"{path} is whole, but no neighbours of this run: {error}; start over with resume=False (--fresh)"
            ) from error

    def save_neighbors(self, embeddings: np.ndarray, neighbors: Neighbors) -> None:
        """Keeps embeddings float32 [N, D] and neighbours.

        Raises ValueError if units were scored with other neighbours, which an embedder that changed would have found.
        """
        content = neighbors_to_bytes(neighbors)
        digest = hashlib.sha256(content).hexdigest()
        if self.manifest.get("neighbor_table", digest) != digest and self._has_parts():
            (self.folder / "embeddings").remove_folder()  # or the right embedder would not be called
            raise ValueError(
                f"output {self.folder}: the neighbours found now are not those that its units were scored with; "
                "has the embedder changed? Start over with resume=False (--fresh)"
            )
        (self.folder / "embeddings.npy").write(lambda out: _save_array(out, embeddings))
        self.manifest["embeddings"] = hash_array(embeddings)
        (self.folder / "neighbors.parquet").write_bytes(content)
        self.manifest["neighbor_table"] = digest
        self.manifest["neighbor_recall"] = neighbors.recall
        self._write_manifest()
        (self.folder / "embeddings").remove_folder()  # they are in embeddings.npy now

    def save_plan(self, units: int, tokens: int, workers: int) -> None:
        """Keeps how much there is to do, and how many do it side by side, for `status`."""
        (self.folder / "plan.json").write_json({"units": units, "tokens": tokens, "workers": workers})

    def save_part(self, unit: int, result: UnitResult, seconds: float) -> None:
        """Writes a finished unit; it is there whole or not at all."""
        write_part(self.folder / "parts", unit, result, seconds)

    def parts(self, units: Sequence[Unit]) -> Iterator[tuple[int, UnitResult]]:
        """The finished ones of a plan's units; a part that does not match its checksum is set aside with a warning.

        Raises ValueError for a part that is whole but holds other passes than its unit.
        """
        for part in read_parts(self.folder / "parts"):
            if part.result is None:
                self._set_aside(part.path, part.damage)
                continue
            if part.unit >= len(units) or not _is_of(part.result, units[part.unit]):
                raise ValueError(
                    f"{part.path} is whole, but holds other passes than unit {part.unit} of this run; move it away"
                )
            yield part.unit, part.result

    def save_source(self, source: Source) -> None:
        """Keeps records that came from no file, so that they can be selected later."""
        described, path = self.manifest["data"], self.folder / "data.jsonl"
        if "files" not in described and "data_set" not in described and not path.exists():
            write_jsonl(path, (row.value for row in source.rows()))

    def save_rejections(self, rejections: Iterable[Rejection]) -> None:
        """Writes `rejected.jsonl`: number, place, reason and text of each malformed record."""
        rows = ({"index": r.index, "location": r.location, "reason": r.reason, "row": r.row} for r in rejections)
        write_jsonl(self.folder / "rejected.jsonl", rows)

    def finish(self, scores: Scores) -> None:
        """Writes the joined result."""
        scores.save(self.folder / "scores.parquet")

    def _set_aside(self, path: Location, reason: str) -> None:
        aside = self.folder / "damaged"
        aside.make_folder()
        path.move(aside / path.name)
        _log.warning("%s: %s; set aside in %s and computed again", path.name, reason, aside)


def check_output(output: str | os.PathLike[str] | Location) -> set[str]:
    """The names in a folder that a run can be written to, none where it is not there yet.

    Raises ValueError where it is a file, lies in one or holds something else than a run, PermissionError where nothing
    can be written.
    """
    folder = Location(output)
    check_writable(folder)
    names = {name for name in folder.names() if not _TEMPORARY.fullmatch(name)}
    if names - _LOCKS and "manifest.json" not in names:
        raise ValueError(f"output {folder} holds other files than a run; give another folder")
    return names


def run_status(run: str | os.PathLike[str] | Location) -> dict[str, Any]:
    """How far a run is: units and tokens done and in all, tokens per second, seconds left, rejected records by reason,
    and `neighbor_recall`, None where the neighbours are exact or not yet found.

    Raises FileNotFoundError if there is no run in the folder, ValueError where its files are not those of a run.
    """
    folder = Location(run)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"no run at {folder}: it has no manifest.json")
    manifest, plan_path = (folder / "manifest.json").read_json(), folder / "plan.json"
    plan = plan_path.read_json() if plan_path.exists() else {"units": None, "tokens": None}
    if not isinstance(manifest, dict) or not isinstance(plan, dict) or not {"units", "tokens"} <= plan.keys():
        raise ValueError(f"{folder}: manifest.json or plan.json is damaged or of something else")
    units, tokens, seconds = 0, 0, 0.0
    for part in read_parts(folder / "parts"):
        if part.result is not None:
            units, tokens, seconds = units + 1, tokens + part.result.forwarded_tokens, seconds + part.seconds
    rate = tokens / seconds * plan.get("workers", 1) if seconds else None  # each unit has its worker's own seconds
    return {
        "finished": (folder / "scores.parquet").exists(),
        "units_done": units,
        "units": plan["units"],
        "tokens_done": tokens,
        "tokens": plan["tokens"],
        "tokens_per_second": rate,
        "seconds_left": (plan["tokens"] - tokens) / rate if rate and plan["tokens"] is not None else None,
        "neighbor_recall": manifest.get("neighbor_recall"),
        "written_by": read_holder(folder),
        "rejected": _count_reasons(folder / "rejected.jsonl"),
    }


def _count_reasons(path: Location) -> dict[str, int]:
    """How often each reason stands in a list of rejected records, the most frequent first."""
    reasons: dict[str, int] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            reason = json.loads(line)["reason"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        reasons[reason] = reasons.get(reason, 0) + 1
    return dict(sorted(reasons.items(), key=lambda pair: -pair[1]))


def _is_of(result: UnitResult, unit: Unit) -> bool:
    zero, one = unit.scored_passes()
    return np.array_equal(result.zero_shot[0], zero) and np.array_equal(result.one_shot[0], one)


def _move_aside(folder: Location) -> None:
    """Moves a run's own files, and no others, to a new folder beside it."""
    if folder.local:
        folder = Location(folder.local.resolve())  # "." has no name, and a link may lead to another file system
    number = 1
    while (aside := folder.parent / f"{folder.name}.old-{number}").exists():
        number += 1
    own = (FILES - _LOCKS | _FOLDERS) & set(folder.names())
    try:
        aside.make_folder()
        # The lock stays, and is held meanwhile; without a manifest what is left would be no run.
        for name in sorted(own, key=lambda name: (name == "manifest.json", name)):
            (folder / name).move(aside / name)
    except OSError as error:
        if aside.local:
            with suppress(OSError):
                aside.local.rmdir()  # where nothing was moved
        raise OSError(f"cannot move the old run to {aside}: {error.strerror or error}; give another folder") from error
    _log.warning("moved the old run to %s", aside)


def _save_array(path: os.PathLike[str], array: np.ndarray) -> None:
    with open(path, "wb") as stream:
        np.save(stream, array, allow_pickle=False)
