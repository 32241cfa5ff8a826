"""Selections on disk in every form, read back by the libraries they are for."""

from __future__ import annotations

import json
import math
import shutil

import pyarrow.json as pa_json
import pyarrow.parquet as pq
import pytest

from miwv_fast.export import choose_format, write_records
from miwv_fast.sources import FileSource
from miwv_fast.templates import ALPACA
from miwv_fast.trainers import (
    add_to_dataset_info,
    llama_factory_entry,
    llama_factory_records,
    trl_records,
    write_for_trainer,
)
from test_scorer import alpaca_prompt, make_rows

ROWS = [
    {"instruction": "Grüße \u2028 <b>", "input": "", "output": "日本", "tags": ["a", "b"], "n": 1},
    {"instruction": "x", "output": "y", "id": "7", "n": 2.5},
]
WHOLE = [{name: row.get(name) for name in ("instruction", "input", "output", "tags", "n", "id")} for row in ROWS]


def test_jsonl_and_parquet(tmp_path):
    for name, expected in (("s.jsonl", ROWS), ("s.parquet", WHOLE)):
        path = tmp_path / "new" / name
        for _ in range(2):  # a file that is there is replaced
            write_records(path, ROWS, choose_format(path))
        assert [row.value for row in FileSource([path]).rows()] == expected
    assert pq.read_table(path).schema.names == list(WHOLE[0])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["s.jsonl", "s.parquet"]


def test_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "new" / "selected"
    write_records(folder, ROWS, choose_format(folder))
    assert datasets.load_from_disk(str(folder)).to_list() == WHOLE
    with pytest.raises(ValueError, match="is there already"):
        write_records(folder, ROWS, "datasets")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["selected"]


def test_empty_cells_of_pandas(tmp_path):
    write_records(tmp_path / "s.parquet", [{"input": float("nan")}, {"input": "a"}], "parquet")
    assert pq.read_table(tmp_path / "s.parquet")["input"].to_pylist() == [None, "a"]
    rows = [{"input": float("nan"), "scores": [1.5, -math.inf]}, {"input": "NaN, Infinity", "scores": [2.0]}]
    rows.append({"input": math.nan, "scores": [], "me": rows})  # which has no end
    write_records(tmp_path / "s.jsonl", rows, "jsonl")
    expected = [{"input": None, "scores": [1.5, None]}, rows[1], {"input": None, "scores": []}]
    assert pa_json.read_json(tmp_path / "s.jsonl").to_pylist() == expected


def test_values_that_no_column_holds(tmp_path):
    rows = [{"instruction": "a", "output": "b", "meta": 1}, {"instruction": "a", "output": "b", "meta": "one"}]
    for name in ("s.parquet", "folder"):
        with pytest.raises(ValueError, match="field 'meta' do not go into one column"):
            write_records(tmp_path / name, rows, choose_format(tmp_path / name))
    for value in ({}, [{}]):
        for name in ("s.parquet", "folder"):
            try:  # some versions of pyarrow and datasets can
                write_records(tmp_path / name, [{"instruction": "a", "meta": value}], choose_format(tmp_path / name))
            except ValueError as error:
                assert "into one column" in str(error)
            else:
                shutil.rmtree(tmp_path / name) if name == "folder" else (tmp_path / name).unlink()
    assert not list(tmp_path.iterdir())


def _nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def test_values_nested_deeper_than_can_be_read_again(tmp_path):
    import datasets

    rows = [{"meta": _nested(32)}, {"meta": None}]
    write_records(tmp_path / "s.parquet", rows, "parquet")
    write_records(tmp_path / "folder", rows, "datasets")
    assert pq.read_table(tmp_path / "s.parquet").to_pylist() == rows
    assert datasets.load_from_disk(str(tmp_path / "folder"))[:]["meta"] == [_nested(32), None]
    endless: list[object] = [{"meta": 1}]
    endless += [endless, endless]
    for deep in (_nested(33), _nested(100_000), endless):
        for name, kind in (("t.parquet", "parquet"), ("other", "datasets")):
            with pytest.raises(ValueError, match=r"field 'meta' do not go into one column: .* more than 32 deep"):
                write_records(tmp_path / name, [{"meta": None}, {"meta": deep}], kind)
    assert {path.name for path in tmp_path.iterdir()} == {"s.parquet", "folder"}


