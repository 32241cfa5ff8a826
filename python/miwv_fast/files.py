"""Files and folders wherever they lie: on this machine, a shared file system, or a store that fsspec knows."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)


class Location:
    """A file or folder: a local path, or a URL such as s3://bucket/run.

    Raises ValueError for a URL of an unknown kind, or of one whose package is not installed. What a store raises beyond
    OSError comes as OSError that names the place.
    """

    def __init__(self, place: str | os.PathLike[str] | Location) -> None:
        self._store: Any = None
        self._path: str
        if isinstance(place, Location):
            self._store, self._path = place._store, place._path
            return
        self._path = os.fspath(place)
        if "://" in self._path:
            self._store, self._path = _find_store(self._path)

    @property
    def local(self) -> Path | None:
        """The path on this machine, None where the place is elsewhere."""
        return Path(self._path) if self._store is None else None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Location:
        """The folder that it lies in."""
        return self._at(self._path.rstrip("/").rpartition("/")[0] if self.local is None else str(self.local.parent))

    def __truediv__(self, name: str) -> Location:
        return self._at(f"{self._path.rstrip('/')}/{name}" if self.local is None else str(self.local / name))

    def __str__(self) -> str:
        return self._path if self._store is None else str(self._store.unstrip_protocol(self._path))

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        with self._errors():
            return self.local.exists() if self.local else bool(self._fresh().exists(self._path))

    def is_file(self) -> bool:
        """Whether there is a file."""
        with self._errors():
            return self.local.is_file() if self.local else bool(self._fresh().isfile(self._path))

    def is_dir(self) -> bool:
        """Whether there is a folder."""
        with self._errors():
            return self.local.is_dir() if self.local else bool(self._fresh().isdir(self._path))

    def names(self) -> list[str]:
        """The names in a folder, sorted; none where there is no folder."""
        with self._errors():
            try:
                if self.local:
                    return sorted(os.listdir(self.local))
                listed = self._fresh().ls(self._path, detail=False)
            except FileNotFoundError:
                return []
        return sorted({name for path in listed if (name := str(path).rstrip("/").rpartition("/")[2])} - {self.name})

    def read_bytes(self) -> bytes:
        """All of a file."""
        with self._errors():
            return self.local.read_bytes() if self.local else bytes(self._store.cat_file(self._path))

    def read_json(self) -> Any:
        """The JSON value that a file holds. Raises ValueError, naming the file, where it is none."""
        try:
            return json.loads(self.read_bytes())
        except ValueError as error:
            raise ValueError(f"{self} is not JSON, so it is damaged or of something else: {error}") from error

    def write(self, write: Callable[[Path], Any]) -> None:
        """Writes a file by a function that gets a local path; nobody ever sees half of it.

        Locally what is written goes to a temporary name beside the target, to disk, and is then renamed. A store gets
        it in one put, which object stores show when it is whole.
        """
        if self.local:
            write_atomically(self.local, write)
            return
        folder = Path(tempfile.mkdtemp(prefix="miwv-"))
        try:
            write(folder / "file")
            with self._errors():
                self._store.put_file(str(folder / "file"), self._path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write_bytes(self, content: bytes) -> None:
        """Writes a file, whole or not at all."""
        self.write(lambda out: out.write_bytes(content))

    def write_json(self, value: Any) -> None:
        """Writes a JSON value, indented, whole or not at all."""
        self.write_bytes((json.dumps(value, indent=2) + "\n").encode())

    def create(self, content: bytes) -> bool:
        """Writes a file unless there is one; whether it was written.

        A store that cannot refuse is looked at before: two that write at the same moment may then both believe it.
        """
        with self._errors():
            if self.local:
                try:
                    with self.local.open("xb") as stream:
                        stream.write(content)
                except FileExistsError:
                    return False
                return True
            if self.exists():
                return False
            try:
                self._store.pipe_file(self._path, content, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError, ValueError):
                self._store.pipe_file(self._path, content)
            return True

    def make_folder(self) -> None:
        """Makes a folder, and those above it, where a folder is more than the names of its files."""
        with self._errors():
            if self.local:
                self.local.mkdir(parents=True, exist_ok=True)
            else:
                self._store.makedirs(self._path, exist_ok=True)

    def move(self, target: Location) -> None:
        """Moves a file or a whole folder, within one store, to a place where nothing is or a file that it replaces."""
        with self._errors():
            if self.local and target.local:
                os.replace(self.local, target.local)
            else:
                self._store.mv(self._path, target._path, recursive=self.is_dir())

    def remove(self) -> None:
        """Removes a file, if it is there."""
        with self._errors(), suppress(FileNotFoundError):
            self.local.unlink() if self.local else self._store.rm_file(self._path)

    def remove_folder(self) -> None:
        """Removes a folder and all that is in it, if it is there."""
        with self._errors(), suppress(FileNotFoundError):
            shutil.rmtree(self.local) if self.local else self._store.rm(self._path, recursive=True)

    def _at(self, path: str) -> Location:
        other = Location(self)
        other._path = path
        return other

    def _fresh(self) -> Any:
        """The store, which forgets what it knew of its folders: others write there too."""
        self._store.invalidate_cache()
        return self._store

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            raise
        except Exception as error:
            raise OSError(f"{self}: {type(error).__name__}: {error}") from error


def _find_store(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot use {url}: {error}") from error
    except Exception as error:  # whatever a store's own package raises for an account that is not set up
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error
    if "file" in (store.protocol if isinstance(store.protocol, tuple) else (store.protocol,)):
        return None, str(path)
    return store, str(path)


def check_writable(folder: Location) -> None:
    """Raises ValueError where an output folder is a file or lies in one, PermissionError where none can be written."""
    if folder.is_file():
        raise ValueError(f"output {folder} is a file; give a folder")
    if folder.local:
        path = folder.local.absolute()
        there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir():
            raise ValueError(f"output {folder} lies in {there}, which is a file; give another folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"output {folder}: {there} cannot be written to; give another folder")


def write_jsonl(path: str | os.PathLike[str] | Location, rows: Iterable[Any]) -> None:
    """Writes a JSON value per line, UTF-8, text as it is; NaN becomes null, as JSON has none.

    A field that JSON cannot hold is left out, with a warning.
    """

    def write(out: Path) -> None:
        with out.open("wb") as stream:
            for number, row in enumerate(rows):
                stream.write(_json_line(row, number))

    Location(path).write(write)


def _json_line(row: Any, number: int) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, default=_plain)
        if "NaN" in text or "Infinity" in text:
            text = json.dumps(_read_finite(text), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        if not isinstance(row, Mapping):
            raise
        kept = {}
        for name, value in row.items():
            try:
                kept[str(name)] = _read_finite(json.dumps(value, default=_plain))
            except (TypeError, ValueError, RecursionError) as error:
                _log.warning("record %d: field %r cannot be written as JSON and is left out: %s", number, name, error)
        text = json.dumps(kept, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold as an escape
        return json.dumps(json.loads(text)).encode() + b"\n"


def _read_finite(text: str) -> Any:
    """A JSON value, null in the place of what Python writes for numbers that JSON does not have."""
    return json.loads(text, parse_constant=lambda name: None)


def _plain(value: Any) -> Any:
    """NumPy's arrays and numbers as Python's; whatever else JSON does not know as text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside the target, brings it to disk and renames, so that nobody ever sees half a file.

    A link stays a link. What is no file, such as a pipe or a terminal, is written to as it is, and so is what this
    process has open, such as /dev/stdout: behind that may be a file that holds more. Raises IsADirectoryError for a
    folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file")
    if (descriptor := find_descriptor(path)) is not None:
        _write_to(descriptor, write)
        return
    if path.exists() and not path.is_file():
        write(path)
        return
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is None or error.filename not in (None, os.fspath(temporary)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # which is what the user named
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """The name beside a file or folder under which it is written until it is whole."""
    name = os.fsdecode(os.fsencode(path.name)[:200])  # names have at most 255 bytes
    return path.with_name(f".{name}.{os.getpid()}")


def find_descriptor(path: Path) -> int | None:
    """What this process has open under a path such as /dev/stdout, also behind links; None for any other path."""
    while path.exists():
        place = path.parent.resolve() / path.name
        if place.parent == Path(f"/proc/{os.getpid()}/fd"):
            return int(place.name)
        if not place.is_symlink():
            break
        path = place.parent / os.readlink(place)
    return None


def _write_to(descriptor: int, write: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="miwv-") as folder:
        made = Path(folder) / "file"
        write(made)
        with made.open("rb") as source, open(descriptor, "wb", closefd=False) as target:
            shutil.copyfileobj(source, target)


def _sync_folder(folder: Path) -> None:
    """Brings a folder's names to disk, where the file system knows a way."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
