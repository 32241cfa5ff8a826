"""Keys and values of sequences that others continue: written as the sequences run, read as others run behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from miwv_fast.devices import to_device


class Prefixes:
    """Keys and values of R sequences, token behind token, those of a layer in two tensors [number of tokens, heads, D].

    `own` int64 [R] are their lengths without the sequence that they continue, `parents` int64 [R]: an earlier one, or
    -1; `lengths` int64 [R] are those of the whole. Each token is kept once, however many sequences it belongs to. A
    layer that attends to another's keys has none.
    """

    def __init__(self, own: np.ndarray, parents: np.ndarray, layers: int) -> None:
        self._own = own
        self._parents = parents
        self._starts = np.cumsum(own) - own
        self._tokens: list[np.ndarray] = []  # where those of each whole sequence stand
        for start, count, parent in zip(self._starts.tolist(), own.tolist(), parents.tolist(), strict=True):
            tokens = np.arange(start, start + count)
            self._tokens.append(tokens if parent < 0 else np.concatenate([self._tokens[parent], tokens]))
        self.lengths = np.array([len(tokens) for tokens in self._tokens], np.int64)
        self._layers = [_Kept(int(own.sum())) for _ in range(layers)]

    def keep(self, rows: np.ndarray) -> Cache:
        """The cache for a pass over what sequences `rows`, [B], have of their own: what it is given stays here.

        Either all of them continue another, which it holds, or none does.
        """
        position = np.arange(self._own[rows].max())
        own = position < self._own[rows, None]
        to = _OnDevices((self._starts[rows, None] + position)[own])
        tokens = _OnDevices(np.flatnonzero(own))
        writers: list[Any] = [_Writer(layer, tokens, to) for layer in self._layers]
        parents = self._parents[rows]
        return Cache(layers=writers if parents[0] < 0 else self._readers(parents, writers))

    def before(self, rows: np.ndarray) -> np.ndarray | None:
        """How long what sequences `rows`, [B], continue is, int64 [B]; None where they continue nothing."""
        parents = self._parents[rows]
        return None if parents[0] < 0 else self.lengths[parents]

    def behind(self, rows: np.ndarray) -> Cache:
        """The cache for a pass that continues sequences `rows`, [B], which may repeat; as wide as the longest.

        All end together, for some models count how far back a token stands by its place in the cache. In front of a
        shorter one stands its own first token again, for a mask to hide: another sequence's could be NaN, which no mask
        hides.
        """
        return Cache(layers=self._readers(rows, [_Layer() for _ in self._layers]))

    def _readers(self, rows: np.ndarray, inner: Sequence[_Layer]) -> list[Any]:
        width = int(self.lengths[rows].max())
        from_end = np.arange(-width, 0)
        picked = [self._tokens[row][np.maximum(from_end, -self.lengths[row])] for row in rows]
        tokens = _OnDevices(np.concatenate(picked))
        return [_Reader(kept, tokens, width, layer) for kept, layer in zip(self._layers, inner, strict=True)]

    def bytes_per_token(self) -> int:
        """What the keys and values of one token take."""
        return sum(tensor[0].nbytes for layer in self._layers for tensor in (layer.keys, layer.values) if len(tensor))


def pass_through(layers: int) -> Cache:
    """The cache for a pass that nothing continues: it keeps nothing, and spares models a look at the positions."""
    return Cache(layers=[_Layer() for _ in range(layers)])


class _Kept:
    """What one layer keeps: room for so many tokens, taken when the first of them come."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self.keys = self.values = torch.empty(0)

    def make_room(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not len(self.keys):
            self.keys, self.values = (new.new_empty(self._tokens, *new.shape[1::2]) for new in (keys, values))


class _OnDevices:
    """Indices on every device that asks for them, copied there once."""

    def __init__(self, indices: np.ndarray) -> None:
        self._indices = torch.from_numpy(indices)
        self._copies: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        if device not in self._copies:
            self._copies[device] = to_device(self._indices, device)
        return self._copies[device]


class _Layer(DynamicLayer):
    """Keeps nothing: a pass attends to its own keys and values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


class _Writer(_Layer):
    def __init__(self, kept: _Kept, tokens: _OnDevices, to: _OnDevices) -> None:
        super().__init__()
        self._kept, self._tokens, self._to = kept, tokens, to

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._kept.make_room(key_states, value_states)
        for kept, new in ((self._kept.keys, key_states), (self._kept.values, value_states)):
            tokens = new.transpose(1, 2).flatten(0, 1).index_select(0, self._tokens.on(new.device))
            kept.index_copy_(0, self._to.on(new.device), tokens)
        return key_states, value_states


class _Reader(_Layer):
    """Puts kept tokens in front, picked when its layer asks, so that no pass holds those of more than one layer."""

    def __init__(self, kept: _Kept, tokens: _OnDevices, width: int, inner: _Layer) -> None:
        super().__init__()
        self._kept, self._tokens, self._width, self._inner = kept, tokens, width, inner

    def get_seq_length(self) -> int:
        return self._width

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._inner.update(key_states, value_states)
        return self._continued(self._kept.keys, keys), self._continued(self._kept.values, values)

    def _continued(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        batch, heads, length, size = new.shape
        both = new.new_empty(batch, self._width + length, heads, size).transpose(1, 2)
        before = kept.index_select(0, self._tokens.on(new.device)).view(batch, self._width, heads, size)
        both[:, :, : self._width] = before.transpose(1, 2)
        both[:, :, self._width :] = new
        return both
