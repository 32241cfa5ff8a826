"""The grid of GPU cases: what is timed, how, and what a case says about itself. Peers are in gpu_rows.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import torch

from gpu_peers import Problem, readers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VOCABS = (32000, 50257, 128256, 151936, 262144)
ROWS = (1, 16, 256, 4096, 16384)
DENSITIES = (1.0, 0.5, 0.1)
VIEWS = ("contiguous", "[:, :-1]")
# Scored rows that are timed both ways, whole and split, where all are scored, and where some are: ops splits less than
# two for each multiprocessor, and whether that is the right threshold shows on both sides of it.
BOTH_WAYS = range(1, 4097)
NEAR_THRESHOLD = range(100, 4097)


@dataclass
class Case:
    kernel: str  # row, split or difference; until it is timed also automatic, whichever of the first two ops chooses
    dtype: str
    vocab: int
    rows: int  # of the logits, of both together for a difference; density says how many of them are scored
    density: float
    view: str
    bytes: int = 0  # of the scored rows
    seconds: float | None = None  # median, L2 cold
    copy_seconds: float | None = None  # a device copy of as many bytes, which reads and writes them
    read_seconds: float | None = None  # the fastest read of as many bytes
    launch_seconds: float | None = None  # a kernel that does nothing
    fraction_of_copy: float | None = None  # our bytes per second over those that the copy reads and writes, at most 1
    fraction_of_read: float | None = None  # our bytes per second over those of the read, at most 1
    extra_bytes: int | None = None  # peak of torch's memory during a call, less the result
    automatic: bool = True  # whether ops would do it like this
    note: str | None = None  # what to know about the figures
    peers: dict[str, float] = field(default_factory=dict)  # none where ops would do it otherwise
    peers_left_out: dict[str, str] = field(default_factory=dict)
    peers_note: str | None = None  # why they end here, which says nothing about ours
    left_out: str | None = None  # why it was not timed, though nothing is wrong
    error: str | None = None  # what is wrong

    def __post_init__(self) -> None:
        self.bytes = scored(self.rows, self.density) * self.vocab * DTYPES[self.dtype].itemsize


def scored(rows: int, density: float) -> int:
    return max(1, round(rows * density))


def grid(vocabs: tuple[int, ...] = VOCABS, rows: tuple[int, ...] = ROWS) -> Iterator[Case]:
    """Ordered by importance, so that a run cut short has the main cases of all vocabularies."""
    counts = sorted(rows, reverse=True)
    for vocab in vocabs:
        for count in counts:
            for kernel in ("row", "split") if count in BOTH_WAYS else ("row",):
                yield Case(kernel, "bfloat16", vocab, count, DENSITIES[0], VIEWS[0])
        for count in counts:
            if count >= 256:
                yield Case("difference", "bfloat16", vocab, count, DENSITIES[0], VIEWS[0])
        for dtype in ("float32", "float16"):
            if 4096 in rows:
                yield Case("row", dtype, vocab, 4096, DENSITIES[0], VIEWS[0])
    for vocab in vocabs:
        for density, view in list(product(DENSITIES, VIEWS))[1:]:
            for count in counts:
                both = view == VIEWS[0] and scored(count, density) in NEAR_THRESHOLD
                for kernel in ("row", "split") if both else ("automatic",):
                    yield Case(kernel, "bfloat16", vocab, count, density, view)


class Timer:
    """Medians of single calls between events, each after a flush of L2 and a pause in which the host gets ahead.

    The flush reads: after writing, L2 would be full of what the timed call has to write back. `pause` is in cycles,
    more than the host takes to launch what is timed: 1,000,000 are half a millisecond.
    """

    def __init__(self, device: torch.device, pause: int = 1_000_000) -> None:
        self.device, self.pause = device, pause

    @cached_property
    def flush(self) -> torch.Tensor:
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        return torch.zeros(max(4 * l2, 2**28) // 4, device=self.device)

    def __call__(self, function: Callable[[], object], budget: float = 0.15) -> float:
        for _ in range(2):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._measure(function, 2)
        count = int(min(max(budget / max(time.perf_counter() - start, 1e-6) * 2, 7), 41))
        return statistics.median(self._measure(function, count))

    def _measure(self, function: Callable[[], object], count: int) -> list[float]:
        pairs = []
        for _ in range(count):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.amax()
            torch.cuda._sleep(self.pause)
            begin.record()
            function()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]


def problem_of(case: Case, storage: torch.Tensor) -> Problem:
    """Views of the storage, whose values are random: nothing is generated between cases of a vocabulary."""
    generator = torch.Generator(storage.device).manual_seed(0)
    batch = 1 if case.view == "contiguous" or case.rows < 4 else 4
    length = case.rows // batch
    full = storage[: batch * (length + 1) * case.vocab].view(batch, length + 1, case.vocab)
    targets = torch.randint(case.vocab, (batch * length,), generator=generator, device=storage.device)
    rows = None
    if case.density < 1:
        order = torch.randperm(batch * length, generator=generator, device=storage.device)
        rows = order[: scored(case.rows, case.density)].sort().values
    return Problem(full, full[:, :-1], targets, rows)


def measure(case: Case, problem: Problem, timer: Timer, bounds: dict[int, tuple[float, float, float]]) -> None:
    """Fills in the case; the result is compared with torch in float32 before anything is timed."""
    from miwv_fast import _core, ops

    targets = problem.chosen_targets
    if case.kernel == "difference":
        half = problem.full.shape[1] // 2
        one, zero = problem.full[:, :half], problem.full[:, half : 2 * half]
        targets = problem.targets[:half]
        offsets = torch.arange(0, half + 64, 64, device=targets.device).clamp(max=half)
        call = lambda: ops.response_nll_difference(one, zero, targets, offsets)  # noqa: E731
        check = lambda result: check_difference(result, one, zero, targets, offsets)  # noqa: E731
    else:
        call = lambda: ops.token_logprobs(problem.logits, targets, problem.rows)  # noqa: E731
        check = lambda result: check_logprobs(result, problem, 1e-4)  # noqa: E731
        shape = (0, ops.checks.DTYPES[DTYPES[case.dtype]], case.rows, case.vocab, case.vocab, case.rows, 0)
        device = problem.full.device.index
        splits = _core.cuda_scratch_bytes(shape, len(targets), 1, False, device, -1) > 0
        case.automatic = case.kernel == "automatic" or splits == (case.kernel == "split")
    ops.launch.cuda_split = {"row": 0, "split": 1}.get(case.kernel, -1)
    if case.kernel == "automatic":
        case.kernel = "split" if splits else "row"
    try:
        check(call())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        case.extra_bytes = torch.cuda.max_memory_allocated() - before - result.numel() * result.element_size()
        case.seconds = timer(call)
    finally:
        ops.launch.cuda_split = -1
    if case.bytes not in bounds:
        bounds[case.bytes] = measure_bounds(problem.full.view(-1)[: case.bytes // problem.full.element_size()], timer)
    case.copy_seconds, case.read_seconds, case.launch_seconds = bounds[case.bytes]
    set_fractions(case)


def measure_bounds(source: torch.Tensor, timer: Timer) -> tuple[float, float, float]:
    """Seconds of a copy, of the fastest read of as many bytes, and of a kernel that does nothing."""
    source = source[: len(source) // 2 * 2]
    target = torch.empty_like(source)
    reads = [timer(reader, 0.05) for reader in readers(source).values()]
    return timer(lambda: target.copy_(source), 0.05), min(reads), timer(lambda: torch.cuda._sleep(0), 0.05)


def set_fractions(case: Case) -> None:
    """Fractions end at 1; what was clearly faster than a bound says so."""
    ratios = {"copy": case.copy_seconds / 2 / case.seconds, "read": case.read_seconds / case.seconds}
    case.fraction_of_copy, case.fraction_of_read = (min(1.0, ratio) for ratio in ratios.values())
    beyond = [f"{ratio:.3f} of the {name}" for name, ratio in ratios.items() if ratio > 1.02]
    case.note = f"really {' and '.join(beyond)}, which is no bound here" if beyond else None


def gpu_is_lost() -> bool:
    """Whether a kernel went astray, after which no call of this process can succeed."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def check_logprobs(result: torch.Tensor, problem: Problem, tolerance: float) -> None:
    targets = problem.chosen_targets
    count = min(64, len(targets))
    chosen = torch.linspace(0, len(targets) - 1, count, device=targets.device).long()
    expected = _reference(problem.logits, targets[chosen], chosen if problem.rows is None else problem.rows[chosen])
    error = (result.flatten()[chosen].double() - expected).abs().max().item()
    if not error <= tolerance:
        raise AssertionError(f"off by {error} nats")


def check_difference(
    result: torch.Tensor, one: torch.Tensor, zero: torch.Tensor, targets: torch.Tensor, offsets: torch.Tensor
) -> None:
    last = torch.arange(int(offsets[-2]), int(offsets[-1]), device=targets.device)
    first = torch.arange(int(offsets[0]), int(offsets[1]), device=targets.device)
    for response, rows in ((0, first), (len(result) - 1, last)):
        expected = (_reference(zero, targets[rows], rows) - _reference(one, targets[rows], rows)).mean()
        if not abs(result[response].item() - expected.item()) <= 1e-4:
            raise AssertionError(f"response {response} is {result[response].item()}, it should be {expected.item()}")


def _reference(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    batch, position = rows // logits.shape[1], rows % logits.shape[1]
    return logits[batch, position].double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
