"""The nearest other record against a brute-force reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import text_embedder
from miwv_fast import neighbors
from miwv_fast.neighbors import TIE, embed, nearest
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
        patch.setattr(neighbors, "_BLOCK_ELEMENTS", block)
        found = nearest(embeddings, candidates, k, "cpu", QUIET)
    index, similarity = reference(embeddings, candidates, k)
    assert found.index.tolist() == index
    # The cosine of two float32 unit vectors: one rounding per term and one per vector.
    np.testing.assert_allclose(found.similarity, similarity, atol=(dimensions + 2) * 1.2e-7)


def test_duplicates_never_return_self():
    embeddings = np.array([[1, 0], [3, 4], [3, 4], [3, 4]], np.float32)
    assert nearest(embeddings, np.ones(4, bool), 1, "cpu", QUIET).index[:, 0].tolist() == [1, 2, 1, 1]


def test_a_tie_goes_to_the_lowest_index():
    embeddings = np.array([[1, 0], [0, 1], [0, 2], [1, 1]], np.float32)
    assert nearest(embeddings, np.ones(4, bool), 1, "cpu", QUIET).index[:, 0].tolist() == [3, 2, 1, 0]


def test_a_record_without_embedding_has_no_neighbour_and_is_nobodys():
    embeddings = np.array([[0, 0], [1, 0], [np.inf, 0], [1, 1]], np.float32)
    found = nearest(embeddings, np.ones(4, bool), 1, "cpu", QUIET)
    assert found.index[:, 0].tolist() == [-1, 3, -1, 1]
    assert np.isnan(found.similarity[[0, 2]]).all()


def test_embed_callable_sees_each_text_once_and_only_wanted_ones():
    seen: list[str] = []

    def spy(texts):
        seen.extend(texts)
        return text_embedder(texts)

    embeddings = embed(["a", "b", "a", "c"], np.array([True, True, True, False]), spy, "cpu", QUIET)
    assert sorted(seen) == ["a", "b"]
    assert embeddings[0].tobytes() == embeddings[2].tobytes() and not embeddings[3].any()


def test_embed_array():
    array = np.eye(3)
    wanted = np.ones(3, bool)
    for given_as in (array, torch.eye(3, dtype=torch.bfloat16)):
        np.testing.assert_array_equal(embed(["a"] * 3, wanted, given_as, "cpu", QUIET), np.eye(3, dtype=np.float32))
    for wrong in (np.eye(4), np.ones(3), np.ones((3, 2), np.int64)):
        with pytest.raises(ValueError, match=r"expected \[3, D\]"):
            embed(["a"] * 3, wanted, wrong, "cpu", QUIET)


def test_embedder_errors():
    with pytest.raises(ValueError, match=r"\[2, D\] for 2 texts"):
        embed(["a", "b"], np.ones(2, bool), lambda texts: np.ones(3), "cpu", QUIET)
    with pytest.raises(ValueError, match="cannot load the embedder 'no/such-embedder'"):
        embed(["a", "b"], np.ones(2, bool), "no/such-embedder", "cpu", QUIET)


def test_real_embedder(minilm):
    texts = ["Name three fruits.", "Solve 3 + 4.", "List some fruits, please.", "What is 5 + 9?"]
    embeddings = embed(texts, np.ones(4, bool), str(minilm), "cpu", QUIET)
    assert embeddings.shape == (4, 384) and embeddings.dtype == np.float32
    assert nearest(embeddings, np.ones(4, bool), 1, "cpu", QUIET).index[:, 0].tolist() == [2, 3, 0, 1]
