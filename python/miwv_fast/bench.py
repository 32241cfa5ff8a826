"""A short benchmark of the row kernels on this machine, beside torch and a plain read; and what longer ones share."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miwv_fast import ops
from miwv_fast.info import cpu_name
from miwv_fast.ops.launch import read_memory

VOCABS = (32000, 128256)
ROWS = {"cpu": 512, "cuda": 4096}
_LEAST_ROUNDS = 5
_SECONDS = 4.0


def benchmark_rows(device: str) -> Iterator[dict[str, Any]]:
    """Times `ops.token_logprobs` beside its peers, shape by shape; on a CPU with one thread and with all of them.

    Each row has `dtype`, `vocab`, `threads`, `microseconds` and `gb_per_s` of ours, and for `cross_entropy` (chunks of
    8 rows on a CPU, of 512 on a GPU), `log_softmax` and `read` their time over ours. Times are the best of at least
    five rounds. Raises RuntimeError, before anything is timed, where a result differs from torch's in float64 by more
    than 1e-5 nats or one unit in its last place.
    """
    counts = sorted({1, torch.get_num_threads()}) if device == "cpu" else [1]
    before = torch.get_num_threads()
    keep_freed_memory()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            pool = make_pool(dtype, ROWS[device] * max(VOCABS), device)
            for vocab in VOCABS:
                for threads in counts:
                    torch.set_num_threads(threads)
                    yield {"dtype": str(dtype)[6:], "vocab": vocab, "threads": threads, **_time_shape(pool, vocab)}
    finally:
        torch.set_num_threads(before)


def show_benchmark() -> None:
    """Prints the table of `benchmark_rows`, as it comes, for the CPU and for a GPU where the kernels have one."""
    print(f"{cpu_name()}, {ops.build_info()['isa']}, torch {torch.__version__}")
    print("Times of torch's cross_entropy in chunks, of log_softmax with a gather, and of a plain read, over ours.")
    print("     type            V threads        us    GB/s cross_entropy log_softmax  read")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() and ops.build_info()["cuda"] else [])]
    for device in devices:
        for row in benchmark_rows(device):
            print(
                f"{device:<4} {row['dtype']:<9} {row['vocab']:>7} {row['threads']:>7} {row['microseconds']:>9.0f} "
                f"{row['gb_per_s']:>7.1f} {row['cross_entropy_over_ours']:>12.1f}x "
                f"{row['log_softmax_over_ours']:>10.1f}x {row['read_over_ours']:>4.2f}x",
                flush=True,
            )


def _time_shape(pool: Tensor, vocab: int) -> dict[str, Any]:
    on_cpu, rows = pool.is_cpu, ROWS[pool.device.type]
    supply = supply_logits(pool, rows, vocab)
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1)).to(pool.device)
    _check(supply(), targets)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as executor:
        calls: dict[str, Callable[[Tensor], Any]] = {
            "ours": lambda logits: ops.token_logprobs(logits, targets),
            "cross_entropy": lambda logits: cross_entropy(logits, targets, chunk=8 if on_cpu else 512),
            "log_softmax": lambda logits: log_softmax(logits, targets),
            "read": (lambda logits: read(executor, logits, range(rows), threads))
            if on_cpu
            else (lambda logits: logits.view(torch.int32).sum()),
        }
        seconds = _best_seconds(calls, supply, on_cpu)
    ours = seconds.pop("ours")
    size = rows * vocab * pool.element_size()
    ratios = {f"{name}_over_ours": other / ours for name, other in seconds.items()}
    return {"rows": rows, "microseconds": ours * 1e6, "gb_per_s": size / ours / 1e9, **ratios}


def _check(logits: Tensor, targets: Tensor) -> None:
    """Eight rows against float64."""
    own = ops.token_logprobs(logits[:8], targets[:8]).double()
    exact = -log_softmax(logits[:8].double(), targets[:8])
    bound = torch.clamp(exact.abs() * 2.0**-23, min=1e-5)
    error = (own - exact).abs()
    if not bool((error <= bound).all()):
        raise RuntimeError(f"wrong result: off by up to {float(error.max()):.2g} nats; please report this")


def _best_seconds(
    calls: dict[str, Callable[[Tensor], Any]], supply: Callable[[], Tensor], on_cpu: bool
) -> dict[str, float]:
    """The best time of each call, taken in turns, so that a machine that slows down does so for all of them."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call(supply())
    rounds, since = 0, time.perf_counter()
    while rounds < _LEAST_ROUNDS or time.perf_counter() - since < _SECONDS:
        for name, call in calls.items():
            best[name] = min(best[name], _seconds(call, supply(), on_cpu))
        rounds += 1
    return best


def _seconds(call: Callable[[Tensor], Any], logits: Tensor, on_cpu: bool) -> float:
    if on_cpu:
        begin = time.perf_counter()
        call(logits)
        return time.perf_counter() - begin
    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begins.record()
    call(logits)
    ends.record()
    ends.synchronize()
    milliseconds: float = begins.elapsed_time(ends)
    return milliseconds / 1e3


def keep_freed_memory() -> None:
    """Far higher thresholds than malloc's own for giving memory back and for mapping it anew.

    Otherwise page faults double the time of what torch allocates.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 32 << 20)


def make_pool(dtype: torch.dtype, elements: int, device: str = "cpu") -> Tensor:
    """Numbers [elements] in the range of logits: an eighth of them drawn, then repeated."""
    torch.manual_seed(0)
    return torch.randn(elements // 8).mul_(3).to(dtype).repeat(8).to(device)


def supply_logits(pool: Tensor, rows: int, vocab: int, cached: bool = False) -> Callable[[], Tensor]:
    """Gives logits [rows, vocab] that are another part of the pool at each call, or the same again and again."""
    position, size = 0, rows * vocab

    def next_logits() -> Tensor:
        nonlocal position
        start = position if position + size <= len(pool) and not cached else 0
        position = start + size
        return pool[start : start + size].view(rows, vocab)

    return next_logits


def read(executor: ThreadPoolExecutor, logits: Tensor, rows: range | list[int], threads: int) -> None:
    """Reads rows of contiguous logits on a CPU, adding up their bytes as fast as memory gives them."""
    size = logits.shape[1] * logits.element_size()
    base = logits.data_ptr()
    if len(rows) == logits.shape[0]:
        parts = [[(base + size * len(rows) * i // threads, size * len(rows) // threads)] for i in range(threads)]
    else:
        parts = [[(base + size * row, size) for row in rows[i::threads]] for i in range(threads)]

    def read_part(part: list[tuple[int, int]]) -> None:
        for address, bytes_ in part:
            read_memory(address, bytes_)

    if threads == 1:
        read_part(parts[0])
    else:
        list(executor.map(read_part, parts))


def cross_entropy(logits: Tensor, targets: Tensor, rows: Tensor | None = None, chunk: int = 8) -> Tensor:
    """`F.cross_entropy` in chunks of rows: with 8, what it writes stays in a CPU's cache."""
    parts = []
    for begin in range(0, len(targets), chunk):
        some = slice(begin, begin + chunk)
        chosen = logits[some] if rows is None else logits[rows[some]]
        parts.append(F.cross_entropy(chosen, targets[some], reduction="none"))
    return torch.cat(parts)


def log_softmax(logits: Tensor, targets: Tensor, rows: Tensor | None = None) -> Tensor:
    """The usual way: a log-softmax of all rows, and a gather."""
    chosen = logits if rows is None else logits[rows]
    return -chosen.log_softmax(-1).gather(1, targets[:, None])[:, 0]
