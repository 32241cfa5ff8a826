"""A small run of every kernel, for compute-sanitizer: rows at odd addresses that end where their allocation ends.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/gpu_sanitize.py
"""

from __future__ import annotations

import torch

from miwv_fast import ops


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocab in (1, 7, 1000, 4127, 20011, 50257):
            for start in (0, 1, 5):
                for split in (0, 1):
                    ops.launch.cuda_split = split
                    check(dtype, vocab, start)
    print("all results agree with the CPU's")


def check(dtype: torch.dtype, vocab: int, start: int) -> None:
    storage = (torch.randn(start + 5 * vocab) * 3).to(dtype)
    targets, rows, offsets = torch.tensor([0, vocab - 1, 0]), torch.tensor([4, 0, 3]), torch.tensor([0, 1, 1, 3])
    results = []
    for device in ("cpu", "cuda"):
        logits = storage.to(device)[start:].view(5, vocab)
        there = [values.to(device) for values in (targets, offsets, rows)]
        results.append(
            [
                ops.token_logprobs(logits, there[0], there[2]),
                ops.response_nll(logits, there[0], there[1], there[2]),
                ops.response_nll_difference(logits, logits.flip(0), there[0], there[1], there[2], there[2]),
                *head_losses(logits, *there),
            ]
        )
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-6, atol=1e-5, equal_nan=True)


def head_losses(
    logits: torch.Tensor, targets: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor
) -> list[torch.Tensor]:
    """The same rows as a head's: five hidden states, the first five entries of each row; whole, capped, in pieces."""
    hidden, weight = logits.new_tensor([[0.5] * 5] * 5), logits.T.contiguous()
    halves = (len(weight) + 1) // 2
    parts = [
        ops.response_nll_partials(hidden, weight[a:b], targets, rows, first=a)
        for a, b in ((0, halves), (halves, len(weight)))
        if b > a
    ]
    return [
        ops.linear_response_nll(hidden, weight, targets, offsets, rows, softcap=softcap) for softcap in (None, 20.0)
    ] + [ops.combine_partials(parts, offsets)]


if __name__ == "__main__":
    main()
