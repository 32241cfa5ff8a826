"""The whole path against an independent float64 reference, and what becomes of every record."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers

import miwv_fast
from miwv_fast.shapes import parse_record
from miwv_fast.templates import load_template
from miwv_fast.tokens import SegmentEncoder
from support import byte_level, metaspace, text_embedder, tiny_model, words

SEPARATOR = "\n\n"


def alpaca_prompt(instruction: str, text: str) -> str:
    head = "Below is an instruction that describes a task"
    ask = "Write a response that appropriately completes the request."
    if text:
        return (
            f"{head}, paired with an input that provides further context. {ask}\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{text}\n\n### Response:\n"
        )
    return f"{head}. {ask}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def pairs(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """A row of any shape as (instruction, input, response) triples."""
    if "instruction" in row:
        return [(row["instruction"], row["input"], row["output"])]
    if "prompt" in row:
        return [(row["prompt"], "", row["completion"])]
    texts = [m["content"] for m in row["messages"]] if "messages" in row else [m["value"] for m in row["conversations"]]
    return [(user, "", assistant) for user, assistant in zip(texts[::2], texts[1::2], strict=True)]


def reference_loss(model, tokenizer, demonstration, record) -> float:
    """One record, one plain forward pass, a float64 log-softmax; the segments are tokenized one by one."""
    ids: list[int] = []
    scored: list[int] = []
    chunks = ([(d, False) for d in pairs(demonstration)] if demonstration else []) + [(r, True) for r in pairs(record)]
    for number, ((instruction, text, response), is_scored) in enumerate(chunks):
        for part in ([SEPARATOR] if number else []) + [alpaca_prompt(instruction, text)]:
            ids += tokenizer(part, add_special_tokens=False).input_ids
        tokens = tokenizer(response, add_special_tokens=False).input_ids
        if is_scored:
            scored += range(len(ids), len(ids) + len(tokens))
        ids += tokens
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    losses = [torch.logsumexp(logits[p - 1], 0) - logits[p - 1, ids[p]] for p in scored]
    return float(torch.stack(losses).mean())


def reference_neighbor(rows: list[dict[str, Any]], i: int) -> int:
    texts = ["\n".join(f"{a}\n{b}" if b else a for a, b, _ in pairs(row)) for row in rows]
    unit = text_embedder(texts).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit[i]
    cosine[i] = -2
    return int(np.flatnonzero(cosine >= cosine.max() - 1e-6)[0])


def make_rows(shape: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    state = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        turns = [
            (words(state, state.randint(2, 20)), words(state, state.randint(1, 25))) for _ in range(1 + number % 3)
        ]
        if shape == "alpaca":
            text = words(state, 5) if number % 2 else ""
            rows.append({"instruction": turns[0][0], "input": text, "output": turns[0][1]})
        elif shape == "prompt":
            rows.append({"prompt": turns[0][0], "completion": turns[0][1]})
        elif shape == "messages":
            said = [m for u, a in turns for m in ({"role": "user", "content": u}, {"role": "assistant", "content": a})]
            rows.append({"messages": said})
        else:
            said = [m for u, a in turns for m in ({"from": "human", "value": u}, {"from": "gpt", "value": a})]
            rows.append({"conversations": said})
    return rows


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma2", "gemma3n"])
@pytest.mark.parametrize("shape", ["alpaca", "prompt", "messages", "conversations"])
def test_equals_the_float64_reference(architecture, shape):
    """Four architectures, since they differ in positions, in attention and in what is done to their logits."""
    tokenizer = byte_level()
    model = tiny_model(architecture, len(tokenizer))
    rows = make_rows(shape, 7)
    scores = miwv_fast.score(rows, (model, tokenizer), embedder=text_embedder, batch_tokens=700)
    wide = tiny_model(architecture, len(tokenizer)).double()
    for i, row in enumerate(scores.table.to_pylist()):
        assert row["status"] == "ok"
        assert row["neighbor"] == reference_neighbor(rows, i)
        zero = reference_loss(wide, tokenizer, None, rows[i])
        one = reference_loss(wide, tokenizer, rows[row["neighbor"]], rows[i])
        assert zero > 1 and one > 1  # far from the uniform prediction, or nothing would be tested
        assert row["nll_zero_shot"] == pytest.approx(zero, abs=1e-4)
        assert row["nll_one_shot"] == pytest.approx(one, abs=1e-4)
        assert row["miwv"] == pytest.approx(one - zero, abs=1e-4)


def test_equals_the_reference_on_smollm2_and_real_records(smollm2, minilm, real_data):
    """6 real Alpaca records, one at a time through the plain model, float64 from the logits on."""
    import lzma

    from transformers import AutoModelForCausalLM, AutoTokenizer

    with lzma.open(real_data / "alpaca_52002.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(6), strict=False)]
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    scores = miwv_fast.score(rows, (model, tokenizer), embedder=str(minilm))
    for i, row in enumerate(scores.table.to_pylist()):
        zero = reference_loss(model, tokenizer, None, rows[i])
        one = reference_loss(model, tokenizer, rows[row["neighbor"]], rows[i])
        assert row["miwv"] == pytest.approx(one - zero, abs=1e-4)


def test_padding_and_batch_size_do_not_change_scores(llama):
    rows = make_rows("alpaca", 12)
    together = miwv_fast.score(rows, llama, embedder=text_embedder, batch_tokens=100_000)
    alone = miwv_fast.score(rows, llama, embedder=text_embedder, batch_tokens=1)
    for name in ("nll_zero_shot", "nll_one_shot"):
        np.testing.assert_allclose(together.table[name], alone.table[name], atol=2e-5)
    assert alone.stats["padding_tokens"] == 0 < together.stats["padding_tokens"]


def test_running_again_is_bit_identical(llama):
    rows = make_rows("messages", 12)
    first = miwv_fast.score(rows, llama, embedder=text_embedder)
    assert first.table.equals(miwv_fast.score(rows, llama, embedder=text_embedder).table)


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
@pytest.mark.parametrize("make_tokenizer", [byte_level, metaspace])
def test_include_eos_scores_one_token_more_per_response(template, make_tokenizer):
    tokenizer = make_tokenizer()
    model = tiny_model("llama", len(tokenizer))
    rows = make_rows("messages", 6)
    options = {"embedder": text_embedder, "template": template}
    without = miwv_fast.score(rows, (model, tokenizer), **options).table["response_tokens"].to_pylist()
    with_eos = (
        miwv_fast.score(rows, (model, tokenizer), include_eos=True, **options).table["response_tokens"].to_pylist()
    )
    assert with_eos == [tokens + len(row["messages"]) // 2 for tokens, row in zip(without, rows, strict=True)]


class TestStatuses:
    """Every record has one row, and a reason where it has no score."""

    ROWS = (
        {"instruction": "Name three colors.", "input": "", "output": "red, blue, three", "id": "a"},
        {"instruction": " ", "input": "", "output": "red"},
        {"instruction": "Name three colors.", "input": "", "output": " \n"},
        {"instruction": 3, "input": "", "output": "red"},
        {"instruction": "Name two colors.", "input": "", "output": "red, blue"},
    )

    def test_each_record_has_its_row(self, llama):
        scores = miwv_fast.score(self.ROWS, llama, embedder=text_embedder)
        table = scores.table.to_pydict()
        assert table["index"] == [0, 1, 2, 3, 4]
        assert table["id"] == ["a", None, None, None, None]
        assert table["status"] == ["ok", "empty_instruction", "empty_response", "malformed", "ok"]
        assert table["neighbor"] == [4, None, None, None, 0]
        for name in ("miwv", "nll_one_shot", "nll_zero_shot", "response_tokens", "similarity"):
            assert [value is None for value in table[name]] == [False, True, True, True, False]
        assert set(scores.rank()[:2]) == {0, 4} and scores.rank()[2:].tolist() == [1, 2, 3]

    def lengths(self, llama, rows):
        """Tokens of the zero-shot prompt and response of each row under the `plain` template."""
        _, tokenizer = llama
        count = lambda text: len(tokenizer(text).input_ids)  # noqa: E731
        return [(count(f"User: {row['instruction']}\nAssistant:\n"), count(row["output"])) for row in rows]

    def test_truncation_cuts_the_response_equally_in_both_passes(self, llama):
        rows = [
            {"instruction": "Name three colors.", "input": "", "output": "red and blue and three"},
            {"instruction": "Name two colors.", "input": "", "output": "red, blue, red, blue, red, blue and red"},
        ]
        (prompt_0, response_0), (prompt_1, response_1) = self.lengths(llama, rows)
        limit = prompt_1 + response_1 + len(llama[1](SEPARATOR).input_ids) + prompt_0 + 5
        assert limit > prompt_0 + response_0  # the zero-shot pass alone would have room for all of it
        full = miwv_fast.score(rows, llama, embedder=text_embedder, template="plain")
        cut = miwv_fast.score(rows, llama, embedder=text_embedder, template="plain", max_length=limit)
        assert cut.table["status"][0].as_py() == "truncated"
        assert cut.table["response_tokens"][0].as_py() == 5 < full.table["response_tokens"][0].as_py()
        short = [{**rows[0], "output": llama[1].decode(llama[1](rows[0]["output"]).input_ids[:5])}, rows[1]]
        expected = miwv_fast.score(short, llama, embedder=text_embedder, template="plain")
        for name in ("nll_zero_shot", "nll_one_shot", "miwv"):
            assert cut.table[name][0].as_py() == pytest.approx(expected.table[name][0].as_py(), abs=2e-5)

    def test_a_cut_response_is_a_whole_demonstration(self, llama):
        """The cut changes which tokens are scored, never the text used as a demonstration."""
        rows = [
            {"instruction": "Name three colors.", "input": "", "output": "red and blue and three " * 4},
            {"instruction": "Name three colors!", "input": "", "output": "x"},
        ]
        (prompt_0, response_0), (prompt_1, response_1) = self.lengths(llama, rows)
        separator = len(llama[1](SEPARATOR).input_ids)
        limit = prompt_0 + response_0 + separator + prompt_1 + response_1
        rows[0]["output"] += " and so on" * 9
        cut = miwv_fast.score(rows, llama, embedder=text_embedder, template="plain", max_length=limit)
        assert cut.table["status"].to_pylist() == ["truncated", "demonstration_too_long"]

    def test_too_long(self, llama):
        rows = [*self.ROWS[::4], {"instruction": "Name colors. " * 40, "input": "", "output": "red"}]
        limit = self.lengths(llama, rows)[2][0]
        table = miwv_fast.score(
            rows, llama, embedder=text_embedder, template="plain", max_length=limit
        ).table.to_pydict()
        assert table["status"] == ["ok", "ok", "too_long"]
        assert table["neighbor"] == [1, 0, None]  # what has no room for itself demonstrates nothing
        assert table["miwv"][2] is None

    def test_a_response_that_the_tokenizer_drops_is_empty(self):
        tokenizer = byte_level()
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
        rows = [*self.ROWS[::4], {"instruction": "Name no colors.", "output": "\u200b"}]
        model = tiny_model("llama", len(tokenizer))
        table = miwv_fast.score(rows, (model, tokenizer), embedder=text_embedder).table
        assert table["status"].to_pylist() == ["ok", "ok", "empty_response"]

    def test_no_neighbor(self, llama, caplog):
        embeddings = np.array([[0, 0], [1, 0], [0, 0], [0, 1], [1, 1], [0.5, np.nan]], np.float32)
        rows = [{"instruction": f"Name {n} colors.", "input": "", "output": "red"} for n in range(6)]
        rows[0]["output"] = ""
        table = miwv_fast.score(rows, llama, embedder=embeddings).table.to_pydict()
        assert table["status"] == ["empty_response", "ok", "no_neighbor", "ok", "ok", "no_neighbor"]
        for place in (2, 5):
            assert table["miwv"][place] is None and table["neighbor"][place] is None and place not in table["neighbor"]
        (told,) = [line for line in caplog.messages if "zero or not finite" in line]
        assert told == "2 embeddings are zero or not finite: these records have no neighbour, the first is record 2"

    def test_non_finite(self, llama):
        """A model that gives NaN for one token: that record alone has no score, and NaN is never written."""
        _, tokenizer = llama
        model = tiny_model("llama", len(tokenizer))
        token = tokenizer("Z").input_ids[0]
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = float("nan")
        rows = [{"instruction": f"Name {n} colors.", "input": "", "output": "red, blue"} for n in range(6)]
        rows[2]["output"] = "red Z blue"
        embeddings = np.eye(6, dtype=np.float32) + np.eye(6, k=-1, dtype=np.float32)
        table = miwv_fast.score(rows, (model, tokenizer), embedder=embeddings).table.to_pydict()
        used = [i for i in range(6) if table["neighbor"][i] == 2]
        assert [i for i in range(6) if table["status"][i] == "non_finite"] == sorted([2, *used])
        assert all((value is None) == (i in (2, *used)) for i, value in enumerate(table["miwv"]))
        assert None not in table["response_tokens"]  # which were scored, to no end


class TestUnusable:
    """Clear errors of the documented types."""

    ROWS = ({"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"})

    def test_one_record(self, llama):
        with pytest.raises(ValueError, match="at least two records"):
            miwv_fast.score(self.ROWS[:1], llama, embedder=text_embedder)

    def test_nothing_scorable_says_what_there_is(self, llama):
        rows = [*self.ROWS[:1], {"instruction": "", "output": "b"}, {"instruction": "c", "output": 1}]
        with pytest.raises(ValueError, match="1 scorable, 1 empty_instruction, 1 malformed; record 2: 'output'"):
            miwv_fast.score(rows, llama, embedder=text_embedder)

    def test_tokens_that_the_model_does_not_know(self):
        tokenizer = byte_level()
        template = load_template("plain", tokenizer)
        highest = max(int(template.zero_shot(parse_record(row)).ids.max()) for row in self.ROWS)
        options = {"embedder": text_embedder, "template": "plain"}
        with pytest.raises(ValueError, match=f"gives token {highest}, but the model knows {highest}: do they belong"):
            miwv_fast.score(self.ROWS, (tiny_model("llama", highest), tokenizer), **options)
        scores = miwv_fast.score(self.ROWS, (tiny_model("llama", highest + 1), tokenizer), **options)
        assert scores.counts() == {"ok": 2}

    @pytest.mark.parametrize(
        "options, error, message",
        [
            ({"template": "alpacca"}, ValueError, "unknown template"),
            ({"embedder": np.ones((5, 3))}, ValueError, r"expected \[2, D\]"),
            ({"neighbors": 0}, ValueError, "neighbors should be at least 1"),
            ({"max_length": 1}, ValueError, "max_length should be at least 2"),
            ({"max_length": "long"}, TypeError, "max_length"),
            ({"max_length": 10**6}, ValueError, "1024 positions"),
            ({"batch_tokens": 0}, ValueError, "batch_tokens"),
            ({"batch_tokens": 1.5}, TypeError, "batch_tokens"),
            ({"device": "gpu"}, ValueError, "unknown device"),
            ({"dtype": "int8"}, ValueError, "unknown dtype"),
            ({"progress": "yes"}, ValueError, "progress"),
            ({"template": None}, TypeError, "template should be .*, it is None"),
            ({"device": None}, TypeError, "device should be .*, it is None"),
            ({"output": 5}, TypeError, "output should be .*, it is 5"),
            ({"resume": "no"}, TypeError, "resume should be True or False, it is 'no'"),
            ({"include_eos": 1}, TypeError, "include_eos should be True or False"),
            ({"share_prefix": None}, TypeError, "share_prefix should be True or False"),
        ],
    )
    def test_arguments(self, llama, options, error, message):
        with pytest.raises(error, match=message):
            miwv_fast.score(self.ROWS, llama, **{"embedder": text_embedder, **options})

    def test_numbers_of_numpy_are_numbers(self, llama, tmp_path):
        options = {"embedder": text_embedder, "output": tmp_path / "run"}
        numbers = {"neighbors": np.int64(1), "max_length": np.int32(200), "batch_tokens": np.int64(64)}
        rows = make_rows("alpaca", 4)
        scored = miwv_fast.score(rows, llama, **numbers, **options)
        again = miwv_fast.score(rows, llama, neighbors=1, max_length=200, batch_tokens=64, **options)
        assert scored.table.equals(again.table)
        assert again.stats["resumed_tokens"] > 0

    @pytest.fixture
    def score(self, monkeypatch):
        """Scoring that fails where it comes to the model."""
        monkeypatch.setattr("miwv_fast.scorer.LocalEngine", lambda *_: pytest.fail("the model was loaded"))
        return lambda **options: miwv_fast.score(self.ROWS, "no/such-model", embedder=text_embedder, **options)

    def test_output_that_cannot_be_written(self, score, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="file is a file; give a folder"):
            score(output=tmp_path / "file")
        with pytest.raises(ValueError, match=r"lies in .*file, which is a file"):
            score(output=tmp_path / "file" / "new" / "run")
        with pytest.raises(ValueError, match="holds other files than a run"):
            score(output=tmp_path)
        with pytest.raises(ValueError, match="output is the empty text; give a folder or a URL"):
            score(output="")
        monkeypatch.setattr("os.access", lambda *_: False)  # a superuser may write everywhere
        with pytest.raises(PermissionError, match=f"{tmp_path} cannot be written to"):
            score(output=tmp_path / "new" / "run")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize(
        "source, message",
        [
            ("{% if %}", "in line 1"),
            ("{% macro prompt(instruction, input) %}{{ instruction }}\n{% endmacro %}", "no separator"),
            (
                "{% set separator = '' %}{% macro prompt(instruction, input) %}{{ instruction | upper }}\n"
                "{% endmacro %}",
                "it changes the instruction",
            ),
        ],
    )
    def test_template_that_cannot_be_used(self, score, tmp_path, source, message):
        (tmp_path / "own.jinja").write_text(source)
        with pytest.raises(ValueError, match=message):
            score(template=tmp_path / "own.jinja")


class TestSharedPrefixes:
    """Running a record behind the kept keys and values of its demonstration changes nothing but the cost."""

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma2", "gemma3n"])
    @pytest.mark.parametrize("shape", ["alpaca", "messages"])
    def test_same_scores_for_fewer_tokens(self, architecture, shape):
        tokenizer = byte_level()
        model = tiny_model(architecture, len(tokenizer))
        rows = make_rows(shape, 25)
        options = {"embedder": text_embedder, "include_eos": True, "batch_tokens": 800}
        shared = miwv_fast.score(rows, (model, tokenizer), **options)
        plain = miwv_fast.score(rows, (model, tokenizer), share_prefix=False, **options)
        for name in ("nll_zero_shot", "nll_one_shot"):
            np.testing.assert_allclose(shared.table[name], plain.table[name], atol=2e-5)
        assert shared.table.drop(["miwv", "nll_zero_shot", "nll_one_shot"]).equals(
            plain.table.drop(["miwv", "nll_zero_shot", "nll_one_shot"])
        )
        assert shared.stats["forwarded_tokens"] < 0.75 * plain.stats["forwarded_tokens"]

    @pytest.mark.parametrize("neighbors", [1, 3])
    @pytest.mark.parametrize("shape", ["alpaca", "messages"])
    def test_behind_a_demonstration_that_a_chat_template_rewrites(self, shape, neighbors):
        """Its own sequence is of no use to others, but what they have in common is run once."""
        tokenizer = self.rewriting()
        model, rows = tiny_model("llama", len(tokenizer)), make_rows(shape, 12)
        options = {"embedder": text_embedder, "template": "chat", "neighbors": neighbors}
        shared = miwv_fast.score(rows, (model, tokenizer), **options)
        plain = miwv_fast.score(rows, (model, tokenizer), share_prefix=False, **options)
        for name in ("nll_zero_shot", "nll_one_shot"):
            np.testing.assert_allclose(shared.table[name], plain.table[name], atol=2e-5)
        assert shared.stats["forwarded_tokens"] < (0.95, 0.85)[neighbors > 1] * plain.stats["forwarded_tokens"]

    def test_what_one_demonstrations_passes_begin_with_is_run_once(self):
        tokenizer = self.rewriting()
        model, rows = tiny_model("llama", len(tokenizer)), make_rows("alpaca", 5)
        embeddings = np.concatenate([np.ones((1, 4)), np.eye(4)])  # the first is the nearest of all others
        options = {"embedder": embeddings, "template": "chat"}
        shared = miwv_fast.score(rows, (model, tokenizer), **options)
        plain = miwv_fast.score(rows, (model, tokenizer), share_prefix=False, **options)
        assert shared.table["neighbor"].to_pylist() == [1, 0, 0, 0, 0]
        template = load_template("chat", tokenizer)
        first, *others = map(parse_record, rows)
        passes = [template.one_shot(first, other) for other in others]
        columns = zip(*(each.ids[: each.rows[0]].tolist() for each in passes), strict=False)
        common = [tokens[0] for tokens in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns)]
        assert SegmentEncoder(tokenizer).decode(common).count(first.turns[0].response) == 1
        saved = 3 * len(common)
        assert shared.stats["forwarded_tokens"] == plain.stats["forwarded_tokens"] - saved

    def rewriting(self):
        tokenizer = byte_level()
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{{ '<think>' if loop.last and m.role == 'assistant' }}{{ m.content }}<|im_end|>\n{% endfor %}"
        )
        return tokenizer

    def test_a_record_that_has_no_score_still_demonstrates(self, llama):
        """Its own demonstration leaves it no room, yet others continue it: it is run, and not scored."""
        rows = [
            {"instruction": "Name three colors.", "input": "", "output": "red"},
            {"instruction": "Name three colors!", "input": "", "output": "red, blue, three and the others"},
            {"instruction": "Name three colors?", "input": "", "output": "red"},
        ]
        embeddings = np.array([[1, 0], [1, 0.1], [1, 0.25]], np.float32)
        prompt, response = (len(llama[1](text).input_ids) for text in ("User: Name three colors.\nAssistant:\n", "red"))
        limit = 2 * prompt + response + 4
        options = {"embedder": embeddings, "template": "plain", "max_length": limit}
        shared = miwv_fast.score(rows, llama, **options)
        assert shared.table["neighbor"].to_pylist() == [1, 0, 1]
        plain = miwv_fast.score(rows, llama, share_prefix=False, **options)
        assert shared.table["status"].to_pylist() == plain.table["status"].to_pylist()
        for a, b in zip(shared.table["miwv"].to_pylist(), plain.table["miwv"].to_pylist(), strict=True):
            assert (a is None) == (b is None) and (a is None or a == pytest.approx(b, abs=2e-5))


def test_several_demonstrations_are_scored_one_at_a_time(llama):
    """The mean and the spread over k runs, each with one of the k demonstrations."""
    rows, n = make_rows("alpaca", 9), 9
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(n, 5)).astype(np.float32)
    together = miwv_fast.score(rows, llama, embedder=embeddings, neighbors=3).table.to_pydict()
    tokenizer = llama[1]
    wide = tiny_model("llama", len(tokenizer)).double()
    for i in range(n):
        cosine = embeddings @ embeddings[i] / np.linalg.norm(embeddings, axis=1)
        cosine[i] = -np.inf
        assert together["neighbors"][i] == np.argsort(-cosine)[:3].tolist()
        assert together["neighbor"][i] == together["neighbors"][i][0]
        zero = reference_loss(wide, tokenizer, None, rows[i])
        scores = [reference_loss(wide, tokenizer, rows[j], rows[i]) - zero for j in together["neighbors"][i]]
        assert together["miwv"][i] == pytest.approx(np.mean(scores), abs=1e-4)
        assert together["miwv_spread"][i] == pytest.approx(np.std(scores), abs=1e-4)


def test_a_demonstration_without_room_is_left_out_of_several(llama):
    rows = [{"instruction": f"Name {n} colors.", "input": "", "output": "red"} for n in range(4)]
    rows[3]["output"] = "red and blue and three " * 20
    embeddings = np.array([[1, 0], [1, 0.2], [1, 0.3], [1, 0.1]], np.float32)
    options = {"embedder": embeddings, "template": "plain", "neighbors": 2, "max_length": 110}
    table = miwv_fast.score(rows, llama, **options).table.to_pydict()
    assert table["neighbors"][0] == [1] and table["neighbor"][0] == 1 and table["status"][0] == "ok"
    assert table["similarity"][0] == pytest.approx(1 / np.hypot(1, 0.2), abs=1e-6)
    alone = miwv_fast.score(rows[:3], llama, embedder=embeddings[:3], template="plain").table
    assert table["miwv"][0] == pytest.approx(alone["miwv"][0].as_py(), abs=2e-5)
    assert table["miwv_spread"][0] == 0


def test_demonstrations_that_all_leave_no_room_are_told(llama):
    rows = [{"instruction": f"Name {n} colors.", "input": "", "output": "red"} for n in range(3)]
    length = len(load_template("plain", llama[1]).zero_shot(parse_record(rows[0])).ids)
    options = {"embedder": np.array([[1, 0], [1, 0.2], [1, 0.5]]), "template": "plain", "max_length": length + 1}
    table = miwv_fast.score(rows, llama, neighbors=2, **options).table.to_pydict()
    assert table["status"] == ["demonstration_too_long"] * 3
    assert table["neighbors"] == [[1, 2], [0, 2], [1, 0]] and table["neighbor"] == [1, 0, 1]


class TestOutOfMemory:
    """The budget is halved, the work retried, nothing lost."""

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("no"),
            # What torch says on a CPU.
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you"
            ),
        ],
    )
    def test_budget_is_halved(self, llama, monkeypatch, caplog, error):
        from miwv_fast.model import CausalLM

        rows = [{"instruction": f"Name {n} colors", "output": f"red, {n % 7} and blue"} for n in range(30)]
        expected = miwv_fast.score(rows, llama, embedder=text_embedder)
        run = CausalLM._run
        refused = []

        def small(self, sequences, *rest):
            if len(sequences) > 3:
                refused.append(len(sequences))
                raise error
            return run(self, sequences, *rest)

        monkeypatch.setattr(CausalLM, "_run", small)
        scores = miwv_fast.score(rows, llama, embedder=text_embedder)
        assert refused and "out of memory: going on with batches of" in caplog.text
        np.testing.assert_allclose(scores.table["miwv"], expected.table["miwv"], atol=4e-5)
        assert scores.stats["forwarded_tokens"] == expected.stats["forwarded_tokens"]

    def test_a_sequence_that_never_fits_is_named(self, llama, monkeypatch):
        from miwv_fast.model import CausalLM

        run = CausalLM._run

        def never(self, sequences, *rest):
            if max(len(sequence.ids) for sequence in sequences) > 20:
                raise torch.OutOfMemoryError("no")
            return run(self, sequences, *rest)

        monkeypatch.setattr(CausalLM, "_run", never)
        with pytest.raises(MemoryError, match="one sequence alone"):
            miwv_fast.score(make_rows("alpaca", 3), llama, embedder=text_embedder)

    def test_other_errors_are_not_swallowed(self, llama, monkeypatch):
        from miwv_fast.runner import Runner

        run = Runner.run

        def broken(self, *arguments):
            self.lm.response_nll = lambda *_, **options: torch.ones(2) @ torch.ones(3)
            return run(self, *arguments)

        monkeypatch.setattr(Runner, "run", broken)
        with pytest.raises(RuntimeError, match="inconsistent tensor size"):
            miwv_fast.score(make_rows("alpaca", 3), llama, embedder=text_embedder)
