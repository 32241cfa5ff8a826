"""From a model to losses: the way that is taken, and that every way gives what float64 gives."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from miwv_fast import head
from miwv_fast.assembly import TokenSequence
from miwv_fast.head import AllLogits, DirectHead, KeptRows
from miwv_fast.model import CausalLM
from support import tiny_model

VOCAB = 300
# Scale and softcap as their configurations in support.py say.
ARCHITECTURES = {
    "llama": (1.0, None),
    "qwen3": (1.0, None),
    "gemma2": (1.0, 30.0),
    "gemma3": (1.0, 12.0),
    "granite": (1 / 8, None),
    "cohere": (0.25, None),
    "gpt2": (1.0, None),
    "phi": (1.0, None),
    "mistral": (1.0, None),
    "falcon_h1": (0.6, None),
    "mamba": (1.0, None),
}
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def sequences(count: int = 5) -> list[TokenSequence]:
    generator = np.random.default_rng(1)
    made = []
    for _ in range(count):
        ids = generator.integers(0, VOCAB, generator.integers(5, 30)).astype(np.int32)
        rows = np.sort(generator.choice(len(ids) - 1, generator.integers(1, 4), replace=False)).astype(np.int32)
        made.append(TokenSequence(ids, rows, ids[rows + 1]))
    return made


def reference(model: Any, batch: list[TokenSequence]) -> np.ndarray:
    """One sequence at a time, softmax in float64."""
    losses = []
    for sequence in batch:
        with torch.no_grad():
            logits = model(torch.from_numpy(sequence.ids)[None].long()).logits[0].double()
        picked = logits.log_softmax(-1)[sequence.rows.astype(np.int64), sequence.targets.astype(np.int64)]
        losses.append(-picked.mean().item())
    return np.array(losses)


def assert_exact(lm: CausalLM, model: Any, batch: list[TokenSequence]) -> None:
    """No further from the model in float64 than four times what its own float32 logits are."""
    exact = reference(copy.deepcopy(model).double(), batch)
    allowed = 4 * np.abs(reference(model, batch) - exact).max() + 1e-5
    assert np.abs(lm.response_nll(batch).numpy() - exact).max() <= allowed


@each_architecture
def test_every_architecture_takes_the_direct_way(architecture: str) -> None:
    model = tiny_model(architecture, VOCAB)
    lm = CausalLM(model, None, architecture)
    assert isinstance(lm.head, DirectHead)
    scale, softcap = ARCHITECTURES[architecture]
    assert lm.head.scale == pytest.approx(scale) and lm.head.softcap == softcap
    assert_exact(lm, model, sequences())
    described = lm.describe()
    assert described["head"] == "direct" and described["logit_softcap"] == softcap


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "phi", "mamba"])
@pytest.mark.parametrize("way", [lambda model: KeptRows(model, model.base_model), AllLogits], ids=["rows", "all"])
def test_the_other_ways_give_the_same(architecture: str, way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen rows at once, chosen rows three at a time, and all logits."""
    model = tiny_model(architecture, VOCAB)
    lm = CausalLM(model, None, architecture)
    lm.head = way(model)
    assert_exact(lm, model, sequences())
    at_once = lm.response_nll(sequences())
    monkeypatch.setattr(head, "WORKSPACE_BYTES", 3 * 4 * VOCAB)
    assert head.positions_at_a_time(model) == 3
    np.testing.assert_allclose(lm.response_nll(sequences()).numpy(), at_once.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_architecture
def test_sixteen_bits(architecture: str, dtype: torch.dtype) -> None:
    """The same way and the same transform; logits of more digits than the model's own."""
    model = tiny_model(architecture, VOCAB).to(dtype)
    lm = CausalLM(model, None, architecture)
    assert isinstance(lm.head, DirectHead) and lm.head.softcap == ARCHITECTURES[architecture][1]
    assert lm.head.scale == pytest.approx(ARCHITECTURES[architecture][0])
    single = [sequence for sequence in sequences() if len(sequence.ids) < 30][:1]  # no padding: other bits in 16
    losses = lm.response_nll(single).numpy()
    own = reference(model, single)
    with torch.no_grad():
        largest = float(model(torch.from_numpy(single[0].ids)[None].long()).logits.abs().max())
    assert np.abs(losses - own).max() <= 2 * largest * torch.finfo(dtype).eps


class Quantised(nn.Module):
    """A head of eight-bit integers with a scale for each row, in the manner of bitsandbytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.steps = nn.Parameter(linear.weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((linear.weight / self.steps).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ (self.weight * self.steps).T


class QuantisedLinear(nn.Linear):
    """The same as a subclass of a linear layer, whose weight is packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, bias=False)
        self.inner = Quantised(linear)
        self.weight = self.inner.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden)


