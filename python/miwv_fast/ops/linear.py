"""From hidden states and an output head to losses: logits exist slice by slice, in a workspace of fixed size.

A slice is the product of some rows of hidden states with some rows of the head; the row kernel reads it and adds it to
the partial softmax of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miwv_fast.ops import launch
from miwv_fast.ops.checks import (
    check_factors,
    check_fakes,
    check_flag,
    check_head,
    check_hidden,
    check_integer,
    check_kinds,
    check_pair,
    check_partials,
    check_range,
    check_values,
    indices,
    is_plain,
    offsets_of,
    pack_logits,
    rows_of,
)
from miwv_fast.ops.products import Head, gather, product_of

WORKSPACE_BYTES = 256 << 20


def linear_response_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    workspace_bytes: int = WORKSPACE_BYTES,
    check: bool = False,
) -> Tensor:
    """Mean negative log-likelihood in nats of each response, float32 `[B]`, without ever holding its logits.

    The same as `response_nll(logits, targets, offsets, rows)` with `x = scale * (hidden @ weight.T + bias)` and
    `logits = x`, or `softcap * tanh(x / softcap)` where there is a softcap (Gemma-2). hidden is `[R, H]` or
    `[B, T, H]`, weight `[V, H]`, bias `[V]`, of one dtype and device. Beside the arguments, 24 bytes per token and no
    more than `workspace_bytes` are held, whatever V and T are. Dtypes, NaN and errors: as `miwv_fast.ops` says.

    Logits are float32 also where hidden and weight are of 16 bits, except on CUDA before torch 2.8. The products are
    those of torch's libraries: their last bits may depend on how many tokens there are, everything behind them does
    not. Those of bfloat16 on a CPU with AVX-512 BF16 or AMX are our own, and don't.
    """
    options = _options(softcap, scale, workspace_bytes, check)
    if is_plain(hidden, weight, targets, offsets, rows, bias):
        return linear_response_nll_impl(hidden, weight, targets, offsets, rows, bias=bias, **options)
    floats = {"hidden": hidden, "weight": weight, "bias": bias}
    check_kinds(floats, {"targets": targets, "offsets": offsets, "rows": rows})
    operator = torch.ops.miwv_fast.linear_response_nll.default
    result: Tensor = operator(hidden, weight, targets, offsets, rows, bias=bias, **options)
    return result


def linear_response_nll_difference(
    one_shot_hidden: Tensor,
    zero_shot_hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    offsets: Tensor,
    one_shot_rows: Tensor | None = None,
    zero_shot_rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    workspace_bytes: int = WORKSPACE_BYTES,
    check: bool = False,
) -> Tensor:
    """One-shot minus zero-shot mean negative log-likelihood in nats of each response, float32 `[B]`: the MIWV.

    Both hidden states score the same targets with the same head; otherwise as `linear_response_nll`.
    """
    arguments = (one_shot_hidden, zero_shot_hidden, weight, targets, offsets, one_shot_rows, zero_shot_rows)
    options = _options(softcap, scale, workspace_bytes, check)
    if is_plain(*arguments, bias):
        return linear_response_nll_difference_impl(*arguments, bias=bias, **options)
    check_kinds(
        {"one_shot_hidden": one_shot_hidden, "zero_shot_hidden": zero_shot_hidden, "weight": weight, "bias": bias},
        {"targets": targets, "offsets": offsets, "one_shot_rows": one_shot_rows, "zero_shot_rows": zero_shot_rows},
    )
    result: Tensor = torch.ops.miwv_fast.linear_response_nll_difference.default(*arguments, bias=bias, **options)
    return result


def response_nll_partials(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None = None,
    *,
    first: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    workspace_bytes: int = WORKSPACE_BYTES,
    check: bool = False,
) -> Tensor:
    """What a slice of the vocabulary adds to each token's softmax, float64 `[T, 3]`: (max, sum, target logit).

    For heads that lie in pieces on several devices. weight `[V', H]` holds the entries `first` to `first + V'` of the
    vocabulary; targets count in the whole vocabulary, and the target logit is NaN for those that lie elsewhere.
    `log sum exp(logits) = max + log(sum)` over the slice, max being a number near the largest logit; a sum of 0 is a
    slice of nothing but -inf. Otherwise as `linear_response_nll`; `combine_partials` gives the losses.
    """
    options = _options(softcap, scale, workspace_bytes, check)
    first = check_integer("first", first, least=0)
    if is_plain(hidden, weight, targets, rows, bias):
        return response_nll_partials_impl(hidden, weight, targets, rows, first=first, bias=bias, **options)
    check_kinds({"hidden": hidden, "weight": weight, "bias": bias}, {"targets": targets, "rows": rows})
    operator = torch.ops.miwv_fast.response_nll_partials.default
    result: Tensor = operator(hidden, weight, targets, rows, first=first, bias=bias, **options)
    return result


def combine_partials(partials: Sequence[Tensor], offsets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of each response, float32 `[B]`, from its parts over the vocabulary.

    partials, float64 `[T, 3]`, are results of `response_nll_partials` for the same tokens, one for each slice of the
    vocabulary; they may lie on several devices, the result lies on that of the first. offsets `[B + 1]` as in
    `response_nll`. Raises ValueError where no slice holds a token's
    target; on CUDA that response is NaN.
    """
    check_partials(partials, offsets)
    if is_plain(*partials, offsets):
        return combine_partials_impl(partials, offsets)
    if not torch.compiler.is_compiling():
        check_fakes(partials, {"offsets": offsets})
    result: Tensor = torch.ops.miwv_fast.combine_partials.default(list(partials), offsets)
    return result


