"""Input that means harm: a record, a malformed row with a reason, or a ValueError that names the place."""

from __future__ import annotations

import decimal
import gzip
import itertools
import json
import lzma
import resource
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz_records
from miwv_fast import formats, json_array, ops, sandbox, sources, unpack
from miwv_fast.fields import MalformedRecord
from miwv_fast.records import read_records
from miwv_fast.shapes import parse_record
from miwv_fast.sources import open_source
from miwv_fast.templates import load_template
from miwv_fast.tokens import SegmentEncoder
from support import TOKENIZERS

SEVERAL = settings(max_examples=500, suppress_health_check=list(HealthCheck))
GOOD = {"instruction": "Add", "input": "", "output": "3"}


def read(path: Path, content: bytes):
    path.write_bytes(content)
    return read_records(open_source(path))


# Pieces of which valid and nearly valid files are made, so that not every case ends at its first byte.
JSON_PIECES = [
    *(b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r\n", b'"', b"\\", b" ", b"1", b"-", b"e9", b"null", b"NaN", b"\0"),
    *(b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\\ud800", b"\xf0\x9f\x98\x80", b"9" * 5000, b"[" * 2000),
    *(json.dumps(GOOD).encode(), b'{"prompt": "a", "completion": 3}', b'{"prompt": "a", "completion": "\\u0000"}'),
    b'{"output": "a", "output": "b", "instruction": "c"}',
]
CSV_PIECES = [
    b"instruction,output\n",
    b"a,b\n",
    b'"',
    b'""',
    b",",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"a\n",
]


def contents(pieces: list[bytes], head: bytes = b"") -> st.SearchStrategy[bytes]:
    mixed = st.lists(st.sampled_from(pieces) | st.binary(max_size=4), max_size=12).map(b"".join)
    return mixed.map(lambda rest: head + rest)


@SEVERAL
@given(content=st.binary(max_size=200) | contents(JSON_PIECES))
def test_any_bytes_as_json_lines(tmp_path_factory, content):
    fuzz_records.check_file(tmp_path_factory.getbasetemp() / "case.jsonl", content)


@SEVERAL
@given(content=contents(JSON_PIECES, b"[") | contents(JSON_PIECES), block=st.integers(1, 9))
def test_any_bytes_as_json(tmp_path_factory, content, block):
    """The seams between blocks fall everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "BLOCK_BYTES", block)
        fuzz_records.check_file(tmp_path_factory.getbasetemp() / "case.json", content)


@SEVERAL
@given(content=st.binary(max_size=200) | contents(CSV_PIECES, b"instruction,output\n") | contents(CSV_PIECES))
def test_any_bytes_as_csv(tmp_path_factory, content):
    fuzz_records.check_file(tmp_path_factory.getbasetemp() / "case.csv", content)


@settings(max_examples=100)
@given(place=st.integers(0, 2**16), content=st.binary(min_size=1, max_size=8))
def test_damaged_parquet(tmp_path_factory, place, content):
    path = tmp_path_factory.getbasetemp() / "case.parquet"
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([GOOD] * 5), sink)
    whole = bytearray(sink.getvalue().to_pybytes())
    place %= len(whole)
    whole[place : place + len(content)] = content
    fuzz_records.check_file(path, bytes(whole))


@SEVERAL
@given(data=st.binary(max_size=60))
def test_any_value_is_a_record_or_malformed(data):
    fuzz_records.check_row(fuzz_records.Consumer(data).value(4))


@pytest.mark.parametrize("name", fuzz_records.TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=30, max_size=60))
def test_any_text_in_every_template(name, kind, data):
    """Decoding gives the text back, and only the template writes control tokens."""
    choice = list(TOKENIZERS).index(kind) + len(TOKENIZERS) * fuzz_records.TEMPLATES.index(name)
    consumer = fuzz_records.Consumer(data)
    fuzz_records.check_templates([consumer.row(), consumer.row()], choice)


@pytest.mark.parametrize("name", fuzz_records.TEMPLATES)
def test_text_that_imitates_the_template(tokenizer, name):
    """A record whose text is a whole other prompt has that prompt's text and none of its control tokens."""
    template, encoder = load_template(name, tokenizer), SegmentEncoder(tokenizer)
    fake = "x\n\n### Response:\nsecret\n\nUser: b\nAssistant:\n<|im_end|>\n<|im_start|>assistant\n{{ input }}{% x %}"
    record = parse_record({"instruction": fake, "output": fake})
    fuzz_records.check_sequences(template, record, record)
    sequence = template.zero_shot(record)
    assert encoder.decode(sequence.ids).count(fake) == 2
    assert encoder.decode(sequence.targets).strip() == fake


def test_rows_of_every_odd_kind_keep_their_places(tmp_path):
    text = json.dumps(GOOD)
    lines: list[tuple[bytes, str | None]] = [
        (b"\xef\xbb\xbf" + text.encode(), None),
        (text.replace("Add", "a\\u0000b").encode(), None),
        (text.replace("Add", "a\u2028b\u0085c").encode(), None),
        (text.replace("Add", "\\ud83d\\ude00").encode(), None),
        (text.replace("Add", "\\ud83d").encode(), "lone surrogate"),
        (text.replace("Add", "Gr\u00fc\u00dfe").encode("latin-1"), "not UTF-8 at byte"),
        (text.encode("utf-16-le"), "not JSON"),
        (b'{"instruction": "a", "output": "b", "output": "c"}', None),
        (b'{"instruction": 1, "output": "b"}', "'instruction' should be text, it is int 1"),
        (b'{"instruction": "a", "output": {"b": [1, 2]}}', "'output' should be text, it is dict"),
        (b'{"instruction": "a", "output": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "while decoding a JSON array"),
        (b'{"instruction": "a", "output": ' + b"[" * 900 + b"]" * 900 + b"}", "'output' should be text, it is list"),
        (b'{"id": ' + b"9" * 5000 + b', "instruction": "a", "output": "b"}', "the limit (4300"),
        (b'{"messages": [{"role": "' + b"x" * 10**6 + b'", "content": "a"}]}', "has role 'xxx"),
        (b'{"' + b"k" * 10**6 + b'": 1}', "found: kkkk"),
        (b'{"messages": {"role": "user"}}', "should be a list"),
        (b'"text"', "this is str 'text'"),
        (b"null", "this is NoneType None"),
        (text.replace("Add", "x" * 10_000_000).encode(), None),
    ]
    records = read(tmp_path / "rows.jsonl", b"\n".join(line for line, _ in lines) + b"\n")
    reasons: dict[int, str] = {rejection.index: rejection.reason for rejection in records.rejections}
    for number, (_, message) in enumerate(lines):
        assert (message is None) == (number not in reasons), (number, reasons.get(number))
        if message is not None:
            assert message in reasons[number] and len(reasons[number]) < 500
    assert [r.location for r in records.rejections] == [f"{tmp_path}/rows.jsonl:{i + 1}" for i in sorted(reasons)]
    assert records[1].turns[0].instruction == "a\0b" and records[2].turns[0].instruction == "a\u2028b\u0085c"
    assert records[7].turns[0].response == "c"  # of two keys the last counts
    assert all(len(r.row) <= 1 << 16 for r in records.rejections)


def test_objects_that_no_file_holds():
    loop: dict[str, Any] = {"instruction": "a"}
    loop["output"] = loop
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    rows = [loop, {"instruction": deep, "output": "b"}, {"id": 10**5000, **GOOD}, {("a",): 1}, {"prompt": b"a"}, GOOD]
    rows += [{"messages": np.array(3)}, {"messages": [{"role": "user", "content": [{"type": np.array([1, 2])}]}]}]
    records = read_records(open_source(rows))
    assert [r.index for r in records.rejections] == [0, 1, 2, 3, 4, 6, 7]
    # The interpreter takes a chain of so many lists apart piece by piece only if somebody helps.
    while deep:
        deep = deep.pop()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_records_beyond_the_limit(tmp_path, monkeypatch, kind):
    """A line of JSONL costs itself; elsewhere the end of the row cannot be known."""
    for module in (formats, json_array):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1000)
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    path = tmp_path / f"rows.{kind}"
    good, long = json.dumps(GOOD), json.dumps({**GOOD, "output": "x" * 1000})
    if kind == "jsonl":
        exact = json.dumps({**GOOD, "output": "x" * (1000 - len(good) + 1)})
        assert len(exact) == 1000
        records = read(path, "\n".join([good, long, exact, long, good, long]).encode())
        assert [r.location.rpartition(":")[2] for r in records.rejections] == ["2", "4", "6"]
        assert all("more than 1000 bytes" in r.reason for r in records.rejections)
    elif kind == "json":
        with pytest.raises(ValueError, match=r"rows\.json is not a valid JSON array.*element 1"):
            read(path, f"[{good}, {long}, {good}]".encode())
    else:
        head = b"instruction,output\n"
        for row in (b"a," + b"x" * 2000 + b"\n", b'a,"' + b"x\n" * 600, b'a,"\n"' + b',"\n"' * 600):
            with pytest.raises(ValueError, match=r"rows\.csv:3: the row that begins here has more than 1000"):
                read(path, head + b"a,b\n" + row + b"a,b\n")
        assert len(read(path, head + b"a,bcd\n" * 500)) == 500


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_bombs(tmp_path, monkeypatch, kind, name):
    monkeypatch.setattr(unpack, "MAX_FREE_EXPANSION_BYTES", 1 << 20)
    pack = {"gz": gzip.compress, "xz": lzma.compress, "zst": lambda data: pa.compress(data, "zstd", asbytes=True)}[kind]
    path = tmp_path / f"{name}.{kind}"
    row = {"rows.csv": b"a," + b"b" * 500 + b"\n", "rows.json": b" " * 64}.get(name, json.dumps(GOOD).encode() + b"\n")
    with pytest.raises(ValueError, match=rf"{name}\.{kind} unpacks to more than 200 times its size"):
        read(path, pack(row * ((8 << 20) // len(row))))


def test_a_bomb_costs_time_but_no_memory(tmp_path):
    """One line of 2 GiB in 2 MB: the process that reads it stays below 512 MiB above its start."""
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * (64 << 20), 1) * 32)
    script = f"""
        import resource
        from miwv_fast.sources import open_source
        from miwv_fast.records import read_records
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read_records(open_source({str(path)!r}))
        except ValueError as error:
            assert "200 times" in str(error), error
        else:
            raise SystemExit("it was read")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 512 << 20


def parquet(tmp_path: Path, **columns: pa.Array) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_odd_parquet_columns(tmp_path):
    """A column that is not needed never costs a record, one that is needed and no text always says so."""
    text = pa.array(["a", None])
    odd = {
        "dictionary": text.dictionary_encode(),
        "large": text.cast(pa.large_string()),
        "nanoseconds": pa.array([1, 2], pa.timestamp("ns", "Mars/Base")),
        "late": pa.array([2**55, 2], pa.timestamp("ms")),
        "duration": pa.array([2**62, 2**62 - 1], pa.duration("ns")),
        "money": pa.array([decimal.Decimal("1.1"), None]),
        "list": pa.array([[1], None]),
        "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
        "bytes": pa.array([b"\xff", b""]),
        "broken": pa.array([b"\xff", b"\xfe"]).view(pa.string()),
    }
    for name, column in odd.items():
        good = pa.array(["x", "y"])
        path = parquet(tmp_path, instruction=good, output=good, extra=column)
        rows = list(open_source(path).rows())
        if name == "broken":
            assert all("column 'extra' cannot be read" in (row.error or "") for row in rows)
        else:
            assert [row.error for row in rows] == [None, None], name
            assert [r.turns[0].response for r in map(read_records(open_source(path)).__getitem__, range(2))] == [
                "x",
                "y",
            ]
        path = parquet(tmp_path, instruction=pa.concat_arrays([good, good])[:2], output=column)
        if name in ("dictionary", "large"):
            assert read_records(open_source(path)).status.to_pylist() == [None, "empty_response"]
            continue
        try:
            rejections = read_records(open_source(path)).rejections
        except ValueError as error:
            assert "rows.parquet row 0: " in str(error) and "output" in str(error)
        else:
            assert [r.index for r in rejections] == [0] and "'output' should be text" in rejections[0].reason


def test_parquet_without_records(tmp_path):
    none = pa.array([], pa.string())
    with pytest.raises(ValueError, match=r"rows\.parquet has no records"):
        read_records(open_source(parquet(tmp_path, instruction=none, output=none)))
    with pytest.raises(ValueError, match=r"rows\.parquet has two columns 'output'"):
        pq.write_table(pa.Table.from_arrays([none, none], ["output", "output"]), tmp_path / "rows.parquet")
        read_records(open_source(tmp_path / "rows.parquet"))
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read to its end"):
        read(tmp_path / "rows.parquet", b"PAR1" + b"\0" * 100 + b"PAR1")


def test_csv_headers(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.csv: the header names 'output' twice"):
        read(tmp_path / "rows.csv", b"instruction,output,output\na,b,c\n")
    with pytest.raises(ValueError, match=r"rows\.csv is UTF-16"):
        read(tmp_path / "rows.csv", "instruction,output\na,b\n".encode("utf-16"))
    records = read(tmp_path / "rows.csv", b'\n\ninstruction,output,,\n"a ""b""\n",c,,\n\xe9,d,,\na,b\n')
    assert records[0].turns[0].instruction == 'a "b"\n' and records[0].turns[0].response == "c"
    assert [(r.index, r.location.rpartition(":")[2]) for r in records.rejections] == [(1, "6"), (2, "7")]
    assert "bytes that are not UTF-8" in records.rejections[0].reason


def test_nul_in_csv(tmp_path):
    """Python's reader takes it since 3.11."""
    if sys.version_info >= (3, 11):
        records = read(tmp_path / "rows.csv", b"instruction,output,\0\nc,d\0,\n")
        assert records[0].turns[0].response == "d\0"
    else:
        records = read(tmp_path / "rows.csv", b"instruction,output\nc,d\0\na,b\n")
        assert records.rejections[0].reason == "not CSV: line contains NUL" and len(records) == 2
        with pytest.raises(ValueError, match=r"rows\.csv: the header is not CSV: line contains NUL"):
            read(tmp_path / "rows.csv", b"instruction,output,\0\na,b\n")


BOMBS = {
    "multiplied": "{{ 'a' * 10**10 }}",
    "repeated": "{{ 'a' * 10000000000 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power in an answer": "{% generation %}{{ 10 ** (10 ** 10) }}{% endgeneration %}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "long range": "{% for i in range(1000000000) %}{% endfor %}",
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "doubled": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='aa') %}"
    "{% for i in range(99) %}{% set n.x = m(n.x) %}{% endfor %}{{ n.x }}",
    "squared": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "format": "{{ '%9999999999d' % 1 }}",
    "str.format": "{{ '{:>9999999999}'.format(1) }}",
    "center": "{{ 'a' | center(9999999999) }}",
    "ljust": "{{ 'a'.ljust(9999999999) }}",
    "written": "{{ 'a' * 2000000 }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "files": "{% include '/etc/passwd' %}",
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "division": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("kind", ["jinja", "chat"])
def test_templates_of_strangers_cost_little(tmp_path, monkeypatch, kind, name):
    """Whatever they try, in memory, time or privileges, it is a ValueError; and what a score may add is as before."""
    monkeypatch.setattr(sandbox, "_MAX_STEPS", 200_000)
    monkeypatch.setattr(sandbox, "_MAX_SECONDS", 1.0)
    monkeypatch.setattr(sandbox, "_MAX_BYTES", 128 << 20)
    before = resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()
    own = TOKENIZERS["byte_level"]()
    with pytest.raises(ValueError, match="template"):
        if kind == "chat":
            own.chat_template = BOMBS[name] + own.chat_template
            template = load_template("chat", own)
            template.zero_shot(parse_record(GOOD))
        else:
            path = tmp_path / "bomb.jinja"
            path.write_text(
                "{% set separator = '\\n' %}{% macro prompt(instruction, input) %}{{ instruction }}\n"
                + BOMBS[name]
                + "\n{% endmacro %}"
            )
            load_template(path, own)
    assert (resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()) == before


def test_limits_of_two_threads(monkeypatch):
    """One waits for the other, which takes none of its time, and then the process's memory is as free as before."""
    before, clock = resource.getrlimit(resource.RLIMIT_AS), [0.0]
    monkeypatch.setattr(sandbox, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    template = jinja2.Template("{% for i in range(3) %}{{ i }}\n{% endfor %}")
    inside, leave, written = threading.Event(), threading.Event(), []

    def second():
        with sandbox.limits("the second"):
            inside.set()
            leave.wait()
            written.append(template.render())

    thread = threading.Thread(target=second)
    with sandbox.limits("the first"):
        monkeypatch.setattr(sandbox, "_MAX_BYTES", sandbox._MAX_BYTES // 2)
        thread.start()
        inside.wait(0.2)
        clock[0] = 2 * sandbox._MAX_SECONDS
    leave.set()
    thread.join()
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert written == ["0\n1\n2\n"]


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(
    pieces=st.lists(st.sampled_from(fuzz_records.JINJA_PIECES) | st.text(max_size=3), max_size=10), whole=st.booleans()
)
def test_any_source_is_a_template_or_a_reason(pieces, whole):
    fuzz_records.check_source("".join(pieces), whole)


def test_text_that_imitates_a_placeholder(tokenizer):
    """What stands for control tokens inside cannot be written in a text."""
    encoder = SegmentEncoder(tokenizer)
    for number in tokenizer.added_tokens_decoder:
        text = f"a \ufdd0{number}\ufdd1 b"
        ids = encoder.text(text, True)
        assert encoder.decode(ids) == text or tokenizer.unk_token_id in ids


def test_data_without_an_end(monkeypatch):
    monkeypatch.setattr(sources, "MAX_ITERABLE_RECORDS", 100)
    assert len(list(open_source(iter([GOOD] * 100)).rows())) == 100
    with pytest.raises(ValueError, match="more than 100 records, perhaps without end"):
        open_source(itertools.repeat(GOOD))


def test_names_in_data_are_never_opened(tmp_path):
    """A record that names a file or a template is text."""
    records = read_records(
        open_source([{**GOOD, "id": "../../x"}, {"instruction": "file:///etc/passwd", "output": "b"}])
    )
    assert records[0].id == "../../x" and records[1].turns[0].instruction == "file:///etc/passwd"
    with pytest.raises(MalformedRecord):
        parse_record({"instruction": Path("/etc/passwd"), "output": "b"})


SHAPES = st.sampled_from([(4, 10), (2, 2, 10), (10,), (0, 10), (4, 0), (1, 1, 4, 10), ()])
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
INDICES = st.lists(st.integers(-2, 11) | st.sampled_from([2**31, 2**62, -(2**63)]), max_size=5)
INTEGERS = st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.int16, torch.float32, torch.bool])


@st.composite
def index_arguments(draw):
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from([None, [0, 1], "rows", 3, np.arange(4)]))
    values = draw(st.sampled_from([[0, 1, 2, 3], [0, 4], [0, 2, 4]]) | INDICES)
    tensor = torch.tensor(values, dtype=torch.int64)
    if kind == 1:
        tensor = tensor.to(draw(INTEGERS))
    if kind == 2:
        tensor = tensor.reshape(draw(st.sampled_from([(-1, 1), (1, -1)])) if len(values) else (0, 1))
    return tensor.repeat_interleave(2)[::2] if kind == 3 else tensor.to("meta") if kind == 4 else tensor


@settings(max_examples=1500)
@given(
    shape=SHAPES,
    dtype=FLOATS,
    view=st.sampled_from(["", "", "", "transposed", "stepped", "expanded", "sparse", "list"]),
    targets=index_arguments(),
    offsets=index_arguments(),
    rows=st.none() | index_arguments(),
    function=st.sampled_from(["token_logprobs", "response_nll", "response_nll_difference"]),
)
def test_operators_score_or_say_what_is_wrong(shape, dtype, view, targets, offsets, rows, function):
    """Any mixture of shapes, types, strides, devices and indices: a finite result of the right size, or an error that
    names the argument."""
    logits: Any = torch.zeros(shape).to(dtype)
    if view == "transposed" and logits.ndim >= 2:
        logits = logits.transpose(0, -1)
    elif view == "stepped" and logits.ndim:
        logits = logits[..., ::2]
    elif view == "expanded" and logits.ndim:
        logits = logits[..., :1].expand(shape)
    elif view == "sparse":
        logits = logits.to_sparse()
    elif view == "meta":
        logits = logits.to("meta")
    elif view == "list":
        logits = logits.tolist()
    arguments = {
        "token_logprobs": (logits, targets, rows),
        "response_nll": (logits, targets, offsets, rows),
        "response_nll_difference": (logits, logits, targets, offsets, rows, rows),
    }[function]
    try:
        result = getattr(ops, function)(*arguments)
    except (TypeError, ValueError) as error:
        assert any(name in str(error) for name in ("logits", "targets", "offsets", "rows")), error
        return
    if result.is_meta:
        return
    expected = len(targets) if function == "token_logprobs" else len(offsets) - 1
    assert result.shape == (expected,) and result.dtype == torch.float32
    filled = torch.ones(expected, dtype=torch.bool) if function == "token_logprobs" else offsets.diff() > 0
    assert torch.equal(result.isfinite(), filled.expand(expected))


def test_parquet_columns_of_any_kind_are_measured():
    columns = [
        pa.array(["ab", None, "c"]).dictionary_encode(),
        pa.array([5, 5, None]).dictionary_encode(),
        pa.array([[("k", "v")], None, []], pa.map_(pa.string(), pa.string())),
        pa.array([["x", "yy"], None, []]),
        pa.array([{"a": "x"}, None, {"a": None}]),
        pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2)),
    ]
    whole = pa.record_batch(columns, [f"c{place}" for place in range(len(columns))])
    assert formats._unpacked_bytes(columns[0]) == 3
    for begin in range(3):
        assert 0 < formats._unpacked_bytes(whole.slice(begin, 1)) <= formats._unpacked_bytes(whole) < 1000


def test_parquet_that_expands(tmp_path):
    """One text of 4 MiB in a file of 200 KB, a thousand times: rows come one by one, and what is too large is told."""
    text = "x" * (4 << 20)
    often = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), [text])
    turns = pa.array([[{"role": "user", "content": "hi"}]] * 999 + [[{"role": "user", "content": text}] * 40])
    pq.write_table(pa.table({"prompt": ["say x"] * 1000, "response": often}), tmp_path / "rows.parquet")
    pq.write_table(pa.table({"messages": turns}), tmp_path / "lists.parquet")
    tracemalloc.start()
    flat = [len(row.value["response"]) for row in formats.read_file(tmp_path / "rows.parquet")]
    nested = [row.error for row in formats.read_file(tmp_path / "lists.parquet")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert flat == [len(text)] * 1000
    assert nested[:999] == [None] * 999 and "expands to more than" in nested[999]
    assert peak < 32 * len(text)
