"""CPU row kernel against torch and against a plain read of the same bytes.

    pytest benchmarks/test_cpu_rows.py --benchmark-columns=min,median,rounds
    MIWV_RESULTS=benchmarks/results/cpu_rows.json pytest benchmarks/test_cpu_rows.py -q
    python benchmarks/test_cpu_rows.py benchmarks/results/cpu_rows.json     prints the tables of a result

Siblings of one shape: `ours`; `cross_entropy` in chunks of 8 rows, whose output stays in the cache; `log_softmax` of
all rows and a gather; `read`, a sum of the bytes that `ours` must read. Where only some rows are scored, torch has to
copy them first and that is part of its time. Inputs move through half a gigabyte from call to call, so that a call
finds none of them in the cache, but for the shapes named `cached`. Times are the best of at least five rounds: other
work on a shared machine can only add to them. malloc is told to keep what torch frees, otherwise page faults double its
time.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miwv_fast import _core, ops
from miwv_fast.bench import cross_entropy, keep_freed_memory, log_softmax, make_pool, read, supply_logits
from miwv_fast.info import cpu_name

VOCABS = [32000, 50257, 128256, 151936, 262144]
DTYPES = [torch.float32, torch.bfloat16]
ELEMENTS = 512 * max(VOCABS)
SIBLINGS = ["read", "cross_entropy", "log_softmax", "ours"]  # ours comes last, to be compared with the others
# One row is a decoding step, 16 rows a short response, 512 a batch, larger than the last-level cache. A density below
# one scores some of the rows, as a response mask does. A single row also stands in the cache, where the head left it.
ROWS = [(1, 1.0, True)]
ROWS += [(rows, density, False) for rows in (1, 16, 512) for density in (1.0, 0.5, 0.1) if rows > 1 or density == 1]
SHAPES = [(d, t, v, *r) for d in DTYPES for t in (1, 2) for v in VOCABS for r in ROWS]

_times: dict[tuple[Any, ...], dict[str, float]] = {}
_speed: list[dict[str, Any]] = []
_accuracy: list[dict[str, Any]] = []


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    """Writes what was measured to the file that MIWV_RESULTS names."""
    threads, isa = torch.get_num_threads(), _core.isa()
    keep_freed_memory()
    yield
    torch.set_num_threads(threads)
    _core.select_isa(isa)
    if path := os.environ.get("MIWV_RESULTS"):
        header = {
            "command": f"MIWV_RESULTS={path} pytest {shlex.join(sys.argv[1:])}",
            "real_time_priority": os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR),
            "date": time.strftime("%Y-%m-%d"),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "isa": isa,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        }
        lines = [f'"{name}": [\n{_lines(rows)}\n]' for name, rows in (("speed", _speed), ("accuracy", _accuracy))]
        Path(path).write_text(json.dumps(header, indent=0)[:-2] + ",\n" + ",\n".join(lines) + "\n}\n")


def _lines(rows: list[dict[str, Any]]) -> str:
    return ",\n".join(json.dumps(row) for row in rows)


executors: dict[int, ThreadPoolExecutor] = {}
_pool: dict[torch.dtype, torch.Tensor] = {}


def pool(dtype: torch.dtype) -> torch.Tensor:
    if dtype not in _pool:
        _pool.clear()
        _pool[dtype] = make_pool(dtype, ELEMENTS)
    return _pool[dtype]


@pytest.mark.parametrize("sibling", SIBLINGS)
@pytest.mark.parametrize(
    ("dtype", "threads", "vocab", "rows", "density", "cached"),
    SHAPES,
    ids=[f"{str(d)[6:]}-{t}t-V{v}-{r}rows-{p:g}{'-cached' * c}" for d, t, v, r, p, c in SHAPES],
)
def test_rows(
    benchmark: Any, dtype: torch.dtype, threads: int, vocab: int, rows: int, density: float, cached: bool, sibling: str
) -> None:
    torch.set_num_threads(threads)
    next_logits = supply_logits(pool(dtype), rows, vocab, cached)
    count = max(1, round(rows * density))
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randperm(rows, generator=generator)[:count].sort().values if count < rows else None
    targets = torch.randint(vocab, (count,), generator=generator)
    which = list(range(rows)) if chosen is None else chosen.tolist()
    executor = executors.setdefault(threads, ThreadPoolExecutor(threads))
    call: Callable[[torch.Tensor], Any] = {
        "read": lambda logits: read(executor, logits, which, threads),
        "cross_entropy": lambda logits: cross_entropy(logits, targets, chosen),
        "log_softmax": lambda logits: log_softmax(logits, targets, chosen),
        "ours": lambda logits: ops.token_logprobs(logits, targets, chosen),
    }[sibling]
    start = time.perf_counter()
    call(next_logits())
    rounds = int(min(200, max(5, 0.2 / (time.perf_counter() - start))))
    benchmark.group = f"{dtype} V={vocab} rows={rows} density={density:g} cached={cached} threads={threads}"
    benchmark.pedantic(call, setup=lambda: ((next_logits(),), {}), rounds=rounds, warmup_rounds=1)

    if sibling == "ours":
        logits = next_logits()
        own, torchs = ops.token_logprobs(logits, targets, chosen), -log_softmax(logits.float(), targets, chosen)
        assert (own - torchs).abs().max() < 1e-4
    seconds = benchmark.stats.stats.min
    shape = {
        "dtype": str(dtype)[6:],
        "threads": threads,
        "vocab": vocab,
        "rows": rows,
        "density": density,
        "cached": cached,
    }
    times = _times.setdefault(tuple(shape.values()), {})
    times[sibling] = seconds
    row = {
        **shape,
        "name": sibling,
        "microseconds": round(seconds * 1e6, 2),
        "ns_per_element": round(seconds / (count * vocab) * 1e9, 4),
        "gb_per_s": round(count * vocab * dtype.itemsize / seconds / 1e9, 2),
        "bytes": count * vocab * dtype.itemsize,
        "rounds": rounds,
    }
    if sibling == "ours":
        for name, other in times.items():
            row[f"{name}_over_ours"] = round(other / seconds, 3)
        # What the second thread gains, us and a plain read, which gains no more than memory has left.
        alone = _times.get((shape["dtype"], 1, vocab, rows, density, cached), {})
        for name, other in (("ours", seconds), ("read", times.get("read"))):
            row[f"{name}_gain"] = round(alone[name] / other, 3) if threads > 1 and name in alone and other else None
    benchmark.extra_info.update(row)
    _speed.append(row)


def distributions(vocab: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(vocab)
    dominated = torch.randn(8, vocab)
    dominated[torch.arange(8), torch.arange(8) * (vocab // 8)] += torch.linspace(5, 60, 8)
    return {
        "typical": torch.randn(8, vocab) * 3,
        "one dominates": dominated,
        "uniform": torch.linspace(-1, 1, 8)[:, None].expand(8, vocab).contiguous(),
        "heavy-tailed": torch.tan((torch.rand(8, vocab) - 0.5) * 3.1),
    }


@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_accuracy(isa: str, dtype: torch.dtype) -> None:
    """Error against float64 at 8 rows of each vocabulary and 64 targets of each row, the dominating ones among them."""
    _core.select_isa(isa)
    for kind in distributions(1024):
        errors, bounds = [], []
        for vocab in VOCABS:
            logits = distributions(vocab)[kind].to(dtype)
            rows = torch.arange(8).repeat_interleave(64)
            targets = torch.randint(vocab, (512,))
            targets[::64] = logits.float().argmax(1)
            exact = logits.double().log_softmax(1)[rows, targets].numpy()
            errors.append(np.abs(ops.token_logprobs(logits, targets, rows).double().numpy() - exact))
            bounds.append(np.maximum(1e-5, np.spacing(np.abs(exact).astype(np.float32))))
        error = np.concatenate(errors)
        assert (error <= np.concatenate(bounds)).all()
        row = {"dtype": str(dtype)[6:], "isa": isa, "distribution": kind}
        _accuracy.append({**row, "max_nats": float(f"{error.max():.2g}"), "mean_nats": float(f"{error.mean():.2g}")})


def tables(path: str) -> str:
    """Short markdown tables of a result file: speed at 512 rows and one row, accuracy of the types."""
    result = json.loads(Path(path).read_text())
    ours = [row for row in result["speed"] if row["name"] == "ours" and row["density"] == 1]
    out = [
        f"{result['cpu']}, {result['isa']}, torch {result['torch']}, {result['date']}.",
        "",
        "| type | V | rows | ns per logit | GB/s | plain read | faster than `cross_entropy`, 8-row chunks "
        "| than `log_softmax` + gather | 2 threads over 1 | the same, plain read |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ours:
        if row["threads"] != 1 or row["rows"] == 16:
            continue
        gains = []
        for name in ("ours", "read"):
            times = {r["threads"]: r["microseconds"] for r in result["speed"] if r["name"] == name and _same(r, row)}
            gains.append(f"{times[1] / times[2]:.2f}×" if {1, 2} <= times.keys() else "")
        rows = f"{row['rows']}{', in cache' * row['cached']}"
        out.append(
            f"| {row['dtype']} | {row['vocab']:,} | {rows} | {row['ns_per_element']:.3f} "
            f"| {row['gb_per_s']:.1f} | {1 / row['read_over_ours']:.2f}× | {row['cross_entropy_over_ours']:.1f}× "
            f"| {row['log_softmax_over_ours']:.1f}× | {' | '.join(gains)} |"
        )
    kinds = list(dict.fromkeys(row["distribution"] for row in result["accuracy"]))
    out += ["", "| largest error in nats | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for dtype, isa in dict.fromkeys((row["dtype"], row["isa"]) for row in result["accuracy"]):
        cells = [row["max_nats"] for row in result["accuracy"] if (row["dtype"], row["isa"]) == (dtype, isa)]
        out.append(f"| {dtype}, {isa} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |")
    return "\n".join(out)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("dtype", "vocab", "rows", "density", "cached"))


if __name__ == "__main__":
    print(tables(sys.argv[1]))
