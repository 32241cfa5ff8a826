"""The plan covers every sequence once and keeps its budget."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from miwv_fast.forest import plan_batches


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_every_sequence_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths, np.int64)
    batches = list(plan_batches(lengths, budget))
    assert sorted(place for batch in batches for place in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget


def test_padding_is_small_on_real_lengths():
    """Alpaca's lengths are close to log-normal, 165 tokens on average with a tail to a thousand."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.4, 20000), 30, 1500).astype(np.int64)
    padded = sum(len(batch) * lengths[batch].max() for batch in plan_batches(lengths, 1024))
    assert padded / lengths.sum() < 1.02
