"""The command line as a user meets it: a process, its exit status, one clear line, never a traceback."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest

import miwv_fast
from miwv_fast import cli
from miwv_fast.cli import main
from miwv_fast.terminal import Messages
from support import byte_level, tiny_model
from test_scorer import make_rows


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model, data, and embeddings, so that a command needs nothing else."""
    folder = tmp_path_factory.mktemp("cli")
    own = byte_level()
    tiny_model("llama", len(own)).save_pretrained(folder / "model")
    own.save_pretrained(folder / "model")
    rows = make_rows("alpaca", 10)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(folder / "embeddings.npy", np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32))
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from miwv_fast.cli import main; main()", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


def call(monkeypatch, capfd, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """The same in this process: exit status, standard output, standard error."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["miwv-fast", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), *capfd.readouterr()


SCORE = ("score", "data.jsonl", "--model", "model", "--embedder", "embeddings.npy", "--output")


def test_a_run_in_which_nothing_got_a_score(workplace, monkeypatch, capfd):
    """It says so, and nothing is selected from it over a file that is there."""
    np.save(workplace / "zeros.npy", np.zeros((10, 4), np.float32))
    options = "score", "data.jsonl", "--model", "model", "--embedder", "zeros.npy", "--output", "unscored"
    status, out, _ = call(monkeypatch, capfd, workplace, *options)
    assert status == 0 and "in which no record has a score" in out and "next:" not in out
    (workplace / "subset.jsonl").write_text("kept")
    for conditions in ("--top", "1%"), ("--min-miwv", "0"):
        status, _, err = call(
            monkeypatch, capfd, workplace, "select", "unscored", *conditions, "--output", "subset.jsonl"
        )
        assert status != 0 and "no record has a score" in err and "Traceback" not in err
    assert (workplace / "subset.jsonl").read_text() == "kept"


def test_info_of_a_model(workplace):
    done = run(workplace, "info", "--model", "model")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["model"]
    assert told["head"] == "direct" and told["shares_prefixes"] and told["logit_softcap"] is None
    done = run(workplace, "info", "--model", "missing/model/folder")
    assert done.returncode == 2 and "no such model folder" in done.stderr and "Traceback" not in done.stderr


def test_score_and_select(workplace):
    done = run(workplace, *SCORE, "run")
    assert done.returncode == 0, done.stderr
    assert "10 records: 10 ok" in done.stdout and done.stderr == ""
    done = run(workplace, "select", "run", "--top", "20%", "--output", "subset.jsonl")
    assert done.returncode == 0 and "wrote 2 of 10 records" in done.stdout
    table = pq.read_table(workplace / "run" / "scores.parquet")
    best = np.argsort(-table["miwv"].to_numpy())[:2]
    rows = [json.loads(line) for line in (workplace / "data.jsonl").read_text().splitlines()]
    chosen = [json.loads(line) for line in (workplace / "subset.jsonl").read_text().splitlines()]
    assert chosen == [rows[i] for i in best]


def test_records_on_standard_output(workplace, monkeypatch, capfd):
    """Nothing but records goes there, behind what a file that it was appended to held."""
    if not (workplace / "run").exists():
        assert call(monkeypatch, capfd, workplace, *SCORE, "run")[0] == 0
    options = "select", "run", "--top", "5", "--dedup", "0.5", "--format", "jsonl", "--output", "/dev/stdout"
    os.write(1, b'{"precious": 1}\n')  # pytest has a file there
    status, out, err = call(monkeypatch, capfd, workplace, *options)
    assert status == 0 and "near-duplicates of" in err and "wrote 5 of 10 records to /dev/stdout" in err
    first, *rows = map(json.loads, out.splitlines())
    assert first == {"precious": 1} and len(rows) == 5
    status, out, err = call(monkeypatch, capfd, workplace, "report", "run", "--output", "/dev/stdout")
    assert status == 0 and out.startswith("<!doctype html>") and err == "wrote /dev/stdout\n"
    status, _, err = call(monkeypatch, capfd, workplace, *options, "--trainer", "trl")
    assert status == 2 and "trl reads files: give one instead of /dev/stdout" in err


def test_select_for_a_trainer(workplace, monkeypatch, capfd):
    if not (workplace / "run").exists():
        assert call(monkeypatch, capfd, workplace, *SCORE, "run")[0] == 0
    options = ("--top", "5", "--dedup", "0.5", "--min-response-tokens", "2", "--per", "input")
    status, out, _ = call(
        monkeypatch, capfd, workplace, "select", "run", *options, "--output", "lf/s.jsonl", "--trainer", "llama-factory"
    )
    assert status == 0 and "near-duplicates of better records" in out and "next: llamafactory-cli train" in out
    assert len((workplace / "lf" / "s.jsonl").read_text().splitlines()) == 5
    assert (workplace / "lf" / "dataset_info.json").exists()
    status, out, _ = call(monkeypatch, capfd, workplace, "explain", "run", "0")
    assert status == 0 and out.startswith("record 0, demonstration ")


def test_report_and_compare(workplace, monkeypatch, capfd):
    if not (workplace / "run").exists():
        assert call(monkeypatch, capfd, workplace, *SCORE, "run")[0] == 0
    status, out, _ = call(monkeypatch, capfd, workplace, "report", "run", "--top", "3")
    assert status == 0 and out.startswith("wrote report.html, 1.")
    status, _, error = call(monkeypatch, capfd, workplace, "report", "run", "--field", "topic")
    assert status == 2 and "no record has a field 'topic'" in error
    assert call(monkeypatch, capfd, workplace, *SCORE, "plain", "--template", "plain")[0] == 0
    status, out, _ = call(monkeypatch, capfd, workplace, "compare", "run", "plain")
    assert status == 0 and out.startswith("10 records scored in both, rank correlation ")
    first = json.loads((workplace / "data.jsonl").read_text().splitlines()[0])["instruction"]
    assert "top 10%: " in out and " ".join(first.split())[:10] in out
    (workplace / "other.jsonl").write_text((workplace / "data.jsonl").read_text() + "broken\n")
    np.save(workplace / "eleven.npy", np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32))
    others = ("score", "other.jsonl", "--model", "model", "--embedder", "eleven.npy", "--output", "other")
    assert call(monkeypatch, capfd, workplace, *others)[0] == 0
    status, _, error = call(monkeypatch, capfd, workplace, "compare", "run", "other")
    assert status == 2 and "these runs are of different data: 10 records and 11" in error


def test_status_resume_and_fresh(workplace, monkeypatch, capfd):
    """Of a run that another process has finished."""
    first = run(workplace, *SCORE, "again")
    assert first.returncode == 0, first.stderr
    status, out, _ = call(monkeypatch, capfd, workplace, "status", "again")
    assert status == 0 and out.startswith("finished: ") and "0 records rejected" in out
    before = (workplace / "again" / "scores.parquet").read_bytes()
    assert call(monkeypatch, capfd, workplace, *SCORE, "again")[0] == 0
    assert (workplace / "again" / "scores.parquet").read_bytes() == before
    status, _, error = call(monkeypatch, capfd, workplace, *SCORE, "again", "--template", "plain")
    assert status == 2 and "template.name" in error and "Traceback" not in error
    fresh = run(workplace, *SCORE, "again", "--template", "plain", "--fresh")
    assert fresh.returncode == 0 and f"moved the old run to {workplace}/again.old-1" in fresh.stderr
    status, _, error = call(monkeypatch, capfd, workplace, "status", "nowhere")
    assert status == 2 and "no run at nowhere" in error


def test_a_malformed_line_is_named_and_the_rest_is_scored(workplace):
    text = (workplace / "data.jsonl").read_text().splitlines()
    text[4] = '{"instruction": "a"'
    text[7] = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    text[8] = json.dumps({"instruction": "a", "output": 3})
    (workplace / "mixed.jsonl").write_text("\n".join(text))
    done = run(workplace, "score", "mixed.jsonl", *SCORE[2:], "mixed")
    assert done.returncode == 0, done.stderr
    assert "mixed.jsonl:5: not JSON" in done.stderr and "mixed.jsonl:9: 'output' should be text" in done.stderr
    assert "10 records: 8 ok, 2 malformed" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("score", "none.jsonl", *SCORE[2:], "x"), "no such file: none.jsonl"),
        (("score", "empty.jsonl", *SCORE[2:], "x"), "empty.jsonl has no records"),
        (("score", "one.jsonl", *SCORE[2:-3], "--embedder", "one.npy", "--output", "x"), "at least two records"),
        (
            ("score", "wrong.jsonl", *SCORE[2:], "x"),
            "no readable record; wrong.jsonl:1: its fields name no known shape",
        ),
        ((*SCORE, "x", "--template", "alpacca"), "unknown template 'alpacca'"),
        ((*SCORE, "x", "--template", "none.jinja"), "no such template file"),
        ((*SCORE, "x", "--max-length", "999999"), "1024 positions"),
        ((*SCORE, "x", "--batch-tokens", "0"), "batch_tokens should be at least 1"),
        ((*SCORE, "x", "--device", "tpu9"), "unknown device 'tpu9'"),
        ((*SCORE, "x", "--device", "mps"), "device 'mps': the kernels run on cpu and cuda"),
        ((*SCORE, "x", "--dtype", "int3"), "unknown dtype 'int3'"),
        ((*SCORE, "x", "--model", "damaged"), "cannot load the model 'damaged'"),
        ((*SCORE, "x", "--model", "small"), "but the model knows 100: do they belong together?"),
        ((*SCORE, "x", "--embedder", "empty.npy"), "empty.npy is not an array that numpy.save wrote"),
        ((*SCORE, "x", "--embedder", "zip.npy"), "zip.npy is not an array that numpy.save wrote"),
        ((*SCORE, "x", "--embedder", "several.npy"), "several.npy holds several arrays"),
        ((*SCORE, "x", "--embedder", "one.npy"), "expected [10, D]"),
        ((*SCORE, "x", "--embedder", "none.npy"), "no such embedding file"),
        ((*SCORE, "x", "--model", "empty"), "cannot load the model 'empty'"),
        ((*SCORE, "x", "--model", "nowhere"), "cannot load the model 'nowhere'"),
        ((*SCORE, "x", "--model", ""), "a model or tokenizer has the empty text for its name"),
        ((*SCORE, "x", "--embedder", ""), "the embedder has the empty text for its name"),
        (("score", "pipe.jsonl", *SCORE[2:], "x"), "pipe.jsonl is no file but a pipe or device"),
        (("score", "s3://bucket/a.jsonl", *SCORE[2:], "x"), "copy s3://bucket/a.jsonl here first"),
        ((*SCORE, "data.jsonl"), "data.jsonl is a file"),
        (("select", "run", "--output", "s.jsonl", "--top", "0"), "cannot select top 0"),
        (("select", "run", "--output", "s.jsonl", "--top", "-3"), "cannot select top -3"),
        (("select", "run", "--output", "s.jsonl", "--top", "abc"), "cannot select top 'abc'"),
        (("select", "run", "--output", "s.jsonl", "--top", "11"), "cannot select 11 of 10 records"),
        (("select", "none", "--output", "s.jsonl"), "no scores at none"),
        (("select", "run", "--output", "s.csv"), "cannot tell the format from the name of s.csv"),
        (("select", "run", "--output", "s", "--format", "csv"), "unknown format 'csv'"),
        (("select", "run", "--output", "s.jsonl", "--per", "source"), "no record has a field 'source'"),
        (("select", "run", "--output", "s.jsonl", "--dedup", "7"), "near-duplicates lies in (0, 1]"),
        (("select", "run", "--output", "s.jsonl", "--min-miwv", "99"), "no record is left by min_miwv 99"),
        (("select", "run", "--output", "s.jsonl", "--min-miwv", "-9", "--per", "input"), "give top as well"),
        (("select", "run", "--output", "s.jsonl", "--min-response-tokens", "99999"), "min_response_tokens 99999"),
        (("select", "run", "--output", "s.jsonl", "--trainer", "axolotl"), "unknown trainer 'axolotl'"),
        (("select", "run", "--output", "s", "--trainer", "trl"), "trl reads files"),
        (("select", "run", "--output", "data.jsonl"), "data.jsonl is the data that was scored, and would be lost"),
        (("select", "run", "--output", "run/scores.parquet"), "run/scores.parquet belongs to the run in"),
        (("select", "alone.parquet", "--data", "data.jsonl", "--output", "alone.parquet"), "holds the scores"),
        (("report", "run", "-o", "data.jsonl"), "data.jsonl is the data that was scored, and would be lost"),
        (("report", "run", "-o", "run/embeddings.npy"), "run/embeddings.npy belongs to the run in"),
        (("demo", "--output", "run"), "run holds a run, whose scores would be lost"),
        (("explain", "run", "10"), "no record 10"),
        (("status", "odd"), "manifest.json or plan.json is damaged"),
        (("score", "data.jsonl"), "Missing option"),
        (("frobnicate",), "No such command"),
    ],
)
def test_what_a_user_can_get_wrong(workplace, monkeypatch, capfd, arguments, message):
    (workplace / "empty.jsonl").touch()
    (workplace / "one.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}))
    (workplace / "wrong.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    np.save(workplace / "one.npy", np.ones((1, 4), np.float32))
    (workplace / "empty").mkdir(exist_ok=True)
    (workplace / "odd").mkdir(exist_ok=True)
    (workplace / "odd" / "manifest.json").write_text("[]")
    (workplace / "empty.npy").touch()
    (workplace / "zip.npy").write_bytes(b"PK\x03\x04" + bytes(40))
    with (workplace / "several.npy").open("wb") as stream:
        np.savez(stream, a=np.ones(3), b=np.ones(3))
    if not (workplace / "small").exists():
        tiny_model("llama", 100).save_pretrained(workplace / "small")
        byte_level().save_pretrained(workplace / "small")
        shutil.copytree(workplace / "model", workplace / "damaged")
        (workplace / "damaged" / "model.safetensors").write_bytes(b"\x08")
    if not (workplace / "pipe.jsonl").exists():
        os.mkfifo(workplace / "pipe.jsonl")
    if not (workplace / "run").exists():
        assert call(monkeypatch, capfd, workplace, *SCORE, "run")[0] == 0
    if not (workplace / "alone.parquet").exists():
        shutil.copy(workplace / "run" / "scores.parquet", workplace / "alone.parquet")
    status, _, error = call(monkeypatch, capfd, workplace, *arguments)
    assert status == 2
    assert message in error
    assert "Traceback" not in error and not (workplace / "x").exists()


def test_what_standard_output_cannot_encode(workplace, monkeypatch, capfd):
    """A command that has done its work does not fail in what it says of it."""
    if not (workplace / "run").exists():
        assert call(monkeypatch, capfd, workplace, *SCORE, "run")[0] == 0
    for encoding, name, told in (("utf-8", "s\udcff.jsonl", rb"s\udcff.jsonl"), ("ascii", "s.jsonl", rb"\u")):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            assert call(patch, capfd, workplace, "select", "run", "--top", "2", "--output", name)[0] == 0
            assert call(patch, capfd, workplace, "explain", "run", "0")[0] == 0
        out.seek(0)
        assert told in out.buffer.read()


def test_messages_go_where_standard_error_is_at_the_moment(monkeypatch):
    """Such as a progress bar, which they would otherwise overwrite; control characters of data do nothing there."""
    handler = Messages()
    for stream in io.StringIO(), io.StringIO():
        monkeypatch.setattr(sys, "stderr", stream)
        handler.handle(logging.makeLogRecord({"msg": "line\nred \x1b[31m"}))
        assert stream.getvalue() == "line\nred \ufffd[31m\n"
    monkeypatch.setattr(sys, "stderr", None)
    handler.handle(logging.makeLogRecord({"msg": "nobody reads it"}))


@pytest.mark.parametrize(
    ("error", "message"),
    [(MemoryError(), "out of memory"), (OSError(), "OSError"), (ValueError("a\x1b[2J\nb"), "a\ufffd[2J\nb")],
)
def test_an_error_says_something_and_does_nothing(monkeypatch, capfd, tmp_path, error, message):
    monkeypatch.setattr(cli, "app", Mock(side_effect=error))
    assert call(monkeypatch, capfd, tmp_path) == (2, "", f"miwv-fast: error: {message}\n")


def test_reasons_of_a_run_do_nothing(monkeypatch, capfd, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "rejected.jsonl").write_text(json.dumps({"reason": "a\x1b[2J"}))
    assert "  1: a\ufffd[2J\n" in call(monkeypatch, capfd, tmp_path, "status", ".")[1]


def test_no_traceback_from_the_process(workplace):
    done = run(workplace, *SCORE, "y", "--template", "alpacca")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "miwv-fast: error: unknown template 'alpacca'; known are alpaca, plain, chat, or a .jinja file"
    ]


def test_as_a_module(workplace):
    done = subprocess.run([sys.executable, "-m", "miwv_fast", "--version"], capture_output=True, text=True)
    assert done.stdout == f"miwv-fast {miwv_fast.__version__}\n"


def test_help_and_info(workplace):
    done = run(workplace, "--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("demo", "score", "select", "info"))
    done = run(workplace, "score", "--help")
    assert done.returncode == 0 and "Example: miwv-fast score" in done.stdout
    assert run(workplace, "--version").stdout == f"miwv-fast {miwv_fast.__version__}\n"
    done = run(workplace, "info")
    assert done.returncode == 0 and "torch" in json.loads(done.stdout)["packages"]


@pytest.mark.parametrize("count", [10, pytest.param(120, marks=pytest.mark.long)])
def test_demo(smollm2, minilm, tmp_path, monkeypatch, capfd, count):
    """120 records are all that are packaged."""
    lines = (files("miwv_fast") / "demo_records.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "demo_records.jsonl").write_text("\n".join(lines[:count]), encoding="utf-8")
    monkeypatch.setattr("miwv_fast.demo.files", lambda package: tmp_path)
    status, out, error = call(monkeypatch, capfd, tmp_path, "demo")
    assert status == 0, error
    table = pq.read_table(tmp_path / "miwv-demo" / "scores.parquet")
    assert len(lines) == 120 and table.num_rows == count and set(table["status"].to_pylist()) == {"ok"}
    assert len((tmp_path / "miwv-demo" / "selected.jsonl").read_text().splitlines()) == count // 10
    assert "it/s" not in error  # no bars of other libraries
    assert "best and worst" in out and "miwv-demo/selected.jsonl" in out
    best = max(table.to_pylist(), key=lambda row: row["miwv"])
    numbers = f"{best['miwv']:+.3f}", f"{best['nll_one_shot']:.3f}", f"{best['nll_zero_shot']:.3f}"
    assert all(text in out for text in ("rank", "one-shot", *numbers))


def test_import_costs_what_torch_costs():
    """A tool that only wants `ops` pays for torch and nothing else."""
    code = "import sys, torch; before = set(sys.modules); import miwv_fast; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"transformers", "sentence_transformers", "pyarrow", "jinja2", "typer", "rich", "datasets"}
