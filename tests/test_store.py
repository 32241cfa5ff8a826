"""Runs survive what happens to long runs: the same bytes come out, whatever was done to them on the way.

pytest tests/test_store.py --faults 200      kills as many runs at random moments
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import miwv_fast
from miwv_fast import _core, embedding, formats, job, neighbors, ops, stopping
from miwv_fast.errors import Interrupted
from miwv_fast.files import Location
from miwv_fast.lock import Lock
from miwv_fast.runner import Runner, UnitResult
from miwv_fast.store import Run, run_status
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
    os.fsync = lambda descriptor: None
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


STAGES = {
    "reading": "miwv_fast.records._read_row",
    "loading": "miwv_fast.scorer.LocalEngine",
    "tokenizing": "miwv_fast.job.tokenize",
    "embedding": "test_store.text_embedder",
    "neighbours": "miwv_fast.engine.nearest",
    "planning": "miwv_fast.job.plan_units",
    "scoring": "miwv_fast.runner.Runner.run",
    "joining": "miwv_fast.scorer.read_embeddings",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stops_in_every_stage(folder, stage, how, monkeypatch):
    """What was finished is kept, embeddings call by call, and the next call makes only what is missing."""
    name = f"stopped-{stage}-{how.name}"
    calls: list[int] = []
    before = signal.getsignal(how)

    def counting(texts):
        calls.append(len(texts))
        return globals()["text_embedder"](texts)

    counting.__module__, counting.__qualname__ = text_embedder.__module__, text_embedder.__qualname__
    monkeypatch.setattr(embedding, "CALL_TEXTS", 8)
    with monkeypatch.context() as patch:
        real = pkgutil.resolve_name(STAGES[stage])
        seen: list[object] = []

        def stop(*arguments, **options):
            seen.append(None)
            if len(seen) == (3 if stage in ("reading", "embedding", "scoring") else 1):
                os.kill(os.getpid(), how)
            return real(*arguments, **options)

        patch.setattr(STAGES[stage], stop)
        with pytest.raises(Interrupted):
            score(folder, name, embedder=counting)
    assert signal.getsignal(how) is before
    made = len(calls)
    assert made == {"reading": 0, "loading": 0, "tokenizing": 0, "embedding": 3}.get(stage, 5)
    score(folder, name, embedder=counting)
    assert len(calls) == 5, "each text is embedded once, over both calls"
    assert outcome(folder, name) == outcome(folder, "undisturbed")
    assert not (folder / name / "embeddings").exists()


def test_a_damaged_call_of_the_embedder_is_made_again(folder, monkeypatch, caplog):
    monkeypatch.setattr(embedding, "CALL_TEXTS", 8)
    with monkeypatch.context() as patch:
        patch.setattr("miwv_fast.engine.nearest", lambda *_: (_ for _ in ()).throw(MemoryError("gone")))
        with pytest.raises(MemoryError):
            score(folder, "calls")
    kept = sorted((folder / "calls" / "embeddings").iterdir())
    assert len(kept) == 5
    kept[2].write_bytes(kept[2].read_bytes()[:-4])
    with pytest.raises(ValueError, match="differs in"):
        score(folder, "calls", template="plain")
    score(folder, "calls")
    assert "does not match its checksum; set aside" in caplog.text
    assert outcome(folder, "calls") == outcome(folder, "undisturbed")


def test_an_embedder_that_changed_is_another_run(folder, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(embedding, "load_embedder", lambda name, device: text_embedder)
    score(folder, "embedder", embedder=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="embedder_content: "):
        score(folder, "embedder", embedder=tmp_path)


def test_an_embedder_that_was_moved_or_is_gone_is_the_same(folder, tmp_path, monkeypatch):
    """Where the neighbours are found it is not needed any more."""
    monkeypatch.setattr(embedding, "load_embedder", lambda name, device: text_embedder)
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "model.safetensors").write_bytes(b"weights")
        score(folder, "moved embedder", embedder=tmp_path / place)
    shutil.rmtree(tmp_path / "here")
    again = score(folder, "moved embedder", embedder=tmp_path / "here")
    assert again.stats["resumed_tokens"] == again.stats["forwarded_tokens"] > 0


def test_a_loaded_embedder_is_known_by_its_weights(folder):
    class Model(torch.nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(weight))

        def encode(self, texts: list[str]) -> np.ndarray:
            return text_embedder(texts) + self.weight.item()

    score(folder, "loaded", embedder=Model(1.0))
    score(folder, "loaded", embedder=Model(1.0))
    with pytest.raises(ValueError, match="embedder_content: "):
        score(folder, "loaded", embedder=Model(2.0))


def write_by_other_hands(part: Path, table: pa.Table) -> None:
    """A file whose checksum is right and whose content is not."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    part.unlink()
    number = part.name.partition("-")[0]
    part.with_name(f"{number}-{hashlib.sha256(content).hexdigest()[:32]}.parquet").write_bytes(content)


