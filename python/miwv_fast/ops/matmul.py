"""Products of float32 matrices by oneDNN, where that of torch's two libraries is the faster one.

torch has MKL multiply them, which does not use AVX-512 on AMD's processors: on Zen 5 oneDNN, which torch has as well,
is 1.7 to 2.3 times as fast (benchmarks/results/head_cpu_zen5.json). The operator is one that torch's compiler calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@lru_cache
def uses_onednn() -> bool:
    """Whether products of float32 matrices on this CPU are oneDNN's: AMD's with AVX-512, where torch has both."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x `[..., H]` times weight `[V, H]`, plus bias `[V]`."""
    if uses_onednn() and _suits(x, weight, bias):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return nn.functional.linear(x, weight, bias)


def fast_linear() -> AbstractContextManager[object]:
    """Within, all linear layers that this thread runs are `linear`."""
    return _FastLinear() if uses_onednn() else nullcontext()


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Not what knows better how to multiply itself, is slow with oneDNN, is not there, or wants a gradient."""
    parts = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(type(part) in (Tensor, nn.Parameter) and part.is_cpu and part.dtype is torch.float32 for part in parts)
        and x.ndim >= 2
        and weight.is_contiguous()  # rows with gaps between them take oneDNN a thousand times as long
        and x.numel() * weight.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(part.requires_grad for part in parts))
    )


class _FastLinear(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is nn.functional.linear and not kwargs and not torch.compiler.is_compiling():
            return linear(*args)
        return function(*args, **(kwargs or {}))
