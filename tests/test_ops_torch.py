"""The operators inside torch: compile, fake tensors, transforms, gradients and views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from miwv_fast import ops
from miwv_fast.ops import matmul

LOGITS = torch.randn(6, 300)
BATCH = torch.randn(2, 4, 300)
TARGETS = torch.tensor([0, 1, 2, 3, 4, 299])
ROWS = torch.tensor([5, 0, 0, 3, 2, 1])
OFFSETS = torch.tensor([0, 2, 6])

HIDDEN, HEAD, BIAS = torch.randn(6, 8), torch.randn(300, 8), torch.randn(300)
PARTIALS = ops.response_nll_partials(HIDDEN, HEAD, TARGETS)

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


def loss_of_head(hidden: torch.Tensor, targets: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> Any:
    return ops.combine_partials([ops.response_nll_partials(hidden, HEAD, targets, rows)], offsets)


DYNAMIC: list[tuple[Any, Callable[[int], tuple[Any, ...]]]] = [
    (ops.token_logprobs, lambda n: (torch.randn(n, 9), indices(n + 3), indices(n + 3))),
    (ops.response_nll, lambda n: (torch.randn(2, n, 9), indices(n + 3), ends(n + 3), indices(n + 3))),
    (ops.response_nll_difference, lambda n: (torch.randn(n, 9), torch.randn(n, 9), indices(n), ends(n))),
    (ops.linear_response_nll, lambda n: (torch.randn(2, n, 8), HEAD, indices(n + 3), ends(n + 3), indices(n + 3))),
    (loss_of_head, lambda n: (torch.randn(n, 8), indices(n + 3), ends(n + 3), indices(n + 3))),
]


def indices(count: int) -> torch.Tensor:
    return torch.arange(count) % 4


def ends(count: int) -> torch.Tensor:
    return torch.tensor([0, 2, count])


@pytest.mark.parametrize(("function", "make"), DYNAMIC)
def test_one_graph_serves_all_sizes(function: Any, make: Callable[[int], tuple[Any, ...]]) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for rows in (6, 7, 9, 11, 13, 17, 19, 23, 29, 31):
        arguments = make(rows)
        assert torch.equal(compiled(*arguments), function(*arguments))
    assert len(graphs) <= 2


@pytest.mark.filterwarnings("ignore")  # torch.export's own
def test_export_with_dynamic_sizes() -> None:
    class Loss(torch.nn.Module):
        def forward(self, logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return ops.token_logprobs(logits, targets, rows)

    sizes = ({0: torch.export.Dim.AUTO},) * 3
    exported = torch.export.export(Loss(), (LOGITS, TARGETS[:4], ROWS[:4]), dynamic_shapes=sizes).module()
    longer = torch.cat([LOGITS, LOGITS])
    assert torch.equal(exported(longer, TARGETS, ROWS + 6), ops.token_logprobs(longer, TARGETS, ROWS + 6))


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


INDICES = {"targets": TARGETS, "offsets": OFFSETS}
NEEDY: list[tuple[Any, dict[str, Any], str]] = [
    (ops.token_logprobs, {"logits": LOGITS, "targets": TARGETS}, "logits"),
    (ops.response_nll, {"logits": LOGITS, **INDICES}, "logits"),
    *(
        (ops.response_nll_difference, {"one_shot_logits": LOGITS, "zero_shot_logits": LOGITS, **INDICES}, name)
        for name in ("one_shot_logits", "zero_shot_logits")
    ),
    *(
        (ops.linear_response_nll, {"hidden": HIDDEN, "weight": HEAD, "bias": BIAS, **INDICES}, name)
        for name in ("hidden", "weight", "bias")
    ),
    *(
        (
            ops.linear_response_nll_difference,
            {"one_shot_hidden": HIDDEN, "zero_shot_hidden": HIDDEN, "weight": HEAD, "bias": BIAS, **INDICES},
            name,
        )
        for name in ("one_shot_hidden", "zero_shot_hidden", "weight", "bias")
    ),
    *(
        (ops.response_nll_partials, {"hidden": HIDDEN, "weight": HEAD, "bias": BIAS, "targets": TARGETS}, name)
        for name in ("hidden", "weight", "bias")
    ),
    (lambda part, offsets: ops.combine_partials([part], offsets), {"part": PARTIALS, "offsets": OFFSETS}, "part"),
]


@pytest.mark.parametrize(("function", "arguments", "name"), NEEDY)
def test_no_derivative_is_a_silent_zero(function: Any, arguments: dict[str, Any], name: str) -> None:
    """Nor do torch's transforms give one that is only warned of."""

    def call(value: torch.Tensor) -> torch.Tensor:
        return function(**{**arguments, name: value})

    def dual(value: torch.Tensor) -> Any:
        with forward_ad.dual_level():
            return call(forward_ad.make_dual(value, torch.ones_like(value)))

    value = arguments[name]
    for attempt, told in (
        (lambda: call(value.clone().requires_grad_()), "a gradient"),
        (lambda: torch.func.grad(lambda v: call(v).sum())(value), "a gradient"),
        (lambda: torch.func.jacrev(call)(value), "a gradient"),
        (lambda: torch.func.jacfwd(call)(value), "a tangent"),
        (lambda: dual(value), "a tangent"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\S* (requires?|has|have) {told}"):
            attempt()
    with torch.no_grad():
        assert torch.equal(call(value.clone().requires_grad_()), call(value))


def test_operators_themselves_refuse_gradients_in_transforms() -> None:
    call = operator(ops.response_nll_difference)
    with pytest.raises(ValueError, match="zero_shot_logits require a gradient"):
        torch.func.grad(lambda zero: call(LOGITS, zero, TARGETS, OFFSETS).sum())(LOGITS)
    with pytest.raises(ValueError, match="partials require a gradient"):
        operator(ops.combine_partials)([PARTIALS, PARTIALS.clone().requires_grad_()], OFFSETS)


class Wrapped(torch.Tensor):
    """A tensor whose data lie in another one: its own address is 0."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapped, lambda value: value.inner, (args, kwargs or {}))
        return function(*args, **kwargs)


@pytest.mark.parametrize(("function", "arguments", "name"), NEEDY)
def test_tensors_without_memory_of_their_own(function: Any, arguments: dict[str, Any], name: str) -> None:
    assert Wrapped(TARGETS).data_ptr() == 0
    expected = function(**arguments)
    for wrapped in (name, *(arguments.keys() & INDICES.keys())):
        assert torch.equal(function(**{**arguments, wrapped: Wrapped(arguments[wrapped])}), expected)
    rows = [
        row for row in ("rows", "one_shot_rows", "zero_shot_rows") if row in getattr(function, "__annotations__", {})
    ]
    for row in rows:
        given = function(**arguments, **{row: Wrapped(ROWS)})
        assert torch.equal(given, function(**arguments, **{row: ROWS})) and not torch.equal(given, expected)


def test_zero_tensors_and_negative_indices_are_read_as_what_they_stand_for() -> None:
    zeros = torch._efficientzerotensor(6, dtype=torch.int64)
    torch.testing.assert_close(ops.token_logprobs(LOGITS, zeros, zeros), LOGITS.log_softmax(-1)[0, 0].expand(6))
    assert torch.equal(ops.token_logprobs(LOGITS, torch._neg_view(-TARGETS)), ops.token_logprobs(LOGITS, TARGETS))
    with pytest.raises(ValueError, match="logits have stride 0"):
        ops.token_logprobs(torch._efficientzerotensor(6, 300), TARGETS)


def test_combine_partials_is_traced() -> None:
    traced = make_fx(lambda h, w: ops.combine_partials([ops.response_nll_partials(h, w, TARGETS)], OFFSETS))(
        HIDDEN, HEAD
    )
    assert torch.equal(traced(HIDDEN * 2, HEAD), ops.linear_response_nll(HIDDEN * 2, HEAD, TARGETS, OFFSETS))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert ops.combine_partials([PARTIALS], OFFSETS).shape == (2,)
    with pytest.raises(ValueError, match=r"partials\[1\] is on meta, partials\[0\] on cpu"):
        ops.combine_partials([PARTIALS, PARTIALS.to("meta")], OFFSETS)
    with pytest.raises(ValueError, match="offsets are on meta, they must be on cpu"):
        ops.combine_partials([PARTIALS], OFFSETS.to("meta"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout: torch.layout) -> None:
    logits = torch.nested.nested_tensor([LOGITS[:2], LOGITS[:3]], layout=layout)
    with pytest.raises(TypeError, match=r"logits are a nested tensor.*to_padded_tensor"):
        ops.token_logprobs(logits, TARGETS)
    pieces = torch.nested.nested_tensor([TARGETS[:2], TARGETS[2:]], layout=layout)
    with pytest.raises(TypeError, match=r"targets are a nested tensor.*torch\.cat"):
        ops.token_logprobs(LOGITS, pieces)


def test_integers_of_numpy() -> None:
    expected = ops.response_nll_partials(HIDDEN, HEAD, TARGETS, workspace_bytes=4096, first=1)
    given = ops.response_nll_partials(HIDDEN, HEAD, TARGETS, workspace_bytes=np.int64(4096), first=np.int32(1))
    assert torch.allclose(given, expected, equal_nan=True)


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
    assert info["onednn"] is matmul.uses_onednn()


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
