"""response_nll, response_nll_difference, rows_from_labels, and what they say about wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from miwv_fast import ops
from test_ops_reference import DTYPES, assert_close, bits, reference

NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_to_loss_as_hugging_face_means_it(dtype: torch.dtype) -> None:
    """The mean loss of each sequence of a padded batch, from labels, equals cross_entropy on shifted labels."""
    torch.manual_seed(0)
    logits = (torch.randn(4, 9, 301) * 4).to(dtype)
    labels = torch.randint(301, (4, 9))
    labels[0, :5], labels[1, 3:], labels[2] = -100, -100, -100
    rows, targets, offsets = ops.rows_from_labels(labels)
    nll = ops.response_nll(logits, targets, offsets, rows)
    expected = [F.cross_entropy(logits[b, :-1].double(), labels[b, 1:]).item() for b in range(4)]
    assert_close(nll, torch.tensor(expected, dtype=torch.float64).numpy())
    assert nll.isnan().tolist() == [False, False, True, False]


@given(st.integers(0, 4), st.integers(0, 6), st.integers(-101, 3), st.integers(0, 2**31))
def test_rows_from_labels(batch: int, length: int, ignore_index: int, seed: int) -> None:
    labels = torch.randint(-1, 4, (batch, length), generator=torch.Generator().manual_seed(seed))
    rows, targets, offsets = ops.rows_from_labels(labels, ignore_index)
    expected_rows, expected_targets, expected_offsets = [], [], [0]
    for b in range(batch):
        for t in range(1, length):
            if labels[b, t] != ignore_index:
                expected_rows.append(b * length + t - 1)
                expected_targets.append(int(labels[b, t]))
        expected_offsets.append(len(expected_rows))
    assert rows.tolist() == expected_rows
    assert targets.tolist() == expected_targets
    assert offsets.tolist() == expected_offsets
    assert rows.dtype == targets.dtype == offsets.dtype == torch.int64


def test_a_bad_row_spoils_its_response_alone() -> None:
    logits = torch.randn(8, 100)
    logits[2, 50] = NAN
    logits[5, 7] = -INF
    targets = torch.full((8,), 7)
    nll = ops.response_nll(logits, targets, torch.tensor([0, 2, 4, 4, 6, 8]))
    assert nll.isfinite().tolist() == [True, False, False, False, True]
    assert nll[1].isnan() and nll[2].isnan() and nll[3] == INF


def test_difference_against_two_losses() -> None:
    one, zero = torch.randn(3, 6, 500) * 3, torch.randn(3, 4, 500) * 3
    one_rows, zero_rows = torch.tensor([2, 3, 4, 8, 9, 15]), torch.tensor([0, 1, 2, 5, 6, 11])
    targets, offsets = torch.randint(500, (6,)), torch.tensor([0, 3, 5, 6])
    result = ops.response_nll_difference(one, zero, targets, offsets, one_rows, zero_rows)
    token = torch.tensor(reference(zero, targets, zero_rows) - reference(one, targets, one_rows))
    expected = torch.stack([part.mean() for part in token.split([3, 2, 1])])
    assert (result.double() - expected).abs().max() <= 2e-5  # two losses, 1e-5 each
    same = ops.response_nll_difference(one, one, targets, offsets, one_rows, one_rows)
    assert same.tolist() == [0, 0, 0]


def test_the_mean_is_taken_in_float64() -> None:
    """A long response of one large and many small losses: a float32 sum would lose the small ones."""
    tokens = 50_000
    logits = torch.tensor([[0.0, -20.0], [0.0, -3e4]])
    rows = torch.zeros(tokens, dtype=torch.int64)
    rows[0] = 1
    targets = torch.zeros(tokens, dtype=torch.int64)
    targets[0] = 1
    nll = ops.response_nll(logits, targets, torch.tensor([0, tokens]), rows)
    small = torch.tensor(-20.0, dtype=torch.float64).exp().log1p()
    assert_close(nll, ((3e4 + (tokens - 1) * small) / tokens)[None].numpy())


def test_empty_calls() -> None:
    none = torch.tensor([], dtype=torch.int64)
    assert ops.token_logprobs(torch.randn(0, 5), none).shape == (0,)
    assert ops.token_logprobs(torch.randn(3, 5), none, none).shape == (0,)
    assert ops.token_logprobs(torch.randn(0, 4, 5), none).shape == (0,)
    assert ops.token_logprobs(torch.randn(3, 0), none, none).shape == (0,)
    assert ops.response_nll(torch.randn(0, 5), none, torch.tensor([0])).shape == (0,)
    assert ops.response_nll(torch.randn(0, 5), none, torch.tensor([0, 0])).isnan().all()
    assert all(part.numel() == 0 for part in ops.rows_from_labels(torch.zeros(2, 0, dtype=torch.int64))[:2])


@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index"),
    [
        (torch.uint8, 156, -100),
        (torch.uint16, 65436, -100),
        (torch.uint32, 2**32 - 100, -100),
        (torch.int32, 0, 2**32),
        (torch.int8, 0, 256),
    ],
)
def test_labels_that_differ_from_ignore_index_by_a_power_of_two_are_kept(
    dtype: torch.dtype, label: int, ignore_index: int
) -> None:
    rows, targets, offsets = ops.rows_from_labels(torch.tensor([[1, label, 3]], dtype=dtype), ignore_index)
    assert (rows.tolist(), targets.tolist(), offsets.tolist()) == ([0, 1], [label, 3], [0, 2])
    assert targets.dtype is torch.int64


def test_narrow_and_strided_indices() -> None:
    logits = torch.randn(6, 40)
    targets, rows, offsets = torch.arange(12)[::2], torch.arange(6).flip(0), torch.tensor([0, 2, 6])
    expected = ops.response_nll(logits, targets.contiguous(), offsets, rows)
    narrow = ops.response_nll(logits, targets.int(), offsets.int(), rows.int())
    assert torch.equal(bits(narrow), bits(expected))
    assert torch.equal(bits(ops.response_nll(logits, targets, offsets, rows)), bits(expected))


LOGITS, TARGETS, OFFSETS = torch.zeros(4, 10), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 4])
ROWS = torch.tensor([0, 1, 2, 3])
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.token_logprobs([[0.0]], TARGETS), TypeError, r"logits must be a tensor, not list"),
    (
        lambda: ops.token_logprobs(LOGITS.double(), TARGETS),
        TypeError,
        r"logits are torch.float64, .* float32, bfloat16",
    ),
    (lambda: ops.token_logprobs(LOGITS.cfloat().conj(), TARGETS), TypeError, r"logits are torch.complex64"),
    (lambda: ops.token_logprobs(LOGITS[0], TARGETS), ValueError, r"logits have shape \(10,\), it must be \[rows, V\]"),
    (
        lambda: ops.token_logprobs(LOGITS.t(), ROWS),
        ValueError,
        r"logits have stride 10 between the entries .* must be 1",
    ),
    (lambda: ops.token_logprobs(LOGITS.to_sparse(), TARGETS), TypeError, r"logits have layout torch.sparse_coo"),
    (lambda: ops.token_logprobs(LOGITS, [0, 1]), TypeError, r"targets must be an int64 or int32 tensor, not list"),
    (lambda: ops.token_logprobs(LOGITS, TARGETS.float()), TypeError, r"targets are torch.float32, they must be int64"),
    (lambda: ops.token_logprobs(LOGITS, TARGETS[None]), ValueError, r"targets have shape \(1, 4\)"),
    (lambda: ops.token_logprobs(LOGITS, TARGETS[:3]), ValueError, r"targets have 3 entries, they must have 4"),
    (lambda: ops.token_logprobs(LOGITS, TARGETS + 7), ValueError, r"targets\[3\] is 10, outside \[0, 10\)"),
    (lambda: ops.token_logprobs(LOGITS, TARGETS - 1), ValueError, r"targets\[0\] is -1, outside \[0, 10\)"),
    (lambda: ops.token_logprobs(LOGITS, TARGETS, ROWS[:3]), ValueError, r"rows have 3 entries, they must have 4"),
    (lambda: ops.token_logprobs(LOGITS, TARGETS, ROWS + 1), ValueError, r"rows\[3\] is 4, outside \[0, 4\)"),
    (lambda: ops.token_logprobs(LOGITS, TARGETS, ROWS > 0), TypeError, r"rows are torch.bool, they must be int64"),
    (lambda: ops.token_logprobs(torch.zeros(4, 0), TARGETS), ValueError, r"targets\[0\] is 0, outside \[0, 0\)"),
    (lambda: ops.token_logprobs(LOGITS, TARGETS.to("meta")), ValueError, r"targets are on meta, they must be on cpu"),
    (lambda: ops.response_nll(LOGITS, TARGETS, OFFSETS[:0]), ValueError, r"offsets are empty"),
    (lambda: ops.response_nll(LOGITS, TARGETS, OFFSETS + 1), ValueError, r"offsets\[0\] is 1, it must be 0"),
    (lambda: ops.response_nll(LOGITS, TARGETS, OFFSETS[:2]), ValueError, r"offsets\[1\] is 1, it must be 4"),
    (lambda: ops.response_nll(LOGITS, TARGETS, torch.tensor([0, 5, 4])), ValueError, r"offsets\[2\] is 4, less than"),
    (
        lambda: ops.response_nll_difference(LOGITS, LOGITS.half(), TARGETS, OFFSETS),
        ValueError,
        r"zero_shot_logits have dtype torch.float16, it must be torch.float32",
    ),
    (
        lambda: ops.response_nll_difference(LOGITS, LOGITS[:, :9], TARGETS, OFFSETS),
        ValueError,
        r"zero_shot_logits have V 9, it must be 10",
    ),
    (
        lambda: ops.response_nll_difference(LOGITS, LOGITS, TARGETS, OFFSETS, ROWS, ROWS + 1),
        ValueError,
        r"zero_shot_rows\[3\] is 4, outside \[0, 4\)",
    ),
    (lambda: ops.rows_from_labels([0]), TypeError, r"labels must be an integer tensor, not list"),
    (lambda: ops.rows_from_labels(LOGITS), TypeError, r"labels must be an integer tensor, not torch.float32"),
    (lambda: ops.rows_from_labels(TARGETS), ValueError, r"labels must be \[B, T\], not \(4,\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_errors_name_the_argument_and_what_would_be_right(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
