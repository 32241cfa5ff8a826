"""Every module here starts with `needs_cuda()`, so that each says why it is skipped where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from miwv_fast import ops


@pytest.fixture(params=[0, 1, -1], ids=["whole", "split", "auto"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Whole rows, split rows, and the choice by the number of rows: the results are the same to the bit."""
    monkeypatch.setattr(ops.launch, "cuda_split", request.param)
    return request.param


@pytest.fixture(autouse=True)
def no_memory_is_kept() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()
