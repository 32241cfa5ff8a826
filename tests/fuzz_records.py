"""Hostile bytes through reading and tokenizing records, and through templates; a script, not collected by pytest.

    python tests/fuzz_records.py --seconds 240

Every case must give a record, a malformed row with a reason, or a ValueError that names the file. With atheris (Linux)
the search is guided by coverage, where the package is installed plainly: the loader of an editable install cannot be
instrumented. Without it bytes are mutated blindly. Other arguments go to libFuzzer: `-runs=1000000`.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import logging
import os
import random
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    try:
        import atheris
    except ImportError:
        atheris = None
else:
    atheris = None

with atheris.instrument_imports(include=["miwv_fast"]) if atheris else nullcontext():
    import miwv_fast.json_array
    from miwv_fast.fields import MalformedRecord
    from miwv_fast.records import read_records
    from miwv_fast.shapes import Record, Turn, parse_record
    from miwv_fast.sources import open_source
    from miwv_fast.templates import PairTemplate, Template, load_template
    from miwv_fast.tokens import SegmentEncoder
    from support import TOKENIZERS

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
TEMPLATES = ("alpaca", "plain", "chat")
KEYS = (
    *("instruction", "input", "output", "prompt", "completion", "response", "messages", "conversations"),
    *("system", "history", "context", "id", "role", "from", "content", "value", "type", "text", "\ud800", ""),
    *("question", "answer", "query", "problem", "solution", "conversation", "system_prompt"),
    *("inputs", "targets", "definition", "generated_solution", "data"),
)
TEXTS = (
    *("", " ", "\n", "a", "\0", "\ud800", "\u2028", "\ufeff", "\ufdd00\ufdd1", "😀", "e\u0301", "x" * 300, "0"),
    *("user", "assistant", "human", "gpt", "system", "tool", "text", "<|im_end|>", "<|im_start|>user\n", "<think>"),
    *("</s>", "<s>", "### Response:\n", "\n\nUser: ", "{{ instruction }}", "{% for x in y %}", "../../etc/passwd"),
)
JINJA_PIECES = (
    *("{{", "}}", "{%", "%}", "{#", "#}", "-%}", " ", "\n", "(", ")", "[", "]", "'", '"', "|", "~", "*", "**", "%"),
    *("instruction", "input", "prompt", "loop", "range(9)", "namespace(a=1)", "self", "caller()", "''.join", "a"),
    *("{% if a %}", "{% for a in 'ab' %}", "{% endfor %}", "{% endif %}", "{% set a = 1 %}", "{{ instruction }}\n"),
    *("{% macro prompt(instruction, input) %}", "{% endmacro %}", "{% set separator = 'x' %}", "{% raw %}"),
    *("\ufdd00\ufdd1", ".__class__", "|join", "|format", "|map('upper')", "{% include 'a' %}", "{% break %}"),
)
SEEDS = (
    b'\x00{"instruction": "a", "input": "", "output": "b"}\n\n{"prompt": "\\ud800", "completion": "b"}\n[1]\n',
    b'\x00{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\r\n{"id": 1e999}',
    b'\x01[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, -1.5e3, "x", null]',
    b'\x02instruction,input,output\n"a\n""b""",,c\nd,e\n',
    b"\x03PAR1",
    bytes([4, 2, 0, 3, 3, 2, 3, 1, 1, 3, 23]),
    bytes([5, 0, 2, 0, 3, 3, 2, 3, 23, 1, 3, 26]),
    bytes([7, 1, 25, 7, 0, 7, 22, 7, 1, 7]),
)


def check_case(data: bytes, folder: Path) -> None:
    """One case: the first byte says what the others are."""
    kind, rest = (data[0] if data else 0) % 8, data[1:]
    if kind < 4:
        check_file(folder / f"case{SUFFIXES[kind]}", rest)
    elif kind < 6:
        check_row(Consumer(rest).value(3))
    elif kind == 7:
        consumer = Consumer(rest)
        whole = consumer.byte() % 2 == 1
        check_source("".join(consumer.piece() for _ in range(len(rest))), whole)
    else:
        consumer = Consumer(rest)
        rows = [consumer.row(), consumer.row()]
        check_templates(rows, consumer.byte())