@pytest.mark.parametrize(
    "name, wanted, kind",
    [("a.jsonl", None, "jsonl"), ("a.parquet", None, "parquet"), ("a", None, "datasets"), ("a.x", "jsonl", "jsonl")],
)
def test_format(tmp_path, name, wanted, kind):
    assert choose_format(tmp_path / name, wanted) == kind


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match=r"cannot tell the format from the name of .*a\.csv"):
        choose_format(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="unknown format 'csv'"):
        choose_format(tmp_path / "a", "csv")


MESSAGES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
SHAREGPT = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("alpaca", {"columns": {"prompt": "instruction", "query": "input", "response": "output"}}),
        ("prompt", {"columns": {"prompt": "prompt", "response": "completion"}}),
        (
            "messages",
            {
                "formatting": "sharegpt",
                "columns": {"messages": "messages"},
                "tags": {**MESSAGES, "system_tag": "system"},
            },
        ),
        (
            "sharegpt",
            {
                "formatting": "sharegpt",
                "columns": {"messages": "conversations"},
                "tags": {**SHAREGPT, "system_tag": "system"},
            },
        ),
    ],
)
def test_llama_factory_entry(shape, expected):
    """The entries of its data/README for each shape; all four were trained on with LLaMA-Factory 0.9.5."""
    assert llama_factory_entry("s.jsonl", make_rows(shape, 4)) == {"file_name": "s.jsonl", **expected}


def test_roles_and_system_texts_are_looked_for_in_the_records():
    rows = make_rows("sharegpt", 3)
    rows[1]["system"] = "Be brief."
    for row in rows:
        for message in row["conversations"]:
            message["from"] = {"human": "user", "gpt": "assistant"}[message["from"]]
    entry = llama_factory_entry("s.jsonl", rows)
    assert entry["columns"] == {"messages": "conversations", "system": "system"}
    assert (entry["tags"]["user_tag"], entry["tags"]["assistant_tag"]) == ("user", "assistant")
    rows[0]["conversations"][0]["from"] = "human"
    with pytest.raises(ValueError, match="2 names for user_tag"):
        llama_factory_entry("s.jsonl", rows)
    with pytest.raises(ValueError, match="2 shapes"):
        llama_factory_entry("s.jsonl", [*rows, *make_rows("alpaca", 1)])


def test_the_field_of_a_system_text_is_looked_for_in_the_records():
    orca = [{"system_prompt": text, "question": "a", "response": "b"} for text in ("", "Be brief.")]
    assert llama_factory_entry("s.jsonl", orca)["columns"] == {
        "prompt": "question",
        "response": "response",
        "system": "system_prompt",
    }
    assert "system" not in llama_factory_entry("s.jsonl", orca[:1])["columns"]
    with pytest.raises(ValueError, match=r"2 fields of a system text \(system, system_prompt\)"):
        llama_factory_entry("s.jsonl", [*orca, {**orca[1], "system": "Be kind."}])


def test_names_of_role_and_text_are_looked_for_in_the_records():
    openai = [{"conversation": row["messages"]} for row in make_rows("messages", 2)]
    assert llama_factory_entry("s.jsonl", openai) == {
        "file_name": "s.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "conversation"},
        "tags": {**MESSAGES, "system_tag": "system"},
    }
    mixed = [{"conversation": [{"from": m["role"], "content": m["content"]} for m in openai[0]["conversation"]]}]
    tags = llama_factory_entry("s.jsonl", mixed)["tags"]
    assert tags == {**MESSAGES, "role_tag": "from", "system_tag": "system"}
    with pytest.raises(ValueError, match=r"2 names of role and text \(\('from', 'value'\), \('role', 'content'\)\)"):
        llama_factory_entry("s.jsonl", [*openai, {"conversation": make_rows("sharegpt", 1)[0]["conversations"]}])


