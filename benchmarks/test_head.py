"""Losses from hidden states and the output head against the product alone.

    pytest benchmarks/test_head.py --benchmark-columns=min,median,rounds
    MIWV_RESULTS=benchmarks/results/head_cpu.json pytest benchmarks/test_head.py -q

H = 576 and V = 49,152, as SmolLM2 has them, and a head of 2,048 x 128,256. Siblings of one shape: `product`, hidden
states times the head into memory that is there already; `cross_entropy`, torch's product and loss; `ours`. Times are
CPU seconds of one thread, the best of the rounds.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from command_line import processor
from miwv_fast import ops

SHAPES = [(49152, 576, tokens) for tokens in (16, 128, 512, 2048)] + [(128256, 2048, 256)]
SIBLINGS = ["product", "cross_entropy", "ours"]  # ours comes last, to be compared with the others

_times: dict[tuple[Any, ...], dict[str, float]] = {}
_rows: list[dict[str, Any]] = []


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured to the file that MIWV_RESULTS names."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if path := os.environ.get("MIWV_RESULTS"):
        header = {
            "command": f"MIWV_RESULTS={path} pytest {shlex.join(sys.argv[1:])}",
            "date": time.strftime("%Y-%m-%d"),
            "device": processor(),
            "isa": ops.build_info()["isa"],
            "torch": torch.__version__,
            "python": platform.python_version(),
            "table": _rows,
        }
        Path(path).write_text(json.dumps(header, indent=1) + "\n")


@pytest.mark.parametrize("sibling", SIBLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab", "width", "tokens"), SHAPES)
def test_head(benchmark: Any, vocab: int, width: int, tokens: int, dtype: torch.dtype, sibling: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    offsets = torch.arange(tokens + 1)
    out = torch.empty(tokens, vocab, dtype=dtype)
    call: Callable[[], Any] = {
        "product": lambda: torch.mm(hidden, weight.T, out=out),
        "cross_entropy": lambda: F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none"),
        "ours": lambda: ops.linear_response_nll(hidden, weight, targets, offsets),
    }[sibling]
    benchmark.group = f"{dtype} V={vocab} H={width} tokens={tokens}"
    seconds = []

    def timed() -> None:
        begin = time.process_time()
        call()
        seconds.append(time.process_time() - begin)

    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
    if sibling == "ours":
        expected = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
        assert (call() - expected).abs().max() < 1e-4
    shape = {"vocab": vocab, "hidden_size": width, "tokens": tokens, "dtype": str(dtype)[6:]}
    times = _times.setdefault(tuple(shape.values()), {})
    times[sibling] = best = min(seconds[1:])
    row = {
        **shape,
        "name": sibling,
        "cpu_ms": round(best * 1e3, 3),
        "ns_per_logit": round(best / tokens / vocab * 1e9, 3),
    }
    if sibling == "ours":
        row |= {f"over_{name}": round(best / other, 3) for name, other in times.items()}
    benchmark.extra_info.update(row)
    _rows.append(row)
