"""Embeddings: each distinct text once, in bounded lists, equal texts to the byte."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import miwv_fast
from miwv_fast import embedding
from miwv_fast.embedding import check_embedder, embed, open_embedder
from miwv_fast.neighbors import nearest
from miwv_fast.progress import Progress
from support import text_embedder

QUIET = Progress(False)


def column(*texts: str | None, chunks: int = 1) -> pa.ChunkedArray:
    arrays = [pa.array(part.tolist(), pa.large_string()) for part in np.array_split(np.array(texts, object), chunks)]
    return pa.chunked_array(arrays, pa.large_string())


@given(st.lists(st.none() | st.text("ab\n\0é", max_size=3), min_size=1), st.integers(1, 4), st.integers(1, 5))
def test_every_text_gets_its_own_embedding(texts, chunks, calls):
    """Whatever the chunks of the column and of the calls; each distinct text is seen once."""
    seen: list[str] = []

    def spy(some):
        assert 0 < len(some) <= calls
        seen.extend(some)
        return text_embedder(some)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "CALL_TEXTS", calls)
        embeddings = embed(column(*texts, chunks=chunks), spy, "cpu", QUIET)
    assert sorted(seen) == sorted({text for text in texts if text is not None})
    assert [len(text.encode()) for text in seen] == sorted((len(text.encode()) for text in seen), reverse=True)
    for row, text in zip(embeddings, texts, strict=True):
        expected = np.zeros(64, np.float32) if text is None else text_embedder([text])[0]
        np.testing.assert_array_equal(row, expected if seen else [0])


def test_equal_texts_are_equal_to_the_byte():
    """An embedder that answers at random is asked once."""
    generator = np.random.default_rng(0)
    embeddings = embed(column("a", "b", "a", None), lambda texts: generator.random((len(texts), 5)), "cpu", QUIET)
    assert embeddings[0].tobytes() == embeddings[2].tobytes() != embeddings[1].tobytes()
    assert embeddings.dtype == np.float32 and not embeddings[3].any()


def test_array():
    array = np.eye(3)
    for given_as in (array, torch.eye(3, dtype=torch.bfloat16)):
        np.testing.assert_array_equal(embed(column("a", "a", "a"), given_as, "cpu", QUIET), np.eye(3, dtype=np.float32))
    whole = np.ones((3, 2), np.int64)
    for wrong in (np.eye(4), np.ones(3), np.ones((3, 0)), whole, torch.from_numpy(whole)):
        with pytest.raises(ValueError, match=r"expected \[3, D\]"):
            embed(column("a", "a", "a"), wrong, "cpu", QUIET)


def test_errors(monkeypatch):
    for wrong in (lambda texts: np.ones(3), lambda texts: np.ones((3, 2)), lambda texts: np.ones((2, 0))):
        with pytest.raises(ValueError, match=r"\[2, D\] for 2 texts"):
            embed(column("a", "b"), wrong, "cpu", QUIET)
    monkeypatch.setattr(embedding, "CALL_TEXTS", 1)
    with pytest.raises(ValueError, match=r"\[1, 3\] for 1 texts, got \[1, 2\]"):
        embed(column("aaa", "bb"), lambda texts: np.ones((1, len(texts[0]))), "cpu", QUIET)
    with pytest.raises(ValueError, match="cannot load the embedder 'no/such-embedder'"):
        embed(column("a", "b"), "no/such-embedder", "cpu", QUIET)


def test_real_embedder(minilm):
    from sentence_transformers import SentenceTransformer

    texts = ["Name three fruits.", "Solve 3 + 4.", "List some fruits, please.", "What is 5 + 9?"]
    embeddings = embed(column(*texts), str(minilm), "cpu", QUIET)
    assert embeddings.shape == (4, 384) and embeddings.dtype == np.float32
    assert nearest(embeddings, np.ones(4, bool), 1, "cpu", QUIET).index[:, 0].tolist() == [2, 3, 0, 1]
    loaded = open_embedder(SentenceTransformer(str(minilm), device="cpu"))
    np.testing.assert_array_equal(embed(column(*texts), loaded, "cpu", QUIET), embeddings)


def test_a_named_embedder_is_looked_for_before_the_model_is_loaded(monkeypatch):
    """Whoever has no hub learns it at once, not behind the weights of a large model."""
    monkeypatch.setattr("miwv_fast.scorer.LocalEngine", lambda *_: pytest.fail("the model was loaded"))
    rows = [{"prompt": "a", "response": "b"}] * 2
    with pytest.raises(ValueError, match="cannot load the embedder 'no/such-embedder'"):
        miwv_fast.score(rows, "no/such-model", embedder="no/such-embedder")


@pytest.mark.parametrize("given_as", [np.ones((3, 2)), torch.ones(2, 0), np.ones((2, 2), int)])
def test_an_array_is_looked_at_before_the_model_is_loaded(monkeypatch, given_as):
    monkeypatch.setattr("miwv_fast.scorer.LocalEngine", lambda *_: pytest.fail("the model was loaded"))
    rows = [{"prompt": "a", "response": "b"}] * 2
    with pytest.raises(ValueError, match=r"expected \[2, D\]"):
        miwv_fast.score(rows, "no/such-model", embedder=given_as)


def test_a_file_of_an_array_is_mapped(tmp_path, llama):
    rows = [{"prompt": prompt, "response": "b"} for prompt in "abc"]
    array = np.array([[1, 0], [1, 1], [0, 1]], np.float32)
    np.save(tmp_path / "e.npy", array)
    opened = open_embedder(str(tmp_path / "e.npy"))
    assert isinstance(opened, np.memmap) and not opened.flags.writeable
    scores = miwv_fast.score(rows, llama, embedder=tmp_path / "e.npy")
    expected = miwv_fast.score(rows, llama, embedder=array)
    assert scores.table.equals(expected.table) and scores.manifest == expected.manifest


@pytest.mark.parametrize("wrong", [None, 5, [[0.0, 1.0], [1.0, 0.0]]])
def test_what_is_no_embedder(llama, wrong):
    with pytest.raises(TypeError, match=f"embedder should be .*; it is {type(wrong).__name__}"):
        miwv_fast.score([{"prompt": "a", "response": "b"}] * 2, llama, embedder=wrong)


def test_check_embedder_lets_pass_what_is_there(minilm):
    for there in (str(minilm), minilm, text_embedder, np.ones((2, 3))):
        check_embedder(there)
