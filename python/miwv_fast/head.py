"""Three ways from a model to the losses of scored tokens; the first that is exact for the model is taken.

`direct`: hidden states at scored positions and the weight of the output head; the logits are never held. `rows`: the
model's own logits at scored positions, as many at a time as a workspace holds. `all`: all of its logits.

Which of them a model allows is tried by `probe.py` when it is loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from miwv_fast import ops
from miwv_fast.devices import to_device
from miwv_fast.ops.matmul import fast_linear

WORKSPACE_BYTES = 256 << 20
_locks: WeakKeyDictionary[Any, AbstractContextManager[Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Scored:
    """Which logits of a forward pass count: row `b * S + s` is position s of sequence b; all int64.

    rows [T], targets [T], offsets [B + 1] as in `ops.response_nll`.
    """

    rows: Tensor
    targets: Tensor
    offsets: Tensor

    def to(self, device: torch.device) -> Scored:
        """The same on another device."""
        return Scored(*(to_device(values, device) for values in (self.rows, self.targets, self.offsets)))


class Head(Protocol):
    """A way from a model's inputs to losses."""

    @property
    def name(self) -> str:
        """`direct`, `rows` or `all`."""
        ...

    def response_nll(self, inputs: dict[str, Any], scored: Scored) -> Tensor:
        """Mean NLL in nats of each response, float32 [B], by one forward pass."""
        ...


@dataclass(frozen=True)
class DirectHead:
    """Multiplies hidden states by the head's weight, a slice at a time, and applies what the model does to logits."""

    model: Any
    scale: float = 1.0
    softcap: float | None = None
    name: str = "direct"

    def response_nll(self, inputs: dict[str, Any], scored: Scored) -> Tensor:
        """The head itself gets nothing to do: its input is taken and an empty one handed on."""
        taken: list[Tensor] = []

        def take(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
            taken.append(arguments[0])
            return (arguments[0][:, :0],)

        linear = self.model.get_output_embeddings()
        with hook(linear.register_forward_pre_hook(take)):
            self.model(**inputs)
        (hidden,) = taken
        there = scored.to(linear.weight.device)
        return ops.linear_response_nll(
            hidden.to(linear.weight.device, non_blocking=True),
            linear.weight,
            there.targets,
            there.offsets,
            there.rows,
            bias=linear.bias,
            softcap=self.softcap,
            scale=self.scale,
            workspace_bytes=WORKSPACE_BYTES,
        )


@dataclass(frozen=True)
class KeptRows:
    """Gives the model's own head scored positions only, whatever the head is; what comes before it is run once."""

    model: Any
    body: nn.Module  # the model without its head
    name: str = "rows"

    def response_nll(self, inputs: dict[str, Any], scored: Scored) -> Tensor:
        """In chunks of positions whose logits fit the workspace."""
        count, chunk = len(scored.rows), positions_at_a_time(self.model)
        if count <= chunk:
            logits = self.logits(inputs, scored.rows)
            there = scored.to(logits.device)
            return ops.response_nll(logits, there.targets, there.offsets)
        logprobs = []
        with run_once(self.body):
            for begin in range(0, count, chunk):
                logits = self.logits(inputs, scored.rows[begin : begin + chunk])
                targets = to_device(scored.targets[begin : begin + chunk], logits.device)
                logprobs.append(ops.token_logprobs(logits, targets).double())
        known = torch.cat(logprobs)
        # A token whose log-probability p is known: a maximum of 0, a sum of 1, a logit of p.
        partials = torch.stack([torch.zeros_like(known), torch.ones_like(known), known], dim=1)
        return ops.combine_partials([partials], to_device(scored.offsets, known.device))

    def logits(self, inputs: dict[str, Any], rows: Tensor) -> Tensor:
        """The logits of chosen rows, [T, V]: to the model, one sequence of T."""

        def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            hidden = arguments[0].flatten(0, 1)
            return (hidden.index_select(0, to_device(rows, hidden.device))[None],)

        with hook(self.model.get_output_embeddings().register_forward_pre_hook(keep)):
            logits: Tensor = self.model(**inputs).logits
        return logits.squeeze(0)


@dataclass(frozen=True)
class AllLogits:
    """Takes the logits at all positions."""

    model: Any
    name: str = "all"

    def response_nll(self, inputs: dict[str, Any], scored: Scored) -> Tensor:
        """The rows that count are picked out of all."""
        result = self.model(**inputs)
        there = scored.to(result.logits.device)
        return ops.response_nll(result.logits, there.targets, there.offsets, there.rows)


def positions_at_a_time(model: Any) -> int:
    """How many positions' logits fit the workspace, in float32."""
    return max(1, WORKSPACE_BYTES // (4 * int(model.config.get_text_config().vocab_size)))


@contextmanager
def running(model: Any) -> Iterator[None]:
    """Around all passes of a model: one of another thread would meet the hooks of this one."""
    with _locks.setdefault(model, threading.RLock()), fast_linear():
        yield


@contextmanager
def hook(handle: Any) -> Iterator[None]:
    """Within, a module has the hook of this handle; it is removed also where the call fails."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def run_once(body: nn.Module) -> Iterator[None]:
    """Within, a module gives its first output again and again: what follows it can be run in parts."""
    own = body.__dict__.get("forward")
    forward = body.forward
    outputs: list[Any] = []

    def once(*arguments: Any, **options: Any) -> Any:
        if not outputs:
            outputs.append(forward(*arguments, **options))
        return outputs[0]

    body.forward = once
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own
