"""The head without logits: hidden states and weights to losses, in slices of tokens and vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miwv_fast import _core, ops
from miwv_fast.ops import products
from test_ops_reference import DTYPES, ISAS, assert_close, bits, reference


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many slices that every edge between them is met."""
    monkeypatch.setattr(products, "_SLICE_TOKENS", {"cpu": 5})
    monkeypatch.setattr(products, "_SLICE_BYTES", {"cpu": 4 * 5 * 64})


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> None:
    _core.select_isa(request.param)


def head_of(vocab: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=generator) * 0.6
    return weight.to(dtype), torch.randn(vocab, generator=generator).to(dtype)


def transform(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    scaled = logits.double() * scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def expected_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    offsets: list[int],
    rows: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> np.ndarray:
    """In float64, from the very numbers that the arguments hold."""
    logits = hidden.reshape(-1, hidden.shape[-1]).double() @ weight.double().T
    logits = logits if bias is None else logits + bias.double()
    logprobs = reference(transform(logits, scale, softcap), targets, rows)
    return np.array([-logprobs[begin:end].mean() if end > begin else np.nan for begin, end in pairwise(offsets)])


def rounding(weight: torch.Tensor, hidden: torch.Tensor) -> float:
    """What losses from float32 products of these numbers may be off by.

    Each of a logit's H additions rounds by half a unit of its magnitude at most, and independent errors add up to
    sqrt(H) of them; a loss holds two of these, its target's logit and the others'. The row kernel adds 1e-5.
    """
    magnitude = (hidden.reshape(-1, hidden.shape[-1]).double().abs() @ weight.double().abs().T).max()
    return hidden.shape[-1] ** 0.5 * float(magnitude) * torch.finfo(torch.float32).eps + 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "width"), [(1, 3), (63, 8), (64, 16), (65, 16), (1000, 32), (4099, 24)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.0625, None), (1.0, 30.0), (1.5, 2.0)])
