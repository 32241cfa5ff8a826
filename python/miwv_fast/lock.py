"""Who writes a run: one process at a time, and what becomes of the lock of a process that died."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from miwv_fast.files import Location

_log = logging.getLogger(__name__)
_here: set[str] = set()


class Lock:
    """The lock of a run folder, held until `release`; the file `lock` says who holds or held it.

    On a file system it is the system's own lock, which ends with the process, on whatever host it ran. Elsewhere it is
    an object that is created only where none is: one that a dead process of this host left is taken over, one of
    another host, of another container or from before a restart must be deleted by hand. Raises ValueError if somebody
    else holds it, naming them.
    """

    def __init__(self, folder: Location) -> None:
        self._place = folder / "lock"
        self._stream: Any = None
        self._process = os.getpid()
        self._content = _own()
        if folder.local is None or not self._lock_file():
            self._create_object()

    def release(self) -> None:
        """Gives the lock back; in a process that was forked meanwhile, whose it is not, nothing."""
        if os.getpid() != self._process:
            return
        if self._stream is not None:
            stream, self._stream = self._stream, None
            with stream:
                stream.truncate(0)
                fcntl.flock(stream, fcntl.LOCK_UN)  # closing alone leaves it to processes that were forked meanwhile
        elif str(self._place) in _here:
            _here.discard(str(self._place))
            self._remove_object(self._content)

    def _lock_file(self) -> bool:
        """False where the file system has no locks."""
        stream = open(str(self._place), "a+")  # noqa: SIM115  (it is the lock that is held)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _name(_read(stream))
            stream.close()
            raise _held(self._place.parent, holder) from None
        except OSError as error:
            written = _read(stream)
            stream.close()
            if written is None:  # of nobody: opening has made it
                self._place.remove()
            _log.warning("%s has no locks (%s): do not start two processes on it at once", self._place.parent, error)
            return False
        holder = _name(_read(stream))
        if holder:
            _log.warning("taking over %s from %s, which is gone", self._place.parent, holder)
        stream.truncate(0)
        stream.write(self._content)
        stream.flush()
        self._stream = stream
        return True

    def _create_object(self) -> None:
        while not self._place.create(self._content.encode()):
            try:
                content = self._place.read_bytes().decode()
                held = json.loads(content)
            except (FileNotFoundError, ValueError):
                held = None
            if str(self._place) in _here or not _is_gone(held):
                raise _held(self._place.parent, _name(held), f"; if that is gone, delete {self._place}")
            _log.warning("taking over %s from %s, which is gone", self._place.parent, _name(held))
            self._take_over(content)
        _here.add(str(self._place))

    def _take_over(self, content: str) -> None:
        """Removes a dead process's lock; of several that find it only one does, and none removes another's new lock."""
        claim = self._place.parent / "lock.taken"
        if not claim.create(self._content.encode()):
            raise _held(self._place.parent, "", f"; if nobody is starting there now, delete {claim}")
        try:
            self._remove_object(content)
        finally:
            claim.remove()

    def _remove_object(self, content: str) -> None:
        """Removes the lock if it is the one with this content."""
        with suppress(FileNotFoundError):
            if self._place.read_bytes() == content.encode():
                self._place.remove()


def read_holder(folder: Location) -> str | None:
    """Who writes the run in a folder, None if nobody does."""
    place = folder / "lock"
    if not place.exists():
        return None
    if folder.local is not None:
        with open(str(place)) as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                return _name(_read(stream)) or "another process"
            except OSError:
                pass
    try:
        held = json.loads(place.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return None if _is_gone(held) and str(place) not in _here else _name(held)


def _own() -> str:
    """A lock's content, no two of which are the same."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "processes": _processes(), "since": int(time.time())}
    return json.dumps({**holder, "token": uuid.uuid4().hex})


def _processes() -> str:
    """Among which processes a number means one: those of this start of the machine and, in a container, of that."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read(stream: Any) -> Any:
    stream.seek(0)
    try:
        return json.loads(stream.read())
    except ValueError:
        return None


def _name(held: Any) -> str:
    try:
        return f"process {held['pid']} on {held['host']}"
    except (KeyError, TypeError):
        return ""


def _is_gone(held: Any) -> bool:
    """Whether the holder is known to be dead: its number is one of ours, and no process has it but this one."""
    try:
        pid, place = int(held["pid"]), (held["host"], held["processes"])
    except (KeyError, TypeError, ValueError):
        return False
    if place != (socket.gethostname(), _processes()):
        return False
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _held(folder: Location, holder: str, hint: str = "") -> ValueError:
    return ValueError(f"output {folder} is being written by {holder or 'another process'}{hint}")
