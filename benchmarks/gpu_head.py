"""The head without logits on a GPU: time over that of the product alone, and memory, for slices of several shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from gpu_cases import Timer

SHAPES = ((131072, 4096), (49152, 576), (256000, 2304))
TOKENS = (256, 4096, 16384)
SLICE_TOKENS = (4096, 2048, 1024)  # beside the first, which is what ops takes, for the first shape alone
SLICE_BYTES = tuple(mib << 20 for mib in (16, 32, 64, 128, 256))


@dataclass
class HeadCase:
    vocab: int
    hidden_size: int
    tokens: int
    slice_tokens: int  # at most
    slice_bytes: int
    seconds: float | None = None  # median, L2 cold
    product_seconds: float | None = None  # bfloat16 logits in one product
    over_product: float | None = None
    tflops: float | None = None
    extra_bytes: int | None = None  # peak of torch's memory during a call
    left_out: str | None = None  # why it was not timed, though nothing is wrong
    error: str | None = None  # what is wrong


def head_cases() -> Iterator[HeadCase]:
    """Shapes, and slices of several shapes for each; `measure_head` fills in the times."""
    for vocab, width in SHAPES:
        for tokens in TOKENS:
            for slice_tokens in SLICE_TOKENS if (vocab, width) == SHAPES[0] else SLICE_TOKENS[:1]:
                if slice_tokens != SLICE_TOKENS[0] and slice_tokens >= tokens:
                    continue  # the same slices as with more
                for slice_bytes in SLICE_BYTES:
                    if slice_bytes >= 2 * 4 * min(tokens, slice_tokens) * vocab:
                        continue  # all logits fit the one before
                    yield HeadCase(vocab, width, tokens, slice_tokens, slice_bytes)


def measure_head(case: HeadCase, timer: Timer, device: torch.device) -> None:
    """Fills in the case; the first response is compared with torch in float64 before anything is timed."""
    from miwv_fast import ops
    from miwv_fast.ops import products

    vocab, width, tokens = case.vocab, case.hidden_size, case.tokens
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, generator=generator).bfloat16()
    weight = (torch.randn(vocab, width, device=device, generator=generator) / width**0.5).bfloat16()
    targets = torch.randint(vocab, (tokens,), device=device, generator=generator)
    offsets = torch.arange(0, tokens + 1, 64, device=device)

    def run() -> torch.Tensor:
        # Room for a slice of any of the sizes, beside the hidden states that are gathered for it.
        return ops.linear_response_nll(hidden, weight, targets, offsets, workspace_bytes=1 << 30)

    before_shape = products._SLICE_TOKENS["cuda"], products._SLICE_BYTES["cuda"]
    products._SLICE_TOKENS["cuda"], products._SLICE_BYTES["cuda"] = case.slice_tokens, case.slice_bytes
    try:
        check(run(), hidden, weight, targets)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        case.extra_bytes = torch.cuda.max_memory_allocated() - before
        case.seconds = timer(run)
    finally:
        products._SLICE_TOKENS["cuda"], products._SLICE_BYTES["cuda"] = before_shape
    out = torch.empty(tokens, vocab, device=device, dtype=torch.bfloat16)
    case.product_seconds = timer(lambda: torch.mm(hidden, weight.T, out=out))
    case.over_product = case.seconds / case.product_seconds
    case.tflops = 2 * tokens * vocab * width / case.seconds / 1e12


def check(result: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    logits = hidden[:64].double() @ weight.double().T
    expected = torch.nn.functional.cross_entropy(logits, targets[:64])
    if not abs(result[0].item() - expected.item()) <= 1e-3:
        raise AssertionError(f"the first response is {result[0].item()}, it should be {expected.item()}")


def head_table(cases: list[HeadCase]) -> str:
    """What a README shows: the fastest slice of each shape."""
    lines = [
        "| V | H | tokens | tokens of a slice | slice, MiB | over the product | TFLOP/s | extra MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    timed = [case for case in cases if case.tflops is not None]
    for key, group in groupby(timed, lambda case: (case.vocab, case.hidden_size, case.tokens)):
        best = min(group, key=lambda case: case.seconds)
        shape = min(best.tokens, best.slice_tokens), best.slice_bytes >> 20
        cells = (*key, *shape, f"{best.over_product:.3f}", f"{best.tflops:.0f}", best.extra_bytes >> 20)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