def test_losses(
    small_slices: None, dtype: torch.dtype, vocab: int, width: int, scale: float, softcap: float | None
) -> None:
    """Every type, with and without bias, scale and cap: float64 of the same numbers, up to float32 products."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = (torch.randn(3, 7, width, generator=generator) * 2).to(dtype)
    weight, bias = head_of(vocab, width, dtype)
    rows = torch.tensor([20, 0, 3, 3, 11, 19, 7, 8, 9, 10, 12, 13])
    targets = torch.randint(vocab, (len(rows),), generator=generator)
    offsets = [0, 1, 1, 6, len(rows)]
    for given_bias in (None, bias):
        options = {"bias": given_bias, "scale": scale, "softcap": softcap}
        result = ops.linear_response_nll(hidden, weight, targets, torch.tensor(offsets), rows, **options)
        expected = expected_nll(hidden, weight, targets, offsets, rows, **options)
        assert result.dtype is torch.float32
        np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=scale * rounding(weight, hidden))


def test_sixteen_bits_are_not_rounded_again() -> None:
    """Logits of 16-bit models are float32: rounding them, as the model would, costs a thousand times more."""
    generator = torch.Generator().manual_seed(3)
    hidden = (torch.randn(40, 64, generator=generator) * 2).bfloat16()
    weight, _ = head_of(2000, 64, torch.bfloat16)
    targets, offsets = torch.randint(2000, (40,), generator=generator), list(range(41))
    expected = expected_nll(hidden, weight, targets, offsets)
    ours = ops.linear_response_nll(hidden, weight, targets, torch.tensor(offsets))
    rounded = ops.response_nll(hidden @ weight.T, targets, torch.tensor(offsets))
    assert np.abs(ours.numpy() - expected).max() < 1e-3 * np.abs(rounded.numpy() - expected).max()


KINDS = [products.Product, products._OneDnnProduct, products._ConvertedProduct, products._TiledProduct]


@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(1, 700),
    workspace=st.integers(1, 1 << 20),
    kind=st.sampled_from(KINDS),
    width=st.integers(1, 300),
)
def test_a_slice_fits_its_workspace(
    tokens: int, vocab: int, workspace: int, kind: type[products.Product], width: int
) -> None:
    dtype = torch.float32 if kind in KINDS[:2] else torch.bfloat16
    head = products.Head(torch.empty(vocab, width, dtype=dtype), None, None, 1.0, workspace)
    try:
        product = kind(head, tokens, torch.device("cpu"))
    except ValueError as error:
        least = int(re.search(r"it must be at least (\d+)", str(error))[1])
        # Tiles are 32 tokens and entries at least, and as wide; oneDNN has two slices of a token.
        tiled, slices = kind is products._TiledProduct, 2 if kind is products._OneDnnProduct else 1
        assert workspace < least <= (4 * 32 * 80 + 2 * 97 * (width + 31) if tiled else 4 * (64 * slices + 66 * width))
        return
    buffers = [value for value in vars(product).values() if isinstance(value, torch.Tensor)]
    gathered = product.tokens * width * dtype.itemsize
    converted = product.tokens * width * 4 if kind is products._ConvertedProduct else 0
    assert sum(buffer.nbytes for buffer in buffers) + gathered + converted <= workspace
    if kind is products._OneDnnProduct:  # two slices, and a copy of some of the head
        assert 4 * product._entries * (2 * product.tokens + width) + gathered <= workspace


@pytest.mark.parametrize(("onednn", "least"), [(False, 4500), (True, 4700)])
def test_a_small_workspace_changes_nothing(monkeypatch: pytest.MonkeyPatch, onednn: bool, least: int) -> None:
    monkeypatch.setattr(products, "uses_onednn", lambda: onednn)
    hidden, (weight, bias) = torch.randn(30, 16), head_of(900, 16, torch.float32)
    targets, offsets = torch.arange(30) * 30, torch.tensor([0, 4, 30])
    large = ops.linear_response_nll(hidden, weight, targets, offsets, bias=bias)
    for workspace in (least, 20_000, 100_000):
        small = ops.linear_response_nll(hidden, weight, targets, offsets, bias=bias, workspace_bytes=workspace)
        np.testing.assert_allclose(small.numpy(), large.numpy(), rtol=0, atol=rounding(weight, hidden))
    with pytest.raises(ValueError, match=r"workspace_bytes is 100, it must be at least \d+ for H = 16 and V = 900"):
        ops.linear_response_nll(hidden, weight, targets, offsets, workspace_bytes=100)


def test_hidden_states_are_read_in_place(small_slices: None) -> None:
    """Views with any strides, as models give them, and both orders of a weight."""
    storage = torch.randn(4, 9, 20)
    weight, _ = head_of(300, 20, torch.float32)
    columns = weight.T.contiguous().T
    close = {"rtol": 0, "atol": rounding(weight, storage)}
    for view in (storage[:, :-1], storage[::2], storage.transpose(0, 1), storage[0], storage):
        targets = torch.arange(view[..., 0].numel())
        offsets = torch.tensor([0, len(targets)])
        before = view.clone()
        expected = ops.linear_response_nll(view.contiguous(), weight, targets, offsets)
        assert torch.equal(bits(ops.linear_response_nll(view, weight, targets, offsets)), bits(expected))
        torch.testing.assert_close(ops.linear_response_nll(view, columns, targets, offsets), expected, **close)
        rows = torch.randperm(len(targets))
        some = ops.linear_response_nll(view, weight, targets[rows], offsets, rows)
        torch.testing.assert_close(some, expected, **close)
        assert torch.equal(view, before)


def test_the_difference_is_the_difference(small_slices: None) -> None:
    one, zero, (weight, bias) = torch.randn(2, 8, 16), torch.randn(11, 16), head_of(500, 16, torch.float32)
    targets, offsets = torch.arange(6) * 80, torch.tensor([0, 2, 2, 6])
    one_rows, zero_rows = torch.tensor([15, 3, 4, 5, 9, 0]), torch.tensor([0, 10, 1, 2, 3, 4])
    options = {"bias": bias, "scale": 0.5, "softcap": 20.0}
    result = ops.linear_response_nll_difference(one, zero, weight, targets, offsets, one_rows, zero_rows, **options)
    losses = [
        expected_nll(hidden, weight, targets, offsets.tolist(), rows, **options)
        for hidden, rows in ((one, one_rows), (zero, zero_rows))
    ]
    np.testing.assert_allclose(result.numpy(), losses[0] - losses[1], rtol=0, atol=rounding(weight, one))


@pytest.mark.parametrize("cuts", [[0, 700], [0, 1, 350, 699, 700], [0, 64, 128, 700]])
def test_a_head_in_pieces(cuts: list[int]) -> None:
    """Each piece knows its part of the vocabulary only; put together they are the whole."""
    hidden, (weight, bias) = torch.randn(12, 16), head_of(700, 16, torch.float32)
    targets, offsets = torch.tensor([0, 1, 349, 350, 698, 699, 63, 64, 127, 128, 5, 5]), torch.tensor([0, 3, 12])
    rows = torch.arange(12).flip(0)
    parts = [
        ops.response_nll_partials(hidden, weight[a:b], targets, rows, first=a, bias=bias[a:b], softcap=25.0)
        for a, b in pairwise(cuts)
    ]
    for part, (a, b) in zip(parts, pairwise(cuts), strict=True):
        assert part.dtype is torch.float64 and part.shape == (12, 3)
        assert part[:, 2].isnan().tolist() == [not a <= target < b for target in targets.tolist()]
        slice_logits = transform(hidden.double() @ weight[a:b].double().T + bias[a:b].double(), 1.0, 25.0)[rows]
        torch.testing.assert_close(part[:, 0] + part[:, 1].log(), slice_logits.logsumexp(1), rtol=0, atol=1e-5)
    whole = expected_nll(hidden, weight, targets, offsets.tolist(), rows, bias=bias, softcap=25.0)
    for order in (parts, parts[::-1]):
        np.testing.assert_allclose(ops.combine_partials(order, offsets).numpy(), whole, rtol=0, atol=1e-5)


def test_slices_of_nothing_but_minus_infinity(small_slices: None) -> None:
    """A masked part of the vocabulary has no probability, whichever slice it fills; all masked is no softmax."""
    hidden, (weight, _) = torch.randn(9, 8), head_of(300, 8, torch.float32)
    targets, offsets = torch.arange(9) + 130, torch.arange(10)
    for masked in (slice(0, 128), slice(64, 128), slice(192, 300)):
        # Far below 0 as well: a slice without a maximum has none to compare with. There a logit is rounded by 2^-14,
        # and a loss holds two.
        for rest, rounded in ((0.0, 0.0), (-1024.0, 2 * 2.0**-14)):
            bias = torch.full((300,), rest)
            bias[masked] = -torch.inf
            result = ops.linear_response_nll(hidden, weight, targets, offsets, bias=bias)
            expected = expected_nll(hidden, weight, targets, list(range(10)), bias=bias)
            np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-5 + rounded)
    bias = torch.full((300,), -torch.inf)
    assert ops.linear_response_nll(hidden, weight, targets, offsets, bias=bias).isnan().all()
    bias[:] = 0
    bias[133] = -torch.inf
    assert (ops.linear_response_nll(hidden, weight, targets, offsets, bias=bias) == torch.inf).tolist() == [
        place == 3 for place in range(9)
    ]


def test_nan_stays_in_its_response(small_slices: None) -> None:
    hidden, (weight, _) = torch.randn(9, 8), head_of(300, 8, torch.float32)
    hidden[4, 2] = torch.nan
    result = ops.linear_response_nll(hidden, weight, torch.arange(9), torch.tensor([0, 3, 6, 9]))
    assert result.isnan().tolist() == [False, True, False]
    assert ops.linear_response_nll(hidden[:0], weight, torch.arange(0), torch.tensor([0, 0])).isnan().all()


def test_autocast_leaves_it_alone() -> None:
    hidden, (weight, _) = torch.randn(9, 8), head_of(300, 8, torch.float32)
    arguments = (hidden, weight, torch.arange(9), torch.tensor([0, 9]))
    expected = ops.linear_response_nll(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear_response_nll(*arguments), expected)


# ---- Scale and softcap in the row kernel itself


def kernel_logprobs(logits: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    out = torch.empty(len(targets))
    packed = (*ops.checks.pack_logits("logits", logits), scale, softcap)
    _core.cpu_token_logprobs(packed, 0, targets.data_ptr(), len(targets), out.data_ptr(), 1)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 17, 64, 1025, 50257])
@pytest.mark.parametrize(("scale", "softcap"), [(0.0625, 0.0), (13.0, 0.0), (1.0, 30.0), (0.25, 50.0), (3.0, 1.0)])
def test_transformed_rows(isa: None, dtype: torch.dtype, vocab: int, scale: float, softcap: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    values = torch.randn(6, vocab, generator=generator)
    dominated = values[1].clone()
    dominated[vocab // 2] = 60
    rows = [values[0] * 3, dominated, values[2] * 40, values[3] * 0.01, torch.full((vocab,), 7.0), values[5] * 3 - 90]
    logits = torch.stack(rows).to(dtype)
    targets = torch.tensor([0, vocab // 2, vocab - 1, 0, vocab - 1, vocab // 2])
    expected = reference(transform(logits, scale, softcap or None), targets)
    assert_close(kernel_logprobs(logits, targets, scale, softcap), expected)


def test_a_cap_of_any_size(isa: None) -> None:
    """Near 0 the cap does nothing, and costs no accuracy however large it is."""
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(1)) * 4
    targets = torch.tensor([0, 1000, 1999])
    for softcap in (1e-3, 1.0, 1e3, 1e6):
        expected = reference(transform(logits, 1.0, softcap), targets)
        assert_close(kernel_logprobs(logits, targets, 1.0, softcap), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 9, 300, 1100])
def test_transformed_values_that_are_not_finite(isa: None, dtype: torch.dtype, vocab: int) -> None:
    """tanh makes infinities finite, a scale leaves them; NaN stays; a scale that overflows float32 does no harm."""
    for value in (torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max, torch.finfo(dtype).min):
        for place in {0, vocab // 2, vocab - 1}:
            for scale, softcap in ((2.0, 0.0), (0.5, 0.0), (1.0, 5.0)):
                logits = torch.randn(3, vocab).to(dtype)
                logits[:, place] = value
                targets = torch.tensor([0, place, vocab - 1])
                expected = reference(transform(logits, scale, softcap or None), targets)
                assert_close(kernel_logprobs(logits, targets, scale, softcap), expected)


# ---- Inside torch

HIDDEN, WEIGHT, BIAS = torch.randn(6, 16), torch.randn(300, 16), torch.randn(300)
TARGETS, ROWS, OFFSETS = torch.tensor([0, 1, 2, 3, 4, 299]), torch.tensor([5, 0, 0, 3, 2, 1]), torch.tensor([0, 2, 6])
PARTIALS = [ops.response_nll_partials(HIDDEN, WEIGHT[a:b], TARGETS, first=a) for a, b in ((0, 100), (100, 300))]
CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (ops.linear_response_nll, (HIDDEN, WEIGHT, TARGETS, OFFSETS), {}),
    (ops.linear_response_nll, (HIDDEN, WEIGHT, TARGETS, OFFSETS, ROWS), {"bias": BIAS, "softcap": 9.0, "scale": 0.5}),
    (ops.linear_response_nll_difference, (HIDDEN, HIDDEN.flip(0), WEIGHT, TARGETS, OFFSETS, ROWS), {"bias": BIAS}),
    (ops.response_nll_partials, (HIDDEN, WEIGHT, TARGETS + 7, ROWS), {"first": 7, "workspace_bytes": 10_000}),
    (ops.combine_partials, (PARTIALS, OFFSETS), {}),
]
each_call = pytest.mark.parametrize(("function", "arguments", "options"), CALLS)


@each_call
def test_operators(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Schema, fake implementation and tracing, as torch itself examines them; compiled, the result is the same."""
    operator = getattr(torch.ops.miwv_fast, function.__name__).default
    torch.library.opcheck(operator, arguments, options)
    expected = function(*arguments, **options)
    torch.testing.assert_close(operator(*arguments, **options), expected, rtol=0, atol=0, equal_nan=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: function(*a, **options) * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), expected * 2, rtol=0, atol=0, equal_nan=True)