@pytest.mark.parametrize("what", ["columns", "unit", "nulls", "metadata", "text"])
def test_a_part_of_other_hands_is_refused(folder, what):
    name = f"hands-{what}"
    score(folder, name)
    part, other = sorted((folder / name / "parts").iterdir())[3:5]
    table = pq.read_table(part)
    if what == "columns":
        table = table.rename_columns(["one_shot", "number", "loss"])
    elif what == "unit":
        table = pq.read_table(other)
    elif what == "nulls":
        table = table.set_column(2, table.field(2), pa.nulls(len(table), pa.float32()))
    elif what == "metadata":
        table = table.replace_schema_metadata(None)
    else:
        table = table.replace_schema_metadata({"cost": "{}"})
    write_by_other_hands(part, table)
    with pytest.raises(ValueError, match=r"00000003-\w+\.parquet is whole, but .*move it away"):
        score(folder, name)


def test_a_part_of_no_unit_is_refused(folder):
    score(folder, "hands-number")
    part = sorted((folder / "hands-number" / "parts").iterdir())[3]
    part.rename(part.with_name(part.name.replace("00000003", "00009999")))
    with pytest.raises(ValueError, match=r"00009999-\w+\.parquet is whole, but holds other passes than unit 9999"):
        score(folder, "hands-number")


@pytest.mark.parametrize("what", ["columns", "length", "range", "below", "itself", "bytes"])
def test_neighbours_of_other_hands_are_refused(folder, what):
    name = f"neighbours-{what}"
    score(folder, name)
    path = folder / name / "neighbors.parquet"
    table = pq.read_table(path)
    index = table["index"].combine_chunks().flatten().to_numpy().copy()
    if what == "columns":
        table = table.select(["similarity", "index"])
    elif what == "length":
        table = table.slice(1)
    else:
        index[4] = {"range": 41, "below": -2, "itself": 4}.get(what, 0)
        table = table.set_column(0, table.field(0), pa.FixedSizeListArray.from_arrays(index, 1))
    pq.write_table(table, path)
    if what == "bytes":
        path.write_bytes(b"PAR1 and no more")
    manifest = json.loads((folder / name / "manifest.json").read_text())
    manifest["neighbor_table"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / name / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"neighbors\.parquet is whole, but no neighbours of this run"):
        score(folder, name)