def test_conversations_that_llama_factory_would_leave_out():
    """It skips one that ends with a user's turn, stops at a text in parts, and does not know TRL's form."""
    plain = [row | {"source": "a", "system": "Be brief."} for row in make_rows("sharegpt", 2)]
    assert llama_factory_records(plain) == plain
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    answered = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes?"}]
    odd = [
        {"messages": answered},
        {"messages": [{"role": "developer", "content": "Be kind."}, *answered, {"role": "user", "content": "Bye"}]},
    ]
    texts = [{"role": "user", "content": "Hi there"}, answered[1]]
    for row, system in zip(odd, ([], [{"role": "system", "content": "Be kind."}]), strict=True):
        first, second, last = llama_factory_records([*plain, row])
        assert last == {"messages": [*system, *texts]}
        assert first["source"] == "a" and [m["role"] for m in first["messages"]] == ["system", "user", "assistant"]
        tags = llama_factory_entry("s.jsonl", [first, second, last])["tags"]
        assert (tags["role_tag"], tags["user_tag"], tags["system_tag"]) == ("role", "user", "system")
    nameless = {"messages": [*texts, {"content": "Bye"}]}
    assert llama_factory_records([nameless]) == [{"messages": texts}]
    assert llama_factory_records([{"conversations": ["Hi there", "Yes?"], "source": "a"}]) == [
        {"source": "a", "messages": texts}
    ]
    assert llama_factory_records([{"data": ["Hi there", "Yes?", "Bye"]}]) == [{"messages": texts}]
    assert llama_factory_records([{"conversation": [{"input": "Hi there", "output": "Yes?"}], "source": "a"}]) == [
        {"source": "a", "messages": texts}
    ]
    for behind in ({"content": "Bye"}, None):  # which nobody reads
        assert llama_factory_records([{"messages": [*texts, behind]}]) == [{"messages": texts}]
    conversational = {"prompt": [{"role": "user", "content": "Hi"}], "completion": answered[1:], "source": "b"}
    pair, last = llama_factory_records([*make_rows("alpaca", 1), conversational])
    assert last == {"source": "b", "messages": [{"role": "user", "content": "Hi"}, answered[1]]}
    assert [m["role"] for m in pair["messages"]] == ["user", "assistant"] and "output" not in pair


@pytest.mark.parametrize(
    "prompt, response",
    [("query", "answer"), ("problem", "generated_solution"), ("inputs", "targets"), ("input", "output")],
)
def test_pairs_go_to_the_trainers(prompt, response):
    rows = [{prompt: "a", response: "b", "source": "c"}]
    assert llama_factory_records(rows) == rows
    assert llama_factory_entry("s.jsonl", rows)["columns"] == {"prompt": prompt, "response": response}
    assert trl_records(rows, {"name": "chat", "source": ""}) == [
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    ]


def test_names_of_roles_go_to_the_trainers():
    said = [[("prompter", "a"), (name, "b")] for name in ("model", "bard")]
    rows = [{"messages": [{"role": role, "text": text} for role, text in pair]} for pair in said]
    assert llama_factory_records(rows[:1]) == rows[:1]
    tags = llama_factory_entry("s.jsonl", rows[:1])["tags"]
    assert (tags["content_tag"], tags["user_tag"], tags["assistant_tag"]) == ("text", "prompter", "model")
    with pytest.raises(ValueError, match=r"2 names for assistant_tag \(bard, model\), LLaMA-Factory reads one"):
        llama_factory_entry("s.jsonl", rows)
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert [row["messages"] for row in trl_records(rows, {"name": "chat", "source": ""})] == [expected] * 2


def test_the_field_of_an_input_is_looked_for_in_the_records():
    rows = [{"instruction": "a", "context": text, "response": "b"} for text in ("", "c")]
    assert llama_factory_entry("s.jsonl", rows)["columns"] == {
        "prompt": "instruction",
        "query": "context",
        "response": "response",
    }
    assert "query" not in llama_factory_entry("s.jsonl", rows[:1])["columns"]
    with pytest.raises(ValueError, match=r"2 fields of an input \(context, input\)"):
        llama_factory_entry("s.jsonl", [*rows, {**rows[0], "input": "d"}])
    with pytest.raises(ValueError, match=r"2 shapes \(instruction and output, instruction and response\)"):
        llama_factory_entry("s.jsonl", [*rows, *make_rows("alpaca", 1)])


