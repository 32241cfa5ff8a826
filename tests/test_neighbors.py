"""The nearest other record against a brute-force reference in float64."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miwv_fast import approximate, exact, neighbors
from miwv_fast.exact import TIE
from miwv_fast.neighbors import nearest
from miwv_fast.progress import Progress

QUIET = Progress(False)


def reference(embeddings: np.ndarray, candidates: np.ndarray, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Every pair in float64; the best, among its ties the lowest index, then the best of the rest, and so on."""
    wide = embeddings.astype(np.float64)
    usable = [i for i in np.flatnonzero(candidates) if np.isfinite(wide[i]).all() and wide[i].any()]
    index, similarity = [[-1] * k for _ in wide], [[np.nan] * k for _ in wide]
    for i in usable:
        cosines = {j: wide[i] @ wide[j] / np.linalg.norm(wide[i]) / np.linalg.norm(wide[j]) for j in usable if j != i}
        for rank in range(min(k, len(cosines))):
            best = max(cosines.values())
            index[i][rank] = min(j for j, cosine in cosines.items() if cosine >= best - TIE)
            similarity[i][rank] = cosines.pop(index[i][rank])
    return index, similarity


@settings(max_examples=200)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 24),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([1, 7, 1 << 26]),
)
def test_matches_brute_force(seed, n, dimensions, k, block):
    """Small integers make many exact duplicates, ties, opposites and zeros; small blocks split the matrix."""
    generator = np.random.default_rng(seed)
    embeddings = generator.integers(-2, 3, (n, dimensions)).astype(np.float32)
    embeddings[generator.random(n) < 0.05] = np.nan
    candidates = generator.random(n) < 0.9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BLOCK_ELEMENTS", block)
        patch.setattr(neighbors, "_BLOCK_ROWS", block)
        found = nearest(embeddings, candidates, k, "cpu", QUIET)
    index, similarity = reference(embeddings, candidates, k)
    assert found.index.tolist() == index
    # The cosine of two float32 unit vectors: one rounding per term and one per vector.
    np.testing.assert_allclose(found.similarity, similarity, atol=(dimensions + 2) * 1.2e-7)


def test_duplicates_never_return_self():
    embeddings = np.array([[1, 0], [3, 4], [3, 4], [3, 4]], np.float32)
    assert nearest(embeddings, np.ones(4, bool), 1, "cpu", QUIET).index[:, 0].tolist() == [1, 2, 1, 1]


def test_no_cosine_is_above_one():
    """Which rounding makes of some whose directions are the same."""
    one = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    found = nearest(np.concatenate([one, 3 * one]), np.ones(100, bool), 1, "cpu", QUIET)
    assert found.index[:, 0].tolist() == [*range(50, 100), *range(50)] and found.similarity.max() <= 1


def test_nothing_but_duplicates():
    found = nearest(np.ones((3, 2), np.float32), np.ones(3, bool), 2, "cpu", QUIET)
    assert found.index.tolist() == [[1, 2], [0, 2], [0, 1]] and (found.similarity == 1).all()
    assert found.recall is None


def test_a_tie_goes_to_the_lowest_index():
    embeddings = np.array([[1, 0], [0, 1], [0, 2], [1, 1]], np.float32)
    assert nearest(embeddings, np.ones(4, bool), 1, "cpu", QUIET).index[:, 0].tolist() == [3, 2, 1, 0]


def test_a_record_without_embedding_has_no_neighbour_and_is_nobodys():
    embeddings = np.array([[0, 0], [1, 0], [np.inf, 0], [1, 1]], np.float32)
    found = nearest(embeddings, np.ones(4, bool), 1, "cpu", QUIET)
    assert found.index[:, 0].tolist() == [-1, 3, -1, 1]
    assert np.isnan(found.similarity[[0, 2]]).all()