def check_file(path: Path, content: bytes) -> None:
    """Reads a file as rows and as records; both agree with each other and with a plain reading of the content."""
    path.write_bytes(content)
    try:
        rows = list(open_source(path).rows())
    except ValueError as error:
        assert str(path) in str(error), error
        assert path.suffix != ".jsonl" or not plain_rows(path, content), error
        rows = None
    expected = plain_rows(path, content)
    if expected is not None:
        assert rows is not None
        assert [row.value if row.error is None else None for row in rows] == expected or has_nan(expected)
        assert len(rows) == len(expected)
    try:
        records = read_records(open_source(path))
    except ValueError as error:
        assert str(path) in str(error), error
        return
    assert rows is not None and len(records) == len(rows)
    statuses = records.status.to_pylist()
    assert sum(status == "malformed" for status in statuses) == len(records.rejections)
    for rejection in records.rejections:
        assert rejection.reason and rejection.location.startswith(str(path)) and statuses[rejection.index]
        f"{rejection.reason} {rejection.row}".encode()
    for number, status in enumerate(statuses):
        if status != "malformed":
            check_record(records[number])


def plain_rows(path: Path, content: bytes) -> list[Any] | None:
    """The rows of small, well-behaved content by the shortest possible reader, None for a bad row; else None."""
    if path.suffix == ".parquet" or content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return None
    content = content.removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".csv":
        text = content.decode(errors="surrogateescape")
        try:
            header, *rows, last = filter(None, csv.reader(io.StringIO(text + "\nlast", newline="")))
        except (ValueError, csv.Error):
            return None
        if len(set(header)) < len(header) or last != ["last"]:  # within a quote that is never closed
            return None
        if len(header) == 1 and set(header[0]) & set(";\t"):  # separated by something else
            return None
        return [dict(zip(header, row, strict=True)) if len(row) == len(header) else None for row in rows]
    if content.lstrip().startswith(b"["):
        try:
            value = json.loads(content.decode())
        except (ValueError, RecursionError):
            return None
        return value if None not in value else None
    values = []
    for line in content.split(b"\n"):
        if line.strip():
            try:
                values.append(json.loads(line.rstrip(b"\r").decode()))
            except (ValueError, RecursionError):
                values.append(None)
    return values


def has_nan(values: object) -> bool:
    return "nan" in repr(values)


def check_row(value: object) -> None:
    """A value is a record or malformed, with a short reason that can be written."""
    try:
        record = parse_record(value)
    except MalformedRecord as error:
        reason = str(error)
        assert reason and len(reason.encode()) < 2000, reason
        return
    check_record(record)


def check_record(record: Record) -> None:
    """Everything in a record is text that can be encoded."""
    assert record.turns
    texts = [record.id or "", record.system, record.embedded_text]
    for text in itertools.chain(texts, *((turn.instruction, turn.input, turn.response) for turn in record.turns)):
        text.encode()


_templates: dict[tuple[str, str], Template] = {}


