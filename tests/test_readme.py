"""What the README and the examples show works as it is shown."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer

import miwv_fast
from miwv_fast.cli import app
from support import text_embedder
from test_ops_arguments import cases
from test_scorer import make_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(llama, tmp_path, monkeypatch):
    """In one session, top to bottom, with a tiny model in place of one from the hub."""
    rows = [{**row, "source": "ab"[number % 2]} for number, row in enumerate(make_rows("alpaca", 200))]
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    score, explain = miwv_fast.score, miwv_fast.explain
    monkeypatch.setattr(miwv_fast, "score", lambda data, model: score(data, llama, embedder=text_embedder))
    monkeypatch.setattr(miwv_fast, "explain", lambda record, neighbor, model: explain(record, neighbor, llama))
    names: dict[str, object] = {"logits": torch.randn(2, 5, 7), "labels": torch.tensor([[-100, 1, 2, 3, 4]] * 2)}
    code = [text for language, text in BLOCKS if language == "python"]
    assert code
    for text in code:
        exec(compile(text, "README.md", "exec"), names)
    assert (tmp_path / "scores.parquet").exists()


COMMANDS = [
    line
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if line.split("/")[-1].startswith("miwv-fast ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line):
    _, name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


def test_wrong_arguments_are_as_many_as_it_says():
    (told,) = re.findall(r"\(`tests/test_ops_arguments\.py`\) \| (\d+) \|", README)
    assert int(told) == len(list(cases()))


def test_rank_by_perplexity(llama, tmp_path, monkeypatch, capsys):
    """The example's losses are those of the model's own loss function, one pair at a time."""
    example = runpy.run_path(str(ROOT / "examples" / "rank_by_perplexity.py"))
    model, tokenizer = llama
    pairs = [(row["prompt"], row["completion"]) for row in make_rows("prompt", 11)]
    losses = example["response_losses"](pairs, model, tokenizer)
    for pair, loss in zip(pairs, losses.tolist(), strict=True):
        ids, _, labels = example["make_batch"]([pair], tokenizer)
        with torch.no_grad():
            expected = float(model(input_ids=ids, labels=labels).loss)
        assert loss == pytest.approx(expected, rel=1e-5)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt, "response": text}) + "\n" for prompt, text in pairs))
    monkeypatch.setattr(sys, "argv", ["rank_by_perplexity.py", str(data), "--model", str(tmp_path / "model")])
    example["main"]()
    printed = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 11 and printed == sorted(printed, reverse=True)
