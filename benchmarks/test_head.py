"""Losses from hidden states and the output head against the product alone, and linear layers.

    pytest benchmarks/test_head.py --benchmark-columns=min,median,rounds
    MIWV_RESULTS=benchmarks/results/head_cpu.json pytest benchmarks/test_head.py -q

H = 576 and V = 49,152, as SmolLM2 has them, and a head of 2,048 x 128,256. Siblings of one shape: `product`, hidden
states times the head into memory that is there already; `cross_entropy`, torch's product and loss; `ours`. Of layers in
float32 `torch` is `torch.nn.functional.linear`, `ours` what models run on (`ops.matmul`), where that is another. Times
are CPU seconds of one thread, the best of the rounds.
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
from miwv_fast.ops.matmul import linear, uses_onednn

SHAPES = [(49152, 576, tokens) for tokens in (16, 128, 512, 2048)] + [(128256, 2048, 256)]
LAYERS = [(1536, 576), (576, 1536), (2048, 2048), (8192, 2048)]
SIBLINGS = ["product", "cross_entropy", "ours"]  # ours comes last, to be compared with the others

_times: dict[str, dict[str, float]] = {}
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
    best = measure(benchmark, call)
    if sibling == "ours":
        expected = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
        assert (call() - expected).abs().max() < 1e-4
    shape = {"vocab": vocab, "hidden_size": width, "tokens": tokens, "dtype": str(dtype)[6:]}
    note(benchmark, shape, sibling, best, ns_per_logit=round(best / tokens / vocab * 1e9, 3))


@pytest.mark.parametrize("sibling", ["torch", "ours"])
@pytest.mark.parametrize("tokens", [16, 64, 256, 1024])
@pytest.mark.parametrize(("outputs", "inputs"), LAYERS)
def test_layer(benchmark: Any, outputs: int, inputs: int, tokens: int, sibling: str) -> None:
    if not uses_onednn():
        pytest.skip("on this CPU linear layers are torch's own")
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(tokens, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    multiply = {"torch": F.linear, "ours": linear}[sibling]
    benchmark.group = f"layer {inputs} to {outputs} tokens={tokens}"
    best = measure(benchmark, lambda: multiply(x, weight))
    exact, most = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    # A rounding for each term, in any order.
    assert ((multiply(x, weight) - exact).abs() <= inputs * torch.finfo(torch.float32).eps * most).all()
    shape = {"layer": [inputs, outputs], "tokens": tokens, "dtype": "float32"}
    note(benchmark, shape, sibling, best, gflops=round(2 * tokens * inputs * outputs / best / 1e9))


def measure(benchmark: Any, call: Callable[[], Any]) -> float:
    seconds = []

    def timed() -> None:
        begin = time.process_time()
        call()
        seconds.append(time.process_time() - begin)

    benchmark.pedantic(timed, rounds=9, warmup_rounds=1)
    return min(seconds[1:])


def note(benchmark: Any, shape: dict[str, Any], sibling: str, best: float, **rate: float) -> None:
    times = _times.setdefault(json.dumps(shape), {})
    times[sibling] = best
    row = {**shape, "name": sibling, "cpu_ms": round(best * 1e3, 3), **rate}
    if sibling == "ours":
        row |= {f"over_{name}": round(best / other, 3) for name, other in times.items() if name != "ours"}
    benchmark.extra_info.update(row)
    _rows.append(row)
