"""Sequences from tokens that are kept once equal the template's own, and so do all lengths that follow from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miwv_fast import corpus as corpus_module
from miwv_fast.assembly import TokenSequence
from miwv_fast.corpus import Corpus, count_scored, cut_lengths, tokenize, tokenize_behind
from miwv_fast.ragged import GrowingRagged, Ragged
from miwv_fast.records import Records, read_records
from miwv_fast.sources import open_source
from miwv_fast.templates import Template, load_template
from miwv_fast.tokens import SegmentEncoder
from support import TOKENIZERS, byte_level

JINJA = """{% set separator = '' %}{% macro prompt(instruction, input) %}\
<s>{{ instruction }}<|im_end|>{{ input }}
{% endmacro %}"""
# The last response stands behind a thought that the history does not keep, and turns are numbered.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ loop.index }} {{ m.role }}\n"
    "{{ '<think>' if loop.last and m.role == 'assistant' }}{{ m.content }}<|im_end|>\n{% endfor %}"
)

text = st.lists(
    st.sampled_from(["a", " ", "\n", "red", "Grüße", "<s>", "<|im_end|>", "<think>", "日", "\t", "."]), max_size=5
).map("".join)
turns = st.lists(st.tuples(text, text), min_size=1, max_size=3)


@st.composite
def rows(draw: Any) -> dict[str, Any]:
    """A record of any shape; now and then one without an instruction, or with an empty response."""
    said = draw(turns)
    user, assistant = said[0]
    shape = draw(st.sampled_from(["alpaca", "prompt", "messages", "conversations"]))
    if shape == "alpaca":
        return {"instruction": user, "input": draw(text), "output": assistant}
    if shape == "prompt":
        return {"prompt": user, "completion": assistant}
    system = draw(st.sampled_from(["", "Be kind.", "Be brief."]))
    if shape == "messages":
        front = [{"role": "system", "content": system}] if system else []
        both = [(("user", u), ("assistant", a)) for u, a in said]
        return {"messages": front + [{"role": r, "content": c} for pair in both for r, c in pair]}
    both = [(("human", u), ("gpt", a)) for u, a in said]
    return {"conversations": [{"from": r, "value": c} for pair in both for r, c in pair]}


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> dict[tuple[str, str, bool], Template]:
    path = tmp_path_factory.mktemp("templates") / "own.jinja"
    path.write_text(JINJA)
    made: dict[tuple[str, str, bool], Template] = {}
    for kind, make in TOKENIZERS.items():
        for eos in (False, True):
            for name in ("alpaca", "plain", "chat", path):
                made[kind, str(getattr(name, "stem", name)), eos] = load_template(name, make(), eos)
            rewriting = make()
            rewriting.chat_template = REWRITING
            made[kind, "rewriting", eos] = load_template("chat", rewriting, eos)
    return made


def build(records: Records, template: Template, demonstration: np.ndarray) -> Corpus:
    def refuse(number: int, reason: str) -> None:
        raise AssertionError(f"record {number}: {reason}")

    corpus = tokenize(records, np.ones(len(records), bool), template, refuse, lambda done: None)
    if not corpus.tails:
        corpus.tails.append(tokenize_behind(corpus, records, demonstration, template, refuse, lambda done: None))
    return corpus


def reference(template: Template, segments: list[tuple[str | int, bool | None]]) -> TokenSequence:
    """Segment after segment, text by text: (control or text, whether a scored response, None for a prompt)."""
    encoder = template.encoder
    ids: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    for piece, scored in segments:
        tokens = [piece] if isinstance(piece, int) else encoder.text(piece, first=tuple(ids) == encoder.bos)
        if scored:
            end = [] if template.end_of_turn is None else [template.end_of_turn]
            rows += range(len(ids) - 1, len(ids) - 1 + len(tokens) + len(end))
            targets += [*tokens, *end]
        ids += tokens
    return TokenSequence(*(np.array(values, np.int32) for values in (ids, rows, targets)))


def assert_same(one: TokenSequence, other: TokenSequence) -> None:
    for name in ("ids", "rows", "targets"):
        assert getattr(one, name).dtype == np.int32
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("name", ["alpaca", "plain", "own", "chat", "rewriting"])
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=15)
@given(
    data=st.lists(rows(), min_size=2, max_size=6), eos=st.booleans(), shift=st.integers(1, 5), limit=st.integers(2, 200)
)
def test_equals_the_templates_own(templates, name, kind, data, eos, shift, limit):
    """One by one through the template, many at once through the corpus; batches of two, so that there are several."""
    template = templates[kind, name, eos]
    records = read_records(open_source(data))
    demonstration = (np.arange(len(records)) + 1 + shift % (len(records) - 1)) % len(records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "_BATCH_RECORDS", 2)
        corpus = build(records, template, demonstration)
    tail = corpus.tail(0)
    base = np.where(tail.behind, corpus.alone.ids.lengths[demonstration], 0)
    for spans, begin, sequences in (
        (corpus.alone.spans, 0, [template.zero_shot(records[i]) for i in range(len(records))]),
        (tail.spans, base, [template.one_shot(records[int(j)], records[i]) for i, j in enumerate(demonstration)]),
    ):
        room = count_scored(spans, begin, limit, eos)
        assert room.tolist() == [sequence.room(limit) for sequence in sequences]
        assert count_scored(spans, begin, None, eos).tolist() == [len(sequence.rows) for sequence in sequences]
        expected = [
            len(sequence.cut(int(scored)).ids) if scored else 0
            for sequence, scored in zip(sequences, room, strict=True)
        ]
        assert np.where(room, begin + cut_lengths(spans, room, eos), 0).tolist() == expected
    for i, j in enumerate(demonstration.tolist()):
        whole = template.one_shot(records[j], records[i])
        assert_same(corpus.zero_shot(i), template.zero_shot(records[i]))
        assert_same(corpus.one_shot(i, 0, j), whole)
        prefix = template.zero_shot(records[j]).ids
        inside = len(prefix) <= whole.rows[0] if len(whole.rows) else len(prefix) < tail.spans[i][0, 0] + base[i]
        if inside:
            assert tail.behind[i] == np.array_equal(whole.ids[: len(prefix)], prefix)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_templates_own_is_segment_after_segment(templates, kind, eos):
    """Against an assembly of its own kind: nothing but lists, one text at a time."""
    template = templates[kind, "plain", eos]
    both = {"messages": [{"role": r, "content": c} for r, c in (("user", "u"), ("assistant", " v"), ("user", "w"))]}
    both["messages"].append({"role": "assistant", "content": "x\n"})
    records = read_records(open_source([{"instruction": " a", "input": "b", "output": "\nc"}, both]))
    bos: list[tuple[str | int, bool | None]] = [(token, None) for token in template.encoder.bos]
    demonstration = [("User:  a\nb\nAssistant:\n", None), ("\nc", True)]
    turns = [
        ("User: u\nAssistant:\n", None),
        (" v", True),
        ("\n\n", None),
        ("User: w\nAssistant:\n", None),
        ("x\n", True),
    ]
    assert_same(template.zero_shot(records[0]), reference(template, [*bos, *demonstration]))
    assert_same(template.zero_shot(records[1]), reference(template, [*bos, *turns]))
    unscored = [(piece, None) for piece, _ in demonstration]
    assert_same(
        template.one_shot(records[0], records[1]), reference(template, [*bos, *unscored, ("\n\n", None), *turns])
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(texts=st.lists(text | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=8))
def test_many_texts_at_once_have_the_tokens_of_each(kind, texts):
    encoder = ENCODERS.setdefault(kind, SegmentEncoder(TOKENIZERS[kind]()))
    for first in (False, True):
        assert [ids.tolist() for ids in encoder.texts(texts, first)] == [encoder.text(each, first) for each in texts]


ENCODERS: dict[str, SegmentEncoder] = {}


def test_a_record_that_cannot_be_tokenized_is_rejected_alone(monkeypatch):
    template = load_template("plain", byte_level())
    texts = template.encoder.texts

    def refuse(several, first):
        if any("bad" in each for each in several):
            raise ValueError("no tokens for this")
        return texts(several, first)

    monkeypatch.setattr(template.encoder, "texts", refuse)
    data = [{"prompt": f"{'bad' if i in (3, 11) else 'good'} {i}", "response": "x"} for i in range(20)]
    rejected: list[tuple[int, str]] = []
    records = read_records(open_source(data))
    wanted = np.arange(20) != 5
    corpus = tokenize(records, wanted, template, lambda *pair: rejected.append(pair), lambda done: None)
    assert rejected == [(3, "no tokens for this"), (11, "no tokens for this")]
    assert [i for i in range(20) if not len(corpus.alone.ids[i])] == [3, 5, 11]
    assert_same(corpus.one_shot(12, 0, 4), template.one_shot(records[4], records[12]))


@given(st.lists(st.lists(st.integers(-9, 9), max_size=4), max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_ragged(lists, begin, end):
    made = Ragged.join([np.array(row, np.int32) for row in lists])
    assert [made[i].tolist() for i in range(len(made))] == lists
    assert made.lengths.tolist() == [len(row) for row in lists]
    assert made.sum(made.values.astype(np.int64)).tolist() == [sum(row) for row in lists]
    assert made.rows.tolist() == [i for i, row in enumerate(lists) for _ in row]
    begin, end = sorted((min(begin, len(lists)), min(end, len(lists))))
    part = made.part(begin, end)
    assert [part[i].tolist() for i in range(len(part))] == lists[begin:end]
    growing = GrowingRagged(len(lists) + 2)
    growing.append(np.arange(0, begin), made.part(0, begin))
    growing.append(np.arange(begin + 1, len(lists) + 1), made.part(begin, len(lists)))
    grown = growing.finish()
    assert [grown[i].tolist() for i in range(len(grown))] == [*lists[:begin], [], *lists[begin:], []]
