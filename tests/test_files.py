"""The files of a run, on this machine and in a store that fsspec knows: the same operations, the same result."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import fsspec
import numpy as np
import pytest

import miwv_fast
from miwv_fast import lock
from miwv_fast.files import Location, find_descriptor, write_jsonl
from miwv_fast.lock import Lock, read_holder
from miwv_fast.store import run_status
from support import byte_level, text_embedder, tiny_model
from test_scorer import make_rows


@pytest.fixture(params=["local", "memory", "file"])
def folder(request, tmp_path):
    """A folder that is not there yet."""
    yield Location(
        {"local": tmp_path / "run", "memory": "memory://run", "file": f"file://{tmp_path}/run"}[request.param]
    )
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def test_files(folder):
    assert not folder.exists() and folder.names() == []
    folder.make_folder()
    file = folder / "parts" / "a.json"
    file.write_json({"a": 1})
    assert file.read_json() == {"a": 1} and file.is_file() and not file.is_dir()
    assert folder.is_dir() and folder.names() == ["parts"] and (folder / "parts").names() == ["a.json"]
    assert file.name == "a.json" and str(file.parent) == str(folder / "parts")
    assert not file.create(b"other") and (folder / "b").create(b"new") and (folder / "b").read_bytes() == b"new"
    file.move(folder / "b")
    assert folder.names() == ["b", "parts"] and (folder / "b").read_json() == {"a": 1}
    (folder / "b").remove()
    (folder / "b").remove()
    write_jsonl(folder / "parts" / "rows.jsonl", [{"a": "\ud800é\u2028"}])
    assert json.loads((folder / "parts" / "rows.jsonl").read_bytes()) == {"a": "\ud800é\u2028"}
    folder.move(folder.parent / "aside")
    assert not folder.is_dir() and (folder.parent / "aside" / "parts").names() == ["rows.jsonl"]


def test_a_write_that_fails_leaves_what_was_there(folder):
    file = folder / "a.json"
    file.write_json(1)

    def fail(out):
        out.write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        file.write(fail)
    assert file.read_json() == 1 and folder.names() == ["a.json"]
    file.write_bytes(b"{")
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        file.read_json()


def test_rows_that_json_can_hardly_hold(tmp_path, caplog):
    """What a field holds comes back, or the field is left out by name; the file is UTF-8 whatever is in it."""
    circular: dict = {"instruction": "c", "output": "d"}
    circular["me"] = circular
    deep: object = 1
    for _ in range(100_000):
        deep = [deep]
    rows = [
        {"instruction": "ü", "meta": "x\ud800"},
        {"messages": np.array([{"role": "user"}], dtype=object), "n": np.int64(3), "x": np.float32(0.5)},
        circular,
        {"instruction": "e", "deep": deep, ("a", 1): 2, "huge": 10**5000},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"instruction": "ü", "meta": "x\ud800"},
        {"messages": [{"role": "user"}], "n": 3, "x": 0.5},
        {"instruction": "c", "output": "d"},
        {"instruction": "e", "('a', 1)": 2},
    ]
    assert "record 2: field 'me' cannot be written" in caplog.text and "record 3: field 'deep'" in caplog.text


def test_a_file_has_its_name_when_it_is_on_disk(tmp_path, monkeypatch):
    """A power cut leaves the old content or the new one: it is synced before the renaming, the folder behind it."""
    done: list[object] = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor):
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_renaming(source, target):
        done.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_renaming)
    Location(tmp_path / "a").write_bytes(b"new")
    assert done == [(tmp_path / "a").stat().st_ino, "renamed", tmp_path.stat().st_ino]


@pytest.mark.parametrize("error", [FileExistsError, NotImplementedError, TypeError, ValueError])
def test_a_store_that_was_quicker_or_cannot_refuse(monkeypatch, error):
    """Between the look and the write somebody else made the file; or the store knows no way to write only then."""
    store = type(fsspec.filesystem("memory"))
    pipe_file = store.pipe_file

    def refuse(self, path, value, mode="overwrite"):
        if mode == "create":
            raise error
        pipe_file(self, path, value)

    monkeypatch.setattr(store, "pipe_file", refuse)
    place = Location("memory://create/lock")
    try:
        assert place.create(b"mine") == place.exists() == (error is not FileExistsError)
    finally:
        place.remove()


def test_what_cannot_be_written_is_named(tmp_path):
    def fill(out):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'rows.jsonl'}'") as raised:
        Location(tmp_path / "rows.jsonl").write(fill)
    assert raised.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(IsADirectoryError, match=f"{tmp_path / 'in'} is a folder; give a file"):
        write_jsonl(tmp_path / "in", [1])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_links_and_pipes(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    Location(tmp_path / "link").write_bytes(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_bytes)
        Location(tmp_path / "pipe").write_bytes(b"through")
        assert read.result() == b"through" and (tmp_path / "pipe").is_fifo()


def test_what_is_open_already_is_written_to_and_not_replaced(tmp_path):
    """Behind /dev/stdout may be a file that holds more, and is to get more."""
    (tmp_path / "all").write_bytes(b"precious\n")
    with (tmp_path / "all").open("ab") as stream:
        for place in (f"/dev/fd/{stream.fileno()}", f"/proc/self/fd/{stream.fileno()}"):
            (tmp_path / "link").unlink(missing_ok=True)
            (tmp_path / "link").symlink_to(place)
            for path in (place, tmp_path / "link"):
                assert find_descriptor(Path(path)) == stream.fileno()
                Location(path).write_bytes(b"new\n")
        os.write(stream.fileno(), b"last\n")
    assert (tmp_path / "all").read_bytes() == b"precious\n" + 4 * b"new\n" + b"last\n"
    assert find_descriptor(tmp_path / "all") is None and find_descriptor(Path("/dev/null")) is None
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("link")
    assert find_descriptor(tmp_path / "link") is None


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EIO])
def test_a_file_system_that_cannot_sync_a_folder(tmp_path, monkeypatch, number):
    """The file is there: only that the disk fails is an error."""

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with nullcontext() if number != errno.EIO else pytest.raises(OSError, match=os.strerror(number)):
        Location(tmp_path / "a").write_bytes(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("letter", ["a", "ü", "日"])
def test_names_as_long_as_names_may_be(tmp_path, letter):
    path = tmp_path / (letter * (255 // len(letter.encode())))
    Location(path).write_bytes(b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_urls_that_cannot_be_used():
    with pytest.raises(ValueError, match="cannot use s4://bucket/run: Protocol not known: s4"):
        Location("s4://bucket/run")
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(ValueError, match="cannot use s3://bucket/run: Install s3fs"):
            Location("s3://bucket/run")


def test_what_a_store_raises_names_the_place(monkeypatch):
    class OddError(Exception):
        pass

    def fail(self, path, **_):
        raise OddError("no credentials")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "exists", fail)
    with pytest.raises(OSError, match="memory:///run/a: OddError: no credentials"):
        Location("memory://run/a").exists()


def test_one_lock_for_one_process(folder):
    folder.make_folder()
    held = Lock(folder)
    with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on"):
        Lock(folder)
    assert read_holder(folder) == f"process {os.getpid()} on {lock.socket.gethostname()}"
    held.release()
    held.release()
    assert read_holder(folder) is None
    Lock(folder).release()


@pytest.fixture
def stale():
    """A store with a lock of a process that is gone: a function that writes one, with what is otherwise about it."""
    folder = Location("memory://stale")

    def leave(**other):
        held = {**json.loads(lock._own()), "pid": 2**22 + 1, **other}
        (folder / "lock").write_bytes(json.dumps(held).encode())
        return folder

    yield leave
    for name in folder.names():
        (folder / name).remove()


@pytest.mark.parametrize("pid", [2**22 + 1, os.getpid()], ids=["none", "reused"])  # of a process before this one
def test_the_lock_that_a_dead_process_left_in_a_store(stale, pid, caplog):
    folder = stale(pid=pid)
    assert read_holder(folder) is None
    held = Lock(folder)
    assert f"taking over memory:///stale from process {pid}" in caplog.text
    assert read_holder(folder) == f"process {os.getpid()} on {lock.socket.gethostname()}"
    held.release()
    assert folder.names() == []


@pytest.mark.parametrize("other", [{"host": "node7"}, {"processes": "another container's"}])
def test_the_lock_of_a_process_that_cannot_be_looked_for(stale, other):
    """A number means a process only among those of this host, its container and its start."""
    folder = stale(**other)
    assert read_holder(folder).startswith(f"process {2**22 + 1} on ")
    with pytest.raises(ValueError, match=r"is being written by .*; if that is gone, delete memory:///stale/lock"):
        Lock(folder)


def test_two_that_take_over_one_lock(stale, monkeypatch):
    """While one has found the lock of a dead process, another takes it over: it is not taken from that one."""
    folder = stale()
    is_gone, others = lock._is_gone, []

    def overtaken(held):
        gone = is_gone(held)
        monkeypatch.setattr(lock, "_is_gone", is_gone)
        others.append(Lock(folder))
        lock._here.clear()  # as if in another process
        monkeypatch.setattr(lock, "_is_gone", lambda held: False)
        return gone

    monkeypatch.setattr(lock, "_is_gone", overtaken)
    with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on"):
        Lock(folder)
    assert (folder / "lock").read_bytes().decode() == others[0]._content


def test_one_at_a_time_takes_over(stale):
    folder = stale()
    (folder / "lock.taken").write_bytes(b"")
    with pytest.raises(ValueError, match=r"if nobody is starting there now, delete memory:///stale/lock\.taken"):
        Lock(folder)


def test_only_its_own_lock_is_given_back(stale):
    folder = Location("memory://stale")
    held = Lock(folder)
    stale()  # somebody deleted the lock by hand, and another has it now
    held.release()
    assert folder.names() == ["lock"]


def test_a_process_of_another_user_is_alive(stale, monkeypatch):
    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(lock.os, "kill", refuse)
    folder = stale(pid=1)
    with pytest.raises(ValueError, match="is being written by process 1 on"):
        Lock(folder)
    assert read_holder(folder).startswith("process 1 on")


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    """Some network file systems have none: the lock is then a file that is created only where none is."""

    def refuse(stream, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    folder = Location(tmp_path)
    held = Lock(folder)
    assert "has no locks" in caplog.text
    with pytest.raises(ValueError, match="is being written by process"):
        Lock(folder)
    held.release()
    assert folder.names() == []


def test_a_run_in_a_store_is_the_run_on_disk(tmp_path, monkeypatch):
    """To the byte, through an interruption, with its scores and records read back from there."""
    own = byte_level()
    model = (tiny_model("llama", len(own)), own)
    options = {"embedder": text_embedder, "batch_tokens": 300, "progress": False}
    rows = make_rows("alpaca", 12)
    miwv_fast.score(rows, model, output=tmp_path / "run", **options)
    url = "memory://bucket/run"
    with monkeypatch.context() as patch:
        patch.setattr("miwv_fast.job.Job.run", lambda *_: (_ for _ in ()).throw(MemoryError("gone")))
        with pytest.raises(MemoryError):
            miwv_fast.score(rows, model, output=url, **options)
    told = run_status(url)
    assert not told["finished"] and told["written_by"] is None
    miwv_fast.score(rows, model, output=url, **options)
    assert run_status(url)["finished"]
    names = set((Location(tmp_path) / "run").names()) - {"lock"}
    assert set(Location(url).names()) == names
    for name in ("scores.parquet", "rejected.jsonl", "manifest.json", "data.jsonl"):
        assert (Location(url) / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    loaded = miwv_fast.load_scores(url)
    assert loaded.embeddings is not None and np.array_equal(loaded.embeddings, np.load(tmp_path / "run/embeddings.npy"))
    assert loaded.select(3) == miwv_fast.load_scores(tmp_path / "run").select(3)
    with pytest.raises(ValueError, match="holds a run that differs in"):
        miwv_fast.score(rows, model, output=url, include_eos=True, **options)
    miwv_fast.score(rows, model, output=url, resume=False, include_eos=True, **options)
    assert run_status("memory://bucket/run.old-1")["finished"]
