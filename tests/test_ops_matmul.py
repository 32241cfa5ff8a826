"""Linear layers by oneDNN: the same products, and whatever it does not suit left as it was."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from miwv_fast.ops import linear_response_nll, matmul
from miwv_fast.ops.products import Head, Product, _OneDnnProduct, product_of

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN is given, whatever this CPU is."""
    shapes: list[tuple[int, ...]] = []

    def suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        fits = _suits(x, weight, bias)
        if fits:
            shapes.append(tuple(x.shape))
        return fits

    _suits = matmul._suits
    monkeypatch.setattr(matmul, "uses_onednn", lambda: True)
    monkeypatch.setattr(matmul, "_suits", suits)
    return shapes


def assert_product(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Up to float32 sums in any order: a rounding for each term."""
    exact, most = nn.functional.linear(x.double(), weight.double()), x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, most = exact + bias.double(), most + bias.double().abs()
    assert result.dtype is torch.float32 and result.shape == exact.shape
    assert ((result - exact).abs() <= x.shape[-1] * torch.finfo(torch.float32).eps * most + 1e-30).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 33), (5, 33), (2, 3, 33), (2, 3, 4, 33)])
def test_layers_whatever_their_strides(calls: list[tuple[int, ...]], shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(33, 17, bias=bias)
    wide = torch.randn(*shape[:-1], 66, generator=generator)
    inputs = [wide[..., :33].contiguous(), wide[..., 3:36], wide[..., ::2], wide[..., :33].transpose(0, -2)]
    inputs.append(torch.randn(1, 33, generator=generator).expand(shape))
    weights = [layer.weight, torch.randn(33, 17).T, torch.randn(17, 66)[:, ::2], torch.randn(17, 40)[:, 3:36]]
    for x in inputs:
        for weight in weights:
            layer.weight = nn.Parameter(weight)
            with torch.no_grad(), matmul.fast_linear():
                assert_product(layer(x), x, layer.weight, layer.bias)
    assert len(calls) == len(inputs)  # by the first weight alone: the others have gaps


def test_values_that_are_not_finite_stay_in_their_row(calls: list[tuple[int, ...]]) -> None:
    x = torch.randn(6, 20)
    x[1, 2], x[4, 0] = torch.nan, torch.inf
    result = matmul.linear(x, torch.randn(9, 20).abs())
    assert result[1].isnan().all() and result[4].isinf().all() and result[[0, 2, 3, 5]].isfinite().all()
    assert calls


class OwnTensor(Tensor):
    pass


def test_what_is_left_as_it_is(calls: list[tuple[int, ...]]) -> None:
    """Other types and classes, nothing at all, vectors, what wants a gradient, autocast, and other threads."""
    with matmul.fast_linear():
        x, layer = torch.randn(3, 8), nn.Linear(8, 4)
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        layer.weight.requires_grad = False
        layer(x).sum().backward()
        assert layer.bias.grad.tolist() == [6.0] * 4
        with torch.inference_mode():
            with torch.autocast("cpu"):
                assert layer(x).dtype is torch.bfloat16
            for dtype in (torch.float64, torch.bfloat16):
                assert layer.to(dtype)(x.to(dtype)).dtype is dtype
            layer.float()
            assert layer(x[:0]).shape == (0, 4) and layer(x[0]).shape == (4,)
            assert type(layer(x.as_subclass(OwnTensor))) is OwnTensor
            assert nn.functional.linear(input=x, weight=layer.weight).shape == (3, 4)
        thread = threading.Thread(target=torch.inference_mode()(layer), args=(x,))
        thread.start()
        thread.join()
        assert not calls
        with torch.inference_mode():
            layer(x)
        assert calls == [(3, 8)]


def test_a_compiled_model_is_its_compilers(calls: list[tuple[int, ...]]) -> None:
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend)
    with torch.inference_mode(), matmul.fast_linear():
        assert_product(compiled(x), x, layer.weight, layer.bias)
    assert len(graphs) == 1 and "linear" in graphs[0].code and "mkldnn" not in graphs[0].code


def test_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses by both libraries, in several slices."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(90, 24, generator=generator), torch.randn(700, 24, generator=generator)
    targets, offsets = torch.randint(700, (90,), generator=generator), torch.arange(0, 91, 9)
    bias = torch.randn(700, generator=generator)
    losses = []
    for onednn in (False, True):
        monkeypatch.setattr("miwv_fast.ops.products.uses_onednn", lambda onednn=onednn: onednn)
        monkeypatch.setattr(matmul, "uses_onednn", lambda onednn=onednn: onednn)
        kind = product_of(hidden, Head(weight, bias, None, 1.0, 40_000), 90)
        assert type(kind) is (_OneDnnProduct if onednn else Product)
        losses.append(linear_response_nll(hidden, weight, targets, offsets, bias=bias, workspace_bytes=40_000))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-5)


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On AMD's processors with AVX-512, where torch has MKL; everywhere else linear layers are torch's."""
    decide = matmul.uses_onednn.__wrapped__
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for capability, vendor, expected in (
        ("AVX512", "AuthenticAMD", True),
        ("AVX2", "AuthenticAMD", False),
        ("AVX512", "GenuineIntel", False),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(Path, "read_text", lambda path, vendor=vendor: f"vendor_id\t: {vendor}\n")
        assert decide() is expected
    monkeypatch.setattr(matmul, "uses_onednn", lambda: False)
    with matmul.fast_linear():
        assert not torch.overrides._get_current_function_mode_stack()