@pytest.mark.parametrize("content", ["", "{", "[]", "\0"])
def test_a_manifest_that_is_none(folder, content):
    (folder / "torn").mkdir(exist_ok=True)
    (folder / "torn" / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json (is not JSON|should be a JSON object)"):
        score(folder, "torn")


def test_what_a_killed_process_was_writing_is_cleared_away(folder):
    """Its temporary file neither hides the run nor stays."""
    (folder / "half").mkdir()
    (folder / "half" / ".manifest.json.4711").write_text("{")
    score(folder, "half")
    (folder / "half" / "parts" / f".00000000-{'0' * 32}.parquet.4711").write_text("PAR1")
    score(folder, "half")
    (folder / "half" / "embeddings").mkdir()
    (folder / "half" / "embeddings" / f".00000000-{'0' * 32}.npy.4711").write_text("NUMPY")
    score(folder, "half")
    assert not list((folder / "half").rglob(".*"))
    assert outcome(folder, "half") == outcome(folder, "undisturbed")


def test_data_that_vanish_in_the_middle(folder, tmp_path, monkeypatch):
    """They are read once, before anything is scored; without them the scores are there, and only selecting is not."""
    data = tmp_path / "data.jsonl"
    data.write_bytes((folder / "data.jsonl").read_bytes())
    own = byte_level()
    arguments = {"model": (tiny_model("llama", len(own)), own), "output": folder / "vanished", **OPTIONS}
    real = Runner.run

    def run(self, *rest):
        data.unlink(missing_ok=True)
        return real(self, *rest)

    monkeypatch.setattr(Runner, "run", run)
    vanished = miwv_fast.score(data, **arguments)
    assert vanished.table.equals(miwv_fast.load_scores(folder / "undisturbed").table)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*data\.jsonl"):
        miwv_fast.score(data, **arguments)
    with pytest.raises(ValueError, match="give the data that was scored"):
        miwv_fast.load_scores(folder / "vanished").select(1)


@pytest.mark.parametrize("when", [1, 2, 5])
def test_data_that_cannot_be_read_to_their_end(folder, tmp_path, monkeypatch, when):
    """An input/output error while reading: nothing is written, the file is named."""
    real = formats._read_json_lines

    def fail(path, stream):
        for number, row in enumerate(real(path, stream)):
            if number == when:
                raise OSError(5, "Input/output error")
            yield row

    monkeypatch.setattr(formats, "_read_json_lines", fail)
    with pytest.raises(ValueError, match=r"data\.jsonl cannot be read to its end: .*Input/output error"):
        score(folder, f"unreadable-{when}")
    assert not (folder / f"unreadable-{when}").exists()


def test_a_file_as_large_as_files_may_be(folder):
    """RLIMIT_FSIZE of 3 KiB, which any user can set: the run stops, whole; without the limit it goes on."""
    script = f"""
        import resource, signal
        from test_store import Path, score
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3072, resource.RLIM_INFINITY))
        try:
            score(Path({str(folder)!r}), "limited")
        except OSError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert "File too large" in done.stdout, done.stderr
    assert not list((folder / "limited").rglob(".*")), "no temporary file may stay behind"
    score(folder, "limited")
    assert outcome(folder, "limited") == outcome(folder, "undisturbed")


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


def test_other_neighbours_than_the_units_were_scored_with_are_refused(folder):
    """Of an embedder that has changed under its name, in a run whose neighbours were lost."""
    score(folder, "other neighbours")
    (folder / "other neighbours" / "neighbors.parquet").unlink()

    def changed(texts):
        return text_embedder([text[::2] for text in texts])

    changed.__module__, changed.__qualname__ = text_embedder.__module__, text_embedder.__qualname__
    before = np.load(folder / "other neighbours" / "embeddings.npy")
    with pytest.raises(ValueError, match="not those that its units were scored with"):
        score(folder, "other neighbours", embedder=changed)
    assert np.array_equal(np.load(folder / "other neighbours" / "embeddings.npy"), before)
    score(folder, "other neighbours")
    assert outcome(folder, "other neighbours") == outcome(folder, "undisturbed")


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


@pytest.mark.parametrize(
    "option, value",
    [
        ("neighbors", 2),
        ("max_length", 200),
        ("share_prefix", False),
        ("batch_tokens", 301),
        ("dtype", "bfloat16"),
        ("include_eos", True),
    ],
)
def test_what_can_change_a_score_makes_another_run(folder, option, value):
    """Rounding included: what runs together decides the last bits."""
    if not (folder / "options").exists():
        score(folder, "options")
    with pytest.raises(ValueError, match=f"  {option}: "):
        score(folder, "options", **{option: value})


def test_another_machine_makes_another_run(folder, monkeypatch):
    """Other packages, other room for what is shared, other kernels."""
    score(folder, "machine")
    with monkeypatch.context() as patch:
        patch.setattr("miwv_fast.engine.package_versions", lambda names: dict.fromkeys(names, "0.1"))
        patch.setattr(Runner, "cache_tokens", lambda self: 777)
        with pytest.raises(
            ValueError, match=r"(?s)  cache_tokens: \d+ there, 777 now.*  versions\.torch: .*\"0\.1\" now"
        ):
            score(folder, "machine")
    with monkeypatch.context() as patch:
        build = ops.build_info()
        patch.setattr(ops, "build_info", lambda: build | {"onednn": not build["onednn"]})
        with pytest.raises(ValueError, match=r"  kernels: .*, onednn"):
            score(folder, "machine")
    others = set(_core.available_isas()) - {_core.isa()}
    if not others:
        pytest.skip("this machine has one instruction set")
    chosen = _core.isa()
    _core.select_isa(others.pop())
    try:
        with pytest.raises(ValueError, match="  kernels: "):
            score(folder, "machine")
    finally:
        _core.select_isa(chosen)


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


def test_a_call_that_failed_leaves_nothing_of_its_data(folder):
    own, (a, b) = byte_level(), (ROWS[:8], ROWS[8:16])
    model = (tiny_model("llama", len(own)), own)
    with pytest.raises(ValueError, match="the embedder should give"):
        miwv_fast.score(a, model, output=folder / "other data", embedder=lambda texts: np.ones((1, 3)))
    scores = miwv_fast.score(b, model, output=folder / "other data", embedder=text_embedder)
    selected = scores.select(2)
    assert miwv_fast.load_scores(folder / "other data").select(2) == selected and selected[0] in b


@pytest.mark.parametrize("kind", ["stream", "hub"])
def test_a_data_set_is_known_by_its_texts(folder, monkeypatch, kind):
    """Neither a stream nor a name says what is in it."""
    datasets = pytest.importorskip("datasets")
    own, rows = byte_level(), [dict(row) for row in ROWS[:6]]
    model = (tiny_model("llama", len(own)), own)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.Dataset.from_list(rows))

    def data():
        made = list(map(dict, rows))
        return "some/data" if kind == "hub" else datasets.IterableDataset.from_generator(lambda: iter(made))

    miwv_fast.score(data(), model, output=folder / kind, embedder=text_embedder)
    assert len(miwv_fast.load_scores(folder / kind).select(2)) == 2
    rows[3]["output"] += " 42"
    with pytest.raises(ValueError, match=r"  texts: "):
        miwv_fast.score(data(), model, output=folder / kind, embedder=text_embedder)
    if kind == "hub":
        with pytest.raises(ValueError, match="data set some/data is not the data that was scored"):
            miwv_fast.load_scores(folder / kind).select(2)

        def unreachable(name):
            raise ConnectionError("no way")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        assert miwv_fast.load_scores(folder / kind).source is None


def test_a_renamed_template_is_the_same_run(folder, tmp_path):
    for name in ("one.jinja", "two.jinja"):
        (tmp_path / name).write_text(
            "{% set separator = '' %}{% macro prompt(instruction, input) %}{{ instruction }}{{ input }}\n{% endmacro %}"
        )
        scores = score(folder, "renamed", template=tmp_path / name)
    assert scores.stats["resumed_tokens"] == scores.stats["forwarded_tokens"] > 0


def test_fresh_moves_the_old_run_aside(folder):
    score(folder, "fresh", template="plain")
    old = outcome(folder, "fresh")
    score(folder, "fresh", resume=False)
    assert outcome(folder, "fresh") == outcome(folder, "undisturbed")
    assert outcome(folder, "fresh.old-1") == old
    score(folder, "fresh", resume=False)
    assert outcome(folder, "fresh.old-1") == old and outcome(folder, "fresh.old-2") == outcome(folder, "undisturbed")


@pytest.mark.parametrize("place", ["{}", "memory://{}"])
def test_nobody_starts_in_a_run_that_is_being_moved_aside(tmp_path, monkeypatch, place):
    run = place.format(tmp_path / "run")
    with Run(run, {"model": "old"}) as first:
        (first.folder / "parts" / "x").write_bytes(b"")
    moved, move = [], Location.move

    def slow(self, target):
        moved.append(self.name)
        with pytest.raises(ValueError, match="is being written by"):
            Run(run, {"model": "old"})
        move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "move", slow)
        Run(run, {"model": "new"}, resume=False).close()
    assert moved == ["parts", "manifest.json"]
    old = Location(f"{run}.old-1")
    assert (old / "manifest.json").read_json() == {"model": "old"} and (old / "parts").names() == ["x"]
    assert (Location(run) / "manifest.json").read_json() == {"model": "new"}


def test_a_run_is_moved_aside_wherever_it_lies(tmp_path, monkeypatch):
    """Where it is the present folder, or behind a link; what else lies there stays."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/run")
    Run(tmp_path / "disk" / "run", {"model": 0}).close()
    (tmp_path / "disk" / "run" / "mine.jsonl").touch()
    monkeypatch.chdir(tmp_path / "disk" / "run")
    for number, place in enumerate((".", tmp_path / "link"), 1):
        Run(place, {"model": number}, resume=False).close()
        aside = tmp_path / "disk" / f"run.old-{number}"
        assert json.loads((aside / "manifest.json").read_text()) == {"model": number - 1}
        assert [path.name for path in aside.iterdir()] == ["manifest.json"]
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["lock", "manifest.json", "mine.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_a_run_that_cannot_be_moved_aside(tmp_path, monkeypatch):
    Run(tmp_path / "run", {"model": "old"}).close()

    def refuse(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(target))

    monkeypatch.setattr(Location, "move", refuse)
    message = f"cannot move the old run to {tmp_path}/run.old-1: Invalid cross-device link; give another folder"
    with pytest.raises(OSError, match=message):
        Run(tmp_path / "run", {"model": "new"}, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    Run(tmp_path / "run", {"model": "old"}).close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_was_forked_meanwhile_does_not_keep_the_lock(tmp_path):
    with Run(tmp_path / "run", {}):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        Run(tmp_path / "run", {}).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_was_forked_meanwhile_does_not_give_the_lock_back(tmp_path):
    """It leaves the block before the one whose lock it is."""
    with Run(tmp_path / "run", {}) as run:
        child = os.fork()
        if not child:
            run.close()
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(ValueError, match="is being written by"):
            Run(tmp_path / "run", {})


def test_a_signal_stops_the_run_of_the_main_thread_alone():
    """One in another thread does not take it, nor does it, by ending first, make it stop the other at once."""
    begun, ended = threading.Event(), threading.Event()

    def run():
        with stopping.finishing() as came:
            begun.set()
            ended.wait(60)
            return came()

    with ThreadPoolExecutor(2) as pool, stopping._handlers(), stopping.finishing() as came:
        other = pool.submit(run)
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        ended.set()
        assert not other.result(60) and came()
    with ThreadPoolExecutor(1) as pool, stopping._handlers(), stopping.finishing() as came:
        pool.submit(run).result(60)
        os.kill(os.getpid(), signal.SIGINT)
        assert came()


def test_a_handler_of_others_is_left_alone(monkeypatch):
    """Who ignores signals, as behind nohup, goes on; one that is not Python's could not be put back."""
    before, terminate = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    found = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else found(number))
    try:
        with stopping._handlers(), stopping.finishing() as came:
            os.kill(os.getpid(), signal.SIGINT)
            assert not came() and found(signal.SIGTERM) is terminate
    finally:
        signal.signal(signal.SIGINT, before)


def test_workers_run_side_by_side(tmp_path):
    """Four of them, 100 tokens a second each: half of the work took ten seconds and leaves ten."""
    none = np.empty(0, np.int64), np.empty(0, np.float32)
    with Run(tmp_path / "run", {}) as run:
        run.save_plan(8, 8000, 4)
        for unit in range(4):
            run.save_part(unit, UnitResult(none, none, 1000, 0), 10.0)
    told = run_status(tmp_path / "run")
    assert (told["units_done"], told["tokens_per_second"], told["seconds_left"]) == (4, 400, 10)


def test_a_lock_that_cannot_be_given_back(tmp_path, monkeypatch, caplog):
    """What went wrong before is told, not that."""

    release = Lock.release

    def fail(self):
        release(self)
        raise OSError("slow down")

    monkeypatch.setattr(Lock, "release", fail)
    with pytest.raises(ValueError, match="the reason"), Run(tmp_path / "run", {}):
        raise ValueError("the reason")
    assert "cannot be given back: slow down" in caplog.text


def test_two_processes_never_write_one_run(folder):
    process = start(folder, "locked")
    wait_for_parts(folder, "locked", 2, process)
    with pytest.raises(ValueError, match=f"is being written by process {process.pid} on"):
        score(folder, "locked")
    assert run_status(folder / "locked")["written_by"].startswith(f"process {process.pid}")
    process.join()
    assert outcome(folder, "locked") == outcome(folder, "undisturbed")


def test_a_run_that_is_being_written_is_not_moved_aside(folder):
    score(folder, "held")
    held = Lock(Location(folder / "held"))
    with pytest.raises(ValueError, match="is being written by"):
        score(folder, "held", resume=False)
    held.release()
    assert outcome(folder, "held") == outcome(folder, "undisturbed") and not (folder / "held.old-1").exists()


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
