"""Properties that hold for any logits, found by search."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miwv_fast import _core, ops
from test_ops_reference import DTYPES, ISAS, assert_close, bits, reference


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Logits with odd values strewn in, targets, rows and offsets."""
    vocab = draw(st.one_of(st.integers(1, 140), st.integers(141, 3000)))
    count = draw(st.integers(1, 8))
    tokens = draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(count, vocab, generator=generator) * draw(st.sampled_from([0.0, 1.0, 20.0, 300.0]))
    logits += draw(st.sampled_from([0.0, -80.0, 1000.0]))
    dtype = draw(st.sampled_from(DTYPES))
    logits = logits.to(dtype)
    odd = st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 65000.0, 0.0, 1e-42])
    for _ in range(draw(st.integers(0, 3))):
        logits[draw(st.integers(0, count - 1)), draw(st.integers(0, vocab - 1))] = torch.tensor(draw(odd)).to(dtype)
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
    return {
        "logits": logits,
        "targets": torch.randint(vocab, (tokens,), generator=generator),
        "rows": torch.randint(count, (tokens,), generator=generator),
        "offsets": torch.tensor([0, *cuts, tokens]),
        "isa": draw(st.sampled_from(ISAS)),
    }


@given(problems())
@settings(max_examples=150)
def test_close_to_float64_and_inputs_untouched(problem: dict[str, Any]) -> None:
    _core.select_isa(problem["isa"])
    logits, targets, rows, offsets = (problem[name] for name in ("logits", "targets", "rows", "offsets"))
    before = [values.clone() for values in (logits, targets, rows, offsets)]
    expected = reference(logits, targets, rows)
    assert_close(ops.token_logprobs(logits, targets, rows), expected)
    nll = ops.response_nll(logits, targets, offsets, rows)
    means = [
        -expected[begin:end].mean() if end > begin else torch.nan for begin, end in offsets.unfold(0, 2, 1).tolist()
    ]
    assert_close(nll, torch.tensor(means, dtype=torch.float64).numpy())
    for value, copy in zip((logits, targets, rows, offsets), before, strict=True):
        assert torch.equal(value.view(torch.int16), copy.view(torch.int16))


@given(problems(), st.integers(0, 9))
@settings(max_examples=100)
def test_a_row_knows_nothing_of_the_rest(problem: dict[str, Any], start: int) -> None:
    """The same bits alone, in any order, in company, with rows given or not, and at any address."""
    _core.select_isa(problem["isa"])
    logits, targets, rows = problem["logits"], problem["targets"], problem["rows"]
    result = bits(ops.token_logprobs(logits, targets, rows))
    order = torch.randperm(len(targets))
    assert torch.equal(bits(ops.token_logprobs(logits, targets[order], rows[order])), result[order])
    assert torch.equal(bits(ops.token_logprobs(logits[rows], targets)), result)
    moved = torch.cat([logits.new_zeros(start), logits.flatten()])[start:].view_as(logits)
    for token in range(len(targets)):
        alone = ops.token_logprobs(moved[rows[token]][None], targets[token : token + 1])
        assert torch.equal(bits(alone), result[token : token + 1])


@given(problems())
@settings(max_examples=60)
def test_responses_are_independent(problem: dict[str, Any]) -> None:
    """Scored together or one by one, responses get the same bits; NaN stays in its response."""
    _core.select_isa(problem["isa"])
    logits, targets, rows, offsets = (problem[name] for name in ("logits", "targets", "rows", "offsets"))
    together = ops.response_nll(logits, targets, offsets, rows)
    for number, (begin, end) in enumerate(offsets.unfold(0, 2, 1).tolist()):
        own = torch.tensor([0, end - begin])
        alone = ops.response_nll(logits, targets[begin:end], own, rows[begin:end])
        assert torch.equal(bits(alone), bits(together[number : number + 1]))


@given(st.integers(1, 3000), st.floats(-1000, 1000, width=16), st.integers(0, 2**31), st.sampled_from(ISAS))
@settings(max_examples=60)
def test_shift_invariance(vocab: int, shift: float, seed: int, isa: str) -> None:
    """Logits that can be shifted without rounding: the log-probability moves by the rounding of the result alone."""
    _core.select_isa(isa)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-40, 40, (1, vocab), generator=generator) / 4.0
    shift = round(shift * 4) / 4
    target = torch.tensor([vocab // 2])
    plain, shifted = ops.token_logprobs(logits, target), ops.token_logprobs(logits + shift, target)
    assert_close(shifted, plain.double().numpy())


@given(problems())
@settings(max_examples=60)
def test_difference_is_the_difference(problem: dict[str, Any]) -> None:
    _core.select_isa(problem["isa"])
    logits, targets, rows, offsets = (problem[name] for name in ("logits", "targets", "rows", "offsets"))
    other = torch.roll(logits, 1, dims=0)
    one, zero = reference(logits, targets, rows), reference(other, targets, rows)
    with_itself = ops.response_nll_difference(logits, logits, targets, offsets, rows, rows)
    assert ((with_itself == 0) | with_itself.isnan()).all()
    result = ops.response_nll_difference(logits, other, targets, offsets, rows, rows)
    expected = torch.tensor(zero) - torch.tensor(one)  # NumPy would warn of inf - inf
    pairs = offsets.unfold(0, 2, 1).tolist()
    means = torch.stack([expected[begin:end].mean() for begin, end in pairs])
    # Two losses with an error of 1e-5 (or a unit in the last place) each.
    bound = sum(reference_bound(values) for values in (one, zero))
    assert torch.equal(result.isnan(), means.isnan())
    finite = means.isfinite()
    assert torch.equal(result[~finite & ~means.isnan()].double(), means[~finite & ~means.isnan()])
    assert ((result.double() - means)[finite].abs() <= bound).all()


def reference_bound(values: Any) -> float:
    finite = torch.tensor(values)[torch.tensor(values).isfinite()]
    return max(1e-5, float(finite.abs().max() if len(finite) else 0) * 2**-23)
