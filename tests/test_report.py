"""The report as a file: what is in it, how large it is, and that data stays data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import miwv_fast
from miwv_fast.formats import Row
from miwv_fast.report_records import MAX_GROUPS, FieldFinder, describe_record, page_json, take_within
from miwv_fast.scores import Scores
from miwv_fast.sources import open_source
from support import random_scores, text_embedder
from test_scorer import make_rows

pytest.importorskip("bokeh")


class Page(HTMLParser):
    """A report, taken apart as a browser would."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(path.read_text(encoding="utf-8"))
        self.data: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data

    def column(self, name: str) -> np.ndarray:
        packed = self.data["columns"][name]
        return np.frombuffer(base64.b64decode(packed["base64"]), "<" + packed["type"])


def make_scores(rows: list[dict[str, Any]], rejected: int = 0) -> Scores:
    return Scores(random_scores(len(rows), rejected), {}, open_source(rows))


def test_numbers_stand_in_rank_order(tmp_path):
    scores = make_scores(make_rows("alpaca", 50), rejected=4)
    scores.report(tmp_path / "r.html", top=7)
    page = Page(tmp_path / "r.html")
    ranking = scores.rank()[:46]
    assert page.column("record").tolist() == ranking.tolist()
    columns = {"miwv": "miwv", "one": "nll_one_shot", "zero": "nll_zero_shot", "tokens": "response_tokens"}
    for name, column in {**columns, "neighbor": "neighbor", "similarity": "similarity"}.items():
        assert page.column(name).tolist() == scores.table[column].take(ranking).to_pylist()
    assert (page.data["records"], page.data["scored"], page.data["selected"]) == (50, 46, 7)
    assert [row["record"] for row in page.data["rejected"]] == [46, 47, 48, 49]


def test_texts_are_those_of_the_records(tmp_path):
    rows = make_rows("alpaca", 12)
    rows[3] = {"instruction": "a", "output": 7}
    make_scores(rows).report(tmp_path / "r.html")
    texts = Page(tmp_path / "r.html").data["texts"]
    prompt = f"{rows[1]['instruction']}\n{rows[1]['input']}"
    assert len(texts) == 12 and texts["1"]["turns"] == [[prompt, rows[1]["output"]]]
    assert "'output' should be text" in texts["3"]["reason"] and json.loads(texts["3"]["raw"]) == rows[3]


@pytest.mark.parametrize("shape", ["prompt", "messages", "conversations"])
def test_all_shapes(tmp_path, shape):
    rows = make_rows(shape, 6)
    make_scores(rows).report(tmp_path / "r.html")
    turns = Page(tmp_path / "r.html").data["texts"]["5"]["turns"]
    assert len(turns) == (1 if shape == "prompt" else 3)


def test_a_page_of_its_own(tmp_path):
    """No element names another file, and no script runs but those whose hash the policy names."""
    make_scores(make_rows("alpaca", 9)).report(tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert not [(tag, attrs) for tag, attrs in page.tags if {"src", "srcset", "data"} & set(attrs) or tag == "link"]
    assert [attrs["href"] for _, attrs in page.tags if "href" in attrs] == ["#records"]
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none';")
    for script in page.scripts[1:]:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert len(page.scripts) == 3


HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>&lt;img src=x onerror=alert(1)>",
    "a\u2028b\u2029c\u0000d",
    "\u202egnitirw ,مرحبا",
    "'\"`${alert(1)}\\",
)


def test_hostile_text_stays_data(tmp_path):
    rows = [
        {"id": text, "instruction": text, "input": "", "output": text, "source": f"{text}{n % 2}"}
        for n, text in enumerate(HOSTILE * 2)
    ]
    rows[0]["output"] = "\udc80 is no character"
    make_scores(rows).report(tmp_path / "r.html", field="source")
    clean = tmp_path / "clean.html"
    make_scores(make_rows("alpaca", len(rows))).report(clean)
    page = Page(tmp_path / "r.html")
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert [tag for tag, _ in page.tags if tag in ("img", "iframe", "object")] == []
    assert page.scripts[1:] == Page(clean).scripts[1:]
    for number in range(1, len(rows)):
        assert page.data["texts"][str(number)]["turns"] == [[rows[number]["instruction"], rows[number]["output"]]]
    assert set(page.data["field"]["values"]) == {row["source"] for row in rows}


