"""token_logprobs on a GPU, row by row: accuracy, special values, sizes, strides, addresses, and the bits."""

from __future__ import annotations

import pytest
import torch
from cuda_support import DEVICE, cpu_reference, needs_cuda

from miwv_fast import ops
from test_ops_reference import DTYPES, assert_close, bits
from test_ops_rows import SIZES, _distributions

needs_cuda()

# Those of the CPU tests, and: what is peeled, one vector more, one warp's share and one more, one slice and one more.
CUDA_SIZES = sorted({*SIZES, 8, 23, 24, 25, 32, 2056, 2057, 4112, 4120, 8200, 16400, 16408, 32001, 2**20})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", CUDA_SIZES)
def test_accuracy(dtype: torch.dtype, vocab: int, split: int) -> None:
    torch.manual_seed(vocab)
    for kind, values in _distributions(3, vocab).items():
        logits = values.to(DEVICE, dtype)
        targets = torch.tensor([0, vocab - 1, vocab // 2], device=DEVICE)
        try:
            assert_close(ops.token_logprobs(logits, targets).cpu(), cpu_reference(logits, targets))
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from error


@pytest.mark.parametrize("vocab", [1, 2, 70, 5000, 20011])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite(dtype: torch.dtype, vocab: int, split: int) -> None:
    """Every kind of value at the first, a middle and the last place, as target and not: torch's result, row by row."""
    nan, inf, low = torch.nan, torch.inf, torch.finfo(dtype).min
    rows, targets = [], []
    for place in sorted({0, vocab // 2, vocab - 1}):
        for value in (nan, -nan, inf, -inf, low, -low, 1e-40, -1e-40):
            for others in ("normal", "all -inf", "all lowest", "masked half"):
                row = torch.randn(vocab)
                if others == "all -inf":
                    row[:] = -inf
                elif others == "all lowest":
                    row[:] = low
                elif others == "masked half":
                    row[: vocab // 2] = -inf
                row[place] = value
                rows += [row] * 3
                targets += [0, place, vocab - 1]
    logits, chosen = torch.stack(rows).to(DEVICE, dtype), torch.tensor(targets, device=DEVICE)
    assert_close(ops.token_logprobs(logits, chosen).cpu(), cpu_reference(logits, chosen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [9, 1000, 4127, 32001])
def test_the_address_leaves_no_trace(dtype: torch.dtype, vocab: int) -> None:
    row = (torch.randn(vocab) * 3).to(DEVICE, dtype)
    target = torch.tensor([vocab // 2], device=DEVICE)
    expected = ops.token_logprobs(row[None], target)
    buffer = torch.empty(vocab + 100, dtype=dtype, device=DEVICE)
    for start in range(0, 72):
        moved = buffer[start : start + vocab].copy_(row)
        assert torch.equal(bits(ops.token_logprobs(moved[None], target)), bits(expected)), start


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [100, 4127, 50257])
def test_the_same_bits_in_any_company(dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, among few rows and among many, whole or split, in any order, and from run to run."""
    logits = (torch.randn(1500, vocab, device=DEVICE) * 3).to(dtype)
    targets = torch.randint(vocab, (1500,), device=DEVICE)
    expected = bits(ops.token_logprobs(logits, targets))
    for split in (0, 1, -1):
        monkeypatch.setattr(ops.launch, "cuda_split", split)
        for count in (1, 2, 17, 300, 1500):
            assert torch.equal(bits(ops.token_logprobs(logits[:count], targets[:count])), expected[:count])
        order = torch.randperm(1500, device=DEVICE)
        assert torch.equal(bits(ops.token_logprobs(logits, targets[order], order)), expected[order])
    for _ in range(20):
        assert torch.equal(bits(ops.token_logprobs(logits, targets)), expected)


def test_strides(split: int) -> None:
    """Padded, overlapping, repeated, batch-first and time-first views are read in place."""
    storage = torch.randn(6, 5, 9001, device=DEVICE)
    before = storage.clone()
    views = [
        storage[:, :-1],
        storage[:, 1:, 3:8003],
        storage.transpose(0, 1)[:, :4],
        storage[::2],
        storage[:, 0].expand(3, 6, 9001),
        storage[:, 2],
        storage.view(-1).as_strided((50, 800), (1, 1)),
        storage.view(-1).as_strided((3, 4, 8700), (5, 9000, 1)),
        storage[:, :, :1].transpose(0, 1),
    ]
    for view in views:
        targets = torch.arange(view[..., 0].numel(), device=DEVICE) % view.shape[-1]
        assert_close(ops.token_logprobs(view, targets).cpu(), cpu_reference(view, targets))
        rows = torch.randperm(len(targets), device=DEVICE)
        for kind in (torch.int64, torch.int32):
            some = ops.token_logprobs(view, targets[rows].to(kind), rows.to(kind))
            assert torch.equal(bits(some), bits(ops.token_logprobs(view, targets)[rows]))
    assert torch.equal(storage, before)


def test_more_than_two_to_the_32_elements_in_memory() -> None:
    vocab = 65521
    count = 2**32 // vocab + 3
    if torch.cuda.mem_get_info(DEVICE)[0] < 2 * count * vocab + 2**30:
        pytest.skip("needs 9.6 GB of free GPU memory")
    logits = torch.empty(count, vocab, dtype=torch.bfloat16, device=DEVICE)
    rows = torch.tensor([0, count // 2 - 1, count // 2 + 1, count - 1], device=DEVICE)
    logits[rows] = torch.randn(4, vocab, device=DEVICE).bfloat16()
    targets = torch.tensor([5, vocab - 1, 7, 8], device=DEVICE)
    assert_close(ops.token_logprobs(logits, targets, rows).cpu(), cpu_reference(logits, targets, rows))


def test_more_than_two_to_the_32_elements_read_in_one_call() -> None:
    logits = torch.randn(1, 65536, device=DEVICE).bfloat16().expand(2**16 + 3, -1)
    result = ops.token_logprobs(logits, torch.full((len(logits),), 99, device=DEVICE))
    assert (result == result[0]).all()
    assert_close(result[:1].cpu(), cpu_reference(logits[:1], torch.tensor([99])))


def test_the_address_of_a_row_beyond_two_to_the_31_bytes_of_stride() -> None:
    if torch.cuda.mem_get_info(DEVICE)[0] < 10 * 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    storage = torch.empty(2**32 + 4000, dtype=torch.bfloat16, device=DEVICE)
    view = storage.as_strided((2, 2, 999), (2**32, 1001, 1))
    view.copy_(torch.randn(2, 2, 999))
    targets = torch.tensor([1, 2, 3, 998], device=DEVICE)
    assert_close(ops.token_logprobs(view, targets).cpu(), cpu_reference(view, targets))
