"""The float64 reference that the tests of the kernels compare with, itself compared with torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from miwv_fast import _core

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _core.available_isas()


def reference(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor | None = None) -> np.ndarray:
    """log p(target) in float64, with torch's rules for values that aren't finite."""
    flat = logits.reshape(-1, logits.shape[-1])
    chosen = (flat if rows is None else flat[rows.long()]).double().numpy()
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        top = chosen.max(axis=1, keepdims=True)
        rest = np.log(np.exp(chosen - top).sum(axis=1))
        return chosen[np.arange(len(chosen)), targets.long().numpy()] - top[:, 0] - rest


def assert_close(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Within 1e-5 nats, or one unit in the last place of float32 where that is larger; NaN and -inf alike."""
    assert actual.dtype is torch.float32
    with np.errstate(over="ignore"):
        nearest = expected.astype(np.float32)  # infinite where float32 ends
    got = actual.double().numpy()
    special = ~np.isfinite(nearest)
    np.testing.assert_array_equal(got[special], nearest[special])
    error = np.abs(got[~special] - expected[~special])
    last_place = np.ldexp(1.0, np.frexp(nearest[~special])[1] - 24)
    assert (error <= np.maximum(1e-5, last_place)).all(), f"off by {error.max():.3g} nats"


def bits(values: torch.Tensor) -> torch.Tensor:
    """For comparison to the bit, NaN included."""
    return values.view(torch.int32)


def test_the_reference_is_torch_in_float64() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50) * 10
    logits[1, 3], logits[2, 4], logits[3, 5], logits[4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    targets = torch.tensor([0, 3, 4, 5, 6, 7])
    expected = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose(reference(logits, targets), expected.numpy(), rtol=1e-14)


def test_a_wrong_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'sse9' is not among those of this CPU and build: generic"):
        _core.select_isa("sse9")
