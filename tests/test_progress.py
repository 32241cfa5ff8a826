"""What somebody who watches is shown."""

from __future__ import annotations

import sys

import pytest

import miwv_fast
from miwv_fast.comparison import compare, show_comparison
from miwv_fast.demo import _show_extremes
from miwv_fast.progress import Progress, Tally
from miwv_fast.terminal import is_terminal
from support import text_embedder
from test_scorer import make_rows


def test_tally():
    tally = Tally(1200, 3000)
    assert tally.add(10) == "1 of 1,200 units, 10 of 3,000 records"  # from an earlier run: nobody's rate
    assert tally.add(10, 500, 2.0, "a") == "2 of 1,200 units, 20 of 3,000 records"
    assert tally.add(0, 500, 0.25, "b").endswith(
        "3 of 1,200 units, 20 of 3,000 records; 2 workers, 250 to 2,000 tokens/s each"
    )
    assert tally.add(0, 1500, 2.0, "a").endswith("2 workers, 500 to 2,000 tokens/s each")


def test_a_run_that_is_watched(llama, capsys):
    miwv_fast.score(make_rows("alpaca", 12), llama, embedder=text_embedder, progress=True)
    shown = capsys.readouterr()
    assert not shown.out
    for expected in (
        "embedding",
        "neighbours",
        "scoring",
        "records",
        "tokens",
        "left",
        "1 of 1 units, 12 of 12 records",
    ):
        assert expected in shown.err


@pytest.mark.parametrize("stream", [None, object()])
def test_a_host_without_terminals(llama, monkeypatch, stream):
    """Whatever it has in the place of the streams, if anything."""
    assert not is_terminal(stream)
    monkeypatch.setattr(sys, "stderr", stream)
    Progress()
    if stream is None:
        monkeypatch.setattr(sys, "stdout", None)
        scores = miwv_fast.score(make_rows("alpaca", 4), llama, embedder=text_embedder, progress=True)
        show_comparison(compare(scores, scores), scores)
        _show_extremes(scores, 2)


def test_nobody_watches(llama, capsys):
    miwv_fast.score(make_rows("alpaca", 12), llama, embedder=text_embedder)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="progress should be True, False or 'auto'"):
        Progress("always")
