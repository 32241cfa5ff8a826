"""Products of hidden states with an output head, slice by slice into one workspace.

With m tokens to a slice, the head is read T / m times. A logit takes 2 H operations, and 8 bytes: it is written to the
workspace and read again, on a CPU in its cache. Four kinds: torch's own; oneDNN's, where `matmul` says so; on a CPU,
where those of 16-bit matrices would round the logits, of matrices converted to float32; and for bfloat16 a kernel for
AVX-512 BF16 or AMX.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from miwv_fast.ops import launch
from miwv_fast.ops.matmul import linear, uses_onednn

# The tokens of a slice, and its bytes. On a CPU: what fits into its cache, and products as fast as large ones (losses
# at H = 576 on Zen 3: 16 ns a logit with 512 tokens, 29 with 128; benchmarks/results/head_cpu.json). On a GPU: the head
# is read once for 4,096 tokens.
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


def product_of(hidden: Tensor, head: Head, count: int) -> Product:
    """The kind of product for these hidden states, `count` of which will be multiplied.

    Logits are float32, except those of 16-bit types on CUDA before torch 2.8. Raises ValueError where the workspace is
    too small.
    """
    dtype, device = hidden.dtype, hidden.device
    if device.type == "cpu" and dtype is torch.float32 and uses_onednn():
        return _OneDnnProduct(head, count, device)
    if device.type != "cpu" or dtype is torch.float32:
        widens = dtype is not torch.float32 and _gives_float32(device.index, dtype)
        return Product(head, count, device, torch.float32 if widens else dtype)
    if dtype is torch.bfloat16 and head.weight.stride(1) == 1 and launch.has_product():
        return _TiledProduct(head, count, device)
    return _ConvertedProduct(head, count, device)


class Product:
    """Products of hidden states with the head, into one workspace; `tokens` at a time."""

    def __init__(self, head: Head, count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._head, self._device, self._dtype = head, device, dtype
        self._width = head.weight.shape[1]
        self.tokens, self._entries = self._slice_shape(count)
        self._allocate()

    def slices(self, chosen: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The first entry of a slice, and its logits [m, n], which the next slice overwrites."""
        chosen = self._prepare(chosen)
        for start in range(0, len(self._head.weight), self._entries):
            logits = self._multiply(chosen, self._head.weight[start : start + self._entries])
            if self._head.bias is not None:
                logits += self._head.bias[start : start + self._entries]
            yield start, logits

    def _slice_shape(self, count: int) -> tuple[int, int]:
        """Tokens and entries of a slice, by the number of tokens and what the workspace has room for."""
        vocab, room = len(self._head.weight), self._head.workspace_bytes
        tokens, least = min(count, _SLICE_TOKENS[self._device.type]), min(vocab, _GRANULE)
        while tokens > 1 and self._held(tokens, least) > room:
            tokens = tokens // 2
        if self._held(tokens, least) > room:
            raise ValueError(
                f"workspace_bytes is {room}, it must be at least {self._held(1, least)} for H = {self._width} and "
                f"V = {vocab}"
            )
        # Copies of the head take four times the bytes of a slice at most: there are many entries where tokens are few.
        entry = max(self._dtype.itemsize * tokens, self._copied() // 4)
        entries = max(least, _SLICE_BYTES[self._device.type] // entry // _GRANULE * _GRANULE)
        while entries > least and self._held(tokens, entries) > room:
            entries = max(least, entries // 2 // _GRANULE * _GRANULE)
        return tokens, min(entries, vocab)

    # ---- What the kinds differ in

    def _copied(self) -> int:
        """Bytes of an entry of the head where a slice has a copy of it."""
        return 0

    def _held(self, tokens: int, entries: int) -> int:
        """Bytes that slices of this shape take, the hidden states that are gathered for them included."""
        return self._dtype.itemsize * tokens * entries + self._head.weight.itemsize * self._width * tokens

    def _allocate(self) -> None:
        self._workspace = self._empty(self.tokens * self._entries, dtype=self._dtype)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _prepare(self, chosen: Tensor) -> Tensor:
        return chosen

    def _multiply(self, chosen: Tensor, weight: Tensor) -> Tensor:
        logits = self._workspace[: len(chosen) * len(weight)].view(len(chosen), len(weight))
        if chosen.dtype is self._dtype:
            return torch.mm(chosen, weight.T, out=logits)
        return torch.mm(chosen, weight.T, out_dtype=self._dtype, out=logits)


class _OneDnnProduct(Product):
    """Of float32 matrices on a CPU by oneDNN, which gives each slice memory of its own and may copy the head's."""

    def _copied(self) -> int:
        return 4 * self._width

    def _held(self, tokens: int, entries: int) -> int:
        # A slice is still there while the next one is made.
        return super()._held(tokens, entries) + 4 * tokens * entries + self._copied() * entries

    def _allocate(self) -> None:
        pass

    def _multiply(self, chosen: Tensor, weight: Tensor) -> Tensor:
        return linear(chosen, weight)


class _ConvertedProduct(Product):
    """Of 16-bit matrices on any CPU: in float32, a slice of the head at a time."""

    def _copied(self) -> int:
        return 4 * self._width

    def _held(self, tokens: int, entries: int) -> int:
        return super()._held(tokens, entries) + self._copied() * (entries + tokens)

    def _allocate(self) -> None:
        super()._allocate()
        self._converted = self._empty(self._entries, self._width)

    def _prepare(self, chosen: Tensor) -> Tensor:
        return chosen.float()

    def _multiply(self, chosen: Tensor, weight: Tensor) -> Tensor:
        return super()._multiply(chosen, self._converted[: len(weight)].copy_(weight))


class _TiledProduct(Product):
    """Of bfloat16 matrices on a CPU with AVX-512 BF16 or AMX."""

    def _copied(self) -> int:
        return 2 * _padded(self._width)

    def _held(self, tokens: int, entries: int) -> int:
        copied = self._copied() * (_padded(tokens) + _padded(entries))
        return 4 * _padded(tokens) * _row_stride(entries) + copied + 2 * self._width * tokens

    def _allocate(self) -> None:
        self._workspace = self._empty(_padded(self.tokens), _row_stride(self._entries))
        self._packed = self._empty(_padded(self._entries), _padded(self._width), dtype=torch.bfloat16)
        self._rows = self._empty(_padded(self.tokens), _padded(self._width), dtype=torch.bfloat16).zero_()

    def _prepare(self, chosen: Tensor) -> Tensor:
        return self._rows[: len(chosen), : self._width].copy_(chosen)

    def _multiply(self, chosen: Tensor, weight: Tensor) -> Tensor:
        launch.product(self._rows[: len(chosen)], weight, self._packed, self._workspace)
        return self._workspace[: len(chosen), : len(weight)]


def _padded(size: int) -> int:
    return -(-size // 32) * 32


def _row_stride(entries: int) -> int:
    return _padded(entries) + 16  # rows that are a power of two apart share few lines of a cache


@lru_cache
def _gives_float32(device: int, dtype: torch.dtype) -> bool:
    """Whether this torch multiplies 16-bit matrices into a float32 one on this device: tried once."""
    one = torch.ones(16, 16, dtype=dtype, device=torch.device("cuda", device))
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype is torch.float32
    except (NotImplementedError, TypeError):  # not for want of memory, which says nothing about it
        return False
