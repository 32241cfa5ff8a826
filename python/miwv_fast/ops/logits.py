"""The kernels over logits that are there already."""

from __future__ import annotations

import torch
from torch import Tensor

from miwv_fast.ops.checks import (
    check_flag,
    check_kinds,
    check_pair,
    check_values,
    indices,
    is_plain,
    offsets_of,
    pack_logits,
    rows_of,
)
from miwv_fast.ops.launch import address, require_kernels, run_rows


def token_logprobs(logits: Tensor, targets: Tensor, rows: Tensor | None = None, *, check: bool = False) -> Tensor:
    """Log-probability in nats of each target token, float32 `[T]`.

    `out[t] = log_softmax(logits[rows[t]])[targets[t]]`, for targets `[T]` and rows `[T]`. Layouts, dtypes, NaN and
    errors: as `miwv_fast.ops` says.

    >>> logits = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    >>> token_logprobs(logits, torch.tensor([0, 1]), rows=torch.tensor([1, 1]))
    tensor([-0.0486, -3.0486])
    """
    check_flag("check", check)
    if is_plain(logits, targets, rows):
        return token_logprobs_impl(logits, targets, rows, check=check)
    check_kinds({"logits": logits}, {"targets": targets, "rows": rows})
    result: Tensor = torch.ops.miwv_fast.token_logprobs.default(logits, targets, rows, check=check)
    return result


def response_nll(
    logits: Tensor, targets: Tensor, offsets: Tensor, rows: Tensor | None = None, *, check: bool = False
) -> Tensor:
    """Mean negative log-likelihood in nats of each response, float32 `[B]`.

    Response b owns the targets `offsets[b]` to `offsets[b + 1]`; offsets `[B + 1]` begin with 0, never fall, and end
    with T, the number of targets. Layouts, dtypes, NaN and errors: as `miwv_fast.ops` says. This is L(y | x) of Jiang
    et al., arXiv 2511.07074.

    >>> logits = torch.zeros(3, 4)  # four entries, all of the same probability
    >>> response_nll(logits, torch.tensor([0, 3, 1]), torch.tensor([0, 2, 3]))
    tensor([1.3863, 1.3863])
    """
    check_flag("check", check)
    if is_plain(logits, targets, offsets, rows):
        return response_nll_impl(logits, targets, offsets, rows, check=check)
    check_kinds({"logits": logits}, {"targets": targets, "offsets": offsets, "rows": rows})
    result: Tensor = torch.ops.miwv_fast.response_nll.default(logits, targets, offsets, rows, check=check)
    return result


def response_nll_difference(
    one_shot_logits: Tensor,
    zero_shot_logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    one_shot_rows: Tensor | None = None,
    zero_shot_rows: Tensor | None = None,
    *,
    check: bool = False,
) -> Tensor:
    """One-shot minus zero-shot mean negative log-likelihood in nats of each response, float32 `[B]`: the MIWV.

    Both logits score the same targets, and have one V and one dtype. targets `[T]`, offsets `[B + 1]` and rows `[T]` as
    in `response_nll`; errors as `miwv_fast.ops` says. Jiang et al., arXiv 2511.07074.
    """
    check_flag("check", check)
    arguments = (one_shot_logits, zero_shot_logits, targets, offsets, one_shot_rows, zero_shot_rows)
    if is_plain(*arguments):
        return response_nll_difference_impl(*arguments, check=check)
    check_kinds(
        {"one_shot_logits": one_shot_logits, "zero_shot_logits": zero_shot_logits},
        {"targets": targets, "offsets": offsets, "one_shot_rows": one_shot_rows, "zero_shot_rows": zero_shot_rows},
    )
    result: Tensor = torch.ops.miwv_fast.response_nll_difference.default(*arguments, check=check)
    return result


def token_logprobs_impl(logits: Tensor, targets: Tensor, rows: Tensor | None = None, *, check: bool = False) -> Tensor:
    """`token_logprobs` behind torch's dispatcher."""
    packed = pack_logits("logits", logits)
    targets = indices("targets", targets, logits)
    rows = rows_of("rows", rows, targets, logits, packed[2])
    require_kernels(logits)
    if check and logits.is_cuda:
        check_values(targets, packed[2], packed[3], rows=rows)
    out = logits.new_empty(targets.numel(), dtype=torch.float32)
    arguments = (packed, address(rows), targets.data_ptr(), targets.numel(), out.data_ptr())
    run_rows("token_logprobs", arguments, logits, packed, targets.numel())
    return out


def response_nll_impl(
    logits: Tensor, targets: Tensor, offsets: Tensor, rows: Tensor | None = None, *, check: bool = False
) -> Tensor:
    """`response_nll` behind torch's dispatcher."""
    packed = pack_logits("logits", logits)
    targets = indices("targets", targets, logits)
    offsets = offsets_of(offsets, logits)
    rows = rows_of("rows", rows, targets, logits, packed[2])
    require_kernels(logits)
    if check and logits.is_cuda:
        check_values(targets, packed[2], packed[3], offsets, rows=rows)
    out = logits.new_empty(offsets.numel() - 1, dtype=torch.float32)
    responses = (targets.data_ptr(), targets.numel(), offsets.data_ptr(), out.numel(), out.data_ptr())
    arguments = (packed, address(rows), *responses)
    run_rows("response_nll", arguments, logits, packed, targets.numel(), per_response=True)
    return out


def response_nll_difference_impl(
    one_shot_logits: Tensor,
    zero_shot_logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    one_shot_rows: Tensor | None = None,
    zero_shot_rows: Tensor | None = None,
    *,
    check: bool = False,
) -> Tensor:
    """`response_nll_difference` behind torch's dispatcher."""
    one_shot = pack_logits("one_shot_logits", one_shot_logits)
    zero_shot = pack_logits("zero_shot_logits", zero_shot_logits)
    check_pair(one_shot_logits, zero_shot_logits, "logits", "V")
    targets = indices("targets", targets, one_shot_logits)
    offsets = offsets_of(offsets, one_shot_logits)
    one_shot_rows = rows_of("one_shot_rows", one_shot_rows, targets, one_shot_logits, one_shot[2])
    zero_shot_rows = rows_of("zero_shot_rows", zero_shot_rows, targets, zero_shot_logits, zero_shot[2])
    require_kernels(one_shot_logits)
    if check and one_shot_logits.is_cuda:
        check_values(targets, one_shot[2], one_shot[3], offsets, one_shot_rows=one_shot_rows)
        check_values(targets, zero_shot[2], zero_shot[3], zero_shot_rows=zero_shot_rows)
    out = one_shot_logits.new_empty(offsets.numel() - 1, dtype=torch.float32)
    responses = (targets.data_ptr(), targets.numel(), offsets.data_ptr(), out.numel(), out.data_ptr())
    arguments = (one_shot, zero_shot, address(one_shot_rows), address(zero_shot_rows), *responses)
    run_rows(
        "response_nll_difference", arguments, one_shot_logits, one_shot, targets.numel(), sides=2, per_response=True
    )
    return out
