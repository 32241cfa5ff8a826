"""The plan runs every pass once, keeps its budgets, and forwards what sharing promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miwv_fast.forest import BATCH_OVERHEAD, GPU_BATCH_OVERHEAD, PREFIXES, Passes, plan_batches, plan_units
from miwv_fast.job import UNIT_BATCHES


def cheapest(lengths: list[int], budget: int, overhead: int) -> int:
    """The least cost over all ways to cut the sorted lengths, by trying them all."""
    if not lengths:
        return 0
    most = max(1, min(len(lengths), budget // lengths[0]))
    return min(lengths[0] * n + overhead + cheapest(lengths[n:], budget, overhead) for n in range(1, most + 1))


@given(st.lists(st.integers(1, 60), max_size=9), st.integers(1, 200), st.integers(0, 30))
def test_batches_are_the_cheapest_within_the_budget(lengths, budget, overhead):
    lengths = np.array(lengths, np.int64)
    batches = list(plan_batches(lengths, budget, overhead))
    assert sorted(place for batch in batches for place in batch.tolist()) == list(range(len(lengths)))
    padded = [len(batch) * int(lengths[batch].max()) for batch in batches]
    assert all(len(batch) == 1 or size <= budget for batch, size in zip(batches, padded, strict=True))
    assert sum(padded) + overhead * len(batches) == cheapest(sorted(lengths.tolist(), reverse=True), budget, overhead)


@st.composite
def graphs(draw):
    """Any neighbours whatever: cycles, hubs, records without a pass of one kind or of both, parents that have none; and
    preambles, behind the records."""
    n = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    zero = generator.integers(0, 50, n) * (generator.random(n) < 0.9)
    prefix = np.maximum(zero, 1) + generator.integers(0, 10, n)
    hubs = generator.integers(0, n, draw(st.integers(1, n)))
    parent = np.where(generator.random(n) < 0.8, generator.choice(hubs, n), -1)
    parent[parent == np.arange(n)] = -1
    continuation = generator.integers(1, 50, n)
    one = np.where(parent >= 0, prefix[parent], 1) + continuation
    one *= generator.random(n) < 0.9
    preambles = draw(st.integers(0, 3))
    length = generator.integers(1, 12, preambles)
    of = generator.integers(-1, preambles, n)
    shorter = length[of] < np.minimum(np.where(zero > 0, zero, prefix), prefix) if preambles else False
    of = np.where(shorter, np.where(of >= 0, n + of, -1), -1)
    if preambles:
        behind = n + generator.integers(0, preambles, n)
        moved = (generator.random(n) < 0.2) & (one > 0)
        parent = np.where(moved, behind, parent)
        one = np.where(moved, length[behind - n] + continuation, one)
    nothing = np.zeros(preambles, np.int64)
    return Passes(np.append(zero, nothing), one, np.append(prefix, length), np.append(of, nothing - 1), parent)


@given(graphs(), st.integers(1, 300), st.integers(1, 500))
def test_every_pass_is_run_exactly_once(passes, cache_tokens, unit_tokens):
    zero, one, prefix, parent = passes.zero, passes.one, passes.root, passes.parent
    before = np.where(passes.preamble >= 0, prefix[passes.preamble], 0)
    units = plan_units(passes, cache_tokens=cache_tokens, unit_tokens=unit_tokens)
    zero_runs = [i for unit in units for i in [*unit.roots[unit.scored], *unit.zero_shot]]
    one_runs = [i for unit in units for i in [*unit.children, *unit.one_shot]]
    assert sorted(zero_runs) == np.flatnonzero(zero > 0).tolist()
    assert sorted(one_runs) == np.flatnonzero(one > 0).tolist()
    for unit in units:
        assert len(set(unit.roots.tolist())) == len(unit.roots)
        parents, preambles = set(parent[unit.children].tolist()), set(unit.preambles.tolist())
        assert parents - preambles == set(unit.roots.tolist()) and not preambles & set(unit.roots.tolist())
        assert (parent[unit.one_shot] < 0).all()
        wanted = {*passes.preamble[unit.roots].tolist(), *passes.preamble[unit.zero_shot].tolist()} - {-1}
        assert sorted(wanted) == unit.preambles.tolist()
        own = (prefix - before)[unit.roots].sum()
        kept = own + prefix[unit.preambles].sum()
        assert kept <= cache_tokens or (len(unit.roots) <= 1 and len(unit.preambles) <= 1)
        single = len(unit.children) + len(unit.zero_shot) + len(unit.one_shot) == 1
        tokens = own + (one[unit.children] - prefix[parent[unit.children]]).sum()
        tokens += (zero - before)[unit.zero_shot].sum() + one[unit.one_shot].sum()
        longest = max(prefix.max(), one.max(), zero.max())
        assert single or tokens <= unit_tokens + longest + prefix.max()
        assert passes.forwarded_tokens(unit) == tokens + prefix[unit.preambles].sum()


def test_a_hub_is_split_and_scored_once():
    n = 400
    zero, prefix = np.full(n, 10), np.full(n, 10)
    parent = np.zeros(n, np.int64)
    parent[0] = 1
    passes = Passes(zero, np.full(n, 20), prefix, np.full(n, -1), parent)
    units = plan_units(passes, cache_tokens=1000, unit_tokens=500)
    holding = [unit for unit in units if 0 in unit.roots]
    assert len(holding) > 5
    assert sum(unit.scored[unit.roots == 0].sum() for unit in holding) == 1


def test_a_root_that_alone_is_too_much_is_not_run_for_every_child():
    n = 400
    parent = np.zeros(n, np.int64)
    parent[0] = 1
    zero = np.where(np.arange(n) == 0, 2000, 10)
    passes = Passes(zero, zero[parent] + 10, zero, np.full(n, -1), parent)
    units = plan_units(passes, cache_tokens=1000, unit_tokens=5000)
    assert sum(0 in unit.roots for unit in units) <= 3 and sum(map(passes.forwarded_tokens, units)) < 3 * 2000 + n * 20


def test_preambles_take_room_as_roots_do():
    """Each record behind a long one of its own: a unit keeps as many as fit."""
    n = 60
    nothing = np.zeros(n, np.int64)
    for parent in (np.full(n, -1), np.arange(n) ^ 1):
        passes = Passes(
            zero=np.append(np.full(n, 210), nothing),
            one=np.where(parent >= 0, 260, 0),
            root=np.append(np.full(n, 210), np.full(n, 200)),
            preamble=np.append(n + np.arange(n), nothing - 1),
            parent=parent,
        )
        units = plan_units(passes, cache_tokens=1000, unit_tokens=10_000)
        kept = [passes.root[unit.preambles].sum() + 10 * len(unit.roots) for unit in units]
        assert max(kept) <= 1000 and sum(len(unit.preambles) for unit in units) == n and len(units) <= n / 4


def alpaca_like(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths and neighbours with the measured statistics of Alpaca: 85 tokens on average beyond a 35-token prompt
    frame, 55 % of the records with a child, 15 children at most."""
    generator = np.random.default_rng(0)
    length = np.clip(35 + generator.lognormal(3.9, 0.7, n), 40, 900).astype(np.int64)
    parent = generator.permutation(n)
    shared = generator.random(n) < 0.45
    parent[shared] = parent[generator.integers(0, n, shared.sum())]
    parent[parent == np.arange(n)] = -1
    return length, parent, generator.random(n)