class Adapted(nn.Linear):
    """A linear layer with something added, in the manner of LoRA: its weight alone is not the head."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.added = nn.Linear(linear.in_features, linear.out_features, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + self.added(hidden)


@pytest.mark.parametrize("replace", [Quantised, QuantisedLinear, Adapted])
def test_heads_that_are_more_than_a_weight_take_the_safe_way(
    replace: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", VOCAB)
    torch.manual_seed(2)
    model.lm_head = replace(model.lm_head)
    lm = CausalLM(model, None, "changed")
    assert isinstance(lm.head, KeptRows) and not caplog.text
    expected = reference(model, sequences())
    np.testing.assert_allclose(lm.response_nll(sequences()).numpy(), expected, atol=2e-5)
    monkeypatch.setattr(head, "WORKSPACE_BYTES", 2 * 4 * VOCAB)
    np.testing.assert_allclose(lm.response_nll(sequences()).numpy(), expected, atol=2e-5)


def test_what_a_model_does_to_its_logits_must_be_known() -> None:
    """Shifted, masked, or capped by what no configuration names: neither a scale nor a softcap."""
    for change in (
        lambda logits: logits + 1e-3,
        lambda logits: logits.index_fill(-1, torch.tensor([7]), -torch.inf),
        lambda logits: 20 * torch.tanh(logits / 20),
        lambda logits: logits.clamp(-50, 50),
        lambda logits: logits.log_softmax(-1),
    ):
        model = tiny_model("llama", VOCAB)
        forward = model.forward

        def changed(*arguments: Any, forward: Any = forward, change: Any = change, **named: Any) -> Any:
            result = forward(*arguments, **named)
            result.logits = change(result.logits)
            return result

        model.forward = changed
        lm = CausalLM(model, None, "changed")
        assert isinstance(lm.head, KeptRows)
        np.testing.assert_allclose(lm.response_nll(sequences()).numpy(), reference(model, sequences()), atol=2e-5)


class Unused(nn.Linear):
    """A head that the model does not call: it multiplies by the weight itself."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T


