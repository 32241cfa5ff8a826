"""What a call costs beside its rows: one row of eight logits, past torch's dispatcher and through it.

    pytest benchmarks/test_calls.py --benchmark-columns=min,median,rounds
    MIWV_RESULTS=benchmarks/results/calls_cpu.json pytest benchmarks/test_calls.py -q

`floor` is an empty tensor from torch, which every call makes for its result.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import processor
from miwv_fast import ops

LOGITS, TARGETS, OFFSETS = torch.randn(1, 8), torch.tensor([3]), torch.tensor([0, 1])
CALLS: dict[str, Callable[[], Any]] = {
    "floor": lambda: LOGITS.new_empty(1, dtype=torch.float32),
    "token_logprobs": lambda: ops.token_logprobs(LOGITS, TARGETS),
    "token_logprobs, operator": lambda: torch.ops.miwv_fast.token_logprobs.default(LOGITS, TARGETS),
    "response_nll": lambda: ops.response_nll(LOGITS, TARGETS, OFFSETS),
    "response_nll, operator": lambda: torch.ops.miwv_fast.response_nll.default(LOGITS, TARGETS, OFFSETS),
}
_rows: list[dict[str, Any]] = []


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured to the file that MIWV_RESULTS names."""
    yield
    if path := os.environ.get("MIWV_RESULTS"):
        header = {
            "command": f"MIWV_RESULTS={path} pytest {shlex.join(sys.argv[1:])}",
            "date": time.strftime("%Y-%m-%d"),
            "device": processor(),
            "torch": torch.__version__,
            "table": _rows,
        }
        Path(path).write_text(json.dumps(header, indent=1) + "\n")


@pytest.mark.parametrize("name", CALLS)
def test_call(benchmark: Any, name: str) -> None:
    benchmark.group = "one row of eight logits"
    benchmark.pedantic(CALLS[name], rounds=200, iterations=200, warmup_rounds=5)
    stats = benchmark.stats.stats
    _rows.append({"call": name, "min_us": round(stats.min * 1e6, 3), "median_us": round(stats.median * 1e6, 3)})
    if name.startswith("token_logprobs"):
        expected = torch.log_softmax(LOGITS.double(), -1)[0, 3]
        assert abs(CALLS[name]().item() - expected.item()) < 1e-5
