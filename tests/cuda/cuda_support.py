"""What the tests on a GPU share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from miwv_fast import _core
from test_ops_reference import reference

DEVICE = torch.device("cuda", 0)


def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device", allow_module_level=True)
    if not _core.has_cuda:
        pytest.skip("needs CUDA kernels: this build has none", allow_module_level=True)


def cpu_reference(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor | None = None) -> np.ndarray:
    """The float64 reference of the CPU tests, for tensors of a device; only the chosen rows are copied."""
    if rows is not None:
        logits = logits.reshape(-1, logits.shape[-1])[rows.long()]
    return reference(logits.cpu(), targets.cpu())


def mean_nll(logprobs: np.ndarray, offsets: torch.Tensor) -> np.ndarray:
    pairs = offsets.cpu().unfold(0, 2, 1).tolist()
    return np.array([-logprobs[begin:end].mean() if end > begin else np.nan for begin, end in pairs])
