"""Files of every kind, data sets and iterables give the same rows; damage is named, not skipped."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miwv_fast import json_array
from miwv_fast.sources import open_source

ROWS = [
    {"instruction": 'Say \u2028 it, "twice"', "input": "", "output": "Yes\nand yes"},
    {"instruction": "Grüße", "input": "日本", "output": "ß"},
]


def values(source):
    return [row.value for row in open_source(source).rows()]


def write(folder: Path, name: str) -> Path:
    path = folder / name
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
    stem = name.removesuffix(".gz").removesuffix(".xz").removesuffix(".zst")
    if stem.endswith(".json"):
        text = json.dumps(ROWS, indent=2)
    if stem.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        return path
    if stem.endswith(".csv"):
        pyarrow.csv.write_csv(pa.Table.from_pylist(ROWS), path)
        text = path.read_text(encoding="utf-8")
    packed = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    path.write_bytes(packed.get(path.suffix, bytes)(text.encode()))
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "ndjson", "csv", "parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
def test_every_format(tmp_path, kind, compression):
    if kind == "parquet" and compression:
        with pytest.raises(ValueError, match="Parquet has its own compression"):
            values(write(tmp_path, f"rows.{kind}{compression}"))
    else:
        assert values(write(tmp_path, f"rows.{kind}{compression}")) == ROWS


def test_json_array_named_jsonl_and_lines_named_json(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS))
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert values(tmp_path / "a.jsonl") == values(tmp_path / "b.json") == ROWS


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)


@given(st.lists(json_values, max_size=6), st.integers(1, 9), st.booleans(), st.sampled_from([None, 2]))
def test_an_array_is_what_json_reads(elements, block, ascii_only, indent):
    """Wherever one block ends and the next begins: within a number, a character or an escape."""
    content = json.dumps(elements, ensure_ascii=ascii_only, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "BLOCK_BYTES", block)
        assert list(json_array.read_json_array(Path("a.json"), io.BytesIO(content))) == elements


def test_byte_order_mark(tmp_path):
    for name in ("rows.json", "rows.jsonl", "rows.csv"):
        path = write(tmp_path, name)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert values(path) == ROWS


def test_several_files_follow_each_other(tmp_path):
    paths = [write(tmp_path, "a.jsonl"), str(write(tmp_path, "b.parquet"))]
    assert values(paths) == ROWS * 2


def test_objects():
    datasets = pytest.importorskip("datasets")
    assert values(ROWS) == values(iter(ROWS)) == ROWS
    assert values(datasets.Dataset.from_list(ROWS)) == ROWS
    assert values(datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})) == ROWS
    formats = "numpy", "torch", "arrow", "pandas"
    assert [values(datasets.Dataset.from_list(ROWS).with_format(name)) for name in formats] == [ROWS] * len(formats)
    several = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in ("a", "b")})
    with pytest.raises(ValueError, match="splits a, b"):
        open_source(several)


def test_a_data_set_by_its_name(monkeypatch, caplog):
    datasets = pytest.importorskip("datasets")
    several = {name: datasets.Dataset.from_list(ROWS[:n]) for n, name in enumerate(("test", "train"), 1)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(several))
    with caplog.at_level("INFO", "miwv_fast"):
        assert values("someone/data") == ROWS
    assert "data set someone/data has the splits test, train: reading train" in caplog.text
    several["train_sft"] = several.pop("train")
    with pytest.raises(ValueError, match=r"splits test, train_sft; .*load_dataset\('someone/data', split='test'\)"):
        open_source("someone/data")

    def refuse(name):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['de', 'en']")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"\['de', 'en'\]; load it in Python: score\(datasets.load_dataset"):
        open_source("someone/data")


def test_tables():
    """Anything that gives an Arrow table, row by row; what pandas numbers rows with is no field of theirs."""
    table = pa.Table.from_pylist(ROWS)

    class Frame:
        __arrow_c_stream__ = table.__arrow_c_stream__

    assert values(table) == values(table.to_reader()) == values(Frame()) == ROWS
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    assert values(frame) == values(frame[::-1])[::-1] == ROWS
    frame.loc[1, "input"] = None
    assert values(frame) == [ROWS[0], {**ROWS[1], "input": None}]
    turns = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert values(pandas.DataFrame(turns * 2)) == turns * 2


def test_long_tables():
    rows = [{"instruction": f"{number}", "output": "a"} for number in range(3000)]
    source = open_source(pa.Table.from_pylist(rows))
    assert [(row.location, row.value) for row in source.rows()] == [(f"record {n}", row) for n, row in enumerate(rows)]


def test_tables_that_cannot_be_read():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match=r"the DataFrame cannot be read as an Arrow table: .*list of dicts"):
        open_source(pandas.DataFrame({"instruction": ["a", {"b": 1}]}))
    with pytest.raises(ValueError, match="the Table has two columns 'a'"):
        open_source(pa.table([pa.array([1]), pa.array([2])], ["a", "a"]))


def test_rows_can_be_read_again(tmp_path):
    for data in (write(tmp_path, "rows.jsonl"), iter(ROWS), pa.Table.from_pylist(ROWS)):
        source = open_source(data)
        assert list(source.rows()) == list(source.rows())
        assert source.describe() == source.describe()


def test_bad_lines_are_rows_with_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep = b"[" * 200_000
    path.write_bytes(b'{"a": 1}\n\n{"a": \n\xff\xfe{}\n' + deep + b"\n" + b"9" * 5000 + b'\n{"a": 2}\n')
    rows = list(open_source(path).rows())
    assert [row.location.rpartition(":")[2] for row in rows] == ["1", "3", "4", "5", "6", "7"]
    assert [row.error is None for row in rows] == [True, False, False, False, False, True]
    assert rows[1].text() == '{"a": ' and "column" in rows[1].error
    assert "not UTF-8 at byte 0" in rows[2].error


@pytest.mark.parametrize("text", [json.dumps(ROWS[0], indent=2), '{"a": 1,\n"b": 2}', '{"a": {"b": 1}\n}\n'])
def test_a_record_on_several_lines(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    first = next(open_source(tmp_path / "rows.json").rows())
    assert "the end of the line; a file has a record on each line, or is an array of records" in first.error


@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_with_another_separator(tmp_path, separator):
    (tmp_path / "rows.csv").write_text(separator.join(["instruction", "output"]) + "\na,b\n")
    with pytest.raises(
        ValueError, match=r"rows\.csv: the header is one column, 'instruction.*separate columns by commas"
    ):
        values(tmp_path / "rows.csv")


def test_bad_csv_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'instruction,output\na,b\nonly one\n\n"x\ny",\xff\nc,d,e\nf,g\n')
    rows = list(open_source(path).rows())
    assert [row.location.rpartition(":")[2] for row in rows] == ["2", "3", "5", "7", "8"]
    assert rows[0].value == {"instruction": "a", "output": "b"}
    assert "1 columns where the header has 2" in rows[1].error
    assert rows[2].value["output"] == "\udcff"  # rejected as a lone surrogate, and it alone
    assert "3 columns" in rows[3].error


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999)[:-20], "cannot be read to its end"),
        ("none.jsonl.gz", b"nothing", "cannot be read to its end"),
        ("none.jsonl.xz", b"nothing", "cannot be read to its end"),
        ("cut.jsonl.xz", lzma.compress(b'{"a": 1}\n' * 9999)[:-20], "cannot be read to its end"),
        ("two.jsonl.xz", lzma.compress(b"{}\n") + b"junk" + lzma.compress(b"{}\n"), "cannot be read to its end"),
        ("open.csv", b'a,b\n1,2\n3,"4\n5,6\n7,8\n', ":3: in the row that begins here a quote is never closed"),
        ("open.csv", b'\n\n"a,b\n1,2\n', ":3: in the row that begins here a quote is never closed"),
        ("none.jsonl.zst", b"nothing", "cannot be read to its end"),
        ("none.parquet", b"nothing", "cannot be read to its end"),
        ("broken.json", b"[{}, ", "not a valid JSON array"),
        ("wide.jsonl", "{}\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    """None of them loses what is behind the damage without a word."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        list(open_source(tmp_path / name).rows())


