"""The table, ranking, selection, and the way to disk and back."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import miwv_fast
from miwv_fast.scores import SCHEMA, Scores
from support import text_embedder
from test_scorer import make_rows


@pytest.fixture(scope="module")
def rows():
    made = make_rows("alpaca", 12)
    made[3]["output"] = ""
    return made


@pytest.fixture(scope="module")
def scored(rows, llama):
    return miwv_fast.score(rows, llama, embedder=text_embedder)


def test_types(scored):
    assert scored.table.schema.equals(SCHEMA)
    assert not any(np.isnan(scored.table["miwv"].drop_null().to_numpy()))
    assert "12 records: 11 ok, 1 empty_response" in repr(scored)


def test_rank_and_select(scored, rows):
    ranking = scored.rank()
    miwv = scored.table["miwv"].to_pylist()
    assert ranking.dtype == np.int64 and sorted(ranking) == list(range(12)) and ranking[-1] == 3
    assert all(miwv[a] >= miwv[b] for a, b in pairwise(ranking[:-1]))
    assert scored.select("25%") == [rows[i] for i in ranking[:3]]
    assert scored.select(2) == [rows[i] for i in ranking[:2]]


def test_fewer_scored_than_asked_for(scored, caplog):
    assert len(scored.select("100%")) == 11
    assert "only 11 have a score" in caplog.text


def test_nothing_scored_is_nothing_to_select(scored):
    table = scored.table.set_column(2, "miwv", pa.nulls(len(scored), pa.float32()))
    for conditions in ({"top": "1%"}, {"min_miwv": 0.0}, {"top": 1, "dedup": 0.9}):
        with pytest.raises(ValueError, match="no record has a score; the column status says why"):
            dataclasses.replace(scored, table=table).choose(**conditions)


def test_select_by_conditions(scored, rows):
    table = scored.table.to_pydict()
    ranking = [i for i in scored.rank().tolist() if i != 3]
    third = table["miwv"][ranking[2]]
    assert scored.select(min_miwv=third) == [rows[i] for i in ranking[:3]]
    least = sorted(table["response_tokens"][i] for i in ranking)[-4]
    long = [i for i in ranking if table["response_tokens"][i] >= least]
    assert scored.select(2, min_response_tokens=least) == [rows[i] for i in long[:2]]
    chosen = scored.choose(11, dedup=0.9)
    left_out = chosen.duplicates.records.tolist()
    assert left_out and sorted(chosen.records.tolist() + left_out) == sorted(ranking)
    assert scored.select(11, dedup=0.9) == [rows[i] for i in chosen.records]
    kept = scored.embeddings[chosen.records]
    unit = kept / np.linalg.norm(kept, axis=1, keepdims=True)
    assert np.triu(unit @ unit.T, 1).max() < 0.9  # of those that are kept no two are alike


def test_quotas_by_a_field(scored, rows):
    """Eleven scored records: seven "a", three "b", one without the field; a share of four is 2.5, 1.1 and 0.4."""
    field = ["a", "b", "a", "a", None, "a", "b", "a", "a", "b", "a", "a"]
    data = [dict(row, kind=kind) if kind else row for row, kind in zip(rows, field, strict=True)]
    chosen = scored.choose(4, data, per="kind").records.tolist()
    assert sorted(str(field[i]) for i in chosen) == ["a", "a", "a", "b"]
    ranking = scored.rank().tolist()
    assert chosen == sorted(chosen, key=ranking.index)
    for kind, count in (("a", 3), ("b", 1)):
        assert [i for i in chosen if field[i] == kind] == [i for i in ranking if field[i] == kind][:count]
    with pytest.raises(ValueError, match="no record has a field 'sort'; there are instruction, input, output, kind"):
        scored.select(4, data, per="sort")


def test_data_that_can_be_read_once(scored, rows, tmp_path):
    """A generator is read once, whatever it is needed for."""
    assert scored.select(4, iter(rows), per="input") == scored.select(4, rows, per="input")
    pytest.importorskip("bokeh")
    scored.report(tmp_path / "r.html", data=iter(rows))


@pytest.mark.parametrize("name", ["embeddings.npy", "manifest.json"])
def test_a_run_of_which_a_file_cannot_be_read(rows, llama, tmp_path, monkeypatch, caplog, name):
    """What needs it not goes on; neighbours are not computed again for want of a moment's patience."""
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = miwv_fast.score(data, llama, embedder=text_embedder, output=run)
    open_file = open

    def refuse(path, *arguments, **options):
        if Path(str(path)).name == name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open_file(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    loaded = miwv_fast.load_scores(run)
    assert loaded.select(3) == scores.select(3) and loaded.embeddings is None
    assert f"Input/output error: '{run / name}'" in caplog.text
    with pytest.raises(OSError, match="Input/output error"):
        miwv_fast.score(data, llama, embedder=text_embedder, output=run)


def test_embeddings_of_a_run(rows, llama, scored, tmp_path, caplog):
    run = tmp_path / "run"
    again = miwv_fast.score(rows, llama, embedder=text_embedder, output=run)
    expected = scored.select(5, dedup=0.9)
    assert again.select(5, dedup=0.9) == miwv_fast.load_scores(run).select(5, dedup=0.9) == expected
    scored.save(tmp_path / "alone" / "s.parquet")
    with pytest.raises(ValueError, match="these scores were saved elsewhere"):
        miwv_fast.load_scores(tmp_path / "alone" / "s.parquet", rows).select(5, dedup=0.9)
    np.save(run / "embeddings.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="3 embeddings for 12 records"):
        miwv_fast.load_scores(run).select(5, dedup=0.9)
    np.save(run / "embeddings.npy", np.ones_like(again.embeddings))
    with pytest.raises(ValueError, match=r"embeddings\.npy is damaged or of another run"):
        miwv_fast.load_scores(run).select(5, dedup=0.9)
    (run / "embeddings.npy").write_bytes(b"")
    assert miwv_fast.load_scores(run).select(5) == scored.select(5)
    assert "embeddings.npy cannot be read" in caplog.text
    for damage in (lambda path: None, Path.unlink):
        damage(run / "embeddings.npy")
        miwv_fast.score(rows, llama, embedder=text_embedder, output=run)
        assert "embeddings.npy is not there or damaged: computed again" in caplog.text
        assert miwv_fast.load_scores(run).select(5, dedup=0.9) == expected
        caplog.clear()


def test_a_finished_run_of_what_has_moved_keeps_its_records_and_embeddings(rows, llama, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = miwv_fast.score(data, llama, embedder=text_embedder, output=run)
    manifest = (run / "manifest.json").read_bytes()
    data = data.rename(tmp_path / "moved.jsonl")
    again = miwv_fast.score(data, llama, embedder=text_embedder, output=run)
    assert again.stats["resumed_tokens"] == first.stats["forwarded_tokens"]
    assert miwv_fast.load_scores(run).select(3, dedup=0.9) == again.select(3, dedup=0.9)
    assert json.loads((run / "manifest.json").read_text())["data"]["files"][0]["path"] == str(data)
    (run / "manifest.json").write_bytes(manifest)  # as runs were left before
    assert miwv_fast.load_scores(run).select(3, dedup=0.9) == again.select(3, dedup=0.9)


def test_scores_are_equal_to_themselves(scored):
    assert scored == scored and len({scored}) == 1


def test_save_and_load(scored, rows, tmp_path):
    scored.save(tmp_path / "s.parquet")
    loaded = miwv_fast.load_scores(tmp_path / "s.parquet")
    assert loaded.table.equals(scored.table) and loaded.manifest == scored.manifest
    with pytest.raises(ValueError, match="do not hold their records"):
        loaded.select(1)
    assert loaded.select(1, data=rows) == scored.select(1)
    assert miwv_fast.load_scores(tmp_path / "s.parquet", rows).select(1) == scored.select(1)
    with pytest.raises(ValueError, match="has 11 records, the scores are of 12"):
        loaded.select(1, data=rows[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]


def test_run_folder(rows, llama, scored, tmp_path, caplog):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    of_file = miwv_fast.score(data, llama, embedder=text_embedder, output=tmp_path / "run")
    assert f"{data}:13: not JSON" in caplog.text
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert rejected == [{"index": 12, "location": f"{data}:13", "reason": rejected[0]["reason"], "row": "broken"}]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["template"]["name"] == "alpaca" and manifest["data"]["files"][0]["path"] == str(data)
    loaded = miwv_fast.load_scores(tmp_path / "run")
    assert loaded.table.equals(of_file.table) and loaded.select(3) == of_file.select(3) == scored.select(3)
    data.write_text(data.read_text() + "\n")
    assert miwv_fast.load_scores(tmp_path / "run").select(3) == scored.select(3)
    changed = [*rows[:4], rows[4] | {"output": "another"}, *rows[5:]]
    data.write_text("".join(json.dumps(row) + "\n" for row in changed) + "broken\n")
    with pytest.raises(ValueError, match=r"data\.jsonl is not the data that was scored: its texts differ"):
        of_file.select(3)
    with pytest.raises(ValueError, match="its texts differ"):
        miwv_fast.load_scores(tmp_path / "run").select(3)
    data.unlink()
    with pytest.raises(ValueError, match=r"file .*data\.jsonl is not there any more; give the data .* \(--data\)"):
        miwv_fast.load_scores(tmp_path / "run").select(3)


def test_run_of_an_iterable_keeps_the_records(rows, llama, scored, tmp_path):
    miwv_fast.score(iter(rows), llama, embedder=text_embedder, output=tmp_path / "run")
    assert miwv_fast.load_scores(tmp_path / "run").select(2) == scored.select(2)


def test_what_lies_beside_scores_is_not_theirs(rows, llama, tmp_path):
    """Only a run's own folder has its records and embeddings."""
    for name, data in (("train", rows), ("data", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    scores = miwv_fast.score(tmp_path / "train.jsonl", llama, embedder=text_embedder)
    scores.save(tmp_path / "scores.parquet")
    np.save(tmp_path / "embeddings.npy", np.ones((12, 2), np.float32))
    loaded = miwv_fast.load_scores(tmp_path / "scores.parquet")
    assert loaded.select(3) == scores.select(3) and loaded.embeddings is None
    with pytest.raises(ValueError, match=r"data\.jsonl is not the data that was scored"):
        loaded.select(3, tmp_path / "data.jsonl")
    scores = miwv_fast.score(rows, llama, embedder=text_embedder)
    scores.save(tmp_path / "scores.parquet")
    assert miwv_fast.load_scores(tmp_path / "scores.parquet").source is None


def test_records_that_do_not_exist(scored):
    for number in (-1, 12):
        with pytest.raises(ValueError, match="there are records 0 to 11"):
            scored.rows([3, number])
    assert scored.rows([]) == []


def test_a_malformed_row_may_become_text_in_a_run(rows, llama, tmp_path):
    """JSON knows no dates: what a list held as one comes back from the run's own copy as text."""
    data = [*rows, {"instruction": "When?", "output": datetime.date(2026, 1, 1)}]
    scores = miwv_fast.score(data, llama, embedder=text_embedder, output=tmp_path / "run")
    assert scores.counts()["malformed"] == 1
    assert miwv_fast.load_scores(tmp_path / "run").select(3) == scores.select(3)


def test_a_path_that_is_not_utf8(scored, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/na\xffme.parquet")
    scored.save(path)
    assert miwv_fast.load_scores(path).table.equals(scored.table)


def test_unusable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no scores at"):
        miwv_fast.load_scores(tmp_path)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(FileNotFoundError, match="is not finished"):
        miwv_fast.load_scores(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "s.parquet").write_text("nothing")
    with pytest.raises(ValueError, match="not a Parquet file"):
        miwv_fast.load_scores(tmp_path / "s.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "s.parquet")
    with pytest.raises(ValueError, match="its columns are a"):
        miwv_fast.load_scores(tmp_path / "s.parquet")


def test_nothing_scored():
    table = SCHEMA.empty_table()
    assert len(Scores(table).rank()) == 0
