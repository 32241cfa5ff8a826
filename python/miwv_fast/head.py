"""How the losses of scored tokens are had from a model: three ways, the first of which that is exact for it.

`direct`: hidden states at scored positions and the weight of the output head; the logits are never held. `rows`: the
model's own logits at scored positions, as many at a time as a workspace holds. `all`: all of its logits.

Which of them a model allows is tried on a few tokens when it is loaded, and not read off its name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from miwv_fast import ops
from miwv_fast.devices import to_device

WORKSPACE_BYTES = 256 << 20

_log = logging.getLogger(__name__)


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


def find_head(model: Any, name: str) -> Head:
    """The way to a model's losses that holds least and is exact: tried, with a warning where all logits are needed."""
    inputs, scored = _probe(model)
    with torch.inference_mode():
        logits = getattr(model(**inputs), "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"{name} gives no logits; it is no causal language model")
    if not _is_causal(model, inputs, logits):
        raise ValueError(f"{name} sees the tokens that follow; it is no causal language model")
    direct = _try_direct(model, inputs, scored, logits)
    if direct is not None:
        return direct
    rows = _try_rows(model, inputs, scored, logits)
    if rows is not None:
        return rows
    _log.warning("%s cannot give logits at chosen positions only: all of them are computed, in small batches", name)
    return AllLogits(model)


# ---- The ways


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
        with _hook(linear.register_forward_pre_hook(take)):
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
    name: str = "rows"

    def response_nll(self, inputs: dict[str, Any], scored: Scored) -> Tensor:
        """In chunks of positions whose logits fit the workspace."""
        count, chunk = len(scored.rows), positions_at_a_time(self.model)
        if count <= chunk:
            logits = self.logits(inputs, scored.rows)
            there = scored.to(logits.device)
            return ops.response_nll(logits, there.targets, there.offsets)
        logprobs = []
        with _run_once(self.model.base_model):
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

        with _hook(self.model.get_output_embeddings().register_forward_pre_hook(keep)):
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


# ---- Trying them


@torch.inference_mode()
def _is_causal(model: Any, inputs: dict[str, Any], logits: Tensor) -> bool:
    """Whether the last token leaves the logits before it as they are: an encoder's do change."""
    ids = inputs["input_ids"].clone()
    ids[:, -1] = (ids[:, -1] + 1) % int(model.config.get_text_config().vocab_size)
    before, other = logits[:, :-1], model(**inputs | {"input_ids": ids}).logits[:, :-1]
    # What 16 bits or quantised weights round differently beside another token is less than what an encoder's change.
    exact = model.dtype.itemsize >= 4 and not getattr(model, "is_quantized", False)
    return not before.isfinite().all() or agree(other, before, None if exact else torch.bfloat16)


@torch.inference_mode()
def _try_direct(model: Any, inputs: dict[str, Any], scored: Scored, logits: Tensor) -> DirectHead | None:
    try:
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear) or linear.weight.is_meta or not linear.weight.is_floating_point():
            return None
        taken: list[tuple[Tensor, Tensor]] = []
        with _hook(linear.register_forward_hook(lambda module, arguments, out: taken.append((arguments[0], out)))):
            model(**inputs)
        (hidden, out), *others = taken
        plain = nn.functional.linear(hidden.to(linear.weight.device), linear.weight, linear.bias)
        if others or hidden.shape[:2] != inputs["input_ids"].shape or not agree(plain, out):
            return None
        transform = _find_transform(model, linear, inputs)
        if transform is None:
            return None
        direct = DirectHead(model, *transform)
        nll = direct.response_nll(inputs, scored)
        expected = -logits.flatten(0, 1).double().log_softmax(-1)[scored.rows, scored.targets]
        # The losses are float32, the rounding of what they are compared with is that of the model's type.
        return direct if agree(nll.double(), expected.to(nll.device), linear.weight.dtype, logits.abs().max()) else None
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        _log.debug("no direct way to the losses: %s", error)
        return None


