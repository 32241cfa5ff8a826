"""The head without logits on a GPU: against float64, in slices, for bad data, in graphs, and in bounded memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from cuda_support import DEVICE, needs_cuda

from miwv_fast import ops
from miwv_fast.ops import products
from test_ops_linear import expected_nll, head_of, rounding
from test_ops_reference import DTYPES, bits

needs_cuda()


@pytest.fixture(params=[False, True], ids=["large", "small"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices as they are, and so small that there are many."""
    if request.param:
        monkeypatch.setattr(products, "_SLICE_TOKENS", {"cuda": 16})
        monkeypatch.setattr(products, "_SLICE_BYTES", {"cuda": 4 * 16 * 256})


def _problem(vocab: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(vocab)
    hidden = (torch.randn(3, 40, width, generator=generator) * 2).to(dtype)
    rows = torch.randint(120, (70,), generator=generator)
    targets = torch.randint(vocab, (70,), generator=generator)
    return hidden, *head_of(vocab, width, dtype), targets, rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "width"), [(65, 16), (4099, 64), (32001, 128)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.0625, None), (1.0, 30.0)])
def test_losses(
    dtype: torch.dtype, vocab: int, width: int, scale: float, softcap: float | None, slices: None, split: int
) -> None:
    hidden, weight, bias, targets, rows = _problem(vocab, width, dtype)
    offsets = [0, 1, 1, 30, 70]
    options = {"bias": bias, "scale": scale, "softcap": softcap}
    expected = expected_nll(hidden, weight, targets, offsets, rows, **options)
    there = [values.to(DEVICE) for values in (hidden, weight, targets, torch.tensor(offsets), rows)]
    result = ops.linear_response_nll(*there, **options | {"bias": bias.to(DEVICE)})
    exact = dtype is torch.float32 or products._gives_float32(DEVICE.index, dtype)
    allowed = rounding(weight, hidden) if exact else rounding(weight, hidden) * 2**16
    np.testing.assert_allclose(result.cpu().numpy(), expected, rtol=0, atol=scale * allowed)


def test_difference_and_pieces(slices: None, split: int) -> None:
    hidden, weight, bias, targets, rows = (values.to(DEVICE) for values in _problem(4099, 64, torch.float32))
    offsets = torch.tensor([0, 30, 70], device=DEVICE)
    other = hidden.flip(0)
    one, zero = (ops.linear_response_nll(h, weight, targets, offsets, rows, bias=bias) for h in (hidden, other))
    difference = ops.linear_response_nll_difference(hidden, other, weight, targets, offsets, rows, rows, bias=bias)
    torch.testing.assert_close(difference, one - zero, rtol=0, atol=1e-5)
    parts = [
        ops.response_nll_partials(hidden, weight[a:b], targets, rows, first=a, bias=bias[a:b])
        for a, b in pairwise((0, 1, 2000, 4099))
    ]
    torch.testing.assert_close(ops.combine_partials(parts, offsets), one, rtol=0, atol=1e-5)
    assert ops.combine_partials(parts[:1], offsets).isnan().all()
    assert torch.equal(ops.combine_partials([part.cpu() for part in parts], offsets.cpu()).isnan(), one.isnan().cpu())


def test_bad_data_is_nan_where_it_is_and_an_error_when_asked(split: int) -> None:
    hidden, weight, _, _, _ = (values.to(DEVICE) for values in _problem(4099, 64, torch.float32))
    targets = torch.tensor([0, -100, 1, 4099, 5], device=DEVICE)
    rows = torch.tensor([0, 1, 120, 3, -1], device=DEVICE)
    offsets = torch.arange(6, device=DEVICE)
    result = ops.linear_response_nll(hidden, weight, targets, offsets, rows)
    assert result.isnan().tolist() == [False, True, True, True, True]
    with pytest.raises(ValueError, match=r"rows\[2\] is 120, outside \[0, 120\)"):
        ops.linear_response_nll(hidden, weight, targets, offsets, rows, check=True)


def test_repeats_are_equal_to_the_bit_and_wait_for_nothing() -> None:
    hidden, weight, _, targets, rows = (values.to(DEVICE) for values in _problem(32001, 128, torch.bfloat16))
    offsets = torch.tensor([0, 30, 70], device=DEVICE)
    first = ops.linear_response_nll(hidden, weight, targets, offsets, rows)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        again = ops.linear_response_nll(hidden, weight, targets, offsets, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(bits(again), bits(first))


def test_a_cuda_graph_replays_on_new_data() -> None:
    hidden, weight, _, targets, rows = (values.to(DEVICE) for values in _problem(4099, 64, torch.bfloat16))
    offsets = torch.tensor([0, 30, 70], device=DEVICE)
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        ops.linear_response_nll(hidden, weight, targets, offsets, rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.linear_response_nll(hidden, weight, targets, offsets, rows)
    for _ in range(2):
        hidden.copy_(torch.randn(hidden.shape))
        graph.replay()
        assert torch.equal(bits(result), bits(ops.linear_response_nll(hidden, weight, targets, offsets, rows)))


@pytest.mark.parametrize("tokens", [64, 8192])
def test_no_more_than_the_workspace(tokens: int) -> None:
    """And what lies beside it: the result, 24 bytes per token, and torch's rounding of each block."""
    hidden = torch.randn(tokens, 256, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(128256, 256, device=DEVICE, dtype=torch.bfloat16)
    targets, offsets = torch.arange(tokens, device=DEVICE), torch.tensor([0, tokens], device=DEVICE)
    ops.linear_response_nll(hidden, weight, targets, offsets)  # the BLAS library's own workspace is there from now on
    for workspace in (8 << 20, 256 << 20):
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        ops.linear_response_nll(hidden, weight, targets, offsets, workspace_bytes=workspace)
        split_rows = 64 * 64 * 264  # partial sums of split rows, where there are few
        assert torch.cuda.max_memory_allocated(DEVICE) - before <= workspace + 100 * tokens + split_rows + (1 << 20)