@given(st.text(st.characters(exclude_categories=[]), max_size=40))
def test_json_for_a_page(text):
    written = page_json({"a": text})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written.encode(errors="backslashreplace").decode()) == {"a": text}


def test_size_is_bounded(tmp_path):
    """Long texts, in letters of three bytes and in characters that are written as six, at the size of Alpaca."""
    state = np.random.default_rng(0)
    long = ["界" * 3000, "<" * 3000, "a" * 70_000]
    rows = [
        {"instruction": long[n % 3], "output": long[n % 3], "source": f"s{n % 7}"} for n in state.permutation(52_002)
    ]
    make_scores(rows, rejected=2000).report(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 10e6
    page = Page(tmp_path / "r.html")
    assert len(page.column("record")) == 50_002 and len(page.data["rejected"]) == 300
    assert len(page.data["texts"]) > 100
    # The best and the worst have theirs, before others get any.
    assert {str(n) for n in page.column("record")[[0, 1, -1, -2]]} <= set(page.data["texts"])


def test_a_part_of_very_large_data_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("miwv_fast.report._DRAWN", 100)
    monkeypatch.setattr("miwv_fast.report.EXTREMES", 10)
    scores = make_scores([{"instruction": "a", "output": "b", "source": f"{n % 3}"} for n in range(1000)])
    scores.report(tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    rank = page.column("rank")
    assert set(rank) == {*range(10), *range(0, 1000, 10), *range(990, 1000)}
    assert page.column("record").tolist() == scores.rank()[rank].tolist()
    assert len(base64.b64decode(page.data["field"]["codes"]["base64"])) == 1000
    assert "118 of 1,000 scored records are drawn" in (tmp_path / "r.html").read_text()


def test_without_the_data(tmp_path, caplog):
    Scores(random_scores(20)).report(tmp_path / "r.html")
    assert "the scored data was not found" in caplog.text
    page = Page(tmp_path / "r.html")
    assert page.data["texts"] == {} and page.data["field"] is None and len(page.column("record")) == 20
    rows = make_rows("alpaca", 20)
    Scores(random_scores(20)).report(tmp_path / "r.html", data=rows)
    assert len(Page(tmp_path / "r.html").data["texts"]) == 20


def test_equal_scores(tmp_path):
    scores = Scores(random_scores(30))
    for column in ("miwv", "nll_one_shot", "nll_zero_shot", "similarity"):
        place = scores.table.schema.get_field_index(column)
        scores = Scores(scores.table.set_column(place, column, pa.array([0.5] * 30, pa.float32())))
    scores.report(tmp_path / "r.html")
    assert Page(tmp_path / "r.html").column("record").tolist() == list(range(30))


@pytest.mark.parametrize("count, options", [(1, {}), (2, {}), (3, {"top": 1.0})])
def test_few_records(tmp_path, count, options):
    make_scores(make_rows("alpaca", count)).report(tmp_path / "r.html", **options)
    assert len(Page(tmp_path / "r.html").column("record")) == count


def test_what_cannot_be_reported(tmp_path, monkeypatch):
    rows = make_rows("alpaca", 5)
    out = tmp_path / "r.html"
    with pytest.raises(ValueError, match="no record has a score"):
        make_scores(rows, rejected=5).report(out)
    with pytest.raises(ValueError, match="no record has a field 'topic'; there are: instruction, input, output"):
        make_scores(rows).report(out, field="topic")
    with pytest.raises(ValueError, match="has 4 records, the scores are of 5: other data"):
        make_scores(rows).report(out, data=rows[1:])
    with pytest.raises(ValueError, match="data was not found"):
        Scores(random_scores(5)).report(out, field="topic")
    with pytest.raises(ValueError, match="cannot select top 0"):
        make_scores(rows).report(out, top=0)
    with pytest.raises(ValueError, match="no manifest"):
        make_scores(rows).report(out, model="m")
    for module in [name for name in sys.modules if name == "miwv_fast.report_figures" or name.startswith("bokeh")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(ValueError, match=r"needs the package bokeh: pip install 'miwv-fast\[report\]'"):
        make_scores(rows).report(out)
    assert not out.exists()


def test_explanations_are_those_of_explain(tmp_path, llama):
    rows = make_rows("messages", 8)
    scores = miwv_fast.score(rows, llama, embedder=text_embedder, template="plain")
    scores.report(tmp_path / "r.html", model=llama)
    page = Page(tmp_path / "r.html")
    assert len(page.data["explanations"]) == 8
    for number, told in page.data["explanations"].items():
        response = "".join(response for _, response in page.data["texts"][number]["turns"])
        assert "".join(told["tokens"]) == response
        mean = np.mean(np.array(told["one"]) - np.array(told["zero"]))
        # Losses are written with three digits, so that each may be off by half of the last one.
        assert mean == pytest.approx(scores.table["miwv"][int(number)].as_py(), abs=1e-3 + 2e-5)


def finder(rows: list[object], name: str | None = None) -> FieldFinder:
    made = FieldFinder(name)
    for row in rows:
        made.add(row)
    return made


def test_a_field_is_found_by_its_values():
    rows: list[object] = [
        {
            "instruction": "i",
            "id": "a",
            "n": n,
            "free": f"text {n}",
            "long": "x" * 61,
            "split": "train",
            "topic": "tm"[n % 2],
        }
        for n in range(40)
    ]
    found = finder(rows).result()
    assert found is not None and found.name == "topic" and found.values == ["t", "m"]
    assert found.codes.tolist() == [n % 2 for n in range(40)]


@pytest.mark.parametrize("field, other", [("source", "zeta"), ("category", "aaa"), ("zeta", None)])
def test_likely_names_come_first(field, other):
    rows: list[object] = [{other or "instruction": "pq"[n % 2], field: "uv"[n // 2 % 2]} for n in range(8)]
    found = finder(rows).result()
    assert found is not None and found.name == field


def test_records_without_the_field_are_a_group():
    found = finder([{"source": "a"}, "no record", {}, {"source": "b"}, {"source": "b"}, {"source": None}] * 2).result()
    assert found is not None and found.values == ["b", "a", "(none)"]
    assert found.codes.tolist() == [1, 2, 2, 0, 0, 2] * 2


def test_fields_that_vary_take_no_room_for_each_other():
    """Memory grows with the values that there are, not with records times names."""
    made = finder([{"source": "ab"[n % 2], f"note {n}": "x"} for n in range(1000)])
    assert sum(map(len, made._codes.values())) == 2000
    found = made.result()
    assert found is not None and found.codes.tolist() == [0, 1] * 500


def test_a_rare_field_is_not_found():
    assert finder([{"source": "ab"[n % 2]} if n < 9 else {} for n in range(20)]).result() is None


def test_a_named_field_may_hold_anything():
    found = finder([{"n": n % 50 if n < 100 else 0} for n in range(150)], "n").result()
    assert found is not None and len(found.values) == MAX_GROUPS
    assert found.values[0] == "0" and found.values[-1] == "21 other values"
    assert np.bincount(found.codes).tolist() == [52] + [2] * 28 + [42]


def test_texts_within_a_budget():
    described = {n: {"raw": "é" * 10} for n in range(4)}
    # {"0":{"raw":"éééééééééé"}} is 16 bytes and 20 of text.
    assert list(take_within([[0], [1], [2]], described, 2 * 36)) == ["0", "1"]
    assert list(take_within([[0, 1], [1, 2], [3]], described, 10_000)) == ["0", "1", "2", "3"]
    assert take_within([[0]], described, 5) == {}


def test_long_records_are_cut_and_say_so():
    turns = [{"role": role, "content": role[0] * 5000} for _ in range(9) for role in ("user", "assistant")]
    told = describe_record(Row("here", {"messages": turns}))
    assert told["turns"][0][0] == "u" * 2000 + "… (5,000 characters)"
    assert told["turns"][-1] == ["… 8 more turns", ""]
    assert re.search("a list of messages", describe_record(Row("here", {"messages": 3}))["reason"])
