"""The plan: which sequences run together in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def plan_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Places of sequences of like length, int64, batch by batch, longest first so that memory is asked for early.

    A batch's padded size, its longest sequence times its sequences, is at most `batch_tokens`; a sequence longer
    than that is a batch by itself.
    """
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        count = max(1, batch_tokens // max(1, int(lengths[order[begin]])))
        yield order[begin : begin + count]
        begin += count