def test_streams_of_xz_follow_each_other(tmp_path):
    streams = lzma.compress(b'{"a": 1}\n' * 99999), lzma.compress(b""), lzma.compress(b'{"a": 2}\n')
    (tmp_path / "rows.jsonl.xz").write_bytes(streams[0] + bytes(8) + streams[1] + streams[2] + bytes(4))
    assert values(open_source(tmp_path / "rows.jsonl.xz")) == [{"a": 1}] * 99999 + [{"a": 2}]


def test_blank_lines_of_csv(tmp_path):
    (tmp_path / "rows.csv").write_text("\n\na,b\n\n1,2\n\n")
    assert values(open_source(tmp_path / "rows.csv")) == [{"a": "1", "b": "2"}]
    (tmp_path / "rows.csv").write_text("\n\n")
    assert values(open_source(tmp_path / "rows.csv")) == []


def test_unusable_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        open_source(tmp_path / "nothing.jsonl")
    with pytest.raises(FileNotFoundError, match="no file and no Hugging Face data set"):
        open_source("someone/no-such-data-set")
    (tmp_path / "rows.txt").write_text("")
    with pytest.raises(ValueError, match="cannot tell the format"):
        open_source(tmp_path / "rows.txt")
    with pytest.raises(ValueError, match="is a folder"):
        open_source(tmp_path)
    with pytest.raises(TypeError, match="it is int"):
        open_source(3)
    with pytest.raises(TypeError, match="it is dict"):
        open_source({"instruction": "a", "output": "b"})
