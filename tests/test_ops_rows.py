"""token_logprobs, row by row: accuracy, special values, sizes, strides and addresses, for every instruction set."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
import torch

from miwv_fast import _core, ops
from test_ops_reference import DTYPES, ISAS, assert_close, bits, reference

# One lane, around every vector and group width, around a block of each instruction set, and real vocabularies.
SIZES = [1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 257, 511, 513, 1023, 1025, 4099, 50257, 151936, 262144]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> None:
    _core.select_isa(request.param)


def _distributions(rows: int, vocab: int) -> dict[str, torch.Tensor]:
    normal = torch.randn(rows, vocab)
    dominated = torch.randn(rows, vocab)
    dominated[:, -1] += 40
    return {
        "typical": normal * 3,
        "uniform": torch.full((rows, vocab), 0.3),
        "dominated by the last": dominated,
        "heavy-tailed": torch.tan(torch.rand(rows, vocab) * 3.1 - 1.55) * 2,
        "far from zero": normal * 5 - 700,
        "rising": torch.linspace(-900, 900, vocab).expand(rows, vocab).clone(),
        "falling": torch.linspace(900, -900, vocab).expand(rows, vocab).clone(),
        "thousands": normal * 2500,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", SIZES)
def test_accuracy(dtype: torch.dtype, vocab: int) -> None:
    torch.manual_seed(vocab)
    for kind, values in _distributions(3, vocab).items():
        logits = values.to(dtype)
        targets = torch.tensor([0, vocab - 1, vocab // 2])
        try:
            assert_close(ops.token_logprobs(logits, targets), reference(logits, targets))
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from error


@pytest.mark.parametrize("vocab", [1, 2, 70, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite(dtype: torch.dtype, vocab: int) -> None:
    """Every kind of value at the first, a middle and the last place, as target and not: torch's result, row by row."""
    nan, inf, low = torch.nan, torch.inf, torch.finfo(dtype).min
    for place in {0, vocab // 2, vocab - 1}:
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
                logits = row.to(dtype).repeat(3, 1)
                targets = torch.tensor([0, place, vocab - 1])
                assert_close(ops.token_logprobs(logits, targets), reference(logits, targets))


@pytest.mark.parametrize(
    "pattern", [0x7F800001, 0x7F8001FF, 0xFF800001, 0x7FC00000, 0xFFC00000, 0xFFFFFFFF, 0x7FFFFFFF]
)
@pytest.mark.parametrize("place", [0, 1, 700, 2500, 4998])
def test_nan_of_every_payload_stays_nan(pattern: int, place: int) -> None:
    """The exponent is put together from bits: a payload must not carry into it."""
    logits = torch.randn(3, 4999)
    logits.view(torch.int32)[1, place] = pattern - (1 << 32 if pattern >> 31 else 0)
    result = ops.token_logprobs(logits, torch.tensor([7, 7, 7]))
    assert result.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("scale", [1e5, 1e10, 1e20, 1e30, 3e38])
@pytest.mark.parametrize("vocab", [3, 300, 5000])
def test_huge_logits(scale: float, vocab: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.cat(
        [
            torch.rand(4, vocab, generator=generator) * 2 * scale - scale,
            torch.full((1, vocab), scale),
            torch.full((1, vocab), -scale),
            torch.randn(1, vocab, generator=generator).index_fill(1, torch.tensor([vocab - 1]), scale),
            torch.randn(1, vocab, generator=generator).index_fill(1, torch.tensor([vocab - 1]), -scale),
            torch.randn(1, vocab, generator=generator).index_fill(1, torch.tensor([0]), -scale),
        ]
    )
    for target in (0, vocab - 1, int(logits[0].argmax())):
        targets = torch.full((len(logits),), target)
        assert_close(ops.token_logprobs(logits, targets), reference(logits, targets))


def test_log_probabilities_are_never_positive() -> None:
    logits = torch.full((64, 3000), -60.0)
    logits[torch.arange(64), torch.arange(64) * 40] = torch.linspace(-10, 10, 64)
    assert (ops.token_logprobs(logits, torch.arange(64) * 40) <= 0).all()


def test_subnormal_logits() -> None:
    logits = torch.full((2, 1000), 1e-45)
    targets = torch.tensor([0, 999])
    assert_close(ops.token_logprobs(logits, targets), reference(logits, targets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_address_leaves_no_trace(dtype: torch.dtype) -> None:
    """Every alignment of a row within a cache line gives the same bits."""
    row = (torch.randn(2500) * 3).to(dtype)
    target = torch.tensor([1234])
    expected = ops.token_logprobs(row[None], target)
    buffer = torch.empty(2600, dtype=dtype)
    for start in range(40):
        moved = buffer[start : start + 2500]
        moved.copy_(row)
        assert torch.equal(bits(ops.token_logprobs(moved[None], target)), bits(expected))


def test_strides() -> None:
    """Padded, overlapping, repeated, batch-first and time-first views are read in place."""
    storage = torch.randn(6, 5, 900)
    views = [
        storage[:, :-1],
        storage[:, 1:, 3:803],
        storage.transpose(0, 1)[:, :4],
        storage[::2],
        storage[:, 0].expand(3, 6, 900),
        storage[:, 2],
        storage.view(-1).as_strided((50, 800), (1, 1)),
        storage.view(-1).as_strided((3, 4, 700), (5, 900, 1)),
        storage[:, :, :1].transpose(0, 1),
    ]
    for view in views:
        before = storage.clone()
        targets = torch.arange(view[..., 0].numel()) % view.shape[-1]
        assert_close(ops.token_logprobs(view, targets), reference(view, targets))
        rows = torch.randperm(len(targets))
        assert torch.equal(ops.token_logprobs(view, targets[rows], rows), ops.token_logprobs(view, targets)[rows])
        assert torch.equal(storage, before)


def test_negative_row_stride() -> None:
    """Torch has no such tensors, the kernels do."""
    logits = torch.randn(5, 300)
    targets, out = torch.arange(5), torch.empty(5)
    packed = (logits[4].data_ptr(), 0, 5, 300, -300, 5, 0)
    _core.cpu_token_logprobs(packed, 0, targets.data_ptr(), 5, out.data_ptr(), 1)
    assert torch.equal(out, ops.token_logprobs(logits.flip(0), targets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 9, 64, 100, 1100])
def test_nothing_is_read_beyond_a_row(dtype: torch.dtype, vocab: int) -> None:
    """The row ends where readable memory ends, then begins where it begins."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    base = np.frombuffer(pages, np.uint8).ctypes.data
    for page in (0, 3):
        address = ctypes.c_void_p(base + page * mmap.PAGESIZE)
        assert libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    logits = torch.randn(1, vocab).to(dtype)
    size = vocab * dtype.itemsize
    code, target, out = ops.checks.DTYPES[dtype], torch.tensor([vocab - 1]), torch.empty(1)
    for address in (base + 3 * mmap.PAGESIZE - size, base + mmap.PAGESIZE):
        ctypes.memmove(address, logits.data_ptr(), size)
        _core.cpu_token_logprobs((address, code, 1, vocab, vocab, 1, 0), 0, target.data_ptr(), 1, out.data_ptr(), 1)
        assert torch.equal(out, ops.token_logprobs(logits, target))


def test_more_than_two_to_the_31_elements() -> None:
    """Rows that begin before and after element 2^31 and 2^32 of a sparse mapping; only touched pages exist."""
    vocab, elements = 1000, 2**32 + 5000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    storage = torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.bfloat16)
    rows = torch.tensor([0, 2**31 // vocab, 2**32 // vocab])
    logits = storage[: elements // vocab * vocab].view(-1, vocab)
    logits[rows] = torch.randn(3, vocab).bfloat16()
    targets = torch.tensor([5, 6, 7])
    assert_close(ops.token_logprobs(logits, targets, rows), reference(logits[rows], targets))
    batched = logits[: 2 * (logits.shape[0] // 2)].view(2, -1, vocab)
    assert torch.equal(ops.token_logprobs(batched, targets, rows), ops.token_logprobs(logits, targets, rows))


def test_more_than_two_to_the_31_elements_read_in_one_call() -> None:
    logits = torch.randn(1, 32768).bfloat16().expand(2**16 + 3, -1)
    result = ops.token_logprobs(logits, torch.full((len(logits),), 99))
    assert (result == result[0]).all()
    assert_close(result[:1], reference(logits[:1], torch.tensor([99])))
