"""Scores read back from disk, with the data and the embeddings that they belong to where these are found."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from miwv_fast.files import Location
from miwv_fast.manifest import differences
from miwv_fast.parts import array_from_bytes, read_table
from miwv_fast.scores import MANIFEST_KEY, MULTI_SCHEMA, SCHEMA, Scores
from miwv_fast.sources import FileSource, ObjectSource, Source, open_source

_log = logging.getLogger(__name__)


def load_scores(path: str | os.PathLike[str], data: object = None) -> Scores:
    """Reads scores from a Parquet file that `Scores.save` wrote, or from a run folder, here or at a URL.

    `data` says where the scored data is now; without it the manifest's paths are used. Raises FileNotFoundError if
    there is no such file, ValueError if it holds no scores.
    """
    file = Location(path)
    if file.is_dir():
        file = file / "scores.parquet"
    if not file.is_file():
        if (file.parent / "manifest.json").is_file():
            raise FileNotFoundError(f"the run in {file.parent} is not finished: the command that began it goes on")
        raise FileNotFoundError(f"no scores at {path}: expected a Parquet file or a run folder with scores.parquet")
    try:
        table = read_table(file.read_bytes())
    except pa.ArrowException as error:
        raise ValueError(f"{file} is not a Parquet file: {error}") from error
    metadata = table.schema.metadata or {}
    table = table.replace_schema_metadata(None)
    if not table.schema.equals(SCHEMA) and not table.schema.equals(MULTI_SCHEMA):
        raise ValueError(f"{file} does not hold MIWV scores: its columns are {', '.join(table.column_names)}")
    manifest = json.loads(metadata.get(MANIFEST_KEY, b"{}"))
    # What lies beside the scores belongs to them in their own run's folder only.
    run = file.parent if _is_run(file.parent, manifest) else None
    try:
        embeddings = None if run is None else read_embeddings(run)
    except OSError as error:  # they are needed for `dedup` alone
        _log.warning("%s", error)
        embeddings = None
    return Scores(table, manifest, _find_source(manifest, data, run), embeddings=embeddings)


def _is_run(folder: Location, manifest: Mapping[str, Any]) -> bool:
    """Whether a folder holds the run of this manifest."""
    path = folder / "manifest.json"
    try:
        kept = path.read_json() if path.is_file() else None
    except ValueError:
        return False
    except OSError as error:
        _log.warning("%s", error)
        return False
    return isinstance(kept, dict) and not differences(kept, manifest)


def read_embeddings(run: Location) -> np.ndarray | None:
    """The embeddings that lie in a run folder, mapped into memory where it is local; None where none can be read."""
    path = run / "embeddings.npy"
    if not path.is_file():
        return None
    try:
        if path.local is None:
            return array_from_bytes(path.read_bytes())
        return cast(np.ndarray, np.load(path.local, mmap_mode="r", allow_pickle=False))
    except (EOFError, ValueError) as error:
        _log.warning("%s cannot be read: %s", path, error)
        return None


def _find_source(manifest: Mapping[str, Any], data: object, run: Location | None) -> Source | None:
    if data is not None:
        return open_source(data)
    described = manifest.get("data", {})
    if run is not None and not {"files", "data_set"} & described.keys():
        spooled = run / "data.jsonl"
        if spooled.is_file():
            lines = spooled.read_bytes().splitlines() if spooled.local is None else ()
            rows = ObjectSource([json.loads(line) for line in lines], str(spooled))
            source = FileSource([spooled.local]) if spooled.local else rows
            source.own = True  # a malformed row may have become text in it
            return source
    if "data_set" in described:
        try:
            return open_source(described["data_set"])
        except (OSError, ValueError) as error:
            _log.warning("%s", error)
            return None
    files = described.get("files", [])
    paths = [Path(file["path"]) for file in files]
    if not paths or not all(path.is_file() for path in paths):
        return None
    return FileSource(paths)