@pytest.mark.parametrize(
    "batch_tokens, cache_tokens, overhead", [(1024, 23_000, BATCH_OVERHEAD), (16_384, 150_000, GPU_BATCH_OVERHEAD)]
)
def test_forwarded_tokens_and_padding(batch_tokens, cache_tokens, overhead):
    """Both passes for two thirds of the tokens, and padding below 2 % whatever the budget."""
    length, parent, _ = alpaca_like(20_000)
    one = np.where(parent >= 0, length[parent], 100) + length
    passes = Passes(length, one, length, np.full(len(length), -1), parent)
    units = plan_units(passes, cache_tokens=cache_tokens, unit_tokens=UNIT_BATCHES * batch_tokens)
    forwarded = padded = batches = 0
    for unit in units:
        before = length[parent[unit.children]]
        parts = [(length[unit.roots], None), (one[unit.children] - before, before)]
        parts += [(length[unit.zero_shot], None), (one[unit.one_shot], None)]
        for part, prefixes in parts:
            for batch in plan_batches(part, batch_tokens, overhead, prefixes):
                forwarded += int(part[batch].sum())
                padded += len(batch) * int(part[batch].max()) - int(part[batch].sum())
                batches += 1
    ideal = length.sum() + np.where(parent >= 0, one - length[parent], one).sum()
    plain = length.sum() + one.sum()
    assert forwarded == sum(map(passes.forwarded_tokens, units))
    assert forwarded <= 1.01 * ideal
    assert forwarded / plain == pytest.approx(0.67, abs=0.01)
    assert padded <= 0.02 * forwarded
    # Small batches cost speed: on a CPU half a budget is enough, on a GPU some thousand tokens.
    assert forwarded / batches > min(0.4 * batch_tokens, 4096)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 3000)), min_size=1, max_size=60),
    st.integers(1, 600),
)
def test_batches_behind_prefixes(pairs, batch_tokens):
    """Every sequence once, within the budget, and no more of the prefixes than memory was planned for."""
    lengths, before = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    batches = list(plan_batches(lengths, batch_tokens, before=before))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(pairs)))
    for batch in batches:
        if len(batch) > 1:
            assert len(batch) * lengths[batch].max() <= batch_tokens
            assert len(batch) * before[batch].max() <= PREFIXES * batch_tokens


def test_a_long_prefix_does_not_widen_the_others():
    """Short continuations of short prefixes are worth a batch without the one whose prefix is long."""
    lengths, before = np.full(64, 16), np.full(64, 40)
    before[30] = 2000
    batches = list(plan_batches(lengths, 1024, before=before))
    assert [len(batch) for batch in batches] == [1, 63] and batches[0].tolist() == [30]
