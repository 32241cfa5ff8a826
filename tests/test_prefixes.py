"""Kept keys and values: what is written where, which models can share them, and that no pass waits for its device."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from miwv_fast.assembly import TokenSequence
from miwv_fast.model import CausalLM
from miwv_fast.prefixes import Prefixes
from miwv_fast.runner import Runner
from support import tiny_model

VOCAB = 300
ALONE = np.full(3, -1)  # sequences that continue none


def sequence(length: int, seed: int, scored: int = 3) -> TokenSequence:
    ids = np.random.default_rng(seed).integers(0, VOCAB, length + 1, dtype=np.int32)
    rows = np.arange(length - scored, length, dtype=np.int32)
    return TokenSequence(ids[:-1], rows, ids[rows + 1])


def causal_lm(kind: str, **options: object) -> CausalLM:
    model = tiny_model(kind, VOCAB)
    for name, value in options.items():
        setattr(model.config, name, value)
    return CausalLM(model, None, kind)


def test_what_continues_another_is_read_with_it():
    """Its own tokens alone are kept; the pass that writes them reads what stands before them."""
    prefixes = Prefixes(np.array([3, 1, 2]), np.array([-1, -1, 0]), 1)
    assert prefixes.lengths.tolist() == [3, 1, 5] and prefixes.before(np.array([0, 1])) is None
    assert prefixes.before(np.array([2])).tolist() == [3]

    def column(*values: float) -> torch.Tensor:
        return torch.tensor(values).view(1, 1, -1, 1)

    prefixes.keep(np.array([0])).update(column(1, 2, 3), column(10, 20, 30), 0)
    prefixes.keep(np.array([1])).update(column(7), column(70), 0)
    cache = prefixes.keep(np.array([2]))
    assert cache.get_seq_length() == 3
    read = [tensor.flatten().tolist() for tensor in cache.update(column(4, 5), column(40, 50), 0)]
    assert read == [[1, 2, 3, 4, 5], [10, 20, 30, 40, 50]]
    read = prefixes.behind(np.array([2, 1])).update(*[torch.full((2, 1, 1, 1), 6.0)] * 2, 0)
    assert read[0][:, 0, :, 0].tolist() == [[1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 6]]
    read = prefixes.behind(np.array([0, 2])).update(*[torch.full((2, 1, 1, 1), 6.0)] * 2, 0)
    assert read[0][:, 0, :, 0].tolist() == [[1, 1, 1, 2, 3, 6], [1, 2, 3, 4, 5, 6]]  # they end together


def test_rows_are_written_in_any_order_and_read_as_often_as_asked():
    torch.manual_seed(0)
    prefixes = Prefixes(np.array([4, 2, 3]), ALONE[:3], 2)
    keys, values = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 6)
    for rows, width in (([2, 1], 3), ([0], 4)):
        cache = prefixes.keep(np.array(rows))
        assert cache.get_seq_length() == 0
        for layer in range(2):
            given = keys[rows, :, :width] + layer, values[rows, :, :width] - layer
            assert all(out is new for out, new in zip(cache.update(*given, layer), given, strict=True))
    assert prefixes.bytes_per_token() == 2 * 2 * (5 + 6) * 4
    rows = [1, 2, 1]
    cache = prefixes.behind(np.array(rows))
    assert cache.get_seq_length() == 3
    own = torch.randn(3, 2, 7, 5), torch.randn(3, 2, 7, 6)
    for layer in range(2):
        before = keys[rows] + layer, values[rows] - layer
        for read, kept, new in zip(cache.update(*own, layer), before, own, strict=True):
            assert read.shape == (3, 2, 10, new.shape[3]) and torch.equal(read[:, :, 3:], new)
            for place, length in enumerate((2, 3, 2)):
                assert torch.equal(read[place, :, 3 - length : 3], kept[place, :, :length])


def test_in_front_of_a_shorter_prefix_stands_its_own_first_token():
    """Neither what memory held nor another sequence's keys, which could be NaN: no mask hides that."""
    prefixes = Prefixes(np.array([6, 2]), ALONE[:2], 1)
    for row, values in ((0, [np.nan] * 6), (1, [2, 5])):
        keys = torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)
        prefixes.keep(np.array([row])).update(keys, keys, 0)
    read, _ = prefixes.behind(np.array([0, 1])).update(*[torch.full((2, 1, 1, 1), 3.0)] * 2, 0)
    assert read[1, 0, :, 0].tolist() == [2, 2, 2, 2, 2, 5, 3]


