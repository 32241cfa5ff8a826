"""How calls behave on a GPU: responses, bad data, streams, graphs, devices, memory, and torch's operators."""

from __future__ import annotations

import pytest
import torch
from cuda_support import DEVICE, cpu_reference, mean_nll, needs_cuda

from miwv_fast import ops
from test_ops_reference import DTYPES, assert_close, bits

needs_cuda()


def _responses(vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Two logits; targets, offsets and rows for responses of no, one, a few and many tokens."""
    generator = torch.Generator(DEVICE).manual_seed(vocab)
    one, zero = ((torch.randn(40, vocab, device=DEVICE, generator=generator) * 4).to(dtype) for _ in range(2))
    offsets = torch.tensor([0, 1, 1, 4, 300, 300, 600], device=DEVICE)
    targets = torch.randint(vocab, (600,), device=DEVICE, generator=generator)
    rows = [torch.randint(40, (600,), device=DEVICE, generator=generator) for _ in range(2)]
    return one, zero, targets, offsets, *rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [7, 1000, 20011])
def test_responses(dtype: torch.dtype, vocab: int, split: int) -> None:
    one, zero, targets, offsets, one_rows, zero_rows = _responses(vocab, dtype)
    before = one.clone(), zero.clone()
    one_nll, zero_nll = (
        mean_nll(cpu_reference(logits, targets, rows), offsets) for logits, rows in ((one, one_rows), (zero, zero_rows))
    )
    assert_close(ops.response_nll(one, targets, offsets, one_rows).cpu(), one_nll)
    difference = ops.response_nll_difference(one, zero, targets, offsets, one_rows, zero_rows)
    assert_close(difference.cpu(), one_nll - zero_nll)
    assert all(torch.equal(now, then) for now, then in zip((one, zero), before, strict=True))


def test_a_response_knows_nothing_of_the_rest(split: int) -> None:
    one, zero, targets, offsets, one_rows, zero_rows = _responses(20011, torch.bfloat16)
    together = ops.response_nll_difference(one, zero, targets, offsets, one_rows, zero_rows)
    for number, (begin, end) in enumerate(offsets.unfold(0, 2, 1).tolist()):
        own, part = torch.tensor([0, end - begin], device=DEVICE), slice(begin, end)
        alone = ops.response_nll_difference(one, zero, targets[part], own, one_rows[part], zero_rows[part])
        assert torch.equal(bits(alone), bits(together[number : number + 1]))


@pytest.mark.parametrize("vocab", [9, 20011])
def test_bad_data_is_nan_where_it_is_and_an_error_when_asked(vocab: int, split: int) -> None:
    logits = torch.randn(4, vocab, device=DEVICE)
    targets = torch.tensor([0, -100, 1, vocab], device=DEVICE)
    rows = torch.tensor([0, 1, 4, 3], device=DEVICE)
    offsets = torch.tensor([0, 1, 2, 3, 4], device=DEVICE)
    expected = [False, True, True, True]
    assert ops.token_logprobs(logits, targets, rows).isnan().tolist() == expected
    assert ops.response_nll(logits, targets, offsets, rows).isnan().tolist() == expected
    with pytest.raises(ValueError, match=r"rows\[2\] is 4, outside \[0, 4\)"):
        ops.token_logprobs(logits, targets, rows, check=True)
    with pytest.raises(ValueError, match=r"targets\[1\] is -100, outside"):
        ops.response_nll(logits, targets, offsets, check=True)
    falling = torch.tensor([0, 3, 2, 4], device=DEVICE)
    good = torch.tensor([0, 1, 2, 3], device=DEVICE)
    assert ops.response_nll(logits, good, falling).isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"offsets\[2\] is 2, less than"):
        ops.response_nll_difference(logits, logits, good, falling, check=True)
    assert torch.equal(ops.token_logprobs(logits, good, check=True), ops.token_logprobs(logits, good))


def test_nothing_to_do() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    empty = torch.empty(0, 9, device=DEVICE)
    assert ops.token_logprobs(empty, none).shape == (0,)
    assert ops.response_nll(empty, none, torch.zeros(1, dtype=torch.int64, device=DEVICE)).shape == (0,)
    assert ops.response_nll(empty, none, torch.zeros(3, dtype=torch.int64, device=DEVICE)).isnan().all()


@pytest.mark.parametrize("vocab", [1000, 128256])
def test_calls_follow_the_current_stream_and_wait_for_nothing(vocab: int, split: int) -> None:
    logits, final = torch.zeros(16, vocab, device=DEVICE), torch.randn(16, vocab, device=DEVICE)
    targets, offsets = torch.arange(16, device=DEVICE), torch.tensor([0, 5, 16], device=DEVICE)
    stream = torch.cuda.Stream(DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # from here on kernels are loaded and the stream has memory: neither waits below
        expected = ops.response_nll(final, targets, offsets)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second in which the logits are still the old ones
            logits.copy_(final)
            result = ops.response_nll(logits, targets, offsets)
            assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(bits(result), bits(expected))


def test_a_cuda_graph_replays_on_new_data(split: int) -> None:
    logits, other = torch.randn(2, 24, 50257, device=DEVICE).bfloat16()
    targets, offsets = torch.arange(24, device=DEVICE), torch.tensor([0, 10, 24], device=DEVICE)
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):  # kernels are loaded at their first call, which a capture would not allow
        ops.response_nll_difference(logits, other, targets, offsets)
        ops.token_logprobs(logits, targets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        difference = ops.response_nll_difference(logits, other, targets, offsets)
        logprobs = ops.token_logprobs(logits, targets)
    for _ in range(3):
        logits.copy_(torch.randn(24, 50257, device=DEVICE))
        graph.replay()
        assert torch.equal(bits(difference), bits(ops.response_nll_difference(logits, other, targets, offsets)))
        assert torch.equal(bits(logprobs), bits(ops.token_logprobs(logits, targets)))


def test_another_device_than_the_current_one(split: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    one, zero, targets, offsets, one_rows, zero_rows = _responses(20011, torch.bfloat16)
    expected = ops.response_nll_difference(one, zero, targets, offsets, one_rows, zero_rows)
    moved = [values.to("cuda:1") for values in (one, zero, targets, offsets, one_rows, zero_rows)]
    result = ops.response_nll_difference(*moved)
    assert result.device == torch.device("cuda", 1) and torch.cuda.current_device() == 0
    assert torch.equal(bits(result.cpu()), bits(expected.cpu()))
    with pytest.raises(ValueError, match="targets are on cuda:0, they must be on cuda:1"):
        ops.token_logprobs(moved[0], targets, one_rows)


def test_targets_elsewhere_are_refused() -> None:
    with pytest.raises(ValueError, match="targets are on cpu, they must be on cuda:0"):
        ops.token_logprobs(torch.zeros(2, 9, device=DEVICE), torch.tensor([0, 1]))


def test_whole_rows_need_no_memory_but_the_result() -> None:
    logits = torch.randn(4096, 32000, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.zeros(4096, dtype=torch.int64, device=DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    ops.token_logprobs(logits, targets)
    assert torch.cuda.max_memory_allocated(DEVICE) - before <= 4 * 4096 + 1024  # a block for no bytes, and rounding


def test_operators_of_torch() -> None:
    logits, targets = torch.randn(3, 999, device=DEVICE), torch.tensor([0, 998, 3], device=DEVICE)
    offsets = torch.tensor([0, 1, 3], device=DEVICE)
    library = torch.ops.miwv_fast
    for operator, arguments in (
        (library.token_logprobs.default, (logits, targets)),
        (library.response_nll.default, (logits, targets, offsets)),
        (library.response_nll_difference.default, (logits, logits.flip(0), targets, offsets)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
