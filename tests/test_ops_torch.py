"""The operators inside torch: compile, fake tensors, transforms, gradients and views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from miwv_fast import ops

LOGITS = torch.randn(6, 300)
BATCH = torch.randn(2, 4, 300)
TARGETS = torch.tensor([0, 1, 2, 3, 4, 299])
ROWS = torch.tensor([5, 0, 0, 3, 2, 1])
OFFSETS = torch.tensor([0, 2, 6])

CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (ops.token_logprobs, (LOGITS, TARGETS)),
    (ops.token_logprobs, (BATCH[:, :-1], TARGETS, ROWS)),
    (ops.response_nll, (LOGITS.bfloat16(), TARGETS, OFFSETS, ROWS)),
    (ops.response_nll_difference, (LOGITS, BATCH[:, :-1], TARGETS, OFFSETS, ROWS)),
]
each_call = pytest.mark.parametrize(("function", "arguments"), CALLS)


def operator(function: Any) -> Any:
    return getattr(torch.ops.miwv_fast, function.__name__).default


@each_call
def test_opcheck(function: Any, arguments: tuple[Any, ...]) -> None:
    """Schema, fake implementation and tracing, as torch itself examines them."""
    torch.library.opcheck(operator(function), arguments)


@each_call
def test_operator_and_function_agree(function: Any, arguments: tuple[Any, ...]) -> None:
    assert torch.equal(operator(function)(*arguments), function(*arguments))


@each_call
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(function: Any, arguments: tuple[Any, ...], dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: function(*a) * 2, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert torch.equal(compiled(*arguments), function(*arguments) * 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    hidden, head = torch.randn(6, 16), torch.randn(300, 16)

    @torch.compile(fullgraph=True)
    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return ops.response_nll(hidden @ head.t(), TARGETS, OFFSETS) + 1

    torch.testing.assert_close(loss(hidden), ops.response_nll(hidden @ head.t(), TARGETS, OFFSETS) + 1)


@each_call
def test_fake_tensors(function: Any, arguments: tuple[Any, ...]) -> None:
    expected = function(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) for value in arguments]
        result = function(*fakes)
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
    assert function(*(value.to("meta") for value in arguments)).shape == expected.shape


def test_wrong_logits_are_refused_while_tracing() -> None:
    with FakeTensorMode(), pytest.raises(TypeError, match=r"logits are torch\.float64"):
        ops.token_logprobs(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))


def test_gradients_are_refused_where_they_would_be_needed() -> None:
    needy = LOGITS.clone().requires_grad_()
    for function in (ops.token_logprobs, torch.ops.miwv_fast.token_logprobs):
        with pytest.raises(ValueError, match=r"logits require a gradient.*torch\.no_grad\(\)"):
            function(needy, TARGETS)
        with torch.no_grad():
            assert torch.equal(function(needy, TARGETS), ops.token_logprobs(LOGITS, TARGETS))
        with torch.inference_mode():
            assert not function(needy, TARGETS).requires_grad
    with pytest.raises(ValueError, match="logits require a gradient"):
        torch.func.grad(lambda logits: ops.token_logprobs(logits, TARGETS).sum())(LOGITS)
    parameter = torch.nn.Parameter(LOGITS, requires_grad=False)
    assert torch.equal(ops.token_logprobs(parameter, TARGETS), ops.token_logprobs(LOGITS, TARGETS))


def test_gradients_are_refused_by_compiled_code() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.token_logprobs, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="logits require a gradient"):
        compiled(LOGITS.clone().requires_grad_(), TARGETS)


def test_negative_views_are_refused() -> None:
    negative = torch._neg_view(LOGITS)
    for function in (ops.token_logprobs, torch.ops.miwv_fast.token_logprobs):
        with pytest.raises(ValueError, match=r"logits are a negative view.*resolve_neg\(\)"):
            function(negative, TARGETS)
    imaginary = torch.randn(6, 300, dtype=torch.cfloat).conj().imag
    assert imaginary.is_neg()
    with pytest.raises(ValueError, match="negative view"):
        ops.token_logprobs(imaginary, TARGETS)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    stacked = torch.stack([LOGITS, LOGITS * 2])
    mapped = torch.vmap(lambda logits: ops.token_logprobs(logits, TARGETS))(stacked)
    assert torch.equal(mapped, torch.stack([ops.token_logprobs(logits, TARGETS) for logits in stacked]))


def test_default_device_and_dtype_do_not_matter() -> None:
    head = LOGITS[:, :16].bfloat16(), BATCH.view(8, 300)[:, :16].repeat(40, 1).bfloat16()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            result = ops.token_logprobs(LOGITS, TARGETS)
            linear = ops.linear_response_nll(*head, TARGETS, OFFSETS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.dtype is torch.float32 and result.is_cpu
    assert torch.equal(linear, ops.linear_response_nll(*head, TARGETS, OFFSETS))


def test_build_info() -> None:
    info = ops.build_info()
    assert info["isa"] in info["available_isas"] and info["available_isas"][0] == "generic"
    assert info["threads"] == torch.get_num_threads() and isinstance(info["cuda"], bool)


META_LOGITS, META_TARGETS = torch.empty(4, 7, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
META_HIDDEN, META_WEIGHT = torch.empty(4, 5, device="meta"), torch.empty(7, 5, device="meta")
META_OFFSETS = torch.zeros(3, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.token_logprobs(META_LOGITS, META_TARGETS[:3]), "targets have 3 entries, they must have 4"),
        (lambda: ops.token_logprobs(META_LOGITS, TARGETS.cpu()), "targets are on cpu, they must be on meta"),
        (lambda: ops.token_logprobs(META_LOGITS, META_TARGETS, META_TARGETS[:2]), "rows have 2 entries"),
        (lambda: ops.response_nll(META_LOGITS, META_TARGETS, META_OFFSETS[:0]), "offsets are empty"),
        (lambda: ops.response_nll(META_LOGITS, META_TARGETS, torch.zeros(3, dtype=torch.int64)), "offsets are on cpu"),
        (
            lambda: ops.response_nll_difference(META_LOGITS, META_LOGITS[:, :6], META_TARGETS, META_OFFSETS),
            "zero_shot_logits have V 6, it must be 7",
        ),
        (
            lambda: ops.response_nll_difference(META_LOGITS, META_LOGITS[:3], META_TARGETS, META_OFFSETS),
            "give zero_shot_rows",
        ),
        (
            lambda: ops.linear_response_nll(META_HIDDEN, META_WEIGHT[:, :4], META_TARGETS, META_OFFSETS),
            "weight has shape",
        ),
        (
            lambda: ops.linear_response_nll_difference(
                META_HIDDEN, META_HIDDEN[:, :4], META_WEIGHT, META_TARGETS, META_OFFSETS
            ),
            "zero_shot_hidden have H 4, it must be 5",
        ),
        (lambda: ops.response_nll_partials(META_HIDDEN, META_WEIGHT, META_TARGETS, scale=-1.0), "scale is -1.0"),
        (
            lambda: ops.combine_partials([torch.empty(4, 2, dtype=torch.float64, device="meta")], META_OFFSETS),
            r"has shape \(4, 2\), it must be \[4, 3\]",
        ),
    ],
)
def test_meta_tensors_are_checked_like_real_ones(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
