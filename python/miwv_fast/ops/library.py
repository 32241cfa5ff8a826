"""The operators under their names in torch.library, with what they return for fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from miwv_fast.ops import linear, logits
from miwv_fast.ops.checks import check_head, check_indices, check_logits

_library = torch.library.Library("miwv_fast", "DEF")


def _register(schema: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    name = schema.split("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA", "Negative"):  # negative views are refused there, not copied behind the caller's back
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"miwv_fast::{name}", fake, lib=_library)


def _fake_token_logprobs(values: Tensor, targets: Tensor, rows: Tensor | None = None, *, check: bool = False) -> Tensor:
    check_logits("logits", values)
    check_indices("targets", targets)
    return values.new_empty(targets.shape, dtype=torch.float32)


def _fake_response_nll(
    values: Tensor, targets: Tensor, offsets: Tensor, rows: Tensor | None = None, *, check: bool = False
) -> Tensor:
    check_logits("logits", values)
    return _per_response(values, targets, offsets)


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
    return _per_response(one_shot, targets, offsets)


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
    return _per_response(hidden, targets, offsets)


def _fake_linear_difference(
    one_shot: Tensor,
    zero_shot: Tensor,
    weight: Tensor,
    targets: Tensor,
    offsets: Tensor,
    one_shot_rows: Tensor | None = None,
    zero_shot_rows: Tensor | None = None,
    **options: Any,
) -> Tensor:
    return _per_response(one_shot, targets, offsets)


def _fake_partials(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None = None, **options: Any
) -> Tensor:
    check_indices("targets", targets)
    return hidden.new_empty((targets.shape[0], 3), dtype=torch.float64)


def _fake_combine(partials: Sequence[Tensor], offsets: Tensor) -> Tensor:
    check_indices("offsets", offsets)
    return partials[0].new_empty((offsets.shape[0] - 1,), dtype=torch.float32)


def _per_response(beside: Tensor, targets: Tensor, offsets: Tensor) -> Tensor:
    check_indices("targets", targets)
    check_indices("offsets", offsets)
    return beside.new_empty((offsets.shape[0] - 1,), dtype=torch.float32)


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