def test_a_prefix_that_is_not_finite_spoils_its_own_continuations_only():
    """The one that is stored first, too, and in one batch with shorter ones."""
    lm = causal_lm("llama")
    long, short = sequence(20, 1), sequence(12, 2)
    prefixes = lm.prefixes(np.array([20, 12]), ALONE[:2])
    lm.response_nll([long, short], prefixes, keep=np.array([0, 1]))
    rows = np.array([0, 1])
    expected = lm.response_nll([sequence(9, 3), sequence(9, 4)], prefixes, behind=rows)
    with torch.inference_mode():
        for kept in prefixes._layers:
            kept.keys[:20] = kept.values[:20] = torch.nan
    spoilt = lm.response_nll([sequence(9, 3), sequence(9, 4)], prefixes, behind=rows)
    assert spoilt[0].isnan() and spoilt[1] == expected[1] and expected.isfinite().all()


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gemma2", "gemma3", "gemma3n", "granite", "cohere", "gpt2", "phi", "mistral"]
)
def test_behind_a_prefix_as_whole(kind):
    """Continuations of prefixes of different lengths, in one batch, one prefix twice."""
    lm = causal_lm(kind)
    assert lm.shared_length > 100 and lm.cache_bytes_per_token > 0
    whole = [sequence(length, seed) for length, seed in ((30, 1), (21, 2), (26, 1))]
    whole[2].ids[:9] = whole[0].ids[:9]
    kept, rows = np.array([9, 14]), np.array([0, 1, 0])
    prefixes = lm.prefixes(kept, ALONE[:2])
    scored = np.array([5, 7], np.int32)
    beginnings = [TokenSequence(whole[row].ids[: kept[row]], scored, whole[row].ids[scored + 1]) for row in (0, 1)]
    for row in (1, 0):
        nll = lm.response_nll([beginnings[row]], prefixes, keep=np.array([row]))
        torch.testing.assert_close(nll, lm.response_nll([beginnings[row]]), rtol=0, atol=2e-5)
    behind = [one.behind(int(kept[row])) for one, row in zip(whole, rows, strict=True)]
    torch.testing.assert_close(
        lm.response_nll(behind, prefixes, behind=rows), lm.response_nll(whole), rtol=0, atol=2e-5
    )


def test_what_a_unit_keeps_fits_a_gigabyte():
    lm = causal_lm("llama")
    kept = Runner(lm, 100).cache_tokens() * lm.cache_bytes_per_token
    assert (1 << 30) - lm.cache_bytes_per_token < kept <= 1 << 30
    assert Runner(lm, 1 << 40).cache_tokens() == 1 << 40  # or no unit would fill a batch


def test_who_cannot_share():
    assert causal_lm("mamba").shared_length == causal_lm("falcon_h1").shared_length == 0
    assert causal_lm("mistral", sliding_window=16).shared_length == causal_lm("llama").shared_length == sys.maxsize


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_padding_stands_where_the_model_knows_positions(kind):
    """Which has a table of 40."""
    assert_padding_knows_its_place(CausalLM(tiny_model(kind, VOCAB, max_length=40), None, kind))


