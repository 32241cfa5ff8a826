"""The head without logits on a GPU: time over that of the product alone, and memory, for slices of several sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_cases import Timer

SHAPES = ((131072, 4096), (49152, 576), (256000, 2304))
TOKENS = (256, 4096, 16384)
SLICE_BYTES = tuple(mib << 20 for mib in (16, 32, 64, 128, 256))


def head_cases() -> Iterator[dict[str, object]]:
    """V, H, tokens and bytes of a slice; the times are filled in by `measure_head`."""
    for vocab, width in SHAPES:
        for tokens in TOKENS:
            for slice_bytes in SLICE_BYTES:
                if slice_bytes >= 2 * 4 * tokens * vocab:
                    continue  # all logits fit the one before
                yield {"vocab": vocab, "hidden_size": width, "tokens": tokens, "slice_bytes": slice_bytes}


def measure_head(case: dict[str, object], timer: Timer, device: torch.device) -> dict[str, object]:
    """The case with `seconds`, `product_seconds` (bfloat16 logits in one product), their ratio, and extra bytes."""
    from miwv_fast import ops
    from miwv_fast.ops import products

    vocab, width, tokens = (int(str(case[key])) for key in ("vocab", "hidden_size", "tokens"))
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, generator=generator).bfloat16()
    weight = (torch.randn(vocab, width, device=device, generator=generator) / width**0.5).bfloat16()
    targets = torch.randint(vocab, (tokens,), device=device, generator=generator)
    offsets = torch.arange(0, tokens + 1, 64, device=device)

    def run() -> torch.Tensor:
        # Room for a slice of any of the sizes, beside the hidden states that are gathered for it.
        return ops.linear_response_nll(hidden, weight, targets, offsets, workspace_bytes=1 << 30)

    before_bytes, products._SLICE_BYTES["cuda"] = products._SLICE_BYTES["cuda"], int(str(case["slice_bytes"]))
    try:
        check(run(), hidden, weight, targets)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        extra = torch.cuda.max_memory_allocated() - before
        seconds = timer(run)
    finally:
        products._SLICE_BYTES["cuda"] = before_bytes
    out = torch.empty(tokens, vocab, device=device, dtype=torch.bfloat16)
    alone = timer(lambda: torch.mm(hidden, weight.T, out=out))
    return case | {
        "seconds": seconds,
        "product_seconds": alone,
        "over_product": seconds / alone,
        "tflops": 2 * tokens * vocab * width / seconds / 1e12,
        "extra_bytes": extra,
    }


def check(result: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    logits = hidden[:64].double() @ weight.double().T
    expected = torch.nn.functional.cross_entropy(logits, targets[:64])
    if not abs(result[0].item() - expected.item()) <= 1e-3:
        raise AssertionError(f"the first response is {result[0].item()}, it should be {expected.item()}")


def head_table(cases: list[dict[str, object]]) -> str:
    """What a README shows: the fastest slice of each shape."""
    lines = [
        "| V | H | tokens | slice, MiB | over the product | TFLOP/s | extra MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    best: dict[tuple[object, ...], dict[str, object]] = {}
    for case in cases:
        if case.get("seconds") is not None:
            key = (case["vocab"], case["hidden_size"], case["tokens"])
            if key not in best or case["seconds"] < best[key]["seconds"]:  # type: ignore[operator]
                best[key] = case
    for key, case in best.items():
        cells = (*key, int(str(case["slice_bytes"])) >> 20, f"{case['over_product']:.3f}", f"{case['tflops']:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} | {int(str(case['extra_bytes'])) >> 20} |")
    return "\n".join(lines)