def test_dataset_info_keeps_what_it_holds(tmp_path):
    info = tmp_path / "dataset_info.json"
    add_to_dataset_info(tmp_path / "one.jsonl", {"file_name": "one.jsonl"})
    add_to_dataset_info(tmp_path / "two.jsonl", {"file_name": "two.jsonl"})
    assert json.loads(info.read_text()) == {"one": {"file_name": "one.jsonl"}, "two": {"file_name": "two.jsonl"}}
    for text, message in (("[]", "should be a JSON object"), ("{", "is not JSON")):
        info.write_text(text)
        with pytest.raises(ValueError, match=message):
            add_to_dataset_info(tmp_path / "two.jsonl", {})
        assert info.read_text() == text


def test_trl_records():
    alpaca = {"name": "alpaca", "source": ALPACA}
    rows = make_rows("alpaca", 3)
    assert trl_records(rows, alpaca) == [
        {"prompt": alpaca_prompt(row["instruction"], row["input"]), "completion": row["output"]} for row in rows
    ]
    first = trl_records(rows, {"name": "chat", "source": ""})[1]
    assert first["prompt"] == [{"role": "user", "content": f"{rows[1]['instruction']}\n{rows[1]['input']}"}]
    assert first["completion"] == [{"role": "assistant", "content": rows[1]["output"]}]
    talk = make_rows("messages", 3)
    assert [row["messages"] for row in trl_records(talk, alpaca)] == [row["messages"] for row in talk]
    others = [{"data": ["a", "b"]}, {"conversation": [{"input": "a", "output": "b"}]}]
    assert [[m["content"] for m in row["messages"]] for row in trl_records(others, alpaca)] == [["a", "b"]] * 2
    mixed = trl_records([*talk, *rows, *make_rows("sharegpt", 2)], alpaca)
    assert {name for row in mixed for name in row} == {"messages"}


def test_a_system_text_goes_to_the_trainers():
    rows = [row | {"system": "Be kind."} for row in make_rows("prompt", 2)]
    assert llama_factory_entry("s.jsonl", rows)["columns"] == {
        "prompt": "prompt",
        "response": "completion",
        "system": "system",
    }
    text = trl_records(rows, {"name": "alpaca", "source": ALPACA})[0]["prompt"]
    assert text == alpaca_prompt(f"Be kind.\n\n{rows[0]['prompt']}", "")
    chat = trl_records(rows, {"name": "chat", "source": ""})[0]["prompt"]
    assert chat[0] == {"role": "system", "content": "Be kind."} and len(chat) == 2


def test_earlier_turns_go_to_the_trainers():
    rows = make_rows("alpaca", 2)
    rows[1]["history"] = [["a", "b"]]
    entry = llama_factory_entry("s.jsonl", rows)
    assert entry["columns"]["history"] == "history"
    assert "history" not in llama_factory_entry("s.jsonl", rows[:1])["columns"]
    made = trl_records(rows, {"name": "alpaca", "source": ALPACA})
    assert [[message["content"] for message in row["messages"]][:-2] for row in made] == [[], ["a", "b"]]


def test_what_a_trainer_gets(tmp_path):
    manifest = {"model": {"name": "some model"}, "template": {"name": "alpaca", "source": ALPACA}}
    rows = make_rows("alpaca", 3)
    command = write_for_trainer("llama-factory", tmp_path / "s.jsonl", rows, "jsonl", manifest)
    assert command == (
        "llamafactory-cli train --stage sft --do_train --model_name_or_path 'some model' --output_dir trained "
        f"--template alpaca --dataset_dir {tmp_path} --dataset s"
    )
    assert [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()] == rows
    command = write_for_trainer("trl", tmp_path / "t.jsonl", rows, "jsonl", manifest)
    assert command == f"trl sft --config {tmp_path}/t.trl.yaml --model_name_or_path 'some model' --output_dir trained"
    assert f'data_files: "{tmp_path}/t.jsonl"' in (tmp_path / "t.trl.yaml").read_text()
    with pytest.raises(ValueError, match="with which template"):
        write_for_trainer("trl", tmp_path / "u.jsonl", rows, "jsonl", {})
    with pytest.raises(ValueError, match="2 shapes"):
        write_for_trainer("llama-factory", tmp_path / "u.jsonl", rows + make_rows("prompt", 1), "jsonl", manifest)
    assert not (tmp_path / "u.jsonl").exists()
