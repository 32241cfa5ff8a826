"""Log-probabilities of target tokens, read straight from logits: tensors in, tensors out.

Every needed row of logits is read once and one float32 per token or response is written; logits are never copied or
written to. The `linear_*` functions take hidden states and the output head instead, and never hold the logits. All are
forward only: what requires a gradient, or has a tangent, is refused, in `torch.func`'s transforms as well. They run on
CPU tensors (and on CUDA tensors where the kernels were built), and are registered with `torch.library` as
`torch.ops.miwv_fast.*`, so that `torch.compile`, `torch.export` and fake tensors know them, one graph for all sizes.

Common to all of them:

- logits are `[R, V]` or `[B, T, V]` (then row `b * T + t` is position t of sequence b), float32, bfloat16 or float16.
  The entries of a row must be adjacent; the other strides are free, so that `logits[:, :-1]` needs no copy.
- targets, rows and offsets are one-dimensional int64 or int32 tensors on the same device. `rows[t]` is the row that
  predicts `targets[t]`; without `rows`, row t does.
- `TypeError` or `ValueError` names the argument, its value, and what would have been right; on the CPU this includes a
  target outside `[0, V)`, a row that doesn't exist, and offsets that fall. `RuntimeError`: CUDA tensors, and a build
  without the CUDA kernels.
- On CUDA, calls go to the current stream and return at once; they can be captured in a CUDA graph, after one call that
  loads the kernel. So what is only in the data cannot raise: a bad target or row makes its token and its response NaN,
  bad offsets their response. `check=True` waits for the device and raises the same errors as on the CPU, where it
  changes nothing.
- As in `torch.log_softmax`, a -inf logit is a legal zero probability, and NaN or +inf in a row, or nothing but -inf,
  makes its log-probability NaN. A response that has such a row, or no token at all, is NaN, and no other.
- The result depends on the rows and V alone, to the bit: not on strides, alignment, threads, or the rest of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miwv_fast import _core
from miwv_fast.ops import library  # noqa: F401  (registers the operators)
from miwv_fast.ops.checks import check_integer, kind
from miwv_fast.ops.linear import (
    combine_partials,
    linear_response_nll,
    linear_response_nll_difference,
    response_nll_partials,
)
from miwv_fast.ops.logits import response_nll, response_nll_difference, token_logprobs
from miwv_fast.ops.matmul import uses_onednn

__all__ = [
    "build_info",
    "combine_partials",
    "linear_response_nll",
    "linear_response_nll_difference",
    "response_nll",
    "response_nll_difference",
    "response_nll_partials",
    "rows_from_labels",
    "token_logprobs",
]


def rows_from_labels(labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    """`(rows, targets, offsets)`, int64, for labels `[B, T]` in the convention of Hugging Face models.

    The logits at position t - 1 predict the label at position t, so `rows` are `b * T + t - 1` into logits `[B, T, V]`.
    A label at position 0 has nothing that predicts it and is left out, as Hugging Face's loss does. The results lie on
    the device of the labels, whose type is any integer's but uint64. TypeError for another, ValueError unless `[B, T]`.

    >>> rows, targets, offsets = rows_from_labels(torch.tensor([[-100, -100, 7, 8], [-100, 9, -100, -100]]))
    >>> rows.tolist(), targets.tolist(), offsets.tolist()
    ([1, 2, 4], [7, 8, 9], [0, 2, 3])
    """
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype in (torch.bool, torch.uint64)
    ):
        raise TypeError(f"labels must be an integer tensor, not {kind(labels)}")
    if labels.ndim != 2:
        raise ValueError(f"labels must be [B, T], not {tuple(labels.shape)}")
    if labels.is_meta:
        raise ValueError("labels are on meta, they must be on a device that holds their values")
    ignore_index = check_integer("ignore_index", ignore_index)
    following = labels[:, 1:].to(torch.int64)  # in which no label but ignore_index itself is equal to it
    scored = following != ignore_index
    batch, position = scored.nonzero(as_tuple=True)
    offsets = torch.zeros(labels.shape[0] + 1, dtype=torch.int64, device=labels.device)
    torch.cumsum(scored.sum(1), 0, out=offsets[1:])
    return batch * labels.shape[1] + position, following[scored], offsets


def build_info() -> dict[str, object]:
    """How the kernels were built and what they run on: version, cuda, isa, available_isas, threads.

    `onednn` says whether oneDNN multiplies float32 matrices on the CPU, where torch by itself has MKL do it.
    """
    return {
        "version": _core.version,
        "cuda": _core.has_cuda,
        "isa": _core.isa(),
        "available_isas": _core.available_isas(),
        "onednn": uses_onednn(),
        "threads": torch.get_num_threads(),
    }
