"""Four shapes of records, and rows that are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miwv_fast import records as records_module
from miwv_fast.fields import MalformedRecord
from miwv_fast.records import read_records
from miwv_fast.rejections import Rejection, Rejections
from miwv_fast.shapes import PAIRS, SYSTEM_FIELDS, Record, Turn, parse_record
from miwv_fast.sources import open_source


def messages(*pairs, role="role", text="content"):
    return [{role: said_by, text: said} for said_by, said in pairs]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add", "input": "", "output": "3"},
        {"instruction": "Add", "input": None, "output": "3"},
        {"instruction": "Add", "output": "3"},
        {"prompt": "Add", "completion": "3"},
        {"prompt": "Add", "response": "3"},
        {"instruction": "Add", "context": "", "response": "3", "category": "open_qa"},
        {"prompt": "Add", "response": "3", "instruction": "Subtract"},
        {"question": "Add", "answer": "3"},
        {"question": "Add", "context": "", "answer": "3"},
        {"system_prompt": "", "question": "Add", "response": "3"},
        {"query": "Add", "response": "3", "original_question": "Subtract"},
        {"problem": "Add", "solution": "3", "answer": "4"},
        {"query": "Add", "answer": "3", "resource": "evol"},
        {"problem": "Add", "generated_solution": "3", "expected_answer": "4"},
        {"inputs": "Add", "targets": "3", "language": "English"},
        {"input": "Add", "output": "3", "solution": "4"},
        {"instruction": "Add", "output": "3", "question": "Subtract", "answer": "4"},
        {"messages": messages(("user", "Add"), ("assistant", "3"))},
        {"messages": messages(("user", "Add"), ("assistant", "3"), ("user", "and then?"))},
        {
            "messages": messages(
                ("user", [{"type": "text", "text": "Ad"}, {"type": "text", "text": "d"}]), ("assistant", "3")
            )
        },
        {"conversations": messages(("human", "Add"), ("gpt", "3"), role="from", text="value")},
        {"conversations": messages(("user", "Add"), ("assistant", "3"))},
        {"messages": messages(("human", "Add"), ("gpt", "3"), role="from", text="value")},
        {"messages": [{"role": "user", "content": "Add", "from": None}, {"role": "assistant", "content": "3"}]},
        {"conversations": messages(("user", "Add"), ("assistant", "3"), text="value")},
        {"conversations": messages(("human", "Add"), ("gpt", "3"), role="from")},
        {"messages": messages(("user", "Add"), ("assistant", "3"), text="text")},
        {"messages": [m | {"content": None} for m in messages(("user", "Add"), ("assistant", "3"), text="value")]},
        {"messages": [{"role": "system", "content": None}, *messages(("user", "Add"), ("assistant", "3"))]},
        {"conversation": messages(("user", "Add"), ("assistant", "3")), "language": "English"},
        {"conversation": "Human: Subtract", "instruction": "Add", "output": "3"},
        {"conversations": ["Add", "3"], "source": "wiki"},
        {"conversations": np.array(["Add", "3", "and then?"], object)},
        {"conversation": [{"input": "Add", "output": "3"}], "source": "wiki"},
        {"conversations": [{"input": "Add", "output": "3", "role": None}]},
        {"id": None, "data": ["Add", "3"]},
        {"data": np.array(["Add", "3", "and then?"], object)},
        {"messages": None, "prompt": None, "instruction": "Add", "input": "", "output": "3"},
    ],
)
def test_one_turn_in_every_shape(row):
    record = parse_record(row, 7)
    assert record.turns == (Turn("Add", "", "3"),)
    assert (record.index, record.id, record.system, record.embedded_text) == (7, None, "", "Add")


@pytest.mark.parametrize(
    "rest",
    [
        {"input": "1 2", "output": "3"},
        {"context": "1 2", "response": "3"},
        {"input": "1 2", "response": "3"},
        {"input": "1 2", "context": None, "response": "3"},
        {"instruction": None, "question": "Add", "context": "1 2", "answer": "3"},
        {"instruction": None, "definition": "Add", "inputs": "1 2", "targets": "3"},
    ],
)
def test_input_is_part_of_the_embedded_text(rest):
    assert parse_record({"instruction": "Add", **rest}).embedded_text == "Add\n1 2"


def test_neither_of_two_inputs_is_lost():
    row = {"instruction": "Add", "input": "1", "context": "2", "response": "3"}
    assert parse_record(row).turns == (Turn("Add", "1\n2", "3"),)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add", "output": "3"},
        {"prompt": "Add", "completion": "3"},
        {"instruction": "Add", "context": "1 2", "response": "3"},
        {"question": "Add", "response": "3"},
        {"messages": messages(("user", "Add"), ("assistant", "3"))},
        {"conversations": messages(("human", "Add"), ("gpt", "3"), role="from", text="value")},
    ],
)
def test_a_system_text_beside_the_rest(row):
    for beside in ({"system": "Be kind."}, {"system_prompt": "Be kind."}):
        assert parse_record(row | beside).system == "Be kind."
    assert parse_record(row | {"system": "Be kind.", "system_prompt": "Be brief."}).system == "Be kind."
    for nothing in (None, "", float("nan")):
        assert parse_record(row | {"system": nothing}).system == ""
        assert parse_record(row | {"system": nothing, "system_prompt": "Be kind."}).system == "Be kind."
    with pytest.raises(MalformedRecord, match="'system_prompt' should be text, it is ndarray"):
        parse_record(row | {"system_prompt": np.array(["a", "b"])})


@pytest.mark.parametrize(
    "row", [{"instruction": "c", "input": "1", "output": "d"}, {"prompt": "c\n1", "response": "d"}]
)
def test_earlier_turns(row):
    """As LLaMA-Factory reads them: before the pair, their responses scored as well."""
    for history in ([["a", "b"], ("", "")], np.array([["a", "b"], ["", ""]], object)):
        record = parse_record(row | {"history": history, "system": "Be kind."})
        assert record.turns[:2] == (Turn("a", "", "b"), Turn("", "", ""))
        assert record.turns[2].prompt == "c\n1" and len(record.turns) == 3
        assert (record.system, record.embedded_text) == ("Be kind.", "a\n\nc\n1")
    for nothing in (None, [], ""):
        assert parse_record(row | {"history": nothing}) == parse_record(row)


def test_conversation():
    said = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    record = parse_record({"id": 12, "messages": messages(*said)})
    assert record.turns == (Turn("a", "", "b"), Turn("c", "", "d"))
    assert (record.id, record.system, record.embedded_text) == ("12", "Be kind.", "a\nc")


def test_what_stands_behind_the_last_answer_does_not_count():
    said = messages(("user", "a"), ("assistant", "b"))
    expected = parse_record({"messages": said})
    for behind in ([("user", "c"), ("user", "d")], [("tool", "c")], [("system", "c")]):
        assert parse_record({"messages": said + messages(*behind)}) == expected
    with pytest.raises(MalformedRecord, match="two user messages"):
        parse_record({"messages": messages(("user", "a"), ("user", "b"))})


def test_an_empty_list_is_no_conversation_where_there_is_something_else():
    row = {"instruction": "a", "output": "b"}
    assert parse_record({**row, "messages": [], "conversations": None}) == parse_record(row)
    assert parse_record({"messages": [], "conversations": ["a", "b"]}) == parse_record({"conversations": ["a", "b"]})
    for alone in ({"messages": []}, {"messages": [], "instruction": "a"}):
        with pytest.raises(MalformedRecord, match="'messages' has no user message"):
            parse_record(alone)


def test_a_malformed_record_keeps_its_id():
    rows = [{"id": "a", "instruction": "b", "output": "c"}, {"id": 7, "instruction": 3}, {"id": [1]}, "text"]
    records = read_records(open_source(rows))
    assert records.table["id"].to_pylist() == ["a", "7", None, None]


def test_conversation_of_bare_texts():
    record = parse_record({"conversations": ["a", "b", "c", "d"], "system": "Be kind."})
    assert (record.turns, record.system) == ((Turn("a", "", "b"), Turn("c", "", "d")), "Be kind.")


def test_conversation_of_pairs():
    said = [{"input": "a", "output": "b"}, {"input": "c", "output": None}]
    record = parse_record({"conversation": said, "system": "Be kind.", "instruction": "d"})
    assert (record.turns, record.system) == ((Turn("a", "", "b"), Turn("c", "", "")), "Be kind.")


@pytest.mark.parametrize("user", ["user", "human", "prompter"])
@pytest.mark.parametrize("assistant", ["assistant", "gpt", "chatgpt", "bing", "bard", "model"])
def test_names_of_roles(user, assistant):
    said = messages((user, "a"), (assistant, "b"), (user, "c"), ("assistant", "d"))
    assert parse_record({"messages": said}).turns == (Turn("a", "", "b"), Turn("c", "", "d"))


@pytest.mark.parametrize("bare", [{"input": "a", "output": "b"}, {"data": ["a", "b"]}])
def test_names_that_tell_little_count_alone(bare):
    """Beside a field of another shape, even an empty one, that is the shape, or there is none."""
    assert parse_record(bare).turns == (Turn("a", "", "b"),)
    for other in ({"messages": messages(("user", "c"), ("assistant", "d"))}, {"question": "c", "answer": "d"}):
        assert parse_record(bare | other).turns == (Turn("c", "", "d"),)
    for name in ("prompt", "problem", "definition"):
        with pytest.raises(MalformedRecord, match="no known shape"):
            parse_record(bare | {name: None})
    for name in CONVERSATIONS:
        with pytest.raises(MalformedRecord, match=f"'{name}' should be a list of messages"):
            parse_record(bare | {name: None})


def test_without_an_instruction_alpaca_stays_alpaca():
    assert parse_record({"instruction": None, "input": "a", "output": "b"}).turns == (Turn("", "a", "b"),)


def test_prompt_and_completion_of_messages():
    """TRL's conversational form is the conversation that both make together."""
    said = messages(("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    for response in ("completion", "response"):
        for cut in (2, 4):
            both = said[:cut], said[cut:]
            for prompt, answer in (both, map(np.array, both)):  # as pandas reads a list
                assert parse_record({"prompt": prompt, response: answer}) == parse_record({"messages": said})
    for completion, message in (
        ("d", "'completion' should be a list of messages"),
        (said[3:4], "'completion' has no assistant message"),
    ):
        with pytest.raises(MalformedRecord, match=message):
            parse_record({"prompt": said[:4], "completion": completion})


@pytest.mark.parametrize(
    ("given", "kept"),
    [("a", "a"), (7, "7"), (np.int64(7), "7"), (7.0, "7"), (np.float64(7), "7"), (7.5, None), (float("nan"), None)],
)
def test_own_id(given, kept):
    assert parse_record({"id": given, "instruction": "a", "output": "b"}).id == kept


def test_empty_cells_of_pandas():
    pandas = pytest.importorskip("pandas")
    rows = [
        {"instruction": "Add", "input": None, "output": "3", "history": None, "id": 7},
        {"prompt": "Add", "completion": "3", "system": None},
        {"instruction": "Add", "output": None},
    ]
    cells = pandas.DataFrame(rows).fillna(float("nan")).to_dict("records")
    assert not any(value is None for row in cells for value in row.values())
    records = [parse_record(row) for row in cells]
    assert [record.turns for record in records] == [(Turn("Add", "", "3"),)] * 2 + [(Turn("Add", "", ""),)]
    assert not any(record.system for record in records)


def test_a_conversation_without_any_text_is_empty():
    for role, text in (("role", "content"), ("from", "value"), ("role", "value"), ("from", "text")):
        record = parse_record({"messages": messages(("user", None), ("assistant", None), role=role, text=text)})
        assert record.turns == (Turn("", "", ""),)


def test_text_is_never_stripped():
    record = parse_record({"instruction": " a\n", "input": "\t", "output": " b "})
    assert record.turns == (Turn(" a\n", "\t", " b "),)


@pytest.mark.parametrize(
    "row, message",
    [
        (3, "int 3"),
        ([], "list"),
        ({}, "found: none"),
        ({"text": "a"}, "found: text"),
        ({"instruction": "a"}, "found: instruction"),
        ({"instruction": "a", "output": 3}, "'output' should be text, it is int 3"),
        ({"instruction": ["a"], "output": "b"}, "'instruction' should be text"),
        ({"instruction": "a\ud800", "output": "b"}, "lone surrogate"),
        ({"messages": "hello"}, "should be a list"),
        ({"messages": ["hello"]}, r"messages\[0\] should be an object"),
        ({"messages": messages(("tool", "a"))}, "role 'tool'"),
        ({"messages": messages(("user", 1), ("assistant", "b"))}, r"messages\[0\].content"),
        (
            {"messages": messages(("user", "a"), ("assistant", "b"), text="body")},
            r"messages\[0\] should have its text in 'content', found: role, body",
        ),
        ({"messages": messages(("human", "a"), role="from", text="x")}, "its text in 'value', found: from, x"),
        (
            {"messages": [*messages(("user", "a")), *messages(("assistant", "b"), text="value")]},
            r"messages\[1\] should have its text in 'content', found: role, value",
        ),
        ({"messages": messages(("assistant", "a"))}, "follows no user message"),
        ({"messages": messages(("user", "a"), ("user", "b"), ("assistant", "c"))}, "two user messages"),
        ({"messages": messages(("user", "a"), ("system", "c"), ("assistant", "b"))}, "only come first"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text can be scored"),
        ({"messages": []}, "no user message"),
        (
            {"conversation": [{"input": "a", "output": "b"}, {"input": "c"}]},
            r"conversation\[1\] should be an object with input and output, it is dict {'input': 'c'}",
        ),
        ({"conversation": [{"input": 1, "output": "b"}]}, r"conversation\[0\].input' should be text, it is int 1"),
        ({"data": ["a", 1]}, "no known shape"),
        ({"data": np.array(3)}, "'data' should be a list of texts"),
        ({"data": []}, "'data' has no user message"),
        ({"input": [], "output": "b"}, "'input' should be text, it is list"),
        ({"instruction": "a", "output": "b", "history": "c"}, "'history' should be a list of pairs, it is str 'c'"),
        (
            {"instruction": "a", "output": "b", "history": ["cd"]},
            r"'history\[0\]' should be a list of an instruction and",
        ),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"history\[0\] should be .* it has 1 item"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"], ["e", 5]]},
            r"history\[1\].response' should be text",
        ),
        ({"prompt": "a", "response": "b", "history": np.array(3)}, "'history' should be a list of pairs"),
    ],
)
def test_malformed(row, message):
    with pytest.raises(MalformedRecord, match=message):
        parse_record(row)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "input", "output"]), inner)
    ),
    max_leaves=8,
)
CONVERSATIONS = ("messages", "conversations", "conversation")
fields = [field for pair in PAIRS for field in pair.fields]
keys = st.sampled_from(["id", "data", *CONVERSATIONS, *SYSTEM_FIELDS, *fields])