@pytest.fixture
def clustered(monkeypatch):
    """3,000 vectors in 100 bundles, some of them twice or without direction, above the limit of exact search."""
    pytest.importorskip("faiss")
    monkeypatch.setitem(neighbors.APPROXIMATE_ABOVE, "cpu", 500)
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((100, 16))
    vectors = centres[generator.integers(100, size=3000)] + 0.3 * generator.standard_normal((3000, 16))
    vectors[generator.integers(3000, size=60)] = vectors[7]
    vectors[[1, 5]] = 0
    return vectors.astype(np.float32)


@pytest.mark.parametrize("k", [1, 3])
def test_approximate_search(clustered, k, caplog):
    """What is found obeys every rule of the exact search; how much is missed is measured, and little."""
    candidates = np.arange(3000) % 10 != 3
    with caplog.at_level("INFO"):
        found = nearest(clustered, candidates, k, "cpu", QUIET)
    assert "recall@1" in caplog.text and found.recall is not None and found.recall >= approximate.RECALL
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(neighbors.APPROXIMATE_ABOVE, "cpu", 3000)
        exact = nearest(clustered, candidates, k, "cpu", QUIET)
    # Two cosines of the same float32 unit vectors, added up in another order.
    same = np.isclose(found.similarity[:, 0], exact.similarity[:, 0], atol=2 * 16 * 1.2e-7, rtol=0, equal_nan=True)
    # The sample is a third of the records: the share among all lies within three of its standard errors.
    assert abs(same.mean() - found.recall) <= 3 * np.sqrt(0.25 / 1000)
    assert (found.index[same, 0] == exact.index[same, 0]).all(), "a tie went to another record than the lowest"
    assert (found.index[~candidates] == -1).all() and (found.index[[1, 5]] == -1).all()
    usable = candidates & clustered.any(axis=1)
    assert usable[found.index[usable]].all() and (found.index != np.arange(3000)[:, None]).all()
    assert all(len(set(row)) == k for row in found.index[usable].tolist())


@pytest.mark.parametrize("k", [1, 5])
def test_approximate_search_in_small_blocks_is_the_same(clustered, k, monkeypatch):
    """However the queries and the groups of a cell are divided, up to the rounding of other products."""
    whole = nearest(clustered, np.ones(3000, bool), k, "cpu", QUIET)
    monkeypatch.setattr(approximate, "_BLOCK_QUERIES", 300)
    monkeypatch.setattr(approximate, "BLOCK_ELEMENTS", 200)
    parts = nearest(clustered, np.ones(3000, bool), k, "cpu", QUIET)
    np.testing.assert_allclose(parts.similarity, whole.similarity, atol=2 * 16 * 1.2e-7, rtol=0)
    assert (parts.index == whole.index).mean() > 0.999 and parts.recall == whole.recall


def test_approximate_search_gives_everybody_k(clustered):
    """Cells with too few records are made up for exactly."""
    lonely = np.concatenate([clustered, 100 * np.eye(16, dtype=np.float32)])
    found = nearest(lonely, np.ones(len(lonely), bool), 40, "cpu", QUIET)
    usable = lonely.any(axis=1)
    assert (found.index[usable] >= 0).all()
    assert (np.diff(found.similarity[usable], axis=1) <= TIE).all()


def test_many_workers_search_more_exactly(clustered):
    """The exact search takes the square of the records, and each of 36 workers a 36th of it."""
    every = np.ones(len(clustered), bool)
    assert nearest(clustered, every, 1, "cpu", QUIET, workers=36).recall is None
    assert nearest(clustered, every, 1, "cpu", QUIET, workers=25).recall is not None


def test_without_an_index_the_search_is_exact(clustered, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    found = nearest(clustered[:800], np.ones(800, bool), 1, "cpu", QUIET)
    assert found.recall is None and "miwv-fast[faiss]" in caplog.text
    assert found.index[:, 0].tolist() == [row[0] for row in reference(clustered[:800], np.ones(800, bool), 1)[0]]