def assert_padding_knows_its_place(lm: CausalLM) -> None:
    """A short continuation of a long prefix beside a long one of a short prefix, 40 positions each."""
    whole = [sequence(40, 1), sequence(40, 2)]
    lengths, both = np.array([4, 37]), np.arange(2)
    prefixes = lm.prefixes(lengths, ALONE[:2])
    none = np.empty(0, np.int32)
    beginnings = [TokenSequence(one.ids[:length], none, none) for one, length in zip(whole, lengths, strict=True)]
    lm.response_nll(beginnings, prefixes, keep=both)
    behind = [one.behind(int(length)) for one, length in zip(whole, lengths, strict=True)]
    torch.testing.assert_close(
        lm.response_nll(behind, prefixes, behind=both), lm.response_nll(whole), rtol=0, atol=2e-5
    )


LONG_ROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3"])
def test_frequencies_that_change_with_length(kind):
    """LongRoPE turns every position of a pass otherwise once one stands behind the 16th: short ones run apart."""
    rope = {**LONG_ROPE, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    each = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": rope}
    options = {"layer_types": list(each), "rope_parameters": each} if kind == "gemma3" else {"rope_parameters": rope}
    model = tiny_model(kind, VOCAB, **options)
    try:
        for _ in range(2):
            model(torch.zeros(1, 17, dtype=torch.int64))
    except UnboundLocalError:  # as in transformers 5.20
        pytest.skip("the second long pass of layers with a LongRoPE of their own fails in this transformers")
    lm = CausalLM(model, None, kind)
    assert lm.shared_length == 16 and lm.max_length == 1024
    whole = [sequence(length, length) for length in (16, 30, 9, 17)]
    alone = torch.cat([lm.response_nll([one]) for one in whole])
    torch.testing.assert_close(lm.response_nll(whole), alone, rtol=0, atol=2e-5)
    assert (lm._run(whole) - alone).abs().max() > 1e-3  # or the test would show nothing


def test_dynamic_frequencies_stay_as_they_are():
    """They change beyond the last position that the model knows, where padding must not stand either."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    assert_padding_knows_its_place(CausalLM(tiny_model("llama", VOCAB, max_length=40, rope_parameters=rope), None, ""))


ASK = {getattr(torch.ops.aten, name) for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero")}


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3", "gemma3n"])
def test_a_sequence_longer_than_the_window(kind):
    """Whole and behind a beginning longer than the window, beside a shorter one: the window is the model's own."""
    lm = causal_lm(kind, sliding_window=12)
    whole = [sequence(30, 1), sequence(21, 2)]
    losses = []
    for one in whole:
        with torch.no_grad():
            logits = lm.model(torch.from_numpy(one.ids).long()[None], use_cache=False).logits[0].double()
        losses.append(-logits.log_softmax(-1)[torch.from_numpy(one.rows).long(), torch.from_numpy(one.targets).long()])
    expected = torch.stack([loss.mean() for loss in losses]).float()
    torch.testing.assert_close(lm.response_nll(whole), expected, rtol=0, atol=2e-5)
    prefixes, lengths = lm.prefixes(np.array([17, 6]), ALONE[:2]), (17, 6)
    lm.response_nll([one.front(n) for one, n in zip(whole, lengths, strict=True)], prefixes, keep=np.arange(2))
    behind = [one.behind(n) for one, n in zip(whole, lengths, strict=True)]
    torch.testing.assert_close(lm.response_nll(behind, prefixes, behind=np.arange(2)), expected, rtol=0, atol=2e-5)


class NeverWaits(TorchDispatchMode):
    """Fails where a tensor's value is asked for: on a GPU that waits for all work before it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in ASK, "a value is asked for"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_no_pass_waits_for_its_device(kind):
    lm = causal_lm(kind)
    short, long = sequence(12, 3), sequence(20, 4)
    with NeverWaits():
        lm.response_nll([short, long])
        prefixes = lm.prefixes(np.array([12, 20, 12]), np.array([-1, -1, 1]))
        lm.response_nll([long, short], prefixes, keep=np.array([1, 0]))
        lm.response_nll([short], prefixes, keep=np.array([2]))
        lm.response_nll([short, long], prefixes, behind=np.array([0, 2]))
    with pytest.raises(AssertionError, match="a value is asked for"), NeverWaits(), torch.inference_mode():
        bool(torch.ones(1))