@given(st.dictionaries(keys, json_values))
def test_any_object_is_a_record_or_malformed(row):
    try:
        record = parse_record(row)
    except MalformedRecord:
        return
    assert record.turns and all(isinstance(turn.response, str) for turn in record.turns)


def test_statuses_and_rejections_keep_their_places(tmp_path: Path):
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": " \n", "input": "x", "output": "b"},
        {"instruction": "a", "output": "\n"},
        {"instruction": "a", "output": 1},
        {"messages": messages(("user", "a"))},
        {"instruction": "c", "output": "d", "id": "last"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps(row) for row in rows[:3]) + "\n\nnot json\n" + "\n".join(map(json.dumps, rows[3:]))
    )
    records = read_records(open_source(path))
    expected = [None, "empty_instruction", "empty_response", "malformed", "malformed", "empty_response", None]
    assert records.status.to_pylist() == expected
    assert [(r.index, r.location.rpartition(":")[2]) for r in records.rejections] == [(3, "5"), (4, "6")]
    assert "not JSON" in records.rejections[0].reason and records.rejections[0].row == "not json"
    assert records[6].id == "last" and records[6].turns == (Turn("c", "", "d"),)
    assert records.table["id"].to_pylist() == [None] * 6 + ["last"]


@given(st.lists(st.tuples(st.text(), st.text(), st.text(), st.integers(0, 3)), min_size=1, max_size=12), st.data())
def test_many_at_once_are_what_each_is(texts, data):
    """Records that are taken in any order, and the texts that are embedded, over several batches of Arrow."""
    rows = [
        {"id": a, "messages": messages(("system", c), *(("user", b), ("assistant", a)) * turns)}
        if turns
        else {"instruction": a, "input": b, "output": c}
        for a, b, c, turns in texts
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "_BATCH_RECORDS", 3)
        records = read_records(open_source([*rows, {"instruction": "the last", "output": "x"}, 3]))
    assert max(map(len, records.table.to_batches())) <= 3
    expected = [parse_record(row, number) for number, row in enumerate(rows)]
    numbers = data.draw(st.lists(st.integers(0, len(rows) - 1)))
    assert records.take(np.array(numbers, np.int64)) == [expected[number] for number in numbers]
    assert records.take(np.array([len(rows) + 1])) == [Record(len(rows) + 1, None, "", ())]
    wanted = np.array([*data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))), True, False])
    embedded = [record.embedded_text for record in expected] + ["the last"]
    assert records.embedded_texts(wanted).to_pylist() == [
        text if wanted[number] else None for number, text in enumerate([*embedded, None])
    ]


