"""Ranking and what `top` means."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from miwv_fast import ranker
from miwv_fast.ranker import drop_near_duplicates, fill_quotas, proportional, rank, select, selection_size

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


def unit_rows(embeddings) -> np.ndarray:
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    return np.divide(embeddings, norms, out=np.zeros(embeddings.shape), where=np.isfinite(norms) & (norms > 0))


def greedy(order, embeddings, threshold, wanted) -> tuple[list[int], list[tuple[int, int]]]:
    """The rule word for word, in float64: records kept, and those left out with the most similar one kept before."""
    unit = unit_rows(embeddings)
    kept, dropped = [], []
    for record in order:
        if len(kept) == wanted:
            break
        cosines = unit[kept] @ unit[record]
        if len(kept) and cosines.max() >= threshold - 1e-6:
            dropped.append((record, kept[int(cosines.argmax())]))
        else:
            kept.append(record)
    return kept, dropped


@pytest.mark.parametrize("wanted", [1, 40, 3000])
@pytest.mark.parametrize("threshold", [0.5, 0.95, 1.0])
def test_near_duplicates_against_the_rule(threshold, wanted):
    """More records than a block holds, with copies, near copies, a zero and a NaN among them."""
    state = np.random.default_rng(3)
    base = state.normal(size=(900, 16)).astype(np.float32)
    near = base[state.integers(0, 900, 900)] + 0.08 * state.normal(size=(900, 16)).astype(np.float32)
    embeddings = np.concatenate([base, near, 3 * base[state.integers(0, 900, 900)], np.zeros((2, 16), np.float32)])
    embeddings[5] = np.nan
    order = state.permutation(len(embeddings))
    # No cosine but those of copies lies so near to the threshold that float32 could see it on the other side.
    unit = unit_rows(embeddings)
    assert (np.abs(unit @ unit.T - threshold + 1e-6) < 1e-7).sum() == 0
    kept, duplicates = drop_near_duplicates(order, embeddings, threshold, wanted)
    expected, dropped = greedy(order.tolist(), embeddings, threshold, wanted)
    assert kept.tolist() == expected
    assert duplicates.records.tolist() == [record for record, _ in dropped]
    cosines = (unit[duplicates.records] * unit[duplicates.kept]).sum(axis=1)
    best = (unit[duplicates.records] * unit[[other for _, other in dropped]]).sum(axis=1)
    np.testing.assert_allclose(cosines, best, atol=1e-6)  # the most similar, or its equal
    np.testing.assert_allclose(duplicates.similarity, cosines, atol=1e-6)
    assert duplicates.similarity.max(initial=0) <= 1


def test_near_duplicates_in_blocks_of_any_size(monkeypatch):
    """Those that were kept before are compared in many blocks, as they are of more than 16,384."""
    monkeypatch.setattr(ranker, "_BLOCK_ROWS", 16)
    monkeypatch.setattr(ranker, "_BLOCK_COLUMNS", 7)
    state = np.random.default_rng(5)
    base = state.normal(size=(60, 8)).astype(np.float32)
    embeddings = np.concatenate([base, base[state.permutation(60)] + 0.05 * state.normal(size=(60, 8))])
    kept, duplicates = drop_near_duplicates(np.arange(120), embeddings.astype(np.float32), 0.95, 120)
    expected, dropped = greedy(range(120), embeddings.astype(np.float32), 0.95, 120)
    assert kept.tolist() == expected and len(dropped) > 30
    assert list(zip(duplicates.records.tolist(), duplicates.kept.tolist(), strict=True)) == dropped


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
def test_unusable_threshold(threshold):
    with pytest.raises(ValueError, match="near-duplicates lies in"):
        drop_near_duplicates(np.arange(2), np.ones((2, 3), np.float32), threshold, 2)


counts = st.lists(st.integers(0, 10**6), min_size=1, max_size=20).filter(any)


@given(counts, st.integers(0, 10**6))
def test_proportional_shares(counts, wanted):
    shares = proportional(counts, wanted)
    exact = [wanted * count / sum(counts) for count in counts]
    assert sum(shares) == wanted
    assert all(abs(share - value) < 1 + 1e-6 for share, value in zip(shares, exact, strict=True))
    assert all(shares[i] >= shares[j] for i in range(len(counts)) for j in range(len(counts)) if counts[i] > counts[j])


def test_proportional_ties_go_to_the_first():
    assert proportional([1, 1, 1], 1) == [1, 0, 0]
    assert proportional([10, 10, 20], 3) == [1, 1, 1]  # 0.75, 0.75, 1.5


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 30), st.randoms())
def test_quotas_against_the_rule(labels, wanted, random):
    order = list(range(len(labels)))
    random.shuffle(order)
    quotas = proportional([labels.count(group) for group in range(4)], min(wanted, len(labels)))
    left, chosen = list(quotas), set()
    for record in order:
        if left[labels[record]] > 0:
            left[labels[record]] -= 1
            chosen.add(record)
    for record in order:
        if len(chosen) < wanted:
            chosen.add(record)
    got = fill_quotas(np.array(order), np.array(labels), quotas, wanted)
    assert got.tolist() == [record for record in order if record in chosen]


MIWV = np.array([0.1, np.nan, 0.7, 0.3, -0.2], np.float32)
TOKENS = np.array([5, 0, 9, 2, 9], np.int32)


@pytest.mark.parametrize(
    "conditions, expected",
    [
        ({"top": 2}, [2, 3]),
        ({"min_miwv": 0.7}, [2]),  # as float32
        ({"min_miwv": 0.1}, [2, 3, 0]),
        ({"min_miwv": -1}, [2, 3, 0, 4]),
        ({"min_miwv": 0.1, "top": 2}, [2, 3]),
        ({"top": 2, "min_response_tokens": 5}, [2, 0]),
        ({"top": 2, "dedup": 0.9, "embeddings": np.array([[1, 0], [0, 0], [0, 1], [0.01, 1], [1, 1]], float)}, [2, 0]),
        ({"top": 2, "groups": np.array([0, 0, 1, 1, 0])}, [2, 0]),
        # Those without near-duplicates are looked for as far down the ranking as the quotas reach.
        ({"top": 2, "groups": np.array([0, 0, 1, 1, 0]), "dedup": 0.9, "embeddings": np.eye(5)}, [2, 0]),
        # What the first group cannot fill goes to the best of the others.
        ({"top": 3, "groups": np.array([0, 0, 1, 1, 0]), "min_miwv": 0.2}, [2, 3]),
        ({"top": 3, "groups": np.array([0, 0, 1, 1, 0]), "min_miwv": 0.05}, [2, 3, 0]),
    ],
)
def test_select(conditions, expected):
    assert select(MIWV, TOKENS, **conditions).records.tolist() == expected


@pytest.mark.parametrize(
    "conditions, error, message",
    [
        ({}, ValueError, "nothing says how many"),
        ({"min_miwv": 0.1, "groups": np.zeros(5, int)}, ValueError, "give top as well"),
        ({"min_miwv": 0.8}, ValueError, "no record is left by min_miwv 0.8: the highest is 0.7"),
        ({"min_miwv": 1e39}, ValueError, "no record is left by min_miwv inf"),  # beyond float32
        ({"min_miwv": float("nan")}, ValueError, "min_miwv should be a number, it is nan"),
        ({"top": 1, "min_response_tokens": -3}, ValueError, "min_response_tokens should be at least 0, it is -3"),
        ({"min_miwv": "much"}, TypeError, "should be a number"),
        ({"top": 1, "min_response_tokens": 10}, ValueError, "min_response_tokens 10: the highest is 9"),
        ({"top": 1, "min_response_tokens": 2.5}, TypeError, "whole number"),
        ({"top": 1, "dedup": 0.9}, ValueError, "needs the embeddings"),
        ({"top": 1, "dedup": "0.9", "embeddings": np.eye(5)}, TypeError, "dedup should be a number, it is '0.9'"),
        ({"top": 6}, ValueError, "cannot select 6 of 5"),
    ],
)
def test_conditions_that_cannot_be_met(conditions, error, message):
    with pytest.raises(error, match=message):
        select(MIWV, TOKENS, **conditions)


def test_nothing_to_select_from():
    nothing = np.full(3, np.nan, np.float32)
    for conditions in ({"top": 2, "groups": np.zeros(3, int)}, {"min_miwv": 0.0}):
        with pytest.raises(ValueError, match="no record has a score"):
            select(nothing, np.zeros(3, np.int32), **conditions)
