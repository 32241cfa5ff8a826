"""Which way to its losses a model allows: tried on a few tokens when it is loaded, and not read off its name."""

from __future__ import annotations

import logging
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from miwv_fast.head import AllLogits, DirectHead, Head, KeptRows, Scored, hook, run_once

_log = logging.getLogger(__name__)


def find_head(model: Any, name: str) -> Head:
    """The way to a model's losses that holds least and is exact: tried, with a warning where all logits are needed."""
    inputs, scored = _probe(model)
    with torch.inference_mode():
        logits = getattr(model(**inputs), "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"{name} gives no logits; it is no causal language model")
    if logits.shape[:2] != inputs["input_ids"].shape:
        raise ValueError(
            f"{name} gives logits at {logits.shape[1]} positions for {inputs['input_ids'].shape[1]} tokens, as with a "
            "soft prompt: which are whose is not known"
        )
    if not _is_causal(model, inputs, logits):
        raise ValueError(f"{name} sees the tokens that follow; it is no causal language model")
    if not _needs_no_cache(model, inputs, logits):
        raise ValueError(
            f"{name} gives other logits without a cache than with one, a fault of some versions of transformers (with "
            "Gemma 3n mended in 5.6): use another"
        )
    direct = _try_direct(model, inputs, scored, logits)
    if direct is not None:
        return direct
    rows = _try_rows(model, inputs, scored, logits)
    if rows is not None:
        return rows
    _log.warning("%s cannot give logits at chosen positions only: all of them are computed, in small batches", name)
    return AllLogits(model)


@torch.inference_mode()
def _is_causal(model: Any, inputs: dict[str, Any], logits: Tensor) -> bool:
    """Whether the last token leaves the logits before it as they are: an encoder's do change."""
    ids = inputs["input_ids"].clone()
    ids[:, -1] = (ids[:, -1] + 1) % int(model.config.get_text_config().vocab_size)
    return _agree_roughly(model, model(**inputs | {"input_ids": ids}).logits[:, :-1], logits[:, :-1])


@torch.inference_mode()
def _needs_no_cache(model: Any, inputs: dict[str, Any], logits: Tensor) -> bool:
    """Whether the logits are what they are with a cache as well: some layers look there for another's keys."""
    return _agree_roughly(model, model(**inputs | {"use_cache": True}).logits, logits)


def _agree_roughly(model: Any, other: Tensor, logits: Tensor) -> bool:
    # What 16 bits or quantised weights round differently beside another token is less than what an encoder's change.
    exact = model.dtype.itemsize >= 4 and not getattr(model, "is_quantized", False)
    return not logits.isfinite().all() or agree(other, logits, None if exact else torch.bfloat16)


@torch.inference_mode()
def _try_direct(model: Any, inputs: dict[str, Any], scored: Scored, logits: Tensor) -> DirectHead | None:
    try:
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear) or linear.weight.is_meta or not linear.weight.is_floating_point():
            return None
        taken: list[tuple[Tensor, Tensor]] = []
        with hook(linear.register_forward_hook(lambda module, arguments, out: taken.append((arguments[0], out)))):
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

    with hook(linear.register_forward_hook(replace)):
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
    for adapted in (False, True):  # an adapter's base model has the head in it
        try:
            kept = KeptRows(model, model.get_decoder() if adapted else model.base_model)
            at_once = kept.logits(inputs, scored.rows)
            with run_once(kept.body):
                one_by_one = [kept.logits(inputs, row[None]) for row in scored.rows]
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            _log.debug("no logits at chosen positions: %s", error)
            continue
        if agree(at_once, expected) and agree(torch.cat(one_by_one), expected):
            return kept
    return None


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