def check_templates(rows: list[dict[str, Any]], choice: int) -> None:
    """Token sequences give the text back, write control tokens where the template does, and extend one another."""
    try:
        demonstration, record = map(parse_record, rows)
    except MalformedRecord:
        return
    tokenizers = list(TOKENIZERS)
    key = (tokenizers[choice % len(tokenizers)], TEMPLATES[choice // len(tokenizers) % len(TEMPLATES)])
    if key not in _templates:
        _templates[key] = load_template(key[1], TOKENIZERS[key[0]]())
    check_sequences(_templates[key], demonstration, record)


def check_sequences(template: Template, demonstration: Record, record: Record) -> None:
    """The rules that hold for every pair of records, whatever their text."""
    encoder = template.encoder
    zero, one = template.zero_shot(record), template.one_shot(demonstration, record)
    assert zero.targets.tolist() == one.targets.tolist()
    controls = set(encoder.tokenizer.added_tokens_decoder)
    assert not controls & set(zero.targets.tolist())
    same = record.system == demonstration.system
    blank = [neutral(demonstration, "x"), neutral(record, "x" if same else "y")]
    for sequence, plain in ((zero, template.zero_shot(blank[1])), (one, template.one_shot(*blank))):
        written = [[token for token in ids.tolist() if token in controls] for ids in (sequence.ids, plain.ids)]
        assert written[0] == written[1]
    texts = [turn.response for turn in record.turns] + [turn.instruction for turn in record.turns]
    if any("\u2581" in text for text in [*texts, record.system, demonstration.embedded_text]):
        return  # SentencePiece writes a blank so: it cannot be given back
    whole = encoder.decode(one.ids)
    for text in texts:
        assert text in whole
    assert whole.endswith(record.turns[-1].response)


def check_source(source: str, whole: bool) -> None:
    """A source is a template, or there is a reason why not."""
    if whole:
        source = "{% set separator = 'x' %}{% macro prompt(instruction, input) %}" + source + "{% endmacro %}"
    record = Record(0, None, "", (Turn("a", "b", "c"),))
    try:
        template = PairTemplate("case", source, _encoder(), include_eos=False)
        sequence = template.one_shot(record, record)
    except ValueError as error:
        assert "template case" in str(error), error
        return
    assert sequence.targets.tolist() == template.zero_shot(record).targets.tolist()


@cache
def _encoder() -> SegmentEncoder:
    return SegmentEncoder(TOKENIZERS["byte_level"]())


def neutral(record: Record, system: str) -> Record:
    """The same record with nothing but letters where there is text."""
    turns = tuple(
        Turn("x" if turn.instruction else "", "x" if turn.input else "", "x" if turn.response else "")
        for turn in record.turns
    )
    return Record(record.index, record.id, system if record.system else "", turns)


class Consumer:
    """Bytes as decisions, in the manner of libFuzzer's data provider; 0 when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def piece(self) -> str:
        """A piece of a template's source, or a letter."""
        choice = self.byte()
        return JINJA_PIECES[choice % len(JINJA_PIECES)] if choice < 224 else chr(choice - 128)

    def text(self) -> str:
        pieces = []
        for _ in range(self.byte() % 4):
            choice = self.byte()
            if choice < 128:
                pieces.append(TEXTS[choice % len(TEXTS)])
            else:
                pieces.append(chr((self.byte() << 8 | self.byte()) * (1 + choice % 16) % 0x110000))
        return "".join(pieces)

    def value(self, depth: int) -> Any:
        kind = self.byte() % 10
        if depth and kind < 4:
            return {KEYS[self.byte() % len(KEYS)]: self.value(depth - 1) for _ in range(self.byte() % 5)}
        if depth and kind < 6:
            return [self.value(depth - 1) for _ in range(self.byte() % 5)]
        if kind < 8:
            return self.text()
        others = (None, True, 0, -1.5, float("nan"), 10**5000, b"\xff", (), {1, 2}, [[[[[]]]]], {("a",): 1})
        return others[self.byte() % len(others)]

    def row(self) -> dict[str, Any]:
        """A record of one shape or another, most often a good one."""
        shape = self.byte() % 3
        if shape == 0:
            return {"instruction": self.text(), "input": self.text(), "output": self.text()}
        if shape == 1:
            return {"prompt": self.text(), "completion": self.text()}
        messages = [{"role": "system", "content": self.text()}] if self.byte() % 2 else []
        for _ in range(1 + self.byte() % 3):
            messages += [{"role": "user", "content": self.text()}, {"role": "assistant", "content": self.text()}]
        return {"messages": messages}


def mutations(random_state: random.Random) -> Any:
    """Cases without guidance: seeds with bytes changed, cut, repeated and joined."""
    while True:
        data = bytearray(random_state.choice(SEEDS))
        for _ in range(random_state.randrange(8)):
            place = random_state.randrange(len(data) + 1)
            change = random_state.randrange(4)
            if change == 0:
                data[place:place] = bytes(random_state.randrange(256) for _ in range(random_state.randrange(6)))
            elif change == 1:
                del data[place : place + random_state.randrange(6)]
            elif change == 2:
                data[place:place] = data[place // 2 : place]
            else:
                data[place : place + 1] = random_state.choice(b'"\\{}[],:\n\r\0\xff').to_bytes(1, "big")
        yield bytes(data) if random_state.random() < 0.7 else bytes([6]) + random_state.randbytes(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments, others = parser.parse_known_args()
    logging.disable(logging.WARNING)
    # Small blocks put the seams of the reader everywhere.
    miwv_fast.json_array.BLOCK_BYTES = 16
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        if atheris is None:
            end, count = time.monotonic() + arguments.seconds, 0
            for count, data in enumerate(mutations(random.Random(arguments.seed)), start=1):  # noqa: B007
                check_case(data, Path(folder))
                if time.monotonic() > end:
                    break
            print(f"{count} cases, unguided")
            return
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(SEEDS):
            (corpus / str(number)).write_bytes(seed)
        options = [f"-max_total_time={arguments.seconds}", f"-seed={arguments.seed + 1}", "-max_len=600"]
        atheris.Setup([sys.argv[0], *options, *others, str(corpus)], lambda data: check_case(data, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
