"""Ranking and what `top` means."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from miwv_fast.ranker import rank, selection_size

floats = st.floats(width=32, allow_nan=True, allow_infinity=False)


@given(arrays(np.float32, st.integers(0, 30), elements=floats))
def test_highest_first_ties_by_index_nan_last(miwv):
    keys = [(np.isnan(value), -value if value == value else 0, place) for place, value in enumerate(miwv.tolist())]
    assert rank(miwv).tolist() == [place for _, _, place in sorted(keys)]


@pytest.mark.parametrize(
    "top, records, expected",
    [
        ("1%", 52002, 520),
        ("5 %", 52002, 2600),
        (0.01, 52002, 520),
        ("0.01", 52002, 520),
        (0.29, 100, 29),
        ("100%", 7, 7),
        (1.0, 7, 7),
        (1, 7, 1),
        ("1", 7, 1),
        ("1%", 7, 1),
        (7, 7, 7),
        (np.int64(3), 7, 3),
    ],
)
def test_size(top, records, expected):
    assert selection_size(top, records) == expected


@pytest.mark.parametrize(
    "top, error",
    [
        *((top, ValueError) for top in (0, -1, 8, 0.0, 1.5, float("nan"))),
        *((top, ValueError) for top in ("0", "-5", "abc", "0%", "200%", "nan%", "")),
        *((top, TypeError) for top in (None, True, [1])),
    ],
)
def test_unusable_size(top, error):
    with pytest.raises(error, match="cannot select"):
        selection_size(top, 7)
