"""Every argument of every function, given what it cannot be: a TypeError or ValueError that names it, never a crash."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from miwv_fast import ops

LOGITS = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
HIDDEN = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
WEIGHT = torch.randn(10, 6, generator=torch.Generator().manual_seed(3))
ROWS = torch.tensor([3, 0, 0, 2])
TARGETS = torch.tensor([0, 9, 4, 1])
OFFSETS = torch.tensor([0, 1, 4])
PARTIALS = [ops.response_nll_partials(HIDDEN, WEIGHT, TARGETS, ROWS)]

FITTING: dict[str, Any] = {
    "logits": LOGITS,
    "one_shot_logits": LOGITS,
    "zero_shot_logits": LOGITS,
    "hidden": HIDDEN,
    "one_shot_hidden": HIDDEN,
    "zero_shot_hidden": HIDDEN,
    "weight": WEIGHT,
    "bias": WEIGHT[:, 0].contiguous(),
    "targets": TARGETS,
    "rows": ROWS,
    "one_shot_rows": ROWS,
    "zero_shot_rows": ROWS,
    "offsets": OFFSETS,
    "partials": PARTIALS,
    "labels": TARGETS[None],
}
OPTIONS: dict[str, Any] = {
    "softcap": 30.0, "scale": 0.5, "workspace_bytes": 1 << 20, "check": True, "first": 0, "ignore_index": -100
}  # fmt: skip
FUNCTIONS = [getattr(ops, name) for name in ops.__all__ if name != "build_info"]

NO_TENSORS = [None, 0, 1.5, "text", [0, 1], LOGITS.numpy(), object()]
ODD_FLOATS = [
    LOGITS.double(), LOGITS.to(torch.int64), LOGITS.to(torch.complex64), LOGITS > 0, LOGITS.to_sparse(),
    LOGITS.clone().requires_grad_(), torch._neg_view(LOGITS), torch.tensor(1.0), LOGITS[None, None], LOGITS[:, :0],
    LOGITS[:3], LOGITS.to("meta"), torch.zeros(3, 4, dtype=torch.float16),
]  # fmt: skip
ODD_INDICES = [
    TARGETS.float(), TARGETS.to(torch.int16), TARGETS > 0, TARGETS[None], torch.tensor(0), TARGETS[:3], TARGETS + 100,
    TARGETS - 100, TARGETS.to("meta"), torch.full((4,), 2**62), torch.full((4,), -(2**63)),
    torch.cat([TARGETS, TARGETS]), TARGETS[:0], TARGETS.to_sparse(), FakeTensorMode().from_tensor(TARGETS),
]  # fmt: skip
ODD_OPTIONS: dict[str, list[Any]] = {
    "softcap": ["text", True, 0, -1.0, math.nan, math.inf, [1.0], TARGETS, 10**400, 1e39, 1e-40],
    "scale": ["text", None, False, 0, -1.0, math.nan, math.inf, [1.0], TARGETS, 10**400, 1e39, 1e-46],
    "workspace_bytes": ["text", None, True, 1.5, 0, -1, TARGETS],
    "check": ["text", None, 1, 0.0, TARGETS],
    "first": ["text", None, True, 1.5, -1, 2**63, TARGETS],
    "ignore_index": ["text", None, True, 1.5, 2**63, TARGETS],
}


def wrong(argument: str) -> list[Any]:
    """Values that this argument cannot have."""
    if argument in ODD_OPTIONS:
        return ODD_OPTIONS[argument]
    if argument == "partials":
        return [*NO_TENSORS, *([value] for value in (*NO_TENSORS, *ODD_FLOATS)), PARTIALS[0], [], [PARTIALS[0][:, :2]]]
    if argument == "labels":
        odd = [LOGITS, TARGETS, TARGETS[None] > 0, TARGETS[None].to(torch.uint64), TARGETS[None].to("meta")]
        return [*NO_TENSORS, *odd]
    optional = argument == "bias" or argument.endswith("rows")
    odd = ODD_INDICES if argument.endswith(("rows", "targets", "offsets")) else ODD_FLOATS
    return [*(value for value in NO_TENSORS if value is not None or not optional), *odd]


def is_elsewhere(value: Any) -> bool:
    """Whether these are targets in another slice of the vocabulary, which is no mistake."""
    plain = type(value) is torch.Tensor and value.layout is torch.strided and value.is_cpu
    return plain and value.shape == (4,) and bool((value >= 10).all())


def cases() -> Iterator[Any]:
    for function in FUNCTIONS:
        for argument in inspect.signature(function).parameters:
            for number, value in enumerate(wrong(argument)):
                if function is ops.response_nll_partials and argument == "targets" and is_elsewhere(value):
                    continue
                kind = f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                yield pytest.param(function, argument, value, id=f"{function.__name__}-{argument}-{number}-{kind}")


@pytest.mark.parametrize(("function", "argument", "value"), list(cases()))
def test_a_wrong_argument_is_refused_by_name(function: Callable[..., Any], argument: str, value: Any) -> None:
    names = inspect.signature(function).parameters
    fitting = {name: FITTING[name] if name in FITTING else OPTIONS[name] for name in names}
    function(**fitting)
    with pytest.raises((TypeError, ValueError)) as raised:
        function(**{**fitting, argument: value})
    # Two arguments that do not fit each other are refused by the name of either.
    named = [argument] if argument in OPTIONS else names
    assert any(name in str(raised.value) for name in named), raised.value


def test_every_argument_is_known() -> None:
    arguments = {name for function in FUNCTIONS for name in inspect.signature(function).parameters}
    assert arguments == FITTING.keys() | OPTIONS.keys()
