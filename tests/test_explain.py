"""The loss of each response token: its mean is the score, its texts are the response."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import miwv_fast
from miwv_fast.explain import _added_texts, explain_run, show
from miwv_fast.head import AllLogits
from miwv_fast.model import CausalLM
from miwv_fast.tokens import SegmentEncoder
from support import TOKENIZERS, byte_level, text_embedder, tiny_model
from test_scorer import make_rows, pairs


def check(scores, rows, model, **options):
    """Means are sums in another order, of losses that a batch rounds differently: a few float32 units of the loss."""
    table = scores.table.to_pydict()
    for i, row in enumerate(rows):
        told = miwv_fast.explain(row, rows[table["neighbor"][i]], model, **options)
        assert len(told.tokens) == len(told.one_shot) == table["response_tokens"][i]
        assert told.difference.dtype == told.one_shot.dtype == told.zero_shot.dtype == np.float32
        bound = 2e-5 * max(1, table["nll_one_shot"][i], table["nll_zero_shot"][i])
        assert told.one_shot.mean() == pytest.approx(table["nll_one_shot"][i], abs=bound)
        assert told.zero_shot.mean() == pytest.approx(table["nll_zero_shot"][i], abs=bound)
        assert told.difference.mean() == pytest.approx(table["miwv"][i], abs=bound)
        yield row, told


@pytest.mark.parametrize("shape", ["alpaca", "prompt", "messages", "sharegpt"])
def test_the_mean_is_the_score_and_the_texts_are_the_response(shape, tokenizer):
    model = tiny_model("llama", len(tokenizer)), tokenizer
    rows = make_rows(shape, 8)
    scores = miwv_fast.score(rows, model, embedder=text_embedder)
    for row, told in check(scores, rows, CausalLM(*model, "tiny")):
        assert "".join(told.tokens) == "".join(response for _, _, response in pairs(row))


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_options(llama, template):
    """The end-of-turn token has a text too; a cut response is cut in both passes."""
    rows = make_rows("messages", 6)
    options = {"template": template, "include_eos": True, "max_length": 300}
    scores = miwv_fast.score(rows, llama, embedder=text_embedder, **options)
    assert {"ok", "truncated"} <= set(scores.counts())
    kept = [i for i, miwv in enumerate(scores.table["miwv"].to_pylist()) if miwv is not None]
    table = scores.table.take(kept)
    for i, status in zip(kept, table["status"].to_pylist(), strict=True):
        told = miwv_fast.explain(rows[i], rows[scores.table["neighbor"][i].as_py()], llama, **options)
        assert told.difference.mean() == pytest.approx(scores.table["miwv"][i].as_py(), abs=1e-4)
        assert ("<|im_end|>" in told.tokens) or status == "truncated"


def test_all_logits_where_a_model_gives_no_fewer(llama):
    rows = make_rows("alpaca", 2)
    lm = CausalLM(*llama, "tiny")
    expected = miwv_fast.explain(*rows, lm)
    lm.head = AllLogits(lm.model)
    np.testing.assert_allclose(miwv_fast.explain(*rows, lm).one_shot, expected.one_shot, atol=1e-5)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from("日本😀é\u200d \n\ufffd"), max_size=30))
def test_texts_of_tokens_are_the_text(name, text):
    encoder = SegmentEncoder(TOKENIZERS[name]())
    before = list(encoder.text("\n", False))
    ids = list(encoder.text(text, False))
    texts = _added_texts(before[-1:], ids, encoder.decode)
    assert len(texts) == len(ids)
    assert "".join(texts) == encoder.decode(before + ids)[len(encoder.decode(before)) :]


def test_what_cannot_be_explained(llama):
    good, long = make_rows("alpaca", 2)
    long["output"] = "red " * 2000
    with pytest.raises(ValueError, match="no response token stands within 1024 positions"):
        miwv_fast.explain(good, long, llama)
    with pytest.raises(ValueError, match="name no known shape"):
        miwv_fast.explain(good, {"text": "a"}, llama)
    with pytest.raises(ValueError, match="the record's response is empty"):
        miwv_fast.explain(good | {"output": ""}, good, llama)
    for max_length in (1, 1025):
        with pytest.raises(ValueError, match=f"max_length should be 2 to 1024, it is {max_length}"):
            miwv_fast.explain(good, good, llama, max_length=max_length)
    small = tiny_model("llama", 100), llama[1]
    with pytest.raises(ValueError, match="is none of the 100 that the model knows"):
        miwv_fast.explain(good, good, small)


@pytest.mark.parametrize("option", ["tokenizer", "dtype"])
def test_a_run_is_explained_as_it_was_scored(llama, tmp_path, option):
    """With its own tokenizer, or not at all; in its own type."""
    model, tokenizer = llama
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    byte_level(bos_and_eos=True).save_pretrained(tmp_path / "other")
    given = {"tokenizer": tmp_path / "other"} if option == "tokenizer" else {"dtype": "bfloat16"}
    rows, run = make_rows("alpaca", 6), tmp_path / "run"
    scores = miwv_fast.score(rows, tmp_path / "model", embedder=text_embedder, output=run, **given)
    if option == "tokenizer":
        with pytest.raises(ValueError, match="not the one that the run was scored with"):
            explain_run(run, 1)
        with pytest.raises(ValueError, match="not the one that the run was scored with"):
            scores.report(tmp_path / "r.html", model=tmp_path / "model")
        scores.report(tmp_path / "r.html", model=tmp_path / "model", tokenizer=tmp_path / "other")
    _, told = explain_run(run, 1, tokenizer=str(tmp_path / "other") if option == "tokenizer" else None)
    without = miwv_fast.explain(rows[1], rows[scores.table["neighbor"][1].as_py()], tmp_path / "model")
    expected = scores.table["nll_zero_shot"][1].as_py()
    # A batch rounds otherwise than a sequence alone, in bfloat16 by more than what tells the types apart.
    error = abs(told.zero_shot.mean() - expected)
    assert error < (1e-4 if option == "tokenizer" else 0.05) and told.zero_shot.mean() != without.zero_shot.mean()


def test_the_nearest_of_several(llama, tmp_path):
    """A demonstration that left no room is not what a record is explained, or reported, with."""
    model, tokenizer = llama
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"Name {n} colors.", "output": "red"} for n in range(4)]
    rows[1]["output"] = "red and blue and three " * 20
    embeddings = np.array([[1, 0], [1, 0.05], [1, 0.5], [1, 0.6]], np.float32)
    options = {"embedder": embeddings, "neighbors": 3, "max_length": 110, "template": "plain"}
    scores = miwv_fast.score(rows, tmp_path / "model", output=tmp_path / "run", **options)
    assert scores.table["neighbors"][0].as_py() == [2, 3] and scores.table["neighbor"][0].as_py() == 2
    line, _ = explain_run(tmp_path / "run", 0)
    miwv = scores.table["miwv"][0].as_py()
    assert f"record 0, demonstration 2: the nearest of 2, whose mean MIWV is {miwv:+.4f}: difference" in line
    scores.report(tmp_path / "r.html", model=llama)


def test_what_the_tightest_of_several_leaves(llama, tmp_path, caplog):
    """Those tokens were scored, and are explained; the nearest demonstration would leave room for more."""
    model, tokenizer = llama
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"Name {n} colors.", "output": "red and blue and three " * n} for n in range(1, 7)]
    options = {"embedder": text_embedder, "neighbors": 5, "max_length": 110, "template": "plain"}
    scores = miwv_fast.score(rows, tmp_path / "model", output=tmp_path / "run", **options)
    table = scores.table.to_pydict()
    cut = [i for i, status in enumerate(table["status"]) if status == "truncated"]
    assert cut
    for i in cut:
        _, told = explain_run(tmp_path / "run", i)
        assert len(told.tokens) == table["response_tokens"][i]
        assert told.zero_shot.mean() == pytest.approx(table["nll_zero_shot"][i], abs=1e-4)
    scores.report(tmp_path / "r.html", model=llama)
    assert not caplog.text


def test_a_record_of_a_run(llama, tmp_path, capsys, monkeypatch):
    rows = make_rows("alpaca", 6)
    rows[1]["output"] += "\x1b[2J"
    rows[2]["output"] = ""
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% set separator = '\\n' %}{% macro prompt(instruction, input) %}{{ instruction }}{{ input }}:\n{% endmacro %}"
    )
    model, tokenizer = llama
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    scores = miwv_fast.score(
        rows, tmp_path / "model", embedder=text_embedder, template=template, output=tmp_path / "run"
    )
    template.unlink()  # the run knows it
    line, told = explain_run(tmp_path / "run", 1)
    miwv = scores.table["miwv"][1].as_py()
    assert told.difference.mean() == pytest.approx(miwv, abs=1e-4) and "record 1, demonstration" in line
    show(line, told)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(told.tokens)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            show(line, told)
        assert len(capsys.readouterr().out.splitlines()) == 2 + len(told.tokens)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(line, told)
    out = capsys.readouterr().out
    assert "the demonstration hurts" in out and "\x1b[2J" not in out
    with pytest.raises(ValueError, match="record 2 has no score: empty_response"):
        explain_run(tmp_path / "run", 2)
    with pytest.raises(ValueError, match="no record 6: the scores are of records 0 to 5"):
        explain_run(tmp_path / "run", 6)


def test_another_model_than_the_runs_is_told(llama, tmp_path, caplog):
    tokenizer = llama[1]
    for name, seed in (("model", 0), ("other", 1)):
        tiny_model("llama", len(tokenizer), seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    miwv_fast.score(make_rows("alpaca", 6), tmp_path / "model", embedder=text_embedder, output=tmp_path / "run")
    explain_run(tmp_path / "run", 1)
    assert not caplog.text
    explain_run(tmp_path / "run", 1, str(tmp_path / "other"))
    assert "other the model that scored the run? A zero-shot loss is" in caplog.text
    caplog.clear()
    miwv_fast.load_scores(tmp_path / "run").report(tmp_path / "r.html", model=tmp_path / "other")
    assert caplog.text.count("the model that scored the run?") == 1
