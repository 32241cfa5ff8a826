"""What a bug report gets, and the benchmark that a user runs."""

from __future__ import annotations

import json

import pytest
import torch

import miwv_fast
from miwv_fast import bench, ops


def test_info_is_json_and_names_what_matters():
    told = json.loads(json.dumps(miwv_fast.info()))
    assert told["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert told["kernels"]["isa"] in told["kernels"]["available_isas"]
    assert "datasets" in told["extras"]["datasets"] and "test" not in told["extras"]
    assert told["cpu"]["cores"] >= 1 and told["cpu"]["name"]


def test_functions_are_not_hidden_by_the_modules_of_their_names():
    import miwv_fast.explain
    import miwv_fast.info

    assert callable(miwv_fast.info) and callable(miwv_fast.explain)


def test_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(bench, "VOCABS", (1000,))
    monkeypatch.setattr(bench, "ROWS", {"cpu": 16})
    monkeypatch.setattr(bench, "_SECONDS", 0.0)
    threads = torch.get_num_threads()
    bench.show_benchmark()
    lines = capsys.readouterr().out.splitlines()[3:]
    assert len(lines) == 2 * len({1, threads}) and all(line.count("x") == 3 for line in lines)
    assert torch.get_num_threads() == threads


def test_benchmark_of_wrong_kernels_times_nothing(monkeypatch):
    monkeypatch.setattr(ops, "token_logprobs", lambda logits, targets: torch.zeros(len(targets)))
    monkeypatch.setattr(bench, "ROWS", {"cpu": 16})
    with pytest.raises(RuntimeError, match="wrong result"):
        next(bench.benchmark_rows("cpu"))