def _find_transform(model: Any, linear: nn.Linear, inputs: dict[str, Any]) -> tuple[float, float | None] | None:
    """The scale and softcap that lie between the head and the logits, None if that is not what lies there.

    The head is made to give numbers of all magnitudes, and what the model makes of them is compared with what scales
    and softcaps, taken from its configuration, would make of them.
    """
    generator = torch.Generator().manual_seed(0)
    given: list[Tensor] = []

    def replace(module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
        exponents = torch.rand(out.shape, generator=generator) * 14 - 4  # beyond any softcap, within float16
        signs = torch.randint(0, 2, out.shape, generator=generator) * 2 - 1
        given.append((signs * exponents.exp()).to(out))
        return given[0]

    with _hook(linear.register_forward_hook(replace)):
        got = model(**inputs).logits.double()
    x = given[0].double().to(got.device)
    config = model.config.get_text_config().to_dict()
    values = [
        float(value)
        for key, value in config.items()
        if ("logit" in key or "lm_head" in key) and type(value) in (int, float) and value > 0
    ]
    for scale, softcap in product([1.0, *values, *(1 / value for value in values)], [None, *values]):
        y = x * scale
        expected = y if softcap is None else softcap * torch.tanh(y / softcap)
        # Up to three roundings, each relative to what is rounded.
        if (
            got.shape == x.shape
            and ((got - expected).abs() <= 4 * torch.finfo(given[0].dtype).eps * expected.abs()).all()
        ):
            return scale, softcap
    return None


@torch.inference_mode()
def _try_rows(model: Any, inputs: dict[str, Any], scored: Scored, logits: Tensor) -> KeptRows | None:
    """Whether a head that is given those rows only gives their logits, at once and one after the other."""
    expected = logits.flatten(0, 1)[scored.rows]
    try:
        kept = KeptRows(model)
        at_once = kept.logits(inputs, scored.rows)
        with _run_once(model.base_model):
            one_by_one = [kept.logits(inputs, row[None]) for row in scored.rows]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        _log.debug("no logits at chosen positions: %s", error)
        return None
    return kept if agree(at_once, expected) and agree(torch.cat(one_by_one), expected) else None


def _probe(model: Any) -> tuple[dict[str, Any], Scored]:
    """Two sequences of three tokens, of which three are scored, each a response of its own."""
    ids = torch.arange(6, device=model.device).reshape(2, 3) % int(model.config.get_text_config().vocab_size)
    inputs = {"input_ids": ids, "use_cache": False}
    return inputs, Scored(torch.tensor([1, 3, 5]), torch.tensor([2, 1, 0]), torch.arange(4))


def agree(a: Tensor, b: Tensor, dtype: torch.dtype | None = None, magnitude: Tensor | None = None) -> bool:
    """Equal up to the rounding of products of another shape; logits of another position differ by far more.

    The rounding is that of `dtype` at `magnitude`; by default that of `a` at the largest of `b`.
    """
    if a.shape != b.shape:
        return False
    eps = torch.finfo(dtype or a.dtype).eps
    finite = b[b.isfinite()]
    largest = float(finite.abs().max()) if magnitude is None and len(finite) else float(magnitude or 0)
    return torch.allclose(a, b, rtol=0, atol=(64 if eps < 1e-4 else 8) * eps * largest)


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _run_once(base: nn.Module) -> Iterator[None]:
    """Within, a module gives its first output again and again: what follows it can be run in parts."""
    own = base.__dict__.get("forward")
    forward = base.forward
    outputs: list[Any] = []

    def once(*arguments: Any, **options: Any) -> Any:
        if not outputs:
            outputs.append(forward(*arguments, **options))
        return outputs[0]

    base.forward = once
    try:
        yield
    finally:
        if own is None:
            del base.forward
        else:
            base.forward = own
