"""The operators under their names in torch.library, with what they return for fake tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from miwv_fast.ops import linear, logits
from miwv_fast.ops.checks import (
    check_gradient,
    check_head,
    check_hidden,
    check_logits,
    check_pair,
    check_partials,
    indices,
    rows_of,
)

_library = torch.library.Library("miwv_fast", "DEF")


def _register(schema: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    name = schema.split("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA", "Negative"):  # negative views are refused there, not copied behind the caller's back
        _library.impl(name, implementation, key)
    _library.impl(name, _refuse_gradients(name), "Autograd")
    torch.library.register_fake(f"miwv_fast::{name}", fake, lib=_library)


def _refuse_gradients(name: str) -> Callable[..., Tensor]:
    """Without it torch would only warn, and give zeros, of arguments that show only here that they need a gradient."""
    operator = getattr(torch.ops.miwv_fast, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def below_autograd(*arguments: Any, **options: Any) -> Tensor:
        for argument, value in chain(zip(names, arguments, strict=False), options.items()):
            if isinstance(value, Tensor):
                check_gradient(argument, value)
            elif type(value) is list:
                for part in value:
                    check_gradient(argument, part)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = operator(*arguments, **options)
        return result

    return below_autograd


def _fake_token_logprobs(values: Tensor, targets: Tensor, rows: Tensor | None = None, *, check: bool = False) -> Tensor:
    check_logits("logits", values)
    _check_beside(values, targets, rows=rows)
    return values.new_empty(targets.shape, dtype=torch.float32)


def _fake_response_nll(
    values: Tensor, targets: Tensor, offsets: Tensor, rows: Tensor | None = None, *, check: bool = False
) -> Tensor:
    check_logits("logits", values)
    return _per_response(values, targets, offsets, rows=rows)


def _fake_response_nll_difference(
    one_shot: Tensor,
    zero_shot: Tensor,
    targets: Tensor,
    offsets: Tensor,
    one_shot_rows: Tensor | None = None,
    zero_shot_rows: Tensor | None = None,
    *,
    check: bool = False,
) -> Tensor:
    check_logits("one_shot_logits", one_shot)
    check_logits("zero_shot_logits", zero_shot)
    check_pair(one_shot, zero_shot, "logits", "V")
    _check_beside(zero_shot, targets, zero_shot_rows=zero_shot_rows)
    return _per_response(one_shot, targets, offsets, one_shot_rows=one_shot_rows)


def _fake_linear(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    **options: Any,
) -> Tensor:
    check_head(hidden, weight, bias, softcap, scale)
    return _per_response(hidden, targets, offsets, rows=rows)


def _fake_linear_difference(
    one_shot: Tensor,
    zero_shot: Tensor,
    weight: Tensor,
    targets: Tensor,
    offsets: Tensor,
    one_shot_rows: Tensor | None = None,
    zero_shot_rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    **options: Any,
) -> Tensor:
    check_hidden("zero_shot_hidden", zero_shot)
    check_head(one_shot, weight, bias, softcap, scale, "one_shot_hidden")
    check_pair(one_shot, zero_shot, "hidden", "H")
    _check_beside(zero_shot, targets, zero_shot_rows=zero_shot_rows)
    return _per_response(one_shot, targets, offsets, one_shot_rows=one_shot_rows)


def _fake_partials(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    **options: Any,
) -> Tensor:
    check_head(hidden, weight, bias, softcap, scale)
    _check_beside(hidden, targets, rows=rows)
    return hidden.new_empty((targets.shape[0], 3), dtype=torch.float64)


def _fake_combine(partials: Sequence[Tensor], offsets: Tensor) -> Tensor:
    check_partials(partials, offsets)
    indices("offsets", offsets, partials[0])
    _check_some(offsets)
    return partials[0].new_empty((offsets.shape[0] - 1,), dtype=torch.float32)


def _per_response(beside: Tensor, targets: Tensor, offsets: Tensor, **rows: Tensor | None) -> Tensor:
    _check_beside(beside, targets, offsets=offsets, **rows)
    _check_some(offsets)
    return beside.new_empty((offsets.shape[0] - 1,), dtype=torch.float32)


def _check_beside(beside: Tensor, targets: Tensor, offsets: Tensor | None = None, **rows: Tensor | None) -> None:
    """What the kernels' own checks say of kinds, devices and numbers; of sizes that are symbols nothing is known."""
    indices("targets", targets, beside)
    if offsets is not None:
        indices("offsets", offsets, beside)
    num_rows = math.prod(beside.shape[:-1])  # which, unlike numel(), keeps symbols
    for name, values in rows.items():
        sizes = (num_rows, targets.shape[0], 0 if values is None else values.shape[0])
        if all(type(size) is int for size in sizes):
            rows_of(name, values, targets, beside, num_rows)


def _check_some(offsets: Tensor) -> None:
    if type(offsets.shape[0]) is int and not offsets.shape[0]:
        raise ValueError("offsets are empty, they must have one entry more than there are responses")


_HEAD = (
    "Tensor? bias=None, float? softcap=None, float scale=1.0, "
    f"int workspace_bytes={linear.WORKSPACE_BYTES}, bool check=False"
)
_register(
    "token_logprobs(Tensor logits, Tensor targets, Tensor? rows=None, *, bool check=False) -> Tensor",
    logits.token_logprobs_impl,
    _fake_token_logprobs,
)
_register(
    "response_nll(Tensor logits, Tensor targets, Tensor offsets, Tensor? rows=None, *, bool check=False) -> Tensor",
    logits.response_nll_impl,
    _fake_response_nll,
)
_register(
    "response_nll_difference(Tensor one_shot_logits, Tensor zero_shot_logits, Tensor targets, Tensor offsets, "
    "Tensor? one_shot_rows=None, Tensor? zero_shot_rows=None, *, bool check=False) -> Tensor",
    logits.response_nll_difference_impl,
    _fake_response_nll_difference,
)
_register(
    f"linear_response_nll(Tensor hidden, Tensor weight, Tensor targets, Tensor offsets, Tensor? rows=None, *, {_HEAD}) "
    "-> Tensor",
    linear.linear_response_nll_impl,
    _fake_linear,
)
_register(
    "linear_response_nll_difference(Tensor one_shot_hidden, Tensor zero_shot_hidden, Tensor weight, Tensor targets, "
    f"Tensor offsets, Tensor? one_shot_rows=None, Tensor? zero_shot_rows=None, *, {_HEAD}) -> Tensor",
    linear.linear_response_nll_difference_impl,
    _fake_linear_difference,
)
_register(
    "response_nll_partials(Tensor hidden, Tensor weight, Tensor targets, Tensor? rows=None, *, int first=0, "
    f"{_HEAD}) -> Tensor",
    linear.response_nll_partials_impl,
    _fake_partials,
)
_register(
    "combine_partials(Tensor[] partials, Tensor offsets) -> Tensor",
    linear.combine_partials_impl,
    _fake_combine,
)
