"""What a notebook does with scores: HTML, plots, data frames, data sets."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import pytest

from miwv_fast.notebook import bin_count
from miwv_fast.scores import SCHEMA, Scores
from support import random_scores


@pytest.fixture
def scores():
    return Scores(random_scores(40, rejected=2))


def test_html_summary(scores):
    html = scores._repr_html_()
    assert "<b>40 records</b>: 38 ok, 2 empty_response" in html
    assert html.count("<tr>") == 1 + 10
    best = scores.table.slice(int(scores.rank()[0]), 1).to_pylist()[0]
    assert f"<td>1</td><td>{best['index']}</td><td>{best['id']}</td><td>{best['miwv']:+.3f}</td>" in html


def test_html_summary_escapes_ids(scores):
    ids = pa.array(["<script>alert(1)</script>"] * 40)
    html = Scores(scores.table.set_column(1, "id", ids))._repr_html_()
    assert "<script" not in html and "&lt;script&gt;" in html


@pytest.mark.parametrize("table", [SCHEMA.empty_table(), random_scores(3, rejected=3), random_scores(2)])
def test_html_summary_of_little(table):
    assert f"{len(table)} records" in Scores(table)._repr_html_()


def test_to_pandas(scores):
    frame = scores.to_pandas()
    assert list(frame.columns) == SCHEMA.names and len(frame) == 40
    assert frame["miwv"].dtype == np.float32 and frame["miwv"].isna().sum() == 2
    assert str(frame["neighbor"].dtype) == "Int64" and frame["neighbor"].isna().sum() == 2
    assert frame["index"].tolist() == list(range(40))


def test_to_dataset(scores):
    dataset = scores.to_dataset()
    assert dataset.column_names == SCHEMA.names and dataset[3] == scores.table.slice(3, 1).to_pylist()[0]
    assert dataset[39]["miwv"] is None


@pytest.fixture
def pyplot(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    yield pyplot
    pyplot.close("all")


def test_plot(scores, pyplot):
    histogram, losses = scores.plot("25%")
    assert sum(bar.get_height() for bar in histogram.patches) == 38
    assert "10 of 40 records" in histogram.get_title()
    offsets = [len(collection.get_offsets()) for collection in losses.collections]
    assert offsets == [28, 10]
    histogram.figure.canvas.draw()


@pytest.mark.parametrize("count", [1, 2])
def test_plot_of_little(count, pyplot):
    Scores(random_scores(count)).plot(1)[0].figure.canvas.draw()


def test_nothing_to_plot(pyplot):
    with pytest.raises(ValueError, match="no record has a score"):
        Scores(random_scores(2, rejected=2)).plot()


def test_bins():
    assert bin_count(np.zeros(100)) == 1
    # An outlier beyond a middle half of almost no width.
    assert bin_count(np.concatenate([np.linspace(0, 1e-12, 99), [1.0]])) == 120
    # By hand: the middle half is 0.5 wide, so 2 * 0.5 / 1000**(1/3) = 0.1 a bin.
    assert bin_count(np.linspace(0, 1, 1000)) == 10


@pytest.mark.parametrize("package, use", [("pandas", "to_pandas"), ("datasets", "to_dataset"), ("matplotlib", "plot")])
def test_a_missing_package_is_named(scores, monkeypatch, package, use):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'miwv-fast\["):
        getattr(scores, use)()
