"""Where a model runs, in which type, and how tensors get there."""

from __future__ import annotations

import logging
from typing import Any

import torch

from miwv_fast import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_log = logging.getLogger(__name__)


def choose_device(device: str) -> str:
    """`auto` is the GPU where there is one and the kernels were built for it, otherwise the CPU."""
    if device != "auto":
        try:
            place = torch.device(device)
        except RuntimeError:
            raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from None
        except TypeError:
            raise TypeError(f"device should be auto, cpu, cuda or cuda:N, it is {device!r}") from None
        if place.type not in ("cpu", "cuda"):
            raise ValueError(f"device {device!r}: the kernels run on cpu and cuda")
        if place.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(f"device {device!r}: no CUDA device is available")
            if (count := torch.cuda.device_count()) <= (place.index or 0):
                raise ValueError(f"device {device!r}: the last CUDA device is cuda:{count - 1}")
            if not ops.build_info()["cuda"]:
                raise ValueError(f"device {device!r}: {ops.launch.NO_KERNELS}")
        return device
    if not torch.cuda.is_available():
        return "cpu"
    if not ops.build_info()["cuda"]:
        _log.warning("a GPU is present, but %s; running on the CPU", ops.launch.NO_KERNELS)
        return "cpu"
    return "cuda"


def choose_dtype(dtype: str | torch.dtype, device: str) -> Any:
    """What to load the weights as: a torch type, or "auto" for the checkpoint's own. ValueError for another name."""
    if dtype == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else "auto"
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype in DTYPES:
        return DTYPES[str(dtype)]
    raise ValueError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. From memory that is not pinned a copy to a GPU would wait for all that runs there."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
