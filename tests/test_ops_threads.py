"""Threads: the same bits from any number of them, calls from several at once, and calls after fork."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from miwv_fast import ops
from test_ops_reference import bits


@pytest.fixture(autouse=True)
def keep_num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _problem(rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows)
    logits = torch.randn(rows, vocab) * 4
    logits[rows // 2, vocab // 2] = torch.nan
    logits[:, -1] += torch.linspace(0, 90, rows)  # some rows raise their reference at the end
    cuts = torch.randint(rows, (9,)).sort().values
    return logits, torch.randint(vocab, (rows,)), torch.cat([torch.tensor([0]), cuts, torch.tensor([rows])])


@pytest.mark.parametrize(("rows", "vocab"), [(3, 200_000), (64, 50257), (3000, 700)])
def test_the_number_of_threads_leaves_no_trace(rows: int, vocab: int) -> None:
    logits, targets, offsets = _problem(rows, vocab)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for _ in range(3):
            tokens = ops.token_logprobs(logits, targets)
            nll = ops.response_nll(logits, targets, offsets)
            difference = ops.response_nll_difference(logits, logits.flip(0), targets, offsets)
            results.append(bits(torch.cat([tokens, nll, difference])))
    assert all(torch.equal(result, results[0]) for result in results)


def test_eight_python_threads_at_once() -> None:
    """Calls of different sizes share the pool; each gets its own results."""
    torch.set_num_threads(3)
    problems = [_problem(rows, 4000) for rows in (40, 300, 700, 5)]
    expected = [bits(ops.response_nll(*problem)) for problem in problems]

    def call(number: int) -> bool:
        which = number % len(problems)
        return torch.equal(bits(ops.response_nll(*problems[which])), expected[which])

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(call, range(400)))


def test_an_error_in_one_thread_leaves_the_others_alone() -> None:
    logits, targets, offsets = _problem(300, 4000)
    expected = bits(ops.response_nll(logits, targets, offsets))

    def call(number: int) -> bool:
        if number % 3:
            return torch.equal(bits(ops.response_nll(logits, targets, offsets)), expected)
        with pytest.raises(ValueError, match=r"targets\[299\] is 4000"):
            ops.response_nll(logits, targets.index_fill(0, torch.tensor([299]), 4000), offsets)
        return True

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(call, range(120)))


# In a process of its own: pytest's has threads of other libraries, about which fork warns.
FORK = """
import os, signal, threading, warnings
warnings.simplefilter("ignore")
import torch
from miwv_fast import ops
torch.set_num_threads(4)
logits = torch.randn(400, 5000)
targets, offsets = torch.arange(400), torch.arange(0, 401, 100)
expected = ops.response_nll(logits, targets, offsets)
busy = threading.Thread(target=lambda: [ops.response_nll(logits, targets, offsets) for _ in range(300)])
busy.start()  # so that some forks meet the pool at work
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        same = all(torch.equal(ops.response_nll(logits, targets, offsets), expected) for _ in range(3))
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if torch.equal(ops.response_nll(logits, targets, offsets), expected) else 1)
        os._exit(0 if same and os.waitpid(grandchild, 0)[1] == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
busy.join()
assert torch.equal(ops.response_nll(logits, targets, offsets), expected)
"""


def test_fork_after_use() -> None:
    """A child has none of its parent's threads; it makes its own, and so does its child."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
