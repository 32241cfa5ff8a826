"""The whole job on a GPU: the CPU's scores, shared prefixes, passes that wait for nothing, and memory that runs out."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cuda_support import DEVICE, needs_cuda

import miwv_fast
from miwv_fast.model import CausalLM
from support import byte_level, text_embedder, tiny_model
from test_prefixes import sequence
from test_scorer import make_rows

needs_cuda()

KINDS = ["llama", "gemma2", "gemma3n", "gpt2"]


def score(model: torch.nn.Module, rows: list[dict], **options: object) -> miwv_fast.Scores:
    return miwv_fast.score(rows, (model, byte_level()), embedder=text_embedder, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_scores_as_on_a_cpu(kind: str) -> None:
    model, rows = tiny_model(kind, len(byte_level())), make_rows("alpaca", 30)
    expected = score(model, rows).table
    for share in (True, False):
        table = score(model.to(DEVICE), rows, share_prefix=share).table
        assert table["status"].equals(expected["status"]) and table["neighbor"].equals(expected["neighbor"])
        for name in ("nll_zero_shot", "nll_one_shot"):
            np.testing.assert_allclose(table[name], expected[name], rtol=0, atol=1e-4)


def test_the_same_bits_from_run_to_run() -> None:
    model, rows = tiny_model("llama", len(byte_level())).to(DEVICE, torch.bfloat16), make_rows("alpaca", 60)
    first = score(model, rows)
    assert first.table.equals(score(model, rows).table)
    assert first.table["miwv"].null_count == 0


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_pass_waits(kind: str, dtype: torch.dtype) -> None:
    lm = CausalLM(tiny_model(kind, 300).to(DEVICE, dtype), None, kind)
    assert lm.shared_length > 0 and lm.head.name == "direct"
    short, long = sequence(12, 3), sequence(20, 4)

    def passes() -> list[torch.Tensor]:
        prefixes = lm.prefixes(np.array([12, 20, 12]), np.array([-1, -1, 1]))
        return [
            lm.response_nll([short, long]),
            lm.response_nll([long, short], prefixes, keep=np.array([1, 0])),
            lm.response_nll([short], prefixes, keep=np.array([2])),
            lm.response_nll([short, long], prefixes, behind=np.array([0, 2])),
        ]

    expected = passes()  # kernels are loaded at their first call
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        results = passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other) and result.isfinite().all()


def test_the_budget_is_halved_when_memory_runs_out(caplog: pytest.LogCaptureFixture) -> None:
    """All zero-shot passes are of one length, 175 tokens, so that the first batch holds all of them: their hidden
    states and MLPs alone take a KiB for each token, 342 MiB, where there is room for 128."""
    model, state = tiny_model("llama", len(byte_level())).to(DEVICE), random.Random(0)

    def digits(count: int) -> str:  # each is a token
        return "".join(state.choices("0123456789", k=count))

    rows = [{"instruction": digits(20), "output": digits(120)} for _ in range(2000)]
    options = {"share_prefix": False}
    expected = score(model, rows, **options).table
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + (128 << 20)) / total, DEVICE)
    try:
        table = score(model, rows, batch_tokens=10**6, **options).table
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert "out of memory: going on with batches of 500000 tokens" in caplog.text
    np.testing.assert_allclose(table["miwv"], expected["miwv"], rtol=0, atol=1e-4)
