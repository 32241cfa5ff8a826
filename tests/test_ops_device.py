"""What the CUDA side of ops does before a kernel runs: checks of the data, and the answer of a build without."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from miwv_fast import _core, ops

BAD = [
    {"rows": [0, 5, 1]},
    {"rows": [0, 1, -1]},
    {"targets": [0, 7, 1]},
    {"targets": [-100, 1, 1]},
    {"offsets": [1, 3]},
    {"offsets": [0, 2, 1, 3]},
    {"offsets": [0, 2]},
    {"offsets": [0, 1, 4]},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_checks_of_device_data_speak_like_the_cpu_kernels(bad: dict[str, list[int]]) -> None:
    values = {"targets": [0, 6, 1], "offsets": [0, 3], "rows": [0, 4, 1], **bad}
    targets, offsets, rows = (torch.tensor(values[name]) for name in ("targets", "offsets", "rows"))
    with pytest.raises(ValueError) as by_kernel:
        ops.response_nll(torch.zeros(5, 7), targets, offsets, rows)
    with pytest.raises(ValueError) as by_check:
        ops.checks.check_values(targets, 5, 7, offsets, rows=rows)
    assert str(by_check.value) == str(by_kernel.value)


def test_check_changes_nothing_on_the_cpu() -> None:
    logits, targets, offsets = torch.randn(3, 9), torch.tensor([0, 8, 3]), torch.tensor([0, 1, 3])
    for function, arguments in (
        (ops.token_logprobs, (logits, targets)),
        (ops.response_nll, (logits, targets, offsets)),
        (ops.response_nll_difference, (logits, logits.flip(0), targets, offsets)),
    ):
        assert torch.equal(function(*arguments, check=True), function(*arguments))
        operator = getattr(torch.ops.miwv_fast, function.__name__)
        assert torch.equal(operator(*arguments, check=True), function(*arguments))
        torch.library.opcheck(
            operator.default, arguments, {"check": True}, test_utils=("test_schema", "test_faketensor")
        )


def test_a_build_without_kernels_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    logits: Any = SimpleNamespace(is_cpu=False, is_cuda=True, device="cuda:0")
    monkeypatch.setattr(ops.launch, "_core", SimpleNamespace(has_cuda=False))
    with pytest.raises(RuntimeError, match=r"has no CUDA kernels: install it again .* MIWV_CUDA_WHEELS=1"):
        ops.launch.require_kernels(logits)


@pytest.mark.skipif(not _core.has_cuda, reason="built without CUDA")
def test_scratch_memory() -> None:
    """8 bytes for each token and logits where there are means; 64 for each slice of a row that is split."""
    packed = (0, 1, 4, 128256, 128256, 4, 0)
    assert _core.cuda_scratch_bytes(packed, 16, 1, False, 0, 0) == 0
    assert _core.cuda_scratch_bytes(packed, 16, 2, True, 0, 0) == 16 * 2 * 8
    assert _core.cuda_scratch_bytes(packed, 16, 2, True, 0, 1) == 16 * 2 * (8 + 8 * 64)
    with pytest.raises(ValueError, match="logits have V = 0"):
        _core.cuda_scratch_bytes((0, 1, 4, 0, 1, 4, 0), 16, 1, False, 0, 0)
