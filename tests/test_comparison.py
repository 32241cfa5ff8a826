"""Two runs side by side: agreement, what moved, and runs that cannot be compared."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr

import miwv_fast
from miwv_fast.comparison import show_comparison, spearman
from miwv_fast.scores import Scores
from miwv_fast.sources import open_source
from support import random_scores


def with_miwv(table: pa.Table, miwv: list[float | None]) -> Scores:
    return Scores(table.set_column(table.schema.get_field_index("miwv"), "miwv", pa.array(miwv, pa.float32())))


@given(
    st.integers(2, 30).flatmap(
        lambda n: st.tuples(*[arrays(np.float64, n, elements=st.integers(-5, 5).map(float)) for _ in range(2)])
    )
)
def test_rank_correlation_is_that_of_scipy(pair):
    """Few distinct values, so that ties are the rule."""
    x, y = pair
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert np.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_the_same_run_agrees_with_itself():
    scores = Scores(random_scores(200, rejected=10))
    same = miwv_fast.compare(scores, scores)
    assert same.records == 190 and same.spearman == pytest.approx(1)
    assert same.overlap == {"1%": 1, "5%": 1, "10%": 1}
    assert same.moved["rank_a"].equals(same.moved["rank_b"]) and len(same.moved) == 190


def test_what_moved_most_comes_first():
    table = random_scores(100)
    a = with_miwv(table, [float(100 - i) for i in range(100)])
    # Record 99, the worst, becomes the best, and all others move down one place.
    b = with_miwv(table, [float(100 - i) for i in range(99)] + [1000.0])
    told = miwv_fast.compare(a, b)
    assert told.moved.slice(0, 1).to_pylist() == [
        {"index": 99, "rank_a": 100, "rank_b": 1, "miwv_a": 1.0, "miwv_b": 1000.0}
    ]
    assert told.moved["index"].to_pylist()[1:] == list(range(99))
    assert told.overlap == {"1%": 0, "5%": 0.8, "10%": 0.9}


def test_only_records_scored_in_both_are_ranked():
    table = random_scores(5)
    a, b = with_miwv(table, [5, None, 3, 2, 1]), with_miwv(table, [1, 2, 3, None, 5])
    told = miwv_fast.compare(a, b)
    assert told.records == 3 and told.spearman == pytest.approx(-1)
    assert told.moved.to_pydict()["index"] == [0, 4, 2]
    with pytest.raises(ValueError, match="0 records have a score in both"):
        miwv_fast.compare(a, with_miwv(table, [None] * 5))


@pytest.mark.parametrize(
    "other, message",
    [
        (Scores(random_scores(9)), "10 records and 9"),
        (Scores(random_scores(10), {"data": {"files": [{"path": "a", "sha256": "2"}]}}), "SHA-256 of what was scored"),
        (Scores(random_scores(10).set_column(1, "id", pa.array(["x"] * 10))), "ids differ"),
    ],
)
def test_runs_of_different_data_are_refused(other, message):
    scores = Scores(random_scores(10), {"data": {"files": [{"path": "a", "sha256": "1"}]}})
    with pytest.raises(ValueError, match=message):
        miwv_fast.compare(scores, other)


def test_the_name_of_a_run_is_not_its_scores():
    with pytest.raises(TypeError, match="this is 'run'; load_scores reads them"):
        miwv_fast.compare(Scores(random_scores(10)), "run")


def test_the_same_data_may_have_moved():
    manifests = [{"data": {"files": [{"path": path, "sha256": "1"}]}} for path in ("a", "b")]
    a, b = (Scores(random_scores(10), manifest) for manifest in manifests)
    assert miwv_fast.compare(a, b).records == 10


def test_the_same_texts_may_lie_in_other_files():
    manifests = [{"texts": "1", "data": {"files": [{"path": path, "sha256": path}]}} for path in ("a.csv", "b.json")]
    a, b = (Scores(random_scores(10), manifest) for manifest in manifests)
    assert miwv_fast.compare(a, b).records == 10
    with pytest.raises(ValueError, match="the texts that were scored differ"):
        miwv_fast.compare(a, Scores(random_scores(10), {"texts": "2"}))


def test_what_is_printed(capsys, caplog):
    rows = [{"instruction": f"[bold]\x1b[31mred {number} " + "word " * 99, "output": "b"} for number in range(20)]
    table = random_scores(20)
    a, b = with_miwv(table, list(map(float, range(20)))), with_miwv(table, [*map(float, range(19)), -1.0])
    show_comparison(miwv_fast.compare(a, b), Scores(a.table, {}, open_source(rows)))
    printed = capsys.readouterr().out
    assert printed.startswith("20 records scored in both, rank correlation +0.714 (Spearman)\ntop 1%: 0 % in common\n")
    row = next(line for line in printed.splitlines() if "\ufffd[31mred 19 word" in line)
    assert [cell.strip() for cell in row.split("│")][1:6] == ["19", "1", "20", "+19.000", "-1.000"]
    assert "\x1b" not in printed and "[bold]" in row and max(map(len, printed.splitlines())) <= 120
    show_comparison(miwv_fast.compare(a, b), a)
    assert "+19.000" in capsys.readouterr().out
    show_comparison(miwv_fast.compare(a, b), Scores(a.table, {"texts": "1"}, open_source(rows)))
    assert "+19.000" in capsys.readouterr().out and "no texts are shown" in caplog.text
    show_comparison(miwv_fast.compare(a, a), a)
    assert capsys.readouterr().out.endswith("no record has another rank\n")