def wrapped(model: Any) -> nn.Module:
    """A model of one's own, that does not say what its head is."""

    class Wrapped(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return model(input_ids=input_ids)

    outer: Any = Wrapped()
    outer.config, outer.device, outer.dtype = model.config, model.device, model.dtype
    return outer


class Adapter(nn.Module):
    """As PEFT's wrappers: their `base_model` is the whole model, and the head has an addition of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model, self.config, self.device, self.dtype = model, model.config, model.device, model.dtype
        self.get_output_embeddings, self.get_decoder = model.get_output_embeddings, model.get_decoder
        model.lm_head.register_forward_hook(lambda module, inputs, out: out + inputs[0][..., :1])

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        return self.base_model(input_ids=input_ids, **inputs)


def test_an_adapter_on_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Adapter(tiny_model("llama", VOCAB))
    lm = CausalLM(model, None, "adapted")
    assert isinstance(lm.head, KeptRows)
    monkeypatch.setattr(head, "WORKSPACE_BYTES", 2 * 4 * VOCAB)
    np.testing.assert_allclose(lm.response_nll(sequences()).numpy(), reference(model, sequences()), atol=2e-5)


def test_a_soft_prompt_is_refused() -> None:
    """There are more logits than tokens."""
    model = tiny_model("llama", VOCAB)
    forward = model.forward
    model.forward = lambda input_ids, **named: forward(torch.cat([input_ids[:, :1]] * 5 + [input_ids], dim=1), **named)
    with pytest.raises(ValueError, match="logits at 8 positions for 3 tokens, as with a soft prompt"):
        CausalLM(model, None, "prompted")


@pytest.mark.parametrize("hidden", ["unused", "unknown", "mixed"])
def test_a_head_that_cannot_be_given_chosen_positions_gives_all_logits(
    hidden: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not called, not told, or what it gives is changed by where it stands."""
    model = tiny_model("llama", VOCAB)
    if hidden == "unused":
        model.lm_head = Unused(model.lm_head)
    if hidden == "mixed":
        model.lm_head.register_forward_hook(
            lambda module, inputs, out: out * torch.arange(1, out.shape[1] + 1)[:, None]
        )
    lm = CausalLM(wrapped(model) if hidden == "unknown" else model, None, "stubborn")
    assert isinstance(lm.head, AllLogits) and "all of them are computed, in small batches" in caplog.text
    np.testing.assert_allclose(lm.response_nll(sequences()).numpy(), reference(model, sequences()), atol=2e-5)
    assert lm.default_batch_tokens() == 1024
    monkeypatch.setattr(head, "WORKSPACE_BYTES", 100 * 4 * VOCAB)
    assert lm.default_batch_tokens() == 100


def test_a_model_that_is_wrong_without_a_cache_is_refused() -> None:
    """As Gemma 3n was before transformers 5.6."""
    model = tiny_model("llama", VOCAB)
    forward = model.forward

    def changed(*arguments: Any, use_cache: bool = True, **named: Any) -> Any:
        result = forward(*arguments, use_cache=use_cache, **named)
        result.logits = result.logits if use_cache else result.logits.flip(-1)
        return result

    model.forward = changed
    with pytest.raises(ValueError, match="other logits without a cache than with one"):
        CausalLM(model, None, "changed")


def test_a_model_that_gives_nan_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Its records have no finite loss, which their status says."""
    model = tiny_model("llama", VOCAB)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    lm = CausalLM(model, None, "broken")
    assert lm.response_nll(sequences()).isnan().all()


def test_a_model_without_logits_is_refused() -> None:
    model = tiny_model("llama", VOCAB).model
    with pytest.raises(ValueError, match="the encoder gives no logits; it is no causal language model"):
        CausalLM(model, None, "the encoder")


def test_a_model_that_is_split_over_devices(tmp_path: Any) -> None:
    """Dispatched by accelerate: with its parts on the CPU, and with its head on disk, where there is no weight."""
    accelerate = pytest.importorskip("accelerate")
    expected = reference(tiny_model("qwen3", VOCAB), sequences())
    for place, way in (("cpu", DirectHead), ("disk", KeptRows)):
        devices = {"model": "cpu", "lm_head": place}
        model = tiny_model("qwen3", VOCAB)
        dispatched = accelerate.dispatch_model(model, devices, offload_dir=tmp_path, force_hooks=True)
        lm = CausalLM(dispatched, None, "split")
        assert isinstance(lm.head, way)
        np.testing.assert_allclose(lm.response_nll(sequences()).numpy(), expected, atol=2e-5)


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks and replaced functions are gone when a call ends, also when it fails."""
    model = tiny_model("llama", VOCAB)
    lm = CausalLM(model, None, "llama")
    kept = KeptRows(model, model.base_model)

    def clean() -> bool:
        linear = model.lm_head
        return not (linear._forward_pre_hooks or linear._forward_hooks or "forward" in vars(model.model))

    assert clean()
    bad = [TokenSequence(np.array([1, 2, 3], np.int32), np.array([1], np.int32), np.array([VOCAB], np.int32))]
    for way in (lm.head, kept):
        lm.head = way
        with pytest.raises(ValueError, match=r"targets\[0\] is 300, outside \[0, 300\)"):
            lm.response_nll(bad)
        assert clean()
    two = TokenSequence(np.array([1, 2, 3], np.int32), np.array([0, 1], np.int32), np.array([VOCAB, 5], np.int32))
    with monkeypatch.context() as patch:
        patch.setattr(head, "WORKSPACE_BYTES", 1)  # one position at a time, all behind one pass
        with pytest.raises(ValueError, match=r"targets\[0\] is 300"):
            lm.response_nll([two])
    assert clean()
    model.model.forward = lambda *arguments, **named: SimpleNamespace()
    with pytest.raises((AttributeError, TypeError)):
        lm.response_nll(sequences())
    assert "forward" in vars(model.model)


@pytest.mark.parametrize("calls", ["losses", "losses of tokens", "probing"])
def test_one_model_in_two_threads(calls: str) -> None:
    """A pass never meets the hooks of another thread's, though here each waits within itself for the other."""
    model, batch = tiny_model("llama", VOCAB), sequences()
    lm = CausalLM(model, None, "llama")
    run: dict[str, Callable[[], torch.Tensor]] = {
        "losses": lambda: lm.response_nll(batch),
        "losses of tokens": lambda: torch.stack([lm.token_nll(sequence).mean() for sequence in batch]),
        "probing": lambda: CausalLM(model, None, "again").response_nll(batch),
    }
    expected = [run["losses"]().numpy(), run[calls]().numpy()]
    both = threading.Barrier(2)

    def meet(*_: Any) -> None:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.1)

    model.model.embed_tokens.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(run[name]) for name in ("losses", calls)]
    for got, right in zip(made, expected, strict=True):
        np.testing.assert_allclose(got.result().numpy(), right, atol=1e-5)