def _options(softcap: float | None, scale: float, workspace_bytes: int, check: bool) -> dict[str, Any]:
    check_factors(softcap, scale)
    workspace_bytes = check_integer("workspace_bytes", workspace_bytes, least=1)
    check_flag("check", check)
    return {"softcap": softcap, "scale": scale, "workspace_bytes": workspace_bytes, "check": check}


# ---- Behind torch's dispatcher


def linear_response_nll_impl(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    workspace_bytes: int = WORKSPACE_BYTES,
    check: bool = False,
) -> Tensor:
    """`linear_response_nll` behind torch's dispatcher."""
    check_head(hidden, weight, bias, softcap, scale)
    offsets = offsets_of(offsets, hidden)
    targets, rows = _tokens("rows", hidden, targets, rows)
    if hidden.is_cpu or check:
        check_values(targets, _count_rows(hidden), weight.shape[0], offsets, rows=rows)
    partials = _partials(hidden, targets, rows, Head(weight, bias, softcap, scale, workspace_bytes))
    return launch.combine(partials[None], None, offsets)


def linear_response_nll_difference_impl(
    one_shot_hidden: Tensor,
    zero_shot_hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    offsets: Tensor,
    one_shot_rows: Tensor | None = None,
    zero_shot_rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    workspace_bytes: int = WORKSPACE_BYTES,
    check: bool = False,
) -> Tensor:
    """`linear_response_nll_difference` behind torch's dispatcher."""
    check_hidden("zero_shot_hidden", zero_shot_hidden)
    check_head(one_shot_hidden, weight, bias, softcap, scale, "one_shot_hidden")
    check_pair(one_shot_hidden, zero_shot_hidden, "hidden", "H")
    offsets = offsets_of(offsets, one_shot_hidden)
    sides = []
    for name, hidden, rows in (
        ("one_shot_rows", one_shot_hidden, one_shot_rows),
        ("zero_shot_rows", zero_shot_hidden, zero_shot_rows),
    ):
        side_targets, rows = _tokens(name, hidden, targets, rows)
        if hidden.is_cpu or check:
            check_values(side_targets, _count_rows(hidden), weight.shape[0], offsets, **{name: rows})
        sides.append(_partials(hidden, side_targets, rows, Head(weight, bias, softcap, scale, workspace_bytes)))
    return launch.combine(sides[0][None], sides[1], offsets)


def response_nll_partials_impl(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None = None,
    *,
    first: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    workspace_bytes: int = WORKSPACE_BYTES,
    check: bool = False,
) -> Tensor:
    """`response_nll_partials` behind torch's dispatcher."""
    check_head(hidden, weight, bias, softcap, scale)
    targets, rows = _tokens("rows", hidden, targets, rows)
    if hidden.is_cpu or check:
        check_range("targets", targets, None, "the whole vocabulary")
        check_range("rows", rows, _count_rows(hidden), "the rows of hidden")
    return _partials(hidden, targets, rows, Head(weight, bias, softcap, scale, workspace_bytes), first)


def combine_partials_impl(partials: Sequence[Tensor], offsets: Tensor) -> Tensor:
    """`combine_partials` behind torch's dispatcher."""
    launch.require_kernels(partials[0])
    gathered = torch.stack([part.to(partials[0].device) for part in partials])
    return launch.combine(gathered, None, offsets_of(offsets, gathered))


def _count_rows(hidden: Tensor) -> int:
    return hidden.numel() // hidden.shape[-1] if hidden.shape[-1] else hidden.shape[:-1].numel()


def _tokens(name: str, hidden: Tensor, targets: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Targets and rows int64, before their values are looked at."""
    launch.require_kernels(hidden)
    targets = indices("targets", targets, hidden)
    return targets, rows_of(name, rows, targets, hidden, _count_rows(hidden))


def _partials(hidden: Tensor, targets: Tensor, rows: Tensor | None, head: Head, first: int = 0) -> Tensor:
    """(max, sum, target logit) of each token, float64 [T, 3], slice by slice of tokens and vocabulary."""
    count = len(targets)
    partials = torch.empty(count, 3, dtype=torch.float64, device=hidden.device)
    if not count:
        return partials
    if rows is not None and not hidden.is_cpu:
        # What a device cannot refuse becomes a target in no slice, whose response is NaN.
        if not _count_rows(hidden):
            return partials.fill_(torch.nan)
        inside = rows.clamp(0, _count_rows(hidden) - 1)
        targets, rows = torch.where(inside == rows, targets, -1), inside
    # Autocast would turn the products' types around, and a product into a given place is unknown to it.
    with torch.autocast(hidden.device.type, enabled=False):
        product = product_of(hidden, head, count)
        for begin in range(0, count, product.tokens):
            end = min(begin + product.tokens, count)
            chosen = gather(hidden, rows, begin, end)
            for start, logits in product.slices(chosen):
                packed = (*pack_logits("logits", logits), head.scale, head.softcap or 0.0)
                where = (0, targets[begin:].data_ptr(), end - begin, first + start, start == 0)
                arguments = (packed, *where, partials[begin:].data_ptr())
                launch.run_rows("add_partials", arguments, logits, packed, end - begin)
    return partials