@pytest.mark.parametrize("name", ["id", "system", "instruction", "input", "output"])
def test_long_texts_make_small_batches(name, monkeypatch):
    """Whatever field they stand in: no more is held as Python objects, and no column outgrows its offsets."""
    monkeypatch.setattr(records_module, "_BATCH_CHARACTERS", 100)
    rows = [{"instruction": "a", "output": "b"} | {name: "x" * 60} for _ in range(5)]
    batches = read_records(open_source(rows)).table.to_batches()
    assert [len(batch) for batch in batches] == [2, 2, 1]


def test_of_a_malformed_row_no_more_is_kept_than_fits_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "_KEPT_CHARACTERS", 8)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\nno record at all\n')
    (rejected,) = read_records(open_source(tmp_path / "rows.jsonl")).rejections
    assert rejected.row == "no re..."


def test_texts_that_are_divided_otherwise_are_others():
    def digest(*turns):
        return read_records(open_source([{"instruction": a, "input": b, "output": c} for a, b, c in turns])).texts

    given = [("ab", "c", "d"), ("e", "", "f")]
    others = [[("a", "bc", "d"), given[1]], [("ab", "", "cd"), given[1]], [("ab", "c", "de"), ("f", "", "f")]]
    assert digest(*given) == digest(*given) and digest(*given) not in [digest(*turns) for turns in others]


@given(st.lists(st.builds(Rejection, st.integers(0, 2**40), *[st.text(st.characters())] * 3)))
def test_rejections_come_back_as_they_were(rejections):
    """Lone surrogates included: they stand for the bytes of a file's name."""
    kept = Rejections(rejections)
    assert list(kept) == rejections and len(kept) == len(rejections)
    with pytest.raises(IndexError):
        kept[len(rejections)]


@pytest.mark.parametrize(
    "content, message", [("", "no records"), ("\n\n", "no records"), ("nonsense\n", "no readable record")]
)
def test_nothing_to_read(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(open_source(path))
