"""Runs survive what happens to long runs: the same bytes come out, whatever was done to them on the way.

pytest tests/test_store.py --faults 200      kills as many runs at random moments
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import miwv_fast
from miwv_fast import job, neighbors
from miwv_fast.errors import Interrupted
from miwv_fast.runner import Runner
from miwv_fast.store import run_status
from support import byte_level, text_embedder, tiny_model
from test_scorer import make_rows

ROWS = make_rows("alpaca", 40)
OPTIONS: dict[str, Any] = {"embedder": text_embedder, "batch_tokens": 300, "progress": False}
processes = multiprocessing.get_context("forkserver")
# Imported once in the server, so that a child is there at once.
processes.set_forkserver_preload(["test_store", "transformers.models.llama.modeling_llama", "miwv_fast.scorer"])


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Many units, so that there is something between the first and the last."""
    monkeypatch.setattr(job, "UNIT_BATCHES", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and an undisturbed run of it."""
    made = tmp_path_factory.mktemp("runs")
    (made / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "broken\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "UNIT_BATCHES", 1)
        score(made, "undisturbed")
    assert len(list((made / "undisturbed" / "parts").iterdir())) > 15
    return made


def score(folder: Path, run: str, **options: Any) -> miwv_fast.Scores:
    own = byte_level()
    model = (tiny_model("llama", len(own)), own)
    return miwv_fast.score(folder / "data.jsonl", model, output=folder / run, **{**OPTIONS, **options})


def score_in_a_process(folder: Path, run: str, status: Any = None) -> None:
    """The same in a process of its own; its units take long enough to be hit."""
    job.UNIT_BATCHES = 1
    run_unit = Runner.run

    def slowly(self, *arguments):
        time.sleep(0.01)
        return run_unit(self, *arguments)

    Runner.run = slowly
    try:
        score(folder, run)
    except Interrupted:
        os._exit(7)


def outcome(folder: Path, run: str) -> tuple[bytes, bytes]:
    return tuple((folder / run / name).read_bytes() for name in ("scores.parquet", "rejected.jsonl"))


def start(folder: Path, run: str) -> Any:
    process = processes.Process(target=score_in_a_process, args=(folder, run))
    process.start()
    return process


def wait_for_parts(folder: Path, run: str, count: int, process: Any) -> None:
    while process.is_alive() and len(list((folder / run / "parts").glob("*.parquet"))) < count:
        time.sleep(0.002)


def test_killed_at_random_moments(folder, request):
    """kill -9, again and again, until one run is through: nothing is lost, nothing counted twice."""
    state, kills, runs = random.Random(1), 0, 0
    while kills < request.config.getoption("--faults"):
        name, runs = f"killed-{runs}", runs + 1
        while True:
            process = start(folder, name)
            done = len(list((folder / name / "parts").glob("*.parquet")))
            wait_for_parts(folder, name, done + state.randint(0, 6), process)
            time.sleep(state.random() * 0.02)
            if not process.is_alive() and process.exitcode == 0:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            if process.exitcode == 0:
                break
        assert outcome(folder, name) == outcome(folder, "undisturbed")
    assert not list(folder.glob("killed-*/damaged")), "a kill must never leave half a part"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stops_behind_the_unit_at_hand(folder, how):
    name = f"stopped-{how.name}"
    process = start(folder, name)
    wait_for_parts(folder, name, 3, process)
    os.kill(process.pid, how)
    process.join()
    assert process.exitcode == 7
    told = run_status(folder / name)
    assert not told["finished"] and 3 <= told["units_done"] < told["units"] and told["written_by"] is None
    score(folder, name)
    assert outcome(folder, name) == outcome(folder, "undisturbed")


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "renamed"])
def test_a_damaged_part_is_set_aside_and_computed_again(folder, damage, caplog):
    name = f"damaged-{damage}"
    score(folder, name)
    (folder / name / "scores.parquet").unlink()
    part = sorted((folder / name / "parts").iterdir())[4]
    content = bytearray(part.read_bytes())
    if damage == "renamed":
        part.rename(part.with_name(part.name.replace("00000004", "00000005x")))
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    else:
        part.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    score(folder, name)
    assert "does not match its checksum; set aside" in caplog.text
    assert len(list((folder / name / "damaged").iterdir())) == 1
    assert outcome(folder, name) == outcome(folder, "undisturbed")


def test_damaged_neighbours_are_found_again(folder, caplog):
    score(folder, "neighbours")
    path = folder / "neighbours" / "neighbors.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    score(folder, "neighbours")
    assert "neighbors.parquet: its content does not match" in caplog.text
    assert outcome(folder, "neighbours") == outcome(folder, "undisturbed")


def test_embeddings_and_neighbours_are_reused(folder):
    score(folder, "reused")

    def unwanted(texts):
        raise AssertionError("embedded again")

    unwanted.__module__, unwanted.__qualname__ = text_embedder.__module__, text_embedder.__qualname__
    score(folder, "reused", embedder=unwanted)
    assert np.load(folder / "reused" / "embeddings.npy").shape == (41, 64)


def test_another_run_is_refused_and_each_difference_named(folder):
    score(folder, "differs")
    before = outcome(folder, "differs")
    with pytest.raises(ValueError, match="holds a run that differs in") as refusal:
        score(folder, "differs", template="plain", include_eos=True)
    text = str(refusal.value)
    assert "include_eos: false there, true now" in text and 'template.name: "alpaca" there, "plain" now' in text
    assert "max_length" not in text and "--fresh" in text
    assert outcome(folder, "differs") == before


def test_changed_data_and_weights_are_other_runs(folder, tmp_path):
    own = byte_level()
    model = (tiny_model("llama", len(own)), own)
    data = tmp_path / "data.jsonl"
    data.write_text((folder / "data.jsonl").read_text())
    miwv_fast.score(data, model, output=tmp_path / "run", **OPTIONS)
    model[0].lm_head.weight.data[3, 5] += 1e-3
    with pytest.raises(ValueError, match=r"  model: "):
        miwv_fast.score(data, model, output=tmp_path / "run", **OPTIONS)
    model[0].lm_head.weight.data[3, 5] -= 1e-3
    data.write_text(data.read_text().replace("red", "rex", 1))
    with pytest.raises(ValueError, match=r"data\.sha256"):
        miwv_fast.score(data, model, output=tmp_path / "run", **OPTIONS)


def test_moved_data_is_the_same_run(folder, tmp_path):
    score(folder, "moved")
    own = byte_level()
    model = (tiny_model("llama", len(own)), own)
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_bytes((folder / "data.jsonl").read_bytes())
    again = miwv_fast.score(elsewhere, model, output=folder / "moved", **OPTIONS)
    assert again.table.equals(miwv_fast.load_scores(folder / "undisturbed").table)


def test_a_call_that_failed_before_anything_was_computed_can_be_mended(folder):
    with pytest.raises(ValueError, match="cannot load the embedder"):
        score(folder, "mended", embedder="no/such-embedder")
    score(folder, "mended")
    assert outcome(folder, "mended") == outcome(folder, "undisturbed")


def test_fresh_moves_the_old_run_aside(folder):
    score(folder, "fresh", template="plain")
    old = outcome(folder, "fresh")
    score(folder, "fresh", resume=False)
    assert outcome(folder, "fresh") == outcome(folder, "undisturbed")
    assert outcome(folder, "fresh.old-1") == old


def test_two_processes_never_write_one_run(folder):
    process = start(folder, "locked")
    wait_for_parts(folder, "locked", 2, process)
    with pytest.raises(ValueError, match=f"is being written by process {process.pid} on"):
        score(folder, "locked")
    assert run_status(folder / "locked")["written_by"].startswith(f"process {process.pid}")
    process.join()
    assert outcome(folder, "locked") == outcome(folder, "undisturbed")


def test_a_dead_process_lock_is_taken_over(folder, caplog):
    process = start(folder, "stale")
    wait_for_parts(folder, "stale", 2, process)
    process.kill()
    process.join()
    score(folder, "stale")
    assert f"from process {process.pid}" in caplog.text
    assert outcome(folder, "stale") == outcome(folder, "undisturbed")


def test_a_folder_of_other_things_is_not_a_run(folder):
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        score(folder, "other")
    assert [path.name for path in (folder / "other").iterdir()] == ["thesis.tex"]


def test_disk_full(folder):
    """A file system of 48 KiB is too small for the run; with more room it goes on."""
    place = folder / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs rights that this process does not have")
    try:
        os.symlink(folder / "data.jsonl", place / "data.jsonl")
        own = byte_level()
        model = (tiny_model("llama", len(own)), own)
        arguments = {"data": folder / "data.jsonl", "model": model, "output": place / "run", **OPTIONS}
        with pytest.raises(OSError, match="No space left"):
            miwv_fast.score(**arguments)
        assert not list((place / "run").rglob(".*")), "no temporary file may stay behind"
        subprocess.run(["mount", "-o", "remount,size=8m", str(place)], check=True)
        miwv_fast.score(**arguments)
        assert outcome(place, "run") == outcome(folder, "undisturbed")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_clock_jumps_do_not_matter(folder, monkeypatch):
    state = random.Random(3)
    monkeypatch.setattr(time, "time", lambda: state.uniform(0, 4e9))
    score(folder, "clock")
    assert outcome(folder, "clock") == outcome(folder, "undisturbed")


def test_the_result_does_not_say_how_it_came_about(folder):
    """Nothing about time, place or process is in the scores; the manifest in them is the run's."""
    metadata = pq.read_schema(folder / "undisturbed" / "scores.parquet").metadata
    assert json.loads(metadata[b"miwv_fast"]) == json.loads((folder / "undisturbed" / "manifest.json").read_text())
    told = run_status(folder / "undisturbed")
    assert told["finished"] and told["units_done"] == told["units"] and told["tokens_done"] == told["tokens"]
    assert list(told["rejected"].values()) == [1]


def test_recall_of_an_approximate_search_is_kept(folder, monkeypatch):
    """It is in the manifest and in what `status` tells, and goes on with the run."""
    pytest.importorskip("faiss")
    monkeypatch.setitem(neighbors.APPROXIMATE_ABOVE, "cpu", 10)
    first = score(folder, "approximate").stats["neighbor_recall"]
    assert 0 < first <= 1 and run_status(folder / "approximate")["neighbor_recall"] == first
    (folder / "approximate" / "scores.parquet").unlink()
    monkeypatch.setitem(neighbors.APPROXIMATE_ABOVE, "cpu", 10**6)  # a new search would be exact
    again = score(folder, "approximate")
    assert (
        again.stats["neighbor_recall"]
        == first
        == miwv_fast.load_scores(folder / "approximate").manifest["neighbor_recall"]
    )
    assert run_status(folder / "undisturbed")["neighbor_recall"] is None