def test_gradients_are_refused() -> None:
    weight = torch.nn.Parameter(WEIGHT)
    with pytest.raises(ValueError, match=r"weight requires a gradient.*torch\.no_grad\(\)"):
        ops.linear_response_nll(HIDDEN, weight, TARGETS, OFFSETS)
    with torch.no_grad():
        result = ops.linear_response_nll(HIDDEN, weight, TARGETS, OFFSETS)
    assert torch.equal(result, ops.linear_response_nll(HIDDEN, WEIGHT, TARGETS, OFFSETS))
    with torch.inference_mode():
        assert torch.equal(ops.linear_response_nll(HIDDEN.clone(), weight, TARGETS, OFFSETS), result)


def call(**changed: Any) -> torch.Tensor:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "offsets": OFFSETS, **changed}
    return ops.linear_response_nll(**arguments)


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: call(hidden=[[0.0]]), TypeError, r"hidden must be a tensor, not list"),
    (lambda: call(hidden=HIDDEN.double()), TypeError, r"hidden is torch.float64, must be float32"),
    (lambda: call(hidden=HIDDEN[0]), ValueError, r"hidden has shape \(16,\), it must be \[rows, H\] or \[B, T, H\]"),
    (lambda: call(hidden=HIDDEN.to_sparse()), TypeError, r"hidden has layout torch.sparse_coo"),
    (lambda: call(weight=WEIGHT.half()), TypeError, r"weight is torch.float16, it must be torch.float32"),
    (lambda: call(weight=WEIGHT.to("meta")), ValueError, r"weight is on meta, it must be on cpu"),
    (lambda: call(weight=WEIGHT[:, :9]), ValueError, r"weight has shape \(300, 9\), it must be \[V, 16\]"),
    (lambda: call(weight=WEIGHT[:0]), ValueError, r"weight has shape \(0, 16\), it must be \[V, 16\], V at least 1"),
    (lambda: call(weight=WEIGHT.to(torch.int8)), TypeError, r"weight is torch.int8, must be float32"),
    (lambda: call(bias=BIAS[:5]), ValueError, r"bias has shape \(5,\), it must be \[300\]"),
    (lambda: call(softcap=0.0), ValueError, r"softcap is 0.0, it must be a finite number above 0"),
    (lambda: call(softcap=float("nan")), ValueError, r"softcap is nan"),
    (lambda: call(scale=-1.0), ValueError, r"scale is -1.0, it must be a finite number above 0"),
    (lambda: call(scale=float("inf")), ValueError, r"scale is inf"),
    (lambda: call(targets=TARGETS + 1), ValueError, r"targets\[5\] is 300, outside \[0, 300\)"),
    (lambda: call(targets=[0]), TypeError, r"targets must be an int64 or int32 tensor, not list"),
    (lambda: call(hidden=HIDDEN.to("meta"), weight=WEIGHT.to("meta"), targets=[0]), TypeError, r"targets must be an"),
    (lambda: call(targets=TARGETS[:3]), ValueError, r"targets have 3 entries, they must have 6"),
    (lambda: call(rows=ROWS + 1), ValueError, r"rows\[0\] is 6, outside \[0, 6\)"),
    (lambda: call(offsets=OFFSETS + 1), ValueError, r"offsets\[0\] is 1, it must be 0"),
    (
        lambda: ops.linear_response_nll_difference(HIDDEN, HIDDEN[:, :9], WEIGHT, TARGETS, OFFSETS),
        ValueError,
        r"zero_shot_hidden have H 9, it must be 16",
    ),
    (
        lambda: ops.response_nll_partials(HIDDEN, WEIGHT, TARGETS - 1),
        ValueError,
        r"targets\[0\] is -1, outside \[0, \.\.\.\), the whole vocabulary",
    ),
    (lambda: ops.combine_partials([], OFFSETS), TypeError, r"partials must be a list of at least one tensor"),
    (lambda: ops.combine_partials([HIDDEN], OFFSETS), TypeError, r"partials\[0\] must be a float64 tensor"),
    (
        lambda: ops.combine_partials([PARTIALS[0], PARTIALS[1][:3]], OFFSETS),
        ValueError,
        r"partials\[1\] has shape \(3, 3\), it must be \[6, 3\]",
    ),
    (
        lambda: ops.combine_partials(PARTIALS[:1], OFFSETS),
        ValueError,
        r"no slice of the partials holds the target of token 5; they must cover the vocabulary",
    ),
    (lambda: ops.combine_partials(PARTIALS, OFFSETS[:2]), ValueError, r"offsets\[1\] is 2, it must be 6"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_errors_name_the_argument_and_what_would_be_right(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
