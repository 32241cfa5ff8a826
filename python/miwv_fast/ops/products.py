"""Products of hidden states with an output head, slice by slice into one workspace.

With n logits in a slice of m tokens, the head is read T / m times and the workspace is written and read once: 2 H
operations and 8 bytes for a logit, which on a CPU stay in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# The tokens of a slice, and its bytes. On a CPU: what fits into its cache, and products as fast as large ones (Zen 4:
# 12 ns a logit at H = 576, 15 with 64 tokens). On a GPU: the head is read once for 4,096 tokens.
_SLICE_TOKENS = {"cpu": 512, "cuda": 4096}
_SLICE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
_GRANULE = 64  # entries; slices are no narrower unless the vocabulary is


@dataclass(frozen=True)
class Head:
    """An output head and the memory it may use."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    workspace_bytes: int


def gather(hidden: Tensor, rows: Tensor | None, begin: int, end: int) -> Tensor:
    """The hidden states [m, H] of some tokens, whatever the strides of the whole."""
    if hidden.ndim == 2:
        return hidden[begin:end] if rows is None else hidden[rows[begin:end]]
    length = hidden.shape[1]
    chosen = torch.arange(begin, end, device=hidden.device) if rows is None else rows[begin:end]
    return hidden[chosen // length, chosen % length]


class Product:
    """Products of hidden states with the head, into one workspace; `tokens` at a time."""

    def __init__(self, hidden: Tensor, head: Head, count: int) -> None:
        self._head = head
        kind, dtype = hidden.device.type, hidden.dtype
        widens = dtype is torch.float32 or (kind == "cuda" and _gives_float32(hidden.device.index, dtype))
        self._converts = kind == "cpu" and dtype is not torch.float32  # a CPU's products give their own type only
        out = torch.float32 if widens or self._converts else dtype
        self.tokens, self._entries = _slice_shape(head, kind, count, out.itemsize, self._converts)
        self._workspace = torch.empty(self.tokens * self._entries, dtype=out, device=hidden.device)
        self._wide = widens and dtype is not torch.float32
        if self._converts:
            self._converted = torch.empty(
                self._entries, head.weight.shape[1], dtype=torch.float32, device=hidden.device
            )

    def slices(self, chosen: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The first entry of a slice, and its logits [m, n], which the next slice overwrites."""
        vocab = self._head.weight.shape[0]
        if self._converts:
            chosen = chosen.float()
        for start in range(0, vocab, self._entries):
            weight = self._head.weight[start : start + self._entries]
            if self._converts:
                weight = self._converted[: len(weight)].copy_(weight)
            logits = self._workspace[: len(chosen) * len(weight)].view(len(chosen), len(weight))
            if self._wide:
                torch.mm(chosen, weight.T, out_dtype=torch.float32, out=logits)
            else:
                torch.mm(chosen, weight.T, out=logits)
            if self._head.bias is not None:
                logits += self._head.bias[start : start + self._entries]
            yield start, logits


def _slice_shape(head: Head, kind: str, count: int, item: int, converts: bool) -> tuple[int, int]:
    """Tokens and entries of a slice, by the number of tokens and what the workspace has room for."""
    vocab, width = head.weight.shape
    tokens = min(count, _SLICE_TOKENS[kind])

    def held(tokens: int, entries: int) -> int:
        converted = 4 * width * (entries + tokens) if converts else 0
        return item * tokens * entries + head.weight.itemsize * width * tokens + converted

    least = min(vocab, _GRANULE)
    while tokens > 1 and held(tokens, least) > head.workspace_bytes:
        tokens = tokens // 2
    if held(tokens, least) > head.workspace_bytes:
        raise ValueError(
            f"workspace_bytes is {head.workspace_bytes}, it must be at least {held(1, least)} for H = {width} and "
            f"V = {vocab}"
        )
    entries = max(least, _SLICE_BYTES[kind] // (item * tokens) // _GRANULE * _GRANULE)
    while entries > least and held(tokens, entries) > head.workspace_bytes:
        entries = max(least, entries // 2 // _GRANULE * _GRANULE)
    return tokens, min(entries, vocab)


@lru_cache
def _gives_float32(device: int, dtype: torch.dtype) -> bool:
    """Whether this torch multiplies 16-bit matrices into a float32 one on this device: tried once."""
    one = torch.ones(16, 16, dtype=dtype, device=torch.device("cuda", device))
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype is torch.float32
    except (NotImplementedError, TypeError):  # not for want of memory, which says nothing about it
        return False
